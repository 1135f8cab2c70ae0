"""The steps of keys and values in 8 bits, from the largest that calibration meets.

Rotation turns a key's channels i and i + d/2 (a pair) by an angle that depends on the position, so what a channel may
hold is the length of its pair, at whatever position: max over all keys of sqrt(k_i^2 + k_(i+d/2)^2). A step is 1/127 of
that. Values are not turned, and have one step for a layer: their channels differ less than those of keys, and the
kernels for one step are the fastest. What is larger than anything that calibration has met is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .piecewise import LazyGraph, Values
from .plan import StateScales

__all__ = ["StateRanges"]

_STEPS = 127
_SMALLEST = 1e-6  # of a range: channels that are always 0


@dataclass(slots=True)
class _Layer:
    """Where a layer's keys and values are made, and the largest so far: of pairs of channels, and of all values."""

    at: int  # of the node that reads both
    key: str
    value: str
    pairs: np.ndarray
    largest: float = 0.0


class StateRanges:
    """The ranges of the keys and values of all layers whose states can have 8 bits."""

    def __init__(self, decoder: LazyGraph):
        layers = {f"past.{layer}.key": layer for layer in decoder.survey.seen_states}
        self._layers: dict[int, _Layer] = {}
        for at, node in enumerate(decoder.graph):
            past = node.inputs[3] if node.op_type == "GroupQueryAttention" else None
            if past is None or past.name not in layers or past.shape is None:
                continue
            key, value = (made.name if made is not None else None for made in node.inputs[1:3])
            assert key is not None
            assert value is not None
            pairs = np.zeros(int(past.shape[3]) // 2, np.float32)  # type: ignore[call-overload]
            self._layers[layers[past.name]] = _Layer(at, key, value, pairs)

    def names(self, start: int, stop: int) -> list[str]:
        """What `see` wants to see of the nodes from `start` to `stop`."""
        inside = [layer for layer in self._layers.values() if start <= layer.at < stop]
        return [name for layer in inside for name in (layer.key, layer.value)]

    def see(self, values: Values, names: Sequence[str]) -> None:
        """Widen the ranges by what `values` has under `names`: keys and values [1, S, heads * d], keys not rotated."""
        for layer in self._layers.values():
            if layer.key not in names:
                continue
            half = len(layer.pairs)
            keys = values[layer.key].reshape(-1, 2, half)
            np.maximum(layer.pairs, np.hypot(keys[:, 0], keys[:, 1]).max(0, initial=0.0), out=layer.pairs)
            layer.largest = max(layer.largest, float(np.abs(values[layer.value]).max(initial=0.0)))

    def scales(self) -> dict[int, StateScales]:
        """The steps by layer."""
        return {
            number: StateScales(
                tuple(float(step) for step in np.tile(np.maximum(layer.pairs, _SMALLEST) / _STEPS, 2)),
                max(layer.largest, _SMALLEST) / _STEPS,
            )
            for number, layer in self._layers.items()
        }
