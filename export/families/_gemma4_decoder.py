"""The decoder of Gemma 4: the graphs `embed` and `decoder` of all its sizes.

Per-layer embeddings, layers that share keys and values, double-wide MLPs (E2B, E4B); global layers whose values are
their keys, pictures that see all of themselves in windowed layers (12B, 26B, 31B), experts (26B); two head sizes,
proportional rotary positions, layer scalars and a soft cap on the logits in all of them.

Formulas: transformers `modeling_gemma4.py` (Gemma4TextDecoderLayer, Gemma4TextAttention, Gemma4TextModel,
create_masks_for_vision_model).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .. import blocks
from ..builder import FLOAT, INT64, GraphBuilder
from ..checkpoint import Weights
from . import ExportOptions
from ._gemma4_config import Config, TextConfig
from ._gemma4_experts import routed_experts

__all__ = ["build_decoder", "build_embed", "layer_name"]

# Rows above the window: on the CPU the operator compacts the buffer once in so many steps instead of every step.
# On a GPU it takes a buffer of exactly the window.
WINDOW_SLACK = 16

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
    inputs = blocks.decoder_inputs(graph, text.hidden, blocks=text.image_blocks)
    # Pictures see all of themselves in windowed layers only: global layers are causal (create_masks_for_vision_model).
    bias = blocks.block_bias(graph, inputs, window=text.window) if text.image_blocks else None
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
                mixed, present = _own_attention(graph, weights, text, layer, query, normed, inputs, heads, bias)
                sources[facts.windowed] = present
            else:
                assert shared is not None
                mixed = blocks.shared_attention(graph, query, sources[facts.windowed], shared, heads, facts.windowed)
            shape = (text.hidden, heads.heads * heads.head_size)
            mixed = blocks.linear(graph, mixed, weights, f"{layer_name(layer)}.self_attn.o_proj.weight", shape)
            if layer == owners - 1:
                # The last layer with a state has written it: only rows whose logits are wanted go on from here.
                x, mixed = (blocks.take_rows(graph, value, inputs, "take_rows") for value in (x, mixed))
                if packed is not None:
                    extra[layer] = blocks.take_rows(graph, extra[layer], inputs, "take_per_layer")
                    extra |= _late_per_layer_inputs(graph, weights, text, inputs, packed)
            x = _feed_forward(graph, weights, text, layer, x, mixed)
            if packed is not None:
                x = _add_per_layer(graph, weights, text, layer, x, extra[layer])
            x = graph.op("Mul", x, _vector(graph, weights, f"{layer_name(layer)}.layer_scalar", 1), name="layer_scalar")
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
    prefix, size = f"{layer_name(layer)}.self_attn", heads.head_size
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
    bias: ir.Value | None,
) -> tuple[ir.Value, Pair]:
    """Attention of a layer with keys and values of its own; values are normed without a weight and not rotated.

    `bias` is the mask of windowed layers in which pictures see all of themselves.
    """
    prefix, size, count = f"{layer_name(layer)}.self_attn", heads.head_size, heads.key_value_heads
    projected = [
        blocks.linear(graph, x, weights, f"{prefix}.{part}_proj.weight", (count * size, text.hidden))
        for part in ("k" if text.layers[layer].value_is_key else "kv")
    ]
    weight = _vector(graph, weights, f"{prefix}.k_norm.weight", size)
    key = blocks.split_heads(graph, projected[0], count, size, weight, "k_norm")
    value = blocks.split_heads(graph, projected[-1], count, size, blocks.ones(graph, size), "v_norm")
    windowed = text.layers[layer].windowed
    capacity: int | str = "capacity"
    window = None
    if windowed and bias is None:
        window = text.window
        # A buffer that others read must hold exactly the window: they see it as a plain past.
        capacity = window if graph.plan.half or _is_shared(text, layer) else window + WINDOW_SLACK
    state = blocks.key_value_state(graph, layer, count, size, window, capacity)
    mask = bias if windowed else None
    mixed, present_key, present_value = blocks.attention(graph, query, key, value, state, inputs, heads, bias=mask)
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
    name, intermediate = f"{layer_name(layer)}.mlp", text.layers[layer].intermediate
    fed = blocks.gated_mlp(graph, normed, weights, name, text.hidden, intermediate)
    if text.experts is not None:
        fed = _add_experts(graph, weights, text, layer, x, fed)
    fed = blocks.rms_norm(
        graph, fed, _norm(graph, weights, layer, "post_feedforward_layernorm", text.hidden), "post_feedforward"
    )
    return graph.op("Add", x, fed)


def _add_experts(
    graph: GraphBuilder, weights: Weights, text: TextConfig, layer: int, x: ir.Value, fed: ir.Value
) -> ir.Value:
    """norm(MLP) + norm(experts(norm(x))); the router reads x as it is."""
    assert text.experts is not None
    before, after_mlp, after_experts = (
        _norm(graph, weights, layer, f"{name}_feedforward_layernorm_{branch}", text.hidden)
        for name, branch in (("pre", 2), ("post", 1), ("post", 2))
    )
    normed = blocks.rms_norm(graph, x, before, "pre_experts")
    routed = routed_experts(graph, weights, layer_name(layer), text.experts, text.hidden, normed, x)
    fed = blocks.rms_norm(graph, fed, after_mlp, "post_mlp")
    return graph.op("Add", fed, blocks.rms_norm(graph, routed, after_experts, "post_experts"))


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
    key = f"text.layers_{layers.start}-{layers.stop}.per_layer_model_projection.weight"
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
    name, width = layer_name(layer), text.per_layer
    gate = blocks.linear(graph, x, weights, f"{name}.per_layer_input_gate.weight", (width, text.hidden))
    product = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), extra)
    projected = blocks.linear(graph, product, weights, f"{name}.per_layer_projection.weight", (text.hidden, width))
    weight = _norm(graph, weights, layer, "post_per_layer_input_norm", text.hidden)
    return graph.op("Add", x, blocks.rms_norm(graph, projected, weight, "post_per_layer_input"))


# --- weights


def layer_name(layer: int) -> str:
    return f"text.layers.{layer}"


def _norm(graph: GraphBuilder, weights: Weights, layer: int, name: str, size: int) -> ir.Value:
    return _vector(graph, weights, f"{layer_name(layer)}.{name}.weight", size)


def _vector(graph: GraphBuilder, weights: Weights, name: str, size: int) -> ir.Value:
    return graph.weight(name, (size,), lambda: [weights.read(name, (size,))])


def _table(graph: GraphBuilder, weights: Weights, text: TextConfig) -> blocks.Table:
    return _rows(graph, weights, "embed_tokens.weight", (text.vocabulary, text.hidden))


def _rows(graph: GraphBuilder, weights: Weights, name: str, shape: tuple[int, int]) -> blocks.Table:
    return blocks.table(graph, weights, name, name if name == "lm_head.weight" else f"text.{name}", shape)
