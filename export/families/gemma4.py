"""Gemma 4 in the E2B / E4B layout: facts, and the graphs `embed` and `decoder`.

Per-layer embeddings, layers that share keys and values, double-wide MLPs, two head sizes, proportional rotary
positions, layer scalars and a soft cap on the logits. Configuration and vision graph are in the two files beside it.
Formulas: transformers `modeling_gemma4.py` (Gemma4TextDecoderLayer, Gemma4TextAttention, Gemma4TextModel).
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from ...engine.errors import ExportError
from ...engine.manifest import ImageFacts, PlaceholderFacts, ReplyFacts, StatePair
from .. import blocks
from ..builder import FLOAT, INT64, GraphBuilder
from ..checkpoint import Checkpoint, Weights
from . import ConfigReader, ExportOptions, Facts, Family
from ._gemma4_config import Config, TextConfig, read
from ._gemma4_vision import build_vision

WINDOW_SLACK = 16  # rows above the window: the operator compacts the buffer once in so many steps instead of every step
OFFICIAL_BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens per image that Gemma 4 was trained for

Pair = tuple[ir.Value, ir.Value]


def build_embed(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """input_ids [1, S] -> inputs_embeds [1, S, D] and, if the model has them, per_layer_inputs [1, S, layers * P].

    Placeholders of media look up the padding token in both tables (Gemma4Model.forward): their main embedding is
    overwritten by soft tokens, their per-layer embedding is not.
    """
    text = config.text
    ids = graph.input("input_ids", INT64, [1, "tokens"])
    padding = graph.constant(np.array(text.padding_id, np.int64), "padding_id")
    for name, identifier in config.media_ids.items():
        is_medium = graph.op("Equal", ids, graph.constant(np.array(identifier, np.int64), f"{name}_id"))
        ids = graph.op("Where", is_medium, padding, ids, name=f"pad_{name}")
    rows = blocks.lookup(graph, _table(graph, weights, text), ids, "embed_tokens")
    embeddings = blocks.constant_scale(graph, rows, float(text.hidden) ** 0.5, "scale_embeddings")
    graph.output(embeddings, "inputs_embeds", FLOAT, [1, "tokens", text.hidden])
    if text.per_layer:
        width = len(text.layers) * text.per_layer
        table = _rows(graph, weights, "embed_tokens_per_layer.weight", (text.per_layer_vocabulary, width))
        rows = blocks.lookup(graph, table, ids, "embed_tokens_per_layer")
        rows = blocks.constant_scale(graph, rows, float(text.per_layer) ** 0.5, "scale_per_layer")
        graph.output(rows, "per_layer_inputs", FLOAT, [1, "tokens", width])


def build_decoder(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """inputs_embeds, per_layer_inputs and state -> logits of the rows asked for."""
    text = config.text
    inputs = blocks.decoder_inputs(graph, text.hidden)
    tables = _rope_tables(graph, text, min(text.context, options.context))
    width = len(text.layers) * text.per_layer
    packed = graph.input("per_layer_inputs", FLOAT, [1, "tokens", width]) if width else None
    owners = text.owners
    extra = _per_layer_inputs(graph, weights, text, inputs.embeddings, packed, range(owners)) if packed else {}
    shared = blocks.shared_rows(graph, inputs, text.window) if owners < len(text.layers) else None
    sources: dict[bool, Pair] = {}  # windowed -> keys and values of the last layer of that kind that owns some
    x = inputs.embeddings
    for layer, facts in enumerate(text.layers):
        with graph.scope(f"layers.{layer}"):
            normed = blocks.rms_norm(
                graph, x, _norm(graph, weights, layer, "input_layernorm", text.hidden), "input_norm"
            )
            heads = blocks.Attention(text.heads, facts.key_value_heads, facts.head_size, 1.0, *tables[facts.windowed])
            query = _query(graph, weights, text, layer, normed, heads)
            if facts.owns_state:
                mixed, present = _own_attention(graph, weights, text, layer, query, normed, inputs, heads)
                sources[facts.windowed] = present
            else:
                assert shared is not None
                mixed = blocks.shared_attention(graph, query, sources[facts.windowed], shared, heads, facts.windowed)
            shape = (text.hidden, heads.heads * heads.head_size)
            mixed = blocks.linear(graph, mixed, weights, f"{_name(layer)}.self_attn.o_proj.weight", shape)
            if layer == owners - 1:
                # The last layer with a state has written it: only rows whose logits are wanted go on from here.
                x, mixed = (blocks.take_rows(graph, value, inputs, "take_rows") for value in (x, mixed))
                if packed is not None:
                    extra[layer] = blocks.take_rows(graph, extra[layer], inputs, "take_per_layer")
                    extra |= _late_per_layer_inputs(graph, weights, text, inputs, packed)
            x = _feed_forward(graph, weights, text, layer, x, mixed)
            if packed is not None:
                x = _add_per_layer(graph, weights, text, layer, x, extra[layer])
            x = graph.op("Mul", x, _vector(graph, weights, f"{_name(layer)}.layer_scalar", 1), name="layer_scalar")
    normed = blocks.rms_norm(graph, x, _vector(graph, weights, "text.norm.weight", text.hidden), "norm")
    table = (
        _table(graph, weights, text)
        if text.tied
        else _rows(graph, weights, "lm_head.weight", (text.vocabulary, text.hidden))
    )
    blocks.logits(graph, normed, table, text.soft_cap)


# --- attention


def _rope_tables(graph: GraphBuilder, text: TextConfig, context: int) -> dict[bool, Pair]:
    """cos and sin tables by kind of layer; windowed is the key."""
    sizes = {layer.windowed: layer.head_size for layer in text.layers}
    tables = {}
    for windowed, size in sizes.items():
        theta = text.local_theta if windowed else text.global_theta
        partial = None if windowed else text.global_partial
        frequencies = blocks.inverse_frequencies(size, theta, partial_factor=partial)
        tables[windowed] = blocks.rope_tables(graph, "local" if windowed else "global", frequencies, context)
    return tables


def _query(
    graph: GraphBuilder, weights: Weights, text: TextConfig, layer: int, x: ir.Value, heads: blocks.Attention
) -> ir.Value:
    prefix, size = f"{_name(layer)}.self_attn", heads.head_size
    query = blocks.linear(graph, x, weights, f"{prefix}.q_proj.weight", (heads.heads * size, text.hidden))
    weight = _vector(graph, weights, f"{prefix}.q_norm.weight", size)
    return blocks.split_heads(graph, query, heads.heads, size, weight, "q_norm")


def _own_attention(
    graph: GraphBuilder,
    weights: Weights,
    text: TextConfig,
    layer: int,
    query: ir.Value,
    x: ir.Value,
    inputs: blocks.DecoderInputs,
    heads: blocks.Attention,
) -> tuple[ir.Value, Pair]:
    """Attention of a layer with keys and values of its own; values are normed without a weight and not rotated."""
    prefix, size, count = f"{_name(layer)}.self_attn", heads.head_size, heads.key_value_heads
    key, value = (
        blocks.linear(graph, x, weights, f"{prefix}.{part}_proj.weight", (count * size, text.hidden)) for part in "kv"
    )
    key = blocks.split_heads(
        graph, key, count, size, _vector(graph, weights, f"{prefix}.k_norm.weight", size), "k_norm"
    )
    value = blocks.split_heads(graph, value, count, size, blocks.ones(graph, size), "v_norm")
    capacity: int | str = "capacity"
    window = None
    if text.layers[layer].windowed:
        window = text.window
        # A buffer that others read must hold exactly the window: they see it as a plain past.
        capacity = window if _is_shared(text, layer) else window + WINDOW_SLACK
    state = blocks.key_value_state(graph, layer, count, size, window, capacity)
    mixed, present_key, present_value = blocks.attention(graph, query, key, value, state, inputs, heads)
    return mixed, (present_key, present_value)


def _is_shared(text: TextConfig, layer: int) -> bool:
    """Whether later layers read this layer's keys and values: the last owner of a kind that the sharers have."""
    kind = text.layers[layer].windowed
    later = [index for index in range(layer + 1, text.owners) if text.layers[index].windowed == kind]
    return not later and any(sharer.windowed == kind for sharer in text.layers[text.owners :])


def _feed_forward(
    graph: GraphBuilder, weights: Weights, text: TextConfig, layer: int, x: ir.Value, mixed: ir.Value
) -> ir.Value:
    """x + norm(attention output), then x + norm(mlp(norm(x)))."""
    mixed = blocks.rms_norm(
        graph, mixed, _norm(graph, weights, layer, "post_attention_layernorm", text.hidden), "post_attention"
    )
    weight = _norm(graph, weights, layer, "pre_feedforward_layernorm", text.hidden)
    normed, x = blocks.add_rms_norm(graph, mixed, x, weight, "pre_feedforward")
    fed = blocks.gated_mlp(graph, normed, weights, f"{_name(layer)}.mlp", text.hidden, text.layers[layer].intermediate)
    fed = blocks.rms_norm(
        graph, fed, _norm(graph, weights, layer, "post_feedforward_layernorm", text.hidden), "post_feedforward"
    )
    return graph.op("Add", x, fed)


# --- per-layer inputs (Gemma4TextModel.project_per_layer_inputs)


def _per_layer_inputs(
    graph: GraphBuilder,
    weights: Weights,
    text: TextConfig,
    embeddings: ir.Value,
    packed: ir.Value,
    layers: range,
) -> dict[int, ir.Value]:
    """(norm(W e / sqrt(D)) + token part) / sqrt(2) of `layers`, each [1, rows, P].

    Only the rows of W that belong to `layers` are used: layers that share keys and values run on few rows.
    """
    width, count = text.per_layer, len(layers)
    name, shape = "text.per_layer_model_projection.weight", (len(text.layers) * width, text.hidden)
    first, last = layers.start * width, layers.stop * width
    key = f"text.per_layer_model_projection.{layers.start}-{layers.stop}.weight"
    context = blocks.fused_linear(graph, embeddings, weights, [(name, shape[0])], shape[1], key, np.arange(first, last))
    context = blocks.constant_scale(graph, context, float(text.hidden) ** -0.5, "scale_projection")
    weight = _vector(graph, weights, "text.per_layer_projection_norm.weight", width)
    context = blocks.split_heads(graph, context, count, width, weight, "per_layer_projection_norm")
    bounds = [graph.constant(np.array([value], np.int64), f"slice_{value}") for value in (first, last, 2)]
    tokens = graph.op("Slice", packed, *bounds, name="per_layer_tokens")
    joined = blocks.constant_scale(graph, graph.op("Add", context, tokens), 2.0**-0.5, "scale_sum")
    parts = graph.ops("Split", [joined], count, name="split_layers", axis=-1, num_outputs=count)
    return dict(zip(layers, parts, strict=True))


def _late_per_layer_inputs(
    graph: GraphBuilder, weights: Weights, text: TextConfig, inputs: blocks.DecoderInputs, packed: ir.Value
) -> dict[int, ir.Value]:
    """Per-layer inputs of the layers that share keys and values, for the rows whose logits are wanted."""
    layers = range(text.owners, len(text.layers))
    if not layers:
        return {}
    embeddings = blocks.take_rows(graph, inputs.embeddings, inputs, "take_embeddings")
    tokens = blocks.take_rows(graph, packed, inputs, "take_per_layer_tokens")
    return _per_layer_inputs(graph, weights, text, embeddings, tokens, layers)


def _add_per_layer(
    graph: GraphBuilder, weights: Weights, text: TextConfig, layer: int, x: ir.Value, extra: ir.Value
) -> ir.Value:
    """x + norm(projection(gelu_tanh(gate(x)) * per-layer input))."""
    name, width = _name(layer), text.per_layer
    gate = blocks.linear(graph, x, weights, f"{name}.per_layer_input_gate.weight", (width, text.hidden))
    product = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), extra)
    projected = blocks.linear(graph, product, weights, f"{name}.per_layer_projection.weight", (text.hidden, width))
    weight = _norm(graph, weights, layer, "post_per_layer_input_norm", text.hidden)
    return graph.op("Add", x, blocks.rms_norm(graph, projected, weight, "post_per_layer_input"))


# --- weights


def _name(layer: int) -> str:
    return f"text.layers.{layer}"


def _norm(graph: GraphBuilder, weights: Weights, layer: int, name: str, size: int) -> ir.Value:
    return _vector(graph, weights, f"{_name(layer)}.{name}.weight", size)


def _vector(graph: GraphBuilder, weights: Weights, name: str, size: int) -> ir.Value:
    return graph.weight(name, (size,), lambda: [weights.read(name, (size,))])


def _table(graph: GraphBuilder, weights: Weights, text: TextConfig) -> blocks.Table:
    return _rows(graph, weights, "embed_tokens.weight", (text.vocabulary, text.hidden))


def _rows(graph: GraphBuilder, weights: Weights, name: str, shape: tuple[int, int]) -> blocks.Table:
    return blocks.table(graph, weights, name, name if name == "lm_head.weight" else f"text.{name}", shape)


# --- facts


def _graphs(config: Config) -> dict[str, object]:
    vision = {"vision": build_vision} if config.vision is not None else {}
    return {**vision, "embed": build_embed, "decoder": build_decoder}


def finish(checkpoint: Checkpoint, weights: Weights, config: Config, options: ExportOptions) -> Facts:
    text = config.text
    if text.tied:
        weights.drop("lm_head.weight")
    for layer in range(text.owners, len(text.layers)):
        for part in ("k_proj", "v_proj", "k_norm"):  # official files carry them; nothing reads them
            weights.drop(f"{_name(layer)}.self_attn.{part}.weight")
    left_out = []
    if config.has_audio:
        count = weights.drop_matching(re.compile(r"(model\.)?(audio_tower|embed_audio)\."))
        left_out.append(f"audio: {count} tensors of the audio tower and its projector")
    state = tuple(
        StatePair(
            input=f"past.{index}.{part}",
            output=f"present.{index}.{part}",
            kind="window" if layer.windowed else "global",
        )
        for index, layer in enumerate(text.layers)
        if layer.owns_state
        for part in ("key", "value")
    )
    has_image = config.vision is not None
    rows = "logit_rows:any" if text.owners == len(text.layers) else "logit_rows:last"
    return Facts(
        requires=("state:global", "state:window", rows, *(("image:aspect_patches",) if has_image else ())),
        state=state,
        image=_image_facts(checkpoint, config),
        image_prompt=PlaceholderFacts(item="<|image|>", before="<|image>", soft="<|image|>", after="<image|>")
        if has_image
        else None,
        reply=ReplyFacts(
            boxes="box_2d",
            thought=("<|channel>", "<channel|>"),
            tool_call=("<|tool_call>", "<tool_call|>"),
        ),
        turn_ends=("<turn|>", "<|tool_response>"),
        left_out=tuple(left_out),
    )


def _image_facts(checkpoint: Checkpoint, config: Config) -> ImageFacts | None:
    """Image policy from processor_config.json or preprocessor_config.json, with Gemma4ImageProcessor's defaults."""
    vision = config.vision
    if vision is None:
        return None
    values = checkpoint.json("preprocessor_config.json")
    processor = checkpoint.json("processor_config.json")
    reader = ConfigReader({**values, **processor, **processor.get("image_processor", {})}, "processor_config.json")
    for key, expected in (("patch_size", vision.patch), ("pooling_kernel_size", vision.pool), ("resample", 3)):
        reader.expect(key, (None, expected))
    default = reader.integer("max_soft_tokens", 280)
    budgets = tuple(sorted(reader.strings("siglance_budgets", list(OFFICIAL_BUDGETS))))
    if default not in budgets:
        raise ExportError(f"processor_config.json: max_soft_tokens {default} is not one of the budgets {budgets}")
    return ImageFacts(
        policy="aspect_patches",
        patch_size=vision.patch,
        pool_size=vision.pool,
        budgets=tuple(int(budget) for budget in budgets),
        default_budget=default,
        resample="bicubic",
    )


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4",),
    prefixes={
        "text.": ("model.language_model.", "language_model.model."),
        "vision.": ("model.vision_tower.", "vision_tower."),
        "embed_vision.": ("model.embed_vision.", "embed_vision."),
    },
    read=read,
    graphs=_graphs,  # pyright: ignore[reportArgumentType]
    finish=finish,
)
