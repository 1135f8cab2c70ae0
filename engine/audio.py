"""Any form of sound -> samples of one channel. The one place where sounds enter the engine.

Files are decoded by a process of their own (`audio_worker`, which says why). Samples that are there already, at the
model's rate, do not need it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from .errors import AudioError, InputError
from .known_files import NOTHING_KNOWN, KnownFiles, file_key
from .limits import DEFAULT_LIMITS, Limits
from .sources import (
    FileSource,
    can_go_back,
    data_uri_type,
    file_name,
    head_of,
    is_data_uri,
    is_regular,
    read_source,
)
from .worker import Worker

__all__ = ["AudioSource", "Sound", "is_sound", "is_sound_source", "open_sound"]

AudioSource = FileSource | npt.NDArray[np.generic]

_WORKER = Worker(
    script="audio_worker.py",
    package="av",
    extra="audio",
    work="decoding sounds",
    task="decodes sounds",
    doing="decoding",
    done="decoded",
)
_PCM_RATE = 16_000  # of raw PCM that does not say: what the APIs that take it expect
_RATES = (1, 384_000)
_MOST_CHANNELS = 64
_HEAD = 4096  # bytes that tell most formats
_MOST_BOXES, _LARGEST_INDEX = 1000, 16 * 2**20  # of an MP4 that is looked through
_HANDLER = re.compile(rb"hdlr.{8}(soun|vide)", re.DOTALL)
_LOUDEST = 10.0  # decoders of lossy formats go a little beyond full scale; integers that were not scaled go far


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """A sound.

    Attributes:
        name: how error messages call it.
        samples: how many there are at `rate`.
        rate: samples a second.
        waveform: float32 [samples], decoded when it is asked for.
        file: what the part of the encoded file is known by, None if there is no file.
    """

    name: str
    samples: int
    rate: int
    waveform: Callable[[], npt.NDArray[np.float32]]
    file: tuple[object, ...] | None = None

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


def open_sound(
    source: AudioSource,
    *,
    rate: int,
    longest: float,
    why: str,
    start: float = 0.0,
    end: float | None = None,
    sample_rate: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    max_bytes: int | None = None,
    known: KnownFiles = NOTHING_KNOWN,
    name: str = "audio",
) -> Sound:
    """A sound at `rate` samples a second. One whose file is known is decoded only when its samples are asked for.

    Args:
        source: one of
            - a path (str or os.PathLike), or a data URI (str);
            - an encoded file as bytes, bytearray or memoryview;
            - a binary file object, read from its current position to its end and left open;
            - samples as a numpy array, [n], [n, channels] or [channels, n]: floating point in -1..1, or integers whose
              full range is that.
        rate: of the result.
        longest: most seconds; `why` is the reason, as the end of a sentence.
        start, end: the part that is taken, in seconds from the first sample; None is the end.
        sample_rate: of an array, which must have it; of a file, says that it is raw PCM: 16 bits a sample, the low byte
            first, one channel. Files called .pcm and data URIs of audio/pcm and audio/l16 are that at 16,000 samples a
            second, or what `rate=` says.
        limits: `max_bytes`, `max_audio_seconds`, `max_audio_memory`.
        max_bytes: of the file, instead of the one among the limits: for sounds of videos. A path is not held in memory
            then, and the file is decoded at once.
        known: facts about files that were read before.
        name: how error messages call this sound, for example "audio 2 (call.mp3)".

    Several channels are mixed to one, their mean. The first sound of a container with several, or the one it marks as
    its default, is taken; pictures in it are left out.

    Raises:
        AudioError: one line with `name` and the reason: cannot be read, damaged, encrypted, without sound, over a
            limit, a part that does not exist, or the extra `audio` is not installed.
    """
    question = {"rate": rate, "start": start, "end": end, "most": math.floor(longest * rate), "raw": None}
    with _naming(name):
        _check_part(start, end)
        raw_rate = _raw_rate(source, sample_rate)
        if raw_rate is not None:
            # Nothing to decode: the part is cut out first, and resampled if need be.
            given = _mono(source) if isinstance(source, np.ndarray) else _pcm(read_source(source, limits.max_bytes))
            waveform = _cut(given, raw_rate, start, end)
            if raw_rate != rate:
                question |= {"start": 0.0, "end": None, "raw": raw_rate}
                waveform = _ask(question, waveform.tobytes(), limits)
            _check_length(len(waveform), rate, longest, why)
            return Sound(name, len(waveform), rate, lambda: waveform)
        assert not isinstance(source, np.ndarray)
        if max_bytes is not None and is_regular(source, max_bytes):
            with open(cast("str | os.PathLike[str]", source), "rb") as file:
                waveform = _ask(question, file, limits)
            _check_length(len(waveform), rate, longest, why)
            return Sound(name, len(waveform), rate, lambda: waveform)
        data = read_source(source, limits.max_bytes if max_bytes is None else max_bytes)
        if not data:
            raise AudioError("empty, 0 bytes")

    @functools.cache
    def decode() -> npt.NDArray[np.float32]:
        with _naming(name):
            return _ask(question, data, limits)

    key = ("sound", file_key(data), rate, start, end)
    count = known.get(int, *key)
    if count is None:
        count = len(decode())
    with _naming(name):
        _check_length(count, rate, longest, why)
    known.put(count, *key)
    return Sound(name, count, rate, decode, key)


def is_sound(data: bytes) -> bool:
    """Whether an encoded file says that it is a sound without moving pictures.

    Its first bytes say so, except for MP4: there the whole file is needed.
    """
    head = data[:_HEAD]
    if head[:4] in (b"RIFF", b"RF64", b"RIFX"):
        return head[8:12] == b"WAVE"
    if head[:4] == b"OggS":
        return b"\x80theora" not in head
    if head[4:8] == b"ftyp":
        return _has_only_sound(io.BytesIO(data))
    if head[:4] == b"\x1aE\xdf\xa3":
        return b"A_" in head and b"V_" not in head  # codec names of Matroska and WebM
    if head[:4] == b"FORM":
        return head[8:12] in (b"AIFF", b"AIFC")
    return head.startswith((b"fLaC", b"ID3", b"#!AMR", b"caff", b".snd", b"riff\x2e\x91\xcf\x11")) or _is_mpeg(head)


def _has_only_sound(file: BinaryIO) -> bool:
    """Whether an MP4 has a track of sound and none of moving pictures. Boxes are walked through, wherever they are."""
    place = file.tell()
    for _ in range(_MOST_BOXES):
        file.seek(place)
        header = file.read(16)
        if len(header) < 8:
            return False
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if header[4:8] == b"moov":
            file.seek(place)
            kinds = set(_HANDLER.findall(file.read(min(size, _LARGEST_INDEX) if size else _LARGEST_INDEX)))
            return b"soun" in kinds and b"vide" not in kinds
        if size < 8:  # 0 is up to the end of the file
            return False
        place += size
    return False


def _is_mpeg(head: bytes) -> bool:
    """Whether a file begins with a frame of MPEG audio or of AAC (ADTS)."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    if layer == 0:  # ADTS: twelve bits of sync
        return head[1] & 0xF0 == 0xF0 and head[2] >> 2 & 15 < 13
    return version != 1 and 0 < head[2] >> 4 < 15 and head[2] >> 2 & 3 != 3


_SOUND_NAME = re.compile(
    r".*\.(wave?|w64|mp3|mpga|flac|aac|m4[ab]|og[ga]|opus|weba|aif[fc]?|caf|amr|au|pcm)", re.I | re.S
)


def is_sound_source(source: object) -> bool:
    """Whether a source is a sound: by its content, or by its name if it cannot be read or is raw.

    File objects that cannot go back are not looked into: they are not sounds unless `Audio` says so.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        head = head_of(source, _HEAD)
        return is_sound(head_of(source, memoryview(source).nbytes) if head[4:8] == b"ftyp" else head)
    if isinstance(source, str) and is_data_uri(source):
        try:
            return data_uri_type(source).startswith("audio/")
        except InputError:  # whoever reads it says so, and of which part
            return False
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
        try:
            if not os.path.isfile(name):  # reading from a pipe would take something out of it
                return _SOUND_NAME.fullmatch(name) is not None and not os.path.exists(name)
            with open(name, "rb") as file:
                return name.lower().endswith(".pcm") or _begins_sound(file)
        except (OSError, ValueError):
            return _SOUND_NAME.fullmatch(name) is not None
    if can_go_back(source):
        with contextlib.suppress(OSError, ValueError, TypeError):
            return _begins_sound(cast(BinaryIO, source))
    return False


def _begins_sound(file: BinaryIO) -> bool:
    """Whether the file from its current position on, to which it goes back, is a sound."""
    place = file.tell()
    try:
        head = file.read(_HEAD)
        if not isinstance(head, bytes):
            return False
        file.seek(place)
        return _has_only_sound(file) if head[4:8] == b"ftyp" else is_sound(head)
    finally:
        file.seek(place)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors become AudioError and say which sound they are about."""
    try:
        yield
    except InputError as error:
        raise AudioError(f"{name}: {' '.join(str(error).split())}") from error.__cause__


def _check_part(start: float, end: float | None) -> None:
    for key, value in (("start", start), ("end", end)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf):
            raise AudioError(f"the {key} is {value!r}, it must be a number of seconds of at least 0")
    if end is not None and end <= start:
        raise AudioError(f"the end at {end:g} s is not behind the start at {start:g} s")


def _check_length(samples: int, rate: int, longest: float, why: str) -> None:
    if samples > math.floor(longest * rate):
        raise AudioError(f"longer than {longest:g} s, {why}")


def _raw_rate(source: object, sample_rate: int | None) -> int | None:
    """Samples a second of a source that is nothing but samples, None for an encoded file."""
    low, high = _RATES
    if sample_rate is not None:
        if not isinstance(sample_rate, int) or isinstance(sample_rate, bool) or not low <= sample_rate <= high:
            raise AudioError(f"the sample rate is {sample_rate!r}, it must be an integer from {low} to {high}")
        return sample_rate
    if isinstance(source, np.ndarray):
        raise AudioError("samples need their rate: Audio(samples, sample_rate=...)")
    if isinstance(source, str) and is_data_uri(source):
        kind, *parameters = (part.strip() for part in data_uri_type(source).split(";"))
        if kind != "audio/pcm":
            return None
        stated = next((part[5:] for part in parameters if part.startswith("rate=")), str(_PCM_RATE))
        return _raw_rate(source, int(stated)) if stated.isdecimal() and len(stated) < 10 else _raw_rate(source, -1)
    return _PCM_RATE if file_name(source).lower().endswith(".pcm") else None


def _pcm(data: bytes) -> npt.NDArray[np.float32]:
    if not data or len(data) % 2:
        raise AudioError(f"{len(data)} bytes are not samples of 16 bits")
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)


def _mono(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Samples float32 [n] of an array, its channels mixed."""
    if array.ndim not in (1, 2) or not array.size:
        raise AudioError(f"an array of shape {list(array.shape)}, expected [n], [n, channels] or [channels, n]")
    samples = array
    if array.ndim == 2:
        short, long = sorted(array.shape)
        if short == long or short > _MOST_CHANNELS:
            raise AudioError(f"an array of shape {list(array.shape)}: which axis are the channels? pass one channel")
        samples = array if array.shape[0] == short else array.T
    if samples.dtype.kind == "f":
        values = samples.astype(np.float32) + np.float32(0)  # no negative zeros: equal samples have equal bytes
        loudest = float(np.abs(values).max())
        if not loudest <= _LOUDEST:  # NaN fails too
            raise AudioError(f"samples reach {loudest:g}, floating-point samples must lie in -1..1")
    elif samples.dtype.kind in "iu" and samples.dtype.itemsize <= 4:
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        values = ((samples.astype(np.float64) - (half if samples.dtype.kind == "u" else 0.0)) / half).astype(np.float32)
    else:
        raise AudioError(f"an array of dtype {array.dtype}, expected floating point or integers of at most 32 bits")
    return values if values.ndim == 1 else values.mean(axis=0, dtype=np.float64).astype(np.float32)


def _cut(samples: npt.NDArray[np.float32], rate: int, start: float, end: float | None) -> npt.NDArray[np.float32]:
    first = round(start * rate)
    if first >= len(samples):
        raise AudioError(f"the start at {start:g} s is behind its end, it is {len(samples) / rate:g} s long")
    return samples[first : None if end is None else round(end * rate)].copy()


def _ask(question: dict[str, Any], data: bytes | BinaryIO, limits: Limits) -> npt.NDArray[np.float32]:
    """Put one question about a file to a new worker process: the samples it answers with."""
    _WORKER.require(AudioError)
    reply, payload = _WORKER.ask(
        question,
        data,
        AudioError,
        memory=limits.max_audio_memory,
        seconds=limits.max_audio_seconds,
        late="the limit for a sound",
        limits=f"the limit of {limits.max_audio_memory} bytes of memory",
    )
    samples = np.frombuffer(payload, np.float32)
    if len(samples) != reply["samples"]:
        raise AudioError("the process that decodes sounds broke off")
    return samples
