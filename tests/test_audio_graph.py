"""The audio graph of Gemma 4 against the float64 reference: log-mel frames, soft tokens, and every rule of the tower.

Each rule also has a wrong version here, which the graph must be far away from.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.graph import Device, Graph
from siglance.export.builder import FLOAT, GraphBuilder, WeightsFile
from siglance.export.checkpoint import FolderCheckpoint, Weights
from siglance.export.families import ExportOptions, _gemma4_audio, _gemma4_config
from siglance.kernels import audio as kernels

from . import reference_audio as reference
from . import reference_model, tiny_gemma4_audio

PREFIXES = {"audio.": ("model.audio_tower.",), "embed_audio.": ("model.embed_audio.",)}
CHECKPOINTS = {
    "saved": {},
    "hub keys, sharded, bfloat16": {"key_style": "hub", "storage": "bfloat16", "shards": 3, "seed": 1},
    "without bounds": {"audio_overrides": {"use_clipped_linears": False}},
    "other sizes": {
        "audio_overrides": {
            **{"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3, "conv_kernel_size": 3},
            **{"attention_context_left": 6, "attention_chunk_size": 5, "residual_weight": 0.75},
        },
        "seed": 2,
    },
}
# One frame, whole and broken frames, less than a block of queries, a whole one, one more, several.
LENGTHS = (161, 320, 321, 1601, 7680, 7681, 8321, 15360, 30000)


def build(folder: Path, make: Callable[[GraphBuilder], None]) -> Graph:
    folder.mkdir()
    with WeightsFile(folder / "weights.bin") as data:
        graph = GraphBuilder("audio", data)
        make(graph)
        graph.save(folder / "audio.onnx", "test")
    return Graph(folder / "audio.onnx", Device("cpu"))


def build_tower(checkpoint: Path, folder: Path) -> Graph:
    source = FolderCheckpoint(checkpoint)
    config, weights = _gemma4_config.read(source.config), Weights(source, PREFIXES)
    return build(folder, lambda graph: _gemma4_audio.build_audio(graph, weights, config, ExportOptions()))


@dataclasses.dataclass(frozen=True)
class Tower:
    graph: Graph
    weights: reference_model.Weights
    config: reference_model.Config

    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        return self.graph.run({"waveform": waveform.astype(np.float32)})["soft_tokens"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    """make(arguments of the writer) -> Tower."""

    def write(arguments: dict) -> Tower:
        folder = tmp_path_factory.mktemp("audio")
        config = tiny_gemma4_audio.write_gemma4_audio(folder / "checkpoint", **arguments)
        weights, _ = reference_model.load_checkpoint(folder / "checkpoint")
        return Tower(build_tower(folder / "checkpoint", folder / "graph"), weights, config)

    return write


@pytest.fixture(params=CHECKPOINTS, scope="module")
def tower(request, make):
    return make(CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def plain(make):
    return make({})


@pytest.fixture(scope="module")
def front_end(tmp_path_factory: pytest.TempPathFactory):
    """waveform float32 [L] -> log-mel frames float32 [F, 128]."""

    def log_mel(graph: GraphBuilder) -> None:
        features = _gemma4_audio._log_mel(graph, graph.input("waveform", FLOAT, ["samples"]))
        graph.output(features, "features", FLOAT, ["frames", 128])

    graph = build(tmp_path_factory.mktemp("front_end") / "graph", log_mel)
    return lambda waveform: graph.run({"waveform": waveform.astype(np.float32)})["features"]


def speechlike(length: int, seed: int = 0) -> np.ndarray:
    """Noise, two gliding tones and silences: float32 [length] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    time = np.arange(length) / 16_000
    glide = np.sin(2 * np.pi * (200 * time + 300 * time**2)) + 0.5 * np.sin(2 * np.pi * (1500 - 200 * time) * time)
    loudness = np.interp(time, np.linspace(0, max(time[-1], 0.1), 9), [0, 1, 0.2, 0.8, 0, 0, 0.5, 0.05, 0.6])
    return ((0.5 * glide + 0.2 * rng.normal(size=length)) * loudness / 2).clip(-1, 1).astype(np.float32)


# --- the front end


@pytest.mark.parametrize("length", [161, 320, 321, 479, 481, 16_000, 47_999])
def test_log_mel_frames_are_those_of_the_reference(front_end, length):
    waveform = speechlike(length)
    frames = front_end(waveform)
    assert frames.shape == (kernels.log_mel_frames(length, 160), 128)
    assert np.abs(frames - reference.log_mel(waveform)).max() < 1e-6


def test_a_loud_tone_leaves_no_rounding_in_silent_bins(front_end):
    """Where float32 would be off by a hundredth: full scale beside the floor of 0.001."""
    time = np.arange(16_000)
    for frequency in (31.25, 1000.0, 7984.375):
        tone = np.sin(2 * np.pi * frequency * time / 16_000).astype(np.float32)
        assert np.abs(front_end(tone) - reference.log_mel(tone)).max() < 1e-5


def test_silence_is_the_logarithm_of_the_floor(front_end):
    frames = front_end(np.zeros(16_000))
    assert frames.shape == (99, 128)
    assert np.unique(frames).tolist() == [pytest.approx(np.log(1e-3), abs=1e-6)]


def test_filters_are_those_of_the_reference():
    filters = kernels.mel_filters(257, 128, 16_000)
    assert np.abs(filters - reference.mel_filters()).max() < 1e-12
    assert not filters[:, 0].any()  # narrower than the distance of two bins
    assert filters.max() <= 1


@given(st.integers(1, 400), st.integers(1, 9))
def test_the_transform_is_a_discrete_fourier_transform(length, power):
    points = 1 << max(power, (length - 1).bit_length())
    frame = np.random.default_rng(length).normal(size=length)
    parts = frame @ kernels.windowed_fourier(np.ones(length), points)
    bins = points // 2 + 1
    assert np.allclose(parts[:bins] - 1j * parts[bins:], np.fft.rfft(frame, n=points), atol=1e-9)


@given(st.integers(0, 500_000))
def test_counts_follow_the_two_convolutions(samples):
    frames = kernels.log_mel_frames(samples, 160)
    assert frames == len(range(160, samples, 160))
    halved = -(-frames // 2)
    assert kernels.soft_token_count(frames, 4) == -(-halved // 2)


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(0.1, 3), (0.5, 13), (1, 25), (2, 50), (5, 125), (10, 250), (29.99, 750), (30, 750)]
)
def test_published_counts(seconds, tokens):
    assert kernels.soft_token_count(kernels.log_mel_frames(round(16_000 * seconds), 160), 4) == tokens


# --- the tower


@pytest.mark.parametrize("length", LENGTHS)
def test_soft_tokens_are_those_of_the_reference(tower, length):
    waveform = speechlike(length, seed=length)
    found = tower(waveform)
    expected = reference.soft_tokens(tower.weights, tower.config, waveform)
    assert found.shape == expected.shape
    assert found.shape == (kernels.soft_token_count(kernels.log_mel_frames(length, 160), 4), 64)
    assert np.abs(found - expected).max() < 2e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(161, 40_000), st.integers(0, 10_000))
def test_sound_after_a_token_does_not_change_it(plain, length, more):
    """Everything is causal: a longer clip begins with the same tokens, except where a convolution looks ahead."""
    waveform = speechlike(length + more, seed=length)
    short, long = plain(waveform[:length]), plain(waveform)
    # A token sees frames up to 3 after its first one; the last token of the short clip may lack some of them.
    assert np.abs(short[:-1] - long[: len(short) - 1]).max(initial=0) < 1e-5


# Ways to get one rule wrong, in the weights or in the configuration.


def _scale(pattern: str, factor: float) -> Callable[[Tower], Tower]:
    def wrong(tower: Tower) -> Tower:
        weights = {name: value * factor if pattern in name else value for name, value in tower.weights.items()}
        return dataclasses.replace(tower, weights=weights)

    return wrong


def _configure(**values: object) -> Callable[[Tower], Tower]:
    def wrong(tower: Tower) -> Tower:
        return dataclasses.replace(tower, config=tower.config | {"audio_config": tower.config["audio_config"] | values})

    return wrong


def _reverse(pattern: str, axis: int) -> Callable[[Tower], Tower]:
    def wrong(tower: Tower) -> Tower:
        weights = {name: np.flip(value, axis) if pattern in name else value for name, value in tower.weights.items()}
        return dataclasses.replace(tower, weights=weights)

    return wrong


WRONG = {
    "a window of 13 keys": _configure(attention_context_left=14),
    "a window of 11 keys": _configure(attention_context_left=12),
    "no soft cap": _configure(attention_logit_cap=1e9),
    "whole feed-forward steps": _configure(residual_weight=1.0),
    "no bounds": _configure(use_clipped_linears=False),
    "no relative positions": _scale("relative_k_proj", 0.0),
    "no scales of dimensions": _scale("per_dim_scale", 0.0),
    "no bias behind the tower": _scale("output_proj.bias", 0.0),
    "taps of the depthwise convolution reversed": _reverse("depthwise_conv1d", 2),
    "value and gate swapped": _reverse("linear_start.linear", 0),
    "a convolution upside down in time": _reverse("layer1.conv", 2),
    "a convolution upside down in frequency": _reverse("layer0.conv", 3),
    "weights of a norm between the convolutions reversed": _reverse("layer0.norm", 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(plain, name):
    waveform = speechlike(30_000)
    wrong = WRONG[name](plain)
    assert np.abs(plain(waveform) - reference.soft_tokens(wrong.weights, wrong.config, waveform)).max() > 1e-2


# The same for rules that are formulas of the reference: what to replace, and by what.
FORMULAS = {
    "keys without their factor": ("np.log(1 + np.e) / np.log(2)", "1.0"),
    "queries without ln 2": ("width**-0.5 / np.log(2)", "width**-0.5"),
    "cosines before sines": ("[np.sin(angles), np.cos(angles)]", "[np.cos(angles), np.sin(angles)]"),
    "a soft cap of the mask too": (
        "np.where(visible, scores, -1e9)",
        'base.soft_cap(np.where(visible, scores, -1e9), audio["attention_logit_cap"])',
    ),
    "positions that count from the front": ("relative[np.maximum(distance, 0)]", "relative[columns]"),
    "other wavelengths": ("(half - 1)", "half"),
    "power instead of magnitude": ("magnitudes @ mel_filters()", "magnitudes**2 @ mel_filters()"),
    "a symmetric window": ("np.arange(LENGTH) / LENGTH)", "np.arange(LENGTH) / (LENGTH - 1))"),
    "silence behind instead of in front": (
        "[np.zeros(HOP), np.asarray(waveform, np.float64)]",
        "[np.asarray(waveform, np.float64), np.zeros(HOP)]",
    ),
    "a floor of 1e-5": ("+ 1e-3)", "+ 1e-5)"),
    "filters up to another frequency": ("2595 * np.log10(1 + 8000 / 700)", "2595 * np.log10(1 + 7600 / 700)"),
    "projection before the norm": (
        'base.rms_norm(x) @ weights["model.embed_audio.embedding_projection.weight"].T',
        'base.rms_norm(x @ weights["model.embed_audio.embedding_projection.weight"].T)',
    ),
    "frequency after channel": ("x.reshape(len(x), -1) @", "x.transpose(0, 2, 1).reshape(len(x), -1) @"),
    "no rectifier": ("np.maximum(scaled * weights", "np.add(scaled * weights"),
    "gelu for silu": ("return x / (1 + np.exp(-x))", "return base.gelu_tanh(x)"),
    "a convolution that sees a later row": ("((size - 1, 0), (0, 0))", "((size - 2, 1), (0, 0))"),
}
SMALL = {"a symmetric window": 1e-3}  # the two differ by little


@pytest.mark.parametrize("name", FORMULAS)
def test_a_wrong_formula_is_caught(plain, name):
    source = Path(reference.__file__).read_text(encoding="utf-8")
    right, wrong = FORMULAS[name]
    assert right in source
    module = {"__name__": "wrong", "__package__": __package__}
    exec(compile(source.replace(right, wrong), reference.__file__, "exec"), module)
    waveform = speechlike(30_000)
    other = module["soft_tokens"](plain.weights, plain.config, waveform)  # pyright: ignore[reportCallIssue]
    assert np.abs(plain(waveform) - other).max() > SMALL.get(name, 1e-2)


# --- configurations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_context_right": 4}, "attention_context_right = 4"),
        ({"attention_chunk_size": 10}, "attention_chunk_size = 10"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"gradient_clipping": 10.0}, "gradient_clipping"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"subsampling_conv_channels": [64, 32]}, r"subsampling_conv_channels = \[64, 32\]"),
        ({"subsampling_conv_channels": [128]}, "subsampling_conv_channels"),
        ({"num_attention_heads": 5}, "cannot be cut into 5 heads"),
        ({"hidden_size": "big"}, "hidden_size"),
    ],
)
def test_other_mathematics_is_refused(tmp_path, values, message):
    config = tiny_gemma4_audio.write_gemma4_audio(tmp_path / "checkpoint")
    config["audio_config"] = config["audio_config"] | values
    with pytest.raises(_gemma4_config.ExportError, match=message):
        _gemma4_config.read(config)


def test_defaults_are_the_published_sizes(tmp_path):
    config = json.loads(json.dumps(tiny_gemma4_audio.write_gemma4_audio(tmp_path / "checkpoint")))
    config["audio_config"] = {"model_type": "gemma4_audio"}
    assert _gemma4_config.read(config).audio == _gemma4_config.ConformerConfig(
        hidden=1024,
        layers=12,
        heads=8,
        channels=(128, 32),
        kernel=5,
        window=12,
        soft_cap=50.0,
        residual=0.5,
        output=1536,
        clipped=True,
    )
