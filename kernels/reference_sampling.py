"""The sampling chain as a definition: float64, loops, one step after the other. See `topk.py` for the fast routines.

penalties -> bias -> mask -> top-k -> top-p -> min-p -> temperature -> draw

Top-k before top-p before temperature is the order in which the Gemini documentation defines them, and llama.cpp's. At
temperature 1 it is also what transformers computes, which applies the temperature first.

A candidate is a pair (token id, logit); -inf means that the token cannot be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

__all__ = [
    "add_bias",
    "distribution",
    "draw",
    "keep_allowed",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "log_probabilities",
    "penalise",
    "probabilities",
]

Candidate = tuple[int, float]


def distribution(
    logits: Sequence[float],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    prompt: Sequence[int] = (),
    reply: Sequence[int] = (),
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    bias: Mapping[int, float] | None = None,
    allowed: Collection[int] | None = None,
) -> dict[int, float]:
    """The probability of each token id that the chain can draw, ids ascending.

    `logits`: one per token id. temperature 0 gives the best token, the lowest id among equals, probability 1.
    top_k 0, top_p 1 and min_p 0 switch a filter off, so do penalties of 0, 0 and 1, no bias and `allowed` None.
    `prompt` and `reply` are the ids so far.
    """
    candidates = penalise(list(enumerate(map(float, logits))), prompt, reply, presence, frequency, repetition)
    candidates = add_bias(candidates, bias or {})
    if allowed is not None:
        candidates = keep_allowed(candidates, allowed)
    if temperature == 0:
        return {best_first(candidates)[0][0]: 1.0}
    if top_k > 0:
        candidates = keep_top_k(candidates, top_k)
    if top_p < 1:
        candidates = keep_top_p(candidates, top_p)
    if min_p > 0:
        candidates = keep_min_p(candidates, min_p)
    found = probabilities(candidates, temperature)
    return {id: found[id] for id in sorted(found) if found[id] > 0}


def penalise(
    candidates: list[Candidate],
    prompt: Sequence[int],
    reply: Sequence[int],
    presence: float,
    frequency: float,
    repetition: float,
) -> list[Candidate]:
    """Tokens that occurred are less likely.

    Repetition (Keskar et al. 2019, "CTRL", section 4.1, as transformers has it): the logit of a token of the prompt or
    the reply is divided by the penalty if it is positive, multiplied otherwise. Then frequency and presence (OpenAI's
    API reference): for a token that occurs n > 0 times in the reply, n times the one and once the other is subtracted.
    """
    seen = {*prompt, *reply}
    penalised = []
    for id, logit in candidates:
        if id in seen:
            logit = logit / repetition if logit > 0 else logit * repetition
        count = sum(1 for other in reply if other == id)
        if count > 0:
            logit = logit - count * frequency - presence
        penalised.append((id, logit))
    return penalised


def add_bias(candidates: list[Candidate], bias: Mapping[int, float]) -> list[Candidate]:
    """The bias of a token is added to its logit."""
    return [(id, logit + bias.get(id, 0.0)) for id, logit in candidates]


def keep_allowed(candidates: list[Candidate], allowed: Collection[int]) -> list[Candidate]:
    """Tokens that are not allowed get -inf."""
    return [(id, logit if id in allowed else -math.inf) for id, logit in candidates]


def log_probabilities(logits: Sequence[float]) -> list[float]:
    """Logarithms of the softmax."""
    highest = max(logits)
    total = math.fsum(math.exp(logit - highest) for logit in logits)
    return [logit - highest - math.log(total) for logit in logits]


def best_first(candidates: list[Candidate]) -> list[Candidate]:
    """Descending by logit; the lower id first among equals."""
    return sorted(candidates, key=lambda candidate: (-candidate[1], candidate[0]))


def probabilities(candidates: list[Candidate], temperature: float) -> dict[int, float]:
    """Softmax of logit / temperature over the candidates."""
    highest = max(logit for _, logit in candidates)
    weights = {id: math.exp((logit - highest) / temperature) for id, logit in candidates}
    total = math.fsum(weights.values())
    return {id: weight / total for id, weight in weights.items()}


def keep_top_k(candidates: list[Candidate], k: int) -> list[Candidate]:
    """The k best."""
    return best_first(candidates)[:k]


def keep_top_p(candidates: list[Candidate], p: float) -> list[Candidate]:
    """The best, one after the other, until their probabilities (at temperature 1) reach p; at least one."""
    probability = probabilities(candidates, 1.0)
    kept: list[Candidate] = []
    reached = 0.0
    for candidate in best_first(candidates):
        kept.append(candidate)
        reached += probability[candidate[0]]
        if reached >= p:
            break
    return kept


def keep_min_p(candidates: list[Candidate], p: float) -> list[Candidate]:
    """Those at least p times as probable (at temperature 1) as the best."""
    probability = probabilities(candidates, 1.0)
    highest = max(probability.values())
    return [candidate for candidate in candidates if probability[candidate[0]] >= p * highest]


def draw(probability: dict[int, float], uniform: float) -> int:
    """Inverse transform sampling: the first id, ascending, at which the running sum exceeds `uniform` in [0, 1)."""
    reached = 0.0
    for id in sorted(probability):
        reached += probability[id]
        if reached > uniform:
            return id
    return max(probability)  # the sum came out a rounding error below 1
