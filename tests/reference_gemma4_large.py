"""The large Gemma 4 sizes in plain NumPy float64: what their ONNX graphs must agree with.

Beside `reference_model.py`, whose pieces are used here: masks with pictures that see all of themselves, global layers
whose values are their keys, experts, and the embedder of the 12B. Formulas: transformers 5.24, classes as named.

Shapes: L tokens, D hidden width, E experts, n patches. Matrices are stored [outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import reference_model as base
from .reference_model import Array, Config, Weights

SLIDING, FULL = "sliding_attention", "full_attention"


def logits(weights: Weights, config: Config, input_ids: Sequence[int], soft_tokens: Sequence[Array] = ()) -> Array:
    """Logits [L, V]; `input_ids` hold the id of the medium once per soft token, `soft_tokens` [n, D] one per medium.

    Soft tokens replace the (scaled) embeddings of those rows unscaled. Those of images and videos see each other, those
    of sounds do not.
    """
    text = config["text_config"]
    ids = np.asarray(input_ids)
    table = weights["model.language_model.embed_tokens.weight"]
    vision = np.isin(ids, [config["image_token_id"], config["video_token_id"]])
    media = vision | (ids == config["audio_token_id"])
    x = table[np.where(media, text.get("pad_token_id", 0), ids)] * np.sqrt(text["hidden_size"])
    if media.any():
        x[media] = np.concatenate(soft_tokens)
    default = "vision" if config["model_type"] == "gemma4_unified" else None
    bidirectional = text.get("use_bidirectional_attention", default) == "vision"
    blocks = vision_blocks(vision) if bidirectional else np.full(len(ids), -1)
    for layer, kind in enumerate(text["layer_types"]):
        x = decoder_layer(x, weights, f"model.language_model.layers.{layer}", text, kind, mask(text, kind, blocks))
    x = base.rms_norm(x, weights["model.language_model.norm.weight"])
    return base.soft_cap(x @ table.T, text["final_logit_softcapping"])


def vision_blocks(media: Array) -> Array:
    """Number of the run of soft tokens that each token is in, -1 outside (`get_block_sequence_ids_for_mask`)."""
    starts = media & ~np.concatenate([[False], media[:-1]])
    return np.where(media, np.cumsum(starts) - 1, -1)


def mask(text: Config, kind: str, blocks: Array) -> Array:
    """bool [L, L], query by key (`create_masks_for_vision_model`): global layers are causal; windowed layers see what
    is before or in the same block, as far back as the window reaches."""
    query, key = np.mgrid[: len(blocks), : len(blocks)]
    causal = key <= query
    if kind == FULL:
        return causal
    same = (blocks[query] == blocks[key]) & (blocks[query] >= 0)
    return (causal | same) & (key > query - text["sliding_window"])


def decoder_layer(x: Array, weights: Weights, prefix: str, text: Config, kind: str, seen: Array) -> Array:
    """`Gemma4TextDecoderLayer` without per-layer inputs."""

    def norm(name: str, y: Array) -> Array:
        return base.rms_norm(y, weights[f"{prefix}.{name}.weight"])

    y = attention(norm("input_layernorm", x), weights, f"{prefix}.self_attn", text, kind, seen)
    x = x + norm("post_attention_layernorm", y)
    y = base.gated_mlp(norm("pre_feedforward_layernorm", x), weights, f"{prefix}.mlp")
    if text.get("enable_moe_block"):
        shares = route(x, weights, f"{prefix}.router", text["top_k_experts"])  # reads the stream without its norm
        z = experts(norm("pre_feedforward_layernorm_2", x), weights, f"{prefix}.experts", shares)
        y = norm("post_feedforward_layernorm_1", y) + norm("post_feedforward_layernorm_2", z)
    x = x + norm("post_feedforward_layernorm", y)
    return x * weights[f"{prefix}.layer_scalar"]


def attention(x: Array, weights: Weights, prefix: str, text: Config, kind: str, seen: Array) -> Array:
    """`Gemma4TextAttention`: without a value projection the values are the projected keys."""
    factor = weights[f"{prefix}.q_norm.weight"]
    width, positions = len(factor), np.arange(len(x))
    frequencies = inverse_frequencies(text, kind, width)

    def project(name: str) -> Array:
        return base.heads(x @ weights[f"{prefix}.{name}_proj.weight"].T, width)

    query = base.rotate(base.rms_norm(project("q"), factor), positions, frequencies)
    key = base.rotate(base.rms_norm(project("k"), weights[f"{prefix}.k_norm.weight"]), positions, frequencies)
    shared = text["attention_k_eq_v"] and kind == FULL
    value = value_heads(project("k" if shared else "v"), weights, prefix)
    return base.attend(query, key, value, seen, scale=1.0) @ weights[f"{prefix}.o_proj.weight"].T


def value_heads(projected: Array, weights: Weights, prefix: str) -> Array:
    """Values [L, heads, d]: normed without a weight and not rotated, projected keys too."""
    return base.rms_norm(projected)


def inverse_frequencies(text: Config, kind: str, width: int) -> Array:
    """Of `rope_parameters`, or of the defaults that published files leave out (`Gemma4TextConfig.__post_init__`)."""
    if text.get("rope_parameters"):
        return base.gemma4_inverse_frequencies(text, kind, width)
    if kind == FULL:
        return base.proportional_inverse_frequencies(1e6, width, 0.25)
    return base.default_inverse_frequencies(1e4, width)


def route(residual: Array, weights: Weights, prefix: str, used: int) -> Array:
    """Share of every expert in every row, [L, E], zero for experts that are not among the best `used`.

    softmax over all, the best renormalised to sum 1, then times a scale of each expert (`Gemma4TextRouter`).
    """
    normed = base.rms_norm(residual) * weights[f"{prefix}.scale"] * residual.shape[1] ** -0.5
    probabilities = base.softmax(normed @ weights[f"{prefix}.proj.weight"].T)
    best = np.argsort(-probabilities, axis=1)[:, :used]
    shares = np.zeros_like(probabilities)
    np.put_along_axis(shares, best, np.take_along_axis(probabilities, best, axis=1), axis=1)
    return shares / shares.sum(axis=1, keepdims=True) * weights[f"{prefix}.per_expert_scale"]


def experts(x: Array, weights: Weights, prefix: str, shares: Array) -> Array:
    """Sum over all experts of share * down(gelu(gate) * up), dense: nothing is skipped (`Gemma4TextExperts`)."""
    total = np.zeros_like(x)
    for expert, (gate_up, down) in enumerate(
        zip(weights[f"{prefix}.gate_up_proj"], weights[f"{prefix}.down_proj"], strict=True)
    ):
        gate, up = np.split(x @ gate_up.T, 2, axis=1)
        total += shares[:, expert, None] * ((base.gelu_tanh(gate) * up) @ down.T)
    return total


def unified_soft_tokens(weights: Weights, config: Config, patches: Array, positions: Array) -> Array:
    """Soft tokens [n, D] of one picture (`Gemma4UnifiedVisionEmbedder`).

    patches: [n, 3 * 48 * 48] in [0, 1], inside a patch by row, column, channel. positions: integers [n, 2], column x
    and row y of each patch. The weights have the names of the published files.
    """
    prefix = "model.vision_embedder"

    def layer_norm(name: str, y: Array) -> Array:
        centred = y - y.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(np.square(centred), axis=1, keepdims=True) + 1e-5)
        return scaled * weights[f"{prefix}.{name}.weight"] + weights[f"{prefix}.{name}.bias"]

    x = layer_norm("patch_ln1", np.asarray(patches, np.float64))
    x = layer_norm("patch_ln2", x @ weights[f"{prefix}.patch_dense.weight"].T + weights[f"{prefix}.patch_dense.bias"])
    table = weights[f"{prefix}.pos_embedding"]  # [positions, axis, width]
    x = layer_norm("pos_norm", x + table[positions[:, 0], 0] + table[positions[:, 1], 1])
    return base.rms_norm(x) @ weights["model.embed_vision.embedding_projection.weight"].T
