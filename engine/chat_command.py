"""The prompt loop of `siglance chat`: lines in, replies on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from . import output
from .attachments import named_files
from .chat import Chat
from .engine import Engine
from .errors import ContextFull, InputError, SiglanceError
from .parts import Audio, Image, Pdf, Video, turns_of
from .prompt import Text
from .reply import Chunk, Reply
from .reply_writer import ReplyWriter, remarks
from .tools import ToolResult

__all__ = ["HELP", "converse"]

HELP = """\
/image FILE[@BUDGET]  show a picture, video, sound or PDF with the next message; the path of a file alone does the same
/result VALUE         what a function that the model called has returned: JSON, or text; one for each call, in order
/reset                forget the conversation
/save FILE            write the conversation as JSON
/help                 this list
/quit                 end; so does Ctrl-D
//...                 a message that begins with a slash
Ctrl-C stops a reply; a turn that is stopped or fails is not kept."""

_PROMPT = "> "


def converse(engine: Engine, chat: Chat, *, name: str, attach: Callable[[str], Image | Pdf | Video | Audio]) -> None:
    """Talk until the input ends.

    Args:
        engine: what the chat belongs to.
        chat: the conversation.
        name: what a saved conversation says it was held with.
        attach: turns FILE[@BUDGET] into a part.
    """
    loop = _Loop(engine, chat, name, attach)
    interactive = sys.stdin.isatty()
    if interactive:
        loop.note(f"{name}, {engine.runtime.device}. /help lists the commands.")
    for line in _lines(interactive):
        try:
            loop.handle(line)
        except SiglanceError as error:
            loop.note(" ".join(str(error).split()), style="red")
        except EOFError:
            return


def _lines(interactive: bool) -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A file name may be no valid text; a message that is not is refused like any other. What is piped in is UTF-8,
        # whatever the locale says about terminals.
        sys.stdin.reconfigure(encoding=None if interactive else "utf-8", errors="surrogateescape")
    if not interactive:
        lines = (line.rstrip("\r\n") for line in sys.stdin)
        yield next(lines, "").removeprefix("\ufeff")  # Windows puts this mark in front of UTF-8
        yield from lines
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited and called back)
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


class _Loop:
    """The conversation of one run of the program."""

    def __init__(self, engine: Engine, chat: Chat, name: str, attach: Callable[[str], Image | Pdf | Video | Audio]):
        self._engine = engine
        self._chat = chat
        self._name = name
        self._attach = attach
        self._attached: list[tuple[Image | Pdf | Video | Audio, str]] = []
        self._sees = False  # something has been attached since the beginning or /reset
        self._turns: list[dict[str, Any]] = []  # what /save writes
        self._calls: list[str] = []  # functions whose results the model waits for
        self._results: list[ToolResult] = []  # those that are there
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/result": self._result,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
            "/quit": self._quit,
        }

    def note(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style)

    def handle(self, line: str) -> None:
        """One line of input. Raises SiglanceError, and EOFError to end the program."""
        line = line.strip()
        if line.startswith("/") and not line.startswith("//") and not _is_file(line):
            command, _, argument = line.partition(" ")
            if command not in self._commands:
                raise InputError(f"there is no command {command}; /help lists them, and //... is a message")
            self._commands[command](argument.strip())
        elif _is_file(line):
            self._image(line)
        elif line:
            self._say(line[1:] if line.startswith("//") else line)

    def _say(self, text: str) -> None:
        if self._calls:
            raise InputError(f"{self._waiting()}; /reset forgets the conversation")
        for name in [] if self._sees else named_files(text):
            self.note(f"the model does not see the file {name}: /image {name} shows it")
        reply = self._write(self._chat.stream([*(part for part, _ in self._attached), Text(text)]))
        if reply is not None:
            shown = [{"type": "image", "source": source} for _, source in self._attached]
            self._attached = []
            self._keep({"role": "user", "content": [*shown, {"type": "text", "text": text}]}, reply)

    def _result(self, argument: str) -> None:
        if not self._calls:
            raise InputError("/result: the model waits for no result")
        if not argument:
            raise InputError("/result needs a value, JSON or text")
        try:
            value = json.loads(argument)
        except (ValueError, RecursionError):
            value = argument
        self._results.append(ToolResult(self._calls[len(self._results)], value))
        if len(self._results) < len(self._calls):
            self.note(self._waiting())
            return
        results, self._results = self._results, []
        reply = self._write(self._chat.stream(results))
        if reply is not None:
            said = [{"name": result.name, "result": result.result} for result in results]
            self._keep({"role": "tool", "results": said}, reply)

    def _write(self, stream: Generator[Chunk, None, None]) -> Reply | None:
        """Write a reply as it comes; None if it was stopped."""
        writer = ReplyWriter()
        reply: Reply | None = None
        try:
            for chunk in stream:
                writer.write(chunk)
                reply = chunk.reply
        except KeyboardInterrupt:
            stream.close()
        finally:
            writer.end()
        if reply is None:
            self.note("stopped, this turn is not kept")
        return reply

    def _keep(self, said: dict[str, Any], reply: Reply) -> None:
        """A turn is over."""
        answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": reply.text}]}
        if reply.tool_calls:
            answer["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in reply.tool_calls]
        self._turns += [said, answer]
        self._calls = [call.name for call in reply.tool_calls]
        for remark in remarks(reply):
            self.note(remark)
        self.note(_summary(reply))
        if self._calls:
            self.note(self._waiting())

    def _waiting(self) -> str:
        return f"the model waits for what {self._calls[len(self._results)]} returns: /result VALUE"

    def _image(self, argument: str) -> None:
        source = _as_path(argument)
        if not source:
            raise InputError("/image needs the path of a file")
        part = self._attach(source)
        # Read once to say at once what is wrong with it.
        counts = self._engine.count_tokens([part], image_tokens=self._chat.image_tokens)
        if counts["total"] > self._engine.manifest.context:
            raise ContextFull(counts["total"], self._engine.manifest.context)
        self._attached.append((part, source))
        self._sees = True
        self.note(f"{source}: {counts['total'] - counts['text']} tokens, goes with the next message")

    def _reset(self, argument: str) -> None:
        self._chat.reset()
        self._turns, self._attached, self._calls, self._results, self._sees = [], [], [], [], False
        self.note("forgotten")

    def _save(self, argument: str) -> None:
        if not argument:
            raise InputError("/save needs the path of a file")
        path = Path(_as_path(argument))
        output.check_place("/save", path)
        conversation = {"bundle": self._name, "system": self._chat.system, "turns": self._turns}
        data = json.dumps(conversation, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")

        def save(file: BinaryIO) -> None:
            file.write(data)

        output.write("/save", path, save)
        self.note(f"{path}: {len(self._turns)} messages")

    def _help(self, argument: str) -> None:
        self.note(HELP)

    def _quit(self, argument: str) -> None:
        raise EOFError


def _is_file(line: str) -> bool:
    """Whether a line is what `Engine` would take for the path of a file, and there is one."""
    [(_, [part])] = turns_of(_as_path(line), None)
    return isinstance(part, Image | Video) and isinstance(part.source, str) and os.path.isfile(part.source)


def _as_path(text: str) -> str:
    """The path that is meant.

    Terminals put quotes around one that is dropped into them, or backslashes in front of its spaces, or give a URI; and
    no shell reads this prompt, to know what ~ is.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower().startswith("file:///"):
        return urllib.parse.unquote(text[len("file://") :])
    path = os.path.expanduser(text)
    plain = re.sub(r"\\(.)", r"\1", path)
    return plain if os.path.exists(re.sub(r"@\d+$", "", plain)) and not os.path.exists(path) else path


def _summary(reply: Reply) -> str:
    usage, timings = reply.usage, reply.timings
    speed = f", {1e3 / timings.per_token:.0f} tokens/s" if timings.per_token else ""
    ended = {"length": ", cut by --max-tokens", "context": ", the context is full"}.get(reply.finish_reason, "")
    return (
        f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached; "
        f"first token after {timings.first_token:.0f} ms{speed}{ended}"
    )
