"""Gemma 4's ears against transformers: front ends, soft tokens and logits, on tiny random checkpoints that it saved."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.engine.sounds import count_soft_tokens
from siglance.export.exporter import export
from siglance.export.families import find_family
from siglance.export.families._gemma4_config import ConformerConfig, FrameConfig
from siglance.export.official import OFFICIAL

from .. import reference_audio as reference
from .. import tiny_tokenizer
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
    record(record_property, f"features, {length} samples", reference.log_mel(waveform), values[0][valid[0]], 1e-4)


def test_transformers_rounds_loud_tones(layouts, record_property):
    """It multiplies and transforms in float32: at full scale that is 2e-4 beside the floor, in its values, not ours."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    values, valid = layouts.features([tone])
    record(
        record_property,
        "rounding of transformers, 1 kHz at full scale",
        reference.log_mel(tone),
        values[0][valid[0]],
        5e-4,
    )
    quiet, valid = layouts.features([tone / 16])
    record(record_property, "features, 24 dB below", reference.log_mel(tone / 16), quiet[0][valid[0]], 1e-4)


# --- the tower


@pytest.mark.parametrize("length", LENGTHS)
def test_soft_tokens(tower, layouts, record_property, length):
    model, graph, _ = tower
    waveform = speechlike(length, seed=length)
    [expected] = layouts.soft_tokens(model, [waveform])
    found = graph.run({"waveform": waveform})["soft_tokens"]
    record(record_property, f"soft tokens, {length} samples", found, expected, 5e-5)


def test_several_clips(tower, layouts, record_property):
    """transformers pads them to one length and masks; each of ours runs by itself."""
    model, graph, _ = tower
    clips = [speechlike(length, seed=length) for length in (5000, 20_000, 700, 12_345)]
    for index, expected in enumerate(layouts.soft_tokens(model, clips)):
        found = graph.run({"waveform": clips[index]})["soft_tokens"]
        record(record_property, f"soft tokens, clip {index}", found, expected, 5e-5)


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
    record(record_property, "reference, 12 keys", right, expected, 5e-5)
    for left in (12, 14):
        wrong = reference.soft_tokens(
            weights, config | {"audio_config": audio | {"attention_context_left": left}}, waveform
        )
        assert np.abs(wrong - expected).max() > 0.05, left


# --- logits


@pytest.fixture(scope="module", params=("gemma4_e2b_audio", "gemma4_12b_audio"))
def pair(request, layouts, tmp_path_factory):
    """(transformers model, our runtime) of a layout."""
    folder = tmp_path_factory.mktemp(request.param)
    model = layouts.write(request.param, folder / "checkpoint")
    tiny_tokenizer.write_tokenizer(folder / "checkpoint", tiny_tokenizer.GEMMA4_TOKENS, 512)
    export(folder / "checkpoint", folder / "bundle")
    return model, Runtime(Bundle.open(folder / "bundle"))


def tokens_of(runtime: Runtime, clip: np.ndarray) -> np.ndarray:
    assert runtime.manifest.audio is not None
    return runtime.hear(clip, count_soft_tokens(len(clip), runtime.manifest.audio))


def test_soft_tokens_of_bundles(pair, layouts, record_property):
    """Of the 12B too: raw frames, the last one filled up with zeros."""
    model, runtime = pair
    clips = [speechlike(length, seed=length) for length in (700, 5000, 16_000, 640, 641)]
    for clip, expected in zip(clips, layouts.soft_tokens(model, clips), strict=True):
        record(record_property, f"soft tokens, {len(clip)} samples", tokens_of(runtime, clip), expected, 1e-4)


@pytest.mark.parametrize("kinds", [("audio",), ("audio", "audio"), ("image", "audio"), ("audio", "image", "audio")])
def test_logits_of_text_pictures_and_sounds(pair, layouts, record_property, kinds):
    """Every row of the prompt, the last row however the prompt is cut, and cached steps of an answer."""
    model, runtime = pair
    clips = [speechlike(length, seed=length) for length in (16_000, 5000)]
    pictures = [layouts.processed(model, formula_picture(90, 160))]
    text = np.random.default_rng(len(kinds)).integers(100, 490, 60).tolist()
    ids, blocks, heard, seen = [2, *text[:6]], [], [], []
    for index, kind in enumerate(kinds):
        if kind == "audio":
            clip = clips[len(heard)]
            heard.append(clip)
            values = tokens_of(runtime, clip)
        else:
            seen.append(pictures[len(seen)])
            values = layouts.picture_tokens(model, seen[-1])
        blocks.append(SoftTokens(len(ids), values, seen=kind == "image"))
        ids += [layouts.TOKEN_IDS[f"{kind}_token_id"]] * len(values) + text[8 * index : 8 * index + 5]
    ids += text[40:52]
    answer = np.random.default_rng(9).integers(100, 490, 10).tolist()
    expected = layouts.logits(model, [*ids, *answer], heard, seen)
    rows = runtime.session().prompt_logits(np.array(ids), blocks)
    record(record_property, "all rows", rows, expected[: len(ids)], 1e-3)
    for chunk in (512, 9, 1):
        session = runtime.session()
        last = session.prefill(np.array(ids), blocks, chunk=chunk)
        record(record_property, f"chunk {chunk}", last, expected[len(ids) - 1], 1e-3)
    steps = np.stack([session.step(token) for token in answer])
    record(record_property, "cached steps", steps, expected[len(ids) :], 1e-3)


def test_sounds_that_see_their_later_rows_are_caught(pair, layouts):
    """Marked as pictures, in the model where those form blocks."""
    model, runtime = pair
    if "attention:image_blocks" not in runtime.manifest.requires:
        return  # E2B: nothing sees later rows
    clip = speechlike(16_000)
    values = tokens_of(runtime, clip)
    ids = [2, 100, 101, *[layouts.TOKEN_IDS["audio_token_id"]] * len(values), *range(102, 110)]
    expected = layouts.logits(model, ids, [clip])
    wrong = runtime.session().prompt_logits(np.array(ids), [SoftTokens(3, values, seen=True)])
    assert np.abs(wrong - expected).max() > 0.05


# --- configurations


@pytest.mark.parametrize("name", [name for name in OFFICIAL if "gemma-4" in name])
def test_sparse_configurations_mean_what_they_mean_to_transformers(name):
    """The configuration of each size, and the same with any one key of its audio part left out."""
    from transformers import Gemma4Config, Gemma4UnifiedConfig

    values = OFFICIAL[name]
    kind = Gemma4Config if values["model_type"] == "gemma4" else Gemma4UnifiedConfig
    audio = values["audio_config"]
    variants = [values] + [
        values | {"audio_config": {other: value for other, value in audio.items() if other != key}}
        for key in audio or ()
    ]
    for variant in variants:
        ours = find_family(variant).read(variant).audio
        copy = {key: value for key, value in json.loads(json.dumps(variant)).items() if key != "model_type"}
        theirs = kind(**copy).audio_config
        if theirs is None:
            assert ours is None
        elif kind is Gemma4UnifiedConfig:
            assert ours == FrameConfig(samples=theirs.audio_samples_per_token)
        else:
            assert ours == ConformerConfig(
                hidden=theirs.hidden_size,
                layers=theirs.num_hidden_layers,
                heads=theirs.num_attention_heads,
                channels=tuple(theirs.subsampling_conv_channels),
                kernel=theirs.conv_kernel_size,
                window=theirs.attention_context_left - 1,
                soft_cap=theirs.attention_logit_cap,
                residual=theirs.residual_weight,
                output=theirs.output_proj_dims,
                clipped=theirs.use_clipped_linears,
            )


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a saved configuration need not say."""

    attention_context_left: int = 13
    residual_weight: float = 0.5
