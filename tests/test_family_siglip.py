"""PaliGemma 1 and 2 and Gemma 3 with vision: graphs and whole bundles against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from siglance.engine.bundle import Bundle
from siglance.engine.engine import Engine
from siglance.engine.image_policy import POLICIES, resize
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.sampling import Sampling
from siglance.engine.self_test import formula_picture
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from . import reference_model, reference_siglip

PALIGEMMA = {
    "paligemma": {"key_style": "hub"},
    # the placeholder of pictures has no row in the table of embeddings
    "paligemma nested bfloat16": {"key_style": "nested", "storage": "bfloat16", "shards": 2, "vocab_size": 1664},
    "paligemma2": {"text": "gemma2"},
    "paligemma2 hub, no caps, no windows": {
        **{"text": "gemma2", "key_style": "hub", "attn_logit_softcapping": None, "final_logit_softcapping": None},
        **{"sliding_window": None, "seed": 6},
    },
}
GEMMA3 = {
    "gemma3": {},
    "gemma3 hub, window longer than a picture": {"key_style": "hub", "sliding_window": 24, "seed": 7},
    "gemma3 nested, factor 1": {"key_style": "nested", "sliding_window_pattern": 2, "rope_scaling": None},
}


def load(model):
    weights, config = reference_model.load_checkpoint(model.checkpoint)
    return reference_siglip.canonical(weights), config


def encode(model, picture: np.ndarray) -> np.ndarray:
    facts = model.bundle.manifest.image
    patches = POLICIES[facts.policy].prepare(picture, facts)
    return model.runtime.encode(patches.values, patches.positions, facts.default_budget)


def expected_soft_tokens(model, picture: np.ndarray) -> np.ndarray:
    weights, config = load(model)
    size, filter_name = config["vision_config"]["image_size"], model.bundle.manifest.image.resample
    resized = resize(picture, size, size, filter_name)
    if config["model_type"] == "paligemma":
        return reference_siglip.paligemma_soft_tokens(weights, config, resized)
    return reference_siglip.gemma3_soft_tokens(weights, config, resized)


def text_ids(length: int, seed: int = 0) -> list[int]:
    """Ids of ordinary text in both vocabularies."""
    return np.random.default_rng(seed).integers(60, 380, length).tolist()


# --- vision


@pytest.mark.parametrize("size", [(40, 90), (168, 168), (300, 61)])
@pytest.mark.parametrize("name", [*PALIGEMMA, *GEMMA3])
def test_soft_tokens_equal_the_reference(tiny_model, name, size):
    model = tiny(tiny_model, name)
    picture = formula_picture(*size)
    found, expected = encode(model, picture), expected_soft_tokens(model, picture)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - expected_soft_tokens(model, picture[:, ::-1])).max() > 0.1, "the picture does not matter"


def tiny(tiny_model, name: str):
    if name in PALIGEMMA:
        return tiny_model("paligemma", **PALIGEMMA[name])
    return tiny_model("gemma3_vision", **GEMMA3[name])


# --- PaliGemma: one block of the whole prompt


@pytest.fixture(params=PALIGEMMA, scope="module")
def paligemma(request, tiny_model):
    return tiny_model("paligemma", **PALIGEMMA[request.param])


def paligemma_prompt(config, pictures: int, text: int) -> list[int]:
    return [*[config["image_token_index"]] * 16 * pictures, 2, *text_ids(text), 17]


@pytest.mark.parametrize(("pictures", "text"), [(1, 5), (2, 3), (0, 12), (1, 40)])
def test_the_prompt_of_paligemma_sees_all_of_itself(paligemma, pictures, text):
    """However it is to be cut: a prefix is never cut. All rows, then steps of the answer, then a prompt at once."""
    weights, config = load(paligemma)
    shown = [formula_picture(50 + 30 * index, 80) for index in range(pictures)]
    soft = [expected_soft_tokens(paligemma, picture) for picture in shown]
    prompt, answer = paligemma_prompt(config, pictures, text), text_ids(12, seed=9)
    expected = reference_siglip.paligemma_logits(weights, config, [*prompt, *answer], soft, len(prompt))
    blocks = [SoftTokens(16 * index, np.float32(values)) for index, values in enumerate(soft)]
    rows = paligemma.runtime.session().prompt_logits(np.array(prompt), blocks)
    np.testing.assert_allclose(rows, expected[: len(prompt)], atol=1e-3)
    for chunk in (512, 8, 1):
        session = paligemma.runtime.session()
        last = session.prefill(np.array(prompt), blocks, chunk=chunk)
        np.testing.assert_allclose(last, expected[len(prompt) - 1], atol=1e-3, err_msg=f"chunk {chunk}")
    for index, token in enumerate(answer):
        np.testing.assert_allclose(session.step(token), expected[len(prompt) + index], atol=1e-3)


def test_a_causal_prompt_would_be_far_away(paligemma):
    """The comparison above means something: no block, and a block that ends one row early."""
    weights, config = load(paligemma)
    prompt = paligemma_prompt(config, 0, 12)
    found = paligemma.runtime.session().prompt_logits(np.array(prompt))
    for prefix in (0, len(prompt) - 1):
        wrong = reference_siglip.paligemma_logits(weights, config, prompt, [], prefix)
        assert np.abs(found - wrong).max() > 0.05


def test_windows_of_paligemma_2_do_not_cut_the_prompt_but_the_answer(tiny_model):
    """Window 8, a prompt of 30 tokens: the first row sees the last; the answer has lost the first rows."""
    model = tiny_model("paligemma", text="gemma2")
    weights, config = load(model)
    prompt, answer = paligemma_prompt(config, 0, 28), text_ids(4, seed=1)
    ids = [*prompt, *answer]
    session = model.runtime.session()
    session.prefill(np.array(prompt))
    found = np.stack([session.step(token) for token in answer])
    expected = reference_siglip.paligemma_logits(weights, config, ids, [], len(prompt))[-len(answer) :]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    text = config["text_config"] | {"sliding_window": 1024}
    wide = reference_siglip.paligemma_logits(weights, config | {"text_config": text}, ids, [], len(prompt))
    assert np.abs(found - wide[-len(answer) :]).max() > 0.05


@pytest.mark.parametrize(("key", "value"), [("attn_logit_softcapping", None), ("final_logit_softcapping", None)])
def test_both_soft_caps_of_paligemma_2_matter(tiny_model, key, value):
    model = tiny_model("paligemma", text="gemma2")
    weights, config = load(model)
    prompt = paligemma_prompt(config, 0, 12)
    found = model.runtime.session().prompt_logits(np.array(prompt))
    without = config | {"text_config": config["text_config"] | {key: value}}
    assert np.abs(found - reference_siglip.paligemma_logits(weights, without, prompt, [], len(prompt))).max() > 0.05


# --- Gemma 3: every picture is a block


@pytest.fixture(params=GEMMA3, scope="module")
def gemma3(request, tiny_model):
    return tiny_model("gemma3_vision", **GEMMA3[request.param])


def gemma3_prompt(model, pictures: int):
    """(ids, soft tokens of the reference, the same as blocks): text, then pictures with text between and behind."""
    _, config = load(model)
    ids, soft, blocks = [2, *text_ids(5)], [], []
    for index in range(pictures):
        values = expected_soft_tokens(model, formula_picture(90 + 40 * index, 70))
        soft.append(values)
        blocks.append(SoftTokens(len(ids), np.float32(values)))
        ids += [config["image_token_index"]] * len(values) + text_ids(3 + index, seed=index)
    return [*ids, *text_ids(6, seed=8)], soft, blocks


@pytest.mark.parametrize("pictures", [0, 1, 2, 3])
def test_pictures_of_gemma3_see_all_of_themselves(gemma3, pictures):
    weights, config = load(gemma3)
    ids, soft, blocks = gemma3_prompt(gemma3, pictures)
    answer = text_ids(10, seed=3)
    expected = reference_siglip.gemma3_vision_logits(weights, config, [*ids, *answer], soft)
    rows = gemma3.runtime.session().prompt_logits(np.array(ids), blocks)
    np.testing.assert_allclose(rows, expected[: len(ids)], atol=1e-3)
    for chunk in (512, 12, 3, 1):
        session = gemma3.runtime.session()
        last = session.prefill(np.array(ids), blocks, chunk=chunk)
        np.testing.assert_allclose(last, expected[len(ids) - 1], atol=1e-3, err_msg=f"chunk {chunk}")
    for index, token in enumerate(answer):
        np.testing.assert_allclose(session.step(token), expected[len(ids) + index], atol=1e-3)


def test_a_second_turn_with_a_picture_is_one_sequence(gemma3):
    """The blocks of a later prompt stand at absolute positions."""
    weights, config = load(gemma3)
    ids, soft, blocks = gemma3_prompt(gemma3, 2)
    cut = blocks[1].start - 1
    session = gemma3.runtime.session()
    session.prefill(np.array(ids[:cut]), blocks[:1], chunk=4)
    found = session.prefill(np.array(ids[cut:]), [SoftTokens(1, blocks[1].values)])
    np.testing.assert_allclose(found, reference_siglip.gemma3_vision_logits(weights, config, ids, soft)[-1], atol=1e-3)


def test_causal_pictures_would_be_far_away(gemma3, monkeypatch):
    weights, config = load(gemma3)
    ids, soft, blocks = gemma3_prompt(gemma3, 2)
    found = gemma3.runtime.session().prompt_logits(np.array(ids), blocks)
    visible = reference_siglip.visible
    monkeypatch.setattr(
        *(reference_siglip, "visible"), lambda length, _, window, **options: visible(length, [], window, **options)
    )
    wrong = reference_siglip.gemma3_vision_logits(weights, config, ids, soft)
    first = blocks[0].start
    np.testing.assert_allclose(found[:first], wrong[:first], atol=1e-3)
    assert np.abs(found[first] - wrong[first]).max() > 0.05


def test_one_picture_does_not_see_another(tiny_model):
    """Blocks are pictures, not all soft tokens of a prompt: the first picture does not change with the second."""
    model = tiny_model("gemma3_vision")
    ids, _, blocks = gemma3_prompt(model, 2)
    other = [blocks[0], SoftTokens(blocks[1].start, blocks[1].values[::-1].copy())]
    rows = [model.runtime.session().prompt_logits(np.array(ids), soft) for soft in (blocks, other)]
    np.testing.assert_allclose(rows[0][: blocks[1].start], rows[1][: blocks[1].start], atol=1e-6)
    assert np.abs(rows[0][-1] - rows[1][-1]).max() > 1e-3


# --- whole bundles


def test_paligemma_from_a_picture_to_text(tiny_model):
    model = tiny_model("paligemma", text="gemma2")
    weights, config = load(model)
    picture = formula_picture(70, 90)
    with Engine.open(model.bundle.folder) as engine:
        assert engine.verify().result == "equal"
        reply = engine.generate([picture, "detect cat"], max_tokens=8)
        counted = engine.count_tokens([picture, "detect cat"])["total"]
    ids = [config["image_token_index"]] * 16 + [2, *encoded(model, "detect cat\n")]
    soft = [expected_soft_tokens(model, picture)]
    assert counted == len(ids)
    for token in reply.token_ids:
        logits = reference_siglip.paligemma_logits(weights, config, ids, soft, counted)[-1]
        assert logits[token] > logits.max() - 1e-3
        ids.append(token)


def encoded(model, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(model.bundle.path("tokenizer")))
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_gemma3_with_two_pictures_to_text(tiny_model):
    model = tiny_model("gemma3_vision")
    weights, config = load(model)
    pictures = [formula_picture(70, 90), formula_picture(200, 60)]
    with Engine.open(model.bundle.folder) as engine:
        assert engine.verify().result == "equal"
        reply = engine.generate(
            [pictures[0], "and", pictures[1], "what?"], max_tokens=8, sampling=Sampling(temperature=0)
        )
    before, soft, after = "\n\n<start_of_image>", "<image_soft_token>" * 9, "<end_of_image>\n\n"
    shown = f"{before}{soft}{after}"
    text = f"<bos><start_of_turn>user\n{shown}and{shown}what?<end_of_turn>\n<start_of_turn>model\n"
    ids = encoded(model, text)
    values = [expected_soft_tokens(model, picture) for picture in pictures]
    for token in reply.token_ids:
        logits = reference_siglip.gemma3_vision_logits(weights, config, ids, values)[-1]
        assert logits[token] > logits.max() - 1e-3
        ids.append(token)


@pytest.mark.parametrize(("family", "arguments"), [("paligemma", {"text": "gemma2"}), ("gemma3_vision", {})])
@pytest.mark.parametrize(
    ("precision", "target", "loss"), [("int8", "cpu", 0.05), ("int4", "cpu", 0.5), ("fp16", "cuda", 0.01)]
)
def test_other_precisions_are_near(tiny_model, tmp_path, family, arguments, precision, target, loss):
    """Soft tokens and logits relative to float32; the matrix that is stored the other way round is one of them."""
    model = tiny_model(family, **arguments)
    export(model.checkpoint, tmp_path / "bundle", ExportOptions(precision=precision, target=target))
    runtime = Runtime(Bundle.open(tmp_path / "bundle"), device="cpu", foreign=True)
    facts, picture = runtime.manifest.image, formula_picture(70, 90)
    patches = POLICIES[facts.policy].prepare(picture, facts)
    soft = runtime.encode(patches.values, patches.positions, facts.default_budget)
    exact = encode(model, picture)
    assert np.abs(soft - exact).max() < min(loss, 0.05) * np.ptp(exact)
    ids = np.array([*[100] * len(soft), 2, *text_ids(9)])
    found = runtime.session().prefill(ids, [SoftTokens(0, soft)])
    expected = model.runtime.session().prefill(ids, [SoftTokens(0, exact)])
    assert np.abs(found - expected).max() < loss * np.ptp(expected)
