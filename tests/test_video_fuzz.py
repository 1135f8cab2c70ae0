"""Mutated videos at length: typed errors only. `make fuzz`; a tenth of SIGLANCE_FUZZ_INPUTS, because each takes two
processes."""

from __future__ import annotations

import numpy as np
import pytest

from siglance.engine import Limits
from siglance.engine.errors import VideoError
from siglance.engine.video import open_clip

from .test_fuzz import INPUTS, MOST_KEPT, SEED, Watch, largest_child, memory, mutated
from .test_video import CONTAINERS
from .video_files import clip

pytestmark = pytest.mark.fuzz

LIMITS = Limits(max_video_seconds=9.5, max_video_memory=2**29, max_frames=5)
SLOWEST = 2 * LIMITS.max_video_seconds  # one look and one decoding


def test_mutated_videos():
    """Every container and codec of the table. What crashes FFmpeg ends its process and is refused like other damage."""
    rng = np.random.default_rng(SEED)
    files = [
        clip(20, container=container, codec=codec, audio=audio, options={"g": "5"}, height=48)
        for container, codec, audio in CONTAINERS.values()
    ]
    count = INPUTS // 10
    opened = frames = 0
    refused: list[str] = []
    watch = Watch()
    for _ in range(count):
        data = mutated(rng, files)
        with watch():
            try:
                video = open_clip(data, fps=3.0, start=None, end=None, limits=LIMITS, name="video 1")
                opened += 1
                for index in range(len(video.times)):
                    picture = video.pixels(index, 48, 96, "bicubic")
                    assert picture.shape == (48, 96, 3)
                    assert picture.dtype == np.uint8
                    frames += 1
            except VideoError as error:
                refused.append(str(error))
    crashed = [message for message in refused if "ended with" in message]
    late = [message for message in refused if "not done after" in message]
    peak = largest_child()
    print(
        f"{count} videos (seed {SEED}): {opened} opened, {frames} frames, {len(refused)} refused, of these "
        f"{len(crashed)} because their process ended and {len(late)} at the limit on time; largest process "
        f"{peak / 1e6:.0f} MB, {watch.report()}"
    )
    assert all(message.startswith("video 1: ") and "\n" not in message for message in refused)
    assert watch.slowest < SLOWEST
    assert peak < LIMITS.max_video_memory + 100_000_000
    assert memory("VmRSS") - watch.first < MOST_KEPT
