"""How a prompt is prefilled: where it is cut into runs, and after which of them its decoder state is kept.

A later prompt with the same beginning continues from a kept state, so the cuts are where prompts tend to differ.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Boundaries", "PrefillPlan", "find_boundaries"]

_WORTHWHILE = 32  # rows; a shorter system text is run again
_LONGEST_LEAD = 8  # tokens between the last turn of a prompt and the reply: a control token, a role, a line break


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Places in a prompt, each the number of rows in front of it.

    `system` is the end of the system text and `pictures` are the ends of the runs of soft tokens: prompts often differ
    from there on. `replies` are the beginnings of the conversation's earlier replies, where its earlier prompts ended.
    """

    system: int | None
    pictures: tuple[int, ...]
    replies: tuple[int, ...]

    @property
    def all(self) -> list[int]:
        return sorted({*self.shared, *self.pictures, *self.replies})

    @property
    def shared(self) -> list[int]:
        """The two behind which other prompts are most likely to differ: the system text, and the last picture."""
        return sorted({*([self.system] if self.system else []), *self.pictures[-1:]})


@dataclass(frozen=True, slots=True, eq=False)
class PrefillPlan:
    """A prompt is run in parts that end at `stops`, the last of which is its length.

    `kept` are the stops at which the state is kept; `keys`, int64 [L], identify the rows (`prefix_cache.row_keys`).
    """

    keys: np.ndarray
    stops: tuple[int, ...]
    kept: frozenset[int]


def find_boundaries(
    ids: np.ndarray, soft: Sequence[tuple[int, int]], special: Collection[int], turn_ends: Collection[int]
) -> Boundaries:
    """The boundaries of a prompt.

    Args:
        ids: int64 [L].
        soft: first row and end of each run of soft tokens.
        special: ids of all control tokens, which text cannot contain.
        turn_ends: ids of the control tokens that end a turn.
    """
    length = len(ids)
    pictures = tuple(end for _, end in soft if end < length)
    is_control = np.isin(ids, list(special))
    for first, end in soft:
        is_control[first:end] = False
    control = np.flatnonzero(is_control)
    lead = ids[control[-1] :] if len(control) else ids[:0]
    replies: tuple[int, ...] = ()
    if 0 < len(lead) <= _LONGEST_LEAD:
        ends = control[ids[control] == lead[0]] + len(lead)
        replies = tuple(int(end) for end in ends if end < length and np.array_equal(ids[end - len(lead) : end], lead))
    system = next((int(row) + 1 for row in control if ids[row] in turn_ends), None)
    if system is not None:
        reply = next((end for end in (*replies, length) if end > system), length)
        # Directly before a reply it is the end of the user's turn; a line break may be between.
        if system < _WORTHWHILE or reply - system <= len(lead) + 1:
            system = None
    return Boundaries(system, pictures, replies)
