"""Gemma 4 31B, 26B-A4B and 12B in small, against the float64 reference: soft tokens, logits, every way to cut a prompt.

Each rule of these models also has a wrong version here, which the exported graphs must be far away from.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from siglance.engine.bundle import Bundle
from siglance.engine.image_policy import POLICIES, resize
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.export.exporter import export
from siglance.export.families import ExportOptions
from siglance.kernels import geometry, reference

from . import reference_gemma4_large as large
from . import reference_model, tiny_gemma4_large
from .conftest import TinyModel

MODELS = {
    "dense": ("gemma4_dense", {}),
    "dense, hub keys, sharded": ("gemma4_dense", {"key_style": "hub", "shards": 3, "seed": 1}),
    "dense, a window longer than a picture": ("gemma4_dense", {"sliding_window": 90}),
    "experts": ("gemma4_experts", {}),
    "experts, hub keys, bfloat16": ("gemma4_experts", {"key_style": "hub", "storage": "bfloat16", "seed": 2}),
    "unified": ("gemma4_unified", {}),
    "unified, hub keys, names of modules": ("gemma4_unified", {"key_style": "hub", "names": "modules", "seed": 3}),
}
BUDGET = 70


@pytest.fixture(params=MODELS, scope="module")
def model(request, tiny_model):
    family, arguments = MODELS[request.param]
    return tiny_model(family, **arguments)


@pytest.fixture(params=["dense", "experts", "unified"], scope="module")
def size(request, tiny_model):
    """One model of each size, for what does not depend on names and keys."""
    family, arguments = MODELS[request.param]
    return tiny_model(family, **arguments)


@pytest.fixture(scope="module")
def experts(tiny_model):
    return tiny_model("gemma4_experts")


def checkpoint(model) -> tuple[reference_model.Weights, reference_model.Config]:
    """Weights under the names of the published files, and config.json."""
    weights, config = reference_model.load_checkpoint(model.checkpoint)
    if any("multimodal_embedder" in name for name in weights):
        weights = {tiny_gemma4_large.published(name): value for name, value in weights.items()}
    return weights, config


def text_ids(length: int) -> np.ndarray:
    """Random text ids that are no placeholders."""
    return np.random.default_rng(length).integers(60, 380, length)


def expected_soft_tokens(model, picture: np.ndarray) -> np.ndarray:
    """Soft tokens by the reference, from patches in raster order."""
    facts = model.bundle.manifest.image
    weights, config = checkpoint(model)
    layout = POLICIES[facts.policy].layout(*picture.shape[:2], facts, BUDGET)
    resized = resize(picture, layout.height, layout.width, facts.resample)
    raster = reference.patchify(resized, facts.patch_size)
    if config["model_type"] == "gemma4":
        return reference_model.gemma4_soft_tokens(weights, config, raster.values / 255.0, raster.positions)
    return large.unified_soft_tokens(weights, config, raster.values / 255.0, raster.positions)


def prompt(config, soft: list[np.ndarray], *kinds: str) -> tuple[np.ndarray, list[SoftTokens]]:
    """Ids and soft tokens of a prompt: text, a medium, text, the next medium, ..., text."""
    ids, blocks = [2, 107], []
    for values, kind in zip(soft, kinds or ("image",) * len(soft), strict=True):
        ids.append(100 + len(blocks))
        blocks.append(SoftTokens(len(ids), np.float32(values)))
        ids += [config[f"{kind}_token_id"]] * len(values)
        ids.append(120 + len(blocks))
    return np.array([*ids, 133, 144, 155]), blocks


def random_soft(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.normal(0, 1, (length, 64)) for length in lengths]


# --- text


@pytest.mark.parametrize("length", [1, 9, 40])
def test_last_logits_of_text_however_it_is_cut(size, length):
    ids = text_ids(length)
    expected = large.logits(*checkpoint(size), ids)[-1]
    for chunk in (512, 7, 1):
        found = size.runtime.session().prefill(ids, chunk=chunk)
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=f"chunk {chunk}")


def test_steps_after_a_prompt_with_pictures_equal_recomputation(size):
    """Beyond the window and past the first growth of the state."""
    weights, config = checkpoint(size)
    soft = random_soft(40, 200)
    ids, blocks = prompt(config, soft)
    more = text_ids(12)
    expected = large.logits(weights, config, np.concatenate([ids, more]), soft)
    session = size.runtime.session()
    np.testing.assert_allclose(session.prefill(ids, blocks, chunk=64), expected[len(ids) - 1], atol=1e-3)
    for index, token in enumerate(more):
        np.testing.assert_allclose(session.step(int(token)), expected[len(ids) + index], atol=1e-3)


# --- pictures


@pytest.mark.parametrize(("height", "width"), [(100, 140), (31, 900)])
def test_soft_tokens(model, height, width):
    facts = model.bundle.manifest.image
    picture = formula_picture(height, width)
    patches = POLICIES[facts.policy].prepare(picture, facts, BUDGET)
    found = model.runtime.encode(patches.values, patches.positions, len(patches.values) // facts.pool_size**2)
    np.testing.assert_allclose(found, expected_soft_tokens(model, picture), atol=1e-4)


def test_a_faint_picture_shows_the_epsilon_of_the_embedder(tiny_model):
    """Two grey levels: the variance of the values is close to 1e-5, so that 1e-6 would give other soft tokens."""
    model = tiny_model("gemma4_unified")
    picture = np.full((96, 144, 3), 200, np.uint8) + (np.arange(144) // 5 % 2)[None, :, None].astype(np.uint8)
    facts = model.bundle.manifest.image
    patches = POLICIES[facts.policy].prepare(picture, facts, BUDGET)
    found = model.runtime.encode(patches.values, patches.positions, len(patches.values))
    np.testing.assert_allclose(found, expected_soft_tokens(model, picture), atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_logits_with_pictures_longer_than_the_window(model, count):
    """Real pictures of 63 to 70 soft tokens; chunks shorter than a picture do not cut it."""
    weights, config = checkpoint(model)
    soft = [expected_soft_tokens(model, picture) for picture in (formula_picture(90, 160), formula_picture(200, 60))]
    ids, blocks = prompt(config, soft[:count])
    expected = large.logits(weights, config, ids, soft[:count])
    np.testing.assert_allclose(model.runtime.session().prompt_logits(ids, blocks), expected, atol=1e-3)
    for chunk in (80, 16, 1):
        found = model.runtime.session().prefill(ids, blocks, chunk=chunk)
        np.testing.assert_allclose(found, expected[-1], atol=1e-3, err_msg=f"chunk {chunk}")


def test_frames_of_videos_are_blocks_too_and_their_placeholders_are_padding(size):
    weights, config = checkpoint(size)
    soft = random_soft(12, 20)
    ids, blocks = prompt(config, soft, "video", "image")
    expected = large.logits(weights, config, ids, soft)
    np.testing.assert_allclose(size.runtime.session().prompt_logits(ids, blocks), expected, atol=1e-3)


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), budget=st.sampled_from([70, 140, 280, 560, 1120]))
def test_whole_patches_have_the_sizes_of_pooled_ones(height, width, budget):
    """The 12B counts patches of 48 pixels where the others pool 3 x 3 of 16."""
    pooled = geometry.aspect_patches_size(height, width, patch_size=16, pool_size=3, budget=budget)
    assert geometry.aspect_patches_size(height, width, patch_size=48, pool_size=1, budget=budget) == pooled
    count = geometry.soft_token_count(*pooled, patch_size=48, pool_size=1)
    assert count == geometry.soft_token_count(*pooled, patch_size=16, pool_size=3)
    assert max(pooled) // 48 <= 1120  # rows of the position table


# --- rules, each against its wrong version


def _no_blocks(text, kind, blocks):
    return large_mask(text, kind, np.full_like(blocks, -1))


def _blocks_in_all_layers(text, kind, blocks):
    query, key = np.mgrid[: len(blocks), : len(blocks)]
    same = (blocks[query] == blocks[key]) & (blocks[query] >= 0)
    return large_mask(text, kind, blocks) | (same if kind == large.FULL else False)


def _blocks_beyond_the_window(text, kind, blocks):
    query, key = np.mgrid[: len(blocks), : len(blocks)]
    same = (blocks[query] == blocks[key]) & (blocks[query] >= 0)
    return large_mask(text, kind, blocks) | (same if kind == large.SLIDING else False)


def _one_block_for_all_pictures(text, kind, blocks):
    return large_mask(text, kind, np.where(blocks >= 0, 0, -1))


def _block_with_the_token_before(text, kind, blocks):
    return large_mask(text, kind, np.where(np.roll(blocks, -1) >= 0, np.roll(blocks, -1), blocks))


def _block_with_the_token_after(text, kind, blocks):
    return large_mask(text, kind, np.where(np.roll(blocks, 1) >= 0, np.roll(blocks, 1), blocks))


def _window(extra):
    return lambda text, kind, blocks: large_mask(
        text | {"sliding_window": text["sliding_window"] + extra}, kind, blocks
    )


large_mask = large.mask
WRONG_MASKS = {
    "pictures are causal": _no_blocks,
    "pictures see themselves in global layers too": _blocks_in_all_layers,
    "the window does not hold inside a picture": _blocks_beyond_the_window,
    "pictures see each other": _one_block_for_all_pictures,
    "the token before a picture belongs to it": _block_with_the_token_before,
    "the token behind a picture belongs to it": _block_with_the_token_after,
    "the window is one longer": _window(1),
    "the window is one shorter": _window(-1),
}


@pytest.mark.parametrize("rule", WRONG_MASKS)
def test_wrong_masks_are_far_away(rule, tiny_model, monkeypatch):
    model = tiny_model("gemma4_dense")
    weights, config = checkpoint(model)
    soft = random_soft(14, 20)
    ids, blocks = prompt(config, soft)
    found = model.runtime.session().prompt_logits(ids, blocks)
    np.testing.assert_allclose(found, large.logits(weights, config, ids, soft), atol=1e-3)
    monkeypatch.setattr(large, "mask", WRONG_MASKS[rule])
    assert np.abs(found - large.logits(weights, config, ids, soft)).max() > 0.05


WRONG_VALUES = {
    "with the weight of the key norm": lambda projected, weights, prefix: reference_model.rms_norm(
        projected, weights[f"{prefix}.k_norm.weight"]
    ),
    "not normed": lambda projected, weights, prefix: projected,
    "rotated": lambda projected, weights, prefix: reference_model.rotate(
        reference_model.rms_norm(projected),
        np.arange(len(projected)),
        reference_model.proportional_inverse_frequencies(1e6, projected.shape[-1], 0.25),
    ),
}


@pytest.mark.parametrize("rule", WRONG_VALUES)
def test_wrong_values_are_far_away(rule, tiny_model, monkeypatch):
    model = tiny_model("gemma4_dense")
    ids = text_ids(30)
    found = model.runtime.session().prefill(ids)
    monkeypatch.setattr(large, "value_heads", WRONG_VALUES[rule])
    assert np.abs(found - large.logits(*checkpoint(model), ids)[-1]).max() > 0.05


def _changed(ending: str, change):
    """Weights in which the tensors with this ending are changed."""
    return lambda weights: (
        weights | {name: change(value, weights, name) for name, value in weights.items() if name.endswith(ending)}
    )


def _other(part: str, replacement: str):
    return lambda value, weights, name: weights[name.replace(part, replacement)]


# Each is equal to leaving out or swapping a rule: a scale of one is no scale.
WRONG_WEIGHTS = {
    "no router scale": _changed("router.scale", lambda value, *_: np.ones_like(value)),
    "no division by sqrt(D)": _changed("router.scale", lambda value, *_: value * 8),
    "no scale of experts": _changed("per_expert_scale", lambda value, *_: np.ones_like(value)),
    "gate and up swapped": _changed("gate_up_proj", lambda value, *_: np.roll(value, 32, axis=1)),
    "experts in another order": _changed("down_proj", lambda value, *_: np.roll(value, 1, axis=0)),
    "experts read the norm of the MLP": _changed("pre_feedforward_layernorm_2.weight", _other("_2.weight", ".weight")),
    "norms behind the branches swapped": _changed("layernorm_1.weight", _other("_1.weight", "_2.weight")),
    "no layer scalar": _changed("layer_scalar", lambda value, *_: np.ones_like(value)),
}


@pytest.mark.parametrize("rule", WRONG_WEIGHTS)
def test_wrong_scales_and_orders_of_experts_are_far_away(rule, experts):
    weights, config = checkpoint(experts)
    ids = text_ids(30)
    found = experts.runtime.session().prefill(ids)
    np.testing.assert_allclose(found, large.logits(weights, config, ids)[-1], atol=1e-3)
    assert np.abs(found - large.logits(WRONG_WEIGHTS[rule](weights), config, ids)[-1]).max() > 0.05


def _normed_residual(residual, weights, prefix, used):
    norm = weights[prefix.replace("router", "pre_feedforward_layernorm_2.weight")]
    return large_route(reference_model.rms_norm(residual, norm), weights, prefix, used)


large_route = large.route
WRONG_ROUTES = {
    "reads the normed stream": _normed_residual,
    "one expert more": lambda residual, weights, prefix, used: large_route(residual, weights, prefix, used + 1),
    "one expert less": lambda residual, weights, prefix, used: large_route(residual, weights, prefix, used - 1),
    "equal shares": lambda *arguments: np.where(large_route(*arguments) > 0, 1 / 3, 0),
}


@pytest.mark.parametrize("rule", WRONG_ROUTES)
def test_wrong_routes_are_far_away(rule, experts, monkeypatch):
    ids = text_ids(30)
    found = experts.runtime.session().prefill(ids)
    monkeypatch.setattr(large, "route", WRONG_ROUTES[rule])
    assert np.abs(found - large.logits(*checkpoint(experts), ids)[-1]).max() > 0.05


WRONG_EMBEDDERS = {
    "axes of the positions swapped": _changed("pos_embedding", lambda value, *_: value[:, ::-1]),
    "no bias of the first norm": _changed("patch_ln1.bias", lambda value, *_: np.zeros_like(value)),
    "no bias of the layer": _changed("patch_dense.bias", lambda value, *_: np.zeros_like(value)),
    "no weight of the second norm": _changed("patch_ln2.weight", lambda value, *_: np.ones_like(value)),
    "no bias of the last norm": _changed("pos_norm.bias", lambda value, *_: np.zeros_like(value)),
}


@pytest.mark.parametrize("rule", WRONG_EMBEDDERS)
def test_wrong_embedders_are_far_away(rule, tiny_model, monkeypatch):
    model = tiny_model("gemma4_unified")
    right = checkpoint(model)
    picture = formula_picture(100, 140)
    found = expected_soft_tokens(model, picture)
    monkeypatch.setattr(reference_model, "load_checkpoint", lambda folder: (WRONG_EMBEDDERS[rule](right[0]), right[1]))
    assert np.abs(found - expected_soft_tokens(model, picture)).max() > 0.05


# --- facts


def test_layers_that_need_the_mask_keep_all_tokens_and_the_bundle_says_what_that_costs(size):
    manifest = size.bundle.manifest
    assert {pair.kind for pair in manifest.state} == {"global"}
    hearing = () if manifest.audio is None else ("audio:frames",)
    seeing = ("logit_rows:any", "attention:image_blocks", "image:aspect_patches", "video:clock_frames")
    assert manifest.requires == ("state:global", *seeing, *hearing)
    report = json.loads(size.bundle.path("export").read_text())
    # Three windowed layers with 2 heads of 16, two global layers with 1 head of 32, keys and values, four bytes each.
    assert "1280 bytes a token in float32" in report["notes"][0]
    assert "768 of them in 3 layers" in report["notes"][0]
    assert size.runtime.session().state_bytes % 1280 == 0


def test_without_pictures_windows_are_buffers(tiny_model):
    model = tiny_model("gemma4_experts", vision=False)
    manifest = model.bundle.manifest
    assert manifest.modalities == ("text",)
    assert [pair.kind for pair in manifest.state][::2] == ["window", "window", "global", "window", "global"]
    assert "block_ends" not in model.runtime.decoder.inputs
    ids = text_ids(60)
    expected = large.logits(*checkpoint(model), ids)[-1]
    for chunk in (512, 7, 1):
        np.testing.assert_allclose(model.runtime.session().prefill(ids, chunk=chunk), expected, atol=1e-3)


def test_pictures_may_be_causal(tiny_model):
    """`use_bidirectional_attention` null, as in E2B and E4B: window buffers, and pictures can be cut."""
    model = tiny_model("gemma4_dense", use_bidirectional_attention=None)
    assert "attention:image_blocks" not in model.bundle.manifest.requires
    weights, config = checkpoint(model)
    soft = random_soft(30)
    ids, blocks = prompt(config, soft)
    expected = large.logits(weights, config, ids, soft)[-1]
    for chunk in (512, 7):
        found = model.runtime.session().prefill(ids, blocks, chunk=chunk)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_embedder_of_the_12b_takes_whole_patches(tiny_model):
    model = tiny_model("gemma4_unified")
    facts = model.bundle.manifest.image
    assert (facts.patch_size, facts.pool_size, facts.default_budget) == (48, 1, 280)
    assert json.loads(model.bundle.path("export").read_text())["left_out"] == []
    without = tiny_model("gemma4_unified", audio=False)
    assert without.bundle.manifest.audio is None


# --- float16


@pytest.mark.parametrize("family", ["gemma4_dense", "gemma4_experts", "gemma4_unified"])
def test_float16_loses_no_more_than_rounding(family, tmp_path):
    """Bundles for GPUs, run here on the CPU as self-tests do. The tower of the dense one leaves float16's range: pooled
    values times sqrt(hidden), and the bias that standardises them, are beyond 65504 in the published 26B and 31B."""
    folder = tmp_path / "checkpoint"
    getattr(tiny_gemma4_large, f"write_{family}")(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors if family == "gemma4_dense" else ():
        if "vision_tower.encoder" in name and "post_feedforward_layernorm" in name:
            tensors[name] *= 2e4
        elif name.endswith("std_bias"):
            tensors[name] *= 5e4
        elif name.endswith("std_scale"):
            tensors[name] *= 1e-5
    save_file(tensors, folder / "model.safetensors")
    export(folder, tmp_path / "bundle", ExportOptions(precision="fp16", target="cuda"))
    bundle = Bundle.open(tmp_path / "bundle")
    runtime = Runtime(bundle, device="cpu", foreign=True)
    model = TinyModel(folder, bundle, runtime)
    weights, config = checkpoint(model)
    picture = formula_picture(90, 160)
    soft = expected_soft_tokens(model, picture)
    facts = runtime.manifest.image
    patches = POLICIES[facts.policy].prepare(picture, facts, BUDGET)
    found = runtime.encode(patches.values, patches.positions, len(soft))
    np.testing.assert_allclose(found, soft, atol=0.01 * np.abs(soft).max())
    ids, blocks = prompt(config, [soft])
    right = large.logits(weights, config, ids, [soft])[-1]
    assert np.abs(runtime.session().prefill(ids, blocks) - right).max() < 0.01 * np.ptp(right)
