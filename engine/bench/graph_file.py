"""The structure of an ONNX file: nodes, shapes of weights, declared inputs. Weights themselves are not read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BundleError
from ..protobuf import fields, numbers, signed

__all__ = ["GraphFile", "Node", "Weight", "read_graph"]

# onnx.proto, TensorProto.DataType -> bits of one element
_BITS = {
    **{1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16},
    **{17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4},
}
_INTEGERS = frozenset({6, 7})  # int32, int64: the types of shapes, axes and indices


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor: its shape and size; `values` are the numbers of a small integer tensor in the file, else ()."""

    name: str
    shape: tuple[int, ...]
    bits: int  # of an element
    is_integer: bool
    values: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return -(-self.count * self.bits // 8)


@dataclass(frozen=True, slots=True)
class Node:
    """An operator. `attributes` are its integers; `bodies` its nested graphs (Loop, If), by the attribute's name."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int]
    bodies: dict[str, GraphFile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GraphFile:
    """Nodes in order of execution; `inputs` are the shapes that the graph declares, with names for what varies.

    `outputs` are names.
    """

    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    inputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    input_bits: dict[str, int] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def all_nodes(self) -> Iterator[Node]:
        """The nodes, each before those of its bodies."""
        for node in self.nodes:
            yield node
            for body in node.bodies.values():
                yield from body.all_nodes()


def read_graph(path: Path) -> GraphFile:
    """Read a graph file. Raises BundleError for a file that is no ONNX graph."""
    try:
        for number, value in fields(memoryview(path.read_bytes())):
            if number == 7 and not isinstance(value, int):
                return _graph(value)
        raise ValueError("no graph in it")
    except (ValueError, KeyError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path.name} cannot be read as an ONNX graph: {error}") from None


def _graph(data: memoryview) -> GraphFile:
    graph = GraphFile()
    for number, value in _messages(data):
        if number == 1:
            graph.nodes.append(_node(value))
        elif number == 5:
            weight = _weight(value)
            graph.weights[weight.name] = weight
        elif number == 11:
            name, bits, shape = _declared(value)
            graph.inputs[name], graph.input_bits[name] = shape, bits
        elif number == 12:
            graph.outputs.append(_declared(value)[0])
    return graph


def _node(data: memoryview) -> Node:
    inputs, outputs, names = [], [], {3: "", 4: ""}
    attributes: dict[str, int] = {}
    bodies: dict[str, GraphFile] = {}
    for number, value in _messages(data):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number in names:
            names[number] = _text(value)
        elif number == 5:
            _read_attribute(value, attributes, bodies)
    return Node(names[3], names[4], tuple(inputs), tuple(outputs), attributes, bodies)


def _read_attribute(data: memoryview, attributes: dict[str, int], bodies: dict[str, GraphFile]) -> None:
    name = ""
    for number, value in fields(data):
        if number == 1 and not isinstance(value, int):
            name = _text(value)
        elif number == 3 and isinstance(value, int):
            attributes[name] = signed(value)
        elif number == 6 and not isinstance(value, int):
            bodies[name] = _graph(value)


def _weight(data: memoryview) -> Weight:
    shape: list[int] = []
    name, kind = "", 0
    raw: memoryview | None = None
    values: list[int] = []
    for number, value in fields(data):
        if number == 1:
            shape += numbers(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number in (5, 7):  # int32_data, int64_data
            values += numbers(value)
        elif isinstance(value, memoryview):
            if number == 8:
                name = _text(value)
            elif number == 9:
                raw = value
    if raw is not None and kind in _INTEGERS:
        size = _BITS[kind] // 8
        values = [int.from_bytes(raw[at : at + size], "little", signed=True) for at in range(0, len(raw), size)]
    return Weight(name, tuple(shape), _BITS[kind], kind in _INTEGERS, tuple(values))


def _declared(data: memoryview) -> tuple[str, int, tuple[int | str, ...]]:
    """ValueInfoProto: name, bits of an element, shape."""
    name, bits = "", 0
    shape: list[int | str] = []
    for number, value in _messages(data):
        if number == 1:
            name = _text(value)
            continue
        for kind, tensor in _messages(value) if number == 2 else ():
            for part, content in fields(tensor) if kind == 1 else ():
                if part == 1 and isinstance(content, int):
                    bits = _BITS[content]
                elif part == 2 and not isinstance(content, int):
                    shape += [_dimension(size) for at, size in _messages(content) if at == 1]
    return name, bits, tuple(shape)


def _dimension(data: memoryview) -> int | str:
    for number, value in fields(data):
        if number == 1 and isinstance(value, int):
            return value
        if number == 2 and not isinstance(value, int):
            return _text(value)
    return "?"


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that have a length."""
    return ((number, value) for number, value in fields(data) if not isinstance(value, int))


def _text(value: memoryview) -> str:
    return bytes(value).decode()
