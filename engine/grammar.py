"""Structured replies: a grammar says which tokens may come next. The grammars themselves are llguidance's.

    Grammar      what a request asks for: a JSON schema, a regular expression, a Lark grammar, or detections
    Constraints  what a bundle needs for it: its vocabulary as bytes; made once per engine
    Constraint   one grammar at one place of one reply

A grammar is about bytes. What a token adds to them is what it adds to the text of a reply (`text.token_bytes`), so a
reply that has been allowed token by token is text that the grammar accepts.

Grammars come from outside and are bounded: in size, by llguidance's limits for the work of one token, and by two checks
of what these limits do not see (see `_on_a_deep_stack` and `schema_checks`).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from .errors import GrammarError
from .schema_checks import check_numbers, patterns_beside_names
from .text import special_ids, token_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

__all__ = ["MAX_GRAMMAR_BYTES", "Constraint", "Constraints", "Grammar"]

MAX_GRAMMAR_BYTES = 65_536

_KINDS = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "Lark grammar", "detections": "format"}
# Python's own style of JSON and nothing else: without a choice of white space there is none to repeat for ever, and
# punctuation is forced. A schema can say otherwise in llguidance's "x-guidance".
_JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MAX_LEXER_STATES = 50_000  # about 100 MB
_STACK_BYTES = 256 * 2**20
_STACK_LOCK = threading.Lock()

_BOX_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "box_2d": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 1000},
                "minItems": 4,
                "maxItems": 4,
            },
            "label": {"type": "string", "minLength": 1, "maxLength": 200},
        },
        "required": ["box_2d", "label"],
        "additionalProperties": False,
    },
}
_LOCATIONS = 1024  # PaliGemma's <loc0000> to <loc1023>


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of a reply. Made by one of the class methods, which raise GrammarError for what cannot be one.

    `kind` is "json_schema", "regex", "lark" or "detections"; `source` is its text.
    """

    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise GrammarError(f"unknown kind of grammar {self.kind!r} (known: {', '.join(_KINDS)})")
        if not isinstance(self.source, str):
            raise GrammarError(f"a {_KINDS[self.kind]} is text, not {type(self.source).__name__}")
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError as error:
            raise GrammarError(f"the {_KINDS[self.kind]} is not valid Unicode at character {error.start}") from None
        if size > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"the {_KINDS[self.kind]} has {size} bytes, the limit is {MAX_GRAMMAR_BYTES}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that is valid by a schema, given as an object or as its text.

        It is written like `json.dumps` does, without further white space, unless the schema says otherwise in
        llguidance's "x-guidance". Keywords are those of llguidance; one that it knows and cannot hold to is an error.
        """
        if isinstance(schema, str):
            return cls("json_schema", schema)
        if not isinstance(schema, Mapping):
            raise GrammarError(f"a JSON schema is an object or its text, not {type(schema).__name__}")
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is no JSON: {error}") from None
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """The whole reply matches a regular expression, in the syntax of Rust's regex crate, without look-around."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """The reply is a sentence of a context-free grammar, in llguidance's variant of Lark's syntax."""
        return cls("lark", text)

    @classmethod
    def detections(cls) -> Grammar:
        """A list of labelled boxes, possibly empty, in the convention that the bundle was trained on."""
        return cls("detections")


class Constraints:
    """Turns grammars into constraints on the tokens of one bundle.

    Thread-safe. The first grammar pays for reading the vocabulary: one to two seconds for 262,144 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: Collection[int], boxes: str):
        """`tokenizer` must encode spellings of special tokens as text, or a forced text could become one of them.

        `vocabulary` is the width of a row of logits, `boxes` the box convention of the manifest.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._stop_ids = sorted(id for id in stop_ids if id < vocabulary)
        self._boxes = boxes
        self._lock = threading.Lock()
        self._adapter: LLTokenizer | None = None

    def compile(self, grammar: Grammar) -> Constraint:
        """The constraint at the beginning of a reply.

        Raises GrammarError for a grammar that is wrong, too large or too expensive, or that the bundle cannot follow;
        the message says where. Without the package llguidance that is an error too.
        """
        if not isinstance(grammar, Grammar):
            raise GrammarError(f"format is {grammar!r}, expected a Grammar")
        _require_llguidance()
        text = _as_llguidance(self._detections() if grammar.kind == "detections" else grammar)
        constraint = self._constraint(text, f"the {_KINDS[grammar.kind]}")
        if grammar.kind == "json_schema":
            self._check_patterns(json.loads(grammar.source))
        return constraint

    def _check_patterns(self, schema: Any) -> None:
        """Refuse "patternProperties" that no undeclared name matches: llguidance begins a pair there, and cannot go on.

        Whether one does is asked of llguidance itself: with an object of such a name and no other.
        """
        for names, pattern in patterns_beside_names(schema):
            properties = dict.fromkeys(names, False)
            others = {"properties": properties, "patternProperties": {pattern: True}, "additionalProperties": False}
            probe = Grammar.json_schema({"type": "object", **others, "minProperties": 1})
            try:
                constraint = self._constraint(_as_llguidance(probe), "the JSON schema")
                while forced := constraint.forced():
                    for id in forced:
                        constraint.accept(id)
                constraint.mask(())
            except GrammarError:
                raise GrammarError(
                    f"the JSON schema cannot be used: 'patternProperties' has {pattern[:80]!r}, which matches no name "
                    "that 'properties' does not have: declare those there only"
                ) from None

    def compile_calls(self, lark: str) -> Constraint:
        """The constraint of a grammar of `call_grammar`, which may be larger than those from outside."""
        _require_llguidance()
        from llguidance import LLMatcher

        return self._constraint(LLMatcher.grammar_from_lark(lark), "the grammar of the declared tools")

    def _constraint(self, text: str, name: str) -> Constraint:
        import llguidance

        limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        adapter = self._adapt()
        matcher = _on_a_deep_stack(lambda: llguidance.LLMatcher(adapter, text, log_level=0, limits=limits))
        if not matcher.is_error():
            matcher.compute_bitmask()  # that nothing at all is allowed shows only here
        if matcher.is_error():
            raise GrammarError(f"{name} cannot be used: {_message(matcher)}")
        return Constraint(matcher, adapter)

    def _adapt(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._adapter is None:
                wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocabulary, self._stop_ids))
                self._adapter = LLTokenizer(wrapper, n_vocab=self._vocabulary, eos_token=self._stop_ids or None)
            return self._adapter

    def _detections(self) -> Grammar:
        if self._boxes == "box_2d":
            return Grammar.json_schema(_BOX_SCHEMA)
        if self._boxes != "loc":
            raise GrammarError("the model of this bundle answers without boxes, there is no format for detections")
        ids = [self._tokenizer.token_to_id(f"<loc{index:04}>") for index in range(_LOCATIONS)]
        first = ids[0]
        if first is None or ids != list(range(first, first + _LOCATIONS)):
            raise GrammarError("the tokenizer of this bundle does not have <loc0000> to <loc1023>, one after the other")
        place = f"<[{first}-{first + _LOCATIONS - 1}]>"
        # A label ends at its separator, so the two are one terminal.
        return Grammar.lark(
            "start: (more* last)?\n"
            "more: box MORE\n"
            "last: box LAST\n"
            f"box: {place} {place} {place} {place}\n"
            "MORE: /( [^ ;<\\n]+)+ ; /\n"
            "LAST: /( [^ ;<\\n]+)+/"
        )


class Constraint:
    """What a grammar allows at one place of one reply. Not shared between threads."""

    def __init__(self, matcher: LLMatcher, adapter: LLTokenizer):
        self._matcher = matcher
        self._adapter = adapter
        self._accepted = 0

    def copy(self) -> Constraint:
        """The same place, going on independently."""
        other = Constraint(self._matcher.deep_copy(), self._adapter)
        other._accepted = self._accepted
        return other

    @property
    def complete(self) -> bool:
        """Whether the reply may end here."""
        return self._matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """Whether the reply must end here."""
        return self._matcher.is_stopped()

    def mask(self, stop_ids: Collection[int]) -> np.ndarray:
        """The tokens that may come next: uint8, one bit per token, lowest bit first.

        Where the reply may end, `stop_ids` are among them. Raises GrammarError when the grammar has become too
        expensive.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8).copy()
        self._check()
        if self.complete:
            for id in stop_ids:
                if id // 8 < bits.size:  # one beyond the vocabulary cannot be drawn anyway
                    bits[id // 8] |= 1 << id % 8
        return bits

    def forced(self) -> list[int]:
        """The tokens that must come next, [] where there is a choice or nothing more to come.

        Their text is forced; of its spellings in tokens they are the one that the tokenizer gives, which is what a
        model expects to read.
        """
        if self.ended:
            return []
        ids = self._matcher.compute_ff_tokens()
        self._check()
        return ids[: self._matcher.validate_tokens(ids)] if ids else []

    def accept(self, id: int) -> None:
        """The token has joined the reply. Raises GrammarError if it is not allowed."""
        self._matcher.consume_token(id)
        self._check()
        self._accepted += 1

    def matches(self, text: str) -> bool:
        """Whether a whole text is one that the grammar accepts."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        ids = self._adapter.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot go on after {self._accepted} tokens: {_message(self._matcher)}")


class _Vocabulary:
    """A bundle's tokenizer as llguidance's TokenizerWrapper reads it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: list[int]):
        self._tokenizer = tokenizer
        special = special_ids(tokenizer)
        self.eos_token_id = stop_ids[0] if stop_ids else 0
        self.bos_token_id = None
        self.special_token_ids = sorted(id for id in special if id < vocabulary)
        # A special token has its name, by which a Lark grammar can ask for it.
        self.tokens = [
            (tokenizer.id_to_token(id) or "").encode() if id in special else token_bytes(tokenizer, id)
            for id in range(vocabulary)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        string = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(string, add_special_tokens=False).ids


def _require_llguidance() -> None:
    try:
        import llguidance  # noqa: F401
    except ModuleNotFoundError:
        raise GrammarError("structured replies need the package 'llguidance': pip install 'siglance[json]'") from None


def _as_llguidance(grammar: Grammar) -> str:
    """The grammar in llguidance's notation. Raises GrammarError for what can be told without it."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "lark":
        for schema in _inline_schemas(grammar.source):
            check_numbers(schema)
        return LLMatcher.grammar_from_lark(grammar.source)
    schema = _parse_json("JSON schema", grammar.source)
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema is an object, not {grammar.source.strip()[:40]!r}")
    check_numbers(schema)
    try:
        return LLMatcher.grammar_from_json_schema(grammar.source, defaults=_JSON_STYLE)
    except ValueError as error:
        raise GrammarError(f"the JSON schema cannot be used: {error}") from None


def _parse_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        raise GrammarError(f"the {name} is no JSON: {error}") from None


def _inline_schemas(lark: str) -> Iterator[Any]:
    """The JSON schemas inside a Lark grammar, written `%json {...}`."""
    for directive in re.finditer(r"%json\s*(?=\{)", lark):
        try:
            yield json.JSONDecoder().raw_decode(lark, directive.end())[0]
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"%json at character {directive.start()} of the Lark grammar: {error}") from None


def _on_a_deep_stack(compile: Callable[[], LLMatcher]) -> LLMatcher:
    """Call `compile` in a thread with room for the recursion that a grammar of the largest size can cause.

    llguidance follows references from rule to rule recursively, up to 20 kB deep each time; on a usual stack of 8 MB a
    chain of a thousand references would end the process. The memory is touched, and so taken, only as far as needed.
    """
    results: list[LLMatcher] = []
    with _STACK_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=lambda: results.append(compile()), name="siglance-grammar")
            thread.start()
        except RuntimeError as error:
            raise GrammarError(f"the grammar cannot be read: no memory for a stack of {_STACK_BYTES} bytes") from error
        finally:
            threading.stack_size(before)
    thread.join()
    if not results:  # the thread has reported what went wrong
        raise GrammarError("the grammar cannot be read: llguidance failed")
    return results[0]


def _message(matcher: LLMatcher) -> str:
    text = matcher.get_error().replace("<non-verbose/>", "").strip()
    return "it allows no text" if text == "NoExtensionBias" else text
