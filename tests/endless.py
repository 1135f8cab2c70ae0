"""A graph that runs as long as it is told to, and looks as if it had no end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser

from siglance.engine.graph import Device, Graph

__all__ = ["ENDLESS", "spinning", "turns"]

ENDLESS = 10**15

_TEXT = """
<ir_version: 10, opset_import: ["": 21]>
spin (int64 turns, float x) => (float y) {
  one = Constant <value_int = 1> ()
  goes_on = Cast <to = 9> (one)
  y = Loop (turns, goes_on, x) <body = turn (int64 index, bool before, float a) => (bool after, float b) {
    after = Identity (before)
    b = Sin (a)
  }>
}
"""


def spinning(folder: Path) -> Graph:
    """The sine of the sine of ... of x, so many times."""
    path = folder / "spin.onnx"
    onnx.save(onnx.parser.parse_model(_TEXT), path)
    return Graph(path, Device("cpu"), threads=1)


def turns(count: int) -> dict[str, np.ndarray]:
    return {"turns": np.array(count), "x": np.array(1, np.float32)}
