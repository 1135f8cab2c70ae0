"""How the matrices of a bundle are stored: the one place that turns `--precision` and `--target` into formats.

A family says which matrices there are, `matrices.py` puts them into graphs, and a `Plan` decides between float32,
float16 and blocks of 8 or 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..engine.errors import ExportError

__all__ = ["PRECISIONS", "TARGETS", "Plan", "Storage", "plan_for"]

PRECISIONS = ("fp32", "fp16", "int8", "int4", "keep")
TARGETS = ("cpu", "cuda")

# Columns that share a scale, best first; MatMulNBits reads these sizes. Scales are float32 on the CPU, so a block of 32
# costs one bit a weight: with 8 bits that is not worth it, with 4 bits larger blocks lose too much.
_BLOCKS = {8: (128, 64, 32, 16), 4: (32, 16)}


@dataclass(frozen=True, slots=True)
class Storage:
    """The format of one matrix: 32 or 16 bits (float), or 8 or 4 bits in blocks of `block` columns."""

    bits: int
    block: int = 0

    def __str__(self) -> str:
        return f"int{self.bits} in blocks of {self.block}" if self.block else f"float{self.bits}"


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

    @property
    def dtype(self) -> ir.DataType:
        """What matrix products compute in, and what the decoder's state is made of."""
        return ir.DataType.FLOAT16 if self.half else ir.DataType.FLOAT

    def storage(self, graph: str, columns: int) -> Storage:
        """The format of a matrix [rows, columns] of the graph called `graph`."""
        bits = self.vision_bits if graph in ("vision", "audio") else self.decoder_bits
        if bits < 16:
            for block in _BLOCKS[bits]:
                if columns % block == 0:
                    return Storage(bits, block)
            bits = 16 if self.half else 32  # no block size divides the columns: the export report shows it
        return Storage(bits)


def plan_for(precision: str, target: str) -> Plan:
    """The plan of a named precision. Raises ExportError for an unknown one and for float16 on the CPU."""
    for key, value, allowed in (("precision", precision, PRECISIONS), ("target", target, TARGETS)):
        if value not in allowed:
            raise ExportError(f"{key} {value!r} is not supported (supported: {', '.join(allowed)})")
    if precision == "fp16" and target == "cpu":
        raise ExportError(
            "precision 'fp16' is for --target cuda: on the CPU float16 is widened when a bundle is loaded"
        )
    half = target == "cuda" and precision != "fp32"
    decoder, vision = {"fp32": (32, 32), "fp16": (16, 16), "int8": (8, 8), "int4": (4, 8), "keep": (32, 32)}[precision]
    keep = precision == "keep"
    return Plan(precision=precision, decoder_bits=decoder, vision_bits=vision, keep=keep, half=half)
