"""Runs a float32 graph that was never written: piece by piece, with matrices read when their piece needs them.

All sequences pass through a piece of the graph before the next piece is made, so that memory holds the matrices of one
piece and what crosses from it into the rest, whatever the size of the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ..engine.graph import Device, Graph
from .builder import DOUBLE, FLOAT, INT64, IR_VERSION, GraphBuilder, WeightsFile
from .plan import Plan, Span, StateScales, Storage

__all__ = ["LazyGraph", "Piecewise", "Survey", "Values", "place_rows"]

PIECE_BYTES = 256 << 20  # of matrices that are read for one piece, unless a single product needs more

# What state inputs are made from.
_ALWAYS = frozenset({"total_sequence_length"})

Values = dict[str, np.ndarray]  # the values of one sequence, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey(Plan):
    """A plan in float32 that notes which matrices were asked for, key -> [rows, columns], and the layers whose states
    could have 8 bits."""

    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen_states: set[int] = field(default_factory=set)

    def spans(self, graph: str, key: str, shape: tuple[int, int]) -> tuple[Span, ...]:
        self.seen[key] = shape
        return (Span(0, shape[0], Storage(32)),)

    def state_scales(self, layer: int) -> StateScales | None:
        self.seen_states.add(layer)
        return None


class LazyGraph(GraphBuilder):
    """A graph in float32 whose matrices stay where they are until somebody asks for one by its name.

    With `ids`, tables that the graph looks rows up in have the rows `ids` only, as the weights "KEY.some"; looking up
    another row fails. Few of a large vocabulary are in any text.
    """

    def __init__(self, name: str, ids: np.ndarray | None = None):
        self.survey = Survey()
        super().__init__(name, cast(WeightsFile, None), self.survey)  # nothing is written
        self._ids = ids
        self._readers: dict[str, tuple[tuple[int, ...], Callable[[], Iterable[np.ndarray]]]] = {}

    def is_weight(self, value: ir.Value | None) -> bool:
        """Whether `value` is a matrix that is read on demand."""
        return value is not None and value.name in self._readers

    def read(self, key: str) -> np.ndarray:
        """The whole weight."""
        parts = list(self.read_rows(key))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_rows(self, key: str) -> Iterator[np.ndarray]:
        """The weight in slices of rows."""
        shape, read = self._readers[key]
        for rows in read():
            yield rows.reshape(-1, *shape[1:])

    def shape(self, key: str) -> tuple[int, ...]:
        return self._readers[key][0]

    def weight(
        self,
        key: str,
        shape: Sequence[int],
        read: Callable[[], Iterable[np.ndarray]],
        dtype: ir.DataType = FLOAT,
    ) -> ir.Value:
        known = self._graph.initializers.get(key)
        if known is not None:
            return known
        if len(shape) == 1 or 0 in shape or dtype == DOUBLE:
            return self._initializer(key, ir.tensor(np.concatenate(list(read())).reshape(shape), name=key))
        self._readers[key] = (tuple(shape), read)
        # Never asked for its numbers: a piece takes the weight as an input.
        return self._initializer(
            key, ir.LazyTensor(lambda: ir.tensor(self.read(key)), dtype, ir.Shape(shape), name=key)
        )

    def ops(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        outputs: int | Sequence[bool],
        *,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        if operator == "Gather" and self._ids is not None and self.is_weight(inputs[0]):
            inputs = self._some_rows(inputs[0], inputs[1])
        return super().ops(operator, inputs, outputs, domain=domain, name=name, **attributes)

    def _some_rows(self, table: ir.Value | None, ids: ir.Value | None) -> list[ir.Value]:
        """A table with the rows of `self._ids`, and where `ids` are in it."""
        assert table is not None
        assert table.name is not None
        assert self._ids is not None
        key, wanted = table.name, self._ids[self._ids < self.shape(table.name)[0]]
        rows, width = self.shape(key)
        places = np.full(rows, len(wanted), np.int64)  # beyond the end: an error
        places[wanted] = np.arange(len(wanted))
        where = self.weight(f"places.{rows}", (rows,), lambda: [places], INT64)
        some = self.weight(f"{key}.some", (len(wanted), width), lambda: place_rows(self.read_rows(key), wanted))
        return [some, *super().ops("Gather", [where, ids], 1, name="place")]

    def record(self, key: str, largest: float) -> None:
        """Only float16 products ask for it."""

    def recorded(self, key: str) -> float:
        return 0.0


def place_rows(parts: Iterable[np.ndarray], wanted: np.ndarray) -> Iterator[np.ndarray]:
    """The rows `wanted`, ascending, of a matrix given in slices of rows."""
    start = 0
    for part in parts:
        inside = wanted[(wanted >= start) & (wanted < start + len(part))]
        if len(inside):
            yield part[inside - start]
        start += len(part)


class Piecewise:
    """The nodes of a graph, run up to one place after another over `sequences`.

    A sequence is a dictionary of values: at first the graph's inputs, then whatever the nodes still to come read; it is
    changed in place. Sequences may be added and their values replaced between two calls of `run`. State inputs
    ("past.*") are made here: a sequence is run at once, so its state is empty.
    """

    def __init__(self, graph: LazyGraph, sequences: list[Values]):
        self.nodes = list(graph.graph)
        self.sequences = sequences
        self.at = 0  # the next node
        self._builder = graph
        self._outputs = {value.name for value in graph.graph.outputs if not (value.name or "").startswith("present.")}

    def run(
        self,
        stop: int,
        watch: Sequence[str] = (),
        seen: Callable[[int, Values], None] = lambda index, values: None,
        replaced: Callable[[int], Mapping[str, np.ndarray]] = lambda index: {},
    ) -> None:
        """Run the nodes up to `stop` over all sequences.

        `seen` is called with the index of each sequence and its values of the names in `watch`, made or read by these
        nodes; afterwards they are forgotten unless a later node reads them. `replaced` gives other weights, by name,
        for the sequence of an index.
        """
        nodes = self.nodes[self.at : stop]
        later = _read_by(self.nodes[stop:]) | self._outputs
        made = {value.name for node in nodes for value in node.outputs if value.name}
        outputs = sorted(name for name in made if name in later or name in watch)
        run = self._runner(nodes, outputs) if outputs else None
        for index, values in enumerate(self.sequences):
            if run is not None:
                values |= run(values, replaced(index))
            if watch:
                seen(index, {name: values[name] for name in watch})
            # At once: between two pieces there are only the values of all sequences that cross.
            for name in values.keys() - later - _ALWAYS:
                del values[name]
        self.at = stop

    def advance(self, stop: int | None = None) -> None:
        """Run the nodes up to `stop`, or all that are left, in pieces of about `PIECE_BYTES` of matrices."""
        stop, size = len(self.nodes) if stop is None else stop, 0
        for index in range(self.at, stop):
            for value in self.nodes[index].inputs:
                if value is not None and value.name and self._builder.is_weight(value):
                    size += 4 * int(np.prod(self._builder.shape(value.name), dtype=np.int64))
            if size > PIECE_BYTES:
                self.run(index)
                size = 0
        self.run(stop)

    def _runner(
        self, nodes: Sequence[ir.Node], outputs: Sequence[str]
    ) -> Callable[[Values, Mapping[str, np.ndarray]], Values]:
        """A function (values of a sequence, weights to replace) -> `outputs` of these nodes."""
        needed = sorted(_read_by(nodes))
        known = self._builder.graph.initializers
        stored = {name: self._builder.read(name) for name in needed if self._builder.is_weight(known.get(name))}
        varying = [name for name in needed if name not in known]
        session: Graph | None = None

        def run(values: Values, replaced: Mapping[str, np.ndarray]) -> Values:
            nonlocal session
            feeds = self._feeds(varying, values) | stored
            feeds |= {name: weight for name, weight in replaced.items() if name in stored}
            session = session or self._session(nodes, list(feeds), outputs, feeds)
            return session.run(feeds)

        return run

    def _feeds(self, names: Sequence[str], values: Values) -> Values:
        inputs = {value.name: value for value in self._builder.graph.inputs}
        feeds = {}
        for name in names:
            if name.startswith("past."):
                shape = inputs[name].shape
                assert shape is not None
                length = int(values["total_sequence_length"])
                feeds[name] = np.zeros([size if isinstance(size, int) else length for size in shape], np.float32)
            else:
                feeds[name] = values[name]
        return feeds

    def _session(
        self, nodes: Sequence[ir.Node], needed: Sequence[str], outputs: Sequence[str], example: Values
    ) -> Graph:
        """A session of these nodes, which takes what they need from outside, weights included, as inputs."""
        values = _values(nodes)
        for name in needed:
            # Operators were chained without saying what lies between them; the array itself tells.
            values[name].type = ir.TensorType(ir.DataType.from_numpy(example[name].dtype))
        initializers = self._builder.graph.initializers
        piece = ir.GraphView(
            [values[name] for name in needed],
            [values[name] for name in outputs],
            nodes=nodes,
            initializers=[value for name, value in initializers.items() if name in values and name not in needed],
            opset_imports=self._builder.graph.opset_imports,
            name="piece",
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "piece.onnx"
            ir.save(ir.Model(cast(ir.Graph, piece), ir_version=IR_VERSION), path)
            return Graph(path, Device("cpu"))


def _values(nodes: Iterable[ir.Node]) -> dict[str, ir.Value]:
    """All values that nodes, and the nodes nested in them, read or make, by name."""
    found: dict[str, ir.Value] = {}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.name:
                found[value.name] = value
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                body = attribute.as_graph()
                own = {value.name for value in body.inputs}
                found |= {name: value for name, value in _values(body).items() if name not in own}
    return found


def _read_by(nodes: Iterable[ir.Node]) -> set[str]:
    """Names of the values that nodes take from outside of themselves."""
    nodes = list(nodes)
    made = {value.name for node in nodes for value in _made_by(node)}
    return set(_values(nodes)) - made


def _made_by(node: ir.Node) -> list[ir.Value]:
    nested = [
        value
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for inner in attribute.as_graph()
        for value in _made_by(inner)
    ]
    return [*node.outputs, *nested]
