"""The messages of a request as turns of a conversation.

Each message becomes one turn, so that the engine's errors ("message 3: ...") count as the caller does. Parts keep their
order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import PromptError
from ...manifest import ImageFacts
from ...parts import Audio, Pdf
from ...pdf import is_pdf
from ...prompt import Text, Thought
from ...tools import ToolCall, ToolResult
from ..bodies import Fields
from ..failures import Failure
from ..pictures import picture
from ..said import File, Said, SaidPart

__all__ = ["Media", "read_messages", "refuse"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_DETAILS = ("auto", "low", "high", "original")
_FORMATS = ("wav", "mp3")
_WAVE = (b"RIFF", b"RF64", b"RIFX")
_NO_NAMES = "chat templates have no names for participants; say it in the text"
_NO_SPEECH = "there is no speech in the history, give the text"
_NO_FUNCTION_CALL = "use tool_calls"
_NO_FILE_ID = "no files are kept here, use file.file_data"


class Media:
    """Reads the media in parts of messages."""

    def __init__(self, facts: ImageFacts | None):
        """`facts` are those of the bundle, None for one without vision."""
        budgets = facts.budgets if facts is not None else (None,)
        # "auto" is the bundle's default; the two ends are what the caller can choose.
        self._budgets = {"auto": None, "low": budgets[0], "high": budgets[-1], "original": budgets[-1]}

    def image(self, part: Fields) -> File:
        """Of {"image_url": {"url", "detail"}}; `detail` chooses among the bundle's budgets of soft tokens."""
        image = _needed(part.object("image_url"), part, "image_url")
        detail = image.choice("detail", _DETAILS) or "auto"
        place, tokens = image.path("url"), self._budgets[detail]
        url = _needed(image.text("url"), image, "url")
        image.finish()
        return File(place=place, uri=url, part=lambda data: picture(data, place, tokens))

    def sound(self, part: Fields) -> File:
        """Of {"input_audio": {"data", "format"}}. One that is longer than the model hears at once becomes several."""
        sound = _needed(part.object("input_audio"), part, "input_audio")
        form = _needed(sound.choice("format", _FORMATS), sound, "format")
        text = _needed(sound.text("data"), sound, "data")
        sound.finish()

        def heard(data: bytes) -> Audio:
            if (data[:4] in _WAVE) != (form == "wav"):
                raise sound.failure("data", f"is not what its format says: {form!r}")
            return Audio(data, split=True)

        return File(place=sound.path("data"), base64=text, part=heard)

    def file(self, part: Fields) -> File:
        """Of {"file": {"file_data", "filename"}}: a PDF, in a data URI or in base64 alone."""
        file = _needed(part.object("file"), part, "file")
        refuse(file, "file_id", _NO_FILE_ID)
        file.text("filename")  # a label: what the file is, its content says
        text, place = _needed(file.text("file_data"), file, "file_data"), file.path("file_data")
        file.finish()

        def read(data: bytes) -> Pdf:
            if not is_pdf(data):
                raise file.failure("file_data", "is no PDF; other files are not read")
            return Pdf(data)

        return (
            File(place=place, uri=text, part=read) if ":" in text[:100] else File(place=place, base64=text, part=read)
        )


def read_messages(body: Fields, media: Media) -> Sequence[Said]:
    """The turns of `messages`. Raises Failure, or PromptError for calls that cannot be written."""
    messages = _needed(body.objects("messages"), body, "messages")
    if not messages:
        raise body.failure("messages", "is empty, it needs at least one message")
    conversation = _Conversation()
    for message in messages:
        role = _needed(message.choice("role", _ROLES), message, "role")
        if role == "tool":
            conversation.answer(*_tool_message(message))
        elif role == "assistant":
            conversation.say(*_assistant_message(message))
        else:
            refuse(message, "name", _NO_NAMES)
            parts = _content(message, {**_TEXT, **_media_parts(media)} if role == "user" else _TEXT)
            conversation.add("user" if role == "user" else "system", parts)
        message.finish()
    return conversation.turns()


class _Conversation:
    """Turns, with results of tools told apart by the ids of their calls and put into the order of these."""

    def __init__(self):
        self._turns: list[Said] = []
        self._calls: dict[str, ToolCall] = {}  # of the assistant's messages that the results now belong to
        self._results: dict[str, ToolResult] = {}

    def add(self, role: str, parts: Sequence[SaidPart]) -> None:
        self._close()
        self._calls = {}
        self._turns.append((role, parts))

    def say(self, parts: list[SaidPart], calls: dict[str, ToolCall], message: Fields) -> None:
        """A message of the assistant, with its calls by id."""
        if self._results:
            self._close()
            self._calls = {}
        twice = next((id for id in calls if id in self._calls), None)
        if twice is not None:
            raise message.failure("tool_calls", f"has the id {twice[:60]!r} twice")
        self._calls |= calls
        self._turns.append(("assistant", [*parts, *calls.values()]))

    def answer(self, id: str, name: str | None, content: str, message: Fields) -> None:
        """A result."""
        call = self._calls.get(id)
        if call is None:
            raise message.failure("tool_call_id", f"is {id[:60]!r}, which is no call of the message before it")
        if id in self._results:
            raise message.failure("tool_call_id", f"is {id[:60]!r}, which has a result already")
        if name is not None and name != call.name:
            raise message.failure("name", f"is {name[:60]!r}, the call was of {call.name!r}")
        self._results[id] = _result(call.name, content)

    def turns(self) -> Sequence[Said]:
        self._close()
        return self._turns

    def _close(self) -> None:
        """Results of one name are told apart by their order only, which is therefore that of the calls."""
        ordered = [self._results[id] for id in self._calls if id in self._results]
        self._turns += [("tool", [result]) for result in ordered]
        self._results = {}


def _assistant_message(message: Fields) -> tuple[list[SaidPart], dict[str, ToolCall], Fields]:
    refuse(message, "name", _NO_NAMES)
    refuse(message, "audio", _NO_SPEECH)
    refuse(message, "function_call", _NO_FUNCTION_CALL)
    if message.list("annotations"):
        raise message.failure("annotations", "is not supported: replies here have none")
    calls = _tool_calls(message)
    refusal, thought = message.text("refusal"), message.text("reasoning_content")
    parts: list[SaidPart] = []
    if "content" in message or not (calls or refusal):
        parts += _content(message, {**_TEXT, "refusal": _refusal_part})
    message.value("content")  # null is a value too
    if refusal:
        parts.append(Text(refusal))
    if thought:
        parts.append(Thought(thought))
    return parts, calls, message


def _tool_calls(message: Fields) -> dict[str, ToolCall]:
    calls: dict[str, ToolCall] = {}
    for item in message.objects("tool_calls") or ():
        item.choice("type", ("function",))
        item.integer("index")  # of those who send back what they have put together from a stream
        id = _needed(item.text("id"), item, "id")
        function = _needed(item.object("function"), item, "function")
        name = _needed(function.text("name"), function, "name")
        arguments = _needed(function.text("arguments"), function, "arguments")
        function.finish()
        item.finish()
        if id in calls:
            raise item.failure("id", f"is {id[:60]!r}, as of another call")
        try:
            calls[id] = ToolCall(name, _arguments(arguments, function))
        except PromptError as error:
            raise Failure(400, f"{item.path('function')}: {error}", field=item.path("function")) from None
    return calls


def _arguments(text: str, function: Fields) -> dict[str, Any]:
    """A function without parameters is called with "" by some models."""
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):  # ValueError also for an integer of thousands of digits
        raise function.failure("arguments", "is no JSON") from None
    if not isinstance(arguments, dict):
        raise function.failure("arguments", "is no JSON object")
    return arguments


def _tool_message(message: Fields) -> tuple[str, str | None, str, Fields]:
    id = _needed(message.text("tool_call_id"), message, "tool_call_id")
    parts = _content(message, _TEXT)
    return id, message.text("name"), "".join(part.text for part in parts if isinstance(part, Text)), message


def _result(name: str, content: str) -> ToolResult:
    """Models are trained on results that are objects, which callers of this protocol send as JSON text."""
    try:
        value = json.loads(content)
        if isinstance(value, dict):
            return ToolResult(name, value)
    except (ValueError, RecursionError, PromptError):  # no JSON, or none that can be written: text then
        pass
    return ToolResult(name, content)


_ReadPart = Callable[[Fields], SaidPart]


def _content(message: Fields, kinds: dict[str, _ReadPart]) -> list[SaidPart]:
    """The parts of `content`, which is text or a list of parts of these kinds."""
    value = message.value("content")
    if value is None:
        raise message.missing("content")
    if isinstance(value, str):
        return [Text(value)]
    if not isinstance(value, list):
        raise message.failure("content", "must be a text or a list of parts")
    parts: list[SaidPart] = []
    for part in message.objects("content") or ():
        kind = _needed(part.choice("type", tuple(kinds)), part, "type")
        parts.append(kinds[kind](part))
        part.finish()
    return parts


def _text_part(part: Fields) -> Text:
    return Text(_needed(part.text("text"), part, "text"))


def _refusal_part(part: Fields) -> Text:
    return Text(_needed(part.text("refusal"), part, "refusal"))


_TEXT: dict[str, _ReadPart] = {"text": _text_part}


def _media_parts(media: Media) -> dict[str, _ReadPart]:
    return {"image_url": media.image, "input_audio": media.sound, "file": media.file}


def refuse(fields: Fields, name: str, why: str) -> None:
    """Refuse a field that is known and not supported; null is as good as absent."""
    if name in fields:
        raise fields.failure(name, f"is not supported: {why}")
    fields.value(name)


def _needed(value: Any, fields: Fields, name: str) -> Any:
    if value is None:
        raise fields.missing(name)
    return value
