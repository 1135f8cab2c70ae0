"""Picking tokens from a row of logits without sorting it.

A row has up to 262,144 entries, of which a filter keeps a few. A sort takes 20 ms and more; every routine here first
narrows the row down to few entries with operations that run at the speed of memory, and sorts only those. The
definitions, written as loops, are in `reference_sampling.py`.

Logits are float32 [n] without NaN or +inf; -inf marks a token that cannot be drawn, and at least one entry is finite.
Filters return the positions they keep, int64 and ascending. Among equal logits the lowest position is the better.
"""

from __future__ import annotations

import numpy as np

__all__ = ["draw", "min_p", "relative_weights", "top_k", "top_p"]

_COLUMNS = 4096  # `top_k` takes the best of each column of the row, folded to this width
_NEAR = 8.0  # logits below the best one that `top_p` looks at first: e^-8 is 0.03 %
_FEW = 1024  # entries that `top_p` sorts as they are
_BINS = 4096  # `top_p` adds up probability by distance from the best
_TINY = 1e-30  # temperatures and distances below are not fit for float32
_HUGE = 1e30  # temperatures above neither: as an infinite one they would give tokens of -inf a weight
_VANISHED = 104.0  # exp(-104) is 0 in float32
_BLOCK = 512  # entries per partial sum in `draw`
_PART = 16_384  # entries at once where intermediate results in float64 would leave the cache


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` best; all if there are no more than `k`."""
    size = logits.size
    if k >= size:
        return np.arange(size)
    near = np.flatnonzero(logits >= _lower_bound(logits, k))
    values = logits[near]
    threshold = np.partition(values, values.size - k)[values.size - k]
    better = near[values > threshold]
    equal = near[values == threshold][: k - better.size]
    return np.sort(np.concatenate([better, equal]))


def _lower_bound(logits: np.ndarray, k: int) -> np.float32:
    """A value that at least `k` entries reach: the k-th best of the columns' maxima, which are entries themselves."""
    rows = logits.size // _COLUMNS
    if rows < 2 or k > _COLUMNS:
        return np.float32(-np.inf)
    maxima = logits[: rows * _COLUMNS].reshape(rows, _COLUMNS).max(axis=0)
    return np.partition(maxima, _COLUMNS - k)[_COLUMNS - k]


def top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions of the smallest set of best tokens whose probabilities reach `p` in [0, 1], never empty.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.

    Probability is added up in bins of equal distance from the best logit. Whole bins are kept up to the one in which
    `p` is reached; only that one is sorted.
    """
    weights = relative_weights(logits, 1.0)
    wanted = p * weights.sum(dtype=np.float64)
    near = np.flatnonzero(logits >= logits.max() - np.float32(_NEAR))
    if near.size < logits.size // 8 and weights[near].sum(dtype=np.float64) >= wanted:
        return near[_reaching(logits[near], weights[near], wanted)]
    return _reaching(logits, weights, wanted)


def _reaching(logits: np.ndarray, weights: np.ndarray, wanted: float) -> np.ndarray:
    """Positions of the best whose `weights` add up to `wanted`, ascending; at least one."""
    if logits.size <= _FEW:
        return np.sort(_best_reaching(logits, weights, wanted))
    bins = _bins(logits)
    mass = np.zeros(_BINS)
    for start in range(0, logits.size, _PART):
        part = slice(start, start + _PART)
        mass += np.bincount(bins[part], weights=weights[part], minlength=_BINS)
    reached = np.cumsum(mass)
    last = min(int(np.searchsorted(reached, wanted)), int(bins.max()))  # rounding can leave `wanted` out of reach
    inside = np.flatnonzero(bins == last)
    before = reached[last - 1] if last else 0.0
    keep = bins < last
    keep[inside[_best_reaching(logits[inside], weights[inside], wanted - before)]] = True
    return np.flatnonzero(keep)


def _best_reaching(logits: np.ndarray, weights: np.ndarray, wanted: float) -> np.ndarray:
    """The same by sorting, best first."""
    order = np.argsort(-logits, kind="stable")
    return order[: np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted) + 1]


def _bins(logits: np.ndarray) -> np.ndarray:
    """The bin of each entry by its distance from the best, uint16: a better entry is never in a later bin."""
    best = logits.max()
    worst = float(logits.min(initial=best, where=logits > -np.inf))
    span = min(float(best) - worst, _VANISHED)
    bins = np.zeros(logits.size, np.uint16)
    if span < _TINY:  # equal weights; sorting tells apart what little there is to tell
        return bins
    scale = np.float32((_BINS - 1) / span)
    for start in range(0, logits.size, _PART):
        with np.errstate(over="ignore"):
            distance = np.minimum(best - logits[start : start + _PART], np.float32(span))
        bins[start : start + _PART] = np.minimum(distance * scale, np.float32(_BINS - 1))
    return bins


def min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions whose probability is at least `p` in (0, 1] times that of the best token.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3. A ratio of probabilities is a difference of
    logits, so no probability is needed.
    """
    return np.flatnonzero(logits >= logits.max().astype(np.float64) + np.log(p))


def relative_weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """exp((logit - best logit) / temperature), float32 [n]: probabilities up to a factor, 1.0 for the best.

    float32 holds the quotient for any temperature that means something; beyond that it is taken in float64, where no
    positive temperature overflows to anything but -inf.
    """
    best = logits.max()
    with np.errstate(over="ignore", under="ignore"):
        if not _TINY <= temperature <= _HUGE:
            return np.exp(((logits - best.astype(np.float64)) / temperature).astype(np.float32))
        weights = logits - best
        if temperature != 1:
            weights /= np.float32(temperature)
        return np.exp(weights, out=weights)


def draw(weights: np.ndarray, uniform: float) -> int:
    """The position at which the running sum of `weights` first exceeds `uniform` in [0, 1) times their sum.

    Never a position of weight 0. Sums are float64, by blocks, so that only one block needs a running sum.
    """
    whole = weights.size - weights.size % _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1, dtype=np.float64)
    edges = np.cumsum(np.append(sums, weights[whole:].sum(dtype=np.float64)))
    target = uniform * edges[-1]
    block = min(int(np.searchsorted(edges, target, side="right")), edges.size - 1)
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    before = edges[block - 1] if block else 0.0
    position = int(np.searchsorted(before + np.cumsum(inside, dtype=np.float64), target, side="right"))
    if position == inside.size:  # rounding put the target at the very end
        position = int(np.flatnonzero(weights[: (block + 1) * _BLOCK])[-1]) - block * _BLOCK
    return block * _BLOCK + position
