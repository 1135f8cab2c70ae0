"""Gemma 3: sandwich norms with 1 + w, norm of queries and keys, window and global layers.

The text sizes (270M, 1B) are causal and keep their windows as windows. The sizes that see (4B, 12B, 27B) have a SigLIP
tower, whose features are pooled 4x4, and pictures whose tokens see each other in every layer.
Formulas: transformers `modeling_gemma3.py` (Gemma3DecoderLayer, Gemma3Attention, Gemma3RMSNorm,
Gemma3MultiModalProjector).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ...engine.errors import ExportError
from ...engine.manifest import PanAndScanFacts, PlaceholderFacts, ReplyFacts
from .. import blocks
from ..builder import FLOAT, INT64, GraphBuilder
from ..checkpoint import Checkpoint, Weights
from . import ConfigReader, ExportOptions, Facts, Family, GraphFunction, full_state_note
from ._siglip import PREFIXES, SiglipConfig, features, image_facts, placeholders_as_padding, read_siglip

# Rows above the window: on the CPU the operator compacts the buffer once in so many steps instead of every step.
# On a GPU it takes a buffer of exactly the window.
WINDOW_SLACK = 16


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    linear_factor: float


@dataclass(frozen=True, slots=True)
class Config:
    """The facts of config.json that the graphs need."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context: int
    window: int
    windowed: tuple[bool, ...]  # per layer
    scale: float
    local_rope: Rope
    global_rope: Rope
    tied: bool
    soft_cap: float | None
    vision: SiglipConfig | None = None
    pool: int = 1  # patches per side of a soft token
    image_id: int = 0


def read(values: dict[str, Any]) -> Config:
    """Read config.json of Gemma3ForCausalLM or Gemma3ForConditionalGeneration, with the defaults of their classes."""
    reader = ConfigReader(values)
    tied = reader.flag("tie_word_embeddings", True)
    if values.get("model_type") == "gemma3_text":
        return _read_text(reader, tied)
    text, vision_reader = (
        ConfigReader({}, f"{reader.where}: {key}") if reader.optional(key) is None else reader.section(key)
        for key in ("text_config", "vision_config")
    )
    text.expect("model_type", (None, "gemma3_text"))
    text.expect("final_logit_softcapping", (None,))  # Gemma3ForConditionalGeneration does not apply one
    for key in ("projector_type", "mm_projector_type"):
        reader.expect(key, (None,))
    vision, tokens = read_siglip(vision_reader), reader.integer("mm_tokens_per_image", 256)
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side**2 != tokens or vision.side % side:
        raise ExportError(
            f"{reader.where}: mm_tokens_per_image = {tokens} is not a grid that {vision.side} x {vision.side} patches "
            "can be pooled to"
        )
    return dataclasses.replace(
        _read_text(text, tied),
        vision=vision,
        pool=vision.side // side,
        image_id=reader.integer("image_token_id", reader.integer("image_token_index", 262144)),
    )


def _read_text(reader: ConfigReader, tied: bool) -> Config:
    reader.expect("hidden_activation", (None, "gelu_pytorch_tanh"))
    reader.expect("attention_bias", (None, False))
    reader.expect("attn_logit_softcapping", (None,))
    reader.expect("use_bidirectional_attention", (None, False))
    reader.expect_epsilon(1e-6)
    layers = reader.integer("num_hidden_layers", 26)
    local_rope, global_rope = _ropes(reader)
    windowed = _layer_pattern(reader, layers)
    if any(windowed) and reader.values.get("sliding_window", 4096) is None:
        raise ExportError(f"{reader.where}: sliding_window is null, but {sum(windowed)} layers have a window")
    return Config(
        hidden=reader.integer("hidden_size", 2304),
        layers=layers,
        heads=reader.integer("num_attention_heads", 8),
        key_value_heads=reader.integer("num_key_value_heads", 4),
        head_size=reader.integer("head_dim", 256),
        intermediate=reader.integer("intermediate_size", 9216),
        vocabulary=reader.integer("vocab_size", 262208),
        context=reader.count("max_position_embeddings", 131072),
        window=reader.count("sliding_window", 4096) if any(windowed) else 0,
        windowed=windowed,
        scale=reader.positive("query_pre_attn_scalar", 256) ** -0.5,
        local_rope=local_rope,
        global_rope=global_rope,
        tied=tied,
        soft_cap=reader.cap("final_logit_softcapping"),
    )


def _layer_pattern(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Which layers are windowed: `layer_types`, or the older `sliding_window_pattern` (every n-th layer is global)."""
    kinds = reader.strings("layer_types", [])
    if not kinds:
        period = reader.count("sliding_window_pattern", reader.count("_sliding_window_pattern", 6))
        return tuple((index + 1) % period != 0 for index in range(layers))
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise ExportError(
            f"{reader.where}: layer_types has {len(kinds)} entries and unknown kinds {unknown}, expected {layers}"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def _ropes(reader: ConfigReader) -> tuple[Rope, Rope]:
    """Local and global rotary positions, from `rope_parameters` or the older flat keys (scaling is global only)."""
    if reader.optional("rope_parameters") is not None:
        section = reader.section("rope_parameters")
        return _rope(section.section("sliding_attention"), 10_000.0), _rope(
            section.section("full_attention"), 1_000_000.0
        )
    local = Rope(reader.positive("rope_local_base_freq", 10_000.0), 1.0)
    theta = reader.positive("rope_theta", 1_000_000.0)
    if not reader.optional("rope_scaling"):
        return local, Rope(theta, 1.0)
    scaling = reader.section("rope_scaling")
    kind = scaling.values.get("rope_type", scaling.values.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ExportError(
            f"{reader.where}: rope_scaling type {kind!r} is not supported (supported: 'default', 'linear')"
        )
    return local, Rope(theta, scaling.positive("factor") if kind == "linear" else 1.0)


def _rope(reader: ConfigReader, theta: float) -> Rope:
    reader.expect("rope_type", (None, "default", "linear"))
    factor = reader.positive("factor") if reader.optional("rope_type") == "linear" else 1.0
    return Rope(reader.positive("rope_theta", theta), factor)


def build_vision(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """patches and positions -> soft_tokens [n / k^2, D]: features, mean of each block of patches, norm, projection."""
    vision = config.vision
    assert vision is not None
    x = features(graph, weights, vision)
    # Patches come block-major: each k x k block is contiguous.
    shape = graph.constant(np.array([-1, config.pool**2, vision.hidden], np.int64), "blocks_shape")
    axis = graph.constant(np.array([1], np.int64), "block_axis")
    pooled = graph.op("ReduceMean", graph.op("Reshape", x, shape), axis, keepdims=0, name="pool")
    weight = _norm(graph, weights, "projector.mm_soft_emb_norm", vision.hidden)
    normed = blocks.rms_norm(graph, pooled, weight, "mm_soft_emb_norm")
    name = "projector.mm_input_projection_weight"
    projected = blocks.linear(graph, normed, weights, name, (config.hidden, vision.hidden), stored_transposed=True)
    graph.output(projected, "soft_tokens", FLOAT, ["soft_tokens", config.hidden])


def build_embed(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """input_ids [1, S] -> inputs_embeds [1, S, D], scaled by sqrt(D)."""
    ids = graph.input("input_ids", INT64, [1, "tokens"])
    if config.vision is not None:
        ids = placeholders_as_padding(graph, ids, config.image_id, config.vocabulary)
    rows = blocks.lookup(graph, _table(graph, weights, config), ids, "embed_tokens")
    embeddings = blocks.constant_scale(graph, rows, float(config.hidden) ** 0.5, "scale_embeddings")
    graph.output(embeddings, "inputs_embeds", FLOAT, [1, "tokens", config.hidden])


def _table(graph: GraphBuilder, weights: Weights, config: Config) -> blocks.Table:
    shape = (config.vocabulary, config.hidden)
    return blocks.table(graph, weights, "embed_tokens.weight", "text.embed_tokens.weight", shape)


def build_decoder(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """inputs_embeds and state -> logits of the rows asked for."""
    sees = config.vision is not None
    inputs = blocks.decoder_inputs(graph, config.hidden, blocks=sees)
    masks: dict[bool, ir.Value] = {}
    if sees:
        for windowed in sorted(set(config.windowed)):
            masks[windowed] = blocks.block_bias(graph, inputs, window=config.window if windowed else None)
    context = min(config.context, options.context)
    tables = {
        windowed: blocks.rope_tables(
            graph,
            "local" if windowed else "global",
            blocks.inverse_frequencies(config.head_size, rope.theta, linear_factor=rope.linear_factor),
            context,
        )
        for windowed, rope in ((True, config.local_rope), (False, config.global_rope))
    }
    x = inputs.embeddings
    normed = blocks.rms_norm(graph, x, _norm(graph, weights, "text.layers.0.input_layernorm", config.hidden), "norm")
    for layer in range(config.layers):
        prefix = f"text.layers.{layer}"
        with graph.scope(f"layers.{layer}"):
            windowed = config.windowed[layer]
            mixed = _attention(graph, weights, config, layer, normed, inputs, tables[windowed], masks.get(windowed))
            if layer == config.layers - 1:
                # The last attention has written its state: only rows whose logits are wanted go on.
                mixed = blocks.take_rows(graph, mixed, inputs, "take_rows")
                x = blocks.take_rows(graph, x, inputs, "take_residual_rows")
            mixed = blocks.rms_norm(
                graph,
                mixed,
                _norm(graph, weights, f"{prefix}.post_attention_layernorm", config.hidden),
                "post_attention",
            )
            weight = _norm(graph, weights, f"{prefix}.pre_feedforward_layernorm", config.hidden)
            normed, x = blocks.add_rms_norm(graph, mixed, x, weight, "pre_feedforward")
            fed = blocks.gated_mlp(graph, normed, weights, f"{prefix}.mlp", config.hidden, config.intermediate)
            fed = blocks.rms_norm(
                graph,
                fed,
                _norm(graph, weights, f"{prefix}.post_feedforward_layernorm", config.hidden),
                "post_feedforward",
            )
            following = "text.norm" if layer == config.layers - 1 else f"text.layers.{layer + 1}.input_layernorm"
            normed, x = blocks.add_rms_norm(graph, fed, x, _norm(graph, weights, following, config.hidden), "next_norm")
    table = _table(graph, weights, config) if config.tied else _head(graph, weights, config)
    blocks.logits(graph, normed, table, config.soft_cap)


def _attention(
    graph: GraphBuilder,
    weights: Weights,
    config: Config,
    layer: int,
    x: ir.Value,
    inputs: blocks.DecoderInputs,
    tables: tuple[ir.Value, ir.Value],
    mask: ir.Value | None,
) -> ir.Value:
    prefix, size = f"text.layers.{layer}.self_attn", config.head_size
    widths = (config.heads * size, config.key_value_heads * size, config.key_value_heads * size)
    query, key, value = blocks.query_key_value(graph, x, weights, prefix, widths, config.hidden)
    # Scores are scaled by way of the queries. On GPUs the operator does it, with less rounding in float16.
    scale, operator_scale = (1.0, config.scale) if graph.plan.half else (config.scale, 1.0)
    # Keys that are stored in 8 bits stand in units of their steps, and the queries make up for it.
    scales = graph.plan.state_scales(layer) if mask is None else None
    steps = np.ones(size, np.float32) if scales is None else np.array(scales.keys, np.float32)
    weight = _norm(graph, weights, f"{prefix}.q_norm", size, scale * steps)
    query = blocks.split_heads(graph, query, config.heads, size, weight, "q_norm")
    weight = _norm(graph, weights, f"{prefix}.k_norm", size, 1 / steps)
    key = blocks.split_heads(graph, key, config.key_value_heads, size, weight, "k_norm")
    has_window = config.windowed[layer] and mask is None
    slack = 0 if graph.plan.half else WINDOW_SLACK
    window, capacity = (config.window, config.window + slack) if has_window else (None, "capacity")
    state = blocks.key_value_state(graph, layer, config.key_value_heads, size, window, capacity, scales)
    facts = blocks.Attention(config.heads, config.key_value_heads, size, operator_scale, *tables)
    mixed, _, _ = blocks.attention(graph, query, key, value, state, inputs, facts, bias=mask)
    return blocks.linear(graph, mixed, weights, f"{prefix}.o_proj.weight", (config.hidden, config.heads * size))


def _norm(graph: GraphBuilder, weights: Weights, name: str, size: int, scale: float | np.ndarray = 1.0) -> ir.Value:
    """The vector of a norm, with Gemma 3's 1 + w and a scale of the output folded into it."""
    return graph.weight(f"{name}.weight", (size,), lambda: [scale * (1.0 + weights.read(f"{name}.weight", (size,)))])


def _head(graph: GraphBuilder, weights: Weights, config: Config) -> blocks.Table:
    shape = (config.vocabulary, config.hidden)
    return blocks.table(graph, weights, "lm_head.weight", "lm_head.weight", shape)


def finish(checkpoint: Checkpoint, weights: Weights, config: Config, options: ExportOptions) -> Facts:
    if config.tied:
        weights.drop_copy("lm_head.weight", "text.embed_tokens.weight")
    vision = config.vision
    facts = Facts(
        requires=("state:global", "state:window", "logit_rows:any"),
        state=blocks.state_pairs(windowed and vision is None for windowed in config.windowed),
        image=None,
        image_prompt=None,
        reply=ReplyFacts(boxes="none", thought=None, tool_call=None),
        turn_ends=("<end_of_turn>", "<eos>"),
        context=config.context,
    )
    if vision is None:
        return facts
    values = [2 * config.key_value_heads * config.head_size] * config.layers
    return dataclasses.replace(
        facts,
        requires=("state:global", "logit_rows:any", "attention:image_blocks", "image:squash"),
        image=image_facts(checkpoint, vision, pool=config.pool, resample=2, pan_and_scan=_pan_and_scan),
        image_prompt=PlaceholderFacts(
            item="<start_of_image>",
            before="\n\n<start_of_image>",
            soft="<image_soft_token>",
            after="<end_of_image>\n\n",
        ),
        notes=(full_state_note(values, config.windowed, config.window, "pictures did not see all of themselves"),),
    )


def _pan_and_scan(reader: ConfigReader) -> PanAndScanFacts:
    """Crops on request; defaults and texts are Gemma3Processor's."""
    return PanAndScanFacts(
        min_crop=reader.integer("pan_and_scan_min_crop_size", 256),
        max_crops=reader.integer("pan_and_scan_max_num_crops", 4),
        min_ratio=reader.number("pan_and_scan_min_ratio_to_activate", 1.2),
        before_full="Here is the original image ",
        before_crops=" and here are some crops to help you see better ",
        between_crops=" ",
    )


def _graphs(config: Config) -> dict[str, GraphFunction]:
    vision: dict[str, GraphFunction] = {"vision": build_vision} if config.vision is not None else {}
    return {**vision, "embed": build_embed, "decoder": build_decoder}


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    # Text checkpoints say "model."; text saved out of a multimodal model has one of the other spellings.
    prefixes=PREFIXES | {"text.": ("model.", *PREFIXES["text."])},
    read=read,
    graphs=_graphs,
    finish=finish,
)
