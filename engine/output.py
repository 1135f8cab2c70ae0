"""Results as JSON and as text for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image

from .audio import is_sound_source
from .draw import draw_boxes
from .errors import InputError
from .limits import Limits
from .logprobs import Logprob
from .media import PictureSource, read_media
from .parts import Audio, Image, Pdf, Video
from .reply import Candidate, Reply
from .self_test import VerifyReport

__all__ = [
    "DEMO_NOTE",
    "canvas",
    "check_place",
    "drawn",
    "logprob_lines",
    "note",
    "picture_format",
    "print_json",
    "progress",
    "reply_json",
    "reply_summary",
    "verify_json",
    "write",
]

DEMO_NOTE = (
    "This is the embedded demo, a tiny model that knows drawn coloured shapes and short signs only. "
    "It answers: describe, count, detect <colour> <shape>, detect all, read."
)


def note(text: str) -> None:
    """A remark beside the answer: on stderr, so that stdout holds the answer alone."""
    print(text, file=sys.stderr)


def print_json(value: object) -> None:
    """One JSON value on a line, as readable as the encoding of the output allows."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not is_unicode))


def reply_json(reply: Reply) -> dict[str, Any]:
    """The object that `run --json` prints."""
    first = _candidate_json(reply.candidates[0])
    facts = {
        "text": first["text"],
        "token_ids": first["token_ids"],
        "prompt_token_ids": list(reply.prompt_token_ids),
        "finish_reason": first["finish_reason"],
        "usage": dataclasses.asdict(reply.usage),
        "timings_ms": {name: round(value, 3) for name, value in dataclasses.asdict(reply.timings).items()},
        "boxes": first["boxes"],
        "truncated": first["truncated"],
        "thought": first["thought"],
        "thought_finished": first["thought_finished"],
        "tool_calls": first["tool_calls"],
        "malformed_calls": first["malformed_calls"],
        "logprobs": first["logprobs"],
        "sampling": dataclasses.asdict(reply.sampling),
        "device": reply.device,
        "providers": reply.providers,
    }
    if len(reply.candidates) > 1:
        facts["candidates"] = [_candidate_json(one) | {"seed": one.seed} for one in reply.candidates]
    return facts


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "text": candidate.text,
        "token_ids": list(candidate.token_ids),
        "finish_reason": candidate.finish_reason,
        "boxes": [
            {"label": box.label, "box": [round(float(value), 2) for value in box.box], "image": box.image}
            for box in candidate.boxes
        ],
        "truncated": candidate.truncated,
        "thought": candidate.thought,
        "thought_finished": candidate.thought_finished,
        "tool_calls": [dataclasses.asdict(call) for call in candidate.tool_calls],
        "malformed_calls": [dataclasses.asdict(call) for call in candidate.malformed_calls],
        "logprobs": None if candidate.logprobs is None else [_logprob_json(entry) for entry in candidate.logprobs],
    }


def _logprob_json(entry: Logprob) -> dict[str, Any]:
    return {**_token_json(entry), "top": [_token_json(other) for other in entry.top]}


def _token_json(entry: Logprob) -> dict[str, Any]:
    # JSON has no infinity; OpenAI's API writes this number for a token that the model rules out.
    value = max(entry.logprob, -9999.0)
    return {"id": entry.id, "token": entry.text, "bytes": list(entry.bytes), "logprob": value}


def logprob_lines(reply: Reply) -> Iterator[str]:
    """One line for each token whose log-probability was asked for, alternatives behind it."""
    for index, candidate in enumerate(reply.candidates):
        for entry in candidate.logprobs or ():
            place = f"{index + 1}: " if len(reply.candidates) > 1 else ""
            top = "".join(f"  {other.text!r} {other.logprob:.3f}" for other in entry.top)
            yield f"{place}{entry.text!r} {entry.logprob:.3f}{' |' if top else ''}{top}"


def reply_summary(reply: Reply) -> str:
    """One line: tokens, stages, speed."""
    timings, usage = reply.timings, reply.usage
    sounds = usage.by_modality.get("audio", 0)
    pictures = usage.prompt_tokens - usage.by_modality["text"] - sounds
    media = f"{pictures} of pictures" + (f", {sounds} of sounds" if sounds else "")
    heard = f"audio {timings.audio:.0f}, " if sounds else ""
    speed = f"{1e3 / timings.per_token:.0f} tokens/s" if timings.per_token else "one token"
    thoughts = f" ({usage.thought_tokens} of thoughts)" if usage.thought_tokens else ""
    return (
        f"{usage.prompt_tokens} prompt tokens ({media}), {usage.completion_tokens} "
        f"in the reply{thoughts}, ended by {reply.finish_reason} | read {timings.decode_file:.0f} ms, "
        f"resize {timings.resize:.0f}, "
        f"vision {timings.vision:.0f}, {heard}prefill {timings.prefill:.0f}, "
        f"first token after {timings.first_token:.0f} ms, "
        f"{speed}, {reply.device}"
    )


def verify_json(report: VerifyReport) -> dict[str, Any]:
    """The object that `verify --json` prints."""
    return dataclasses.asdict(report)


def canvas(part: Image | Pdf | Video | Audio, limits: Limits) -> PictureSource:
    """The one picture of a part, to draw on. Raises InputError if the part has several."""
    if isinstance(part, Video | Audio) or is_sound_source(part.source):
        raise InputError(
            f"--draw needs a picture, it does not draw on {'videos' if isinstance(part, Video) else 'sounds'}"
        )
    pictures = read_media(part, 1, limits)
    if len(pictures) != 1:
        raise InputError(
            f"--draw needs exactly one picture, the document has {len(pictures)} pages: choose with --pages"
        )
    return pictures[0]


def drawn(reply: Reply, picture: PictureSource) -> PIL.Image.Image:
    """The picture with the boxes of the reply; a page of a document as large as it is drawn, at most."""
    if not reply.boxes:
        note("the reply has no boxes, so none are drawn")
    height, width = picture.size
    pixels = picture.pixels(height, width)
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    boxes = [
        dataclasses.replace(box, box=(x_min * across, y_min * down, x_max * across, y_max * down))
        for box in reply.boxes
        for x_min, y_min, x_max, y_max in [box.box]
    ]
    return draw_boxes(pixels, boxes)


def check_place(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be made, before anything runs."""
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"{option} {path}: {what}")


def picture_format(option: str, path: Path) -> str:
    """The format that the ending of a file asks for."""
    format = PIL.Image.registered_extensions().get(path.suffix.lower())
    if format not in PIL.Image.SAVE:
        raise InputError(f"{option} {path}: pictures cannot be written as {path.suffix!r}, .png can")
    return format


def write(option: str, path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write a file that `option` asked for. One that cannot be written whole is removed."""
    opened = False
    try:
        with path.open("wb") as file:
            opened = True
            save(file)
    except (OSError, ValueError) as error:
        if opened and path.is_file():
            path.unlink()
        raise InputError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the name of the stage, on stderr; silent when stderr is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    status = console.status("")

    def report(stage: str) -> None:
        # Not before the first stage: until then a download may be drawing its own bars.
        status.update(stage)
        status.start()

    try:
        yield report
    finally:
        status.stop()
