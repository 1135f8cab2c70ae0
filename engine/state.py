"""Decoder state: the key and value buffers of one sequence.

Every pair of the manifest is one buffer that the graph reads as `past` and writes as `present` in place. A `window`
buffer has the fixed capacity that the graph declares; the operator evicts. A `global` buffer has a varying capacity
and is grown by doubling, so that a short question does not pay for the longest possible context.

A state can be copied, kept as a `Snapshot` and cut back. Rows beyond the length are never read, so cutting back a
global buffer is a matter of the length alone. The same holds for a window buffer until it evicts for the first time:
then its rows move and the evicted ones are gone. A state that was ever longer than its smallest window buffer is
therefore usable at its whole length only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .device_memory import Buffers, HostMemory, Memory
from .errors import BundleError, ContextFull, ModelOutputError
from .graph import Graph, IOBinding
from .manifest import StatePair

__all__ = ["FIRST_CAPACITY", "DecoderState", "Snapshot", "check_state"]

FIRST_CAPACITY = 256  # tokens; global buffers start here and double


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What a state held at one moment. Never changes, and can be restored any number of times.

    `rows` are the used rows of every buffer by the name of its input, [1, heads, rows, head size]. `shortest` is the
    smallest length that it can be restored at: 0, or `length` where a window buffer has evicted.
    """

    length: int
    shortest: int
    rows: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())


class DecoderState:
    """Buffers, in `memory`, and length of one sequence. Not shared between threads."""

    def __init__(self, decoder: Graph, pairs: Sequence[StatePair], context: int, memory: Memory | None = None):
        self.length = 0
        self.context = context
        self._pairs = pairs
        facts = {pair.input: decoder.inputs[pair.input] for pair in pairs}
        self._capacity = min(FIRST_CAPACITY, context)
        self._buffers: Buffers = (memory or HostMemory()).buffers(facts, self._capacity)
        self._bound_to: list[IOBinding] = []
        windows = [int(facts[pair.input].shape[2]) for pair in pairs if pair.kind == "window"]
        self._evicts_beyond = min(windows, default=context)
        self._shortest = 0
        self._lost = False

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return self._buffers.nbytes

    @property
    def buffers(self) -> Buffers:
        """The buffers themselves; others after the next `reserve` or `restore`."""
        return self._buffers

    @property
    def shortest(self) -> int:
        """The smallest length that the state can be cut back to: 0, or its length once a window buffer has evicted."""
        return self._shortest

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more.

        Raises ContextFull, changing nothing, if the context does not hold them, and ModelOutputError for a state that
        a failed run has spoilt.
        """
        if self._lost:
            raise ModelOutputError("an earlier run of this sequence failed and left its state undefined")
        needed = self.length + tokens
        if needed > self.context:
            raise ContextFull(needed, self.context)
        if needed <= self._capacity:
            return
        capacity = self._capacity
        while capacity < needed:
            capacity *= 2
        capacity = min(capacity, self.context)
        self._bound_to.clear()
        self._buffers = self._buffers.grown(capacity, self.length)
        self._capacity = capacity

    def evicts(self, length: int) -> bool:
        """Whether a window buffer will have evicted when the state has this length."""
        return length > self._evicts_beyond

    def advance(self, tokens: int) -> None:
        """A run has appended `tokens`."""
        self.length += tokens
        if self.evicts(self.length):
            self._shortest = self.length

    def fail(self, tokens: int) -> None:
        """A run that was to append `tokens` has failed, after writing no one knows what.

        The state is as before, unless a window buffer would have evicted: then it cannot be used any more.
        """
        self._lost = self.evicts(self.length + tokens)

    def truncate(self, length: int) -> None:
        """Cut back to the first `length` tokens. Raises ValueError, changing nothing, if they are not all there."""
        if not self._shortest <= length <= self.length:
            raise ValueError(f"a state of {self.length} tokens cannot be cut to {length}, only to {self._range()}")
        self.length = length

    def snapshot(self) -> Snapshot:
        """A copy of what is used."""
        self.reserve(0)
        rows = {pair.input: self._buffers.rows(pair.input, self.length) for pair in self._pairs}
        for array in rows.values():
            array.flags.writeable = False
        return Snapshot(self.length, self._shortest, rows)

    def restore(self, snapshot: Snapshot, length: int | None = None) -> None:
        """Become what `snapshot` held, or the first `length` tokens of it.

        The snapshot must come from the same bundle. Raises ValueError, changing nothing, if it cannot be cut to
        `length`.
        """
        length = snapshot.length if length is None else length
        if not snapshot.shortest <= length <= snapshot.length:
            raise ValueError(f"a snapshot of {snapshot.length} tokens cannot be cut to {length}")
        self.length, self._lost = 0, False
        self.reserve(length)
        for pair in self._pairs:
            self._buffers.set_rows(pair.input, snapshot.rows[pair.input][:, :, :length])
        self.length, self._shortest = length, snapshot.shortest

    def copy(self) -> DecoderState:
        """A state of its own with the same content."""
        twin = copy.copy(self)
        twin._buffers = self._buffers.copy()
        twin._bound_to = []
        return twin

    def bind(self, binding: IOBinding) -> None:
        """Bind every buffer as the past and the present of its layer, unless `binding` has these buffers already."""
        if any(bound is binding for bound in self._bound_to):
            return
        for pair in self._pairs:
            value = self._buffers.value(pair.input)
            binding.bind_ortvalue_input(pair.input, value)
            binding.bind_ortvalue_output(pair.output, value)
        self._bound_to.append(binding)

    def _range(self) -> str:
        return f"{self.length}" if self._shortest == self.length else f"{self._shortest} to {self.length}"


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
