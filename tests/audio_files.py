"""Encoded sounds for tests, made in memory by PyAV; the mathematics of WAV by hand."""

from __future__ import annotations

import io
import struct

import av
import numpy as np

# Container, codec, samples a second: everything that the documents ask for, and what else people have.
FORMATS = {
    "wav, 16 bits": ("wav", "pcm_s16le", 16_000),
    "wav, 16 bits, 48 kHz": ("wav", "pcm_s16le", 48_000),
    "wav, 24 bits": ("wav", "pcm_s24le", 44_100),
    "wav, 8 bits": ("wav", "pcm_u8", 22_050),
    "wav, floats": ("wav", "pcm_f32le", 44_100),
    "wav, a-law": ("wav", "pcm_alaw", 8_000),
    "mp3": ("mp3", "libmp3lame", 44_100),
    "flac": ("flac", "flac", 48_000),
    "aac": ("adts", "aac", 44_100),
    "m4a": ("ipod", "aac", 44_100),
    "mp4": ("mp4", "aac", 48_000),
    "mov": ("mov", "aac", 48_000),
    "ogg, opus": ("ogg", "libopus", 48_000),
    "webm, opus": ("webm", "libopus", 48_000),
    "matroska": ("matroska", "aac", 44_100),
    "aiff": ("aiff", "pcm_s16be", 22_050),
    "au": ("au", "pcm_s16be", 16_000),
    "caf": ("caf", "pcm_s16le", 44_100),
    "mpeg-ts": ("mpegts", "aac", 44_100),
}
EXACT = [
    name for name in FORMATS if name.startswith(("wav, 16", "wav, 24", "wav, floats", "flac", "aiff", "au", "caf"))
]


def tone(seconds: float, rate: int, frequency: float = 440.0, loudness: float = 0.5) -> np.ndarray:
    """float32 [seconds * rate]."""
    time = np.arange(round(seconds * rate)) / rate
    return (loudness * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def encoded(name: str, channels: list[np.ndarray] | None = None) -> bytes:
    """A file of one of FORMATS: the channels at its rate, or two alike of one second of 440 Hz."""
    container, codec, rate = FORMATS[name]
    samples = np.stack(channels if channels is not None else [tone(1.0, rate)] * 2)
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[len(samples)]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        context = stream.codec_context
        resampler = av.AudioResampler(context.format.name, layout, rate, context.frame_size or None)
        frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate = rate
        for part in resampler.resample(frame) + resampler.resample(None):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 16_000, *, stated: int | None = None) -> bytes:
    """16 bits, [n] or [n, channels]; `stated` is the number of bytes that the header says there are."""
    data = (np.clip(samples, -1, 1 - 2**-15) * 32768).round().astype("<i2").tobytes()
    size = len(data) if stated is None else stated
    channels = samples.shape[1] if samples.ndim > 1 else 1
    riff = struct.pack("<4sI4s4sI", b"RIFF", (36 + size) & 0xFFFFFFFF, b"WAVE", b"fmt ", 16)
    facts = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
    return riff + facts + struct.pack("<4sI", b"data", size & 0xFFFFFFFF) + data


def video_with_sound(seconds: float = 1.0, *, with_sound: bool = True) -> bytes:
    """Grey frames, and 440 Hz beside them, as MP4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        pictures = output.add_stream("mpeg4", rate=10)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        sound = output.add_stream("aac", rate=48_000, layout="mono") if with_sound else None
        for _ in range(round(10 * seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 128, np.uint8), format="rgb24")
            output.mux(pictures.encode(frame))
        output.mux(pictures.encode(None))
        if sound is not None:
            resampler = av.AudioResampler("fltp", "mono", 48_000, sound.codec_context.frame_size)
            heard = av.AudioFrame.from_ndarray(tone(seconds, 48_000)[None], format="fltp", layout="mono")
            heard.sample_rate = 48_000
            for part in resampler.resample(heard) + resampler.resample(None):
                output.mux(sound.encode(part))
            output.mux(sound.encode(None))
    return buffer.getvalue()
