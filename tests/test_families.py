"""Exported graphs against the float64 reference model: soft tokens, logits, and every way to cut a prompt.

Logits are compared, not tokens: throwing the state away often leaves the best token unchanged.
"""

from __future__ import annotations

import numpy as np
import pytest

from siglance.engine.image_policy import POLICIES
from siglance.engine.runtime import SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.kernels import reference

from . import reference_model

WINDOW = 8  # of the tiny models
LENGTHS = (1, 2, 7, 8, 9, 16, 17, 25, 40)
MODELS = {
    "gemma3": ("gemma3", {}),
    "gemma3 hub keys, factor 8": (
        "gemma3",
        {"key_style": "hub", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma3 sharded bfloat16": ("gemma3", {"shards": 2, "storage": "bfloat16"}),
    "gemma3 with a head of its own": ("gemma3", {"tie_word_embeddings": False}),
    "gemma4": ("gemma4", {}),
    "gemma4 hub keys, dead tensors": ("gemma4", {"key_style": "hub", "dead_shared_kv": True, "seed": 3}),
    "gemma4 text only": ("gemma4", {"vision": False}),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request, tiny_model):
    family, arguments = MODELS[request.param]
    return tiny_model(family, **arguments)


def ids_of(model, length: int) -> np.ndarray:
    """Random text ids that are no placeholders."""
    return np.random.default_rng(length).integers(60, 380, length)


def expected_logits(model, ids, soft=()):
    weights, config = reference_model.load_checkpoint(model.checkpoint)
    if "text_config" in config:
        return reference_model.gemma4_text_logits(weights, config, ids, soft)
    return reference_model.gemma3_text_logits(weights, config, ids)


@pytest.mark.parametrize("length", LENGTHS)
def test_last_logits_equal_the_reference_however_the_prompt_is_cut(model, length):
    """Case 13: prompts around and beyond the window, in one chunk, in chunks of 3, 8 and 64, and token by token."""
    ids = ids_of(model, length)
    expected = expected_logits(model, ids)[-1]
    for chunk in (512, 64, 8, 3, 1):
        found = model.runtime.session().prefill(ids, chunk=chunk)
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=f"chunk {chunk}")


def test_steps_after_the_prompt_equal_recomputation(model):
    ids = ids_of(model, 30)
    expected = expected_logits(model, ids)
    session = model.runtime.session()
    session.prefill(ids[:5])
    for index in range(5, len(ids)):
        np.testing.assert_allclose(session.step(int(ids[index])), expected[index], atol=1e-3)


def test_all_prompt_logits_equal_the_reference(model):
    ids = ids_of(model, 25)
    np.testing.assert_allclose(model.runtime.session().prompt_logits(ids), expected_logits(model, ids), atol=1e-3)


def test_prefill_returns_one_row_of_logits(model):
    """Case 67: the head runs on the last row only, whatever the length of the prompt."""
    assert model.runtime.decoder.outputs["logits"].shape == ("logit_rows", model.runtime.vocabulary)
    assert model.runtime.session().prefill(ids_of(model, 40)).shape == (model.runtime.vocabulary,)


def test_global_buffers_grow_and_window_buffers_do_not(model):
    session = model.runtime.session()
    session.prefill(ids_of(model, 10))
    before = session.state_bytes
    ids = ids_of(model, 300)
    found = session.prefill(ids)
    grown = session.state_bytes
    kinds = [pair.kind for pair in model.bundle.manifest.state]
    assert "global" in kinds
    assert "window" in kinds
    windows = sum(
        int(np.prod(model.runtime.decoder.inputs[pair.input].shape)) * 4
        for pair in model.bundle.manifest.state
        if pair.kind == "window"
    )
    assert grown - windows == 2 * (before - windows)
    full = np.concatenate([ids_of(model, 10), ids])
    np.testing.assert_allclose(found, expected_logits(model, full)[-1], atol=1e-3)


@pytest.fixture(scope="module")
def seeing(tiny_model):
    return tiny_model("gemma4")


@pytest.mark.parametrize(("height", "width", "budget"), [(100, 140, 70), (480, 200, 70), (31, 500, 140), (48, 48, 70)])
def test_soft_tokens_equal_the_reference(seeing, height, width, budget):
    facts = seeing.bundle.manifest.image
    picture = formula_picture(height, width)
    patches = POLICIES[facts.policy].prepare(picture, facts, budget)
    soft = len(patches.values) // facts.pool_size**2
    found = seeing.runtime.encode(patches.values, patches.positions, soft)
    np.testing.assert_allclose(found, expected_soft_tokens(seeing, picture, budget), atol=1e-4)


def expected_soft_tokens(seeing, picture, budget):
    """Soft tokens by the reference: raster patches with positions, pooled by position."""
    facts = seeing.bundle.manifest.image
    weights, config = reference_model.load_checkpoint(seeing.checkpoint)
    policy = POLICIES[facts.policy]
    layout = policy.layout(*picture.shape[:2], facts, budget)
    from siglance.engine.image_policy import resize

    raster = reference.patchify(resize(picture, layout.height, layout.width, facts.resample), facts.patch_size)
    return reference_model.gemma4_soft_tokens(weights, config, raster.values / 255.0, raster.positions)


def test_two_images_alone_and_together(seeing):
    """Soft tokens do not depend on other images, and each lands in its own rows: logits equal the reference."""
    weights, config = reference_model.load_checkpoint(seeing.checkpoint)
    pictures = [formula_picture(90, 160), formula_picture(200, 60)[:, ::-1]]
    soft = [expected_soft_tokens(seeing, picture, 70) for picture in pictures]
    image = config["image_token_id"]
    ids = np.array([2, 7, *[image] * len(soft[0]), 9, 11, *[image] * len(soft[1]), 12, 13])
    blocks = [SoftTokens(2, np.float32(soft[0])), SoftTokens(4 + len(soft[0]), np.float32(soft[1]))]
    expected = reference_model.gemma4_text_logits(weights, config, ids, soft)[-1]
    for chunk in (512, 64, 8, 3):
        found = seeing.runtime.session().prefill(ids, blocks, chunk=chunk)
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=f"chunk {chunk}")


def test_a_head_of_its_own_is_not_tied(tiny_model):
    """Case 20: a checkpoint that says so has two tables, and both are in the weights file."""
    family, arguments = MODELS["gemma3 with a head of its own"]
    model = tiny_model(family, **arguments)
    weights, _ = reference_model.load_checkpoint(model.checkpoint)
    table, head = (np.float32(weights[f"{name}.weight"]) for name in ("model.embed_tokens", "lm_head"))
    assert np.abs(table - head).max() > 0.1
    data = model.bundle.path("weights").read_bytes()
    assert data.count(table.tobytes()) == 1
    assert data.count(head.tobytes()) + data.count(head.T.tobytes()) == 1


def test_weights_are_stored_once(seeing):
    """Case 20: the tied embedding is one copy in the weights file, used by two graphs."""
    weights, _ = reference_model.load_checkpoint(seeing.checkpoint)
    table = np.float32(weights["model.language_model.embed_tokens.weight"]).tobytes()
    data = seeing.bundle.path("weights").read_bytes()
    assert data.count(table) == 1
