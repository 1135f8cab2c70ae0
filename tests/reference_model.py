"""The models in plain NumPy float64: what our ONNX graphs must agree with.

Everything is recomputed for the whole sequence: no cache, no chunks, no batch, masks written as formulas. Weights are
a dict under the names of the checkpoint's safetensors, the configuration is the parsed config.json. Where a formula
comes from is given as the name of the class or function in transformers (5.24) that states it.

Shapes: L tokens, D hidden width, H query heads, G key/value heads, d head width, V vocabulary rows, n patches.
Matrices are stored [outputs, inputs], so a linear layer is x @ W.T.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray
Weights = dict[str, Array]
Config = dict[str, Any]


def load_checkpoint(folder: Path | str) -> tuple[Weights, Config]:
    """All tensors of a checkpoint folder (one file or shards) widened to float64, and its config.json."""
    folder = Path(folder)
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: value.astype(np.float64) for name, value in load_file(file).items()}
    return weights, json.loads((folder / "config.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks


def rms_norm(x: Array, weight: Array | float = 1.0, eps: float = 1e-6) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (`Gemma4RMSNorm`).

    Gemma 4 passes the stored weight. Gemma 3 passes 1 + the stored weight (`Gemma3RMSNorm`).
    """
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def gelu_tanh(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): the approximation named `gelu_pytorch_tanh`, in every Gemma."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): the identity for small x, never beyond the cap."""
    return x if cap is None else cap * np.tanh(x / cap)


def default_inverse_frequencies(theta: float, width: int, factor: float = 1.0) -> Array:
    """Angle per position of the width/2 rotating pairs: theta^(-2j/width), divided by `factor` for linear scaling
    (`_compute_linear_scaling_rope_parameters`)."""
    return theta ** (-2 * np.arange(width // 2) / width) / factor


def proportional_inverse_frequencies(theta: float, width: int, rotary_share: float) -> Array:
    """Only the first `rotary_share` of the pairs rotate; the others have frequency 0 and pass through.

    The exponent's denominator stays the full width and pairs stay (j, j + width/2)
    (`_compute_proportional_rope_parameters`): this is not a rotation of the first dimensions alone.
    """
    frequencies = default_inverse_frequencies(theta, width)
    return np.where(np.arange(width // 2) < int(rotary_share * width // 2), frequencies, 0.0)


def rotate(x: Array, positions: Array, inverse_frequencies: Array) -> Array:
    """Rotary position embedding of x [L, heads, d]: pair (j, j + d/2) turns by position * frequency j
    (`apply_rotary_pos_emb` with `rotate_half`)."""
    angles = positions[:, None, None] * inverse_frequencies  # [L, 1, d/2]
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_mask(length: int, window: int | None) -> Array:
    """bool [L, L], True where query i sees key j: j <= i, and in a sliding layer also j > i - window, which is
    `window` keys with the query's own (`sliding_window_overlay`)."""
    query, key = np.mgrid[:length, :length]
    causal = key <= query
    return causal if window is None else causal & (key > query - window)


def attend(query: Array, key: Array, value: Array, mask: Array, scale: float) -> Array:
    """softmax(scale * q k^T) v per head: query [L, H, d], key and value [S, G, d], mask [L, S] -> [L, H * d].

    Key/value head g serves the query heads g*H/G .. (g+1)*H/G - 1 (`repeat_kv`).
    """
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = scale * np.einsum("qhd,khd->hqk", query, key)
    probabilities = softmax(np.where(mask, scores, -np.inf))
    return np.einsum("hqk,khd->qhd", probabilities, value).reshape(len(query), -1)


def heads(x: Array, width: int) -> Array:
    """[L, heads * width] -> [L, heads, width]."""
    return x.reshape(len(x), -1, width)


def gated_mlp(x: Array, weights: Weights, prefix: str) -> Array:
    """down(gelu(gate x) * up x), no biases (`Gemma3MLP`, `Gemma4TextMLP`)."""
    gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (gelu_tanh(x @ gate.T) * (x @ up.T)) @ down.T


# ---------------------------------------------------------------------------------------------------------------------
# Gemma 3 text (270M, 1B)


def layer_kinds(config: Config) -> list[str]:
    """ "sliding_attention" or "full_attention" per layer, from `layer_types` or from the older `sliding_window_pattern`
    (every pattern-th layer is global, `Gemma3TextConfig.__post_init__`)."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    pattern = config.get("sliding_window_pattern", 6)
    layers = range(1, config["num_hidden_layers"] + 1)
    return ["sliding_attention" if layer % pattern else "full_attention" for layer in layers]


def gemma3_inverse_frequencies(config: Config, kind: str) -> Array:
    """Frequencies of one kind of layer, from `rope_parameters` or from the older keys of the files on the hub, where
    `rope_theta` and `rope_scaling` speak of the global layers only (`Gemma3TextConfig.convert_rope_params_to_dict`)."""
    if config.get("rope_parameters"):
        facts = config["rope_parameters"][kind]
    elif kind == "full_attention":
        facts = {"rope_theta": config.get("rope_theta", 1e6)} | (config.get("rope_scaling") or {})
    else:
        facts = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    return default_inverse_frequencies(facts["rope_theta"], config["head_dim"], facts.get("factor", 1.0))


def gemma3_text_logits(weights: Weights, config: Config, input_ids: Sequence[int]) -> Array:
    """Logits [L, V] of `Gemma3ForCausalLM`.

    x = sqrt(D) * table[ids]; every layer adds norm(attention(norm(x))), then norm(mlp(norm(x))); logits are
    head(norm(x)), where the head is the unscaled embedding table unless the checkpoint has one of its own.
    """
    table = weights["model.embed_tokens.weight"]
    x = table[np.asarray(input_ids)] * np.sqrt(config["hidden_size"])
    for layer, kind in enumerate(layer_kinds(config)):
        x = gemma3_layer(x, weights, f"model.layers.{layer}", config, kind)
    x = rms_norm(x, 1 + weights["model.norm.weight"], config["rms_norm_eps"])
    head = table if config.get("tie_word_embeddings", True) else weights["lm_head.weight"]
    return soft_cap(x @ head.T, config.get("final_logit_softcapping"))


def gemma3_layer(x: Array, weights: Weights, prefix: str, config: Config, kind: str) -> Array:
    """One layer with norms before and after both blocks (`Gemma3DecoderLayer`), x [L, D] -> [L, D]."""

    def norm(name: str, y: Array) -> Array:
        return rms_norm(y, 1 + weights[f"{prefix}.{name}.weight"], config["rms_norm_eps"])

    y = gemma3_attention(norm("input_layernorm", x), weights, f"{prefix}.self_attn", config, kind)
    x = x + norm("post_attention_layernorm", y)
    y = gated_mlp(norm("pre_feedforward_layernorm", x), weights, f"{prefix}.mlp")
    return x + norm("post_feedforward_layernorm", y)


def gemma3_attention(x: Array, weights: Weights, prefix: str, config: Config, kind: str) -> Array:
    """`Gemma3Attention`: q and k are normed per head, then rotated; v is neither. Scores are scaled by
    query_pre_attn_scalar^-1/2, which need not be d^-1/2."""
    width, positions = config["head_dim"], np.arange(len(x))
    frequencies = gemma3_inverse_frequencies(config, kind)

    def project(name: str) -> Array:
        return heads(x @ weights[f"{prefix}.{name}_proj.weight"].T, width)

    def normed(name: str) -> Array:
        factor = 1 + weights[f"{prefix}.{name}_norm.weight"]
        return rotate(rms_norm(project(name), factor, config["rms_norm_eps"]), positions, frequencies)

    mask = attention_mask(len(x), config["sliding_window"] if kind == "sliding_attention" else None)
    scale = config["query_pre_attn_scalar"] ** -0.5
    return attend(normed("q"), normed("k"), project("v"), mask, scale) @ weights[f"{prefix}.o_proj.weight"].T


# ---------------------------------------------------------------------------------------------------------------------
# Gemma 4 text (E2B, E4B)


def gemma4_text_logits(
    weights: Weights, config: Config, input_ids: Sequence[int], soft_tokens: Sequence[Array] = ()
) -> Array:
    """Logits [L, V] of `Gemma4ForConditionalGeneration`; `soft_tokens` are one [n, D] per picture or clip, in order.

    `input_ids` hold the image or audio id once per soft token. Soft tokens replace the (scaled) embedding of those rows
    unscaled, and enter causally like any token. Where there are none for sounds, rows with the audio id keep that of
    the pad id. The logits are capped at `final_logit_softcapping`.
    """
    text = config["text_config"]
    ids = np.asarray(input_ids)
    table = weights["model.language_model.embed_tokens.weight"]
    x = table[without_media(config, ids)] * np.sqrt(text["hidden_size"])
    is_soft = np.isin(ids, [config["image_token_id"], config["audio_token_id"]])
    if sum(map(len, soft_tokens)) < is_soft.sum():
        is_soft = ids == config["image_token_id"]
    if is_soft.any():
        x[is_soft] = np.concatenate(soft_tokens)
    per_layer_inputs = gemma4_per_layer_inputs(weights, config, ids, x)  # [L, layers, P]
    keys_values: dict[str, tuple[Array, Array]] = {}
    for layer, kind in enumerate(text["layer_types"]):
        shares = layer >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
        x = gemma4_layer(x, weights, layer, text, kind, per_layer_inputs[:, layer], keys_values, shares)
    x = rms_norm(x, weights["model.language_model.norm.weight"], text["rms_norm_eps"])
    return soft_cap(x @ table.T, text["final_logit_softcapping"])


def without_media(config: Config, ids: Array) -> Array:
    """The ids that tables are read with: the pad id wherever an image, video or audio soft token stands. The tokens
    around a medium (begin and end of image) keep their own (`Gemma4Model.forward`)."""
    media = [config["image_token_id"], config["video_token_id"], config["audio_token_id"]]
    return np.where(np.isin(ids, media), config["text_config"]["pad_token_id"], ids)


def gemma4_per_layer_inputs(weights: Weights, config: Config, ids: Array, x: Array) -> Array:
    """One vector of width P per token and layer, [L, layers, P] (`get_per_layer_inputs`, `project_per_layer_inputs`):

        (table[ids] * sqrt(P)  +  norm(projection(x) / sqrt(D))) / sqrt(2)

    The table sees the pad id at soft tokens, the projection sees x with the soft tokens in place.
    """
    text, prefix = config["text_config"], "model.language_model"
    shape = (len(ids), text["num_hidden_layers"], text["hidden_size_per_layer_input"])
    if shape[-1] == 0:
        return np.zeros(shape)
    identity = weights[f"{prefix}.embed_tokens_per_layer.weight"][without_media(config, ids)] * np.sqrt(shape[-1])
    context = x @ weights[f"{prefix}.per_layer_model_projection.weight"].T / np.sqrt(text["hidden_size"])
    factor = weights[f"{prefix}.per_layer_projection_norm.weight"]
    context = rms_norm(context.reshape(shape), factor, text["rms_norm_eps"])
    return (identity.reshape(shape) + context) / np.sqrt(2)


def gemma4_layer(
    x: Array,
    weights: Weights,
    layer: int,
    text: Config,
    kind: str,
    per_layer_input: Array,
    keys_values: dict[str, tuple[Array, Array]],
    shares: bool,
) -> Array:
    """`Gemma4TextDecoderLayer`: attention, MLP, per-layer input, then the whole stream times `layer_scalar`."""
    prefix = f"model.language_model.layers.{layer}"

    def norm(name: str, y: Array) -> Array:
        return rms_norm(y, weights[f"{prefix}.{name}.weight"], text["rms_norm_eps"])

    y = norm("input_layernorm", x)
    y = gemma4_attention(y, weights, f"{prefix}.self_attn", text, kind, keys_values, shares)
    x = x + norm("post_attention_layernorm", y)
    # In layers that share keys and values the MLP may be twice as wide; the matrices say so themselves.
    y = gated_mlp(norm("pre_feedforward_layernorm", x), weights, f"{prefix}.mlp")
    x = x + norm("post_feedforward_layernorm", y)
    if text["hidden_size_per_layer_input"]:
        gate = gelu_tanh(x @ weights[f"{prefix}.per_layer_input_gate.weight"].T)  # reads the stream without a norm
        y = (gate * per_layer_input) @ weights[f"{prefix}.per_layer_projection.weight"].T
        x = x + norm("post_per_layer_input_norm", y)
    return x * weights[f"{prefix}.layer_scalar"]


def gemma4_attention(
    x: Array,
    weights: Weights,
    prefix: str,
    text: Config,
    kind: str,
    keys_values: dict[str, tuple[Array, Array]],
    shares: bool,
) -> Array:
    """`Gemma4TextAttention`: q and k normed per head and rotated, v normed without a weight, scores not scaled.

    A layer that shares projects only its query; keys and values are those of the last layer of its kind that has its
    own. `keys_values` holds them by kind, already normed and rotated; layers with their own overwrite the entry.
    """
    eps, positions = text["rms_norm_eps"], np.arange(len(x))
    query_factor = weights[f"{prefix}.q_norm.weight"]
    width = len(query_factor)  # global layers have wider heads
    frequencies = gemma4_inverse_frequencies(text, kind, width)

    def project(name: str) -> Array:
        return heads(x @ weights[f"{prefix}.{name}_proj.weight"].T, width)

    query = rotate(rms_norm(project("q"), query_factor, eps), positions, frequencies)
    if not shares:
        key = rotate(rms_norm(project("k"), weights[f"{prefix}.k_norm.weight"], eps), positions, frequencies)
        keys_values[kind] = key, rms_norm(project("v"), eps=eps)
    key, value = keys_values[kind]
    mask = attention_mask(len(x), text["sliding_window"] if kind == "sliding_attention" else None)
    return attend(query, key, value, mask, scale=1.0) @ weights[f"{prefix}.o_proj.weight"].T


def gemma4_inverse_frequencies(text: Config, kind: str, width: int) -> Array:
    """Sliding layers rotate fully, global layers "proportionally" (`Gemma4TextConfig.__post_init__`)."""
    facts = text["rope_parameters"][kind]
    if facts["rope_type"] == "proportional":
        return proportional_inverse_frequencies(facts["rope_theta"], width, facts["partial_rotary_factor"])
    return default_inverse_frequencies(facts["rope_theta"], width)


# ---------------------------------------------------------------------------------------------------------------------
# Gemma 4 vision


def gemma4_soft_tokens(weights: Weights, config: Config, patches: Array, positions: Array) -> Array:
    """Soft tokens [n / 9, D] of one image (`Gemma4Model.get_image_features`).

    patches: [n, 3 * 16 * 16] in [0, 1], one row per patch in raster order, inside a patch by row, column, channel.
    positions: integers [n, 2], column x and row y of each patch. The output is in raster order of 3x3 blocks.
    """
    vision, tower = config["vision_config"], "model.vision_tower"
    table = weights[f"{tower}.patch_embedder.position_embedding_table"]  # [2, sizes, hidden]: columns, then rows
    x = 2 * (np.asarray(patches, np.float64) - 0.5) @ weights[f"{tower}.patch_embedder.input_proj.weight"].T
    x = x + table[0][positions[:, 0]] + table[1][positions[:, 1]]
    for layer in range(vision["num_hidden_layers"]):
        x = gemma4_vision_layer(x, positions, weights, f"{tower}.encoder.layers.{layer}", vision)
    x = pool(x, positions, vision["pooling_kernel_size"]) * np.sqrt(vision["hidden_size"])
    if vision["standardize"]:
        x = (x - weights[f"{tower}.std_bias"]) * weights[f"{tower}.std_scale"]
    projection = weights["model.embed_vision.embedding_projection.weight"]
    return rms_norm(x, eps=vision["rms_norm_eps"]) @ projection.T


def pool(x: Array, positions: Array, size: int) -> Array:
    """Mean of each size x size block of patches, [n, h] -> [n / size^2, h], blocks in raster order
    (`Gemma4VisionPooler`)."""
    columns = (positions[:, 0].max() + 1) // size
    block = positions[:, 0] // size + columns * (positions[:, 1] // size)
    sums = np.zeros((len(x) // size**2, x.shape[1]))
    np.add.at(sums, block, x)
    return sums / size**2


def rotate_2d(x: Array, positions: Array, theta: float) -> Array:
    """Axial rotation of x [n, heads, d]: the first d/2 dimensions turn by the column, the others by the row, each half
    with its own pairs (j, j + d/4) (`apply_multidimensional_rope`)."""
    halves = np.split(x, 2, axis=-1)
    frequencies = default_inverse_frequencies(theta, x.shape[-1] // 2)
    return np.concatenate([rotate(half, positions[:, axis], frequencies) for axis, half in enumerate(halves)], axis=-1)


def clipped_linear(x: Array, weights: Weights, name: str, vision: Config) -> Array:
    """clamp(W clamp(x)) with the four learned bounds of the layer (`Gemma4ClippableLinear`)."""
    matrix = weights[f"{name}.linear.weight"].T
    if not vision["use_clipped_linears"]:
        return x @ matrix
    low, high = weights[f"{name}.input_min"], weights[f"{name}.input_max"]
    return np.clip(np.clip(x, low, high) @ matrix, weights[f"{name}.output_min"], weights[f"{name}.output_max"])


def gemma4_vision_layer(x: Array, positions: Array, weights: Weights, prefix: str, vision: Config) -> Array:
    """`Gemma4VisionEncoderLayer`: like a text layer without mask, per-layer input and layer scalar."""
    eps, width = vision["rms_norm_eps"], vision["head_dim"]

    def norm(name: str, y: Array) -> Array:
        return rms_norm(y, weights[f"{prefix}.{name}.weight"], eps)

    def linear(name: str, y: Array) -> Array:
        return clipped_linear(y, weights, f"{prefix}.{name}", vision)

    def normed(name: str, y: Array) -> Array:
        y = norm(f"self_attn.{name}_norm", heads(linear(f"self_attn.{name}_proj", y), width))
        return rotate_2d(y, positions, vision["rope_parameters"]["rope_theta"])

    y = norm("input_layernorm", x)
    value = rms_norm(heads(linear("self_attn.v_proj", y), width), eps=eps)
    everything = np.ones((len(x), len(x)), bool)
    y = linear("self_attn.o_proj", attend(normed("q", y), normed("k", y), value, everything, scale=1.0))
    x = x + norm("post_attention_layernorm", y)
    y = norm("pre_feedforward_layernorm", x)
    y = linear("mlp.down_proj", gelu_tanh(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y))
    return x + norm("post_feedforward_layernorm", y)
