"""Norms, the scale of attention, and rotary positions of global layers (facts 0.1, 0.2, 0.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from siglance.export import blocks
from siglance.export.families import gemma3, paligemma

from .edits import Mutation, attributes, each_layer, facts, replaced, weights, without
from .mutant import Mutant
from .probes import SOFT_TOKENS

# --- 0.1


def _plain_weight(matching: str = "") -> Callable[[Any], Any]:
    """w instead of 1 + w in norms whose name has `matching` in it."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def norm(graph: Any, source: Any, name: str, size: int, *scale: float) -> Any:
            if matching not in name:
                return right(graph, source, name, size, *scale)
            return graph.weight(
                f"{name}.weight", (size,), lambda: [math.prod(scale) * source.read(f"{name}.weight", (size,))]
            )

        return norm

    return wrong


def _plus_one(pattern: str) -> Mutation:
    return weights(pattern, lambda values: 1 + values)


NORMS = "0.1 norms"
DECODER_NORMS = r"text\.(layers\.\d+\.)?(\w*layernorm(_\d)?|norm|post_per_layer_input_norm)\.weight"
HEAD_NORMS = r"text\.layers\.\d+\.self_attn\.[qk]_norm\.weight"
NORM_MUTANTS = [
    *(
        Mutant(NORMS, layout, name, _plus_one(pattern))
        for layout in ("E2B", "31B", "26B-A4B")
        for name, pattern in {
            "1 + w in layers": DECODER_NORMS.replace("|norm|", "|"),
            "1 + w in the last norm": r"text\.norm\.weight",
            "1 + w for queries and keys": HEAD_NORMS,
        }.items()
    ),
    Mutant(NORMS, "E2B", "1 + w for per-layer inputs", _plus_one(r"text\.per_layer_projection_norm\.weight")),
    *(
        Mutant(NORMS, layout, f"1 + w in the tower's {name}", _plus_one(rf"vision\..*{pattern}\.weight"), SOFT_TOKENS)
        for layout in ("E2B", "31B")
        for name, pattern in {"layers": "layernorm", "queries and keys": "[qk]_norm"}.items()
    ),
    *(
        Mutant(NORMS, layout, f"w {where}", replaced(module, "_norm", _plain_weight(matching)))
        for layout, module in {
            **{"Gemma 3 text": gemma3, "Gemma 3 vision": gemma3, "PaliGemma 1": paligemma, "PaliGemma 2": paligemma}
        }.items()
        for where, matching in {"everywhere": "", "before attention": "input_", "in the last norm": "text.norm"}.items()
    ),
    Mutant(NORMS, "Gemma 3 text", "w for queries and keys", replaced(gemma3, "_norm", _plain_weight("self_attn"))),
    Mutant(NORMS, "Gemma 3 vision", "w behind the pooling", replaced(gemma3, "_norm", _plain_weight()), SOFT_TOKENS),
]

# --- 0.2


def _scale_by_head_size(right: Any) -> Any:
    def attention(heads: int, shared: int, size: int, scale: float, *tables: Any, **more: Any) -> Any:
        return right(heads, shared, size, size**-0.5, *tables, **more)

    return attention


def _values_with_the_weight_of_keys(right: Any) -> Any:
    """The norm of values is the one without a weight: `blocks.ones`."""
    keys: list[Any] = []

    def split(graph: Any, x: Any, heads: int, size: int, weight: Any, name: str) -> Any:
        if name == "k_norm":
            keys[:] = [weight]
        return right(graph, x, heads, size, keys[0] if name == "v_norm" else weight, name)

    return split


def _all_heads_at_once(right: Any) -> Any:
    def split(graph: Any, x: Any, heads: int, size: int, weight: Any, name: str) -> Any:
        if name != "v_norm":
            return right(graph, x, heads, size, weight, name)
        return right(graph, x, 1, heads * size, blocks.ones(graph, heads * size), name)

    return split


SCALE = "0.2 scale 1"
SCALE_MUTANTS = [
    *(
        Mutant(SCALE, layout, "head_dim^-0.5", replaced(blocks, "Attention", _scale_by_head_size))
        for layout in ("E2B", "E4B", "31B", "26B-A4B")
    ),
    Mutant(
        *(SCALE, "E2B", "head_dim^-0.5 in layers that share"),
        attributes(r"decoder/layers\.[3-6]/attention", scale=16**-0.5),
    ),
    *(
        Mutant(
            *(SCALE, layout, "head_dim^-0.5 in the tower"),
            attributes(r"vision/layers\.\d+/attention", scale=16**-0.5),
            SOFT_TOKENS,
        )
        for layout in ("E2B", "31B")
    ),
    *(
        Mutant(SCALE, layout, f"{name} without a norm", without(rf"decoder/layers\.\d+/{part}_norm"))
        for layout in ("E2B", "31B")
        for name, part in {"queries": "q", "keys": "k", "values": "v"}.items()
    ),
    *(
        Mutant(SCALE, "E2B", f"{name} of the tower without a norm", without(rf"vision/.*/{part}_norm"), SOFT_TOKENS)
        for name, part in {"queries": "q", "keys": "k", "values": "v"}.items()
    ),
    *(
        Mutant(SCALE, layout, name, replaced(blocks, "split_heads", wrong))
        for layout, name, wrong in (
            ("E2B", "values with the weight of the keys", _values_with_the_weight_of_keys),
            ("31B", "values with the weight of the keys", _values_with_the_weight_of_keys),
            ("31B", "values normed over all heads at once", _all_heads_at_once),
        )
    ),
    Mutant(
        *(SCALE, "31B", "values of the tower normed over all heads at once"),
        replaced(blocks, "split_heads", _all_heads_at_once),
        SOFT_TOKENS,
    ),
]

# --- 0.4

SHARE = 0.25  # of the pairs of a global head that rotate


def _frequencies(wrong: Callable[[int, float], np.ndarray]) -> Mutation:
    """Other frequencies in global layers."""

    def replace(right: Any) -> Any:
        def inverse(size: int, theta: float, *, partial_factor: float | None = None, **more: Any) -> np.ndarray:
            frequencies = right(size, theta, partial_factor=partial_factor, **more)
            return frequencies if partial_factor is None else wrong(size, theta)

        return inverse

    return replaced(blocks, "inverse_frequencies", replace)


def _first(size: int, count: int, frequencies: np.ndarray) -> np.ndarray:
    """`count` frequencies, then zeros."""
    return np.concatenate([frequencies[:count], np.zeros(size // 2 - count)])


def _by_rotating_part(size: int, theta: float) -> np.ndarray:
    rotating = int(SHARE * size)
    return _first(size, rotating // 2, theta ** (-np.arange(0, rotating, 2) / rotating))


def _by_whole(share: float) -> Callable[[int, float], np.ndarray]:
    def frequencies(size: int, theta: float) -> np.ndarray:
        return _first(size, int(share * size // 2), theta ** (-np.arange(0, size, 2) / size))

    return frequencies


def _contiguous() -> np.ndarray:
    """Elements of the 4 (query) heads of 32 in an order in which pairs (i, i + 16) are what pairs (i, i + 4) of the
    first 8 elements were: the rotation of the first quarter of a head as if it were a head."""
    rest = np.arange(8, 32)
    head = np.concatenate([np.arange(4), rest[:12], np.arange(4, 8), rest[12:]])
    return (32 * np.arange(4)[:, None] + head).reshape(-1)


def _paired_contiguously(right: Any) -> Any:
    def split(graph: Any, x: Any, heads: int, size: int, weight: Any, name: str) -> Any:
        y = right(graph, x, heads, size, weight, name)
        if size != 32 or name == "v_norm":  # queries and keys of global layers only
            return y
        return graph.op("Gather", y, graph.constant(_contiguous()[: heads * size], "order"), axis=-1)

    return split


ROPE = "0.4 proportional RoPE"
ROPE_MUTANTS = [
    *(
        Mutant(ROPE, layout, name, mutation)
        for layout in ("E2B", "31B")
        for name, mutation in {
            "exponent over the rotating part": _frequencies(_by_rotating_part),
            "every pair rotates": _frequencies(_by_whole(1.0)),
            "twice as many pairs rotate": _frequencies(_by_whole(2 * SHARE)),
            "no pair rotates": _frequencies(_by_whole(0.0)),
            "pairs side by side in the rotating part": replaced(blocks, "split_heads", _paired_contiguously),
            "base of windowed layers": facts(global_theta=lambda right: 1e4),
            "windowed layers rotate a quarter too": replaced(
                blocks,
                "inverse_frequencies",
                lambda right: lambda size, theta, **_: right(size, theta, partial_factor=SHARE),
            ),
        }.items()
    ),
    Mutant(ROPE, "31B", "neighbours are pairs", attributes(r"decoder/layers\.\d+/attention", rotary_interleaved=1)),
    Mutant(
        *(ROPE, "E2B", "neighbours are pairs where layers share"),
        attributes(r"decoder/layers\.[46]/RotaryEmbedding", interleaved=1),
    ),
    *(
        Mutant(
            *(ROPE, layout, "heads as wide as in windowed layers"),
            each_layer(head_size=lambda layer, layers: layers[0].head_size),
            refusal=r"ExportError.*q_proj",
        )
        for layout in ("E2B", "31B")
    ),
]

MUTANTS = [*NORM_MUTANTS, *SCALE_MUTANTS, *ROPE_MUTANTS]
