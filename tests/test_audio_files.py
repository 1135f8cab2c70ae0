"""Sounds in any form become samples of one channel at one rate, or errors that say why."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siglance.engine import audio as module
from siglance.engine.audio import Sound, is_sound, is_sound_source, open_sound
from siglance.engine.errors import AudioError
from siglance.engine.image import load_image
from siglance.engine.known_files import KnownFiles
from siglance.engine.limits import Limits

from .audio_files import EXACT, FORMATS, encoded, tone, video_with_sound, wav
from .pdf_files import numbered_pages
from .picture_files import encoded as encoded_picture
from .rare_pictures import rare_pictures

RATE = 16_000


def opened(source, **options) -> Sound:
    return open_sound(source, **{"rate": RATE, "longest": 30.0, "why": "that is why", "name": "audio 2", **options})


def heard(source, **options) -> np.ndarray:
    return opened(source, **options).waveform()


def fit(samples: np.ndarray, frequency: float = 440.0) -> tuple[float, float, float]:
    """Loudness and phase of a tone in the middle of some samples, and what is left (root mean square)."""
    middle = np.arange(len(samples) // 8, len(samples) * 7 // 8)
    angles = 2 * np.pi * frequency * middle / RATE
    waves = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    found = np.linalg.lstsq(waves, samples[middle], rcond=None)[0]
    return (
        float(np.hypot(*found)),
        float(np.arctan2(found[1], found[0])),
        float(np.std(samples[middle] - waves @ found)),
    )


# --- formats


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_sound_that_is_in_it(name):
    samples = heard(encoded(name))
    assert samples.dtype == np.float32
    loudness, phase, rest = fit(samples)
    assert loudness == pytest.approx(0.5, rel=0.08)  # the encoder of MP3 takes a little away
    assert rest < 0.01
    # Encoders put some silence in front, and AAC behind; one second of sound is in there.
    assert 0.98 * RATE <= len(samples) <= 1.13 * RATE
    if name in EXACT:
        assert len(samples) == RATE
        assert loudness == pytest.approx(0.5, abs=2e-3)
        assert abs(phase) < 1e-3


def test_samples_at_the_rate_of_the_model_are_not_touched():
    samples = (np.random.default_rng(0).integers(-(2**15), 2**15, 5000) / 2**15).astype(np.float32)
    assert np.array_equal(heard(wav(samples)), samples)


@pytest.mark.parametrize(
    "form", ["path", "text path", "bytes", "bytearray", "memoryview", "file", "stream", "data URI"]
)
def test_every_form_of_a_source(form, tmp_path):
    data = wav(tone(0.1, RATE))
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    source = {
        **{"path": path, "text path": str(path), "bytes": data, "bytearray": bytearray(data)},
        **{"memoryview": memoryview(data), "file": io.BytesIO(b"xx" + data)},
        **{"stream": io.BufferedReader(io.BytesIO(data))},
        "data URI": "data:audio/wav;base64," + base64.b64encode(data).decode(),
    }[form]
    if form == "file":
        source.seek(2)
    assert len(heard(source)) == 1600


def test_channels_are_mixed_to_their_mean():
    left, right = tone(0.5, 48_000, 440), tone(0.5, 48_000, 1000)
    mixed = heard(encoded("wav, 16 bits, 48 kHz", [left, right]))
    assert fit(mixed, 440)[0] == pytest.approx(0.25, abs=2e-3)
    assert fit(mixed, 1000)[0] == pytest.approx(0.25, abs=2e-3)
    assert np.abs(heard(encoded("wav, 16 bits, 48 kHz", [left, -left]))).max() < 1e-3
    six = heard(encoded("wav, 16 bits, 48 kHz", [left] * 6))
    assert fit(six)[0] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("name", ["wav, 16 bits", "flac", "aiff", "caf"])
def test_case_83_eight_loudspeakers_are_mixed_too(name):
    """AIFF and CAF say themselves where each loudspeaker stands."""
    samples = tone(0.3, FORMATS[name][2])
    assert fit(heard(encoded(name, [samples] * 6 + [0 * samples] * 2)))[0] == pytest.approx(0.375, abs=2e-3)


@pytest.mark.parametrize("channels", [3, 9, 64])
def test_case_83_any_number_of_microphones_is_mixed(channels):
    recorded = np.random.default_rng(channels).integers(-9000, 9000, (2000, channels)) / 32768
    np.testing.assert_allclose(heard(wav(recorded)), recorded.mean(axis=1), atol=1e-6)


def test_case_83_more_channels_than_can_be_mixed():
    with pytest.raises(AudioError, match="65 channels, at most 64 are mixed"):
        heard(wav(np.zeros((100, 65))))


@pytest.mark.parametrize(("frequency", "loss"), [(3000, 0.1), (7000, 0.6), (9000, -55), (12_000, -80), (20_000, -80)])
def test_what_lies_above_half_the_rate_does_not_come_back_below(frequency, loss):
    """Decibels that are lost, at most, or at least for frequencies that the model's rate does not have."""
    samples = heard(encoded("wav, floats", [tone(0.5, 44_100, frequency)]))[1000:-1000]
    level = 20 * np.log10(np.std(samples) / (0.5 / 2**0.5) + 1e-9)
    assert level > -loss if loss > 0 else level < loss


def test_the_sound_of_a_video():
    assert fit(heard(video_with_sound()))[0] == pytest.approx(0.5, rel=0.05)
    with pytest.raises(AudioError, match="audio 2: no sound in it, only video"):
        heard(video_with_sound(with_sound=False))


# --- arrays and raw samples


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([0.5, -0.5]), [0.5, -0.5]),
        (np.array([0.5, -0.5], np.float16), [0.5, -0.5]),
        (np.array([16384, -32768], np.int16), [0.5, -1.0]),
        (np.array([2**30, -(2**31)], np.int32), [0.5, -1.0]),
        (np.array([192, 0], np.uint8), [0.5, -1.0]),
        (np.array([[0.5, 0.25, 0.0], [-0.5, 0.25, 0.5]]), [0.0, 0.25, 0.25]),
        (np.array([[0.5, -0.5], [0.25, 0.25], [0.0, 0.5]]), [0.0, 0.25, 0.25]),
        (np.array([[0.5, 0.25]]), [0.5, 0.25]),
        (np.array([16384, -32768], np.int16).astype(">i2"), [0.5, -1.0]),
    ],
)
def test_arrays(array, expected):
    assert heard(array, sample_rate=RATE).tolist() == expected


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(0), r"shape \[0\]"),
        (np.zeros((2, 2, 2)), r"shape \[2, 2, 2\]"),
        (np.zeros((3, 3)), "which axis"),
        (np.zeros((100, 200)), "which axis"),
        (np.array([0.0, np.nan]), "nan"),
        (np.array([0.0, np.inf]), "inf"),
        (np.array([0.0, 1000.0]), "reach 1000"),
        (np.zeros(4, np.bool_), "dtype bool"),
        (np.zeros(4, np.int64), "dtype int64"),
        (np.zeros(4, np.complex64), "dtype complex64"),
    ],
)
def test_arrays_that_are_no_samples(array, reason):
    with pytest.raises(AudioError, match=f"^audio 2: .*{reason}"):
        heard(array, sample_rate=RATE)


def test_an_array_needs_its_rate_and_is_resampled():
    with pytest.raises(AudioError, match="samples need their rate"):
        heard(tone(1, RATE))
    for rate in (8000, 44_100, 48_000):
        samples = heard(tone(1, rate), sample_rate=rate)
        assert len(samples) == RATE
        assert fit(samples) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-3))


@pytest.mark.parametrize("rate", [0, -1, 1.5, True, "16000", 400_000])
def test_rates_that_are_none(rate):
    with pytest.raises(AudioError, match=r"the sample rate is .*, it must be an integer from 1 to 384000"):
        heard(tone(1, RATE), sample_rate=rate)


def test_raw_pcm(tmp_path):
    """By its name, by what a data URI says, or by the rate that is given."""
    samples = (np.arange(-400, 400) / 1000).astype(np.float32)
    data = (samples * 32768).round().astype("<i2").tobytes()
    path = tmp_path / "a.pcm"
    path.write_bytes(data)
    payload = base64.b64encode(data).decode()
    expected = np.frombuffer(data, "<i2") / np.float32(32768)
    for source, options in (
        (path, {}),
        (f"data:audio/pcm;base64,{payload}", {}),
        (f"data:audio/pcm;rate=16000;base64,{payload}", {}),
        (data, {"sample_rate": RATE}),
    ):
        assert np.array_equal(heard(source, **options), expected)
    assert len(heard(f"data:audio/pcm;rate=8000;base64,{payload}")) == 1600
    for bad in ("rate=fast", "rate=0", "rate=99999999999999999999"):
        with pytest.raises(AudioError, match="sample rate"):
            heard(f"data:audio/pcm;{bad};base64,{payload}")
    with pytest.raises(AudioError, match="801 bytes are not samples of 16 bits"):
        heard(data[:801], sample_rate=RATE)


# --- parts


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 900), st.integers(1, 900))
def test_parts_of_arrays_and_files_are_slices(start, length):
    samples = tone(1.0, RATE)
    start, end = start / 1000, (start + length) / 1000
    part = samples[round(start * RATE) : round(end * RATE)]
    assert np.array_equal(heard(samples, sample_rate=RATE, start=start, end=end), part)


@pytest.mark.parametrize("name", ["wav, 16 bits, 48 kHz", "flac", "mp3", "ogg, opus"])
@pytest.mark.parametrize(("start", "end"), [(0.25, None), (0.0, 0.5), (0.3, 0.7), (0.9, 5.0)])
def test_parts_of_files_are_slices_of_the_whole(name, start, end):
    data = encoded(name)
    whole = heard(data)
    part = heard(data, start=start, end=end)
    assert np.array_equal(part, whole[round(start * RATE) : None if end is None else round(end * RATE)])


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (-1, None, "the start is -1"),
        (float("nan"), None, "the start is nan"),
        (float("inf"), None, "the start is inf"),
        ("1", None, "the start is '1'"),
        (True, None, "the start is True"),
        (0, 0, "not behind the start"),
        (2, 1, "the end at 1 s is not behind the start at 2 s"),
        (1.5, None, r"the start at 1.5 s is behind its end, it is 1 s long"),
    ],
)
@pytest.mark.parametrize("kind", ["array", "file"])
def test_parts_that_do_not_exist(start, end, reason, kind):
    source = tone(1, RATE) if kind == "array" else wav(tone(1, RATE))
    options = {"sample_rate": RATE} if kind == "array" else {}
    with pytest.raises(AudioError, match=f"^audio 2: .*{reason}"):
        heard(source, start=start, end=end, **options)


# --- limits


def test_the_longest_sound_is_exactly_that_long():
    assert len(heard(wav(tone(2.0, RATE)), longest=2.0)) == 2 * RATE
    for source, options in ((wav(tone(2.001, RATE)), {}), (tone(2.001, RATE), {"sample_rate": RATE})):
        with pytest.raises(AudioError, match="audio 2: longer than 2 s, that is why"):
            heard(source, longest=2.0, **options)
    assert len(heard(wav(tone(9, RATE)), longest=2.0, start=5, end=7)) == 2 * RATE


def test_decoding_stops_where_the_longest_sound_ends():
    """An hour of silence is 2 MB of FLAC; no more of it is decoded than a little over 30 seconds."""
    hour = encoded("flac", [np.zeros(48_000 * 600, np.float32)])
    begin = time.perf_counter()
    with pytest.raises(AudioError, match="longer than 30 s"):
        heard(hour, limits=Limits(max_audio_memory=300 * 2**20))
    assert time.perf_counter() - begin < 5


def test_limits_name_themselves(tmp_path):
    data = wav(tone(1, RATE))
    with pytest.raises(AudioError, match="audio 2: 32044 bytes, over the limit of 1000 bytes"):
        heard(data, limits=Limits(max_bytes=1000))
    with pytest.raises(AudioError, match=r"audio 2: not decoded after 0\.01 seconds, the limit for a sound"):
        heard(data, limits=Limits(max_audio_seconds=0.01))
    with pytest.raises(AudioError, match=r"decoding it ended with .*limit of 1000 bytes of memory"):
        heard(wav(tone(29, RATE)), limits=Limits(max_audio_memory=1000))


@pytest.mark.parametrize("name", ["max_audio_length", "max_audio_seconds", "max_audio_memory"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "3", True])
def test_limits_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        Limits(**{name: value})


# --- what is broken


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty, 0 bytes"),
        (b"<html>404</html>", "not a sound that can be read"),
        (b"\0" * 1000, "not a sound that can be read"),
        (b"RIFF\x24\0\0\0WAVE", "not a sound|damaged"),
        (b"ID3\4\0\0\0\0\0\0", "not a sound|damaged"),
        (b"fLaC", "not a sound|damaged|form"),
        (wav(np.zeros(0, np.float32)), "damaged or encrypted, no sound"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not a sound"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not a sound"),
        (numbered_pages(1), "not a sound"),
    ],
)
def test_what_is_no_sound_says_so(data, reason):
    with pytest.raises(AudioError, match=rf"^audio 2: [^\n]*({reason})[^\n]*$"):
        heard(data)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(AudioError, match=r"audio 2: cannot read '.*gone\.wav': No such file"):
        heard(tmp_path / "gone.wav")
    with pytest.raises(AudioError, match="URLs are not fetched"):
        heard("https://example.org/a.mp3")


@pytest.mark.parametrize("name", ["wav, 16 bits", "flac", "mov", "aiff"])
def test_a_file_that_was_cut_off_is_an_error(name):
    """Formats that say how long they are. Half of a file is not taken for the whole."""
    data = encoded(name)
    with pytest.raises(
        AudioError, match=r"audio 2: (cut off or damaged, it has 0\.\d+ s of 1|cut off|damaged|not a sound)"
    ):
        heard(data[: len(data) // 2])


def test_the_part_before_the_cut_can_be_chosen():
    data = wav(tone(1, RATE))
    part = heard(data[: len(data) // 2], end=0.4)
    assert np.array_equal(part, heard(data, end=0.4))


@pytest.mark.parametrize("stated", [0xFFFFFFFF, 0])
def test_a_stream_whose_header_could_not_say_its_length(stated):
    """As programs write that cannot go back: `ffmpeg -f wav -`."""
    assert len(heard(wav(tone(1, RATE), stated=stated))) == RATE


def test_damage_in_the_middle_is_an_error_that_says_where():
    data = bytearray(encoded("flac", [np.random.default_rng(0).normal(0, 0.1, 96_000).astype(np.float32)]))
    middle = len(data) // 2
    data[middle : middle + 3000] = os.urandom(3000)
    with pytest.raises(AudioError, match=r"audio 2: .*damaged, it .* s.*; a"):
        heard(bytes(data))
    assert len(heard(bytes(data), end=0.5)) == RATE // 2


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -32768.0])
def test_files_of_floats_that_are_no_samples(value):
    samples = tone(0.5, 44_100)
    data = encoded("wav, floats", [samples])
    broken = data.replace(samples[1000:1001].tobytes(), np.float32(value).tobytes())
    with pytest.raises(AudioError, match=r"audio 2: samples reach (nan|inf|\d)"):
        heard(broken)


def test_tags_around_a_sound_are_none():
    plain = encoded("mp3")
    tag = b"ID3\4\0\0\0\0\2\1" + b"\0" * 257
    last = b"TAG" + b"x" * 125
    samples = heard(plain)
    assert np.array_equal(heard(tag + plain), samples)
    assert np.array_equal(heard(plain + last), samples)


def test_without_the_extra_files_say_what_to_install_and_samples_need_nothing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    with pytest.raises(AudioError, match=r"pip install 'siglance\[audio\]'"):
        heard(wav(tone(1, RATE)))
    assert len(heard(tone(1, RATE), sample_rate=RATE)) == RATE


# --- the process


def test_the_worker_opens_nothing_but_what_it_is_given(tmp_path):
    """Run as the engine runs it, on a list of parts that names another file."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(tone(1, RATE)))
    listing = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    question = {"path": [folder for folder in sys.path if folder], "memory": 2**29, "seconds": 10, "rate": RATE}
    question |= {"start": 0, "end": None, "most": RATE, "raw": None}
    worker = Path(module.__file__).with_name("audio_worker.py")
    done = subprocess.run(
        [sys.executable, "-I", worker, json.dumps(question)], input=listing, capture_output=True, check=True
    )
    assert "not a sound" in json.loads(done.stdout)["error"]


def test_a_worker_that_breaks_off_is_an_error(monkeypatch, tmp_path):
    for script, reason in (
        ("import os; os.abort()", "ended with SIGABRT"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import sys; sys.stdout.write('{\"samples\": 100}\\n')", "broke off"),
    ):
        worker = tmp_path / "worker.py"
        worker.write_text(script)
        monkeypatch.setattr(module, "_WORKER", dataclasses.replace(module._WORKER, script=str(worker)))
        with pytest.raises(AudioError, match=reason):
            heard(wav(tone(0.1, RATE)))


# --- what is known


def test_a_known_file_is_decoded_only_when_its_samples_are_asked_for(monkeypatch):
    known, data, asked = KnownFiles(), wav(tone(1, RATE)), []
    ask = module._ask
    monkeypatch.setattr(module, "_ask", lambda *arguments: asked.append(1) or ask(*arguments))
    first = opened(data, known=known)
    assert (first.samples, first.seconds, len(asked)) == (RATE, 1.0, 1)
    again = opened(data, known=known)
    assert (again.samples, len(asked)) == (RATE, 1)
    assert np.array_equal(again.waveform(), first.waveform())
    assert len(asked) == 2
    assert opened(data, known=known, end=0.5).samples == RATE // 2  # another part is another sound
    assert len(asked) == 3


# --- what is what


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_told_by_their_content(name):
    data = encoded(name)
    # A stream of MPEG says nothing about what is in it, and is not a sound unless `Audio` says so.
    assert is_sound(data) == (name != "mpeg-ts")


def test_pictures_documents_and_videos_are_no_sounds():
    rare = [data for data, _ in rare_pictures(8, 6, (200, 100, 50)).values()]
    for data in (*rare, numbered_pages(1), video_with_sound(), b"", b"RIFF\0\0\0\0WEBPVP8 "):
        assert not is_sound(data)
    picture = Image.new("RGB", (4, 4))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"):
        assert not is_sound(encoded_picture(picture, kind))
        assert load_image(encoded_picture(picture, kind)).shape == (4, 4, 3)


@pytest.mark.parametrize("brand", [b"mp42", b"3gp4", b"isom"])
def test_recordings_of_phones_are_sounds(brand, tmp_path):
    """Of many a brand, with their index at the end of the file; the same with a track of pictures is a video."""
    data = encoded("m4a")
    assert data.index(b"moov") > data.index(b"mdat")
    recording = data[:8] + brand + data[12:]
    path = tmp_path / "recording"
    for content, is_one in ((recording, True), (video_with_sound(), False)):
        path.write_bytes(content)
        assert is_sound(content) == is_one
        assert is_sound_source(path) == is_one
        assert is_sound_source(io.BytesIO(content)) == is_one
    for broken in (
        recording[:40],
        recording[: len(recording) // 2],
        b"\0\0\0\0ftyp",
        b"\0\0\0\1ftypisom" + b"\xff" * 8,
    ):
        assert not is_sound(broken)


def test_sources_are_told_without_being_used_up(tmp_path):
    data, path = wav(tone(0.1, RATE)), tmp_path / "a.dat"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    assert is_sound_source(path)
    assert is_sound_source(str(path))
    assert is_sound_source(data)
    assert is_sound_source(memoryview(data))
    assert is_sound_source(stream)
    assert stream.tell() == 0
    assert is_sound_source("data:audio/mpeg;base64,AAAA")
    assert is_sound_source(tmp_path / "gone.mp3")
    assert not is_sound_source(tmp_path / "gone.png")
    assert not is_sound_source(io.TextIOWrapper(io.BytesIO(b"RIFF")))
    assert not is_sound_source(None)
    assert not is_sound_source(tmp_path)
