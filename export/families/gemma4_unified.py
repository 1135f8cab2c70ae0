"""Gemma 4 12B: the decoder of Gemma 4 behind embedders of raw patches and raw samples instead of towers.

Formulas: transformers `modeling_gemma4_unified.py` (Gemma4UnifiedVisionEmbedder, Gemma4UnifiedMultimodalEmbedder) and
`feature_extraction_gemma4_unified.py` (Gemma4UnifiedAudioFeatureExtractor).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from .. import blocks
from ..builder import FLOAT, INT64, UINT8, GraphBuilder
from ..checkpoint import Checkpoint, Weights
from . import ExportOptions, Facts, Family
from ._gemma4_config import Config, FrameConfig, PatchConfig, read_unified
from ._gemma4_decoder import build_decoder, build_embed
from .gemma4 import TEXT_PREFIXES, audio_facts, decoder_facts, image_facts, video_facts

LAYER_NORM_EPSILON = 1e-5  # torch's default, unlike the 1e-6 of all other norms


def build_vision(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """patches uint8 [n, 3 p p] and positions int64 [n, 2] -> soft_tokens [n, D], one for each patch.

    norm(W layer_norm(layer_norm(v / 255) ...) + columns[x] + rows[y]): three layer norms with weight and bias around
    a linear layer and the positions, then a norm without a weight and the projection.
    """
    vision = config.vision
    assert isinstance(vision, PatchConfig)
    values = 3 * (vision.patch * vision.pool) ** 2
    patches = graph.input("patches", UINT8, ["patches", values])
    positions = graph.input("positions", INT64, ["patches", 2])
    # A layer norm of v / 255 is one of v with an epsilon of 255^2 times the size.
    raw = graph.op("Cast", patches, to=int(FLOAT))
    x = _layer_norm(graph, weights, raw, "patch_ln1", values, LAYER_NORM_EPSILON * 255.0**2)
    x = blocks.linear(graph, x, weights, "embedder.patch_dense.weight", (vision.hidden, values), bias=True)
    x = _layer_norm(graph, weights, x, "patch_ln2", vision.hidden)
    places = (vision.table, 2, vision.hidden)
    for axis, name in enumerate(("x", "y")):
        index = graph.op("Gather", positions, graph.constant(np.array(axis, np.int64), name), axis=1, name=name)
        table = graph.weight(
            f"embedder.pos_embedding.{axis}",
            (vision.table, vision.hidden),
            lambda axis=axis: [weights.read("embedder.pos_embedding", places)[:, axis]],
        )
        x = graph.op("Add", x, graph.op("Gather", table, index, name=f"position_{axis}"))
    x = _layer_norm(graph, weights, x, "pos_norm", vision.hidden)
    x = blocks.rms_norm(graph, x, blocks.ones(graph, vision.hidden), "embed_vision_norm")
    shape = (config.text.hidden, vision.hidden)
    soft_tokens = blocks.linear(graph, x, weights, "projection.weight", shape)
    graph.output(soft_tokens, "soft_tokens", FLOAT, ["soft_tokens", config.text.hidden])


def build_audio(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """waveform float32 [L] in [-1, 1] at 16 kHz -> soft_tokens [L / samples of a frame rounded up, D].

    A norm without a weight over the samples of each frame, and the projection; the last frame is filled up with zeros.
    """
    audio = config.audio
    assert isinstance(audio, FrameConfig)
    waveform = graph.input("waveform", FLOAT, ["samples"])
    zero, size, last, shape = (
        graph.constant(np.array(values, np.int64), "sizes")
        for values in ([0], [audio.samples], [audio.samples - 1], [-1, audio.samples])
    )
    length = graph.op("Shape", waveform)
    whole = graph.op("Mul", graph.op("Div", graph.op("Add", length, last), size), size)
    fill = graph.op("Concat", zero, graph.op("Sub", whole, length), axis=0)
    frames = graph.op("Reshape", graph.op("Pad", waveform, fill, mode="constant"), shape, name="frames")
    x = blocks.rms_norm(graph, frames, blocks.ones(graph, audio.samples), "embed_audio_norm")
    width = config.text.hidden
    soft_tokens = blocks.linear(graph, x, weights, "embed_audio.weight", (width, audio.samples))
    graph.output(soft_tokens, "soft_tokens", FLOAT, ["soft_tokens", width])


def _layer_norm(
    graph: GraphBuilder, weights: Weights, x: ir.Value, name: str, size: int, epsilon: float = LAYER_NORM_EPSILON
) -> ir.Value:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis."""
    weight, bias = (
        graph.weight(key, (size,), lambda key=key: [weights.read(key, (size,))])
        for key in (f"embedder.{name}.weight", f"embedder.{name}.bias")
    )
    y = graph.op("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=epsilon)
    # A normed row has length sqrt(size) at most.
    largest = graph.recorded(f"embedder.{name}.weight") + graph.recorded(f"embedder.{name}.bias")
    return graph.set_bound(y, float(np.sqrt(size)) * largest)


def _graphs(config: Config) -> dict[str, object]:
    vision = {"vision": build_vision} if config.vision is not None else {}
    audio = {"audio": build_audio} if config.audio is not None else {}
    return {**vision, **audio, "embed": build_embed, "decoder": build_decoder}


def finish(checkpoint: Checkpoint, weights: Weights, config: Config, options: ExportOptions) -> Facts:
    vision = config.vision
    image = None
    if vision is not None:
        # Checked in 16-pixel patches and groups of them; used as whole patches that are not pooled.
        image = image_facts(checkpoint, vision.patch, vision.pool)
        image = dataclasses.replace(image, patch_size=vision.patch * vision.pool, pool_size=1)
    audio = None
    if isinstance(config.audio, FrameConfig):
        samples = config.audio.samples
        expected = {"feature_size": samples, "audio_samples_per_token": samples, "sampling_rate": 16_000}
        audio = audio_facts(checkpoint, expected, policy="frames", frame_step=samples, frames_per_token=1)
    return decoder_facts(weights, config.text, image, video_facts(checkpoint, image), audio)


FAMILY = Family(
    name="gemma4_unified",
    model_types=("gemma4_unified", "gemma4_unified_text"),
    # Each with the names of transformers 5.24 and with those of the published files.
    prefixes={
        "text.": TEXT_PREFIXES,
        "embedder.": ("model.embed_vision.", "model.vision_embedder.", "vision_embedder."),
        "projection.": (
            "model.embed_vision.multimodal_embedder.embedding_projection.",
            "model.embed_vision.embedding_projection.",
            "embed_vision.embedding_projection.",
        ),
        "embed_audio.": ("model.embed_audio.embedding_projection.", "embed_audio.embedding_projection."),
    },
    read=read_unified,
    graphs=_graphs,  # pyright: ignore[reportArgumentType]
    finish=finish,
)
