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

__all__ = ["FLOAT", "INT32", "INT64", "MICROSOFT", "UINT8", "GraphBuilder", "WeightsFile"]

FLOAT, INT32, INT64, UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8
MICROSOFT = "com.microsoft"

# 20 is the first operator set with Gelu(approximate="tanh"); IR version 10 is what onnxruntime 1.32 reads everywhere.
_OPSET, _IR_VERSION = 20, 10
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

    def __init__(self, name: str, weights: WeightsFile):
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": _OPSET, MICROSOFT: 1}, name=name)
        self._weights = weights
        self._scopes: list[str] = []
        self._names: set[str] = set()

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
        self._graph.append(node)
        return values

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

        Tensors under INLINE_BYTES are stored inside the graph file instead.
        """
        known = self._graph.initializers.get(key)
        if known is not None:
            return known
        if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize < INLINE_BYTES:
            array = np.concatenate(list(read()))
            if array.shape != tuple(shape):
                raise ExportError(f"weight {key!r} has shape {list(array.shape)}, the graph needs {list(shape)}")
            return self._initializer(key, ir.tensor(np.asarray(array, order="C"), name=key))
        return self._initializer(key, self._weights.put(key, shape, dtype, read()))

    def save(self, path: Path, bundle_name: str) -> None:
        """Write the graph; a stray file can be traced through the bundle name in its metadata."""
        model = ir.Model(
            self._graph, ir_version=_IR_VERSION, producer_name="siglance", metadata_props={"bundle": bundle_name}
        )
        ir.save(model, path)

    def summary(self) -> dict[str, int]:
        """Number of nodes and bytes of initializers, for the export report."""
        tensors = [value.const_value for value in self._graph.initializers.values()]
        return {
            "nodes": len(self._graph),
            "weight_bytes": sum(tensor.nbytes for tensor in tensors if tensor is not None),
        }

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
