"""The prompt layout of PaliGemma: all media, the beginning-of-sequence token, the text, an end. No roles."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from siglance.engine import Bundle, Engine, Text, Turn
from siglance.engine.boxes import TEXT_TOKENS
from siglance.engine.bundle import demo_folder
from siglance.engine.errors import BundleError, PromptError
from siglance.engine.manifest import PlaceholderFacts, PromptFacts, read_manifest
from siglance.engine.prompt import Media, Message, PromptBuilder, Span
from siglance.engine.text import TextStream, load_tokenizer, special_ids

from .scripted import picture, scripted
from .toy_tokenizer import GEMMA4_SPECIAL, LOCATIONS, toy_tokenizer

# The toy tokenizer has no "<image>"; any special token can stand for a picture.
SOFT = "<|image|>"
FACTS = PromptFacts(
    begin="<bos>", layout="media_first", end="\n", image=PlaceholderFacts(item=SOFT, before="", soft=SOFT, after="")
)


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    """A tokenizer.json that marks the location tokens special, as the files of some repositories do."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    toy_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(toy_file):
    """As an engine of a "loc" bundle loads it."""
    return load_tokenizer(toy_file, TEXT_TOKENS["loc"])


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return PromptBuilder(tokenizer, FACTS, None)


def ask(prompts, *parts):
    return prompts.chat([Message("user", [Text(part) if isinstance(part, str) else part for part in parts])])


def encode(text: str) -> list[int]:
    """The ids of a text on a tokenizer that parses control tokens, like the reference processor."""
    return toy_tokenizer().encode(text, add_special_tokens=False).ids


def image(soft_tokens=4):
    return Media(soft_tokens=soft_tokens)


# --- the layout


def test_the_layout_is_media_begin_text_end(prompts):
    prompt = ask(prompts, image(), "what is this")
    assert prompt.text == SOFT * 4 + "<bos>what is this\n"
    assert prompt.ids.tolist() == encode(prompt.text)
    assert prompt.spans == (Span(0, 4, 0),)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("what", image(2), image(3)), "what"),
        ((image(2), "what", image(3)), "what"),
        ((image(2), image(3), "what"), "what"),
        (("compare", image(2), "with", image(3)), "compare with"),
        (("compare ", image(2), "with", image(3)), "compare with"),
        (("compare", image(2), "\nwith", image(3)), "compare\nwith"),
        (("compare", image(2), "", image(3), "with"), "compare with"),
        (("com", "pare", image(2), image(3)), "compare"),
        ((image(2), image(3)), ""),
    ],
)
def test_all_media_come_first_and_words_stay_apart(prompts, parts, text):
    prompt = ask(prompts, *parts)
    assert prompt.text == SOFT * 5 + f"<bos>{text}\n"
    assert prompt.spans == (Span(0, 2, 0), Span(2, 3, 1))


def test_text_and_end_are_encoded_as_one_string(prompts):
    """The reference processor builds the string first: a line break of the user merges with the last one."""
    assert ask(prompts, image(), "what\n").ids.tolist() == encode(SOFT * 4 + "<bos>what\n\n")
    assert ask(prompts, image(), "what ").ids.tolist() == encode(SOFT * 4 + "<bos>what \n")


def test_without_media_the_text_is_asked_alone(prompts):
    assert ask(prompts, "what").text == "<bos>what\n"


def test_raw_is_the_text_as_it_stands(prompts):
    assert prompts.raw([image(), Text("what")]).text == SOFT * 4 + "<bos>what"
    assert prompts.raw([Text("what"), image(), Text("is")]).text == SOFT * 4 + "<bos>what is"
    assert prompts.raw([]).text == "<bos>"
    assert prompts.raw([image()]).ids.tolist() == encode(SOFT * 4 + "<bos>")


# --- laws

spellings = st.sampled_from([*GEMMA4_SPECIAL, *LOCATIONS, "<", "<|im", "age|>", "\n", " ", "hello", "\ue000", "\ue001"])


@given(st.lists(spellings | st.integers(1, 3), max_size=8))
def test_text_never_becomes_control_tokens_and_there_is_one_beginning(prompts, tokenizer, items):
    parts = [image(item) if isinstance(item, int) else item for item in items]
    if not any(isinstance(part, Media) or part.strip() for part in parts):
        parts.append("x")
    prompt = ask(prompts, *parts)
    soft = [part.soft_tokens for part in parts if isinstance(part, Media)]
    names = [tokenizer.id_to_token(int(id)) for id in prompt.ids]
    special = special_ids(tokenizer)
    assert names[: sum(soft) + 1] == [SOFT] * sum(soft) + ["<bos>"]
    assert not special.intersection(prompt.ids[sum(soft) + 1 :].tolist())
    assert [span.length for span in prompt.spans] == soft
    assert prompt.text.endswith("\n")


@pytest.mark.parametrize("token", LOCATIONS)
def test_locations_in_user_text_are_tokens(prompts, tokenizer, token):
    """`segment` and `detect` prompts may hold boxes; PaliGemmaProcessor adds these tokens without the special flag."""
    prompt = ask(prompts, image(), f"segment {token}{token} cat")
    assert prompt.ids.tolist().count(tokenizer.token_to_id(token)) == 2


def test_locations_of_a_reply_are_text(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in (*LOCATIONS, "hello", "<eos>")]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.finish() == "".join(LOCATIONS) + "hello"


def test_locations_that_are_only_in_the_vocabulary_are_tokens_too(toy_file, tmp_path):
    """Published tokenizers may leave it to the processor to add them."""
    facts = json.loads(toy_file.read_text())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] not in LOCATIONS]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(facts))
    text = "".join(LOCATIONS) + "<loc0100><loc1024>"  # the toy has neither of the last two
    expected = [toy_tokenizer().token_to_id(token) for token in LOCATIONS]
    assert load_tokenizer(path).encode(text, add_special_tokens=False).ids[:3] != expected
    loaded = load_tokenizer(path, TEXT_TOKENS["loc"])
    ids = loaded.encode(text, add_special_tokens=False).ids
    assert ids[:3] == expected
    assert loaded.get_vocab_size() == toy_tokenizer().get_vocab_size()
    stream = TextStream(loaded)
    assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_other_bundles_read_the_flag_of_the_tokenizer(toy_file):
    plain = load_tokenizer(toy_file)
    assert {plain.token_to_id(token) for token in LOCATIONS} <= special_ids(plain)
    assert special_ids(plain) > special_ids(load_tokenizer(toy_file, TEXT_TOKENS["loc"]))


# --- no roles


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([Message("system", "be brief"), Message("user", "what")], "no roles.*not system, user"),
        ([Message("user", "what"), Message("user", "where")], "no roles.*not user, user"),
        ([Message("user", "a"), Message("assistant", "b"), Message("user", "c")], "no roles.*user, assistant, user"),
        ([Message("system", "be brief")], "no roles.*not system"),
        ([Message("assistant", "hm")], "ends with the assistant"),
        ([Message("user", "  ")], "needs text or a medium"),
        ([], "no messages"),
    ],
)
def test_turns_and_system_texts_are_refused(prompts, messages, message):
    with pytest.raises(PromptError, match=message):
        prompts.chat(messages)


def test_crops_are_refused(prompts):
    with pytest.raises(PromptError, match=r"no such crops.*\[4, 4\]"):
        ask(prompts, Media(soft_tokens=4, crops=(4, 4)))


# --- in an engine


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A model that has the layout in its manifest."""
    bundle = tiny_model("gemma4").bundle
    files = {name: fact for name, fact in bundle.manifest.files.items() if name != "chat_template"}
    manifest = dataclasses.replace(bundle.manifest, prompt=FACTS, files=files)
    with Engine(Bundle(bundle.folder, manifest), threads=1) as engine:
        yield engine


def run(engine, *arguments, **options):
    double, runtime = scripted(engine, [engine.manifest.stop_ids[0]])
    reply = double.generate(*arguments, **options)
    assert runtime.ids == list(reply.prompt_token_ids)
    return reply, runtime


def names_of(engine, reply):
    tokenizer = Tokenizer.from_file(str(engine.bundle.path("tokenizer")))
    return [tokenizer.id_to_token(id) for id in reply.prompt_token_ids]


def test_an_engine_puts_soft_tokens_in_front(engine):
    first, second = (engine.encode(picture(index), image_tokens=70) for index in range(2))
    reply, runtime = run(engine, ["what", first, second])
    counts = [len(first), len(second)]
    names = names_of(engine, reply)
    assert names[: sum(counts) + 1] == [SOFT] * sum(counts) + ["<bos>"]
    assert names[-1] == "\n"
    assert [soft.start for soft in runtime.soft] == [0, counts[0]]
    for soft, seen in zip(runtime.soft, (first, second), strict=True):
        np.testing.assert_array_equal(soft.values, seen.soft_tokens)
    assert reply.usage.by_modality == {"text": len(names) - sum(counts), "image": sum(counts)}
    assert engine.count_tokens(["what", first, second])["total"] == len(names)


def test_raw_has_no_end_in_an_engine_too(engine):
    assert names_of(engine, run(engine, ["hello", picture()], image_tokens=70, raw=True)[0])[-1] == "hello"


def test_prompt_ids_with_two_pictures_side_by_side_are_one_run(engine):
    pictures = [engine.encode(picture(index), image_tokens=70) for index in range(2)]
    ids = run(engine, [*pictures, "what"])[0].prompt_token_ids
    reply, runtime = run(engine, pictures, prompt_ids=ids)
    assert reply.prompt_token_ids == ids
    assert [(soft.start, len(soft.values)) for soft in runtime.soft] == [
        (0, len(pictures[0])),
        (len(pictures[0]), len(pictures[1])),
    ]
    for wrong in (pictures[:1], [], [*pictures, pictures[0]], [picture(0, 10, 900), pictures[1]]):
        with pytest.raises(PromptError, match=r"runs of \[\d+\] soft tokens, the pictures give"):
            run(engine, wrong, prompt_ids=ids)


@pytest.mark.parametrize("raw", [False, True])
def test_an_engine_refuses_turns(engine, raw):
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    with pytest.raises(PromptError, match="no roles"):
        engine.count_tokens(turns, raw=raw)
    with pytest.raises(PromptError, match="no roles"):
        engine.count_tokens("a", system="b", raw=raw)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_raw_prompts_of_chat_models_have_no_roles_either(tiny_model, family):
    """A completion would drop the roles silently."""
    with Engine(tiny_model(family).bundle, threads=1) as chatty:
        assert chatty.count_tokens("a", system="b")["total"] > chatty.count_tokens("a")["total"]
        for conversation, system in (
            ("a", "b"),
            ([Turn("user", "a"), Turn("user", "b")], None),
            (Turn("model", "a"), None),
        ):
            with pytest.raises(PromptError, match="one user message and no system text"):
                chatty.count_tokens(conversation, system=system, raw=True)
        assert chatty.count_tokens(Turn("user", "a"), raw=True) == chatty.count_tokens("a", raw=True)


# --- the manifest


@pytest.mark.parametrize(
    ("prompt", "requires", "message"),
    [
        ({"layout": "media_last"}, [], "'prompt.layout' is 'media_last', expected 'inline' or 'media_first'"),
        ({"layout": "media_first"}, [], "'prompt:media_first' to follow the layout 'media_first'"),
        ({}, ["prompt:media_first"], "'prompt:media_first' to follow the layout 'inline'"),
        ({"end": "\n"}, [], "'prompt.end' is '\\\\n', expected \"\""),
        ({"layout": "media_first"}, ["prompt:media_first"], "no chat template with the layout 'media_first'"),
    ],
)
def test_layouts_that_a_manifest_cannot_have(prompt, requires, message):
    facts = json.loads((demo_folder() / "siglance.json").read_text())
    facts["prompt"] |= prompt
    facts["requires"] += requires
    with pytest.raises(BundleError, match=message):
        read_manifest(json.dumps(facts))


def test_a_manifest_of_the_layout():
    facts = json.loads((demo_folder() / "siglance.json").read_text())
    facts["prompt"] |= {"layout": "media_first", "end": "\n"}
    facts["requires"].append("prompt:media_first")
    del facts["files"]["chat_template"]
    prompt = read_manifest(json.dumps(facts)).prompt
    assert (prompt.layout, prompt.end) == ("media_first", "\n")
