"""From a row of logits to a token id.

One chain, in this order: penalties and bias, grammar mask, top-k, top-p, min-p, temperature, draw. transformers applies
the temperature before the filters, which is the same at temperature 1; at other temperatures its top-p keeps another
set. Temperature 0 takes the best token that the penalties, the bias and the mask leave, the lowest id among equals.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..kernels import logits as rows
from ..kernels import topk
from .errors import ModelOutputError, SamplingError
from .manifest import SamplingFacts
from .penalties import Penalties

__all__ = ["REPETITION", "Effective", "Sampler", "Sampling", "check_token_ids", "read_logit_bias", "resolve"]

REPETITION = (0.01, 100)
"""Range of the repetition penalty. Beyond it logits would leave the range of float32, and replies be nonsense."""

_SEEDS = 2**64
_DRAWN_SEEDS = 2**53  # seeds are reported in JSON, and this is how far JavaScript counts exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request asks for. None takes the default of the bundle, or switches the step off where it has none.

    temperature: a finite number, >= 0; 0 is greedy.
    top_k: how many of the best tokens stay, 0 for all.
    top_p: 0 to 1; the smallest set of best tokens that reaches this probability stays; 0 keeps the best, 1 all.
    min_p: 0 to 1; tokens less probable than min_p times the best are dropped; 0 keeps all.
    presence_penalty, frequency_penalty: -2 to 2; subtracted from the logit of a token that the reply has already, once
        and once per occurrence (OpenAI's definition).
    repetition_penalty: 0.01 to 100; the logit of a token that the prompt or the reply has already is divided by
        it if positive and multiplied if negative (transformers' definition); 1 is off. Soft tokens of media do not
        count, all other tokens of the prompt do.
    logit_bias: token id -> -100 to 100, added to the logit of that token.
    seed: 0 to 2**64 - 1, None for a new one each time.

    Raises SamplingError for values out of range or of another type.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """The values a reply was sampled with: `Sampling` without None. The same values give the same draws."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int

    def __post_init__(self) -> None:
        _check(self)

    def of_candidate(self, index: int) -> Effective:
        """The values for one of several replies: the first has this seed, the others seeds derived from it."""
        if index == 0:
            return self
        derived = np.random.SeedSequence(self.seed, spawn_key=(index,)).generate_state(1, np.uint64)[0]
        return dataclasses.replace(self, seed=int(derived) % _DRAWN_SEEDS)


def resolve(sampling: Sampling, facts: SamplingFacts) -> Effective:
    """Fill in, field by field: the request, else the bundle's default, else the step is off.

    Without a seed in the request one is drawn from the operating system, so that the reply can be repeated. Raises
    SamplingError for a default of the bundle that is out of range, and for anything but a `Sampling`.
    """

    if not isinstance(sampling, Sampling):
        raise SamplingError(f"sampling is {type(sampling).__name__}, expected Sampling(temperature=..., ...)")

    def first(*values):
        return next(value for value in values if value is not None)

    return Effective(
        temperature=float(first(sampling.temperature, facts.temperature)),
        top_k=int(first(sampling.top_k, facts.top_k, 0)),
        top_p=float(first(sampling.top_p, facts.top_p, 1.0)),
        min_p=float(first(sampling.min_p, facts.min_p, 0.0)),
        presence_penalty=float(first(sampling.presence_penalty, 0.0)),
        frequency_penalty=float(first(sampling.frequency_penalty, 0.0)),
        repetition_penalty=float(first(sampling.repetition_penalty, 1.0)),
        logit_bias={int(id): float(bias) for id, bias in first(sampling.logit_bias, {}).items()},
        seed=int(first(sampling.seed, secrets.randbelow(_DRAWN_SEEDS))),
    )


class Sampler:
    """Draws the tokens of one reply.

    It owns its random generator, one draw per call, so nothing that runs in between changes the ids.
    """

    def __init__(self, effective: Effective, prompt_ids: Collection[int] = ()):
        """`prompt_ids` are the tokens of the prompt that the repetition penalty counts."""
        self._temperature = effective.temperature
        self._penalties = Penalties(effective, prompt_ids)
        self._steps = _steps(effective)
        self._generator = np.random.Generator(np.random.PCG64(effective.seed))

    def __call__(self, logits: np.ndarray, mask: np.ndarray | None = None) -> int:
        """Choose a token id by logits float32 [V]. It counts for the penalties only when it is added.

        `mask` says which tokens a grammar allows, one bit per token as in `kernels.logits.keep_allowed`.

        Raises ModelOutputError for NaN, +inf, no finite logit at all, or none among the allowed tokens; single -inf
        entries are tokens that cannot be drawn.
        """
        _check_finite(logits)
        logits = self._penalties.apply(logits)
        if mask is not None:
            logits = rows.keep_allowed(logits, mask)
            if np.isneginf(logits.max()):
                raise ModelOutputError("the model rules out every token that the grammar allows")
        if self._temperature == 0:
            return int(np.argmax(logits))  # the first of equals
        candidates = _Candidates(None, logits)
        for step in self._steps:
            candidates = candidates.keep(step(candidates.logits))
        weights = topk.relative_weights(candidates.logits, self._temperature)
        return candidates.id_at(topk.draw(weights, self._generator.random()))

    def add(self, id: int) -> None:
        """The token has joined the reply."""
        self._penalties.add(id)


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


class _Range(NamedTuple):
    """What a value must be."""

    text: str
    holds: Callable[[Any], bool]
    whole: bool = False

    def check(self, name: str, value: Any) -> None:
        # bool is a subclass of int; NaN fails the comparison
        types = (int, np.integer) if self.whole else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, types) or not self.holds(value):
            raise SamplingError(f"{name} is {value!r}, expected {self.text}")


_RANGES = {
    "temperature": _Range("a finite number, 0 or more", lambda value: value >= 0 and _is_finite(value)),
    "top_k": _Range("an integer, 0 (off) or more", lambda value: 0 <= value < 2**63, whole=True),
    "top_p": _Range("a number between 0 and 1", lambda value: 0 <= value <= 1),
    "min_p": _Range("a number between 0 and 1", lambda value: 0 <= value <= 1),
    "presence_penalty": _Range("a number between -2 and 2", lambda value: -2 <= value <= 2),
    "frequency_penalty": _Range("a number between -2 and 2", lambda value: -2 <= value <= 2),
    "repetition_penalty": _Range(
        f"a number between {REPETITION[0]} and {REPETITION[1]}", lambda value: REPETITION[0] <= value <= REPETITION[1]
    ),
    "seed": _Range("an integer between 0 and 2**64 - 1", lambda value: 0 <= value < _SEEDS, whole=True),
}
_TOKEN_ID = _Range("a token id, an integer of 0 or more", lambda value: 0 <= value < 2**31, whole=True)
_BIAS = _Range("a number between -100 and 100", lambda value: -100 <= value <= 100)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def _check(values: Sampling | Effective) -> None:
    for name, allowed in _RANGES.items():
        if (value := getattr(values, name)) is not None:
            allowed.check(name, value)
    if values.logit_bias is not None:
        if not isinstance(values.logit_bias, Mapping):
            raise SamplingError(f"logit_bias is {values.logit_bias!r}, expected a mapping of token ids to numbers")
        for id, bias in values.logit_bias.items():
            _TOKEN_ID.check("a key of logit_bias", id)
            _BIAS.check(f"logit_bias of token {id}", bias)


def read_logit_bias(assignments: Iterable[str]) -> dict[int, float]:
    """A bias from texts such as "1234=-2.5". Raises SamplingError for anything else."""
    found = {}
    for assignment in assignments:
        id, _, bias = assignment.partition("=")
        try:
            found[int(id)] = float(bias)
        except ValueError:
            raise SamplingError(f"logit_bias is {assignment!r}, expected a token id, '=' and a number") from None
    return found


def check_token_ids(name: str, ids: Any, vocabulary: int) -> frozenset[int]:
    """The ids as a set. Raises SamplingError unless all are token ids of a vocabulary of this size."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence | Set | np.ndarray):
        raise SamplingError(f"{name} is {ids!r}, expected a list of token ids")
    for id in ids:
        _TOKEN_ID.check(f"an item of {name}", id)
        if id >= vocabulary:
            raise SamplingError(f"{name} has the token id {id}, the vocabulary of this bundle has {vocabulary} tokens")
    return frozenset(map(int, ids))
