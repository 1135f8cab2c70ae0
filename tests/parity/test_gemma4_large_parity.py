"""Gemma 4 31B, 26B-A4B and 12B against transformers, on tiny random checkpoints that it saved."""

from __future__ import annotations

import json

import numpy as np
import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.image_policy import POLICIES
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.export.exporter import export
from siglance.export.families import find_family
from siglance.export.official import OFFICIAL

from .. import tiny_tokenizer

pytestmark = pytest.mark.parity

SEEING = ("gemma4_31b", "gemma4_31b_window", "gemma4_26b", "gemma4_12b", "gemma4_12b_window")
PICTURES = [formula_picture(90, 160), formula_picture(300, 70)]


@pytest.fixture(scope="module")
def layouts():
    # Not at module level: the fast suite collects this file where torch is not installed.
    from . import layouts_gemma4_large

    return layouts_gemma4_large


@pytest.fixture(scope="module")
def make(tmp_path_factory, layouts):
    """(transformers model, our runtime) of a layout."""

    def make(name: str):
        folder = tmp_path_factory.mktemp(name)
        model = layouts.write(name, folder / "checkpoint")
        tiny_tokenizer.write_tokenizer(folder / "checkpoint", tiny_tokenizer.GEMMA4_TOKENS, 512)
        export(folder / "checkpoint", folder / "bundle")
        return model, Runtime(Bundle.open(folder / "bundle"))

    return make


@pytest.fixture(scope="module", params=SEEING)
def pair(request, make):
    return make(request.param)


def record(record_property, name: str, found: np.ndarray, expected: np.ndarray, limit: float) -> None:
    difference = float(np.abs(found - expected).max())
    record_property(name, difference)
    print(f"{name}: max difference {difference:.2e} of {np.abs(expected).max():.2f}")
    assert difference <= limit


def encode(runtime: Runtime, picture: np.ndarray) -> np.ndarray:
    facts = runtime.manifest.image
    patches = POLICIES[facts.policy].prepare(picture, facts, 70)
    return runtime.encode(patches.values, patches.positions, len(patches.values) // facts.pool_size**2)


def prompt_of(layouts, soft: list[np.ndarray], kind: str = "image") -> tuple[list[int], list[SoftTokens]]:
    text = np.random.default_rng(len(soft)).integers(100, 490, 40).tolist()
    ids, blocks = [2, *text[:5]], []
    for index, values in enumerate(soft):
        blocks.append(SoftTokens(len(ids), values))
        ids += [layouts.TOKEN_IDS[f"{kind}_token_id"]] * len(values) + text[5 * index : 5 * index + 4]
    return [*ids, *text[20:30]], blocks


def test_soft_tokens(pair, layouts, record_property):
    """From the same pictures, each of them resized by our engine and by the processor of transformers."""
    model, runtime = pair
    for index, picture in enumerate(PICTURES):
        expected = layouts.soft_tokens(model, picture)
        record(record_property, f"soft tokens {index}", encode(runtime, picture), expected, 1e-4)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_logits_of_prompt_and_answer(pair, layouts, record_property, count):
    """Every row of the prompt, the last row however the prompt is to be cut, and cached steps of an answer, against
    transformers over the whole sequence at once."""
    model, runtime = pair
    pictures = PICTURES[:count]
    ids, blocks = prompt_of(layouts, [encode(runtime, picture) for picture in pictures])
    answer = np.random.default_rng(9).integers(100, 490, 20).tolist()
    expected = layouts.logits(model, [*ids, *answer], pictures)
    rows = runtime.session().prompt_logits(np.array(ids), blocks)
    record(record_property, "all rows", rows, expected[: len(ids)], 1e-3)
    for chunk in (512, 80, 8, 1):
        session = runtime.session()
        last = session.prefill(np.array(ids), blocks, chunk=chunk)
        record(record_property, f"chunk {chunk}", last, expected[len(ids) - 1], 1e-3)
    steps = np.stack([session.step(token) for token in answer])
    record(record_property, "cached steps", steps, expected[len(ids) :], 1e-3)


def test_frames_of_a_video(pair, layouts, record_property):
    """Placeholders of type 2 form blocks as those of images do."""
    model, runtime = pair
    ids, blocks = prompt_of(layouts, [encode(runtime, picture) for picture in PICTURES], "video")
    expected = layouts.logits(model, ids, PICTURES, video=True)
    record(record_property, "frames", runtime.session().prompt_logits(np.array(ids), blocks), expected, 1e-3)


def test_greedy_ids_are_those_of_generate(pair, layouts):
    """The cache of transformers and ours give the same tokens, with the masks that `generate` makes for itself."""
    model, runtime = pair
    ids, blocks = prompt_of(layouts, [encode(runtime, picture) for picture in PICTURES])
    inputs = layouts.media_inputs(model, ids, PICTURES)
    # A static cache makes `generate` prepare the masks; see `layouts.logits`.
    outputs = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, eos_token_id=None, cache_implementation="static"
    )
    session = runtime.session()
    logits, found = session.prefill(np.array(ids), blocks), []
    for _ in range(24):
        found.append(int(logits.argmax()))
        logits = session.step(found[-1])
    assert found == outputs[0, len(ids) :].tolist()


def test_a_text_only_checkpoint(make, layouts, record_property):
    model, runtime = make("gemma4_26b_text")
    ids = np.random.default_rng(1).integers(100, 490, 50)
    expected = layouts.logits(model, ids.tolist())
    for chunk in (512, 8, 1):
        record(record_property, f"chunk {chunk}", runtime.session().prefill(ids, chunk=chunk), expected[-1], 1e-3)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if "gemma-4" in name])
def test_sparse_configurations_mean_what_they_mean_to_transformers(name):
    """The configuration of each size, and the same with any one key of a section left out."""
    from transformers import Gemma4Config, Gemma4UnifiedConfig

    values = OFFICIAL[name]
    kind = Gemma4Config if values["model_type"] == "gemma4" else Gemma4UnifiedConfig
    # Without these the rest does not fit together, which both refuse in their own way.
    needed = {"model_type", "layer_types", "num_hidden_layers", "num_experts", "top_k_experts", "moe_intermediate_size"}
    needed |= {"num_attention_heads"} | ({"num_key_value_heads"} if values["vision_config"] else set())
    variants = [values]
    for section in ("text_config", "vision_config"):
        for key in values[section].keys() - needed:
            less = {other: value for other, value in values[section].items() if other != key}
            variants.append(json.loads(json.dumps(values | {section: less})))
    for variant in variants:
        ours = find_family(variant).read(variant)
        theirs = kind(**{key: value for key, value in json.loads(json.dumps(variant)).items() if key != "model_type"})
        assert facts_of(ours) == facts_of_transformers(theirs), variant


def facts_of(config) -> tuple:
    text, vision = config.text, config.vision
    decoder = (text.hidden, text.heads, text.vocabulary, text.context, text.window, text.padding_id, text.soft_cap)
    decoder += (text.local_theta, text.global_theta, text.global_partial, text.per_layer, text.image_blocks, text.tied)
    layers = [
        (
            layer.windowed,
            layer.head_size,
            layer.key_value_heads,
            layer.intermediate,
            layer.value_is_key,
            layer.owns_state,
        )
        for layer in text.layers
    ]
    experts = text.experts and (text.experts.count, text.experts.used, text.experts.intermediate)
    picture = [getattr(vision, name, None) for name in ("hidden", "patch", "pool", "table")]
    tower = [getattr(vision, name, None) for name in ("layers", "heads", "head_size", "intermediate", "theta")]
    tower += [getattr(vision, name, None) for name in ("clipped", "standardize")]
    return decoder, layers, experts, picture, tower, config.media_ids, config.has_audio


def facts_of_transformers(config) -> tuple:
    text, vision = config.text_config, config.vision_config
    unified = config.model_type == "gemma4_unified"
    local, everywhere = (text.rope_parameters[kind] for kind in ("sliding_attention", "full_attention"))
    decoder = (text.hidden_size, text.num_attention_heads, text.vocab_size, text.max_position_embeddings)
    decoder += (text.sliding_window, text.pad_token_id, text.final_logit_softcapping, local["rope_theta"])
    decoder += (everywhere["rope_theta"], everywhere["partial_rotary_factor"])
    decoder += (0 if unified else text.hidden_size_per_layer_input, text.use_bidirectional_attention == "vision")
    decoder += (config.tie_word_embeddings,)
    owners = text.num_hidden_layers - text.num_kv_shared_layers
    layers = []
    for index, (kind, own) in enumerate(zip(text.layer_types, text.per_layer_config, strict=True)):
        windowed = kind == "sliding_attention"
        wide = 2 if text.use_double_wide_mlp and index >= owners else 1
        layers.append(
            (
                *(windowed, own.head_dim, own.num_key_value_heads, text.intermediate_size * wide),
                *(text.attention_k_eq_v and not windowed, index < owners),
            )
        )
    moe = not unified and text.enable_moe_block
    experts = (text.num_experts, text.top_k_experts, text.moe_intermediate_size) if moe else None
    if unified:
        picture = [vision.mm_embed_dim, vision.patch_size, vision.pooling_kernel_size, vision.mm_posemb_size]
        tower = [None] * 7
    else:
        picture = [vision.hidden_size, vision.patch_size, vision.pooling_kernel_size, vision.position_embedding_size]
        tower = [vision.num_hidden_layers, vision.num_attention_heads, vision.head_dim, vision.intermediate_size]
        tower += [vision.rope_parameters["rope_theta"], vision.use_clipped_linears, vision.standardize]
    media = {name: getattr(config, f"{name}_token_id") for name in ("image", "video", "audio")}
    return decoder, layers, experts, picture, tower, media, config.audio_config is not None
