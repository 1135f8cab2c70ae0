"""The audio graph of Gemma 4 E2B and E4B: waveform -> log-mel frames -> conformer -> projection.

Formulas: transformers `feature_extraction_gemma4.py` (Gemma4AudioFeatureExtractor) and `modeling_gemma4.py`
(Gemma4AudioSubSampleConvProjection, Gemma4AudioLayer, Gemma4AudioAttention, Gemma4AudioModel,
Gemma4MultimodalEmbedder). One clip at a time and nothing padded: frames that are not whole are left out, so nothing has
to be marked as valid.

Shapes in comments: L samples, F frames, T soft tokens, D hidden size of the tower, H heads, d head size.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...kernels.audio import hann_window, mel_filters, windowed_fourier
from .. import blocks
from ..builder import DOUBLE, FLOAT, GraphBuilder
from ..checkpoint import Weights
from . import ExportOptions
from ._gemma4_config import Config, ConformerConfig

__all__ = ["HOP", "RATE", "build_audio"]

RATE, HOP = 16_000, 160
POINTS, FILTERS, FLOOR = 512, 128, 1e-3
_NORM_EPSILON = 1e-6  # of the layer norms between the convolutions
_MASKED = -1e9


def build_audio(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """waveform float32 [L] in [-1, 1] at 16 kHz, more than one hop long -> soft_tokens [T, D of the decoder]."""
    audio = config.audio
    assert isinstance(audio, ConformerConfig)
    waveform = graph.input("waveform", FLOAT, ["samples"])
    with graph.scope("front_end"):
        features = _log_mel(graph, waveform)
    with graph.scope("subsample"):
        x = _subsample(graph, weights, audio, features)
    blocked = _Blocked(graph, x, audio.window)
    for layer in range(audio.layers):
        with graph.scope(f"layers.{layer}"):
            x = _layer(graph, weights, audio, f"audio.layers.{layer}", x, blocked)
    x = blocks.linear(graph, x, weights, "audio.output_proj.weight", (audio.output, audio.hidden), bias=True)
    normed = blocks.rms_norm(graph, x, blocks.ones(graph, audio.output), "embed_audio_norm")
    shape = (config.text.hidden, audio.output)
    soft_tokens = blocks.linear(graph, normed, weights, "embed_audio.embedding_projection.weight", shape)
    graph.output(soft_tokens, "soft_tokens", FLOAT, ["soft_tokens", config.text.hidden])


# --- the front end


def _log_mel(graph: GraphBuilder, waveform: ir.Value) -> ir.Value:
    """ln(|Fourier transform of windowed frames| filters + 0.001): [F, 128].

    In float64: a loud tone leaves rounding in all bins, and in float32 that would be as large as the floor of 0.001
    which the logarithm has for silent ones.
    """
    hops = graph.op("Reshape", _whole_hops(graph, waveform), _integers(graph, [-1, HOP], "hops_shape"))
    # Frame i is hops i - 1 and i, the first one after a hop of silence.
    silence = graph.op("Pad", hops, _integers(graph, [1, 0, -1, 0], "one_later"), mode="constant")
    frames = graph.op("Cast", graph.op("Concat", silence, hops, axis=1), to=int(DOUBLE))
    fourier = windowed_fourier(hann_window(2 * HOP), POINTS)
    transform = graph.weight("audio.fourier", fourier.shape, lambda: [fourier], DOUBLE)
    spectrum = graph.op("MatMul", frames, transform, name="fourier")
    real, imaginary = graph.ops("Split", [graph.op("Mul", spectrum, spectrum)], 2, axis=1, num_outputs=2)
    magnitude = graph.op("Sqrt", graph.op("Add", real, imaginary), name="magnitude")
    filters = mel_filters(POINTS // 2 + 1, FILTERS, RATE)
    mel = graph.op("MatMul", magnitude, graph.weight("audio.mel", filters.shape, lambda: [filters], DOUBLE), name="mel")
    floor = graph.constant(np.array(FLOOR, np.float64), "floor")
    return graph.op("Cast", graph.op("Log", graph.op("Add", mel, floor)), to=int(FLOAT))


def _whole_hops(graph: GraphBuilder, waveform: ir.Value) -> ir.Value:
    """The samples of all hops behind which there is at least one more sample."""
    hop, one = _integers(graph, [HOP], "hop"), _integers(graph, [1], "one")
    count = graph.op("Div", graph.op("Sub", graph.op("Shape", waveform), one), hop)
    return graph.op("Slice", waveform, _integers(graph, [0], "first"), graph.op("Mul", count, hop))


def _subsample(graph: GraphBuilder, weights: Weights, audio: ConformerConfig, features: ir.Value) -> ir.Value:
    """Two convolutions of stride 2 over time and frequency, and a linear layer: [F, 128] -> [T, D]."""
    x = graph.op("Unsqueeze", features, _integers(graph, [0, 1], "image_axes"))
    channels = (1, *audio.channels)
    for index in range(2):
        shape = (channels[index + 1], channels[index], 3, 3)
        prefix = f"audio.subsample_conv_projection.layer{index}"
        kernel = _weight(graph, weights, f"{prefix}.conv.weight", shape)
        x = graph.op("Conv", x, kernel, name=f"conv{index}", strides=[2, 2], pads=[1, 1, 1, 1])
        x = graph.op("Transpose", x, perm=[0, 2, 3, 1])  # channels last: [1, time, frequency, channel]
        norm = _weight(graph, weights, f"{prefix}.norm.weight", shape[:1])
        x = graph.op("LayerNormalization", x, norm, name=f"norm{index}", axis=-1, epsilon=_NORM_EPSILON)
        x = graph.op("Relu", x)
        if index == 0:
            x = graph.op("Transpose", x, perm=[0, 3, 1, 2])
    width = FILTERS // 4 * audio.channels[1]
    x = graph.op("Reshape", x, _integers(graph, [-1, width], "rows_shape"))
    name = "audio.subsample_conv_projection.input_proj_linear.weight"
    return blocks.linear(graph, x, weights, name, (audio.hidden, width))


# --- the conformer


def _layer(
    graph: GraphBuilder, weights: Weights, audio: ConformerConfig, prefix: str, x: ir.Value, blocked: _Blocked
) -> ir.Value:
    """Half a feed-forward step, attention, convolution, half a feed-forward step, norm."""
    x = _feed_forward(graph, weights, audio, f"{prefix}.feed_forward1", x)
    normed = _norm(graph, weights, f"{prefix}.norm_pre_attn", x, audio.hidden)
    attended = _attention(graph, weights, audio, f"{prefix}.self_attn", normed, blocked)
    x = graph.op("Add", x, _norm(graph, weights, f"{prefix}.norm_post_attn", attended, audio.hidden))
    x = _convolution(graph, weights, audio, f"{prefix}.lconv1d", x)
    x = _feed_forward(graph, weights, audio, f"{prefix}.feed_forward2", x)
    return _norm(graph, weights, f"{prefix}.norm_out", x, audio.hidden)


def _feed_forward(graph: GraphBuilder, weights: Weights, audio: ConformerConfig, prefix: str, x: ir.Value) -> ir.Value:
    """x + residual weight * norm(W2 silu(W1 norm(x))); the residual weight is a factor of the norm's own."""
    inner = 4 * audio.hidden
    with graph.scope(prefix.rsplit(".", 1)[-1]):
        y = _norm(graph, weights, f"{prefix}.pre_layer_norm", x, audio.hidden)
        y = _silu(graph, _linear(graph, weights, audio, y, f"{prefix}.ffw_layer_1", (inner, audio.hidden)))
        y = _linear(graph, weights, audio, y, f"{prefix}.ffw_layer_2", (audio.hidden, inner))
        y = _norm(graph, weights, f"{prefix}.post_layer_norm", y, audio.hidden, audio.residual)
        return graph.op("Add", x, y)


def _convolution(graph: GraphBuilder, weights: Weights, audio: ConformerConfig, prefix: str, x: ir.Value) -> ir.Value:
    """x + W silu(norm(convolution over time of each channel (gated(W' norm(x))))); no later row is seen."""
    y = _norm(graph, weights, f"{prefix}.pre_layer_norm", x, audio.hidden)
    y = _linear(graph, weights, audio, y, f"{prefix}.linear_start", (2 * audio.hidden, audio.hidden))
    value, gate = graph.ops("Split", [y], 2, name="split_gate", axis=-1, num_outputs=2)
    y = graph.op("Mul", value, graph.op("Sigmoid", gate))
    y = graph.op("Unsqueeze", graph.op("Transpose", y, perm=[1, 0]), _integers(graph, [0], "batch_axis"))
    kernel = _weight(graph, weights, f"{prefix}.depthwise_conv1d.weight", (audio.hidden, 1, audio.kernel))
    y = graph.op("Conv", y, kernel, name="depthwise", group=audio.hidden, pads=[audio.kernel - 1, 0])
    y = graph.op("Transpose", graph.op("Squeeze", y, _integers(graph, [0], "batch_axis")), perm=[1, 0])
    y = _silu(graph, _norm(graph, weights, f"{prefix}.conv_norm", y, audio.hidden))
    return graph.op("Add", x, _linear(graph, weights, audio, y, f"{prefix}.linear_end", (audio.hidden, audio.hidden)))


class _Blocked:
    """Rows [T, D] in blocks of W, the number of keys in the window: what attention needs that is alike in all layers.

    A row sees itself and the W - 1 rows before it: they are in its own block or in the one before. N blocks in all.
    """

    def __init__(self, graph: GraphBuilder, rows: ir.Value, window: int):
        self._graph, self.window = graph, window
        size, zero, one = (_integers(graph, [value], "block_size") for value in (window, 0, 1))
        self._length = graph.op("Slice", graph.op("Shape", rows), zero, one)
        count = graph.op("Div", graph.op("Add", self._length, _integers(graph, [window - 1], "round_up")), size)
        missing = graph.op("Sub", graph.op("Mul", count, size), self._length)
        self._fill = graph.op("Concat", zero, zero, missing, zero, axis=0)
        # Columns are the block before and the block itself; in the first block there is nothing before.
        query, key = np.mgrid[:window, : 2 * window]
        visible = (key > query) & (key <= query + window)
        masks = (np.where(seen, 0.0, _MASKED) for seen in (visible & (key >= window), visible))
        first, other = (graph.constant(mask.astype(np.float32)[None, None], "window") for mask in masks)
        start, step = (graph.constant(np.array(value, np.int64), "range") for value in (0, 1))
        numbers = graph.op("Range", start, graph.op("Squeeze", count), step)
        is_first = graph.op("Unsqueeze", graph.op("Equal", numbers, start), _integers(graph, [1, 2, 3], "mask_axes"))
        self.mask = graph.op("Where", is_first, first, other, name="mask")  # [N, 1, W, 2 W]

    def split(self, x: ir.Value, heads: int, size: int) -> ir.Value:
        """[T, H d] -> [N, H, W, d], filled up with zeros."""
        padded = self._graph.op("Pad", x, self._fill, mode="constant")
        shape = _integers(self._graph, [-1, self.window, heads, size], "blocks_shape")
        return self._graph.op("Transpose", self._graph.op("Reshape", padded, shape), perm=[0, 2, 1, 3])

    def context(self, parts: ir.Value) -> ir.Value:
        """[N, H, W, d] -> [N, H, 2 W, d], each block behind the one before it."""
        shift = _integers(self._graph, [1, 0, 0, 0, -1, 0, 0, 0], "one_later")
        return self._graph.op("Concat", self._graph.op("Pad", parts, shift, mode="constant"), parts, axis=2)

    def place(self, x: ir.Value) -> ir.Value:
        """Values [N, H, W, W] by distance, the farthest first -> [N, H, W, 2 W] by key.

        Row q begins q + 1 columns further right: written into rows of 2 W + 1 columns and read in rows of 2 W, every
        row moves on by one.
        """
        graph, window = self._graph, self.window
        wide = graph.op("Pad", x, _integers(graph, [0, 0, 0, 1, 0, 0, 0, window], "room"), mode="constant")
        flat = graph.op("Reshape", wide, _integers(graph, [0, 0, window * (2 * window + 1)], "flat_shape"))
        kept = graph.op(
            "Slice", flat, *(_integers(graph, [value], "cut") for value in (0, window * 2 * window, 2)), name="cut"
        )
        return graph.op("Reshape", kept, _integers(graph, [0, 0, window, 2 * window], "keys_shape"))

    def join(self, x: ir.Value, width: int) -> ir.Value:
        """[N, H, W, d] -> [T, H d]."""
        graph = self._graph
        rows = graph.op(
            "Reshape", graph.op("Transpose", x, perm=[0, 2, 1, 3]), _integers(graph, [-1, width], "rows_shape")
        )
        return graph.op("Slice", rows, _integers(graph, [0], "first"), self._length)


def _attention(
    graph: GraphBuilder, weights: Weights, audio: ConformerConfig, prefix: str, x: ir.Value, blocked: _Blocked
) -> ir.Value:
    """softmax(mask + cap(q k + q r)) v, where r depends on the distance of query and key alone.

    q = W_q x * scale * softplus(per_dim_scale), k = W_k x * ln(1 + e) / ln 2. The factor of k is moved to q, and out of
    r again. r is made when the graph is: it needs no input.
    """
    heads, size = audio.heads, audio.hidden // audio.heads
    shape = (audio.hidden, audio.hidden)
    query, key, value = (_linear(graph, weights, audio, x, f"{prefix}.{part}_proj", shape) for part in "qkv")
    key_factor = np.log1p(np.e) / np.log(2)

    def scales() -> list[np.ndarray]:
        raw = weights.read(f"{prefix}.per_dim_scale", (size,)).astype(np.float64)
        factors = np.logaddexp(0, raw) * size**-0.5 / np.log(2) * key_factor
        return [np.tile(factors, heads).astype(np.float32)]

    def relative() -> list[np.ndarray]:
        matrix = weights.read(f"{prefix}.relative_k_proj.weight", shape).astype(np.float64)
        rows = _distances(audio) @ matrix.T / key_factor
        return [rows.reshape(-1, heads, size).transpose(1, 2, 0).astype(np.float32)]

    query = graph.op("Mul", query, graph.weight(f"{prefix}.query_scale", (audio.hidden,), scales))
    query, key, value = (blocked.split(part, heads, size) for part in (query, key, value))
    by_distance = graph.weight(f"{prefix}.relative_keys", (heads, size, audio.window), relative)
    scores = graph.op("MatMul", query, graph.op("Transpose", blocked.context(key), perm=[0, 1, 3, 2]), name="scores")
    scores = graph.op("Add", scores, blocked.place(graph.op("MatMul", query, by_distance, name="relative")))
    capped = graph.op("Tanh", blocks.constant_scale(graph, scores, 1 / audio.soft_cap, "soft_cap_in"))
    scores = graph.op("Add", blocks.constant_scale(graph, capped, audio.soft_cap, "soft_cap_out"), blocked.mask)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), blocked.context(value), name="mix")
    return _linear(graph, weights, audio, blocked.join(mixed, audio.hidden), f"{prefix}.post", shape)


def _distances(audio: ConformerConfig) -> np.ndarray:
    """Vectors of the distances W - 1 to 0, float64 [W, D]: sines, then cosines, of wavelengths 2 pi to 20000 pi."""
    half = audio.hidden // 2
    angles = np.outer(np.arange(audio.window - 1, -1, -1), 10_000.0 ** (-np.arange(half) / max(half - 1, 1)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


# --- pieces


def _linear(
    graph: GraphBuilder, weights: Weights, audio: ConformerConfig, x: ir.Value, name: str, shape: tuple[int, int]
) -> ir.Value:
    if audio.clipped:
        return blocks.clipped_linear(graph, x, weights, name, shape)
    return blocks.linear(graph, x, weights, f"{name}.linear.weight", shape)


def _norm(graph: GraphBuilder, weights: Weights, name: str, x: ir.Value, size: int, factor: float = 1.0) -> ir.Value:
    """`factor` times the RMS norm of x; the factor is a part of the stored weight."""
    key = f"{name}.weight" if factor == 1.0 else f"{name}.scaled"
    weight = graph.weight(key, (size,), lambda: [weights.read(f"{name}.weight", (size,)) * np.float32(factor)])
    return blocks.rms_norm(graph, x, weight, name.rsplit(".", 1)[-1])


def _weight(graph: GraphBuilder, weights: Weights, name: str, shape: tuple[int, ...]) -> ir.Value:
    return graph.weight(name, shape, lambda: [weights.read(name, shape)])


def _silu(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def _integers(graph: GraphBuilder, values: list[int], name: str) -> ir.Value:
    return graph.constant(np.array(values, np.int64), name)
