"""Builds one ONNX graph node by node, with its large weights in a file shared by all graphs of a bundle.

`GraphBuilder` knows ONNX and nothing about models; `WeightsFile` knows bytes and nothing about graphs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..engine.errors import ExportError
from .plan import Plan

__all__ = [
    "BOOL",
    "DOUBLE",
    "FLOAT",
    "FLOAT16",
    "INT8",
    "INT32",
    "INT64",
    "IR_VERSION",
    "MICROSOFT",
    "UINT8",
    "GraphBuilder",
    "WeightsFile",
]

FLOAT, FLOAT16, BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BOOL
DOUBLE = ir.DataType.DOUBLE
INT8, INT32, INT64, UINT8 = ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8
MICROSOFT = "com.microsoft"

# 20 is the first operator set with Gelu(approximate="tanh"); IR version 10 is what onnxruntime 1.32 reads everywhere.
_OPSET, IR_VERSION = 20, 10
# Windows maps files at multiples of 64 KiB, Linux at pages: a tensor at such an offset is mapped, not copied.
ALIGNMENT = 64 << 10
# Smaller tensors are stored inside the graph file: an aligned slot each would cost more than it saves.
INLINE_BYTES = 16 << 10


class WeightsFile:
    """The one data file of a bundle. A tensor is written once per key, whatever number of graphs use it."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._tensors: dict[str, ir.ExternalTensor] = {}
        self.small: dict[str, np.ndarray] = {}  # by key: tensors that graphs store inside their own files
        self.recorded: dict[str, float] = {}  # by key: the largest row or entry of what was stored

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._hash.hexdigest()

    def put(
        self, key: str, shape: Sequence[int], dtype: ir.DataType, chunks: Iterable[np.ndarray]
    ) -> ir.ExternalTensor:
        """Append the concatenation of `chunks` (leading axis) as one tensor; chunks of a known key are not read."""
        if key in self._tensors:
            return self._tensors[key]
        self._write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for chunk in chunks:
            self._write(np.ascontiguousarray(chunk).data)
        length = self._file.tell() - offset
        expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if length != expected:
            raise ExportError(f"weight {key!r} has {length} bytes, its shape {list(shape)} needs {expected}")
        tensor = ir.ExternalTensor(
            self.path.name, int(offset), int(length), dtype, shape=ir.Shape(shape), name=key, base_dir=self.path.parent
        )
        self._tensors[key] = tensor
        return tensor

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)


class GraphBuilder:
    """One graph under construction. Operators are methods by way of `op`; names follow the scopes they are made in."""

    def __init__(self, name: str, weights: WeightsFile, plan: Plan | None = None):
        self.name = name
        self.plan = plan or Plan()
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": _OPSET, MICROSOFT: 1}, name=name)
        self._nodes = self._graph  # where new nodes go: the graph itself, or the body of a loop
        self._weights = weights
        self._scopes: list[str] = []
        self._names: set[str] = set()
        self._halves: dict[ir.Value, ir.Value] = {}  # float32 value -> its float16 version
        self._bounds: dict[ir.Value, float] = {}

    @property
    def graph(self) -> ir.Graph:
        """The graph as far as it is built."""
        return self._graph

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of everything made inside with `name`."""
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self._graph.outputs.append(value)

    def op(
        self,
        operator: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output and return that output."""
        return self.ops(operator, inputs, 1, domain=domain, name=name, **attributes)[0]

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
        """Add a node and return its outputs; `outputs` is their number, or which of the optional ones are wanted."""
        wanted = [True] * outputs if isinstance(outputs, int) else outputs
        path = self._unique(name or operator)
        values = [
            ir.Value(name=(path if not index else f"{path}:{index}") if want else "")
            for index, want in enumerate(wanted)
        ]
        node = ir.Node(
            domain,
            operator,
            inputs,
            ir.convenience.convert_attributes(attributes),
            outputs=values,
            name=path,
        )
        self._nodes.append(node)
        return values

    def loop(
        self,
        count: ir.Value,
        carried: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
        name: str,
    ) -> list[ir.Value]:
        """Run `body(index, values) -> values` `count` times (int64 []), from `carried` on; returns the last values.

        Nodes that `body` makes form a nested graph, which may read everything made before; its weights and constants
        belong to the outer graph. The values it returns must be made by it.
        """
        with self.scope(name):
            index = ir.Value(name=self._unique("index"), shape=ir.Shape([]), type=ir.TensorType(INT64))
            going = ir.Value(name=self._unique("going"), shape=ir.Shape([]), type=ir.TensorType(BOOL))
            values = [ir.Value(name=self._unique("carried")) for _ in carried]
        inputs = [index, going, *values]
        nested = self._body(name, inputs, lambda: [self.op("Identity", going), *body(index, values)])
        return self.ops("Loop", [count, None, *carried], len(carried), name=name, body=nested)

    def branch(
        self,
        condition: ir.Value,
        then: Callable[[], Sequence[ir.Value]],
        otherwise: Callable[[], Sequence[ir.Value]],
        name: str,
    ) -> list[ir.Value]:
        """The values of `then()` if `condition` (bool, one element) holds, else those of `otherwise()`, as many.

        For what either makes the same holds as for the body of a loop.
        """
        bodies = [self._body(f"{name}/{kind}", [], make) for kind, make in (("then", then), ("otherwise", otherwise))]
        count = len(bodies[0].outputs)
        return self.ops("If", [condition], count, name=name, then_branch=bodies[0], else_branch=bodies[1])

    def _body(self, scope: str, inputs: Sequence[ir.Value], make: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        """A nested graph of the nodes that `make` makes, which returns its outputs."""
        outer, halves = self._nodes, dict(self._halves)
        with self.scope(scope):
            self._nodes = ir.Graph(inputs, [], nodes=[], name=self._unique("body"))
            try:
                self._nodes.outputs.extend(make())
            finally:
                # A float16 version made inside cannot be read outside.
                inner, self._nodes, self._halves = self._nodes, outer, halves
        return inner

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """A small initializer stored inside the graph file."""
        return self._initializer(self._unique(name), ir.tensor(np.asarray(array, order="C"), name=name))

    def weight(
        self,
        key: str,
        shape: Sequence[int],
        read: Callable[[], Iterable[np.ndarray]],
        dtype: ir.DataType = FLOAT,
    ) -> ir.Value:
        """An initializer from the weights file; `read` is called only if no graph has stored `key` before.

        Tensors under INLINE_BYTES are stored inside the graph files instead.
        """
        known = self._graph.initializers.get(key)
        if known is not None:
            return known
        if len(shape) == 1:
            read = self._recording(key, read)
        if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize < INLINE_BYTES:
            if key not in self._weights.small:
                array = np.concatenate(list(read()))
                if array.size != np.prod(shape, dtype=np.int64):
                    raise ExportError(f"weight {key!r} has shape {list(array.shape)}, the graph needs {list(shape)}")
                self._weights.small[key] = np.asarray(array.reshape(shape), order="C")
            return self._initializer(key, ir.tensor(self._weights.small[key], name=key))
        return self._initializer(key, self._weights.put(key, shape, dtype, read()))

    def _recording(self, key: str, read: Callable[[], Iterable[np.ndarray]]) -> Callable[[], Iterable[np.ndarray]]:
        """`read`, noting the largest entry of a vector: norms bound their outputs by it."""

        def reading() -> Iterator[np.ndarray]:
            for chunk in read():
                self.record(key, max(self.recorded(key), float(np.abs(chunk).max(initial=0.0))))
                yield chunk

        return reading

    def alias(self, value: ir.Value, key: str, shape: Sequence[int]) -> ir.Value:
        """The stored initializer `value` once more with another shape (one -1 allowed): the same bytes, no copy."""
        known = self._graph.initializers.get(key)
        if known is not None:
            return known
        tensor = value.const_value
        assert tensor is not None
        size, given = int(np.prod(tensor.shape.numpy())), int(np.prod([side for side in shape if side != -1]))
        full = [size // given if side == -1 else side for side in shape]
        if not isinstance(tensor, ir.ExternalTensor):
            return self._initializer(key, ir.tensor(tensor.numpy().reshape(full), name=key))
        same = ir.ExternalTensor(
            *(tensor.location, tensor.offset, tensor.length, tensor.dtype),
            shape=ir.Shape(full),
            name=key,
            base_dir=tensor.base_dir,
        )
        return self._initializer(key, same)

    # --- what float16 products need to know

    def record(self, key: str, largest: float) -> None:
        """Remember the largest row (of a matrix) or entry (of a vector) stored under `key`."""
        self._weights.recorded[key] = largest

    def recorded(self, key: str) -> float:
        return self._weights.recorded.get(key, 0.0)

    def is_half(self, value: ir.Value) -> bool:
        return value.type is not None and value.dtype == FLOAT16

    def mark_half(self, value: ir.Value) -> ir.Value:
        """Say that an operator gave float16; returns `value`."""
        value.type = ir.TensorType(FLOAT16)
        return value

    def half(self, value: ir.Value) -> ir.Value:
        """`value` in float16; cast once, however many products read it."""
        if self.is_half(value):
            return value
        if value not in self._halves:
            self._halves[value] = self.mark_half(self.op("Cast", value, to=int(FLOAT16)))
        return self._halves[value]

    def bound(self, value: ir.Value) -> float | None:
        """An upper bound of the Euclidean length of the rows of `value`, if one is known."""
        return self._bounds.get(value)

    def set_bound(self, value: ir.Value, bound: float | None) -> ir.Value:
        if bound is not None:
            self._bounds[value] = bound
        return value

    def save(self, path: Path, bundle_name: str) -> None:
        """Write the graph; a stray file can be traced through the bundle name in its metadata."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():  # a table of which this graph reads only the alias
                del self._graph.initializers[name]
        model = ir.Model(
            self._graph, ir_version=IR_VERSION, producer_name="siglance", metadata_props={"bundle": bundle_name}
        )
        ir.save(model, path)

    def summary(self) -> dict[str, Any]:
        """Number of nodes and bytes of initializers, in all and by dtype, for the export report.

        Products of blocks also say how they round what they multiply: MatMulNBits' accuracy_level.
        """
        dtypes: dict[str, int] = {}
        for value in self._graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            name = tensor.dtype.name.lower()
            dtypes[name] = dtypes.get(name, 0) + tensor.nbytes
        nodes = list(ir.traversal.RecursiveGraphIterator(self._graph))
        levels = {node.attributes["accuracy_level"].as_int() for node in nodes if node.op_type == "MatMulNBits"}
        summary = {"nodes": len(nodes), "weight_bytes": sum(dtypes.values()), "dtypes": dtypes}
        return summary | ({"accuracy_levels": sorted(levels)} if levels else {})

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        path = "/".join([*self._scopes, name])
        candidate, count = path, 1
        while candidate in self._names:
            count += 1
            candidate = f"{path}.{count}"
        self._names.add(candidate)
        return candidate
