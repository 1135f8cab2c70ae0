"""The demo model's world: scenes, the questions about them, the tokenizer, the chat template and the scoring."""

import json
from itertools import combinations, pairwise

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.export.demo import architecture, evaluate, tasks, tokenizer
from siglance.export.demo.images import patches
from siglance.export.demo.scenes import (
    COLOURS,
    LABELS,
    SIGN_WORDS,
    TOP_SEPARATION,
    Scene,
    generator,
    normalised,
    scene,
)

SCENES = [scene(index) for index in range(40)]
QUESTIONS = ("describe", "count", "read", "detect all", "detect red circle", "count blue square")


def test_a_seed_always_gives_the_same_scene() -> None:
    one, other = scene(11), scene(11)
    assert one.objects == other.objects
    assert one.sign == other.sign
    assert one.image.tobytes() == other.image.tobytes()


def test_training_and_held_out_scenes_differ() -> None:
    assert scene(generator("train", 5)).image.tobytes() != scene(generator("held-out", 5)).image.tobytes()


def test_a_scene_can_be_drawn_at_a_given_size() -> None:
    assert scene(3, size=(640, 480)).image.size == (640, 480)


@pytest.mark.parametrize("seen", SCENES)
def test_things_lie_inside_apart_and_at_heights_of_their_own(seen: Scene) -> None:
    width, height = seen.image.size
    boxes = [thing.box for thing in seen.objects] + ([seen.sign.box] if seen.sign else [])
    assert len(seen.objects) >= 1
    assert all(0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height for x1, y1, x2, y2 in boxes)
    for one, other in combinations(boxes, 2):
        assert evaluate.overlap(one, other) == 0
    tops = [thing.box[1] / height for thing in seen.objects]
    assert all(later - earlier >= TOP_SEPARATION for earlier, later in pairwise(tops))


@pytest.mark.parametrize("index", range(20))
def test_the_colour_of_a_thing_is_painted_where_its_box_is(index: int) -> None:
    seen = scene(index)
    for thing in seen.objects:
        x1, y1, x2, y2 = thing.box
        colour = np.array(seen.image.getpixel((int((x1 + x2) / 2), int(y1 + 0.6 * (y2 - y1)))))
        assert np.abs(colour - np.array(COLOURS[thing.colour])).max() <= 15


def test_answers_agree_with_each_other() -> None:
    for seen in SCENES:
        boxes = json.loads(tasks.answer(seen, "detect all"))
        assert tasks.answer(seen, "count") == str(len(boxes))
        assert [box["label"] for box in boxes] == [thing.label for thing in seen.objects]
        assert boxes == sorted(boxes, key=lambda box: box["box_2d"][0])
        described = tasks.answer(seen, "describe")
        assert all(box["label"] in described for box in boxes)
        assert ("sign" in described) == (tasks.answer(seen, "read") in SIGN_WORDS)
        for label in LABELS:
            picked = [box for box in boxes if box["label"] == label]
            assert json.loads(tasks.answer(seen, f"detect {label}")) == picked
            assert tasks.answer(seen, f"count {label}") == str(len(picked))


def test_questions_outside_the_world_are_refused() -> None:
    for question in ("detect pink circle", "count stars", "what is this?"):
        with pytest.raises(KeyError):
            tasks.answer(SCENES[0], question)


def test_special_tokens_have_the_published_ids_where_they_fit() -> None:
    built = tokenizer.build()
    published = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<|tool>": 46, "<tool|>": 47}
    published |= {"<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51}
    published |= {'<|"|>': 52, "<|think|>": 98, "<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106}
    for token, number in (published | {"\n": 107, "\n\n": 108}).items():
        assert built.encode(token, add_special_tokens=False).ids == [number]
    assert sorted(built.get_vocab().values()) == list(range(tokenizer.VOCABULARY_SIZE))


def test_each_coordinate_is_one_token_and_they_are_in_order() -> None:
    ids = [tokenizer.encode(number) for number in tokenizer.COORDINATES]
    assert ids == [[tokenizer.first_coordinate_id() + step] for step in range(len(ids))]


@pytest.mark.parametrize("seen", SCENES[:20])
def test_replies_use_few_tokens(seen: Scene) -> None:
    """Eleven tokens for each box and one to close; none of the pieces falls apart into characters."""
    reply = tasks.answer(seen, "detect all")
    assert len(tokenizer.encode(reply)) == 11 * len(seen.objects) + 1
    if seen.sign:
        assert len(tokenizer.encode(seen.sign.text)) == 1


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=tokenizer.SPACE)))
def test_any_text_survives_a_round_trip(text: str) -> None:
    built = tokenizer.shared()
    built.encode_special_tokens = True
    try:
        assert built.decode(built.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text
    finally:
        built.encode_special_tokens = False


def render(messages: list[dict], **options: object) -> str:
    template = jinja2.Environment().from_string(tokenizer.CHAT_TEMPLATE)
    return template.render(messages=messages, bos_token="<bos>", **options)


@pytest.mark.parametrize("question", QUESTIONS)
def test_training_prompts_are_what_the_template_renders(question: str) -> None:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    rendered = render([{"role": "user", "content": content}], add_generation_prompt=True)
    prefix, branch = tokenizer.prompt_parts(question, 36)
    expanded = tokenizer.expand_images(rendered, [36])
    assert expanded == prefix + branch
    assert tokenizer.encode(expanded) == tokenizer.encode(prefix) + tokenizer.encode(branch)


def test_the_template_renders_turns_and_every_kind_of_part() -> None:
    messages = [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": [{"type": "audio"}, {"type": "video"}, {"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and now?"},
    ]
    assert render(messages) == (
        "<bos><|turn>system\nbe brief<turn|>\n<|turn>user\n<|audio|><|video|>hi<turn|>\n"
        "<|turn>model\n4<turn|>\n<|turn>user\nand now?<turn|>\n"
    )


@pytest.mark.parametrize("budget", architecture.BUDGETS)
@pytest.mark.parametrize("size", [(640, 480), (192, 512), (48, 48), (3000, 20)])
def test_patches_follow_the_resizing_rule(budget: int, size: tuple[int, int]) -> None:
    pixels, (rows, columns) = patches(scene(1).image.resize(size), budget)
    assert pixels.shape == (rows * columns, 768)
    assert rows % 3 == 0
    assert columns % 3 == 0
    assert 1 <= rows * columns // 9 <= budget
    assert max(rows, columns) <= architecture.VISION_CONFIG["position_embedding_size"]


def perfect(asked: list[evaluate.Question]) -> list[str]:
    return [tasks.answer(question.scene, question.text) for question in asked]


def test_right_answers_score_full_marks() -> None:
    asked = evaluate.questions(25)
    report = evaluate.score(asked, perfect(asked))
    assert set(report.exact.values()) == {1.0}
    assert set(report.recall) == set(architecture.BUDGETS)
    assert {*report.recall.values(), *report.precision.values(), *report.small_recall.values()} == {1.0}
    assert json.loads(report.to_json())["objects"] == report.objects
    assert "detect all" in str(report)


def test_wrong_answers_score_nothing() -> None:
    asked = evaluate.questions(10)
    report = evaluate.score(asked, ["I see a cat"] * len(asked))
    assert set(report.exact.values()) == {0.0}
    assert set(report.recall.values()) == {0.0}


def test_a_box_counts_for_one_object_only_and_needs_the_right_label() -> None:
    seen = next(each for each in SCENES if len(each.objects) > 1)
    thing = seen.objects[0]
    box = list(normalised(thing.box, seen.image.size))
    right, wrong = json.dumps([{"box_2d": box, "label": thing.label}]), json.dumps([{"box_2d": box, "label": "cat"}])
    assert evaluate.found(seen, right) == [True] + [False] * (len(seen.objects) - 1)
    assert not any(evaluate.found(seen, wrong))
    assert not any(evaluate.found(seen, '[{"box_2d": [1, 2], "label": "red circle"}]'))
