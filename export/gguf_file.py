"""The container of a GGUF file: metadata, and where each tensor lies. Format: ggml's docs/gguf.md, versions 2 and 3.

The file is untrusted: every count and length is compared with the bytes that are left before anything of that size is
made, and all tensors are inside the file before one is read. The types of blocks and their dequantisation come from the
`gguf` package. Its reader is not used: it follows the counts of a damaged file without end, and makes an array object
for every string (8 s and 740 MB for a vocabulary of 262,144 tokens, against 0.3 s here).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..engine.errors import ExportError
from .checkpoint import refuse_pointer

__all__ = ["GgufFile", "Tensor"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SLICE_BYTES = 32 << 20  # of float32: rows of a large tensor are read in slices of about this size
_MAX_DIMENSIONS = 4
_SCALARS = {
    **{0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4")},
    **{5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8")},
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: `shape` with rows first, as in numpy; `row_bytes` of one row in the type `kind`."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows; a vector is one row."""
        return prod(self.shape[:-1])


class GgufFile:
    """The header of a GGUF file, read once; tensors are read when asked for. Raises ExportError naming the file.

    `metadata` maps keys to Python values: numbers, strings, numpy arrays, and lists of strings.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                if file.read(4) != MAGIC:
                    refuse_pointer(path)
                    raise ExportError(f"{path} is not a GGUF file")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    header = _Header(path, mapped)
                    self.metadata = header.metadata
                    self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in header.tensors()}
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror or error}") from None
        for tensor in self.tensors.values():
            end = tensor.offset + tensor.rows * tensor.row_bytes
            if end > size:
                raise ExportError(
                    f"{path} is cut short: tensor {tensor.name!r} ends at byte {end:,}, the file has {size:,}"
                )

    def read_rows(self, name: str) -> Iterator[np.ndarray]:
        """Tensor `name` as float32 [rows, columns], in consecutive slices of rows; a vector is one row."""
        tensor = self.tensors[name]
        for raw in self.read_raw(name):
            with np.errstate(over="ignore", invalid="ignore"):  # damaged scales: the self-test finds what they give
                values = dequantize(raw, tensor.kind)
            yield np.asarray(values, np.float32).reshape(len(raw), tensor.shape[-1])

    def read_raw(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of tensor `name` as they stand: uint8 [rows, row bytes], in consecutive slices of rows."""
        tensor = self.tensors[name]
        step = max(1, _SLICE_BYTES // (4 * tensor.shape[-1]))
        for start in range(0, tensor.rows, step):
            count = min(step, tensor.rows - start) * tensor.row_bytes
            offset = tensor.offset + start * tensor.row_bytes
            try:
                # A mapping would keep every page that it touched resident.
                raw = np.fromfile(self.path, np.uint8, count, offset=offset)
            except OSError as error:
                raise ExportError(f"{self.path} cannot be read: {error.strerror or error}") from None
            if raw.size != count:
                raise ExportError(f"{self.path} is cut short: tensor {name!r} is not complete")
            yield raw.reshape(-1, tensor.row_bytes)


class _Header:
    """Walks over the header and never reads past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path = path
        self._data = data
        self._at = len(MAGIC)
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise ExportError(f"{path} is a big-endian GGUF file, which is not supported")
        if version not in VERSIONS:
            raise ExportError(f"{path} has GGUF version {version} (supported: {', '.join(map(str, VERSIONS))})")
        # The least bytes of a tensor are its name's length, one dimension, type and offset; of a key, length and value.
        self._tensor_count = self._count("tensors", 8 + 4 + 8 + 4 + 8)
        key_count = self._count("metadata keys", 8 + 4 + 1)
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise ExportError(f"{path}: metadata key {key!r} appears twice")
            self.metadata[key] = self._value(key, self._number("<I"))

    def tensors(self) -> Iterator[Tensor]:
        """Descriptions of all tensors, in the order of the file."""
        found = [self._tensor() for _ in range(self._tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise ExportError(f"{self._path}: general.alignment = {alignment!r} is not a power of two from 8 on")
        start = -(-self._at // alignment) * alignment
        if len({name for name, *_ in found}) != len(found):
            raise ExportError(f"{self._path} has two tensors of one name")
        for name, shape, kind, offset in found:
            yield Tensor(name, shape, kind, start + offset, self._row_bytes(name, shape, kind))

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string("a tensor name")
        dimensions = self._number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ExportError(f"{self._path}: tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))  # ggml names columns first
        if 0 in shape:
            raise ExportError(f"{self._path}: tensor {name!r} has shape {list(shape)}")
        number = self._number("<I")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ExportError(f"{self._path}: tensor {name!r} has type {number}, which is not known") from None
        if not _can_dequantize(kind):
            raise ExportError(f"{self._path}: tensor {name!r} has type {kind.name}, which is not supported")
        return name, shape, kind, self._number("<Q")

    def _row_bytes(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ExportError(
                f"{self._path}: tensor {name!r} has rows of {shape[-1]}, {kind.name} needs a multiple of {block}"
            )
        return shape[-1] // block * size

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._array(key, _SCALARS[kind], 1)[0].item()
        if kind != _ARRAY:
            raise ExportError(f"{self._path}: metadata {key!r} has type {kind}, which is not known")
        item = self._number("<I")
        if item == _STRING:
            return [self._string(key) for _ in range(self._count(key, 8))]
        if item not in _SCALARS:
            raise ExportError(f"{self._path}: metadata {key!r} is an array of type {item}, which is not supported")
        return self._array(key, _SCALARS[item], self._count(key, _SCALARS[item].itemsize))

    def _array(self, what: str, dtype: np.dtype[Any], count: int) -> np.ndarray:
        return np.frombuffer(self._take(count * dtype.itemsize, what), dtype)

    def _string(self, what: str) -> str:
        data = self._take(self._number("<Q"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ExportError(f"{self._path}: {what} is not UTF-8: {data[:40]!r}") from None

    def _count(self, what: str, least_bytes: int) -> int:
        """A number of things of at least so many bytes each."""
        count = self._number("<Q")
        if count * least_bytes > len(self._data) - self._at:
            raise ExportError(f"{self._path} is cut short or damaged: it has no room for {count:,} {what}")
        return count

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form), "its header"))[0]

    def _take(self, count: int, what: str) -> bytes:
        if count > len(self._data) - self._at:
            raise ExportError(f"{self._path} is cut short or damaged: it ends inside {what}")
        self._at += count
        return self._data[self._at - count : self._at]


@cache
def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
