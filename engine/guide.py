"""Which tokens may come next in a reply: its form, thoughts before it, and calls of tools.

    thought        free. Before an answer that has a form, and before calls that must come, one may begin.
    answer         what its form allows; anything without one
    call           what the declarations of the tools allow; anything where no call is held to them
    behind a call  where the reply has a form or must call: another call, or the end

Where thoughts and calls begin and end is told by ids, as in `thinking`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from .calls import CallRules
from .grammar import Constraint
from .thinking import Markers, ReplyParts

__all__ = ["Guide"]


class Guide:
    """Follows one reply, one token before its parts do."""

    def __init__(
        self, form: Constraint | None, calls: CallRules, markers: Markers, parts: ReplyParts, *, thinking: bool
    ):
        """`form` is that of the answer; `thinking` says that the model is asked to think."""
        self._form = None if form is None else form.copy()
        self._calls = calls
        self._markers = markers
        self._parts = parts
        self._thinking = thinking
        self._call: Constraint | None = None  # of the call that is being written
        self._free = parts.in_thought  # in a thought that nothing is said about
        self._answered = False  # has a token of the answer
        self._called = False

    @property
    def held(self) -> bool:
        """Whether a form or a call says anything about the reply."""
        return self._form is not None or self._calls.required or not self._calls.allowed

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        if not self._parts.in_answer:
            return False
        if self._called:
            return self._calls.most is not None and len(self._parts.calls) >= self._calls.most
        return self._form is not None and self._form.ended

    @property
    def _may_think(self) -> bool:
        return self._thinking and self._parts.in_answer and not (self._parts.thoughts or self._answered or self._called)

    @property
    def _may_call(self) -> bool:
        """Whether a call may begin where an answer or a thought is."""
        calls = self._calls
        return calls.allowed and (self._form is None or bool(calls.tools)) and not self._answered

    def mask(self, size: int, stop_ids: Collection[int]) -> np.ndarray | None:
        """The tokens of `size` that may come next, one bit per token, lowest bit first; None for all.

        `stop_ids` are those that end the reply here. Raises GrammarError when a grammar has become too expensive.
        """
        if self._call is not None:
            return self._call.mask(())
        if self._parts.in_call or not self.held:
            return None
        if self._free or (self._form is None and not self._calls.required):
            bits = np.full(-(-size // 8), 0xFF, np.uint8)
            _set_bit(bits, self._markers.call, on=self._may_call)
            for id in stop_ids if self._calls.required else ():
                _set_bit(bits, id, on=False)
            return bits
        if self._called or self._form is None:
            bits = np.zeros(-(-size // 8), np.uint8)
            _set_bit(bits, self._markers.call, on=True)
            for id in stop_ids if self._called else ():
                _set_bit(bits, id, on=True)
        else:
            bits = self._form.mask(stop_ids)
            if self._may_call:
                _set_bit(bits, self._markers.call, on=True)
        if self._may_think:
            _set_bit(bits, self._markers.thought, on=True)
        return bits

    def forced(self) -> list[int]:
        """The tokens that must come next, [] where there is a choice."""
        if self._call is not None:
            return self._call.forced()
        if self._parts.in_call or self._free or self._may_think or self._called:
            return []
        if self._calls.required:
            return [self._markers.call]
        return [] if self._form is None or self._may_call else self._form.forced()

    def follow(self, id: int) -> None:
        """The token joins the reply, and is told apart next. Raises GrammarError if it is not allowed."""
        markers = self._markers
        if self._call is not None:
            self._call.accept(id)
            if self._call.ended:
                self._call = None
        elif self._parts.in_call:
            pass
        elif id == markers.call:
            self._called, self._free = True, False
            if self._calls.constraint is not None:
                self._call = self._calls.constraint.copy()
        elif self._free:
            self._free = id != markers.thought_end
        elif self._may_think and id == markers.thought:
            self._free = True
        else:
            self._answered = True
            if self._form is not None and not self._called:
                self._form.accept(id)

    def is_complete(self, text: str, *, cut: bool) -> bool:
        """Whether the reply is all that is demanded of it; `text` is its answer, which a stop string may have `cut`."""
        if self._calls.required or (self._form is not None and self._called):
            return bool(self._parts.calls)
        if self._form is None:
            return True
        # A stop string has cut the text somewhere before the place where the grammar is.
        return self._form.matches(text) if cut else self._form.complete


def _set_bit(bits: np.ndarray, id: int, *, on: bool) -> None:
    """Allow or forbid a token in a mask; one beyond the vocabulary, or -1, cannot be drawn anyway."""
    if 0 <= id < 8 * bits.size:
        bit = np.uint8(1 << id % 8)
        bits[id // 8] = bits[id // 8] | bit if on else bits[id // 8] & ~bit
