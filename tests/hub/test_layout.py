"""What can be compared with the recordings of official models without their weights: layout and placement."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split

from siglance.engine import Engine
from siglance.engine.image import load_image
from siglance.engine.image_policy import POLICIES
from siglance.engine.manifest import ImageFacts, PlaceholderFacts, PromptFacts
from siglance.engine.prompt import Media, Message, PromptBuilder, Text
from siglance.engine.template import ChatTemplate

from ..tiny_tokenizer import GEMMA3_TEMPLATE, GEMMA4_TEMPLATE
from .golden import FOLDER, GOLDENS, Golden, check_greedy, check_logits, check_prompt

NAMES = list(GOLDENS)
GEMMA3_IMAGE = ImageFacts(
    policy="squash", patch_size=14, pool_size=4, budgets=(256,), default_budget=256, resample="bilinear"
)
GEMMA4_IMAGE = ImageFacts(
    policy="aspect_patches",
    patch_size=16,
    pool_size=3,
    budgets=(70, 140, 280, 560, 1120),
    default_budget=280,
    resample="bicubic",
)
GEMMA3_PROMPT = PromptFacts(
    begin="<bos>",
    image=PlaceholderFacts(
        item="<start_of_image>",
        before="\n\n<start_of_image>",
        soft="<image_soft_token>",
        after="<end_of_image>\n\n",
    ),
)
GEMMA4_PROMPT = PromptFacts(
    begin="<bos>", image=PlaceholderFacts(item="<|image|>", before="<|image>", soft="<|image|>", after="<image|>")
)
# Special tokens and line breaks under their official ids (facts of the published tokenizers), and the words of these
# prompts under the ids that the recordings have for them.
LINES = {107: "\n", 108: "\n\n", 109: "\n\n\n"}
WORDS = {
    **{2364: "user", 4368: "model", 45518: "thought", 82858: "Describe", 672: "▁this", 2471: "▁image", 528: "▁in"},
    **{8052: "▁detail", 236761: ".", 2094: "This", 3831: "▁shows"},
}
BASE = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>"}
GEMMA3_SPECIAL = {
    **{105: "<start_of_turn>", 106: "<end_of_turn>", 255999: "<start_of_image>", 256000: "<end_of_image>"},
    262144: "<image_soft_token>",
}
GEMMA4_SPECIAL = {
    **{100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>"},
    **{255999: "<|image>", 258880: "<|image|>", 258882: "<image|>"},
}
# The larger models answer after an empty thought channel.
EMPTY_THOUGHT = GEMMA4_TEMPLATE.replace("'<|turn>model\\n'", "'<|turn>model\\n<|channel>thought\\n<channel|>'")


def official_tokenizer(special: dict[int, str]) -> Tokenizer:
    """A tokenizer that knows these prompts under the official ids: a token is a word or a run of line breaks."""
    every = {**BASE, **special, **LINES, **WORDS}
    tokenizer = Tokenizer(WordLevel({text: id for id, text in every.items()}, unk_token="<unk>"))
    tokenizer.normalizer = Replace(" ", "▁")
    tokenizer.pre_tokenizer = Split(Regex(r"▁?\w+|\n+|\."), "isolated")
    tokenizer.add_special_tokens([*BASE.values(), *special.values()])
    return tokenizer


def golden_prompt(golden: Golden) -> tuple[PromptBuilder, ImageFacts]:
    gemma3 = "gemma-3" in golden.model_id
    tokenizer = official_tokenizer(GEMMA3_SPECIAL if gemma3 else GEMMA4_SPECIAL)
    large = any(size in golden.model_id for size in ("26B", "31B"))
    template = GEMMA3_TEMPLATE if gemma3 else EMPTY_THOUGHT if large else GEMMA4_TEMPLATE
    builder = PromptBuilder(tokenizer, GEMMA3_PROMPT if gemma3 else GEMMA4_PROMPT, ChatTemplate(template))
    return builder, GEMMA3_IMAGE if gemma3 else GEMMA4_IMAGE


def test_there_are_six_recordings_of_one_photograph():
    assert {golden.model_id.removeprefix("google/").lower() for golden in GOLDENS.values()} == set(NAMES)
    assert len(NAMES) == 6
    assert {golden.photo.name for golden in GOLDENS.values()} == {"pipeline-cat-chonk.jpeg"}
    assert all(len(golden.first_token_top10) == 10 for golden in GOLDENS.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_photograph_becomes_as_many_soft_tokens_as_recorded(name):
    golden = GOLDENS[name]
    _, facts = golden_prompt(golden)
    pixels = load_image(golden.photo)
    assert pixels.shape == (*golden.image_size, 3)
    layout = POLICIES[facts.policy].layout(*golden.image_size, facts, None)
    longest = max(len(list(run)) for _, run in itertools.groupby(golden.input_ids))
    assert layout.soft_tokens == longest == (256 if facts is GEMMA3_IMAGE else 266)


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_recorded_one(name):
    """Control tokens, soft tokens, line breaks and text stand where the reference processor put them."""
    golden = GOLDENS[name]
    builder, facts = golden_prompt(golden)
    layout = POLICIES[facts.policy].layout(*golden.image_size, facts, None)
    parts = [Media(soft_tokens=layout.soft_tokens), Text(golden.prompt)]
    prompt = builder.chat([Message("user", parts)]) if golden.is_chat else builder.raw(parts)
    assert prompt.ids.tolist() == golden.prompt_ids
    [span] = prompt.spans
    soft = golden.prompt_ids[span.start]
    assert golden.prompt_ids.count(soft) == span.length
    assert golden.prompt_ids[span.start : span.start + span.length] == [soft] * span.length


# --- the comparison itself, on a model that is here


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def recorded(engine):
    """What the tiny model says about the photograph, in the form of a recording."""
    golden = dataclasses.replace(GOLDENS["gemma-4-e2b-it"], model_id="tiny-it")
    reply = engine.generate(golden.parts, max_tokens=8)
    ids = list(reply.prompt_token_ids)
    logits = engine.prompt_logits(golden.parts)[-1]
    best = np.argsort(-logits)[:10]
    # The greedy continuation is found step by step on the whole prompt, not by the loop that is compared.
    greedy: list[int] = []
    for _ in range(3):
        row = engine.prompt_logits([golden.parts[0]], prompt_ids=ids + greedy)[-1]
        greedy.append(int(np.argmax(row)))
    return dataclasses.replace(
        golden,
        input_ids=ids,
        first_token_top10=[(int(id), float(logits[id])) for id in best],
        greedy_ids=greedy,
    )


def test_the_comparison_accepts_what_was_recorded(engine, recorded):
    check_prompt(engine, recorded)
    check_logits(engine, recorded)
    check_greedy(engine, recorded)


def test_the_comparison_finds_every_kind_of_difference(engine, recorded):
    with pytest.raises(AssertionError):
        check_prompt(engine, dataclasses.replace(recorded, input_ids=recorded.input_ids[:-1]))
    top = recorded.first_token_top10
    spread = top[0][1] - top[-1][1]
    for wrong in ([top[1], top[0], *top[2:]], [*top[:-1], (top[-1][0], top[-1][1] - 0.2 * spread)]):
        with pytest.raises(AssertionError):
            check_logits(engine, dataclasses.replace(recorded, first_token_top10=wrong))
    greedy = recorded.greedy_ids
    with pytest.raises(AssertionError, match="instead of"):
        check_greedy(engine, dataclasses.replace(recorded, greedy_ids=[*greedy[:-1], greedy[-1] ^ 1]))


def test_the_recordings_are_explained():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for golden in GOLDENS.values():
        assert golden.model_id in text
