"""A row of logits before a token is chosen: penalties, bias, mask; and the log-probabilities it stands for.

Logits are float32 [n] without NaN or +inf. No routine changes its input. The definitions, written as loops, are in
`reference_sampling.py`.
"""

from __future__ import annotations

import numpy as np

__all__ = ["add_bias", "keep_allowed", "log_probabilities", "penalise"]

_LARGEST = float(np.finfo(np.float32).max)

# For each byte of a mask its eight entries, lowest bit first: +inf where a token is allowed, -inf where it is not.
_LIMITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf
).astype(np.float32)


def penalise(
    logits: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    *,
    presence: float,
    frequency: float,
    repetition: float,
) -> np.ndarray:
    """A copy of `logits` in which the tokens `ids`, int64 [m] without repetition, are less likely.

    First the repetition penalty of Keskar et al. 2019, "CTRL", section 4.1, in the form that transformers has: a
    positive logit is divided by it, a negative one multiplied. Then the penalties of OpenAI's API: `frequency` times
    the count of the token is subtracted, and `presence` if the count is not 0.

    Args:
        counts: int64 [m], how often each token occurs in the reply; 0 for one that occurs in the prompt only.
    """
    values = logits[ids].astype(np.float64)
    values = np.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    return _replaced(logits, ids, values)


def add_bias(logits: np.ndarray, ids: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A copy of `logits` with `bias`, float64 [m], added to the tokens `ids`, int64 [m] without repetition."""
    return _replaced(logits, ids, logits[ids] + bias)


def _replaced(logits: np.ndarray, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` in place of the logits of `ids`. Finite values stay finite, -inf stays -inf."""
    changed = logits.copy()
    clipped = np.clip(values, -_LARGEST, _LARGEST)
    changed[ids] = np.where(np.isneginf(values), values, clipped)
    return changed


def keep_allowed(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of `logits` with -inf for each token whose bit in `mask` is 0.

    `mask` is uint8, one bit per token, lowest bit first; a token beyond its end is not allowed.
    """
    limits = _LIMITS.take(mask[: (logits.size + 7) // 8], axis=0).reshape(-1)[: logits.size]
    kept = np.full_like(logits, -np.inf)
    np.minimum(logits[: limits.size], limits, out=kept[: limits.size])
    return kept


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Natural logarithms of the softmax of `logits`, at the positions `ids`: float64 [len(ids)]."""
    best = logits.max().astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        total = np.exp(logits - logits.max()).sum(dtype=np.float64)
    return logits[ids] - best - np.log(total)
