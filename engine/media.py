"""Attached parts -> pictures for the model. Images are read at once, pages of documents are drawn and frames of videos
decoded when needed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import PIL.Image

from .errors import DocumentError, ImageError, InputError, VideoError
from .image import load_image
from .known_files import NOTHING_KNOWN, KnownFiles, file_key
from .limits import DEFAULT_LIMITS, Limits
from .parts import Image, Pdf, Video
from .pdf import Page, is_pdf, open_pages
from .sounds import PreparedSound
from .sources import can_go_back, file_name, head_of, is_data_uri, is_regular, read_source
from .video import Clip, is_video, open_clip

__all__ = [
    "HeldPixels",
    "PictureSource",
    "interleaved",
    "is_document",
    "is_moving",
    "part_name",
    "read_media",
    "read_video",
    "readable_twice",
]

# A page is drawn this many times larger per side than the model sees it, so that the one resampler of the engine does
# the last step for pages as it does for photographs.
_OVERSAMPLING = 2


@dataclass(frozen=True, slots=True, eq=False)
class PictureSource:
    """One picture: an image, or a page of a document; or a video.

    Attributes:
        name: how error messages call it.
        modality: "image", "document" or "video".
        size: (height, width) that boxes are measured in: pixels of the upright image, points of the page as shown.
        proportions: (height, width) that the layout is computed from.
        pixels: (height, width) that the model will see -> uint8 [H, W, 3], RGB. An image gives all its pixels whatever
            is asked for; a page is drawn for this size, and may raise DocumentError. A video has none.
        file: the key of the encoded file that it comes from (`known_files.file_key`), None if there is none.
        clip: the frames of a video.
        release: to be called when everybody has looked; pixels that are asked for nevertheless are decoded again.
    """

    name: str
    modality: str
    size: tuple[int, int]
    proportions: tuple[int, int]
    pixels: Callable[[int, int], npt.NDArray[np.uint8]]
    file: bytes | None = None
    clip: Clip | None = None
    release: Callable[[], None] = lambda: None

    @property
    def frames(self) -> int:
        """How many pictures of one size it is."""
        return 1 if self.clip is None else len(self.clip.times)


class HeldPixels:
    """Decoded pixels of the pictures of one request: the latest ones, up to `most` bytes, and the very latest anyhow.

    A picture is decoded to learn its size, and looked at when the whole prompt is known to fit. Sixty of 50 megapixels
    would be 9 GB by then, from a request of 50 MB; those that are not held are decoded again.
    """

    def __init__(self, most: int):
        self._most = most
        self._held: OrderedDict[object, npt.NDArray[np.uint8]] = OrderedDict()

    def holding(self, decode: Callable[[], npt.NDArray[np.uint8]]) -> Callable[[], npt.NDArray[np.uint8]]:
        """`decode`, which is called only if its pixels are not held."""
        key = object()

        def pixels() -> npt.NDArray[np.uint8]:
            if key not in self._held:
                self._held[key] = decode()
                while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._most:
                    self._held.popitem(last=False)
            return self._held[key]

        return pixels

    def release(self) -> None:
        """Hold nothing, and from now on the very latest only."""
        self._held.clear()
        self._most = 0


def read_media(
    part: Image | Pdf,
    number: int,
    limits: Limits,
    known: KnownFiles = NOTHING_KNOWN,
    held: HeldPixels | None = None,
) -> list[PictureSource]:
    """The pictures that an attached part stands for: one, or one for each chosen page of a document.

    What a file is, its content says: an `Image` that is a PDF is all its pages. `number` counts attachments from 1, for
    messages. A picture whose file is known is decoded only when its pixels are asked for. `held` are the pixels of the
    request. Raises ImageError and DocumentError, naming the part.
    """
    held = HeldPixels(0) if held is None else held
    if isinstance(part, Pdf):
        name = part_name("document", number, part.source)
        return _pages(_read(part.source, limits.max_bytes, name, DocumentError), part, limits, name)
    name = part_name("image", number, part.source)
    source = part.source
    if isinstance(source, np.ndarray | PIL.Image.Image):
        pixels = held.holding(lambda: load_image(source, limits=limits, name=name))
        return [_image(name, _size(pixels()), pixels, held)]
    data = _read(source, limits.max_bytes, name, ImageError)
    if is_pdf(data):
        return _pages(data, Pdf(data, tokens=part.tokens), limits, part_name("document", number, part.source))
    pixels = held.holding(lambda: load_image(data, limits=limits, name=name))
    key = file_key(data)
    size = known.get(tuple, key)
    if size is None:
        size = _size(pixels())
        known.put(size, key)
    return [_image(name, size, pixels, held, key)]


def _image(
    name: str,
    size: tuple[int, int],
    pixels: Callable[[], npt.NDArray[np.uint8]],
    held: HeldPixels,
    file: bytes | None = None,
) -> PictureSource:
    return PictureSource(name, "image", size, size, lambda height, width: pixels(), file, release=held.release)


def _size(pixels: npt.NDArray[np.uint8]) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


def read_video(part: Video, number: int, limits: Limits, fps: float) -> PictureSource:
    """A video with its frames chosen, `fps` of them a second if the part does not say. Raises VideoError."""
    name = part_name("video", number, part.source)
    rate = fps if part.fps is None else part.fps
    clip = open_clip(part.source, fps=rate, start=part.start, end=part.end, limits=limits, name=name)
    size = clip.height, clip.width

    def no_pixels(height: int, width: int) -> npt.NDArray[np.uint8]:
        raise AssertionError("the frames of a video come from its clip")

    return PictureSource(name, "video", size, size, no_pixels, clip=clip)


def readable_twice(part: Video, number: int, limits: Limits) -> Video:
    """The video from a source that its frames and its sound can both be read from: a file object gives its bytes once.

    Raises VideoError.
    """
    name = part_name("video", number, part.source)
    try:
        if is_regular(part.source, limits.max_video_bytes):
            return part
    except InputError as error:
        raise VideoError(f"{name}: {error}") from None
    return dataclasses.replace(part, source=_read(part.source, limits.max_video_bytes, name, VideoError))


def interleaved(
    video: PictureSource, sounds: Sequence[PreparedSound], begin: float
) -> list[PictureSource | PreparedSound]:
    """The frames of a video and its sound, which starts at second `begin`, in the order of time.

    For each clip of sound the frames shown while it lasts, then the clip. Frames behind the end of the sound belong to
    the last one.
    """
    assert video.clip is not None
    times, media, first, second = video.clip.times, [], 0, begin
    for index, sound in enumerate(sounds):
        second += sound.seconds
        last = index == len(sounds) - 1
        end = len(times) if last else first + sum(time < second for time in times[first:])
        if first < end:
            media.append(dataclasses.replace(video, clip=video.clip.part(first, end)))
        media.append(sound)
        first = end
    return media


def is_moving(source: object) -> bool:
    """Whether a source is a video by its content. File objects that cannot go back are not looked into."""
    if isinstance(source, bytes | bytearray | memoryview):
        return is_video(head_of(source, 1024))
    if isinstance(source, str) and is_data_uri(source):
        try:
            return is_video(read_source(source, DEFAULT_LIMITS.max_video_bytes)[:1024])
        except InputError:
            return False
    if can_go_back(source):
        return _peeked(cast(BinaryIO, source))
    if not isinstance(source, str | os.PathLike):
        return False
    try:
        if not Path(source).is_file():  # reading from a pipe would take something out of it
            return False
        with open(source, "rb") as file:
            return is_video(file.read(1024))
    except (OSError, ValueError):
        return False


def _peeked(file: BinaryIO) -> bool:
    with contextlib.suppress(OSError, ValueError, TypeError):
        place = file.tell()
        start = file.read(1024)
        file.seek(place)
        return isinstance(start, bytes) and is_video(start)
    return False


def is_document(source: str | Path | bytes) -> bool:
    """Whether a path or a data URI is that of a PDF: by its content, or by its name if it cannot be read."""
    if isinstance(source, bytes):
        return is_pdf(source)
    if isinstance(source, str) and is_data_uri(source):
        return is_pdf(read_source(source, DEFAULT_LIMITS.max_bytes))
    try:
        with open(source, "rb") as file:
            return is_pdf(file.read(1024))
    except (OSError, ValueError):
        return str(source).lower().endswith(".pdf")


def part_name(kind: str, number: int, source: object) -> str:
    """How error messages call an attached part."""
    file = file_name(source)
    return f"{kind} {number} ({file})" if file else f"{kind} {number}"


def _read(source: object, max_bytes: int, name: str, kind: type[InputError]) -> bytes:
    try:
        return read_source(source, max_bytes)
    except InputError as error:
        raise kind(f"{name}: {error}") from error.__cause__


def _pages(document: bytes, part: Pdf, limits: Limits, name: str) -> list[PictureSource]:
    pages = open_pages(document, part.pages, limits, name)
    return [
        PictureSource(
            page.name, "document", page.size, page.proportions, _drawer(page), file_key(document, 1 + page.index)
        )
        for page in pages
    ]


def _drawer(page: Page) -> Callable[[int, int], npt.NDArray[np.uint8]]:
    return lambda height, width: page.draw(_OVERSAMPLING * height, _OVERSAMPLING * width)
