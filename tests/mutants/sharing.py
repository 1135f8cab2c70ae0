"""Shared keys and values, rows that go on, per-layer inputs and layer scalars of Gemma 4 (facts 0.5, 0.6, 0.8, 0.9)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from siglance.export import blocks
from siglance.export.builder import FLOAT, INT64
from siglance.export.families import _gemma4_decoder as decoder

from .edits import (
    Mutation,
    around,
    config,
    constant,
    each_layer,
    facts,
    number,
    replaced,
    then,
    together,
    weights,
    without,
)
from .mutant import Mutant

# --- 0.5: layers 0 and 1 own windowed keys and values, 2 owns global ones, 3 to 6 share those of 1 and 2


def _keys_of_the_first_layer(right: Any) -> Any:
    """Windowed sharers read layer 0 instead of layer 1."""
    first: dict[bool, Any] = {}

    def own(graph: Any, source: Any, text: Any, layer: int, *others: Any) -> Any:
        mixed, present = right(graph, source, text, layer, *others)
        return mixed, first.setdefault(text.layers[layer].windowed, present)

    return own


def _row_in_the_window(right: Any) -> Any:
    """Queries of windowed sharers are rotated by their row in the buffer, not by their position."""

    def shared(graph: Any, query: Any, present: Any, rows: Any, heads: Any, windowed: bool) -> Any:
        if windowed:
            last = graph.op("Sub", graph.op("Cast", rows.window_total, to=int(INT64)), number(graph, 1, np.int64))
            axes = graph.constant(np.array([0, 1], np.int64), "axes")
            rows = dataclasses.replace(rows, positions=graph.op("Unsqueeze", last, axes))
        return right(graph, query, present, rows, heads, windowed)

    return shared


def _shared_window(extra: int) -> Mutation:
    """Sharers see `extra` keys more than the window has, or fewer."""
    return replaced(
        blocks, "shared_rows", lambda right: lambda graph, inputs, window: right(graph, inputs, window + extra)
    )


def _unrotated(graph: Any, inputs: list[Any], build: Any) -> Any:
    return inputs[0]


SHARING = "0.5 shared keys and values"
SHARING_MUTANTS = [
    Mutant(
        *(SHARING, "E2B", "of the first windowed layer"),
        together(
            replaced(decoder, "_own_attention", _keys_of_the_first_layer),
            constant(decoder, "_is_shared", lambda text, layer: True),
        ),
    ),
    Mutant(
        *(SHARING, "E2B", "not shared: every layer makes its own"),
        config(lambda read: _all_own(read)),
    ),
    Mutant(SHARING, "E2B", "queries not rotated", around(r"decoder/layers\.[3-6]/RotaryEmbedding", _unrotated)),
    Mutant(SHARING, "E2B", "queries rotated by their row", replaced(blocks, "shared_attention", _row_in_the_window)),
    Mutant(SHARING, "E2B", "one key too few in windows", _shared_window(-1)),
    Mutant(
        *(SHARING, "E2B", "windowed sharers see all that the buffer has"),
        together(
            _shared_window(decoder.WINDOW_SLACK),
            constant(decoder, "_is_shared", lambda text, layer: False),
        ),
    ),
    *(
        Mutant(
            *(SHARING, layout, name),
            each_layer(intermediate=lambda layer, layers, width=width: width if not layer.owns_state else 96),
            refusal=r"ExportError.*mlp",
        )
        for layout, name, width in (("E2B", "MLP not twice as wide", 96), ("E4B", "MLP twice as wide", 192))
    ),
]


def _all_own(read: Any) -> Any:
    layers = tuple(dataclasses.replace(layer, owns_state=True) for layer in read.text.layers)
    return dataclasses.replace(read, text=dataclasses.replace(read.text, layers=layers, owners=len(layers)))


# --- 0.6


def _first_row(right: Any) -> Any:
    def take(graph: Any, x: Any, inputs: Any, name: str) -> Any:
        rows = graph.op("Sub", inputs.rows, inputs.rows)
        return right(graph, x, dataclasses.replace(inputs, rows=rows), name)

    return take


def _first_row_of(names: tuple[str, ...]) -> Mutation:
    def wrong(right: Any) -> Any:
        first = _first_row(right)
        return lambda graph, x, inputs, name: (first if name in names else right)(graph, x, inputs, name)

    return replaced(blocks, "take_rows", wrong)


def _only_wanted_rows(right: Any) -> Any:
    """The last owner runs on the wanted rows only, so that the others leave no keys and values behind."""

    def own(graph: Any, source: Any, text: Any, layer: int, query: Any, x: Any, inputs: Any, *others: Any) -> Any:
        if layer == text.owners - 1:
            wanted = graph.op("Gather", x, inputs.rows, axis=1)
            places = graph.op("Unsqueeze", inputs.rows, graph.constant(np.array([0, 2], np.int64), "axes"))
            places = graph.op("Expand", places, graph.op("Shape", wanted))
            nothing = graph.op("Mul", x, number(graph, 0.0))
            x = graph.op("ScatterElements", nothing, places, wanted, axis=1)
        return right(graph, source, text, layer, query, x, inputs, *others)

    return own


def _positions_in_the_chunk(right: Any) -> Any:
    def rows(graph: Any, inputs: Any, window: int) -> Any:
        found = right(graph, inputs, window)
        axis = graph.constant(np.array([0], np.int64), "axis")
        return dataclasses.replace(found, positions=graph.op("Unsqueeze", inputs.rows, axis))

    return rows


ROWS = "0.6 layers that share run for the last row"
ROWS_MUTANTS = [
    Mutant(ROWS, "E2B", "for the first row", _first_row_of(("take_rows",))),
    Mutant(ROWS, "E2B", "per-layer embedding of the first row", _first_row_of(("take_per_layer_tokens",))),
    Mutant(ROWS, "E2B", "per-layer context of the first row", _first_row_of(("take_embeddings",))),
    Mutant(ROWS, "E2B", "per-layer input of the last owner of the first row", _first_row_of(("take_per_layer",))),
    Mutant(
        *(ROWS, "E2B", "the last owner runs for the last row only"),
        replaced(decoder, "_own_attention", _only_wanted_rows),
    ),
    Mutant(ROWS, "E2B", "positions counted in the chunk", replaced(blocks, "shared_rows", _positions_in_the_chunk)),
]

# --- 0.8


def _media(change: Any) -> Mutation:
    """Other ids of media in the graph that looks up embeddings."""
    return config(lambda read: dataclasses.replace(read, media_ids=change(read.media_ids)), graph="embed")


def _pad(own: Any) -> Mutation:
    """The table of per-layer embeddings alone is read with other ids: `own(graph, padded ids, ids as they came)`."""
    ids: list[Any] = []

    def remember(graph: Any, inputs: list[Any], build: Any) -> Any:
        ids[:] = [inputs[2]]
        return build()

    def look_up(graph: Any, inputs: list[Any], build: Any) -> Any:
        return build(inputs[0], own(graph, inputs[1], ids[0]))

    return together(around("embed/pad_image", remember), around("embed/embed_tokens_per_layer", look_up))


def _everywhere_padding(graph: Any, padded: Any, ids: Any) -> Any:
    return graph.op("Mul", padded, number(graph, 0, np.int64))


def _padding_around_pictures(graph: Any, padded: Any, ids: Any) -> Any:
    """The tokens that begin and end a picture stand beside its placeholder in the vocabulary, 17 to 19."""
    near = graph.op(
        "Less", graph.op("Abs", graph.op("Sub", ids, number(graph, 18, np.int64))), number(graph, 2, np.int64)
    )
    return graph.op("Where", near, number(graph, 0, np.int64), padded)


def _context_before_pictures(patch: Any) -> None:
    """The context projection reads the embeddings before soft tokens are put in: one more wire."""

    def embed(graph: Any, inputs: list[Any], build: Any) -> Any:
        [value] = build()
        copy = graph.op("Add", value, number(graph, 0.0))
        graph.output(copy, "plain_embeds", FLOAT, [1, "tokens", 64])
        return value

    def inputs(right: Any) -> Any:
        def per_layer(graph: Any, source: Any, text: Any, embeddings: Any, packed: Any, layers: range) -> Any:
            if layers.start == 0:
                embeddings = graph.input("plain_embeds", FLOAT, [1, "tokens", 64])
            return right(graph, source, text, embeddings, packed, layers)

        return per_layer

    around("embed/scale_embeddings", embed)(patch)
    replaced(decoder, "_per_layer_inputs", inputs)(patch)


def _shifted(graph: Any) -> Any:
    """Columns of the packed rows (7 layers of 16), one layer later."""
    return graph.constant(np.roll(np.arange(7 * 16), 16), "shifted")


PER_LAYER = "0.8 per-layer inputs"
_WITHOUT_PADDING = _pad(lambda graph, padded, ids: ids)
PER_LAYER_MUTANTS = [
    Mutant(PER_LAYER, "E2B", "pictures look up their own id", _WITHOUT_PADDING),
    Mutant(PER_LAYER, "E2B", "videos look up their own id", _media(lambda ids: {**ids, "video": ids["image"]})),
    Mutant(PER_LAYER, "E2B", "audio looks up its own id", _media(lambda ids: {**ids, "audio": ids["image"]})),
    Mutant(PER_LAYER, "E2B", "begin and end of pictures are padding too", _pad(_padding_around_pictures)),
    Mutant(PER_LAYER, "E2B", "padding everywhere", _pad(_everywhere_padding)),
    Mutant(PER_LAYER, "E2B", "padding has id 3", facts("embed", padding_id=3)),
    Mutant(PER_LAYER, "E2B", "context of the embeddings without pictures", _context_before_pictures),
    # Norms hide these scales, unless what they norm is faint.
    Mutant(PER_LAYER, "E2B, faint", "context not divided by sqrt(D)", without(r"decoder/.*scale_projection")),
    Mutant(PER_LAYER, "E2B", "context without its norm", without(r"decoder/.*per_layer_projection_norm")),
    Mutant(PER_LAYER, "E2B", "embedding not times sqrt(P)", without("embed/scale_per_layer")),
    Mutant(PER_LAYER, "E2B, faint", "sum not divided by sqrt(2)", without(r"decoder/.*scale_sum")),
    Mutant(
        *(PER_LAYER, "E2B", "of the layer before"),
        then("embed/scale_per_layer", lambda graph, value: graph.op("Gather", value, _shifted(graph), axis=-1)),
    ),
]

# --- 0.9


def _without_the_residual(patch: Any) -> None:
    """x + scalar * (what the layer adds) instead of scalar * (x + what the layer adds)."""
    stream: list[Any] = []  # what came into the layer

    def enter(graph: Any, inputs: list[Any], build: Any) -> Any:
        stream[:] = [inputs[0]]
        return build()

    def take(graph: Any, inputs: list[Any], build: Any) -> Any:
        rows = build()
        if inputs[0] is stream[0]:
            stream[:] = rows
        return rows

    def leave(graph: Any, inputs: list[Any], build: Any) -> Any:
        x, scalar = inputs
        return graph.op("Add", stream[0], graph.op("Mul", graph.op("Sub", x, stream[0]), scalar))

    for name, wrong in (("input_norm", enter), ("take_rows", take), ("layer_scalar", leave)):
        around(rf"decoder/layers\.\d+/{name}", wrong)(patch)


def _before_per_layer_inputs(patch: Any) -> None:
    """The stream is scaled before per-layer inputs are added to it."""
    scalars = replaced(
        decoder,
        "_add_per_layer",
        lambda right: (
            lambda graph, source, text, layer, x, extra: right(
                graph,
                source,
                text,
                layer,
                graph.op("Mul", x, decoder._vector(graph, source, f"{decoder.layer_name(layer)}.layer_scalar", 1)),
                extra,
            )
        ),
    )
    together(scalars, without(r"decoder/layers\.\d+/layer_scalar"))(patch)


SCALAR = "0.9 layer scalar"
_ONE = weights(r".*\.layer_scalar", np.ones_like)
SCALAR_MUTANTS = [
    *(Mutant(SCALAR, layout, "missing", _ONE) for layout in ("E2B", "31B", "26B-A4B")),
    *(Mutant(SCALAR, layout, "not for the residual", _without_the_residual) for layout in ("E2B", "31B", "26B-A4B")),
    Mutant(SCALAR, "E2B", "before per-layer inputs", _before_per_layer_inputs),
    Mutant(SCALAR, "E2B", "missing where layers share", without(r"decoder/layers\.[3-6]/layer_scalar")),
]

MUTANTS = [*SHARING_MUTANTS, *ROWS_MUTANTS, *PER_LAYER_MUTANTS, *SCALAR_MUTANTS]
