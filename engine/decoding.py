"""From the logits behind a prompt to a finished reply: sampling, grammar, text and stops, token by token.

Stops and the form are for the answer. What the model thinks before it, and the calls of tools that it writes, end with
their own markers or with the bundle's own stop ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .boxes import Boxes
from .calls import CallRules, ToolChoice, make_call_rules
from .encoder_inputs import PreparedPrompt
from .errors import InputError, SamplingError
from .grammar import Constraint, Constraints, Grammar
from .guide import Guide
from .logprobs import MAX_LOGPROBS, Logprob, logprob
from .manifest import Manifest
from .preprocessing import count_by_modality
from .reply import Candidate, Chunk, Reply, StageClock, Usage
from .runtime import Runtime
from .sampling import Effective, Sampler, Sampling, check_token_ids, resolve
from .text import check_stop
from .thinking import Markers, Piece, ReplyParts
from .tools import ToolLike

__all__ = ["MAX_CANDIDATES", "Decoding", "Rules", "check_positive", "make_reply", "make_rules"]

MAX_CANDIDATES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a request says about its reply, checked and complete.

    `stop_ids` are the bundle's, which end a reply anywhere, and the request's, which are for the answer.
    """

    effective: Effective
    max_tokens: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    bundle_stop_ids: frozenset[int]
    candidates: int
    logprobs: int | None
    constraint: Constraint | None
    calls: CallRules
    thinking: bool


def make_rules(
    manifest: Manifest,
    vocabulary: int,
    constraints: Constraints,
    markers: Markers,
    *,
    sampling: Sampling | None,
    max_tokens: int,
    stop: str | Sequence[str],
    stop_ids: Collection[int],
    format: Grammar | None,
    candidates: int,
    logprobs: int | None,
    tools: Sequence[ToolLike],
    tool_choice: ToolChoice,
    parallel_tool_calls: bool,
    thinking: bool,
) -> Rules:
    """The rules of a request to a bundle whose rows of logits are `vocabulary` wide.

    `thinking` says that the model is asked to think before it answers.

    Raises InputError (SamplingError, PromptError, GrammarError) for whatever cannot be used; nothing has run then.
    """
    effective = resolve(sampling or Sampling(), manifest.sampling)
    check_token_ids("logit_bias", effective.logit_bias.keys(), vocabulary)
    check_positive("max_tokens", max_tokens)
    _check_range("candidates", candidates, 1, MAX_CANDIDATES)
    if logprobs is not None:
        _check_range("logprobs", logprobs, 0, MAX_LOGPROBS)
    calls = make_call_rules(tools, tool_choice, parallel_tool_calls, constraints, markers)
    if calls.required and format is not None:
        raise InputError(f"format and tool_choice {tool_choice!r} exclude each other: a reply of calls has no answer")
    return Rules(
        effective=effective,
        max_tokens=max_tokens,
        stop=check_stop(stop),
        stop_ids=check_token_ids("stop_ids", stop_ids, vocabulary) | set(manifest.stop_ids),
        bundle_stop_ids=frozenset(manifest.stop_ids),
        candidates=candidates,
        logprobs=logprobs,
        constraint=None if format is None else constraints.compile(format),
        calls=calls,
        thinking=thinking,
    )


class Decoding:
    """One candidate as it is written."""

    def __init__(
        self,
        rules: Rules,
        index: int,
        *,
        tokenizer: Tokenizer,
        markers: Markers,
        hidden_ids: Collection[int],
        prompt_ids: np.ndarray,
        penalised_ids: Collection[int],
        context: int,
        clock: StageClock,
    ):
        """`hidden_ids` are not text; `penalised_ids` are the tokens of the prompt that the penalties count."""
        self._rules = rules
        # A stop string may be the name of a token that is not text; the answer ends with it all the same.
        named = {tokenizer.token_to_id(string) for string in rules.stop} & set(hidden_ids)
        self._answer_stop_ids = rules.stop_ids | {id for id in named if id is not None}
        self._index = index
        self._tokenizer = tokenizer
        self._context = context
        self._clock = clock
        self._effective = rules.effective.of_candidate(index)
        self._sampler = Sampler(self._effective, penalised_ids)
        begun = markers.open_thought(prompt_ids, rules.bundle_stop_ids)
        held = rules.calls.constraint is not None
        self._parts = ReplyParts(tokenizer, markers, rules.stop, hidden_ids, begun, held_calls=held)
        self._guide = Guide(rules.constraint, rules.calls, markers, self._parts, thinking=rules.thinking)
        self._ids: list[int] = []
        self._pieces: list[Piece] = []
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
            ids = self._guide.forced() or [self._draw(logits)]
            while ids and finish is None:
                id = ids.pop(0)
                finish = self._take(id, logits, length + len(waiting))
                waiting.append(id)
                if any(self._pieces[-1]):
                    yield self._chunk()
                # Tokens that are forced behind a drawn one join its run. Log-probabilities need each token's own run.
                ids = (ids or self._guide.forced()) if finish is None and self._rules.logprobs is None else []
            if finish is None:
                logits = extend(waiting)
                length += len(waiting)
        return self._finish(finish, read_boxes)

    def _draw(self, logits: np.ndarray) -> int:
        id = self._sampler(logits, self._guide.mask(logits.size, self._stop_ids))
        self._drawn += id not in self._stop_ids
        return id

    @property
    def _stop_ids(self) -> frozenset[int]:
        """What ends the reply here."""
        return self._answer_stop_ids if self._parts.in_answer else self._rules.bundle_stop_ids

    def _take(self, id: int, logits: np.ndarray, position: int) -> str | None:
        """Let a token join the reply, at `position` of the sequence; returns why the reply ends with it, if it does."""
        rules = self._rules
        self._clock.token()
        if id in self._stop_ids:
            self._pieces.append(Piece())
            return "stop_id"
        self._ids.append(id)
        if rules.logprobs is not None:
            self._logprobs.append(logprob(self._tokenizer, logits, id, rules.logprobs))
        self._sampler.add(id)
        self._guide.follow(id)
        self._pieces.append(self._parts.push(id))
        if self._parts.stopped:
            return "stop_text"
        if self._guide.ended:
            return "stop_id"
        if len(self._ids) == rules.max_tokens:
            return "length"
        return "context" if position == self._context else None

    def _chunk(self) -> Chunk:
        """The latest piece, with the ids since the one before it."""
        new = slice(self._given, len(self._ids))
        self._given = len(self._ids)
        piece = self._pieces[-1]
        return Chunk(
            piece.text,
            tuple(self._ids[new]),
            candidate=self._index,
            logprobs=tuple(self._logprobs[new]),
            thought=piece.thought,
            tool_calls=piece.calls,
        )

    def _finish(self, finish: str, read_boxes: Callable[[str], Boxes]) -> tuple[Candidate, Chunk]:
        parts = self._parts
        self._pieces.append(parts.finish())
        if parts.stopped:  # also where the end decides between stop strings
            finish = "stop_text"
        text = "".join(piece.text for piece in self._pieces)
        found = read_boxes(text)
        complete = self._guide.is_complete(text, cut=finish == "stop_text")
        candidate = Candidate(
            text=text,
            token_ids=tuple(self._ids),
            finish_reason=finish,
            boxes=found.boxes,
            truncated=found.truncated or not parts.in_answer or not complete,
            logprobs=None if self._rules.logprobs is None else tuple(self._logprobs),
            forced_tokens=len(self._ids) - self._drawn,
            seed=self._effective.seed,
            thought="".join(piece.thought for piece in self._pieces),
            thought_finished=not parts.in_thought,
            thought_tokens=parts.thought_tokens,
            tool_calls=tuple(parts.calls),
            malformed_calls=tuple(parts.malformed),
        )
        return candidate, self._chunk()


def make_reply(
    candidates: Sequence[Candidate],
    prepared: PreparedPrompt,
    rules: Rules,
    clock: StageClock,
    cached: int,
    runtime: Runtime,
) -> Reply:
    """The whole reply to a prompt of which `cached` tokens were in a state that an earlier request had left."""
    return Reply(
        candidates=tuple(candidates),
        prompt_token_ids=tuple(prepared.prompt.ids.tolist()),
        usage=Usage(
            prompt_tokens=len(prepared.prompt.ids),
            completion_tokens=sum(len(candidate.token_ids) for candidate in candidates),
            forced_tokens=sum(candidate.forced_tokens for candidate in candidates),
            thought_tokens=sum(candidate.thought_tokens for candidate in candidates),
            by_modality=count_by_modality(prepared.prompt, prepared.media),
            cached_tokens=cached,
        ),
        timings=clock.timings(),
        sampling=rules.effective,
        device=str(runtime.device),
        providers=runtime.providers,
    )


def check_positive(name: str, value: object) -> None:
    """Raise InputError unless `value` is an integer of at least 1."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}, it must be an integer of at least 1")


def _check_range(name: str, value: object, lowest: int, highest: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not lowest <= value <= highest:
        raise SamplingError(f"{name} is {value!r}, expected an integer between {lowest} and {highest}")
