"""What a Gemini request says: its contents and parts as turns of the engine.

A part has one of text, inlineData, fileData, functionCall and functionResponse. Their order is kept. Results of
functions stand in contents of the user there and are turns of their own here.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...errors import InputError
from ...manifest import Manifest
from ...prompt import Text, Thought
from ...tools import ToolCall, ToolResult
from ..bodies import Fields
from ..failures import Failure
from ..said import Said, SaidPart
from .media import read_file

__all__ = ["checked", "read_contents", "read_system", "repeated"]

_KINDS = ("text", "inlineData", "fileData", "functionCall", "functionResponse")
_ROLES = {"": "user", "user": "user", "model": "assistant", "function": "tool", "tool": "tool"}
_Value = TypeVar("_Value")


# --- contents


def read_contents(body: Fields, manifest: Manifest, resolution: str | None) -> Sequence[Said]:
    """The turns of a request. `resolution` is the level of media that have none of their own. Raises Failure."""
    contents = repeated(body, "contents")
    if contents is None:
        raise body.missing("contents")
    if not contents:
        raise body.failure("contents", "is empty")
    reader = _Reader(manifest, resolution)
    for content in contents:
        reader.read(content)
    return reader.turns()


def read_system(body: Fields) -> str | None:
    """The system instruction, whose parts are paragraphs. Google's own clients also take a bare text for it."""
    if isinstance(body.value("systemInstruction"), str):
        return body.text("systemInstruction")
    content = body.object("systemInstruction")
    if content is None:
        return None
    content.text("role", 40)  # Google's clients say "user", which means nothing here
    paragraphs: list[str] = []
    for part in repeated(content, "parts") or ():
        text = part.text("text")
        if text is None:
            raise part.failure("text", "is missing: a system instruction holds text only")
        part.finish()
        paragraphs.append(text)
    content.finish()
    return "\n\n".join(paragraphs)


def repeated(fields: Fields, name: str, most: int | None = None) -> list[Fields] | None:
    """A list of objects; a single one may stand for a list of one, as in many of Google's own examples."""
    if isinstance(fields.value(name), dict):
        only = fields.object(name)
        assert only is not None
        return [only]
    return fields.objects(name, most)


class _Reader:
    """Reads contents in their order; calls and results are matched on the way."""

    def __init__(self, manifest: Manifest, resolution: str | None):
        self._turns: list[tuple[str, list[SaidPart]]] = []
        self._manifest = manifest
        self._resolution = resolution
        self._calls = _Calls()
        self._places: dict[int, list[int]] = {}  # of a turn of results: the places of the calls that they answer

    def turns(self) -> Sequence[Said]:
        """What has been read. Results stand in the order of their calls, because the engine goes by name and order."""
        for index, places in self._places.items():
            results = self._turns[index][1]
            results[:] = [result for _, result in sorted(zip(places, results, strict=True), key=lambda pair: pair[0])]
        return self._turns

    def read(self, content: Fields) -> None:
        said = content.text("role") or ""
        role = _ROLES.get(said.lower())
        if role is None:
            raise content.failure("role", f"is {said[:40]!r}, expected 'user' or 'model'")
        parts = repeated(content, "parts")
        if parts is None:
            raise content.missing("parts")
        if not parts:
            raise content.failure("parts", "is empty")
        content.finish()
        if role == "assistant" and not self._goes_on(role):
            self._calls = _Calls()
        spoken: list[SaidPart] | None = None
        for part in parts:
            kind = _kind(part, role)
            if kind == "functionResponse":
                spoken = None
                self._answer(part)
            else:
                if spoken is None:
                    spoken = []
                    self._turns.append((role, spoken))
                spoken.append(self._part(part, kind, role))
            part.finish()

    def _goes_on(self, role: str) -> bool:
        return bool(self._turns) and self._turns[-1][0] == role

    def _answer(self, part: Fields) -> None:
        """Add a result."""
        id, result = _result(part)
        place = self._calls.take(id, result.name)
        if place is None:
            which = f"{result.name!r}" if id is None else f"{result.name!r} with the id {id[:40]!r}"
            raise part.failure("functionResponse", f"answers no call of the turn before it: {which}")
        if not self._goes_on("tool"):
            self._places[len(self._turns)] = []
            self._turns.append(("tool", []))
        index = len(self._turns) - 1
        self._turns[index][1].append(result)
        self._places[index].append(place)

    def _part(self, part: Fields, kind: str, role: str) -> SaidPart:
        if kind == "functionCall":
            id, call = _call(part)
            self._calls.add(id, call.name)
            return call
        if kind == "text":
            text = part.text("text") or ""
            if not part.flag("thought"):
                return Text(text)
            if role != "assistant":
                raise part.failure("thought", "is true, but only the model has thoughts")
            return Thought(text)
        if part.flag("thought"):
            raise part.failure("thought", "is true, but a thought is text")
        return read_file(part, kind, self._manifest, self._resolution)

    # --- media


class _Calls:
    """The calls of a turn that wait for their results."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: dict[tuple[str | None, str], deque[int]] = defaultdict(deque)  # by id and name, None for any id
        self._answered: set[int] = set()

    def add(self, id: str | None, name: str) -> None:
        for key in {(id, name), (None, name)}:
            self._waiting[key].append(self._count)
        self._count += 1

    def take(self, id: str | None, name: str) -> int | None:
        """The place among the calls of the first that waits for this result, None if there is none."""
        waiting = self._waiting[id, name]
        while waiting:
            place = waiting.popleft()
            if place not in self._answered:
                self._answered.add(place)
                return place
        return None


def _kind(part: Fields, role: str) -> str:
    """The one kind of data that a part has, if it may stand in content of this role."""
    kinds = [kind for kind in _KINDS if kind in part]
    if not kinds:
        part.finish()  # names what is there instead
        raise Failure(400, f"{part.place} has no data: expected one of {', '.join(_KINDS)}", field=part.place)
    if len(kinds) > 1:
        raise part.failure(kinds[1], f"and {kinds[0]} exclude each other")
    kind = kinds[0]
    wrong = {
        "user": kind == "functionCall",
        "assistant": kind == "functionResponse",
        "tool": kind != "functionResponse",
    }
    if wrong[role]:
        raise part.failure(kind, f"does not go with the role of {part.place.rpartition('.parts')[0]}")
    return kind


# --- functions


def _call(part: Fields) -> tuple[str | None, ToolCall]:
    """The id of a call, and the call."""
    call = part.object("functionCall")
    assert call is not None
    id, name = call.text("id", 200), call.text("name")
    if name is None:
        raise call.missing("name")
    arguments = call.value("args")
    if not isinstance(arguments, dict | None):
        call.object("args")  # says what is wrong
    call.finish()
    return id, checked(call.place, lambda: ToolCall(name, arguments or {}))


def _result(part: Fields) -> tuple[str | None, ToolResult]:
    """The id of the call that a result answers, and the result."""
    response = part.object("functionResponse")
    assert response is not None
    id, name = response.text("id", 200), response.text("name")
    if name is None:
        raise response.missing("name")
    if response.object("response") is None:
        raise response.missing("response")
    result = response.value("response")
    response.finish()
    return id, checked(response.place, lambda: ToolResult(name, result))


def checked(place: str, make: Callable[[], _Value]) -> _Value:
    """What `make` makes; what the engine says against it becomes a Failure that names the place."""
    try:
        return make()
    except InputError as error:
        raise Failure(400, f"{place}: {error}", field=place) from None
