"""Gemma 4's ears in plain NumPy float64; see `reference_model.py` for conventions.

Formulas: transformers 5.24, classes as named. One clip at a time: every frame is a whole one, so nothing is masked but
what the window cuts off.

Shapes: L samples, F frames, T soft tokens, D hidden width of the tower, H heads, d head width.
"""

from __future__ import annotations

import numpy as np

from . import reference_model as base
from .reference_model import Array, Config, Weights

RATE, HOP, LENGTH, POINTS, FILTERS = 16_000, 160, 320, 512, 128


# ---------------------------------------------------------------------------------------------------------------------
# The front end


def log_mel(waveform: Array) -> Array:
    """[F, 128] of a waveform [L] (`Gemma4AudioFeatureExtractor`).

    In front of the clip stand 160 zeros. Frames of 320 samples begin every 160 samples, and count if one more sample
    follows them. The window is rounded to float32, as it is there.
    """
    padded = np.concatenate([np.zeros(HOP), np.asarray(waveform, np.float64)])
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(LENGTH) / LENGTH)).astype(np.float32)
    count = max((len(waveform) - 1) // HOP, 0)
    frames = np.stack([padded[HOP * index : HOP * index + LENGTH] for index in range(count)])
    magnitudes = np.abs(np.fft.rfft(frames * window.astype(np.float64), n=POINTS))
    return np.log(magnitudes @ mel_filters() + 1e-3)


def mel_filters() -> Array:
    """[257, 128]: triangles with corners evenly spaced in mel, 2595 log10(1 + f / 700) (`mel_filter_bank`, "htk")."""
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), FILTERS + 2) / 2595) - 1)
    filters = np.zeros((POINTS // 2 + 1, FILTERS))
    for bin in range(POINTS // 2 + 1):
        frequency = bin * RATE / POINTS
        for index in range(FILTERS):
            left, peak, right = corners[index : index + 3]
            side = (frequency - left) / (peak - left) if frequency <= peak else (right - frequency) / (right - peak)
            filters[bin, index] = max(side, 0.0)
    return filters


# ---------------------------------------------------------------------------------------------------------------------
# The tower


def soft_tokens(weights: Weights, config: Config, waveform: Array) -> Array:
    """[T, D of the decoder] of one clip (`Gemma4AudioModel`, `Gemma4MultimodalEmbedder`)."""
    return tower(weights, config, log_mel(waveform))


def tower(weights: Weights, config: Config, features: Array) -> Array:
    """The same from frames [F, 128] on."""
    audio, name = config["audio_config"], "model.audio_tower"
    x = subsample(weights, features)
    for layer in range(audio["num_hidden_layers"]):
        x = conformer_layer(x, weights, f"{name}.layers.{layer}", audio)
    x = x @ weights[f"{name}.output_proj.weight"].T + weights[f"{name}.output_proj.bias"]
    return base.rms_norm(x) @ weights["model.embed_audio.embedding_projection.weight"].T


def subsample(weights: Weights, features: Array) -> Array:
    """[F, 128] -> [T, D], T = ceil(ceil(F / 2) / 2) (`Gemma4AudioSubSampleConvProjection`)."""
    name = "model.audio_tower.subsample_conv_projection"
    x = features[:, :, None]  # time, frequency, channel
    for index in range(2):
        x = convolve(x, weights[f"{name}.layer{index}.conv.weight"])
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True) + 1e-6)
        x = np.maximum(scaled * weights[f"{name}.layer{index}.norm.weight"], 0)
    return x.reshape(len(x), -1) @ weights[f"{name}.input_proj_linear.weight"].T


def convolve(x: Array, kernel: Array) -> Array:
    """3 x 3, stride 2, one row and column of zeros around: [rows, columns, in] and [out, in, 3, 3]."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    rows, columns = (x.shape[0] + 1) // 2, (x.shape[1] + 1) // 2
    total = np.zeros((rows, columns, len(kernel)))
    for y in range(3):
        for z in range(3):
            seen = padded[y : y + 2 * rows - 1 : 2, z : z + 2 * columns - 1 : 2]
            total += seen @ kernel[:, :, y, z].T
    return total


def conformer_layer(x: Array, weights: Weights, prefix: str, audio: Config) -> Array:
    """`Gemma4AudioLayer`."""

    def norm(name: str, y: Array) -> Array:
        return base.rms_norm(y, weights[f"{prefix}.{name}.weight"])

    x = x + feed_forward(x, weights, f"{prefix}.feed_forward1", audio)
    y = attention(norm("norm_pre_attn", x), weights, f"{prefix}.self_attn", audio)
    x = x + norm("norm_post_attn", y)
    x = x + light_convolution(x, weights, f"{prefix}.lconv1d", audio)
    x = x + feed_forward(x, weights, f"{prefix}.feed_forward2", audio)
    return norm("norm_out", x)


def feed_forward(x: Array, weights: Weights, prefix: str, audio: Config) -> Array:
    """`Gemma4AudioFeedForward` without its residual."""
    y = base.rms_norm(x, weights[f"{prefix}.pre_layer_norm.weight"])
    y = silu(base.clipped_linear(y, weights, f"{prefix}.ffw_layer_1", audio))
    y = base.clipped_linear(y, weights, f"{prefix}.ffw_layer_2", audio)
    return audio["residual_weight"] * base.rms_norm(y, weights[f"{prefix}.post_layer_norm.weight"])


def attention(x: Array, weights: Weights, prefix: str, audio: Config) -> Array:
    """`Gemma4AudioAttention`, row i seeing rows i - 11 to i (12 keys: `sliding_window_mask_function` of 12 and 0)."""
    width = x.shape[1] // audio["num_attention_heads"]
    query, key, value = (
        base.heads(base.clipped_linear(x, weights, f"{prefix}.{part}_proj", audio), width) for part in "qkv"
    )
    query = query * width**-0.5 / np.log(2) * np.log(1 + np.exp(weights[f"{prefix}.per_dim_scale"]))
    key = key * np.log(1 + np.e) / np.log(2)
    relative = base.heads(distances(len(x), x.shape[1]) @ weights[f"{prefix}.relative_k_proj.weight"].T, width)
    rows, columns = np.mgrid[: len(x), : len(x)]
    distance = rows - columns
    scores = np.einsum("ihd,jhd->hij", query, key)
    scores += np.einsum("ihd,ijhd->hij", query, relative[np.maximum(distance, 0)])
    scores = base.soft_cap(scores, audio["attention_logit_cap"])
    visible = (distance >= 0) & (distance < audio["attention_context_left"] - 1)
    shares = base.softmax(np.where(visible, scores, -1e9))
    mixed = np.einsum("hij,jhd->ihd", shares, value).reshape(x.shape)
    return base.clipped_linear(mixed, weights, f"{prefix}.post", audio)


def distances(count: int, hidden: int) -> Array:
    """Vectors [count, D] of the distances 0, 1, ...: sines, then cosines (`Gemma4AudioRelPositionalEncoding`)."""
    half = hidden // 2
    rates = np.exp(-np.log(10_000) * np.arange(half) / (half - 1))
    angles = np.arange(count)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def light_convolution(x: Array, weights: Weights, prefix: str, audio: Config) -> Array:
    """`Gemma4AudioLightConv1d` without its residual: row i sees rows i - 4 to i."""
    y = base.rms_norm(x, weights[f"{prefix}.pre_layer_norm.weight"])
    value, gate = np.split(base.clipped_linear(y, weights, f"{prefix}.linear_start", audio), 2, axis=1)
    y = value / (1 + np.exp(-gate))
    kernel = weights[f"{prefix}.depthwise_conv1d.weight"][:, 0]  # [D, 5], the last entry for the row itself
    size = kernel.shape[1]
    padded = np.pad(y, ((size - 1, 0), (0, 0)))
    y = np.sum([padded[tap : tap + len(y)] * kernel[:, tap] for tap in range(size)], axis=0)
    y = silu(base.rms_norm(y, weights[f"{prefix}.conv_norm.weight"]))
    return base.clipped_linear(y, weights, f"{prefix}.linear_end", audio)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


# ---------------------------------------------------------------------------------------------------------------------
# The 12B


def unified_soft_tokens(weights: Weights, waveform: Array) -> Array:
    """[ceil(L / 640), D]: raw samples, normed and projected (`Gemma4UnifiedAudioFeatureExtractor`,
    `Gemma4UnifiedMultimodalEmbedder`); the last frame is filled up with zeros."""
    matrix = weights["model.embed_audio.embedding_projection.weight"]
    size = matrix.shape[1]
    frames = np.pad(np.asarray(waveform, np.float64), (0, -len(waveform) % size)).reshape(-1, size)
    return base.rms_norm(frames) @ matrix.T
