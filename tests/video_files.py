"""Clips with a counter in the picture, written with PyAV.

Frame n of a clip shows the number n in binary: a row of `BITS` cells, white for 1, black for 0, most significant first.
Below it the left half is red and the right half blue, so that turned and mirrored pictures can be told apart. Cells are
large, and lossy codecs keep them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container
import numpy as np

BITS = 16
CELL = 16  # pixels
HEIGHT, WIDTH = 96, BITS * CELL


def counter_picture(number: int, height: int = HEIGHT) -> np.ndarray:
    """uint8 [height, WIDTH, 3] with `number` drawn in its upper third."""
    picture = np.zeros((height, WIDTH, 3), np.uint8)
    third = height // 3
    for bit in range(BITS):
        if number >> (BITS - 1 - bit) & 1:
            picture[:third, bit * CELL : (bit + 1) * CELL] = 255
    picture[third:, : WIDTH // 2] = (200, 30, 30)
    picture[third:, WIDTH // 2 :] = (30, 30, 200)
    return picture


def read_counter(picture: np.ndarray) -> int:
    """The number in a picture of any size [H, W, 3]. Raises AssertionError for a picture that lies otherwise."""
    height, width = picture.shape[:2]
    low, left, right = picture[height * 2 // 3], width // 4, 3 * width // 4
    assert low[left, 0] > low[left, 2] + 60, f"the left half is {low[left]}, not red"
    assert low[right, 2] > low[right, 0] + 60, f"the right half is {low[right]}, not blue"
    row = picture[height // 6].astype(int).mean(axis=-1)
    cells = [row[int((bit + 0.5) * width / BITS)] for bit in range(BITS)]
    return sum(int(value > 127) << (BITS - 1 - bit) for bit, value in enumerate(cells))


def clip(
    times: Sequence[Fraction | float] | int = 50,
    *,
    fps: int | Fraction = 25,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    height: int = HEIGHT,
    audio: bool = False,
    numbers: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    time_base: Fraction | None = None,
    path: Path | None = None,
) -> bytes:
    """The file of a clip whose frame n shows n.

    Args:
        times: seconds of each frame, or the number of frames at a constant rate.
        fps: the rate.
        container: FFmpeg's name of the muxer.
        codec: FFmpeg's name of the encoder.
        options: of the encoder.
        container_options: of the muxer.
        rotation: degrees counter-clockwise that a player turns it by.
        aspect: of a pixel, width over height.
        height: of the picture, pixels.
        audio: a second track of silence.
        numbers: what frames show instead of their number.
        size: (height, width) that pictures are enlarged to.
        time_base: in which times are written; the default is fine enough for `times`, exact for a constant rate.
        path: a file that is written on the way, for muxers that read what they have written.
    """
    file = io.BytesIO()
    constant = isinstance(times, int)
    shown = [Fraction(number) / fps for number in range(times)] if constant else [Fraction(time) for time in times]
    base = time_base or (1 / Fraction(fps) if constant else Fraction(1, 1000))
    with av.open(path or file, "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = size or (height, WIDTH)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        sound: Any = (
            output.add_stream("mp2" if container in ("mpeg", "avi", "asf", "vob") else "aac", rate=48000)
            if audio
            else None
        )
        for index, time in enumerate(shown):
            picture = counter_picture(index if numbers is None else numbers[index], height)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if size:
                frame = frame.reformat(width=size[1], height=size[0], interpolation="POINT")
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = round(time / base), base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            _silence(output, sound, float(shown[-1] + 1 / Fraction(fps)))
    return path.read_bytes() if path else file.getvalue()


def transparent(codec: str, pixels: str) -> bytes:
    """QuickTime: one frame of 96x48, green, of which nothing is to be seen on the left and all on the right."""
    rgba = np.zeros((48, 96, 4), np.uint8)
    rgba[..., 1] = 200
    rgba[..., 3] = np.repeat([0, 128, 255], 32)
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as output:
        stream = output.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 48, pixels
        output.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pixels)))
        output.mux(stream.encode(None))
    return file.getvalue()


def sound_only(container: str = "mp4") -> bytes:
    """A file with a track of sound and no picture."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        _silence(output, output.add_stream("aac", rate=48000), 1.0)
    return file.getvalue()


def _silence(output: Any, stream: Any, seconds: float) -> None:
    samples = stream.codec_context.frame_size or 1024
    for number in range(int(seconds * 48000 / samples)):
        layout = stream.codec_context.layout.name
        channels = len(stream.codec_context.layout.channels)
        kind = stream.codec_context.format.name
        dtype = np.float32 if kind.startswith("flt") else np.int16
        shape = (channels, samples) if kind.endswith("p") else (1, channels * samples)
        frame = av.AudioFrame.from_ndarray(np.zeros(shape, dtype), format=kind, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = 48000, number * samples, Fraction(1, 48000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
