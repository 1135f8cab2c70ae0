"""Rules of single decoders: scales, caps, rotary bases, heads, values that are keys, experts (facts 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from siglance.export import blocks
from siglance.export.builder import INT64, MICROSOFT
from siglance.export.families import _gemma4_decoder as gemma4

from .edits import Mutation, around, attributes, constant, each_layer, facts, number, replaced, weights, without
from .mutant import Mutant

LAYER = r"decoder/layers\.\d+"


def _gelu(name: str) -> Mutation:
    return attributes(rf".*/{name}", approximate="none")


def _swapped(graph: Any, inputs: list[Any], build: Any) -> Any:
    return build()[::-1]


def _tiled_heads(right: Any) -> Any:
    """Key/value head g serves the query heads g, g + G, ... of 4, instead of neighbours."""
    order = np.array([0, 2, 1, 3])

    def attention(
        graph: Any, query: Any, key: Any, value: Any, state: Any, inputs: Any, heads: Any, **more: Any
    ) -> Any:
        if heads.key_value_heads == 1:
            return right(graph, query, key, value, state, inputs, heads, **more)
        places = graph.constant((heads.head_size * order[:, None] + np.arange(heads.head_size)).reshape(-1), "order")
        query = graph.op("Gather", query, places, axis=-1)
        mixed, *present = right(graph, query, key, value, state, inputs, heads, **more)
        return graph.op("Gather", mixed, places, axis=-1), *present

    return attention


EVERY = "3.1 layers of all families"
EVERY_MUTANTS = [
    *(
        Mutant(EVERY, layout, name, mutation)
        for layout in ("Gemma 3 text", "PaliGemma 2", "E2B", "31B")
        for name, mutation in {
            "GELU without tanh": _gelu("Gelu"),
            "gate and up swapped": around(rf"{LAYER}/split_gate_up", _swapped),
            "no norm behind attention": without(rf"{LAYER}/post_attention"),
            "no norm behind the MLP": without(rf"{LAYER}/post_feedforward"),
        }.items()
    ),
    *(
        Mutant(EVERY, layout, "key/value heads dealt out in turn", replaced(blocks, "attention", _tiled_heads))
        for layout in ("Gemma 3 text", "Gemma 3 vision", "PaliGemma 2", "31B")
    ),
]

# --- Gemma 1 and 2

GEMMA2 = "3.3 and 3.4 Gemma 1 and 2"
GEMMA2_MUTANTS = [
    Mutant(GEMMA2, "PaliGemma 1", "scale 1", facts(scale=1.0)),
    Mutant(GEMMA2, "PaliGemma 1", "norms behind both halves", facts(sandwich=True), refusal="ExportError.*feedforward"),
    Mutant(GEMMA2, "PaliGemma 2", "no norms behind both halves", facts(sandwich=False)),
    Mutant(GEMMA2, "PaliGemma 2", "head_dim^-0.5", facts(scale=16**-0.5)),
    Mutant(GEMMA2, "PaliGemma 2", "no cap of scores", facts(attention_cap=None)),
    Mutant(GEMMA2, "PaliGemma 2", "scores capped before they are scaled", facts(attention_cap=3.0 * 20**-0.5)),
    Mutant(GEMMA2, "PaliGemma 2", "no cap of logits", facts(logits_cap=None)),
    Mutant(GEMMA2, "PaliGemma 2", "caps swapped", facts(attention_cap=5.0, logits_cap=3.0)),
    Mutant(GEMMA2, "PaliGemma 1", "capped logits", facts(logits_cap=30.0)),
    Mutant(GEMMA2, "PaliGemma 2", "base 1e6", facts(theta=1e6)),
]

# --- Gemma 3


def _factor(value: float) -> Any:
    return lambda rope: dataclasses.replace(rope, linear_factor=value)


def _theta(value: float) -> Any:
    return lambda rope: dataclasses.replace(rope, theta=value)


def _normed_values(graph: Any, inputs: list[Any], build: Any) -> Any:
    query, key, value = build()
    return [query, key, blocks.split_heads(graph, value, 2, 16, blocks.ones(graph, 16), "v_norm")]


GEMMA3 = "3.5 Gemma 3"
GEMMA3_MUTANTS = [
    *(
        Mutant(GEMMA3, layout, name, mutation)
        for layout in ("Gemma 3 text", "Gemma 3 vision")
        for name, mutation in {
            "head_dim^-0.5": facts(scale=16**-0.5),
            "scale 1": facts(scale=1.0),
            "queries without a norm": without(rf"{LAYER}/q_norm"),
            "keys without a norm": without(rf"{LAYER}/k_norm"),
            "values normed": around(rf"{LAYER}/split_qkv", _normed_values),
            "base 1e4 in global layers": facts(global_rope=_theta(1e4)),
            "base 1e6 in windowed layers": facts(local_rope=_theta(1e6)),
        }.items()
    ),
    Mutant(GEMMA3, "Gemma 3 text", "RoPE factor 8", facts(global_rope=_factor(8.0))),
    Mutant(GEMMA3, "Gemma 3 vision", "no RoPE factor", facts(global_rope=_factor(1.0))),
    Mutant(GEMMA3, "Gemma 3 vision", "RoPE factor in windowed layers too", facts(local_rope=_factor(8.0))),
    Mutant(GEMMA3, "Gemma 3 vision", "RoPE factor upside down", facts(global_rope=_factor(1 / 8))),
    Mutant(GEMMA3, "Gemma 3 vision", "capped logits", facts(soft_cap=30.0)),
]

# --- Gemma 4


def _rotated_values(right: Any) -> Any:
    """In global layers, whose values are keys, values are rotated as keys are."""

    def attention(
        graph: Any, query: Any, key: Any, value: Any, state: Any, inputs: Any, heads: Any, **more: Any
    ) -> Any:
        if heads.head_size == 32:
            total = graph.op("Cast", inputs.total, to=int(INT64))
            tokens = graph.op("Squeeze", graph.op("Shape", value, start=1, end=2))
            rows = graph.op("Range", graph.op("Sub", total, tokens), total, number(graph, 1, np.int64))
            rows = graph.op("Unsqueeze", rows, graph.constant(np.array([0], np.int64), "axis"))
            value = graph.op(
                *("RotaryEmbedding", value, rows, heads.cos, heads.sin),
                domain=MICROSOFT,
                num_heads=heads.key_value_heads,
            )
        return right(graph, query, key, value, state, inputs, heads, **more)

    return attention


GEMMA4 = "3.6 Gemma 4"
GEMMA4_MUTANTS = [
    *(Mutant(GEMMA4, layout, "logits not capped", facts(soft_cap=None)) for layout in ("E2B", "31B")),
    Mutant(GEMMA4, "31B", "global values are rotated", replaced(blocks, "attention", _rotated_values)),
    Mutant(GEMMA4, "31B", "windowed values are keys too", each_layer(value_is_key=True)),
    Mutant(GEMMA4, "31B", "global values of their own", each_layer(value_is_key=False), refusal="ExportError.*v_proj"),
    Mutant(
        *(GEMMA4, "31B", "as many global key/value heads as windowed ones"),
        each_layer(key_value_heads=2),
        refusal="ExportError.*k_proj",
    ),
]

# --- experts


def _router_reads_norm(right: Any) -> Any:
    return lambda graph, source, prefix, facts, hidden, x, residual: right(graph, source, prefix, facts, hidden, x, x)


def _experts_read_stream(right: Any) -> Any:
    return lambda graph, source, prefix, facts, hidden, x, residual: right(
        *(graph, source, prefix, facts, hidden, residual, residual)
    )


def _other_norms(names: dict[str, str]) -> Mutation:
    """Norms with the weights of others."""
    return replaced(
        gemma4,
        "_norm",
        lambda right: lambda graph, source, layer, name, size: right(graph, source, layer, names.get(name, name), size),
    )


def _used(extra: int) -> Mutation:
    return facts(experts=lambda right: dataclasses.replace(right, used=right.used + extra))


def _by_rank(graph: Any, inputs: list[Any], build: Any) -> Any:
    shares, scales = inputs
    return build(shares, graph.op("Gather", scales, graph.constant(np.array([1, 2, 0]), "ranks"), axis=-1))


EXPERTS = rf"{LAYER}/experts"
MOE = "3.6 experts"
MOE_MUTANTS = [
    Mutant(MOE, "26B-A4B", name, mutation)
    for name, mutation in {
        "the router reads the normed stream": replaced(gemma4, "routed_experts", _router_reads_norm),
        "experts read the stream as it is": replaced(gemma4, "routed_experts", _experts_read_stream),
        "the router has no norm": without(rf"{EXPERTS}/router_norm"),
        "no scale of the router": weights(r".*router\.scale", np.ones_like),
        "no division by sqrt(D)": weights(r".*router\.scale", lambda values: values * 8),
        "no softmax": without(rf"{EXPERTS}/Softmax"),
        "no scale of each expert": weights(r".*per_expert_scale", np.ones_like),
        "scale of the expert's rank": around(rf"{EXPERTS}/shares", _by_rank),
        "one expert more": _used(1),
        "one expert less": _used(-1),
        "gate and up of experts swapped": around(rf"{EXPERTS}/loop/split_gate_up", _swapped),
        "GELU of experts without tanh": _gelu("experts/loop/Gelu"),
        "norms behind the branches swapped": _other_norms(
            {
                "post_feedforward_layernorm_1": "post_feedforward_layernorm_2",
                "post_feedforward_layernorm_2": "post_feedforward_layernorm_1",
            }
        ),
        "experts have the norm of the MLP": _other_norms({"pre_feedforward_layernorm_2": "pre_feedforward_layernorm"}),
        "no norm behind the experts": without(rf"{LAYER}/post_experts"),
        "no norm behind the MLP beside them": without(rf"{LAYER}/post_mlp"),
        "no MLP beside them": around(
            rf"{LAYER}/post_mlp", lambda graph, inputs, build: graph.op("Mul", build()[0], number(graph, 0.0))
        ),
        "no experts": constant(gemma4, "_add_experts", lambda graph, source, text, layer, x, fed: fed),
    }.items()
]


MUTANTS = [*EVERY_MUTANTS, *GEMMA2_MUTANTS, *GEMMA3_MUTANTS, *GEMMA4_MUTANTS, *MOE_MUTANTS]
