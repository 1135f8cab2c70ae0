"""Decoder state: the key and value buffers of one sequence.

Every pair of the manifest is one buffer that the graph reads as `past` and writes as `present` in place. A `window`
buffer has the fixed capacity that the graph declares; the operator evicts. A `global` buffer has a varying capacity
and is grown by doubling, so that a short question does not pay for the longest possible context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime

from .errors import BundleError, ContextFull
from .graph import Graph, tensor
from .manifest import StatePair

__all__ = ["FIRST_CAPACITY", "DecoderState", "check_state"]

FIRST_CAPACITY = 256  # tokens; global buffers start here and double


class DecoderState:
    """Buffers and length of one sequence. Not shared between threads."""

    def __init__(self, decoder: Graph, pairs: Sequence[StatePair], context: int):
        self.length = 0
        self.context = context
        self._pairs = pairs
        self._facts = {pair.input: decoder.inputs[pair.input] for pair in pairs}
        self._capacity = min(FIRST_CAPACITY, context)
        self._buffers = {pair.input: self._allocate(pair) for pair in pairs}
        self._bound_to: onnxruntime.IOBinding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more. Raises ContextFull, changing nothing, if the context does not hold them."""
        needed = self.length + tokens
        if needed > self.context:
            raise ContextFull(needed, self.context)
        if needed <= self._capacity:
            return
        capacity = self._capacity
        while capacity < needed:
            capacity *= 2
        self._capacity = min(capacity, self.context)
        self._bound_to = None
        for pair in self._pairs:
            if pair.kind == "global":
                grown = self._allocate(pair)
                grown[:, :, : self.length] = self._buffers[pair.input][:, :, : self.length]
                self._buffers[pair.input] = grown

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind every buffer as the past and the present of its layer, unless `binding` has these buffers already."""
        if self._bound_to is binding:
            return
        for pair in self._pairs:
            value = tensor(self._buffers[pair.input])
            binding.bind_ortvalue_input(pair.input, value)
            binding.bind_ortvalue_output(pair.output, value)
        self._bound_to = binding

    def _allocate(self, pair: StatePair) -> np.ndarray:
        facts = self._facts[pair.input]
        shape = [size if isinstance(size, int) else self._capacity for size in facts.shape]
        try:
            return np.zeros(shape, facts.dtype)
        except (MemoryError, ValueError):
            raise BundleError(f"state {pair.input!r} of shape {shape} does not fit into memory") from None


def check_state(decoder: Graph, pairs: Sequence[StatePair]) -> None:
    """Raise BundleError unless every pair exists in the graph and its shape fits its kind."""
    for pair in pairs:
        facts, out = decoder.inputs.get(pair.input), decoder.outputs.get(pair.output)
        if facts is None or out is None:
            missing = pair.input if facts is None else pair.output
            raise BundleError(f"the decoder graph has no tensor {missing!r}, which the manifest lists as state")
        fixed = [isinstance(size, int) for size in facts.shape]
        if facts.dtype != out.dtype or fixed[:2] + fixed[3:] != [True, True, True]:
            raise BundleError(f"state {pair.input!r} must be [1, heads, capacity, head size] like {pair.output!r}")
        if isinstance(facts.shape[2], int) != (pair.kind == "window"):
            raise BundleError(
                f"state {pair.input!r} of kind {pair.kind!r} has capacity {facts.shape[2]!r} in the graph"
            )
