"""The process that opens a sound: a question as argument, the file on standard input, one answer on standard output.

FFmpeg reads hundreds of formats in C, files are untrusted, and a decoder that hangs or crashes cannot be stopped inside
a process. So it never runs inside the engine's: this file runs as a script, imports nothing of siglance, and before it
looks at the file gives itself bounds of memory and processor time and the right to open nothing more. What a file
refers to (playlists, lists of parts) could not be opened even if a demuxer that does so were among FORMATS.

Question: JSON.
    {"path": [...], "memory": bytes, "seconds": s, "rate": samples a second, "start": s, "end": s or null,
     "most": samples, "raw": null or the rate of the input}
     The file is an encoded one; or, with "raw", samples of one channel, float32.
Answer: one line of JSON, then samples, float32.
    {"samples": n}          those from start to end, all channels mixed to one; most + 1 if there are more
    {"error": "..."}
"""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["FORMATS", "answer", "main"]

# FFmpeg's names of demuxers, and what people call the formats.
FORMATS = {
    "wav": "WAV",
    "w64": "WAV",
    "mp3": "MP3",
    "flac": "FLAC",
    "ogg": "Ogg (Opus, Vorbis, FLAC)",
    "aac": "AAC",
    "mov": "MP4, M4A, QuickTime, 3GP",
    "matroska": "WebM, Matroska",
    "aiff": "AIFF",
    "caf": "CAF",
    "amr": "AMR",
    "asf": "WMA",
    "au": "AU",
    "avi": "AVI",
    "flv": "FLV",
    "mpeg": "MPEG",
    "mpegts": "MPEG-TS",
}
_LOUDEST = 10.0  # decoders of lossy formats go a little beyond full scale; files of floats may hold anything
_MOST_CHANNELS = 64  # that FFmpeg's filters take
# Formats that say how long they are, and how much may be missing all the same, in seconds and of the whole: encoders of
# lossy ones count their own delay. What is shorter has been cut off, or decoders left out what they could not read.
_MISSING = {"mov": (0.25, 0.05), **dict.fromkeys(("wav", "w64", "flac", "aiff", "caf"), (0.01, 0.0))}


class SoundFault(Exception):
    """What is wrong with the file, in words."""


def main() -> None:
    """Answer the question in the first argument."""
    question = json.loads(sys.argv[1])
    sys.path[:] = question["path"]
    # Everything that is ever imported, before nothing can be opened any more.
    import av
    import av.subtitles.codeccontext
    import av.subtitles.stream
    import av.subtitles.subtitle
    import numpy

    source: BinaryIO = sys.stdin.buffer
    held = 0
    if not source.seekable():
        data = source.read()
        source, held = io.BytesIO(data), len(data)
        del data
    limits = runpy.run_path(str(Path(__file__).with_name("worker_limits.py")))
    limits["limit_resources"](question["memory"] + held, question["seconds"])
    limits["open_nothing_more"]()
    answer(av, numpy, question, source, sys.stdout.buffer)


def answer(av: Any, numpy: Any, question: dict[str, Any], source: BinaryIO, out: BinaryIO) -> None:
    """Write the answer to `question` about the file `source`, which can seek. A MemoryError ends the process, as
    crashes do."""
    try:
        samples = _decode(av, numpy, question, source)
    except SoundFault as fault:
        out.write(json.dumps({"error": str(fault)}).encode() + b"\n")
    else:
        out.write(json.dumps({"samples": len(samples)}).encode() + b"\n")
        out.write(memoryview(samples).cast("B"))
    out.flush()


class _Window:
    """The samples that are asked for, of those that come by."""

    def __init__(self, numpy: Any, question: dict[str, Any]):
        self._numpy, rate = numpy, question["rate"]
        self.first = round(question["start"] * rate)
        self.end = None if question["end"] is None else round(question["end"] * rate)
        self._most = question["most"] + 1
        self._kept: list[Any] = []
        self._count = 0
        self.passed = 0

    @property
    def full(self) -> bool:
        """Whether nothing that follows is asked for."""
        return self._count >= self._most or (self.end is not None and self.passed >= self.end)

    def put(self, samples: Any) -> None:
        begin, end = max(0, self.first - self.passed), len(samples)
        if self.end is not None:
            end = max(begin, min(end, self.end - self.passed))
        end = min(end, begin + self._most - self._count)
        self.passed += len(samples)
        if begin < end:
            loudest = float(self._numpy.abs(samples[begin:end]).max())
            if not loudest <= _LOUDEST:  # NaN fails too
                raise SoundFault(f"samples reach {loudest:g}, they must lie in -1..1")
            self._kept.append(samples[begin:end].copy())
            self._count += end - begin

    def samples(self) -> Any:
        return self._numpy.concatenate([self._numpy.empty(0, self._numpy.float32), *self._kept])


def _decode(av: Any, numpy: Any, question: dict[str, Any], source: BinaryIO) -> Any:
    window = _Window(numpy, question)
    mixer = _Mixer(av, numpy, question["rate"], window)
    if question["raw"] is not None:
        _feed_raw(av, numpy, question["raw"], source.read(), mixer)
        return window.samples()
    container, stream = _open(av, source)
    with container:
        stream.codec_context.thread_count = 1
        faults = _feed(container, stream, mixer, window)
        seconds = window.passed / question["rate"]
        if not window.passed:
            raise SoundFault(f"damaged or encrypted, no sound can be decoded{': ' + faults[0] if faults else ''}")
        if faults:
            raise SoundFault(f"damaged, {faults[0]}; a part before that can be chosen with an end")
        if not window.full:
            _check_length(container, stream, seconds)
            _check_wave(source)
        if question["start"] and window.passed <= window.first:
            raise SoundFault(f"the start at {question['start']:g} s is behind its end, it is {seconds:g} s long")
    return window.samples()


def _open(av: Any, source: BinaryIO) -> tuple[Any, Any]:
    """The container and its sound."""
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        container = av.open(source, container_options=options)
    except MemoryError:
        raise
    except Exception as error:  # FFmpegError, and what a decoder that does not exist becomes
        kinds = ", ".join(dict.fromkeys(FORMATS.values()))
        raise SoundFault(f"not a sound that can be read ({kinds}): {_sentence(error)}") from None
    streams = list(container.streams.audio)
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        container.close()
        raise SoundFault(f"no sound in it{', only ' + ' and '.join(kinds) if kinds else ''}")
    stream = next((one for one in streams if one.disposition & av.stream.Disposition.default), streams[0])
    if stream.codec_context is None or not stream.codec_context.sample_rate:
        container.close()
        raise SoundFault("its sound is in a form that is not known here")
    # PyAV frees a layout of a file's own, "3 channels (FR+FL+LFE)", once for its object and once for what it is of.
    # Here the second one is forgotten before. Where each loudspeaker stands makes no difference to the mean.
    layout = stream.codec_context.layout
    if "channels (" in layout.name:
        stream.codec_context.layout = f"{layout.nb_channels}C"
    return container, stream


def _feed(container: Any, stream: Any, mixer: _Mixer, window: _Window) -> list[str]:
    """Everything up to the end of the window. Returns what was wrong between two parts that could be decoded.

    Tags and cut frames at either end of a file are no sound, and decoders refuse them.
    """
    faults: list[str] = []
    pending: list[str] = []
    for packet in _packets(container, stream, faults):
        place = window.passed / mixer.rate
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except Exception as error:
            if place:
                pending.append(f"it cannot be decoded at {place:.6g} s: {_sentence(error)}")
            continue
        if any(frame.samples for frame in frames):
            faults += pending
            pending.clear()
        for frame in frames:
            mixer.put(frame)
        if packet.is_corrupt and place:
            pending.append(f"a packet is not whole at {place:.6g} s")
        if window.full or faults:
            break
    mixer.flush()
    return faults


def _packets(container: Any, stream: Any, faults: list[str]) -> Iterator[Any]:
    """The packets of the stream, the empty one at the end too; what ends them early goes to `faults`."""
    try:
        yield from container.demux(stream)
    except MemoryError:
        raise
    except Exception as error:
        faults.append(_sentence(error))


def _check_length(container: Any, stream: Any, seconds: float) -> None:
    """Raise SoundFault for a file that ends long before it says it does."""
    missing = _MISSING.get(container.format.name.split(",")[0])
    if missing is None or not stream.duration:
        return
    stated = float(stream.duration * stream.time_base)
    if seconds < (1 - missing[1]) * stated - missing[0]:
        raise SoundFault(
            f"cut off or damaged, it has {seconds:.6g} s of {stated:.6g} s; an end up to there can be chosen"
        )


def _check_wave(source: BinaryIO) -> None:
    """Raise SoundFault for a WAV whose samples end before its header says; FFmpeg takes what is there.

    Programs that cannot go back in what they write say 0 or the greatest number: then the end of the file counts.
    """
    whole, place = source.seek(0, io.SEEK_END), 12
    source.seek(0)
    wave = source.read(4) == b"RIFF"
    while wave and place + 8 <= whole:
        source.seek(place)
        name, size = source.read(4), int.from_bytes(source.read(4), "little")
        place += 8
        if name == b"data":
            if 0 < size < 0xFFFFFF00 and place + size > whole:
                raise SoundFault(f"cut off, {whole - place} of {size} bytes of samples are there; an end can be chosen")
            return
        place += size + size % 2


class _Mixer:
    """Frames of any format -> float32 samples of one channel, the mean of all, at one rate, into a window."""

    def __init__(self, av: Any, numpy: Any, rate: int, window: _Window):
        self._av, self._numpy, self.rate, self._window = av, numpy, rate, window
        self._kind: tuple[Any, ...] | None = None
        self._resampler: Any = None

    def put(self, frame: Any) -> None:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind:  # some streams change in the middle
            self.flush()
            if frame.layout.nb_channels > _MOST_CHANNELS:
                raise SoundFault(f"{frame.layout.nb_channels} channels, at most {_MOST_CHANNELS} are mixed")
            # Samples of all channels in one row: PyAV counts rows of eight channels and more beyond where they end.
            self._resampler = self._av.AudioResampler(format="flt", layout=frame.layout, rate=self.rate)
            self._kind = kind
        frame.pts = None
        self._take(self._resampler.resample(frame))

    def flush(self) -> None:
        """What the resampler still holds."""
        if self._resampler is not None:
            self._take(self._resampler.resample(None))
        self._resampler = self._kind = None

    def _take(self, frames: list[Any]) -> None:
        for frame in frames:
            channels = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
            mixed = channels.mean(axis=1, dtype=self._numpy.float64)
            self._window.put(mixed.astype(self._numpy.float32))


def _feed_raw(av: Any, numpy: Any, rate: int, data: bytes, mixer: _Mixer) -> None:
    samples = numpy.frombuffer(data, numpy.float32)
    for start in range(0, len(samples), 1 << 16):
        part = numpy.ascontiguousarray(samples[None, start : start + (1 << 16)])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
        frame.sample_rate = rate
        mixer.put(frame)
    mixer.flush()


def _sentence(error: BaseException) -> str:
    """What FFmpeg says, without the number and the file that PyAV puts around it."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


if __name__ == "__main__":
    main()
