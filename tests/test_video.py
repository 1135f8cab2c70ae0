"""Frames of videos: the right ones, at their true times, upright, from every container that can be written here."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from siglance.engine import Limits, worker_limits
from siglance.engine.errors import InputError, VideoError
from siglance.engine.video import Clip, clock, is_video, open_clip
from siglance.engine.video_frames import Index, choose

from .video_files import HEIGHT, WIDTH, clip, counter_picture, read_counter, sound_only, transparent

LIMITS = Limits()


def opened(source: object, fps: float = 1.0, start: float | None = None, end: float | None = None, **limits) -> Clip:
    chosen = dataclasses.replace(LIMITS, **limits)
    return open_clip(source, fps=fps, start=start, end=end, limits=chosen, name="video 1")


def shown(video: Clip, height: int | None = None, width: int | None = None) -> list[np.ndarray]:
    size = height or video.height, width or video.width
    return [video.pixels(index, *size, "bicubic") for index in range(len(video.times))]


def counters(video: Clip) -> list[int]:
    return [read_counter(picture) for picture in shown(video)]


# --- which frames: the table of issue figures, expected and got

VARIABLE = [0, 0.1, 0.2, 0.9, 1.45, 1.5, 4.0, 4.1, 4.9, 5.0, 7.3]
TABLE = {
    # name: (clip, options of the request, times, counters)
    "constant 25/s": (lambda: clip(100), {}, [0, 1, 2, 3], [0, 25, 50, 75]),
    "constant 25/s at 2/s": (lambda: clip(50), {"fps": 2.0}, [0, 0.52, 1, 1.52], [0, 13, 25, 38]),
    "30/s in milliseconds at 3/s": (
        lambda: clip(61, fps=30, container="matroska"),
        {"fps": 3.0},
        [0, 0.333, 0.667, 1, 1.333, 1.667, 2],
        [0, 10, 20, 30, 40, 50, 60],
    ),
    "variable rate": (lambda: clip(VARIABLE), {}, [0, 1.45, 4.0, 5.0, 7.3], [0, 4, 6, 9, 10]),
    "B-frames": (lambda: clip(60, options={"bf": "3", "g": "12"}), {}, [0, 1, 2], [0, 25, 50]),
    "no B-frames": (lambda: clip(60, options={"bf": "0", "g": "12"}), {}, [0, 1, 2], [0, 25, 50]),
    "one frame": (lambda: clip(1), {}, [0], [0]),
    "0.4 s": (lambda: clip(10), {}, [0], [0]),
    "0.4 s at 5/s": (lambda: clip(10), {"fps": 5.0}, [0, 0.2], [0, 5]),
    "first time is 7.5 s": (
        lambda: clip([7.5 + n / 25 for n in range(60)], container="matroska"),
        {},
        [0, 1, 2],
        [0, 25, 50],
    ),
    "from 1.5 to 3.5 s": (lambda: clip(100), {"start": 1.5, "end": 3.5}, [1.5, 2.52], [37, 63]),
    "from 2 s": (lambda: clip(100), {"start": 2.0}, [2, 3], [50, 75]),
    "to 2 s": (lambda: clip(100), {"end": 2.0}, [0, 1], [0, 25]),
    "ten minutes": (
        lambda: clip(1500, fps=Fraction(5, 2), options={"g": "50"}),
        {},
        [10 * n for n in range(60)],
        [25 * n for n in range(60)],
    ),
    "inside a frame that lasts": (lambda: clip(VARIABLE), {"start": 2.0, "end": 3.5}, [2.0], [5]),
    "a start that nothing begins at": (lambda: clip(VARIABLE), {"start": 3.0}, [3, 4, 5, 7.3], [5, 6, 9, 10]),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_frames_are_those_at_their_times(name, record_property):
    """Figure: expected and got."""
    make, options, times, numbers = TABLE[name]
    video = opened(make(), **options)
    got = counters(video)
    record_property(name, f"expected {numbers}, got {got}")
    assert got == numbers
    assert video.times == pytest.approx(times, abs=0.0006)


def test_a_long_clip_is_thinned_evenly_to_the_cap():
    """Of n frames floor(i n / cap): those of the default sampler of transformers."""
    video = opened(clip(200, fps=1, options={"g": "10"}), max_frames=8)
    assert counters(video) == [0, 25, 50, 75, 100, 125, 150, 175]
    assert video.times == (0, 25, 50, 75, 100, 125, 150, 175)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (0.999, "00:00"), (61.9, "01:01"), (599.96, "09:59"), (6000, "100:00")]
)
def test_the_clock_rounds_down(seconds, text):
    assert clock(seconds) == text


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(0, 5000),
    st.integers(1, 20),
)
@example([1] * 1300, 3, 621, 20)  # 954 of 954 1/3 ticks is the frame that was wanted
def test_laws_of_choosing(gaps, fps, start_ms, most):
    """Ascending, each once, at most as many as allowed, no gap longer than a step where there are frames, and the first
    is what is shown at the start."""
    ticks = np.cumsum([1000, *gaps]).tolist()
    index = Index(ticks, 40, Fraction(1, 1000), [])
    start = start_ms / 1000
    if start and start >= index.seconds:
        with pytest.raises(InputError, match="behind its end"):
            choose(index, fps, start, None, most)
        return
    every = choose(index, fps, start, None, 10**6)
    numbers = [number for _, number in every]
    assert numbers == sorted(set(numbers))
    shown_at_start = max(n for n, tick in enumerate(ticks) if tick - ticks[0] <= start_ms or not n)
    assert numbers[0] == shown_at_start
    for (before, first), (after, second) in itertools.pairwise(every):
        between = ticks[first + 1 : second]
        half = Fraction(1, 2)  # of a tick is forgiven: a frame may stand that much before the multiple it is taken for
        step = int((round(before * 1000) - start_ms + half) * fps / 1000) + 1  # the next multiple
        late = start_ms + Fraction(1000 * step, fps)
        assert all(tick - ticks[0] + half < late for tick in between), (before, after)
    thinned = choose(index, fps, start, None, most)
    assert len(thinned) == min(most, len(every))
    assert set(thinned) <= set(every)
    assert thinned[0] == every[0]


# --- containers

CONTAINERS = {
    "mp4 H.264": ("mp4", "libx264", True),
    "mp4 H.265": ("mp4", "libx265", True),
    "mp4 AV1": ("mp4", "libsvtav1", False),
    "mp4 MPEG-4": ("mp4", "mpeg4", True),
    "mov H.264": ("mov", "libx264", True),
    "mov MJPEG": ("mov", "mjpeg", True),
    "mpeg MPEG-2": ("mpeg", "mpeg2video", True),
    "mpg MPEG-1": ("mpeg", "mpeg1video", True),
    "mpg MPEG-1, the stream alone": ("mpeg1video", "mpeg1video", False),
    "avi MPEG-4": ("avi", "mpeg4", True),
    "avi MJPEG": ("avi", "mjpeg", True),
    "avi H.264 with B-frames": ("avi", "libx264", True),
    "wmv WMV 2": ("asf", "wmv2", True),
    "flv Sorenson": ("flv", "flv", False),
    "flv H.264": ("flv", "libx264", True),
    "webm VP8": ("webm", "libvpx", False),
    "webm VP9": ("webm", "libvpx-vp9", False),
    "3gpp H.264": ("3gp", "libx264", True),
    "3gpp MPEG-4": ("3gp", "mpeg4", True),
    "mkv H.264": ("matroska", "libx264", True),
    "ts H.264": ("mpegts", "libx264", True),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_that_are_read(name, record_property):
    """The list in the README: each is told by content, and gives the frames of 0, 1 and 2 seconds."""
    container, codec, audio = CONTAINERS[name]
    data = clip(65, container=container, codec=codec, audio=audio)
    assert is_video(data[:1024])
    got = counters(opened(data))
    record_property(name, f"expected [0, 25, 50], got {got}")
    assert got == [0, 25, 50]


def test_a_file_without_a_stated_length():
    """A live recording: neither a duration nor an index is written."""
    data = clip(65, container="webm", codec="libvpx", container_options={"live": "1"})
    assert counters(opened(data)) == [0, 25, 50]
    fragments = clip(65, container_options={"movflags": "empty_moov+frag_keyframe"}, options={"g": "10"})
    assert counters(opened(fragments)) == [0, 25, 50]


# --- as it is shown


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_the_rotation_of_the_file_is_applied(degrees, turns):
    """Degrees counter-clockwise, as np.rot90 turns."""
    video = opened(clip(30, rotation=degrees))
    assert (video.height, video.width) == ((HEIGHT, WIDTH) if turns % 2 == 0 else (WIDTH, HEIGHT))
    for picture, number in zip(shown(video), [0, 25], strict=True):
        assert read_counter(np.rot90(picture, -turns)) == number


def test_wide_pixels_become_square():
    video = opened(clip(2, aspect=Fraction(4, 3)))
    assert (video.height, video.width) == (HEIGHT, round(WIDTH * 4 / 3))
    assert read_counter(shown(video)[0]) == 0


def test_frames_are_resized_as_pictures_are():
    """Straight from the decoded frame, by the same filter, and bit for bit."""
    video = opened(clip(30))
    for filter, name in ((Image.Resampling.BICUBIC, "bicubic"), (Image.Resampling.BILINEAR, "bilinear")):
        whole = video.pixels(1, HEIGHT, WIDTH, name)
        expected = np.asarray(Image.fromarray(whole).resize((176, 48), filter))
        np.testing.assert_array_equal(video.pixels(1, 48, 176, name), expected)


def test_colours_are_those_of_the_picture():
    """Lossless: what is left is the rounding of YUV with shared colour values."""
    whole = shown(opened(clip(1, options={"qp": "0"})))[0].astype(int)
    expected = counter_picture(0).astype(int)
    inner = np.abs(whole - expected)[HEIGHT // 3 + 2 :, 4 : WIDTH // 2 - 4]
    assert inner.max() <= 4


@pytest.mark.parametrize(("codec", "pixels"), [("png", "rgba"), ("qtrle", "argb"), ("prores_ks", "yuva444p10le")])
def test_a_transparent_frame_lies_on_white(codec, pixels):
    """Green of which nothing, half and all is to be seen."""
    frame = opened(transparent(codec, pixels)).pixels(0, 48, 96, "bicubic")
    expected = [[255, 255, 255], [127, 227, 127], [0, 200, 0]]
    np.testing.assert_allclose(frame[24, [8, 48, 88]], expected, atol=4)


def test_frames_come_in_any_order_and_again():
    video = opened(clip(100))
    pictures = [video.pixels(index, HEIGHT, WIDTH, "bicubic") for index in (3, 0, 0, 2, 1)]
    assert [read_counter(picture) for picture in pictures] == [75, 0, 0, 50, 25]


# --- refusals: the part, and why


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "empty, 0 bytes"),
        (lambda: b"\0" * 5000, "not a video that can be read"),
        (lambda: b"hello, I am no video at all" * 100, "not a video that can be read"),
        (lambda: sound_only(), "no moving picture in it, only audio"),
        (lambda: clip(50)[:2000], "not a video that can be read"),
        (lambda: cut(clip(100, container="matroska", options={"g": "10"})), "damaged or cut off after"),
        (
            lambda: clip(
                30,
                container_options={
                    "encryption_scheme": "cenc-aes-ctr",
                    "encryption_key": "00112233445566778899aabbccddeeff",
                    "encryption_kid": "0123456789abcdef0123456789abcdef",
                },
            ),
            "encrypted, and cannot be read without its key",
        ),
    ],
    ids=["empty", "zeros", "text", "sound", "header cut", "cut", "encrypted"],
)
def test_what_cannot_be_read_says_why(make, reason):
    with pytest.raises(VideoError, match=rf"^video 1: .*{reason}"):
        opened(make())


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("matroska", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
        ("mp4", "libx264", {"movflags": "faststart"}),
        ("flv", "libx264", {}),
    ],
)
def test_the_frames_before_a_cut_can_be_chosen(container, codec, options, tmp_path):
    path = tmp_path / "whole"
    data = clip(100, container=container, codec=codec, options={"g": "10"}, container_options=options, path=path)
    data = cut(data)
    with pytest.raises(VideoError, match="cut off after"):
        opened(data)
    assert counters(opened(data, end=1.5)) == [0, 25]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 1e9}, "fps is"),
        ({"fps": "2"}, "fps is '2', it must be a number"),
        ({"start": -1}, "start is -1"),
        ({"start": 2, "end": 2}, "end is 2"),
        ({"end": float("inf")}, "end is inf"),
        ({"start": 60.0}, r"start at 60 s is behind its end, it is 2 s long"),
    ],
)
def test_a_range_that_is_not_possible(options, reason):
    with pytest.raises(VideoError, match=f"^video 1: .*{reason}"):
        opened(clip(50), **options)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_video_bytes": 1000}, "over the limit of 1000 bytes"),
        ({"max_pixels": 20_000}, f"{WIDTH}x{HEIGHT} are {WIDTH * HEIGHT} pixels, the limit is 20000"),
        ({"max_video_seconds": 0.01}, "not done after 0.01 seconds"),
        ({"max_video_memory": 30 * 2**20}, "needs more than the limits"),
    ],
)
def test_limits_are_named(limits, reason, tmp_path):
    data = clip(50)
    (tmp_path / "a.mp4").write_bytes(data)
    for source in (data, tmp_path / "a.mp4"):
        with pytest.raises(VideoError, match=f"^video 1: .*({reason})"):
            opened(source, **limits)


def test_a_file_that_changes_between_two_looks(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clip(50))
    video = opened(path)
    path.write_bytes(clip(40))
    with pytest.raises(VideoError, match="changed while it was read"):
        shown(video)


# --- nothing else is opened


def playlists(target: str) -> dict[str, bytes]:
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n".encode(),
        "concat": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
        "dash": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
            f'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>'
        ).encode(),
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    }


@pytest.mark.parametrize("kind", ["hls", "concat", "dash", "sdp"])
def test_files_that_name_other_files_are_refused(kind, tmp_path):
    """And as the file itself is one that could be read, the refusal is not an accident."""
    target = tmp_path / "other.mp4"
    target.write_bytes(clip(50))
    path = tmp_path / "list.mp4"
    path.write_bytes(playlists(str(target))[kind])
    for source in (path, path.read_bytes()):
        with pytest.raises(VideoError, match="not a video that can be read"):
            opened(source)
    assert counters(opened(target)) == [0, 25]


def test_the_process_can_open_nothing_more(tmp_path):
    """Even a demuxer that follows names would find every door closed."""
    script = (
        "import runpy, sys, socket\n"
        "worker = runpy.run_path(sys.argv[1])\n"
        "worker['open_nothing_more']()\n"
        "for attempt in (lambda: open(sys.argv[1]), socket.socket):\n"
        "    try: attempt()\n"
        "    except OSError as error: print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, worker_limits.__file__], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["24", "24"]  # EMFILE


@pytest.mark.parametrize("source", ["https://example.org/a.mp4", "rtsp://127.0.0.1/x", "concat:a.mp4|b.mp4", "file:a"])
def test_names_of_protocols_are_not_followed(source):
    with pytest.raises(VideoError, match=r"URLs are not fetched|cannot read"):
        opened(source)
