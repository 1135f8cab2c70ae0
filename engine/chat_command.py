"""The prompt loop of `siglance chat`: lines in, replies on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from . import output
from .chat import Chat
from .engine import Engine
from .errors import InputError, SiglanceError
from .parts import Image, Pdf, Video, turns_of
from .prompt import Text
from .reply import Reply

__all__ = ["HELP", "converse"]

HELP = """\
/image FILE[@BUDGET]  show a picture, PDF or video with the next message; the path of a file alone does the same
/reset                forget the conversation
/save FILE            write the conversation as JSON
/help                 this list
/quit                 end; so does Ctrl-D
//...                 a message that begins with a slash
Ctrl-C stops a reply; a turn that is stopped or fails is not kept."""

_PROMPT = "> "
# Whatever a model writes, a terminal gets no escape sequences from it.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def converse(engine: Engine, chat: Chat, *, name: str, attach: Callable[[str], Image | Pdf | Video]) -> None:
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
        # A file name may be no valid text; a message that is not is refused like any other.
        sys.stdin.reconfigure(errors="surrogateescape")
    if not interactive:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
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

    def __init__(self, engine: Engine, chat: Chat, name: str, attach: Callable[[str], Image | Pdf | Video]):
        self._engine = engine
        self._chat = chat
        self._name = name
        self._attach = attach
        self._attached: list[tuple[Image | Pdf | Video, str]] = []
        self._turns: list[dict[str, Any]] = []  # what /save writes
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
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
        stream = self._chat.stream([*(part for part, _ in self._attached), Text(text)])
        visible, started = sys.stdout.isatty(), False
        reply: Reply | None = None
        try:
            for chunk in stream:
                started = True
                sys.stdout.write(chunk.text.translate(_CONTROLS) if visible else chunk.text)
                sys.stdout.flush()
                reply = chunk.reply
        except KeyboardInterrupt:
            stream.close()
        finally:
            if started:
                print(flush=True)
        if reply is None:
            self.note("stopped, this turn is not kept")
            return
        shown = [{"type": "image", "source": source} for _, source in self._attached]
        self._turns.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        self._turns.append({"role": "assistant", "content": [{"type": "text", "text": reply.text}]})
        self._attached = []
        self.note(_summary(reply))

    def _image(self, argument: str) -> None:
        source = _unquoted(argument)
        if not source:
            raise InputError("/image needs the path of a file")
        part = self._attach(source)
        # Read once to say at once what is wrong with it.
        counts = self._engine.count_tokens([part], image_tokens=self._chat.image_tokens)
        self._attached.append((part, source))
        self.note(f"{source}: {counts['total'] - counts['text']} tokens, goes with the next message")

    def _reset(self, argument: str) -> None:
        self._chat.reset()
        self._turns, self._attached = [], []
        self.note("forgotten")

    def _save(self, argument: str) -> None:
        if not argument:
            raise InputError("/save needs the path of a file")
        path = Path(_unquoted(argument))
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
    [(_, [part])] = turns_of(_unquoted(line), None)
    return isinstance(part, Image | Video) and isinstance(part.source, str) and Path(part.source).is_file()


def _unquoted(text: str) -> str:
    """Terminals put quotes around a path that is dropped into them."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _summary(reply: Reply) -> str:
    usage, timings = reply.usage, reply.timings
    speed = f", {1e3 / timings.per_token:.0f} tokens/s" if timings.per_token else ""
    ended = {"length": ", cut by --max-tokens", "context": ", the context is full"}.get(reply.finish_reason, "")
    return (
        f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached; "
        f"first token after {timings.first_token:.0f} ms{speed}{ended}"
    )
