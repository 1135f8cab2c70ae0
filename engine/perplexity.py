"""How well a bundle predicts a text: perplexity by the protocol of llama.cpp's llama-perplexity.

The text is cut into chunks of 512 tokens, the rest at the end is dropped. The first token of every chunk is replaced by
the beginning-of-sequence token, and the tokens that follow rows 256 to 510 are scored, so that each of them has at
least 256 tokens of context. Perplexity is exp(mean of -log p).
The scored rows run as those of a reply do.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .errors import InputError, ModelOutputError
from .preprocessing import bundle_tokenizer
from .prompt import PromptBuilder
from .runtime import Runtime

__all__ = [
    "CHUNK",
    "Perplexity",
    "Scored",
    "log_probabilities",
    "losses",
    "measure",
    "measure_all",
    "read_text",
    "scored_rows",
    "text_ids",
]

CHUNK = 512  # tokens
_FIRST = CHUNK // 2  # the first scored row
_ROWS = 64  # rows of logits held at once: 67 MB with a vocabulary of 262,144


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """`perplexity` and its standard error, over `scored_tokens` of `tokens` of the text.

    `top1_agreement` is the share of scored rows whose best token is that of another bundle, None without one.
    """

    perplexity: float
    standard_error: float
    tokens: int
    chunks: int
    scored_tokens: int
    seconds: float
    top1_agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Some consecutive rows of a chunk: logits float32 [n, V] and the ids int64 [n] that really follow."""

    chunk: int
    logits: np.ndarray
    following: np.ndarray


def read_text(path: Path) -> tuple[str, str]:
    """The text in a UTF-8 file and the SHA-256 of the file. Raises InputError when there is none."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8"), hashlib.sha256(data).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the text {path} cannot be read: {error}") from None


def text_ids(bundle: Bundle, text: str) -> np.ndarray:
    """The ids of `text` as it stands, int64 [tokens], one beginning-of-sequence token in front."""
    return PromptBuilder(bundle_tokenizer(bundle), bundle.manifest.prompt, None, None).raw(text).ids


def scored_rows(runtime: Runtime, ids: np.ndarray) -> Iterator[Scored]:
    """The scored rows of a text's ids, in slices. Raises InputError for texts and bundles that cannot be scored."""
    facts = runtime.manifest
    if "attention:prefix" in facts.requires:
        raise InputError(f"{facts.name}: the rows of its prompts see the rows after them, so no text can be scored")
    if facts.context < CHUNK:
        raise InputError(f"{facts.name}: its context of {facts.context} tokens does not hold a chunk of {CHUNK}")
    if len(ids) < CHUNK:
        raise InputError(f"the text has {len(ids)} tokens, perplexity needs at least {CHUNK}")
    for index in range(len(ids) // CHUNK):
        chunk = ids[index * CHUNK : (index + 1) * CHUNK].copy()
        chunk[0] = ids[0]
        session = runtime.session()
        session.prefill(chunk[:_FIRST])
        for start in range(_FIRST, CHUNK - 1, _ROWS):
            stop = min(start + _ROWS, CHUNK - 1)
            logits = session.reply_logits(chunk[start:stop])
            if not np.isfinite(logits).all():
                raise ModelOutputError(f"chunk {index}: the logits of rows {start} to {stop - 1} are not finite")
            yield Scored(index, logits, chunk[start + 1 : stop + 1])


def measure(runtime: Runtime, ids: np.ndarray) -> Perplexity:
    """The perplexity of a text's ids (see `text_ids`)."""
    return measure_all([runtime], [ids])[0]


def measure_all(runtimes: Sequence[Runtime], ids: Sequence[np.ndarray]) -> list[Perplexity]:
    """The perplexity of a text in several bundles, given its ids in each of them.

    Bundles with the same ids run side by side, and of each but the first is known how often its best token is that of
    the first.
    """
    if any(not np.array_equal(ids[0], others) for others in ids[1:]):
        return [measure(runtime, own) for runtime, own in zip(runtimes, ids, strict=True)]
    begin = time.perf_counter()
    found: list[list[np.ndarray]] = [[] for _ in runtimes]
    agreed: list[list[np.ndarray]] = [[] for _ in runtimes]
    for slices in zip(*(scored_rows(runtime, ids[0]) for runtime in runtimes), strict=True):
        first = slices[0].logits.argmax(-1)
        for own, agreements, rows in zip(found, agreed, slices, strict=True):
            own.append(losses(rows.logits, rows.following))
            agreements.append(rows.logits.argmax(-1) == first)
    seconds = time.perf_counter() - begin
    return [
        _summary(np.concatenate(own), len(ids[0]), seconds, np.concatenate(agreements) if index else None)
        for index, (own, agreements) in enumerate(zip(found, agreed, strict=True))
    ]


def _summary(found: np.ndarray, tokens: int, seconds: float, agreed: np.ndarray | None) -> Perplexity:
    perplexity = float(np.exp(found.mean()))
    return Perplexity(
        perplexity=perplexity,
        standard_error=perplexity * float(found.std(ddof=1) / np.sqrt(len(found))),
        tokens=tokens,
        chunks=tokens // CHUNK,
        scored_tokens=len(found),
        seconds=seconds,
        top1_agreement=None if agreed is None else float(agreed.mean()),
    )


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last axis of float32 logits; the sums are kept in float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, dtype=np.float64, keepdims=True)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def losses(logits: np.ndarray, following: np.ndarray) -> np.ndarray:
    """-log p of the ids that follow, float64 [n]."""
    largest = logits.max(-1)
    total = np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64)
    chosen = logits[np.arange(len(following)), following]
    return np.log(total) - (chosen.astype(np.float64) - largest)
