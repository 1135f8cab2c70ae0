"""Gemma 4's ears against transformers: front ends, soft tokens and logits, on tiny random checkpoints that it saved."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from .. import reference_audio as reference
from ..reference_model import load_checkpoint
from ..test_audio_graph import build_tower, speechlike

pytestmark = pytest.mark.parity

TOWERS = ("gemma4_e2b_audio", "gemma4_e2b_audio_unclipped")
# Broken frames, fewer tokens than a window, blocks of twelve and one more, the longest clip.
LENGTHS = (161, 320, 1601, 7681, 16_000, 33_333, 160_000, 480_000)


@pytest.fixture(scope="module")
def layouts():
    # Not at module level: the fast suite collects this file where torch is not installed.
    from . import layouts_audio

    return layouts_audio


@pytest.fixture(scope="module", params=TOWERS)
def tower(request, layouts, tmp_path_factory):
    """(transformers model, our audio graph, folder of the checkpoint) of a layout."""
    folder = tmp_path_factory.mktemp(request.param)
    model = layouts.write(request.param, folder / "checkpoint")
    return model, build_tower(folder / "checkpoint", folder / "graph"), folder / "checkpoint"


def record(record_property, name: str, found: np.ndarray, expected: np.ndarray, limit: float) -> None:
    assert found.shape == expected.shape
    difference = float(np.abs(found - expected).max())
    record_property(name, difference)
    print(f"{name}: max difference {difference:.2e} of {np.abs(expected).max():.2f}")
    assert difference <= limit


# --- the front end


@pytest.mark.parametrize("length", LENGTHS)
def test_log_mel_frames(layouts, record_property, length):
    """The reference, with which tests/test_audio_graph.py compares the graph to 1e-6."""
    waveform = speechlike(length)
    values, valid = layouts.features([waveform])
    assert not values[0][~valid[0]].any()  # frames that are not whole
    record(record_property, f"{length} samples", reference.log_mel(waveform), values[0][valid[0]], 1e-4)


def test_transformers_rounds_loud_tones(layouts, record_property):
    """It multiplies and transforms in float32: at full scale that is 2e-4 beside the floor, in its values, not ours."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    values, valid = layouts.features([tone])
    record(record_property, "1 kHz at full scale", reference.log_mel(tone), values[0][valid[0]], 5e-4)
    quiet, valid = layouts.features([tone / 16])
    record(record_property, "24 dB below", reference.log_mel(tone / 16), quiet[0][valid[0]], 1e-4)


# --- the tower


@pytest.mark.parametrize("length", LENGTHS)
def test_soft_tokens(tower, layouts, record_property, length):
    model, graph, _ = tower
    waveform = speechlike(length, seed=length)
    [expected] = layouts.soft_tokens(model, [waveform])
    found = graph.run({"waveform": waveform})["soft_tokens"]
    record(record_property, f"{length} samples", found, expected, 5e-5)


def test_several_clips(tower, layouts, record_property):
    """transformers pads them to one length and masks; each of ours runs by itself."""
    model, graph, _ = tower
    clips = [speechlike(length, seed=length) for length in (5000, 20_000, 700, 12_345)]
    for index, expected in enumerate(layouts.soft_tokens(model, clips)):
        found = graph.run({"waveform": clips[index]})["soft_tokens"]
        record(record_property, f"clip {index}", found, expected, 5e-5)


def test_token_counts_of_200_random_lengths(tower, layouts):
    model, graph, _ = tower
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(161, 4000, 60), *rng.integers(161, 60_000, 100), *rng.integers(161, 480_001, 40)]
    for start in range(0, 200, 20):
        part = [int(length) for length in sorted(lengths)[start : start + 20]]
        theirs = layouts.features([np.zeros(length, np.float32) for length in part])[1]
        for length, valid in zip(part, theirs, strict=True):
            tokens = len(valid[valid][::2][::2])  # as the masks of the two convolutions are made
            assert tokens == -(-((length - 1) // 160) // 4)
            if length < 20_000:
                assert len(graph.run({"waveform": np.zeros(length, np.float32)})["soft_tokens"]) == tokens
                assert len(layouts.soft_tokens(model, [np.zeros(length, np.float32)])[0]) == tokens


def test_a_window_of_13_keys_is_caught(tower, layouts, record_property):
    """It is what the JAX code has; transformers has 12."""
    model, _, folder = tower
    waveform = speechlike(30_000)
    [expected] = layouts.soft_tokens(model, [waveform])
    weights, config = load_checkpoint(folder)
    audio = dataclasses.asdict(Numbers()) | config["audio_config"]
    right = reference.soft_tokens(weights, config | {"audio_config": audio}, waveform)
    record(record_property, "12 keys", right, expected, 5e-5)
    for left in (12, 14):
        wrong = reference.soft_tokens(
            weights, config | {"audio_config": audio | {"attention_context_left": left}}, waveform
        )
        assert np.abs(wrong - expected).max() > 0.05, left


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a saved configuration need not say."""

    attention_context_left: int = 13
    residual_weight: float = 0.5
