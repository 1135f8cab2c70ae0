"""PaliGemma and Gemma 3 with vision against transformers, on tiny random checkpoints that it saved."""

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

from .. import tiny_tokenizer
from ..test_family_siglip_config import PUBLISHED

pytestmark = pytest.mark.parity

NAMES = ("paligemma_3b", "paligemma2_3b", "paligemma2_28b_window", "gemma3_4b", "gemma3_27b")
PICTURES = [formula_picture(90, 160), formula_picture(300, 70)]


@pytest.fixture(scope="module")
def layouts():
    # Not at module level: the fast suite collects this file where torch is not installed.
    from . import layouts_siglip

    return layouts_siglip


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory, layouts):
    """(transformers model, our runtime) of one layout."""
    folder = tmp_path_factory.mktemp(request.param)
    model = layouts.write(request.param, folder / "checkpoint")
    tokens = ("<image>",) if "paligemma" in request.param else tiny_tokenizer.GEMMA3_TOKENS
    tiny_tokenizer.write_tokenizer(folder / "checkpoint", tokens, 512)
    export(folder / "checkpoint", folder / "bundle")
    return model, Runtime(Bundle.open(folder / "bundle"))


def record(record_property, name: str, found: np.ndarray, expected: np.ndarray, limit: float) -> None:
    difference = float(np.abs(found - expected).max())
    record_property(name, difference)
    print(f"{name}: max difference {difference:.2e} of {np.abs(expected).max():.2f}")
    assert difference <= limit


def encode(runtime: Runtime, picture: np.ndarray) -> np.ndarray:
    facts = runtime.manifest.image
    patches = POLICIES[facts.policy].prepare(picture, facts)
    return runtime.encode(patches.values, patches.positions, facts.default_budget)


def prompt_of(runtime: Runtime, layouts, soft: list[np.ndarray]) -> tuple[list[int], list[SoftTokens]]:
    """PaliGemma: pictures, begin, text. Gemma 3: begin, then text and pictures in turn."""
    text = np.random.default_rng(len(soft)).integers(100, 490, 40).tolist()
    first = runtime.manifest.prompt.layout == "media_first"
    ids: list[int] = [] if first else [2, *text[:5]]
    blocks = []
    for index, values in enumerate(soft):
        blocks.append(SoftTokens(len(ids), values))
        ids += [layouts.IMAGE_ID] * len(values) + ([] if first else text[5 * index : 5 * index + 4])
    return [*ids, *([2] if first else []), *text[20:30]], blocks


def test_soft_tokens(pair, layouts, record_property):
    """From the same pictures, each of them resized by our engine and by the processor of transformers."""
    model, runtime = pair
    expected = layouts.soft_tokens(model, PICTURES)
    for index, picture in enumerate(PICTURES):
        record(record_property, f"soft tokens {index}", encode(runtime, picture), expected[index], 1e-4)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_logits_of_prompt_and_answer(pair, layouts, record_property, count):
    """Every row of the prompt, the last row however the prompt is to be cut, and cached steps of an answer, against
    transformers over the whole sequence at once."""
    model, runtime = pair
    pictures = PICTURES[:count]
    ids, blocks = prompt_of(runtime, layouts, [encode(runtime, picture) for picture in pictures])
    answer = np.random.default_rng(9).integers(100, 490, 20).tolist()
    expected = layouts.logits(model, [*ids, *answer], pictures, len(ids))
    rows = runtime.session().prompt_logits(np.array(ids), blocks)
    record(record_property, "all rows", rows, expected[: len(ids)], 1e-3)
    for chunk in (512, 8, 3, 1):
        session = runtime.session()
        last = session.prefill(np.array(ids), blocks, chunk=chunk)
        record(record_property, f"chunk {chunk}", last, expected[len(ids) - 1], 1e-3)
    steps = np.stack([session.step(token) for token in answer])
    record(record_property, "cached steps", steps, expected[len(ids) :], 1e-3)


def test_greedy_ids_are_those_of_generate(pair, layouts):
    """The cache of transformers and ours give the same tokens, with the masks that `generate` makes for itself."""
    import torch

    model, runtime = pair
    ids, blocks = prompt_of(runtime, layouts, [encode(runtime, picture) for picture in PICTURES])
    input_ids = torch.tensor(ids)[None]
    paligemma = model.config.model_type == "paligemma"
    types = torch.zeros_like(input_ids) if paligemma else (input_ids == layouts.IMAGE_ID).to(torch.int64)
    outputs = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        token_type_ids=types,
        pixel_values=layouts.pixel_values(model, PICTURES),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )
    session = runtime.session()
    logits, found = session.prefill(np.array(ids), blocks), []
    for _ in range(24):
        found.append(int(logits.argmax()))
        logits = session.step(found[-1])
    assert found == outputs[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sparse_configurations_mean_what_they_mean_to_transformers(name):
    """Also with any one key of a section left out, and without the section."""
    from transformers import Gemma3Config, PaliGemmaConfig

    values, _ = PUBLISHED[name]
    kind = PaliGemmaConfig if values["model_type"] == "paligemma" else Gemma3Config
    # Without these the rest does not fit together, which both refuse in their own way.
    needed = {"hidden_size", "head_dim", "patch_size", "model_type"}
    variants = [values]
    for section in ("text_config", "vision_config"):
        for key in values[section].keys() - needed:
            less = {other: value for other, value in values[section].items() if other != key}
            variants.append(json.loads(json.dumps(values | {section: less})))
    if kind is PaliGemmaConfig:
        variants.append({key: value for key, value in values.items() if key != "vision_config"})
    for variant in variants:
        ours = find_family(variant).read(variant)
        theirs = kind(**{key: value for key, value in json.loads(json.dumps(variant)).items() if key != "model_type"})
        assert facts_of(ours) == facts_of_transformers(theirs), variant


def facts_of(config) -> tuple:
    vision, text = config.vision, getattr(config, "text", config)
    tower = (vision.hidden, vision.layers, vision.heads, vision.intermediate, vision.patch, vision.side)
    decoder = (text.hidden, text.layers, text.heads, text.key_value_heads, text.head_size, text.intermediate)
    decoder += (text.vocabulary, text.context, text.windowed, round(text.scale, 9), text.tied)
    if hasattr(text, "attention_cap"):
        return *tower, *decoder, text.attention_cap, text.logits_cap, text.theta, config.image_id
    ropes = [(rope.theta, rope.linear_factor) for rope in (text.local_rope, text.global_rope)]
    return *tower, *decoder, text.window, ropes, config.pool, config.image_id


def facts_of_transformers(config) -> tuple:
    vision, text = config.vision_config, config.text_config
    side = vision.image_size // vision.patch_size
    tower = (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size)
    tower += (vision.patch_size, side)
    decoder = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads)
    decoder += (text.head_dim, text.intermediate_size, text.vocab_size, text.max_position_embeddings)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    scalar = text.head_dim if text.model_type == "gemma" else text.query_pre_attn_scalar
    decoder += (tuple(kind == "sliding_attention" for kind in kinds), round(scalar**-0.5, 9))
    decoder += (config.tie_word_embeddings,)
    if config.model_type == "paligemma":
        caps = [getattr(text, f"{name}_logit_softcapping", None) for name in ("attn", "final")]
        return *tower, *decoder, *caps, text.rope_parameters["rope_theta"], config.image_token_id
    rope = [text.rope_parameters[kind] for kind in ("sliding_attention", "full_attention")]
    ropes = [(facts["rope_theta"], facts.get("factor", 1.0)) for facts in rope]
    pool = side // round(config.mm_tokens_per_image**0.5)
    return *tower, *decoder, text.sliding_window, ropes, pool, config.image_token_id
