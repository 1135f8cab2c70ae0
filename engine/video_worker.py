"""The process that opens a video: a question as argument, the file on standard input, one answer on standard output.

FFmpeg reads hundreds of formats in C, videos are untrusted, and a decoder that hangs or crashes cannot be stopped
inside a process. So it never runs inside the engine's: this file runs as a script, imports nothing of siglance, and
before it looks at the file gives itself bounds of memory and processor time and the right to open nothing more. What a
file refers to (playlists, lists of parts, external tracks) could not be opened even if a demuxer that does so were
among FORMATS.

Question: JSON.
    {"path": [...], "memory": bytes, "seconds": s, "pixels": n, ...}, and
    nothing more                                                             which frames there are
    {"targets": [[key, first packet], ...], "by": "time" or "order", "height": h, "width": w, "resample": name}
        those frames, keys ascending, resized to height x width
Answer: one line of JSON, then, where frames were asked for, their RGB rows from the top, one frame behind the other.
    {"height": h, "width": w, "by": ..., "ticks": [...], "last": n, "tick": [n, d], "starts": [[packet, tick], ...],
     "fault": "..."}
        size upright and with square pixels; when each frame is shown, ascending, in ticks of n / d seconds, and for how
        many the last one is; packets, counted from 0, with which decoding can begin; what is wrong with the end
    {"count": frames}
    {"error": "..."}
"""

from __future__ import annotations

import errno
import importlib
import io
import json
import pkgutil
import runpy
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["CONTAINERS", "FORMATS", "VideoFault", "answer", "main"]

# Demuxers that read one file and never another: those of the containers that people have, told by content.
CONTAINERS = {
    "mov,mp4,m4a,3gp,3g2,mj2": "mp4, mov, m4v, 3gp",
    "matroska,webm": "webm, mkv",
    "avi": "avi",
    "flv": "flv",
    "asf": "wmv, asf",
    "mpeg": "mpeg, mpg",
    "mpegvideo": "m1v, m2v",
    "mpegts": "ts",
}
FORMATS = ",".join(CONTAINERS)
_ASSUMED_RATE = 24  # frames a second of a file that states neither times nor a rate, as transformers has it
# Containers that end silently where they are cut off, and whose header says how long they should be. Of the others mp4
# says it by itself; streams and fragments, which have no header for the whole, give what is there.
_STATING_LENGTH = ("matroska,webm", "flv")
_SLACK_SECONDS = 1.0
_WIDEST_PIXEL = 10  # aspect ratios of pixels beyond this are damage
# Of PyAV's exceptions only the base class is common, and it raises others as well; these never mean the file.
_NOT_THE_FILE = (MemoryError, TypeError, AttributeError, NameError)


class VideoFault(Exception):
    """Why a video cannot be used, in words."""


def main() -> None:
    """Answer the question in the first argument."""
    question = json.loads(sys.argv[1])
    sys.path[:] = question["path"]
    import av
    import PIL.Image

    for module in pkgutil.walk_packages(av.__path__, "av."):  # it imports some when they are needed, which is too late
        if module.name != "av.__main__":
            importlib.import_module(module.name)
    sample = {"pixels": 256, "height": 8, "width": 8, "resample": "bicubic"}
    _picture(PIL.Image, av.VideoFrame(16, 16, "yuv420p"), sample)  # so does Pillow
    source = sys.stdin.buffer
    size = 0
    if not source.seekable():
        source = io.BytesIO(source.read())
        size = source.getbuffer().nbytes
    limits = runpy.run_path(str(Path(__file__).with_name("worker_limits.py")))
    limits["limit_resources"](question["memory"] + size, question["seconds"])
    limits["open_nothing_more"]()
    answer(av, PIL.Image, question, source, sys.stdout.buffer)


def answer(av: Any, images: Any, question: dict[str, Any], source: BinaryIO, out: BinaryIO) -> None:
    """Write the answer to `question` about the video `source`, which can seek.

    `av` and `images` (PIL.Image) are modules. MemoryError ends the process, as crashes of decoders do.
    """
    reply: dict[str, Any]
    pictures: list[bytes] = []
    try:
        if "targets" in question:
            pictures = _decode(av, images, question, source)
            reply = {"count": len(pictures)}
        else:
            reply = _measure(av, question, source)
    except VideoFault as fault:
        reply = {"error": str(fault)}
    out.write(json.dumps(reply).encode() + b"\n")
    for picture in pictures:
        out.write(picture)
    out.flush()


def _open(av: Any, source: BinaryIO, pixels: int) -> tuple[Any, Any]:
    """The container and its video stream."""
    source.seek(0)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    try:
        container = av.open(source, options={"max_pixels": str(pixels)}, container_options=options)
    except _NOT_THE_FILE:
        raise
    except Exception as error:  # FFmpegError, and what a decoder that does not exist becomes
        kinds = ", ".join(CONTAINERS.values())
        raise VideoFault(f"not a video that can be read ({kinds}): {_sentence(error)}") from None
    streams = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        kinds = sorted({one.type for one in container.streams} - {"video"})
        container.close()
        raise VideoFault(f"no moving picture in it{', only ' + ' and '.join(kinds) if kinds else ''}")
    stream = streams[0]
    if stream.codec_context is None or not stream.time_base:
        container.close()
        raise VideoFault("its pictures are in a form that is not known here")
    _check_pixels(stream.codec_context.width, stream.codec_context.height, pixels)
    stream.codec_context.thread_count = 2
    return container, stream


def _check_pixels(width: int, height: int, pixels: int) -> None:
    if width * height > pixels:
        raise VideoFault(f"frames of {width}x{height} are {width * height} pixels, the limit is {pixels}")


def _packets(container: Any, streams: Any, faults: list[str]) -> Iterator[Any]:
    """The packets of a stream or of several, the empty ones at the end too; what ends them early goes to `faults`."""
    try:
        for packet in container.demux(streams):
            if packet.is_corrupt:
                faults.append("a packet is cut off or damaged")
            yield packet
    except _NOT_THE_FILE:
        raise
    except Exception as error:
        faults.append(_sentence(error))


def _frames(packet: Any, faults: list[str]) -> list[Any]:
    """What the decoder gives for a packet; packets that it refuses give nothing."""
    try:
        return packet.decode()
    except _NOT_THE_FILE:
        raise
    except Exception as error:
        # A thread of the decoder that cannot be started, or a buffer that it cannot get.
        if getattr(error, "errno", None) in (errno.EAGAIN, errno.ENOMEM):
            raise MemoryError from error
        faults.append(_sentence(error))
        return []


# --- which frames there are


def _measure(av: Any, question: dict[str, Any], source: BinaryIO) -> dict[str, Any]:
    container, stream = _open(av, source, question["pixels"])
    with container:
        by = "time" if _states_times(stream, container) else "order"
        index, frame = _read_index(stream, container) if by == "time" else _count_frames(stream, container)
    if index is None:
        by = "order"
        container, stream = _open(av, source, question["pixels"])
        with container:
            index, frame = _count_frames(stream, container)
    if index is None or frame is None:
        why = "" if index is None or not index["fault"] else f": {index['fault']}"
        raise VideoFault(f"damaged or encrypted, not one frame can be decoded{why}")
    height, width = _shown_size(frame, stream)
    _check_pixels(width, height, question["pixels"])
    return {"height": height, "width": width, "by": by, **index}


def _states_times(stream: Any, container: Any) -> bool:
    """Whether packets say when they are shown, and not only (or not even) in which order they are decoded."""
    name = container.format.name
    return name != "mpegvideo" and not (name == "avi" and stream.codec_context.has_b_frames)


def _read_index(stream: Any, container: Any) -> tuple[dict[str, Any] | None, Any]:
    """The index, from what the container says about its packets, and the first frame.

    Only the first frame is decoded. None for the index where packets do not say when they are shown.
    """
    faults: list[str] = []  # of the container
    heard = 0.0  # end of the latest packet of any stream, seconds
    refused: list[str] = []  # by the decoder
    shown: list[tuple[int, int]] = []  # time, how long
    starts: list[tuple[int, int]] = []  # number and time of the packets that decoding can begin with
    frame = None
    number = -1
    for packet in _packets(container, list(container.streams), faults):
        if packet.pts is not None and packet.time_base:
            heard = max(heard, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        number += 1
        if packet.has_sidedata("encryption_info") or packet.has_sidedata("encryption_init_info"):
            raise VideoFault("encrypted, and cannot be read without its key")
        if frame is None:
            frame = next(iter(_frames(packet, refused)), None)
        if not packet.size:
            continue
        if packet.pts is None:
            return None, None
        if packet.is_keyframe:
            starts.append((number, packet.pts))
        if not packet.is_discard:
            shown.append((packet.pts, packet.duration or 0))
    if not shown or frame is None:
        return {"fault": "; ".join((faults + refused)[:1])}, None
    if not faults and _declared(container) - heard > _SLACK_SECONDS:
        faults.append(f"it should be {_declared(container):g} s long")
    shown.sort()
    ticks = [at for at, _ in shown]
    last = shown[-1][1] or (ticks[-1] - ticks[-2] if len(ticks) > 1 else 0)
    return _index(ticks, last, stream.time_base, starts, faults), frame


def _index(
    ticks: list[int], last: int, tick: Fraction, starts: list[tuple[int, int]], faults: list[str]
) -> dict[str, Any]:
    pair = [tick.numerator, tick.denominator]
    return {"ticks": ticks, "last": last, "tick": pair, "starts": starts, "fault": "; ".join(faults[:1])}


def _declared(container: Any) -> float:
    """Where the file should end by its own header, seconds; 0 where the header does not say."""
    if container.format.name not in _STATING_LENGTH or container.duration is None:
        return 0.0
    return container.duration / 1e6


def _count_frames(stream: Any, container: Any) -> tuple[dict[str, Any], Any]:
    """The index of a file without times: every frame is decoded, and they follow each other at the stated rate."""
    faults: list[str] = []
    first, count = None, 0
    for packet in _packets(container, stream, faults):
        for frame in _frames(packet, faults):
            first = frame if first is None else first
            count += 1
    rate = Fraction(stream.average_rate or stream.guessed_rate or _ASSUMED_RATE)
    return _index([*range(count)], 1, 1 / rate, [], faults), first


# --- frames as they are shown


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """How the picture lies, from the display matrix of the file: (x, y) is shown at (a x + c y, b x + d y).

    Angles between right ones count as the nearest right one, as in browsers.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX" and data.buffer_size >= 36:
            a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
            if abs(a) >= abs(b):
                return (1 if a >= 0 else -1), 0, 0, (1 if d >= 0 else -1)
            return 0, (1 if b >= 0 else -1), (1 if c >= 0 else -1), 0
    return 1, 0, 0, 1


def _shown_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(height, width) upright and with square pixels."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if not Fraction(1, _WIDEST_PIXEL) <= aspect <= _WIDEST_PIXEL:
        aspect = Fraction(1)
    height, width = frame.height, max(1, round(frame.width * aspect))
    return (height, width) if _matrix(frame)[0] else (width, height)


def _picture(images: Any, frame: Any, question: dict[str, Any]) -> bytes:
    """RGB rows of a frame, upright, resized once."""
    _check_pixels(frame.width, frame.height, question["pixels"])
    turn = images.Transpose
    turned = {
        (1, 0, 0, 1): None,
        (-1, 0, 0, 1): turn.FLIP_LEFT_RIGHT,
        (1, 0, 0, -1): turn.FLIP_TOP_BOTTOM,
        (-1, 0, 0, -1): turn.ROTATE_180,
        (0, 1, -1, 0): turn.ROTATE_270,  # Pillow turns counter-clockwise
        (0, -1, 1, 0): turn.ROTATE_90,
        (0, 1, 1, 0): turn.TRANSPOSE,
        (0, -1, -1, 0): turn.TRANSVERSE,
    }[_matrix(frame)]
    image = _rgb(images, frame)
    if turned is not None:
        image = image.transpose(turned)
    resample = {"bicubic": images.Resampling.BICUBIC, "bilinear": images.Resampling.BILINEAR}[question["resample"]]
    size = (question["width"], question["height"])
    return (image if image.size == size else image.resize(size, resample)).tobytes()


def _rgb(images: Any, frame: Any) -> Any:
    """A frame in RGB; where it is transparent it lies on white, as pictures do."""
    # Threads are started anew for each frame, and their stacks count as memory.
    if not any(component.is_alpha for component in frame.format.components):
        return frame.to_image(threads=1)
    plane = frame.reformat(format="rgba", threads=1).planes[0]
    step, from_the_top = abs(plane.line_size), 1 if plane.line_size > 0 else -1
    size = (frame.width, frame.height)
    rgba = images.frombuffer("RGBA", size, bytes(plane), "raw", "RGBA", step, from_the_top)
    return images.alpha_composite(images.new("RGBA", size, (255, 255, 255, 255)), rgba).convert("RGB")


def _decode(av: Any, images: Any, question: dict[str, Any], source: BinaryIO) -> list[bytes]:
    container, stream = _open(av, source, question["pixels"])
    with container:
        targets = [(key, first) for key, first in question["targets"]]
        by_time = question["by"] == "time"
        return _decode_targets(container, stream, targets, by_time, lambda frame: _picture(images, frame, question))


def _decode_targets(
    container: Any,
    stream: Any,
    targets: Sequence[tuple[int, int]],
    by_time: bool,
    picture: Callable[[Any], bytes],
) -> list[bytes]:
    """The pictures of the targets. Packets that no target needs are skipped, and one decoded frame is kept.

    A packet without a picture of its own (VP8 has such) shows the picture before it.
    """
    pending, done = deque(targets), []
    faults: list[str] = []
    latest: Any = None
    decoding, count = False, 0

    def take(frame: Any) -> None:
        if frame is None:
            raise VideoFault(f"damaged, a chosen frame cannot be decoded{': ' + faults[-1] if faults else ''}")
        done.append(picture(frame))
        pending.popleft()
        faults.clear()

    for number, packet in enumerate(_packets(container, stream, faults)):
        if not pending:
            break
        if not decoding and number >= pending[0][1]:
            stream.codec_context.flush_buffers()
            decoding, latest = True, None
        if not decoding:
            continue
        for frame in _frames(packet, faults):
            key = frame.pts if by_time else count
            count += 1
            if key is None:
                continue
            while pending and key >= pending[0][0]:
                if key > pending[0][0] and faults:
                    raise VideoFault(f"damaged, a chosen frame cannot be decoded: {faults[-1]}")
                take(frame if key == pending[0][0] or latest is None else latest)
            latest = frame
        # What the next target needs may be far ahead.
        decoding = bool(pending) and pending[0][1] <= number
    while pending:
        take(None if faults else latest)
    return done


def _sentence(error: BaseException) -> str:
    """What FFmpeg says, without the number and the file that PyAV puts around it."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


if __name__ == "__main__":
    main()
