"""From the logits behind a prompt to a finished reply: sampling, grammar, text and stops, token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .boxes import Boxes
from .errors import InputError, SamplingError
from .grammar import Constraint, Grammar
from .logprobs import MAX_LOGPROBS, Logprob, logprob
from .manifest import Manifest
from .reply import Candidate, Chunk, StageClock
from .sampling import Effective, Sampler, Sampling, check_token_ids, resolve
from .text import TextStream, check_stop

__all__ = ["MAX_CANDIDATES", "Decoding", "Rules", "check_positive", "make_rules"]

MAX_CANDIDATES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a request says about its reply, checked and complete. `stop_ids` are the bundle's and the request's."""

    effective: Effective
    max_tokens: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    candidates: int
    logprobs: int | None
    constraint: Constraint | None


def make_rules(
    manifest: Manifest,
    vocabulary: int,
    compile_grammar: Callable[[Grammar], Constraint],
    *,
    sampling: Sampling | None,
    max_tokens: int,
    stop: str | Sequence[str],
    stop_ids: Collection[int],
    format: Grammar | None,
    candidates: int,
    logprobs: int | None,
) -> Rules:
    """The rules of a request to a bundle whose rows of logits are `vocabulary` wide.

    Raises InputError (SamplingError, PromptError, GrammarError) for whatever cannot be used; nothing has run then.
    """
    effective = resolve(sampling or Sampling(), manifest.sampling)
    check_token_ids("logit_bias", effective.logit_bias.keys(), vocabulary)
    check_positive("max_tokens", max_tokens)
    _check_range("candidates", candidates, 1, MAX_CANDIDATES)
    if logprobs is not None:
        _check_range("logprobs", logprobs, 0, MAX_LOGPROBS)
    return Rules(
        effective=effective,
        max_tokens=max_tokens,
        stop=check_stop(stop),
        stop_ids=check_token_ids("stop_ids", stop_ids, vocabulary) | set(manifest.stop_ids),
        candidates=candidates,
        logprobs=logprobs,
        constraint=None if format is None else compile_grammar(format),
    )


class Decoding:
    """One candidate as it is written."""

    def __init__(
        self,
        rules: Rules,
        index: int,
        *,
        tokenizer: Tokenizer,
        hidden_ids: Collection[int],
        penalised_ids: Collection[int],
        context: int,
        clock: StageClock,
    ):
        """`hidden_ids` are not text; `penalised_ids` are the tokens of the prompt that the penalties count."""
        self._rules = rules
        self._index = index
        self._tokenizer = tokenizer
        self._context = context
        self._clock = clock
        self._effective = rules.effective.of_candidate(index)
        self._sampler = Sampler(self._effective, penalised_ids)
        self._constraint = None if rules.constraint is None else rules.constraint.copy()
        self._text = TextStream(tokenizer, rules.stop, hidden_ids)
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[Logprob] = []
        self._drawn = 0  # of the ids, the others are forced
        self._given = 0  # ids that have been given out

    def run(
        self,
        logits: np.ndarray,
        length: int,
        extend: Callable[[Sequence[int]], np.ndarray],
        read_boxes: Callable[[str], Boxes],
    ) -> Generator[Chunk, None, tuple[Candidate, Chunk]]:
        """Write the reply.

        Args:
            logits: what follows the prompt, float32 [V].
            length: tokens in the state, the prompt's.
            extend: runs tokens of the reply and gives the logits that follow them.
            read_boxes: finds the boxes in a text.

        Yields the pieces of the text as they become certain; returns the candidate and the last piece.
        """
        finish: str | None = None
        while finish is None:
            waiting: list[int] = []  # part of the reply, but not of the state
            ids = self._forced() or [self._draw(logits)]
            while ids and finish is None:
                id = ids.pop(0)
                finish = self._take(id, logits, length + len(waiting))
                waiting.append(id)
                if self._pieces[-1]:
                    yield self._chunk()
                # Tokens that are forced behind a drawn one join its run. Log-probabilities need each token's own run.
                ids = (ids or self._forced()) if finish is None and self._rules.logprobs is None else []
            if finish is None:
                logits = extend(waiting)
                length += len(waiting)
        return self._finish(finish, read_boxes)

    def _draw(self, logits: np.ndarray) -> int:
        mask = None if self._constraint is None else self._constraint.mask(self._rules.stop_ids)
        id = self._sampler(logits, mask)
        self._drawn += id not in self._rules.stop_ids
        return id

    def _forced(self) -> list[int]:
        return [] if self._constraint is None else self._constraint.forced()

    def _take(self, id: int, logits: np.ndarray, position: int) -> str | None:
        """Let a token join the reply, at `position` of the sequence; returns why the reply ends with it, if it does."""
        rules = self._rules
        self._clock.token()
        if id in rules.stop_ids:
            self._pieces.append("")
            return "stop_id"
        self._ids.append(id)
        if rules.logprobs is not None:
            self._logprobs.append(logprob(self._tokenizer, logits, id, rules.logprobs))
        self._sampler.add(id)
        if self._constraint is not None:
            self._constraint.accept(id)
        self._pieces.append(self._text.push(id))
        if self._text.stopped:
            return "stop_text"
        if self._constraint is not None and self._constraint.ended:
            return "stop_id"
        if len(self._ids) == rules.max_tokens:
            return "length"
        return "context" if position == self._context else None

    def _chunk(self) -> Chunk:
        """The latest piece, with the ids since the one before it."""
        new = slice(self._given, len(self._ids))
        self._given = len(self._ids)
        return Chunk(
            self._pieces[-1], tuple(self._ids[new]), candidate=self._index, logprobs=tuple(self._logprobs[new])
        )

    def _finish(self, finish: str, read_boxes: Callable[[str], Boxes]) -> tuple[Candidate, Chunk]:
        self._pieces.append(self._text.finish())
        if self._text.stopped:  # also where the end decides between stop strings
            finish = "stop_text"
        text = "".join(self._pieces)
        found = read_boxes(text)
        candidate = Candidate(
            text=text,
            token_ids=tuple(self._ids),
            finish_reason=finish,
            boxes=found.boxes,
            truncated=found.truncated or not self._is_complete(finish, text),
            logprobs=None if self._rules.logprobs is None else tuple(self._logprobs),
            forced_tokens=len(self._ids) - self._drawn,
            seed=self._effective.seed,
        )
        return candidate, self._chunk()

    def _is_complete(self, finish: str, text: str) -> bool:
        """Whether the text is all that its grammar demands."""
        if self._constraint is None:
            return True
        # A stop string has cut the text somewhere before the place where the grammar is.
        return self._constraint.matches(text) if finish == "stop_text" else self._constraint.complete


def check_positive(name: str, value: object) -> None:
    """Raise InputError unless `value` is an integer of at least 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}, it must be an integer of at least 1")


def _check_range(name: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not lowest <= value <= highest:
        raise SamplingError(f"{name} is {value!r}, expected an integer between {lowest} and {highest}")
