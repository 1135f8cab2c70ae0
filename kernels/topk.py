"""Picking tokens from a row of logits without sorting it.

A row has up to 262,144 entries, of which a filter keeps a few. `np.partition` finds the k-th best in 0.5 ms where a
sort takes 60. The definitions, written as loops, are in `reference_sampling.py`.

Logits are float32 [n] without NaN or +inf; -inf marks a token that cannot be drawn, and at least one entry is finite.
Filters return the positions they keep, int64 and ascending. Among equal logits the lowest position is the better.
"""

from __future__ import annotations

import numpy as np

__all__ = ["draw", "min_p", "relative_weights", "top_k", "top_p"]

_FIRST_GUESS = 256  # how many of the best `top_p` looks at first
_BLOCK = 512  # entries per partial sum in `draw`


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` best; all if there are no more than `k`."""
    size = logits.size
    if k >= size:
        return np.arange(size)
    threshold = np.partition(logits, size - k)[size - k]
    better = np.flatnonzero(logits > threshold)
    equal = np.flatnonzero(logits == threshold)[: k - better.size]
    return np.sort(np.concatenate([better, equal]))


def top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions of the smallest set of best tokens whose probabilities reach `p` in [0, 1], never empty.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    weights = relative_weights(logits, 1.0)
    wanted = p * weights.sum(dtype=np.float64)
    guess = _FIRST_GUESS
    while True:
        best = top_k(logits, guess)
        best = best[np.argsort(-logits[best], kind="stable")]
        reached = np.cumsum(weights[best], dtype=np.float64)
        if reached[-1] >= wanted or guess >= logits.size:
            return np.sort(best[: np.searchsorted(reached, wanted) + 1])
        guess *= 8


def min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions whose probability is at least `p` in (0, 1] times that of the best token.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3. A ratio of probabilities is a difference of
    logits, so no probability is needed.
    """
    return np.flatnonzero(logits >= logits.max().astype(np.float64) + np.log(p))


def relative_weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """exp((logit - best logit) / temperature), float32 [n]: probabilities up to a factor, 1.0 for the best.

    The quotient is taken in float64, where no positive temperature overflows to anything but -inf.
    """
    distance = logits - logits.max().astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        return np.exp((distance / temperature).astype(np.float32))


def draw(weights: np.ndarray, uniform: float) -> int:
    """The position at which the running sum of `weights` first exceeds `uniform` in [0, 1) times their sum.

    Never a position of weight 0. Sums are float64, by blocks, so that only one block needs a running sum.
    """
    edges = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK), dtype=np.float64))
    target = uniform * edges[-1]
    block = min(int(np.searchsorted(edges, target, side="right")), edges.size - 1)
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    before = edges[block - 1] if block else 0.0
    position = int(np.searchsorted(before + np.cumsum(inside, dtype=np.float64), target, side="right"))
    if position == inside.size:  # rounding put the target at the very end
        position = int(np.flatnonzero(weights[: (block + 1) * _BLOCK])[-1]) - block * _BLOCK
    return block * _BLOCK + position
