"""Which format each matrix gets: as few bytes as a limit on the loss allows, or as little loss as a limit on the bytes.

Losses are divergences of the model's predictions, in nats per token, measured for one matrix at a time; small ones add
up. Matrices are upgraded one step at a time, always where a byte saves most.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .plan import Storage

__all__ = ["Chosen", "Goal", "Measured", "choose", "goal_for"]


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows `start` to `stop` of the matrix `key`, and their loss in every format that they may have; None where it
    could not be measured."""

    key: str
    start: int
    stop: int
    columns: int
    losses: Mapping[Storage, float | None]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.stop - self.start, self.columns


@dataclass(frozen=True, slots=True)
class Chosen:
    """The format of some rows of a matrix."""

    measured: Measured
    storage: Storage

    @property
    def loss(self) -> float | None:
        return self.measured.losses[self.storage]

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes(self.measured.shape)


@dataclass(frozen=True, slots=True)
class Goal:
    """Upgrades end when the sum of losses is at most `loss`, or `slack` times what the best formats would give; they
    never lead beyond `bits` bits a weight, scales included."""

    loss: float
    slack: float
    bits: float


def goal_for(precision: str) -> Goal:
    """The goal of a precision whose formats are measured.

    `auto`: 2% of perplexity if 5.9 bits a weight are enough for that. `int4`: blocks as large as is almost harmless.
    """
    return Goal(0.02, 0.0, 5.9) if precision == "auto" else Goal(0.02, 1.5, 8.0)


def choose(matrices: Sequence[Measured], goal: Goal) -> list[Chosen]:
    """A format for each matrix or part of one, in their order; neighbours in one matrix with one format are joined."""
    ladders = [_ladder(matrix) for matrix in matrices]
    places = [0] * len(ladders)
    total = sum(ladder[0].loss or 0.0 for ladder in ladders)
    size = sum(ladder[0].nbytes for ladder in ladders)
    target = max(goal.loss, goal.slack * sum(ladder[-1].loss or 0.0 for ladder in ladders))
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    # The ladders are convex: sorted by what a byte saves, the steps of each come in order.
    steps = [
        (_saving(low, high), index, place)
        for index, ladder in enumerate(ladders)
        for place, (low, high) in enumerate(itertools.pairwise(ladder))
    ]
    for _, index, place in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        if total <= target:
            break
        low, high = ladders[index][place : place + 2]
        grown = size + high.nbytes - low.nbytes
        if places[index] == place and grown * 8 <= goal.bits * weights:
            places[index], size, total = place + 1, grown, total + (high.loss or 0.0) - (low.loss or 0.0)
    return _joined([ladder[place] for ladder, place in zip(ladders, places, strict=True)])


def _ladder(matrix: Measured) -> list[Chosen]:
    """The formats that no mixture of others beats, smallest first; the first of all where nothing was measured."""
    known = [Chosen(matrix, storage) for storage, loss in matrix.losses.items() if loss is not None]
    if not known:
        return [Chosen(matrix, next(iter(matrix.losses)))]
    ladder: list[Chosen] = []
    for each in sorted(known, key=lambda each: (each.nbytes, each.loss)):
        if ladder and _saving(ladder[-1], each) <= 0:
            continue
        while len(ladder) > 1 and _saving(ladder[-2], ladder[-1]) <= _saving(ladder[-1], each):
            ladder.pop()
        ladder.append(each)
    return ladder


def _saving(low: Chosen, high: Chosen) -> float:
    """Loss that is saved for each byte more."""
    return ((low.loss or 0.0) - (high.loss or 0.0)) / max(1, high.nbytes - low.nbytes)


def _joined(chosen: Sequence[Chosen]) -> list[Chosen]:
    joined: list[Chosen] = []
    for each in chosen:
        last = joined[-1] if joined else None
        if last is None or (last.measured.key, last.storage) != (each.measured.key, each.storage):
            joined.append(each)
            continue
        first, second = last.measured, each.measured
        losses = {
            storage: None if loss is None else loss + (second.losses[storage] or 0.0)
            for storage, loss in first.losses.items()
        }
        joined[-1] = Chosen(Measured(first.key, first.start, second.stop, first.columns, losses), each.storage)
    return joined
