"""From a row of logits to a token id.

One chain, in this order: top-k, top-p, min-p, temperature, draw. transformers applies the temperature first, which is
the same at temperature 1; at other temperatures its top-p keeps another set. Temperature 0 takes the best token, the
lowest id among equals, whatever the filters say.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..kernels import topk
from .errors import ModelOutputError, SamplingError
from .manifest import SamplingFacts

__all__ = ["Effective", "Sampler", "Sampling", "make_sampler", "resolve"]

Sampler = Callable[[np.ndarray], int]

_SEEDS = 2**64
_DRAWN_SEEDS = 2**53  # seeds are reported in JSON, and this is how far JavaScript counts exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request asks for. None takes the default of the bundle.

    temperature: >= 0, 0 is greedy. top_k: how many of the best tokens stay, 0 for all. top_p: between 0 and 1, keep the
    smallest set of best tokens that reaches this probability; 0 keeps the best token, 1 all. min_p: between 0 and 1,
    drop tokens less probable than min_p times the best; 0 keeps all. seed: 0 to 2**64 - 1, None for a new one each
    time. Raises SamplingError for values out of range or of another type.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """The values a reply was sampled with: `Sampling` without None. The same values give the same draws."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int

    def __post_init__(self) -> None:
        _check(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)


def resolve(sampling: Sampling, facts: SamplingFacts) -> Effective:
    """Fill in, field by field: the request, else the bundle's default, else the filter is off.

    Without a seed in the request one is drawn from the operating system, so that the reply can be repeated. Raises
    SamplingError for a default of the bundle that is out of range.
    """

    def first(*values):
        return next(value for value in values if value is not None)

    return Effective(
        temperature=float(first(sampling.temperature, facts.temperature)),
        top_k=int(first(sampling.top_k, facts.top_k, 0)),
        top_p=float(first(sampling.top_p, facts.top_p, 1.0)),
        min_p=float(first(sampling.min_p, facts.min_p, 0.0)),
        seed=int(first(sampling.seed, secrets.randbelow(_DRAWN_SEEDS))),
    )


def make_sampler(effective: Effective) -> Sampler:
    """A function that takes logits, float32 [V], and returns a token id.

    It owns its random generator, one draw per call, so nothing that runs in between changes the ids. It raises
    ModelOutputError for NaN, +inf, or no finite logit at all; single -inf entries are tokens that cannot be drawn.
    """
    steps = _steps(effective)
    generator = np.random.Generator(np.random.PCG64(effective.seed))

    def sampler(logits: np.ndarray) -> int:
        _check_finite(logits)
        if effective.temperature == 0:
            return int(np.argmax(logits))  # the first of equals
        candidates = _Candidates(None, logits)
        for step in steps:
            candidates = candidates.keep(step(candidates.logits))
        weights = topk.relative_weights(candidates.logits, effective.temperature)
        return candidates.id_at(topk.draw(weights, generator.random()))

    return sampler


def _steps(effective: Effective) -> list[Callable[[np.ndarray], np.ndarray]]:
    """The filters in the order of the chain: logits of the candidates -> positions that stay, ascending."""
    steps: list[Callable[[np.ndarray], np.ndarray]] = []
    if effective.top_k > 0:
        steps.append(lambda logits: topk.top_k(logits, effective.top_k))
    if effective.top_p < 1:
        steps.append(lambda logits: topk.top_p(logits, effective.top_p))
    if effective.min_p > 0:
        steps.append(lambda logits: topk.min_p(logits, effective.min_p))
    return steps


class _Candidates(NamedTuple):
    """Token ids that are still in, ascending (None: all), and their logits."""

    ids: np.ndarray | None
    logits: np.ndarray

    def keep(self, positions: np.ndarray) -> _Candidates:
        return _Candidates(positions if self.ids is None else self.ids[positions], self.logits[positions])

    def id_at(self, position: int) -> int:
        return position if self.ids is None else int(self.ids[position])


def _check_finite(logits: np.ndarray) -> None:
    """One pass decides: the maximum is NaN, +inf, or -inf exactly when the row is unusable."""
    if not math.isfinite(logits.max()):
        counts = f"{int(np.isnan(logits).sum())} NaN, {int(np.isposinf(logits).sum())} +inf"
        raise ModelOutputError(f"non-finite logits: {counts}, {int(np.isneginf(logits).sum())} -inf of {logits.size}")


def _check(temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any) -> None:
    real, whole = (int, float, np.integer, np.floating), (int, np.integer)
    _check_range("temperature", temperature, real, sys.float_info.max, "a finite number, 0 or more")
    _check_range("top_k", top_k, whole, 2**63 - 1, "an integer, 0 (off) or more")
    _check_range("top_p", top_p, real, 1, "a number between 0 and 1")
    _check_range("min_p", min_p, real, 1, "a number between 0 and 1")
    _check_range("seed", seed, whole, _SEEDS - 1, "an integer between 0 and 2**64 - 1")


def _check_range(name: str, value: Any, types: tuple[type, ...], highest: float, expected: str) -> None:
    if value is None:
        return
    # bool is a subclass of int; NaN fails the comparison
    if isinstance(value, bool) or not isinstance(value, types) or not 0 <= value <= highest:
        raise SamplingError(f"{name} is {value!r}, expected {expected}")
