"""A reply as it is written on a terminal or into a pipe: the answer and calls on stdout, thoughts on stderr."""

from __future__ import annotations

import json
import sys
from typing import TextIO

from .reply import Chunk, Reply

__all__ = ["ReplyWriter", "remarks"]

# Whatever a model writes, a terminal gets no escape sequences from it.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class ReplyWriter:
    """Writes the chunks of one stream; with several candidates each has a heading."""

    def __init__(self, candidates: int = 1):
        self._candidates = candidates
        self._shown = 0  # candidates whose heading has been written
        self._inside_line = False  # of stdout
        self._called = False  # a call was the latest that was written
        self._thinking = False  # inside a line of stderr
        self._started = False

    def write(self, chunk: Chunk) -> None:
        self._started = True
        if self._candidates > 1 and chunk.candidate == self._shown:
            self._end_thought()
            self._out(f"{chr(10) if self._shown else ''}--- {self._shown + 1}\n")
            self._shown += 1
        if chunk.thought:
            self._put(sys.stderr, chunk.thought)
            self._thinking = True
        if chunk.text:
            self._end_thought()
            self._out(chunk.text)
        for call in chunk.tool_calls:
            self._end_thought()
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            self._out(f"{chr(10) if self._inside_line else ''}{call.name} {arguments}\n")
            self._called = True

    def end(self) -> None:
        """The stream is over, or has been left: ends the line."""
        self._end_thought()
        if self._started and not self._called:
            print(flush=True)

    def _out(self, text: str) -> None:
        self._put(sys.stdout, text)
        self._inside_line, self._called = not text.endswith("\n"), False

    def _put(self, file: TextIO, text: str) -> None:
        file.write(text.translate(_CONTROLS) if file.isatty() else text)
        file.flush()

    def _end_thought(self) -> None:
        if self._thinking:
            print(file=sys.stderr, flush=True)
            self._thinking = False


def remarks(reply: Reply) -> list[str]:
    """What is to be said about a reply that is not an answer, or not all of one."""
    found = []
    for candidate in reply.candidates:
        if not candidate.thought_finished:
            found.append(
                f"there is no answer: the reply ends inside of a thought ({candidate.finish_reason}, "
                f"{candidate.thought_tokens} tokens of thoughts); --max-tokens counts them too"
            )
        found += [f"a call that cannot be read: {call.reason}" for call in candidate.malformed_calls]
    return found
