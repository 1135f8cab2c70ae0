"""PaliGemma and Gemma 3 with vision in plain NumPy float64; see `reference_model.py` for conventions.

Weights are under the module names of transformers 5.24 (`canonical` renames what older files have). Pictures are uint8
[S, S, 3], already of the size that the tower wants.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .reference_model import (
    Array,
    Config,
    Weights,
    default_inverse_frequencies,
    gated_mlp,
    gelu_tanh,
    gemma3_inverse_frequencies,
    heads,
    layer_kinds,
    rms_norm,
    rotate,
    soft_cap,
    softmax,
)

Block = tuple[int, int]  # first row of a block of mutually visible rows, and the row after its last


def canonical(weights: Weights) -> Weights:
    """Names of files in any style -> module names (`conversion_mapping.py`, "llava")."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "language_model.")
        inside = name.startswith(("language_model.", "vision_tower.", "multi_modal_projector."))
        renamed["model." + name if inside else name] = value
    return renamed


# ---------------------------------------------------------------------------------------------------------------------
# The tower and the projectors


def layer_norm(x: Array, weights: Weights, name: str, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias (`torch.nn.LayerNorm`)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Array, weights: Weights, name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def siglip_features(weights: Weights, config: Config, picture: Array) -> Array:
    """Features [side, side, hidden] of one picture (`SiglipVisionModel`, last_hidden_state).

    A convolution whose kernel and stride are one patch sees each patch by itself; then every position has a learned
    vector, and every layer attends from all patches to all.
    """
    vision, tower = config["vision_config"], "model.vision_tower"
    patch, hidden, eps = vision["patch_size"], vision["hidden_size"], vision.get("layer_norm_eps", 1e-6)
    pixels = (picture.astype(np.float64) / 255 - 0.5) / 0.5
    side = len(picture) // patch
    kernel = weights[f"{tower}.embeddings.patch_embedding.weight"]  # [hidden, channel, row, column]
    x = np.empty((side, side, hidden))
    for row in range(side):
        for column in range(side):
            part = pixels[patch * row : patch * (row + 1), patch * column : patch * (column + 1)]
            x[row, column] = np.einsum("ocyx,yxc->o", kernel, part)
    x = (x + weights[f"{tower}.embeddings.patch_embedding.bias"]).reshape(side * side, hidden)
    x = x + weights[f"{tower}.embeddings.position_embedding.weight"]
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        x = x + siglip_attention(layer_norm(x, weights, f"{prefix}.layer_norm1", eps), weights, prefix, vision)
        y = linear(layer_norm(x, weights, f"{prefix}.layer_norm2", eps), weights, f"{prefix}.mlp.fc1")
        x = x + linear(gelu_tanh(y), weights, f"{prefix}.mlp.fc2")
    return layer_norm(x, weights, f"{tower}.post_layernorm", eps).reshape(side, side, hidden)


def siglip_attention(x: Array, weights: Weights, prefix: str, vision: Config) -> Array:
    """`SiglipAttention`: biases everywhere, no mask, scale (head width)^-1/2."""
    width = vision["hidden_size"] // vision["num_attention_heads"]
    query, key, value = (heads(linear(x, weights, f"{prefix}.self_attn.{part}_proj"), width) for part in "qkv")
    shares = softmax(np.einsum("qhd,khd->hqk", query, key) * width**-0.5)
    mixed = np.einsum("hqk,khd->qhd", shares, value).reshape(len(x), -1)
    return linear(mixed, weights, f"{prefix}.self_attn.out_proj")


def paligemma_soft_tokens(weights: Weights, config: Config, picture: Array) -> Array:
    """[side^2, D] in raster order (`PaliGemmaMultiModalProjector`)."""
    features = siglip_features(weights, config, picture)
    return linear(features.reshape(-1, features.shape[-1]), weights, "model.multi_modal_projector.linear")


def gemma3_soft_tokens(weights: Weights, config: Config, picture: Array) -> Array:
    """[mm_tokens_per_image, D]: the mean of each square of patches, normed and projected
    (`Gemma3MultiModalProjector`)."""
    features, name = siglip_features(weights, config, picture), "model.multi_modal_projector"
    side = round(config["mm_tokens_per_image"] ** 0.5)
    pool = len(features) // side
    pooled = features.reshape(side, pool, side, pool, -1).mean(axis=(1, 3)).reshape(side * side, -1)
    normed = rms_norm(pooled, 1 + weights[f"{name}.mm_soft_emb_norm.weight"])
    return normed @ weights[f"{name}.mm_input_projection_weight"]  # stored [inputs, outputs]


# ---------------------------------------------------------------------------------------------------------------------
# Decoders


def visible(length: int, blocks: Sequence[Block], window: int | None, *, inside_window: bool) -> Array:
    """bool [L, L], True where row i sees column j (facts 2.6; `create_masks_for_vision_model`, `PaliGemmaModel`).

    Blocks widen the causal mask. With `inside_window` (Gemma 3) the window then cuts both; without (PaliGemma) the
    window cuts the causal part only.
    """
    query, key = np.mgrid[:length, :length]
    causal, near = key <= query, np.full((length, length), True) if window is None else key > query - window
    same = np.zeros((length, length), bool)
    for first, end in blocks:
        same[first:end, first:end] = True
    return (causal | same) & near if inside_window else (causal & near) | same


def attend(query: Array, key: Array, value: Array, mask: Array, scale: float, cap: float | None) -> Array:
    """Like `reference_model.attend`, with scores capped after the scale and before the mask (`Gemma2Attention`)."""
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = soft_cap(scale * np.einsum("qhd,khd->hqk", query, key), cap)
    shares = softmax(np.where(mask, scores, -np.inf))
    return np.einsum("hqk,khd->qhd", shares, value).reshape(len(query), -1)


def with_soft_tokens(weights: Weights, config: Config, input_ids: Sequence[int], soft_tokens: Sequence[Array]) -> Array:
    """Embeddings [L, D]: sqrt(D) * table[ids], and soft tokens as they are in the places of the image id."""
    ids, table = np.asarray(input_ids), weights["model.language_model.embed_tokens.weight"]
    is_image = ids == config["image_token_index"]
    x = table[np.where(is_image, 0, ids)] * np.sqrt(table.shape[1])
    if is_image.any():
        x[is_image] = np.concatenate(soft_tokens)
    return x


def head(weights: Weights, x: Array) -> Array:
    return x @ weights.get("lm_head.weight", weights["model.language_model.embed_tokens.weight"]).T


def paligemma_logits(
    weights: Weights, config: Config, input_ids: Sequence[int], soft_tokens: Sequence[Array], prefix: int
) -> Array:
    """Logits [L, V] of `PaliGemmaForConditionalGeneration`; the first `prefix` ids are the prompt, which sees all of
    itself, the rest is the answer."""
    text, first = config["text_config"], 1  # positions count from one
    x = with_soft_tokens(weights, config, input_ids, soft_tokens)
    second = text["model_type"] == "gemma2"
    for layer in range(text["num_hidden_layers"]):
        windowed = second and layer % 2 == 0
        mask = visible(
            len(x), [(0, prefix)], text.get("sliding_window", 4096) if windowed else None, inside_window=False
        )
        x = gemma_layer(x, weights, f"model.language_model.layers.{layer}", text, mask, np.arange(len(x)) + first)
    x = rms_norm(x, 1 + weights["model.language_model.norm.weight"])
    return soft_cap(head(weights, x), text.get("final_logit_softcapping", 30.0) if second else None)


def gemma_layer(x: Array, weights: Weights, prefix: str, text: Config, mask: Array, positions: Array) -> Array:
    """`GemmaDecoderLayer` with norms before both halves, or `Gemma2DecoderLayer` with norms after them as well."""

    def norm(name: str, y: Array) -> Array:
        return rms_norm(y, 1 + weights[f"{prefix}.{name}.weight"])

    second = text["model_type"] == "gemma2"
    width = text.get("head_dim", 256)
    cap = text.get("attn_logit_softcapping", 50.0) if second else None
    scale = (text.get("query_pre_attn_scalar", 256) if second else width) ** -0.5
    frequencies = default_inverse_frequencies(10_000.0, width)
    y = norm("input_layernorm", x)
    query, key, value = (heads(y @ weights[f"{prefix}.self_attn.{part}_proj.weight"].T, width) for part in "qkv")
    query, key = rotate(query, positions, frequencies), rotate(key, positions, frequencies)
    y = attend(query, key, value, mask, scale, cap) @ weights[f"{prefix}.self_attn.o_proj.weight"].T
    if not second:
        x = x + y
        return x + gated_mlp(norm("post_attention_layernorm", x), weights, f"{prefix}.mlp")
    x = x + norm("post_attention_layernorm", y)
    y = gated_mlp(norm("pre_feedforward_layernorm", x), weights, f"{prefix}.mlp")
    return x + norm("post_feedforward_layernorm", y)


def gemma3_vision_logits(
    weights: Weights, config: Config, input_ids: Sequence[int], soft_tokens: Sequence[Array] = ()
) -> Array:
    """Logits [L, V] of `Gemma3ForConditionalGeneration`; every run of image ids is a block."""
    text, prefix = config["text_config"], "model.language_model"
    x = with_soft_tokens(weights, config, input_ids, soft_tokens)
    is_image = np.asarray(input_ids) == config["image_token_index"]
    edges = np.flatnonzero(np.diff(is_image.astype(int), prepend=0, append=0)).tolist()
    blocks = list(zip(edges[::2], edges[1::2], strict=True))
    for layer, kind in enumerate(layer_kinds(text)):
        window = text["sliding_window"] if kind == "sliding_attention" else None
        mask = visible(len(x), blocks, window, inside_window=True)
        x = gemma3_layer(x, weights, f"{prefix}.layers.{layer}", text, kind, mask)
    return head(weights, rms_norm(x, 1 + weights[f"{prefix}.norm.weight"]))


def gemma3_layer(x: Array, weights: Weights, prefix: str, text: Config, kind: str, mask: Array) -> Array:
    """`Gemma3DecoderLayer` under a mask made elsewhere."""

    def norm(name: str, y: Array) -> Array:
        return rms_norm(y, 1 + weights[f"{prefix}.{name}.weight"])

    width, positions = text["head_dim"], np.arange(len(x))
    frequencies = gemma3_inverse_frequencies(text, kind)
    y = norm("input_layernorm", x)
    query, key, value = (heads(y @ weights[f"{prefix}.self_attn.{part}_proj.weight"].T, width) for part in "qkv")
    query, key = norm("self_attn.q_norm", query), norm("self_attn.k_norm", key)
    query, key = rotate(query, positions, frequencies), rotate(key, positions, frequencies)
    mixed = attend(query, key, value, mask, text["query_pre_attn_scalar"] ** -0.5, None)
    x = x + norm("post_attention_layernorm", mixed @ weights[f"{prefix}.self_attn.o_proj.weight"].T)
    y = gated_mlp(norm("pre_feedforward_layernorm", x), weights, f"{prefix}.mlp")
    return x + norm("post_feedforward_layernorm", y)
