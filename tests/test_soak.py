"""Everything an engine can be asked, again and again: answers repeat, nothing is left behind. `make load`."""

from __future__ import annotations

import base64
import io
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from siglance.engine import (
    Audio,
    Engine,
    Grammar,
    Image,
    Limits,
    Pdf,
    Sampling,
    SiglanceError,
    Text,
    Thought,
    Tool,
    ToolCall,
    ToolResult,
    Turn,
    Video,
)
from siglance.engine.self_test import formula_picture
from siglance.export.exporter import export

from . import tiny_gemma4_audio
from .audio_files import encoded as encoded_sound
from .audio_files import tone, video_with_sound, wav
from .pdf_files import PdfPage, encrypted, numbered_pages, packed, pdf, quadrants
from .picture_files import encoded, png
from .test_load import CACHES, GROWTH, resident_bytes
from .tool_template import tool_template
from .video_files import clip

pytestmark = pytest.mark.load

REQUESTS = 500
Request = Callable[[Engine], Hashable]


def answered(**options: Any) -> Request:
    """A request for a whole reply; what is compared is its ids."""
    sampling = options.pop("sampling", Sampling(temperature=0))
    parts = options.pop("parts")

    def ask(engine: Engine) -> Hashable:
        # Objects that are read to their end are made for each request.
        conversation = [part() if callable(part) else part for part in parts]
        reply = engine.generate(conversation, sampling=sampling, **{"max_tokens": 6, **options})
        return tuple(candidate.token_ids for candidate in reply.candidates), reply.finish_reason, reply.text

    return ask


def chat(*turns: Any, **options: Any) -> Request:
    """A conversation."""

    def ask(engine: Engine) -> Hashable:
        talk = engine.chat(sampling=Sampling(temperature=0), max_tokens=5, **options)
        return tuple(talk.send(turn).token_ids for turn in turns)

    return ask


def cancelled(chunks: int, *parts: Any) -> Request:
    """A stream that is closed after some chunks."""

    def ask(engine: Engine) -> Hashable:
        stream = engine.stream([*parts], max_tokens=20, sampling=Sampling(temperature=1, seed=chunks))
        texts = [chunk.text for chunk in itertools.islice(stream, chunks)]
        stream.close()
        return tuple(texts)

    return ask


def encoded_once(picture: Any, sound: Any) -> Request:
    """A picture and a sound that are encoded, and asked about twice."""

    def ask(engine: Engine) -> Hashable:
        parts = [engine.encode(picture, image_tokens=70), engine.encode(sound)]
        ask_about = [answered(parts=[*parts, Text(question)]) for question in ("what?", "why?")]
        return tuple(one(engine) for one in ask_about)

    return ask


def counted(*parts: Any) -> Request:
    return lambda engine: tuple(sorted(engine.count_tokens([*parts]).items()))


def pictures(folder: Path) -> Iterator[Request]:
    """Formats, forms, sizes and budgets."""
    formats = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
    for index, name in enumerate(formats):
        pixels = formula_picture(60 + 97 * index, 500 - 61 * index)
        data = encoded(PIL.Image.fromarray(pixels), name)
        path = folder / f"picture.{name.lower()}"
        path.write_bytes(data)
        uri = f"data:image/{name.lower()};base64,{base64.b64encode(data).decode()}"
        form = (path, data, uri, partial(io.BytesIO, data), PIL.Image.fromarray(pixels), pixels)[index]
        yield answered(parts=[form, Text(f"what is it, {name}?")], image_tokens=(70, 140, 280)[index % 3])
    rows = formula_picture(300, 90)
    yield answered(parts=[Text("first"), Image(rows, 70), Text("second"), Image(rows[::-1], 140), Text("which?")])
    yield answered(parts=[rows, "again"], image_tokens=70, candidates=2, sampling=Sampling(temperature=1, seed=1))
    yield answered(parts=[rows, "form"], image_tokens=70, format=Grammar.json_schema({"type": "array", "maxItems": 2}))


def documents(folder: Path) -> Iterator[Request]:
    path = folder / "pages.pdf"
    path.write_bytes(numbered_pages(4))
    yield answered(parts=[Pdf(path, pages="2-3"), "which pages?"], image_tokens=70)
    yield answered(parts=[packed(quadrants(), PdfPage(b"1 0 0 rg 0 0 90 90 re f")), "what?"], image_tokens=70)


def videos(folder: Path) -> Iterator[Request]:
    path = folder / "clip.mp4"
    path.write_bytes(clip(60, options={"g": "10"}))
    yield answered(parts=[path, "what happens?"])
    yield answered(parts=[Video(path, fps=2, start=1, end=2), "what?"])
    yield answered(parts=[Video(clip(30, container="avi", codec="mpeg4"), tokens=70), "what?"])
    yield answered(parts=[Video(video_with_sound(1.5), sound=True), "what do you hear?"])


def sounds(folder: Path) -> Iterator[Request]:
    path = folder / "sound.wav"
    path.write_bytes(wav(tone(1.2, 16_000)))
    yield answered(parts=[path, "what is it?"])
    yield answered(parts=[encoded_sound("ogg, opus"), "what is it?"])
    yield answered(parts=[Audio(encoded_sound("mp3"), start=0.2, end=0.7), "what is it?"])
    yield answered(parts=[Audio(tone(0.5, 22_050), sample_rate=22_050), "and", Audio(path), "differ?"])


def words() -> Iterator[Request]:
    """Text, tools, thoughts, forms."""
    weather = Tool("weather", "of a city", {"type": "object", "properties": {"city": {"type": "string"}}})
    yield answered(parts=["hello"], sampling=Sampling(temperature=1, top_k=20, seed=3), logprobs=3)
    yield answered(parts=["hello"], system="You are terse. " * 20, stop=["the", "x"])
    yield answered(parts=["hello wor"], raw=True)
    yield answered(parts=["hello"], tools=[weather], thinking=True)
    yield answered(parts=["hello"], thinking=True, candidates=3, sampling=Sampling(temperature=1, seed=4))
    yield answered(parts=["digits"], format=Grammar.regex("[0-9]{3}"))
    call = ToolCall("weather", {"city": 'P"aris', "days": [1, {"deep": None}]})
    yield answered(
        parts=[Turn("user", "sky?"), Turn("assistant", [Thought("hm"), call]), Turn("tool", ToolResult("weather", 7))],
        tools=[weather],
    )


def conversations() -> Iterator[Request]:
    picture, sound = formula_picture(80, 120), Audio(tone(0.4, 16_000), sample_rate=16_000)
    yield chat("hello", [Image(picture, 70), "what?"], "and?", [sound, "hear?"], system="Answer in one word.")
    yield chat([Video(clip(30), tokens=70), "what?"], "sure?", thinking=True)
    yield encoded_once(picture, sound)
    yield counted(Image(picture, 70), sound, Video(clip(30)), Pdf(numbered_pages(2)), "count")
    for chunks in range(3):
        yield cancelled(chunks, Image(formula_picture(90 + chunks, 60), 70), sound, "talk")


def refusals(folder: Path) -> Iterator[Request]:
    """What cannot be answered, each refused at another place."""
    jpeg, video, sound = encoded(PIL.Image.fromarray(formula_picture(64, 64)), "JPEG"), clip(40), encoded_sound("flac")
    page = quadrants()
    yield answered(parts=[jpeg[: len(jpeg) // 2], "what?"])
    yield answered(parts=[folder / "absent.png", "what?"])
    yield answered(parts=[png(40_000, 40_000, 8, 2), "what?"])
    yield answered(parts=[b"<html>no picture</html>", "what?"])
    yield answered(parts=[pdf(page)[:-300], "what?"], image_tokens=70)
    yield answered(parts=[encrypted(b"secret", page), "what?"])
    yield answered(parts=[Video(video[: len(video) // 2]), "what?"])
    yield answered(parts=[sound[: len(sound) // 2], "what?"])
    yield answered(parts=[Audio(tone(31, 16_000), sample_rate=16_000), "what?"])
    yield answered(parts=[formula_picture(50, 50), "what?"], image_tokens=71)
    yield answered(parts=["word " * 9000])
    yield answered(parts=["hello"], format=Grammar.json_schema({"type": "nonsense"}))


def all_media(folder: Path) -> Request:
    parts = ["one", Image(formula_picture(90, 70), 70), "two", Video(folder / "clip.mp4", end=2), "three"]
    return answered(parts=[*parts, Audio(folder / "sound.wav"), Pdf(folder / "pages.pdf", pages=1, tokens=70), "all?"])


def requests(folder: Path) -> list[Request]:
    kinds = [pictures(folder), documents(folder), videos(folder), sounds(folder), words(), conversations()]
    made = [request for kind in kinds for request in kind]
    return [*made, *refusals(folder), all_media(folder)]


@dataclass(frozen=True)
class Refused:
    error: str
    words: str


def outcome(request: Request, engine: Engine) -> Hashable:
    """What a request gives: its answer, or its error in words."""
    try:
        return request(engine)
    except SiglanceError as error:
        return Refused(type(error).__name__, str(error))


def processes() -> list[str]:
    """Processes that this one has started and that have not ended, or were not waited for."""
    return Path("/proc/self/task", str(os.getpid()), "children").read_text().split()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The folder of a tiny model that reads, sees, hears, watches, thinks and calls."""
    folder = tmp_path_factory.mktemp("soak")
    tiny_gemma4_audio.write_gemma4_audio(folder / "checkpoint", max_position_embeddings=8192)
    (folder / "checkpoint" / "chat_template.jinja").write_text(tool_template(), encoding="utf-8")
    export(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


def test_mixed_requests_leave_nothing_behind(bundle, tmp_path):
    """Every kind in every round, each round in another order; the caches are so small that they evict all the time."""
    asked = requests(tmp_path)
    rng = np.random.default_rng(0)
    order = [index for _ in range(-(-REQUESTS // len(asked)) + 2) for index in rng.permutation(len(asked))]
    warm_up = 2 * len(asked)  # every request once for its answer, once in other company
    with Engine.open(bundle, limits=Limits(max_video_seconds=20), **CACHES) as engine:
        expected = [outcome(request, engine) for request in asked]
        wrong = [index for index in order[:warm_up] if outcome(asked[index], engine) != expected[index]]
        files, threads, before = len(os.listdir("/proc/self/fd")), threading.active_count(), resident_bytes()
        highest = 0
        for index in order[warm_up : warm_up + REQUESTS]:
            if outcome(asked[index], engine) != expected[index]:
                wrong.append(index)
            highest = max(highest, resident_bytes() - before)
        grown, opened = resident_bytes() - before, len(os.listdir("/proc/self/fd")) - files
        started = threading.active_count() - threads
    refused = [index for index, one in enumerate(expected) if isinstance(one, Refused)]
    last = len(asked) - 1  # refusals stand in front of the last
    print(
        f"{REQUESTS} requests of {len(asked)} kinds, {len(refused)} of them refused: {len(set(wrong))} kinds changed "
        f"their answer, resident memory {grown / 1e6:+.1f} MB at the end, {highest / 1e6:+.1f} MB at most, "
        f"{opened:+d} open files, {started:+d} threads, {len(processes())} processes left"
    )
    assert refused == list(range(last - len(list(refusals(tmp_path))), last)), [expected[index] for index in refused]
    assert not wrong, [expected[index] for index in wrong]
    assert highest < GROWTH
    assert (opened, started, processes()) == (0, 0, [])
    with pytest.raises(ChildProcessError):  # every process has ended and was waited for
        os.waitpid(-1, os.WNOHANG)
