"""The wire format of Protocol Buffers, as far as ONNX files need it: reading the fields of a message, writing messages.

The runtime has no package that knows ONNX files, and neither a check of untrusted ones nor a measurement of a device
should need one. What a number means is in onnx.proto; whoever reads fields names those that it uses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["Value", "fields", "message", "numbers", "signed"]

Value = int | float | str | bytes | memoryview


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field: an integer, or the bytes of a text, a message, packed numbers or a float.

    Raises ValueError for data that is no message.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if length > len(data) - at:
            raise ValueError("a field is longer than what is around it")
        yield number, data[at : at + length]
        at += length


def numbers(value: int | memoryview) -> Iterator[int]:
    """The integers of one field that may be packed, as signed 64-bit numbers."""
    if isinstance(value, int):
        yield signed(value)
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield signed(number)


def signed(value: int) -> int:
    """A 64-bit number in two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def message(*values: tuple[int, Value]) -> bytes:
    """A message of (number, value) pairs; an `int` is written as a number, a `float` as 32 bits."""
    out = bytearray()
    for number, value in values:
        if isinstance(value, int):
            out += _written(number << 3) + _written(value & (1 << 64) - 1)
        elif isinstance(value, float):
            out += _written(number << 3 | 5) + struct.pack("<f", value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _written(number << 3 | 2) + _written(len(data)) + data
    return bytes(out)


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at a place, and the place behind it. Raises ValueError where there is none."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number without an end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
