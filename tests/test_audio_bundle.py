"""Bundles that hear: what the exporter writes, and logits of prompts with sounds against the float64 references."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.errors import BundleError, ExportError, ModelOutputError
from siglance.engine.manifest import AudioFacts, PlaceholderFacts, read_manifest
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.self_test import formula_sound, replay
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from . import reference_audio, reference_gemma4_large, reference_model
from .test_audio_graph import speechlike

SIZES = {"e2b": ("gemma4_audio", {}), "12b": ("gemma4_unified", {}), "ears only": ("gemma4_audio", {"vision": False})}
LENGTHS = (5000, 16_000, 700)


@pytest.fixture(params=SIZES, scope="module")
def model(request, tiny_model):
    family, arguments = SIZES[request.param]
    return tiny_model(family, **arguments)


@pytest.fixture(scope="module")
def e2b(tiny_model):
    return tiny_model("gemma4_audio")


@pytest.fixture(scope="module")
def unified(tiny_model):
    return tiny_model("gemma4_unified")


def soft_tokens(weights, config, waveform: np.ndarray) -> np.ndarray:
    if config["model_type"] == "gemma4_unified":
        return reference_audio.unified_soft_tokens(weights, waveform)
    return reference_audio.soft_tokens(weights, config, waveform)


def logits(weights, config, ids, soft) -> np.ndarray:
    unified = config["model_type"] == "gemma4_unified"
    function = reference_gemma4_large.logits if unified else reference_model.gemma4_text_logits
    return function(weights, config, ids, soft)


def prompt(config, soft: list[tuple[str, np.ndarray]]) -> tuple[list[int], list[SoftTokens]]:
    """Ids with runs of soft tokens of these kinds, text between them."""
    text = np.random.default_rng(3).integers(100, 490, 60).tolist()
    ids, blocks = [2, *text[:6]], []
    for index, (kind, values) in enumerate(soft):
        blocks.append(SoftTokens(len(ids), values.astype(np.float32), seen=kind == "image"))
        ids += [config[f"{kind}_token_id"]] * len(values) + text[8 * index : 8 * index + 5]
    return [*ids, *text[40:52]], blocks


# --- what is exported


def test_the_manifest_says_what_is_heard(e2b, unified):
    placeholder = PlaceholderFacts(item="<|audio|>", before="<|audio>", soft="<|audio|>", after="<audio|>")
    rates = {"sample_rate": 16_000, "max_tokens": 750}
    for model, facts in (
        (e2b, AudioFacts(policy="log_mel", frame_step=160, frames_per_token=4, **rates)),
        (unified, AudioFacts(policy="frames", frame_step=640, frames_per_token=1, **rates)),
    ):
        manifest = model.bundle.manifest
        assert manifest.audio == facts
        assert manifest.prompt.audio == placeholder
        assert manifest.modalities == ("text", "image", "video", "audio")
        assert f"audio:{facts.policy}" in manifest.requires
        assert json.loads(model.bundle.path("export").read_text())["left_out"] == []


def test_a_bundle_may_hear_and_not_see(tiny_model):
    assert tiny_model("gemma4_audio", vision=False).bundle.manifest.modalities == ("text", "audio")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_extractor": {"sampling_rate": 24_000}}, "sampling_rate = 24000"),
        ({"feature_extractor": {"hop_length": 128}}, "hop_length = 128"),
        ({"feature_extractor": {"dither": 0.1}}, "dither"),
        ({"feature_extractor": {"per_bin_mean": [0.0] * 128}}, "per_bin_mean"),
        ({"audio_seq_length": "long"}, "audio_seq_length"),
    ],
)
def test_another_front_end_is_refused(e2b, tmp_path, change, message):
    source = tmp_path / "source"
    shutil.copytree(e2b.checkpoint, source)
    path = source / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=message):
        export(source, tmp_path / "bundle")


def test_the_longest_clip_is_that_of_the_processor(unified, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(unified.checkpoint, source)
    path = source / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"audio_seq_length": 1500}))
    export(source, tmp_path / "bundle")
    manifest = read_manifest((tmp_path / "bundle" / "siglance.json").read_text())
    assert manifest.audio is not None
    assert manifest.audio.max_tokens == 1500


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda raw: raw.update(audio=None), "audio"),
        (lambda raw: raw["prompt"].update(audio=None), "prompt.audio"),
        (lambda raw: raw["files"].pop("audio"), "files.audio"),
        (lambda raw: raw.update(modalities=["text", "image", "video"]), "audio"),
        (lambda raw: raw["audio"].update(policy="waves"), "requires"),
        (lambda raw: raw["audio"].update(frame_step=0), "audio.frame_step"),
        (lambda raw: raw["audio"].update(max_tokens=-1), "audio.max_tokens"),
        (lambda raw: raw["audio"].update(sample_rate=16_000.5), "audio.sample_rate"),
        (lambda raw: raw["audio"].update(window=12), "unknown key 'audio.window'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(e2b, change, key):
    raw = json.loads((e2b.bundle.folder / "siglance.json").read_text())
    change(raw)
    with pytest.raises(BundleError, match=key):
        read_manifest(json.dumps(raw))


# --- precisions


@pytest.mark.parametrize("family", ["gemma4_audio", "gemma4_unified"])
@pytest.mark.parametrize(
    ("options", "cosine"),
    [
        (ExportOptions(precision="int8"), 0.995),
        (ExportOptions(precision="int4"), 0.995),  # towers have 8 bits then
        (ExportOptions(precision="fp16", target="cuda"), 0.99999),
    ],
)
@pytest.mark.usefixtures("brief_calibration")
def test_other_precisions_hear_almost_the_same(tiny_model, tmp_path, family, options, cosine):
    model = tiny_model(family)
    export(model.checkpoint, tmp_path / "bundle", options)
    runtime = Runtime(Bundle.open(tmp_path / "bundle"), device="cpu", foreign=True)
    waveform = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)  # without silence, which is zero
    found, expected = runtime.hear(waveform, 25), model.runtime.hear(waveform, 25)
    assert not np.array_equal(found, expected)
    cosines = np.sum(found * expected, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > cosine


# --- what is heard


@pytest.mark.parametrize("length", LENGTHS)
def test_soft_tokens_are_those_of_the_reference(model, length):
    weights, config = reference_model.load_checkpoint(model.checkpoint)
    waveform = speechlike(length)
    expected = soft_tokens(weights, config, waveform)
    assert np.abs(model.runtime.hear(waveform, len(expected)) - expected).max() < 1e-4
    with pytest.raises(ModelOutputError, match="audio graph returned soft tokens of shape"):
        model.runtime.hear(waveform, len(expected) + 1)


def test_a_last_frame_is_filled_up_with_silence(unified):
    whole, part = speechlike(1280), speechlike(1280)[:1000]
    padded = np.concatenate([part, np.zeros(280, np.float32)])
    assert np.array_equal(unified.runtime.hear(part, 2), unified.runtime.hear(padded, 2))
    assert not np.array_equal(unified.runtime.hear(part, 2), unified.runtime.hear(whole, 2))


@pytest.mark.parametrize("kinds", [("audio",), ("audio", "audio"), ("image", "audio"), ("audio", "image", "audio")])
def test_logits_of_prompts_with_sounds_and_pictures(model, kinds):
    """Every row of the prompt, and its last row however the prompt is cut."""
    if "image" in kinds and model.runtime.vision is None:
        kinds = tuple(kind for kind in kinds if kind != "image")
    weights, config = reference_model.load_checkpoint(model.checkpoint)
    rng = np.random.default_rng(5)
    soft = [
        (
            kind,
            rng.normal(size=(12, 64)) if kind == "image" else soft_tokens(weights, config, speechlike(LENGTHS[index])),
        )
        for index, kind in enumerate(kinds)
    ]
    ids, blocks = prompt(config, soft)
    expected = logits(weights, config, ids, [values for _, values in soft])
    assert np.abs(model.runtime.session().prompt_logits(np.array(ids), blocks) - expected).max() < 1e-3
    for chunk in (512, 9, 1):
        assert np.abs(model.runtime.session().prefill(np.array(ids), blocks, chunk=chunk) - expected[-1]).max() < 1e-3


def test_sounds_do_not_see_their_later_rows(unified):
    """In the 12B pictures form blocks and sounds do not: the same rows marked as seen give something else, and only
    pictures are kept whole when a prompt is cut."""
    weights, config = reference_model.load_checkpoint(unified.checkpoint)
    ids, blocks = prompt(config, [("audio", soft_tokens(weights, config, speechlike(16_000)))])
    wrong = [SoftTokens(block.start, block.values) for block in blocks]
    right = unified.runtime.session().prefill(np.array(ids), blocks)
    assert np.abs(unified.runtime.session().prefill(np.array(ids), wrong) - right).max() > 0.05


def test_the_self_test_has_a_sound(model):
    cases = json.loads(model.bundle.path("self_test").read_text())["cases"]
    assert [case["name"] for case in cases][-1] == "audio"
    report = replay(model.bundle, model.runtime)
    assert report.result == "equal"
    assert {case.name for case in report.cases} >= {"text", "audio"}


def test_the_self_test_notices_other_ears(e2b, tiny_model):
    """Another tower in front of the same decoder."""
    other = tiny_model("gemma4_audio", audio_overrides={"attention_logit_cap": 1.0})
    report = replay(e2b.bundle, other.runtime)
    cases = {case.name: case.max_logit_difference for case in report.cases}
    assert cases["text"] < 1e-3
    assert cases["audio"] > 1e-3


@pytest.mark.parametrize("samples", [0, -1, 480_001, 10**12])
def test_a_self_test_cannot_ask_for_any_length(e2b, tmp_path, monkeypatch, samples):
    stored = json.loads(e2b.bundle.path("self_test").read_text())
    stored["cases"][-1]["sound"]["samples"] = samples
    path = tmp_path / "self_test.json"
    path.write_text(json.dumps(stored))
    monkeypatch.setattr(type(e2b.bundle), "path", lambda self, name: path)
    with pytest.raises(BundleError, match="samples"):
        replay(e2b.bundle, e2b.runtime)


def test_the_formula_of_the_sound_stays():
    sound = formula_sound(8000)
    assert sound.dtype == np.float32
    assert sound[:4].tolist() == pytest.approx([-1 / 3, -0.3301, -0.3268667, -0.3236333], abs=1e-6)
    assert np.abs(sound).max() <= 0.34
