"""From pixels to soft tokens: SigLIP, the towers of Gemma 4, the embedder of the 12B (facts 1 and 2.1 to 2.5)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from siglance.engine import image_policy
from siglance.export import blocks, matrices
from siglance.export.families import _gemma4_vision, gemma4_unified

from .edits import Mutation, around, attributes, constant, number, replaced, scaled, weights, without
from .mutant import Mutant
from .probes import SOFT_TOKENS

# --- pixels


def _kernel(change: Any) -> dict[str, Mutation]:
    """By layout: the weights that see pixels as [outputs, row, column, channel], changed."""

    def flat(side: int) -> Any:
        return lambda values: change(values.reshape(len(values), side, side, 3)).reshape(values.shape)

    def convolution(values: np.ndarray) -> np.ndarray:
        return change(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    return {
        "PaliGemma 1": weights(r"vision\.embeddings\.patch_embedding\.weight", convolution),
        "E2B": weights(r"vision\.patch_embedder\.input_proj\.weight", flat(16)),
        "12B": weights(r"embedder\.patch_dense\.weight", flat(48)),
    }


def _channel_first(values: np.ndarray) -> np.ndarray:
    return values.transpose(0, 3, 1, 2).reshape(values.shape)


def _parts_first(values: np.ndarray) -> np.ndarray:
    """Nine patches of 16 pixels one after the other instead of rows of 48 pixels."""
    return values.reshape(len(values), 3, 16, 3, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(values.shape)


def _raster(right: Any) -> Any:
    """Patches in raster order instead of block by block."""
    return lambda pixels, patch, pool: right(pixels, patch, 1)


SWAPPED_FILTERS = dict(zip(image_policy._RESAMPLE, reversed(image_policy._RESAMPLE.values()), strict=True))
PIXELS = "1 pixels and patches"
PIXEL_MUTANTS = [
    *(
        Mutant(PIXELS, layout, name, mutation, SOFT_TOKENS)
        for name, change in {
            "blue, green, red": lambda values: values[..., ::-1],
            "columns before rows in a patch": lambda values: values.transpose(0, 2, 1, 3),
            "channels first": _channel_first,
        }.items()
        for layout, mutation in _kernel(change).items()
    ),
    Mutant(PIXELS, "12B", "16-pixel patches one after the other", _kernel(_parts_first)["12B"], SOFT_TOKENS),
    *(
        Mutant(PIXELS, layout, "another filter", constant(image_policy, "_RESAMPLE", SWAPPED_FILTERS), SOFT_TOKENS)
        for layout in ("PaliGemma 1", "Gemma 3 vision", "E2B", "12B")
    ),
    *(
        Mutant(PIXELS, layout, "values from 0 to 2", without("vision/Sub"), SOFT_TOKENS)
        for layout in ("PaliGemma 1", "Gemma 3 vision", "E2B")
    ),
    *(
        Mutant(PIXELS, layout, "patches in raster order", replaced(image_policy, "patchify", _raster), SOFT_TOKENS)
        for layout in ("Gemma 3 vision", "E2B", "31B")
    ),
]

# --- SigLIP


def _other_axis(graph: Any, inputs: list[Any], build: Any) -> Any:
    return build(inputs[0], graph.op("Sub", number(graph, 1, np.int64), inputs[1]))


def _largest(graph: Any, inputs: list[Any], build: Any) -> Any:
    return graph.op("ReduceMax", *inputs, keepdims=0)


def _stored_as_others(right: Any) -> Any:
    return lambda *arguments, stored_transposed=False, **more: right(*arguments, **more)


def _zero(pattern: str) -> Mutation:
    return weights(pattern, np.zeros_like)


SIGLIP = "2.1 to 2.3 SigLIP and projectors"
SIGLIP_MUTANTS = [
    *(
        Mutant(SIGLIP, layout, name, mutation, SOFT_TOKENS)
        for layout in ("PaliGemma 1", "Gemma 3 vision")
        for name, mutation in {
            "scale 64^-0.5": attributes(r"vision/layers\.\d+/attention", scale=64**-0.5),
            "scale 1": attributes(r"vision/layers\.\d+/attention", scale=1.0),
            "no bias of patches": _zero(r"vision\.embeddings\.patch_embedding\.bias"),
            "no bias of queries": _zero(r"vision\..*q_proj\.bias"),
            "no bias of values": _zero(r"vision\..*v_proj\.bias"),
            "no bias of attention": _zero(r"vision\..*out_proj\.bias"),
            "no biases of the MLP": _zero(r"vision\..*mlp\.fc\d\.bias"),
            "no biases of norms": _zero(r"vision\..*layer_norm\d\.bias"),
            "no norm at the end": without("vision/post_layernorm"),
            "GELU without tanh": attributes(r"vision/.*/Gelu", approximate="none"),
            "x and y swapped": around("vision/[xy]", _other_axis),
            "no positions": _zero(r"vision\.embeddings\.position_embedding\.weight"),
        }.items()
    ),
    Mutant(SIGLIP, "PaliGemma 1", "projector without bias", _zero(r"projector\.linear\.bias"), SOFT_TOKENS),
    Mutant(SIGLIP, "Gemma 3 vision", "largest instead of mean", around("vision/pool", _largest), SOFT_TOKENS),
    Mutant(SIGLIP, "Gemma 3 vision", "no norm behind the mean", without("vision/mm_soft_emb_norm"), SOFT_TOKENS),
    Mutant(
        *(SIGLIP, "Gemma 3 vision", "projection stored as [out, in]"),
        *(replaced(blocks, "linear", _stored_as_others), SOFT_TOKENS),
        refusal="ExportError.*mm_input_projection_weight",
    ),
]

# --- Gemma 4


def _rope_axes_swapped(right: Any) -> Any:
    return lambda graph, vision, columns, rows: right(graph, vision, rows, columns)


def _over_the_head(right: Any) -> Any:
    return lambda size, theta, **more: right(2 * size, theta, **more)[: size // 2]


def _unclipped(right: Any) -> Any:
    def linear(graph: Any, x: Any, source: Any, name: str, shape: Any, order: Any = None) -> Any:
        return blocks.linear(graph, x, source, f"{name}.linear.weight", shape, order)

    return linear


def _clipped(side: int) -> Any:
    """Inputs (0) or outputs (1) are clipped, not both; a layer asks for the one, then for the other."""

    def wrong(right: Any) -> Any:
        asked = itertools.count()
        return lambda graph, x, low, high: right(graph, x, low, high) if next(asked) % 2 == side else x

    return wrong


def _from_above(right: Any) -> Any:
    return lambda graph, x, low, high: right(graph, x, -np.inf, high)


def _scaled_before_biases(graph: Any, inputs: list[Any], build: Any) -> Any:
    """x * scale - bias."""
    difference, scale = inputs
    x, bias = difference.producer().inputs
    return graph.op("Sub", graph.op("Mul", x, scale), bias)


TOWERS = "2.4 towers of Gemma 4"
TOWER_MUTANTS = [
    *(
        Mutant(TOWERS, layout, name, mutation, SOFT_TOKENS)
        for layout in ("E2B", "31B")
        for name, mutation in {
            "tables of x and y swapped": weights(r"vision\..*position_embedding_table", lambda values: values[::-1]),
            "rotated by y, then x": replaced(_gemma4_vision, "_rope_2d", _rope_axes_swapped),
            "pairs across the whole head": replaced(_gemma4_vision, "_interleave_halves", lambda right: np.arange),
            "exponent over the whole head": replaced(blocks, "inverse_frequencies", _over_the_head),
            "base 1e4": replaced(
                blocks, "inverse_frequencies", lambda right: lambda size, theta, **more: right(size, 1e4, **more)
            ),
            "largest instead of mean": around("vision/pool", _largest),
            "no norm before the projection": without("vision/embed_vision_norm"),
            "no norms behind attention": without(r"vision/layers\.\d+/post_attention_layernorm"),
            "no norms behind the MLP": without(r"vision/layers\.\d+/post_feedforward_layernorm"),
            "GELU without tanh": attributes(r"vision/.*/Gelu", approximate="none"),
        }.items()
    ),
    Mutant(TOWERS, "E2B", "nothing clipped", replaced(blocks, "clipped_linear", _unclipped), SOFT_TOKENS),
    Mutant(TOWERS, "E2B", "inputs not clipped", replaced(matrices, "_clip", _clipped(1)), SOFT_TOKENS),
    Mutant(TOWERS, "E2B", "outputs not clipped", replaced(matrices, "_clip", _clipped(0)), SOFT_TOKENS),
    Mutant(TOWERS, "E2B", "clipped from above only", replaced(matrices, "_clip", _from_above), SOFT_TOKENS),
    Mutant(TOWERS, "31B", "mean not times sqrt(hidden)", without("vision/scale_pooled"), SOFT_TOKENS),
    Mutant(TOWERS, "31B", "sum instead of mean", scaled("vision/pool", 9.0), SOFT_TOKENS),
    Mutant(TOWERS, "31B", "no biases", without("vision/Sub"), SOFT_TOKENS),
    Mutant(TOWERS, "31B", "no scales", without("vision/standardize"), SOFT_TOKENS),
    Mutant(TOWERS, "31B", "biases before scales", around("vision/standardize", _scaled_before_biases), SOFT_TOKENS),
    # The norm before the projection hides these scales, unless the features are faint.
    Mutant(TOWERS, "E2B, faint", "mean not times sqrt(hidden)", without("vision/scale_pooled"), SOFT_TOKENS),
    Mutant(TOWERS, "E2B, faint", "sum instead of mean", scaled("vision/pool", 9.0), SOFT_TOKENS),
]

# --- 12B


def _positions_behind_the_norm(patch: Any) -> None:
    """norm(x) + positions instead of norm(x + positions)."""
    before: list[Any] = []

    def skip(graph: Any, inputs: list[Any], build: Any) -> Any:
        before.append(inputs[1])
        return inputs[0]

    def norm(graph: Any, inputs: list[Any], build: Any) -> Any:
        [y] = build()
        for position in before:
            y = graph.op("Add", y, position, name="behind")
        return y

    around("vision/pos_norm", norm)(patch)
    # The first sum is the bias of the linear layer.
    sums = iter(range(3))
    around("vision/Add", lambda graph, inputs, build: skip(graph, inputs, build) if next(sums) else build())(patch)


EMBEDDER = "2.5 embedder of the 12B"
EMBEDDER_MUTANTS = [
    Mutant(EMBEDDER, "12B", name, mutation, SOFT_TOKENS)
    for name, mutation in {
        "epsilon 1e-6": constant(gemma4_unified, "LAYER_NORM_EPSILON", 1e-6),
        "epsilon of values from 0 to 1 for values to 255": attributes("vision/patch_ln1", epsilon=1e-5),
        "no norm of patches": without("vision/patch_ln1"),
        "no norm behind the layer": without("vision/patch_ln2"),
        "no norm of positions": without("vision/pos_norm"),
        "positions behind their norm": _positions_behind_the_norm,
        "tables of x and y swapped": weights(r"embedder\.pos_embedding", lambda values: values[:, ::-1]),
        "no bias of the layer": _zero(r"embedder\.patch_dense\.bias"),
        "no biases of norms": _zero(r"embedder\.\w+_(ln1|ln2|norm)\.bias"),
        "no norm before the projection": without("vision/embed_vision_norm"),
    }.items()
]

MUTANTS = [*PIXEL_MUTANTS, *SIGLIP_MUTANTS, *TOWER_MUTANTS, *EMBEDDER_MUTANTS]
