"""How the matrices of a bundle are stored: the one place that turns `--precision` and `--target` into formats.

A family says which matrices there are, `matrices.py` puts them into graphs, and a `Plan` decides between float32,
float16 and blocks of 8 or 4 bits: by a rule, or matrix by matrix from what calibration has measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..engine.errors import ExportError
from ..kernels.quantize import Blocks

__all__ = ["PRECISIONS", "TARGETS", "Plan", "Span", "StateScales", "Storage", "StoredBlocks", "plan_for"]

PRECISIONS = ("auto", "fp32", "fp16", "int8", "int4", "keep")
TARGETS = ("cpu", "cuda")

# Columns that share a scale, best first; MatMulNBits reads these sizes. Scales are float32 on the CPU, so a block of 32
# costs one bit a weight: with 8 bits that is not worth it, with 4 bits larger blocks lose too much unless measured.
_BLOCKS = {8: (128, 64, 32, 16), 4: (32, 16)}
# Larger blocks of 4 bits that calibration may choose. On GPUs scales are float16 and the fast kernels want 32.
_LARGER = {"cpu": (128, 64), "cuda": ()}


@dataclass(frozen=True, slots=True)
class Storage:
    """The format of one matrix: 32 or 16 bits (float), or 8 or 4 bits in blocks of `block` columns."""

    bits: int
    block: int = 0

    def __str__(self) -> str:
        return f"int{self.bits} in blocks of {self.block}" if self.block else f"float{self.bits}"

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix of this shape, with scales in float32."""
        size = shape[0] * shape[1]
        return size * self.bits // 8 + (4 * size // self.block if self.block else 0)


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A quantised matrix in two files of the temporary folder of an export."""

    path: Path  # without the endings .codes.npy and .scales.npy
    storage: Storage

    @classmethod
    def write(cls, path: Path, storage: Storage, shape: tuple[int, int], parts: Iterable[Blocks]) -> StoredBlocks:
        """Store a matrix of `shape` that comes in slices of rows."""
        widths = {"codes": ("|u1", shape[1] * storage.bits // 8), "scales": ("<f4", shape[1] // storage.block)}
        with contextlib.ExitStack() as stack:
            files = {}
            for part, (dtype, width) in widths.items():
                # Written, not mapped: a disk without space is an error then, and not the end of the process.
                files[part] = file = stack.enter_context(open(f"{path}.{part}.npy", "xb"))
                header = {"descr": dtype, "fortran_order": False, "shape": (shape[0], width)}
                np.lib.format.write_array_header_1_0(file, header)
            for blocks in parts:
                for part, file in files.items():
                    file.write(np.ascontiguousarray(getattr(blocks, part)).data)
        return cls(path, storage)

    def load(self) -> Blocks:
        """The matrix, mapped from the files."""
        codes, scales = (np.load(f"{self.path}.{part}.npy", mmap_mode="r") for part in ("codes", "scales"))
        return Blocks(self.storage.bits, self.storage.block, codes, scales)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start` to `stop` of a matrix, their format, and their blocks if calibration has made them."""

    start: int
    stop: int
    storage: Storage
    blocks: StoredBlocks | None = None


@dataclass(frozen=True, slots=True)
class StateScales:
    """The steps of a layer's keys and values in 8 bits, from the largest that calibration has met.

    `keys` are one for each channel of a head, the same for both channels that rotation mixes; `value` is one for all.
    """

    keys: tuple[float, ...]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Formats of all matrices of one export.

    `decoder_bits` also holds for the embedding tables and the head; `vision_bits` for everything before the decoder.
    """

    precision: str = "fp32"
    decoder_bits: int = 32
    vision_bits: int = 32
    keep: bool = False  # a matrix that the checkpoint stores in blocks stays as it is
    half: bool = False  # matrix products and state in float16 (for GPUs); the residual stream and norms stay float32
    accuracy_level: int = 4  # of MatMulNBits: 4 multiplies in int8, 1 in float32
    measured_bits: tuple[int, ...] = ()  # what calibration may give a matrix of the decoder
    larger_blocks: tuple[int, ...] = ()  # of 4 bits, beside those of the rule
    chosen: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)  # by key of the matrix
    state_bits: int = 32  # 8: of layers whose scales calibration knows and whose family can use them
    states: Mapping[int, StateScales] = field(default_factory=dict)  # by layer

    @property
    def dtype(self) -> ir.DataType:
        """What matrix products compute in, and what the decoder's state is made of."""
        return ir.DataType.FLOAT16 if self.half else ir.DataType.FLOAT

    def spans(self, graph: str, key: str, shape: tuple[int, int]) -> tuple[Span, ...]:
        """The formats of the matrix `key` of `shape` [rows, columns] in the graph called `graph`, by rows.

        Only tables can have more than one.
        """
        return self.chosen.get(key) or (Span(0, shape[0], self.storage(graph, shape[1])),)

    def state_scales(self, layer: int) -> StateScales | None:
        """The steps of a layer's keys and values, if they are stored in 8 bits."""
        return self.states.get(layer)

    def storage(self, graph: str, columns: int) -> Storage:
        """The format by the rule of a matrix of so many columns in the graph called `graph`."""
        bits = self.vision_bits if graph in ("vision", "audio") else self.decoder_bits
        if bits < 16:
            return self._blocks(bits, columns) or Storage(16 if self.half else 32)  # the export report shows it
        return Storage(bits)

    def formats(self, columns: int) -> list[Storage]:
        """The formats that calibration may give a matrix of so many columns, smallest first."""
        larger = [Storage(4, block) for block in self.larger_blocks if columns % block == 0]
        return larger + [each for bits in self.measured_bits if (each := self._blocks(bits, columns)) is not None]

    def _blocks(self, bits: int, columns: int) -> Storage | None:
        """Blocks by the rule; None if no size divides the columns."""
        return next((Storage(bits, block) for block in _BLOCKS[bits] if columns % block == 0), None)


def plan_for(precision: str, target: str) -> Plan:
    """The plan of a named precision.

    Raises ExportError for an unknown one, for float16 on the CPU and for float32 on CUDA.
    """
    for key, value, allowed in (("precision", precision, PRECISIONS), ("target", target, TARGETS)):
        if value not in allowed:
            raise ExportError(f"{key} {value!r} is not supported (supported: {', '.join(allowed)})")
    if precision == "fp16" and target == "cpu":
        raise ExportError(
            "precision 'fp16' is for --target cuda: on the CPU float16 is widened when a bundle is loaded"
        )
    if precision == "fp32" and target == "cuda":
        raise ExportError(
            "precision 'fp32' is for --target cpu: CUDA's attention takes float16; fp16 keeps the residual stream and "
            "norms in float32"
        )
    half = target == "cuda"
    bits = {"auto": (4, 8), "fp32": (32, 32), "fp16": (16, 16), "int8": (8, 8), "int4": (4, 8), "keep": (32, 32)}
    measured = {"auto": (4, 8), "int4": (4,)}.get(precision, ())
    return Plan(
        precision=precision,
        decoder_bits=bits[precision][0],
        vision_bits=bits[precision][1],
        keep=precision == "keep",
        half=half,
        measured_bits=measured,
        larger_blocks=_LARGER[target] if measured else (),
        state_bits=8 if precision == "int4" and not half else 16 if half else 32,
    )
