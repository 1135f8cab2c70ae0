"""Mutated sounds at length: typed errors only. `make fuzz`; a tenth of SIGLANCE_FUZZ_INPUTS, because each takes a
process."""

from __future__ import annotations

import numpy as np
import pytest

from siglance.engine import Limits
from siglance.engine.audio import is_sound, open_sound
from siglance.engine.errors import AudioError

from .audio_files import FORMATS, encoded, tone, video_with_sound
from .test_fuzz import INPUTS, MOST_KEPT, SEED, Watch, largest_child, memory, mutated

pytestmark = pytest.mark.fuzz

LIMITS = Limits(max_audio_seconds=9.5, max_audio_memory=2**29)


def test_mutated_sounds():
    """Every container and codec of the table. What crashes FFmpeg ends its process and is refused like other damage."""
    rng = np.random.default_rng(SEED)
    files = [encoded(name, [tone(0.3, rate), tone(0.3, rate, 1000)]) for name, (_, _, rate) in FORMATS.items()]
    files.append(video_with_sound(0.5))
    count = INPUTS // 10
    opened = samples = 0
    refused: list[str] = []
    watch = Watch()
    for _ in range(count):
        data = mutated(rng, files)
        with watch():
            is_sound(data)
            try:
                sound = open_sound(data, rate=16_000, longest=30.0, why="the limit", limits=LIMITS, name="audio 1")
                waveform = sound.waveform()
                assert waveform.shape == (sound.samples,)
                assert waveform.dtype == np.float32
                assert np.isfinite(waveform).all()
                opened += 1
                samples += sound.samples
            except AudioError as error:
                refused.append(str(error))
    crashed = [message for message in refused if "ended with" in message]
    late = [message for message in refused if "not decoded after" in message]
    peak = largest_child()
    print(
        f"{count} sounds (seed {SEED}): {opened} opened, {samples / 16_000:.0f} s, {len(refused)} refused, of these "
        f"{len(crashed)} because their process ended and {len(late)} at the limit on time; largest process "
        f"{peak / 1e6:.0f} MB, {watch.report()}"
    )
    assert all(message.startswith("audio 1: ") and "\n" not in message for message in refused)
    assert watch.slowest < LIMITS.max_audio_seconds
    assert peak < LIMITS.max_audio_memory + 100_000_000
    assert memory("VmRSS") - watch.first < MOST_KEPT
