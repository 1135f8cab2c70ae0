"""Log-probabilities of the tokens of a reply.

They are natural logarithms of the model's own distribution, the softmax of its logits at temperature 1, before
penalties, bias, grammar and filters: these decide what is drawn, not what the model predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from ..kernels import logits as rows
from ..kernels import topk
from .text import token_bytes

__all__ = ["MAX_LOGPROBS", "Logprob", "logprob"]

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one place of a reply.

    `bytes` is what the token adds to a text; part of a character is U+FFFD in `text`. A special token, which adds
    nothing to a reply, has its name. `top` are the most probable tokens of the place, best first.
    """

    id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple[Logprob, ...] = ()


def logprob(tokenizer: Tokenizer, logits: np.ndarray, id: int, top: int) -> Logprob:
    """The report for token `id`, chosen by logits float32 [V], with the `top` most probable tokens (0 for none)."""
    best = topk.top_k(logits, top) if top else np.empty(0, np.int64)
    best = best[np.argsort(-logits[best], kind="stable")]
    best = best[logits[best] > -np.inf]
    values = rows.log_probabilities(logits, np.array([id, *best], np.int64)).tolist()
    ranked = tuple(_entry(tokenizer, int(other), value) for other, value in zip(best, values[1:], strict=True))
    chosen = _entry(tokenizer, id, values[0])
    return Logprob(chosen.id, chosen.text, chosen.bytes, chosen.logprob, ranked)


def _entry(tokenizer: Tokenizer, id: int, value: float) -> Logprob:
    data = token_bytes(tokenizer, id)
    return Logprob(id, data.decode(errors="replace"), data, value)
