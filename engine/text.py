"""Token ids to text, as it becomes certain.

The text of a reply is defined without any streaming: decode its ids at once, the ids that are not text left out and an
unfinished last character dropped, and cut before the earliest match of a stop string. `TextStream` delivers exactly
that, piece by piece.

Byte tokens are what makes this more than a loop. Tokenizers with byte fallback spell rare characters as tokens
`<0xF0>`, `<0x9F>`, ..., and their decoder judges each *run* of byte tokens as a whole: valid UTF-8 becomes its text,
anything else becomes one U+FFFD per byte. So the text of a run is certain when the run ends, or as soon as it cannot
become valid any more.
"""

from __future__ import annotations

import bisect
import codecs
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from .errors import BundleError, PromptError

__all__ = ["TextStream", "check_stop", "load_tokenizer", "special_ids", "token_bytes"]

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# Words with a space in front, punctuation that some decoders glue to them, characters that few vocabularies have.
_PROBE = " a b . it 's é \U0001fae0"


def load_tokenizer(path: Path, text_tokens: Collection[str] = (), control_tokens: Collection[str] = ()) -> Tokenizer:
    """Read a tokenizer.json. Those of `text_tokens` that it knows become tokens that are written and read as text.

    Special tokens would be no part of replies and could not be written in prompts; tokens of the vocabulary that are
    not among the added tokens would be spelled out in characters. Those of `control_tokens` that it knows become
    special tokens, whatever the file calls them. Raises BundleError when the file cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
        added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        if any(added.get(name) for name in text_tokens) or not all(added.get(name, True) for name in control_tokens):
            facts = json.loads(path.read_text(encoding="utf-8"))
            for token in facts["added_tokens"]:
                control = token["content"] in control_tokens
                token["special"] = control or (token["special"] and token["content"] not in text_tokens)
                token["normalized"] = token["normalized"] and not control
            tokenizer = Tokenizer.from_str(json.dumps(facts))
        missing = [name for name in text_tokens if name not in added and tokenizer.token_to_id(name) is not None]
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in missing])
        missing = [name for name in control_tokens if name not in added and tokenizer.token_to_id(name) is not None]
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in missing])
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path.name} cannot be read: {error}") from None
    _check_decoder(tokenizer, path.name)
    return tokenizer


def _check_decoder(tokenizer: Tokenizer, name: str) -> None:
    """Raise BundleError unless a text is the texts of its tokens one after another, which streams rely on.

    It is not where a decoder drops or adds spaces by what stands in front (Metaspace, Strip, WordPiece), nor where
    tokens hold parts of characters without being byte tokens (ByteLevel).
    """
    ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    stream = TextStream(tokenizer, hidden_ids=())
    streamed = "".join(map(stream.push, ids)) + stream.finish()
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    if streamed != whole:
        raise BundleError(f"{name}: its decoder reads {whole!r} as a whole and {streamed!r} token by token")


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of all added tokens that the tokenizer marks as special."""
    return frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """What a token that is text adds to the text of a reply, in UTF-8; a byte token may add part of a character.

    b"" for an id without a token, and for the byte 0xFF, which no UTF-8 has.
    """
    token = tokenizer.id_to_token(id)
    if token is None:
        return b""
    byte = _byte_value(token)
    if byte is not None:
        return bytes([byte]) if byte != 0xFF else b""
    return tokenizer.decode([id], skip_special_tokens=False).encode()


def check_stop(stop: object) -> tuple[str, ...]:
    """Stop strings in one form. Raises PromptError for an empty one, or for anything but strings of valid Unicode."""
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, Sequence):
        raise PromptError(f"stop is {stop!r}, expected a string or a list of strings")
    for index, string in enumerate(stop):
        if not isinstance(string, str) or not string:
            raise PromptError(f"stop string {index} is {string!r}, expected text that is not empty")
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"stop string {index}: not valid Unicode at character {error.start}") from None
    return tuple(stop)


class TextStream:
    """The text of one reply, from its ids.

    `stop` are strings that end the text just before them; of several matches in the text the earliest start counts.
    `hidden_ids` are ids that are not text (None: all special tokens); they do not interrupt a run of byte tokens.
    Raises PromptError for an empty stop string, or for anything but strings.

    Law: for any ids, the joined results of `push` and `finish` equal the text of the reply as defined above. What is
    held back between calls is the current run of byte tokens and the tail that is a proper prefix of a stop string.
    The cost of a token does not grow with the length of the reply.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), hidden_ids: Collection[int] | None = None):
        self._tokenizer = tokenizer
        self._hidden = special_ids(tokenizer) if hidden_ids is None else frozenset(hidden_ids)
        self._run = _ByteRun()
        self._matcher = _StopMatcher(check_stop(stop))

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text; further ids give no text."""
        return self._matcher.matched is not None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    def push(self, id: int) -> str:
        """Add the next id; returns the text that has become certain, often "" or several characters."""
        if id in self._hidden or self.stopped:
            return ""
        token = self._tokenizer.id_to_token(id)
        if token is None:  # a padded row of the vocabulary: decoders skip it
            return ""
        byte = _byte_value(token)
        if byte is not None:
            return self._matcher.push(self._run.push(byte))
        return self._matcher.push(self._run.end() + self._tokenizer.decode([id], skip_special_tokens=False))

    def insert(self, text: str) -> str:
        """Add text that no ids spell, such as what a call that cannot be read looks like."""
        if self.stopped:
            return ""
        return self._matcher.push(self._run.end() + text)

    def finish(self) -> str:
        """The reply is over: returns the held-back tail, without an unfinished last character."""
        if self.stopped:
            return ""
        return self._matcher.push(self._run.end(drop_unfinished=True)) + self._matcher.finish()


def _byte_value(token: str) -> int | None:
    """The byte that a token like `<0x0A>` stands for, by the rule of the ByteFallback decoder."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


class _ByteRun:
    """A run of byte tokens, and how much of its text has been given out.

    While the bytes can still become valid UTF-8 nothing is certain: one wrong byte later turns the whole run into
    U+FFFD. Once they cannot, all are U+FFFD, except that the start of a character at the very end of the reply is
    dropped, so at most three bytes are held back.
    """

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._bytes = bytearray()
        self._given = 0  # U+FFFD given out
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # None once the bytes cannot become valid

    def push(self, byte: int) -> str:
        """Add a byte; returns the text that is now certain."""
        self._bytes.append(byte)
        if self._decoder is not None:
            try:
                self._decoder.decode(bytes([byte]))
            except UnicodeDecodeError:
                self._decoder = None
        return "" if self._decoder is not None else self._replacements(len(self._bytes) - self._unfinished())

    def end(self, drop_unfinished: bool = False) -> str:
        """The rest of the run's text; afterwards a new run begins."""
        size = len(self._bytes) - (self._unfinished() if drop_unfinished else 0)
        try:
            text = self._bytes[:size].decode() if self._decoder is not None else self._replacements(size)
        except UnicodeDecodeError:  # the run ends inside a character
            text = self._replacements(size)
        self._start_over()
        return text

    def _replacements(self, size: int) -> str:
        """U+FFFD for the first `size` bytes, without those given out before."""
        new = size - self._given
        self._given = size
        return _REPLACEMENT * new

    def _unfinished(self) -> int:
        """How many bytes at the end, 0 to 3, are the start of a UTF-8 character that more bytes could complete."""
        for count in (3, 2, 1):
            tail = bytes(self._bytes[-count:])
            if len(tail) == count and _begins_character(tail):
                return count
        return 0


def _begins_character(tail: bytes) -> bool:
    """Whether `tail` is the start, and not the whole, of exactly one UTF-8 character."""
    try:
        tail.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


class _StopMatcher:
    """Cuts a text, given in pieces, before the earliest match of any stop string.

    The earliest match is the one that starts first. So when a stop string is complete while a longer one that began
    before it is still possible, the decision waits for more text.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = sorted(set(stop), key=len)  # of two that match at one place, the shorter is complete first
        self._longest = len(self._stop[-1]) if self._stop else 0
        self._ordered = sorted(self._stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what is certain to come before any match."""
        if not text or self.matched is not None:
            return ""
        self._held += text
        match = self._first_match()
        open_at = self._first_open()
        if match is not None and match[0] <= open_at:
            return self._cut(*match)
        certain, self._held = self._held[:open_at], self._held[open_at:]
        return certain

    def finish(self) -> str:
        """No more text will come: returns the held tail, up to a match that was waiting."""
        match = self._first_match() if self.matched is None else None
        if match is not None:
            return self._cut(*match)
        rest, self._held = self._held, ""
        return rest

    def _cut(self, start: int, string: str) -> str:
        self.matched = string
        certain, self._held = self._held[:start], ""
        return certain

    def _first_match(self) -> tuple[int, str] | None:
        found = [(start, string) for string in self._stop if (start := self._held.find(string)) >= 0]
        return min(found, key=lambda match: match[0], default=None)  # `min` keeps the first, the shortest

    def _first_open(self) -> int:
        """Where the earliest tail begins that is a prefix of a stop string; the length if there is none.

        Of a whole stop string too, but then the match is found there and goes first.
        """
        size = len(self._held)
        for start in range(max(0, size - self._longest + 1), size):
            tail = self._held[start:]
            # Strings that begin with the tail stand together in order, from where the tail itself would stand.
            at = bisect.bisect_left(self._ordered, tail)
            if at < len(self._ordered) and self._ordered[at].startswith(tail):
                return start
        return size
