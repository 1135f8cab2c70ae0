"""Videos: frames chosen by their times at once, decoded later, each resized as soon as it is decoded.

The file is opened by a process of its own (`video_worker`, which says why), once to see which frames there are and once
or a few times for the chosen ones. A file on disk is read by that process and never held in memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import stat
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import InputError, VideoError
from .limits import Limits
from .sources import is_data_uri, one_line, read_source
from .video_frames import Index, choose
from .worker import Worker

__all__ = ["Clip", "clock", "is_video", "open_clip"]

_WORKER = Worker(script="video_worker.py", package="av", extra="video", work="reading videos", task="reads videos")
# Frames fetched by one process: they wait in memory for the vision tower.
_BATCH_BYTES, _BATCH_FRAMES = 64 * 2**20, 1000
_MAX_FPS = 1000
_SIGNATURES = (b"\x1aE\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"\0\0\1\xba", b"\0\0\1\xb3")
_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # old QuickTime files begin with one of these
_PICTURE_BRANDS = re.compile(rb"hei[cxms]|hev[cxms]|avi[fs]|mif1|msf1|jp2 |jpx |crx |M4[ABP] ")


def is_video(start: bytes) -> bool:
    """Whether a file is a video, by its first 1024 bytes. Containers that may hold sound alone count as videos."""
    if start[4:8] == b"ftyp":
        return not _PICTURE_BRANDS.match(start[8:12])
    if start[:4] == b"RIFF":
        return start[8:12] == b"AVI "
    transport = len(start) > 376 and start[0] == start[188] == start[376] == 0x47
    return start.startswith(_SIGNATURES) or start[4:8] in _BOXES or transport


def clock(seconds: float) -> str:
    """MM:SS, rounded down; more digits of minutes from 100 on."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    """Where the bytes are: in memory, or in a file that must not change between two looks at it."""

    data: bytes | None
    path: str = ""
    identity: tuple[int, ...] = ()

    @classmethod
    def of(cls, source: object, limits: Limits) -> _File:
        """Raises InputError."""
        foreign = isinstance(source, str) and (is_data_uri(source) or "://" in source)
        if isinstance(source, str | os.PathLike) and not foreign:
            try:
                status = os.stat(source)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(f"cannot read {os.fspath(source)[-100:]!r}: {one_line(reason)}") from error
            if stat.S_ISREG(status.st_mode):
                if status.st_size > limits.max_video_bytes:
                    raise InputError(
                        f"{status.st_size} bytes, over the limit of {limits.max_video_bytes} bytes of encoded video"
                    )
                if not status.st_size:
                    raise InputError("empty, 0 bytes")
                return cls(None, os.fsdecode(source), _identity(status))
        data = read_source(source, limits.max_video_bytes)
        if not data:
            raise InputError("empty, 0 bytes")
        return cls(data)

    def open(self) -> BinaryIO:
        """Raises InputError."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - the caller closes it
        except OSError as error:
            raise InputError(f"cannot read {self.path[-100:]!r}: {one_line(error.strerror)}") from error
        if _identity(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise InputError("the file was changed while it was read")
        return file


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """The chosen frames of a video, not decoded yet.

    Attributes:
        name: how error messages call it.
        height: of a frame in pixels, upright and with square pixels.
        width: so too.
        times: when each frame is shown, in seconds from the first frame of the file, ascending.
    """

    name: str
    height: int
    width: int
    times: tuple[float, ...]
    limits: Limits
    _file: _File
    _by: str
    _targets: tuple[tuple[int, int], ...]
    _waiting: dict[tuple[int, int, int, str], npt.NDArray[np.uint8]] = field(default_factory=dict)

    def part(self, first: int, end: int) -> Clip:
        """The frames `first` to `end` (not included) by themselves."""
        return dataclasses.replace(self, times=self.times[first:end], _targets=self._targets[first:end], _waiting={})

    def pixels(self, frame: int, height: int, width: int, resample: str) -> npt.NDArray[np.uint8]:
        """Frame number `frame` resized to uint8 [height, width, 3]; `resample` is "bicubic" or "bilinear".

        Frames are decoded together with those that follow and handed out once: asking in order decodes each once.
        Raises VideoError: damaged, too much work, or changed in the meantime.
        """
        key = (frame, height, width, resample)
        if key not in self._waiting:
            self._waiting.clear()
            count = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // (3 * height * width)))
            targets = self._targets[frame : frame + count]
            question = {"targets": targets, "by": self._by, "height": height, "width": width, "resample": resample}
            _, pixels = _ask(question, self._file, self.limits, self.name)
            frames = np.frombuffer(pixels, np.uint8).reshape(len(targets), height, width, 3)
            self._waiting.update({(frame + index, *key[1:]): one for index, one in enumerate(frames)})
        return self._waiting.pop(key)


def open_clip(source: object, *, fps: float, start: float | None, end: float | None, limits: Limits, name: str) -> Clip:
    """Choose the frames of a video; one is decoded to know their size.

    Args:
        source: see `sources.FileSource`.
        fps: frames for each second. What they are `video_frames.choose` says.
        start: seconds from the first frame; None is the beginning.
        end: seconds from the first frame, not included; None is the end.
        limits: `max_video_bytes`, `max_pixels` of a frame, `max_frames` (longer clips are thinned evenly),
            `max_video_seconds`, `max_video_memory`.
        name: how error messages call it.

    Raises:
        VideoError: cannot be read, no video, without a picture, damaged, encrypted, over a limit, a range that it does
            not have, or the extra `video` is not installed.
    """
    _check_range(fps, start, end, name)
    try:
        file = _File.of(source, limits)
    except InputError as error:
        raise VideoError(f"{name}: {error}") from error.__cause__
    reply, _ = _ask({}, file, limits, name)
    index = Index(reply["ticks"], reply["last"], Fraction(*reply["tick"]), reply["starts"])
    if reply["fault"] and (end is None or end > index.seconds):
        raise VideoError(
            f"{name}: damaged or cut off after {index.seconds:g} s, an end before that can be chosen: {reply['fault']}"
        )
    try:
        chosen = choose(index, float(fps), float(start or 0), end, limits.max_frames)
    except InputError as error:
        raise VideoError(f"{name}: {error}") from None
    times = tuple(seconds for seconds, _ in chosen)
    # Where there are no times, frames are counted, and ticks are numbers of frames.
    targets = tuple((index.ticks[number], index.first_packet(number)) for _, number in chosen)
    return Clip(name, reply["height"], reply["width"], times, limits, file, reply["by"], targets)


def _check_range(fps: float, start: float | None, end: float | None, name: str) -> None:
    for key, value in (("fps", fps), ("start", start), ("end", end)):
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise VideoError(f"{name}: {key} is {value!r}, it must be a number")
    if not 0 < fps <= _MAX_FPS:
        raise VideoError(f"{name}: fps is {fps!r}, it must be above 0 and at most {_MAX_FPS}")
    if start is not None and start < 0:
        raise VideoError(f"{name}: start is {start!r}, it must be 0 or more seconds")
    if end is not None and end <= (start or 0):
        raise VideoError(f"{name}: end is {end!r}, it must be behind the start at {start or 0:g} seconds")


def _ask(question: dict[str, Any], file: _File, limits: Limits, name: str) -> tuple[dict[str, Any], memoryview]:
    """The answer of a new process to one question: the line of JSON and the bytes behind it."""

    def fault(message: str) -> VideoError:
        return VideoError(f"{name}: {message}")

    def ask(source: bytes | BinaryIO) -> tuple[dict[str, Any], memoryview]:
        memory, seconds = limits.max_video_memory, limits.max_video_seconds
        return _WORKER.ask(
            {**question, "pixels": limits.max_pixels},
            source,
            fault,
            memory=memory,
            seconds=seconds,
            late="the limit for a video; a start and an end, or fewer frames a second, are less work",
            limits=f"the limits of {memory} bytes of memory and {seconds:g} seconds",
        )

    _WORKER.require(fault)
    if file.data is not None:
        return ask(file.data)
    try:
        opened = file.open()
    except InputError as error:
        raise fault(str(error)) from error.__cause__
    with opened:
        return ask(opened)
