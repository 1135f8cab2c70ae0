"""Penalties and bias: how the tokens so far, and the request, change the logits of the next one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from ..kernels import logits as rows

__all__ = ["Penalties", "PenaltyValues"]


class PenaltyValues(Protocol):
    """The fields of `Effective` that are read here."""

    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> dict[int, float]: ...


class Penalties:
    """Counts the tokens of one reply and changes its logits accordingly.

    The cost of a step grows with the number of different tokens, not with the vocabulary; without penalties and bias
    it is nothing.
    """

    def __init__(self, values: PenaltyValues, prompt_ids: Collection[int] = ()):
        """`prompt_ids` are the tokens of the prompt that count for the repetition penalty."""
        self._presence = values.presence_penalty
        self._frequency = values.frequency_penalty
        self._repetition = values.repetition_penalty
        self._counted = (self._presence, self._frequency, self._repetition) != (0, 0, 1)
        # Occurrences in the reply by id; 0 for an id of the prompt, which only the repetition penalty looks at.
        self._counts = dict.fromkeys(map(int, prompt_ids), 0) if self._repetition != 1 else {}
        self._biased = np.array(list(values.logit_bias), np.int64)
        self._bias = np.array(list(values.logit_bias.values()), np.float64)

    def add(self, id: int) -> None:
        """The token has joined the reply."""
        if self._counted:
            self._counts[id] = self._counts.get(id, 0) + 1

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Logits float32 [V] with penalties and bias; the same array if there is nothing to change."""
        if self._counts:
            logits = rows.penalise(
                logits,
                np.fromiter(self._counts.keys(), np.int64, len(self._counts)),
                np.fromiter(self._counts.values(), np.int64, len(self._counts)),
                presence=self._presence,
                frequency=self._frequency,
                repetition=self._repetition,
            )
        if self._biased.size:
            logits = rows.add_bias(logits, self._biased, self._bias)
        return logits
