"""The SigLIP vision tower of PaliGemma and Gemma 3 (So400m/14): patches -> pre-norm transformer -> features.

Formulas: transformers `modeling_siglip.py` (SiglipVisionEmbeddings, SiglipEncoderLayer, SiglipAttention).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...engine.errors import ExportError
from ...engine.manifest import ImageFacts, PanAndScanFacts
from .. import blocks
from ..builder import FLOAT, INT64, MICROSOFT, UINT8, GraphBuilder
from ..checkpoint import Checkpoint, Weights
from . import ConfigReader

__all__ = ["PREFIXES", "SiglipConfig", "features", "image_facts", "placeholders_as_padding", "read_siglip"]

NORM_EPSILON = 1e-6
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # numbers of Pillow's filters

# Spellings of a checkpoint with a tower: module names of transformers 5, the files on the hub, and what lies between.
PREFIXES = {
    "text.": ("model.language_model.", "language_model.model."),
    "vision.": (
        *("model.vision_tower.", "vision_tower."),
        *("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ),
    "projector.": ("model.multi_modal_projector.", "multi_modal_projector."),
    "lm_head.": ("lm_head.", "language_model.lm_head."),
}


@dataclass(frozen=True, slots=True)
class SiglipConfig:
    """The facts of vision_config that the graph needs; `side` is the number of patches on a side of the picture."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    patch: int
    side: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def read_siglip(reader: ConfigReader) -> SiglipConfig:
    """Read a vision_config; the defaults are those of transformers' SiglipVisionConfig."""
    reader.expect("model_type", (None, "siglip_vision_model"))
    reader.expect("hidden_act", (None, "gelu_pytorch_tanh"))
    reader.expect("num_channels", (None, 3))
    reader.expect("vision_use_head", (None, False))
    epsilon = reader.number("layer_norm_eps", NORM_EPSILON)
    if abs(epsilon - NORM_EPSILON) > 1e-9:
        raise ExportError(f"{reader.where}: layer_norm_eps = {epsilon} is not supported (supported: {NORM_EPSILON})")
    hidden, heads = reader.integer("hidden_size", 768), reader.integer("num_attention_heads", 12)
    size, patch = reader.integer("image_size", 224), reader.integer("patch_size", 16)
    for name, whole, part in (("hidden_size", hidden, heads), ("image_size", size, patch)):
        if part < 1 or whole % part:
            raise ExportError(f"{reader.where}: {name} = {whole} is not a multiple of {part}")
    return SiglipConfig(
        hidden=hidden,
        layers=reader.integer("num_hidden_layers", 12),
        heads=heads,
        intermediate=reader.integer("intermediate_size", 3072),
        patch=patch,
        side=size // patch,
    )


def image_facts(
    checkpoint: Checkpoint,
    vision: SiglipConfig,
    *,
    pool: int,
    resample: int,
    pan_and_scan: Callable[[ConfigReader], PanAndScanFacts] | None = None,
) -> ImageFacts:
    """One square size for all pictures, `pool` x `pool` patches to a soft token.

    What the files of the processor say is checked against the tower and against the normalisation that is part of the
    graph; where they are silent, `resample` (the number of a filter) is the default of the processor's class.
    `pan_and_scan` reads the facts about crops from the same values.
    """
    processor = ConfigReader(checkpoint.json("processor_config.json"), "processor_config.json")
    images = processor.section("image_processor").values if processor.optional("image_processor") is not None else {}
    values = {**checkpoint.json("preprocessor_config.json"), **processor.values, **images}
    reader = ConfigReader(values, "the processor's configuration")
    side = vision.side * vision.patch
    reader.expect("size", (None, side, {"height": side, "width": side}))
    reader.expect("resample", (None, *RESAMPLE))
    for key in ("do_resize", "do_rescale", "do_normalize"):
        reader.expect(key, (None, True))
    for key in ("image_mean", "image_std"):
        reader.expect(key, (None, [0.5] * 3))
    factor = reader.number("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ExportError(f"{reader.where}: rescale_factor = {factor} is not supported (supported: {1 / 255})")
    budget = (vision.side // pool) ** 2
    return ImageFacts(
        policy="squash",
        patch_size=vision.patch,
        pool_size=pool,
        budgets=(budget,),
        default_budget=budget,
        resample=RESAMPLE[reader.integer("resample", resample)],
        pan_and_scan=None if pan_and_scan is None else pan_and_scan(reader),
    )


def placeholders_as_padding(graph: GraphBuilder, ids: ir.Value, image_id: int, vocabulary: int) -> ir.Value:
    """`ids`, with the placeholder of pictures as token 0 if the table has no row for it.

    Soft tokens overwrite those rows anyway (PaliGemmaModel.forward, Gemma3Model.forward).
    """
    if image_id < vocabulary:
        return ids
    is_image = graph.op("Equal", ids, graph.constant(np.array(image_id, np.int64), "image_id"))
    return graph.op("Where", is_image, graph.constant(np.array(0, np.int64), "padding_id"), ids, name="pad_image")


def features(graph: GraphBuilder, weights: Weights, config: SiglipConfig) -> ir.Value:
    """Declare patches uint8 [n, 3 p p] and positions int64 [n, 2]; returns features [1, n, hidden], normed.

    n is the square of `side`; patches may come in any order, their positions say where they belong.
    """
    x = _embed(graph, weights, config)
    for layer in range(config.layers):
        with graph.scope(f"layers.{layer}"):
            x = _layer(graph, weights, config, f"vision.encoder.layers.{layer}", x)
    return _norm(graph, weights, config, x, "vision.post_layernorm")


def _embed(graph: GraphBuilder, weights: Weights, config: SiglipConfig) -> ir.Value:
    """The convolution as a product with flattened patches, W ((v - 127.5) / 127.5) + b, plus a learned position."""
    patches = graph.input("patches", UINT8, ["patches", 3 * config.patch**2])
    positions = graph.input("positions", INT64, ["patches", 2])
    name, shape = "vision.embeddings.patch_embedding.weight", (config.hidden, 3, config.patch, config.patch)

    def read() -> list[np.ndarray]:
        # A patch is [row, column, channel] with the channel fastest; the kernel is [out, channel, row, column].
        matrix = weights.read(name, shape).transpose(0, 2, 3, 1).reshape(config.hidden, -1)
        return [matrix.T / np.float32(127.5)]

    matrix = graph.weight(f"{name}.transposed", (3 * config.patch**2, config.hidden), read)
    centre = blocks.scalar(graph, 127.5, "centre")
    x = graph.op(
        "MatMul", graph.op("Sub", graph.op("Cast", patches, to=int(FLOAT)), centre), matrix, name="patch_embedding"
    )
    x = graph.op("Add", x, _vector(graph, weights, "vision.embeddings.patch_embedding.bias", config.hidden))
    columns, rows = (
        graph.op("Gather", positions, graph.constant(np.array(axis, np.int64), axis_name), axis=1, name=axis_name)
        for axis, axis_name in enumerate(("x", "y"))
    )
    side = graph.constant(np.array(config.side, np.int64), "side")
    place = graph.op("Add", graph.op("Mul", rows, side), columns, name="place")
    key, size = "vision.embeddings.position_embedding.weight", (config.side**2, config.hidden)
    table = graph.weight(key, size, lambda: [weights.read(key, size)])
    x = graph.op("Add", x, graph.op("Gather", table, place, name="position"))
    return graph.op("Unsqueeze", x, graph.constant(np.array([0], np.int64), "batch_axis"))


def _layer(graph: GraphBuilder, weights: Weights, config: SiglipConfig, prefix: str, x: ir.Value) -> ir.Value:
    """x + attention(norm(x)), then x + mlp(norm(x)); all linear layers have a bias."""
    normed = _norm(graph, weights, config, x, f"{prefix}.layer_norm1")
    square = (config.hidden, config.hidden)
    query, key, value = (
        blocks.linear(graph, normed, weights, f"{prefix}.self_attn.{part}_proj.weight", square, bias=True)
        for part in "qkv"
    )
    mixed = graph.op(
        *("MultiHeadAttention", query, key, value),
        domain=MICROSOFT,
        name="attention",
        num_heads=config.heads,
        scale=config.head_size**-0.5,
    )
    x = graph.op(
        "Add", x, blocks.linear(graph, mixed, weights, f"{prefix}.self_attn.out_proj.weight", square, bias=True)
    )
    normed = _norm(graph, weights, config, x, f"{prefix}.layer_norm2")
    wide, narrow = (config.intermediate, config.hidden), (config.hidden, config.intermediate)
    grown = blocks.linear(graph, normed, weights, f"{prefix}.mlp.fc1.weight", wide, bias=True)
    grown = graph.op("Gelu", grown, approximate="tanh")
    return graph.op("Add", x, blocks.linear(graph, grown, weights, f"{prefix}.mlp.fc2.weight", narrow, bias=True))


def _norm(graph: GraphBuilder, weights: Weights, config: SiglipConfig, x: ir.Value, name: str) -> ir.Value:
    """Layer norm with weight and bias, in float32."""
    weight = _vector(graph, weights, f"{name}.weight", config.hidden)
    bias = _vector(graph, weights, f"{name}.bias", config.hidden)
    y = graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=NORM_EPSILON, name=name.rsplit(".", 1)[-1])
    # A normed row has length sqrt(D): neither term can be longer than its largest entry times that.
    largest = graph.recorded(f"{name}.weight") + graph.recorded(f"{name}.bias")
    return graph.set_bound(y, float(np.sqrt(config.hidden)) * largest)


def _vector(graph: GraphBuilder, weights: Weights, name: str, size: int) -> ir.Value:
    return graph.weight(name, (size,), lambda: [weights.read(name, (size,))])
