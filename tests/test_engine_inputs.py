"""What goes into a request: pictures in every form, budgets and counts, the order of parts, text that stays text."""

from __future__ import annotations

import base64
import inspect
import io

import numpy as np
import pytest
from PIL import Image as PillowImage
from tokenizers import Tokenizer

from siglance.engine import Engine, Image, Limits, Sampling, Text, Thought, ToolCall, Turn
from siglance.engine.errors import ImageError, InputError, PromptError

from .scripted import picture, scripted, with_manifest

GREEDY = Sampling(temperature=0)
SMALL = {"image_tokens": 70, "max_tokens": 6}


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny model with text and pictures."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def reader(tiny_model):
    """A tiny model with text only."""
    with Engine(tiny_model("gemma3").bundle, threads=1) as engine:
        yield engine


def vocabulary(engine: Engine) -> Tokenizer:
    """The tokenizer of a bundle, which parses control tokens."""
    return Tokenizer.from_file(str(engine.bundle.path("tokenizer")))


def silent(engine: Engine):
    """`scripted` with a model that ends its turn at once."""
    return scripted(engine, [engine.manifest.stop_ids[0]])


# --- pictures


def encoded(image: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(image).save(file, format)
    return file.getvalue()


def test_every_form_of_a_picture_is_the_same_picture(engine, tmp_path):
    image = picture()
    data = encoded(image)
    path = tmp_path / "a b ü.png"
    path.write_bytes(data)
    forms = [
        *(image, data, bytearray(data), memoryview(data), path, str(path), PillowImage.fromarray(image)),
        *(io.BytesIO(data), "data:image/png;base64," + base64.b64encode(data).decode(), Image(path), Image(data, 70)),
    ]
    seen = engine.encode(image, image_tokens=70)
    for form in forms:
        found = engine.encode(form, image_tokens=70)
        np.testing.assert_array_equal(found.soft_tokens, seen.soft_tokens)
        assert found.size == (60, 90)


@pytest.mark.parametrize(
    ("part", "is_picture"),
    [
        ("missing.png", True),
        ("My Photo.JPEG", True),
        ("data:image/png;base64,AAAA", True),
        ("what is in the photo?", False),
        ("notes.txt", False),
        ("two lines\nphoto.png", False),
        (Text("missing.png"), False),
        (Text("data:image/png;base64,AAAA"), False),
    ],
)
def test_a_plain_string_is_text_unless_it_names_a_picture(engine, part, is_picture):
    if is_picture:
        with pytest.raises(ImageError, match="image 1"):
            engine.count_tokens(part)
    else:
        assert engine.count_tokens(part)["image"] == 0


@pytest.mark.parametrize("part", [None, 7, 1.5, {"text": "x"}, object(), ["nested"]])
def test_other_parts_are_refused_with_index_and_type(engine, part):
    with pytest.raises(PromptError, match=rf"part 1 is of type {type(part).__name__}"):
        engine.count_tokens(["x", part])


def test_an_error_about_a_picture_names_it_and_shows_no_data(engine, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ImageError, match=r"image 2 \(page\.jpg\)"):
        engine.generate([picture(), tmp_path / "page.jpg", "x"])
    payload = base64.b64encode(b"secret text").decode()
    with pytest.raises(ImageError) as error:
        engine.generate([f"data:image/png;base64,{payload}", "x"])
    assert "image 1" in str(error.value)
    assert payload not in str(error.value)


def test_encode_once_and_ask_twice(engine):
    seen = engine.encode(picture(), image_tokens=70)
    double, runtime = silent(engine)
    for question in ("what?", "and where?"):
        image_each_time = engine.generate([picture(), question], sampling=GREEDY, cache=False, **SMALL)
        reused = engine.generate([seen, question], sampling=GREEDY, max_tokens=6, cache=False)
        assert reused.token_ids == image_each_time.token_ids
        assert reused.prompt_token_ids == image_each_time.prompt_token_ids
        assert reused.usage == image_each_time.usage
        double.generate([seen, question])
    assert runtime.encodes == 0


def test_an_encoded_picture_of_another_bundle_is_refused(tiny_model, engine):
    with Engine(tiny_model("gemma4", key_style="hub", dead_shared_kv=True, seed=3).bundle) as other:
        seen = other.encode(picture(), image_tokens=70)
    with pytest.raises(InputError, match="image 2 was encoded by another bundle"):
        engine.generate([picture(), seen, "what?"])


def test_encode_takes_a_picture(engine):
    with pytest.raises(InputError, match="not text"):
        engine.encode(Text("photo"))


@pytest.mark.parametrize("budget", [0, 71, -70, 10**6, 70.0, "70", True])
def test_a_budget_that_is_none_is_refused_with_the_ones_there_are(engine, budget):
    with pytest.raises(ImageError, match=r"image 1.*70, 140, 280, 560, 1120"):
        engine.count_tokens([Image(picture(), budget), "x"])
    with pytest.raises(ImageError, match=r"image.*70, 140, 280, 560, 1120"):
        engine.encode(picture(), image_tokens=budget)


def test_counts_are_known_before_anything_runs(engine, reader):
    """Count, usage and ids agree for every mixture of budgets; counting runs no graph."""

    class NoRuntime:
        def __getattr__(self, name):
            raise AssertionError(f"{name} of the runtime was used")

    counting, _ = silent(engine)
    counting._runtime = NoRuntime()
    soft = vocabulary(engine).token_to_id(engine.manifest.prompt.image.soft)
    for parts, budget in (
        (["hi"], None),
        ([picture(), "hi"], 70),
        ([Image(picture(), 140), "and", Image(picture(1, 40, 200), 70)], None),
        ([Image(picture(), 140), "and", picture(1, 200, 40)], 70),
    ):
        counts = counting.count_tokens(parts, image_tokens=budget)
        reply = engine.generate(parts, image_tokens=budget, max_tokens=1)
        images = sum(len(engine.encode(part, image_tokens=budget)) for part in parts if not isinstance(part, str))
        assert counts == {"total": len(reply.prompt_token_ids), **reply.usage.by_modality}
        assert counts["image"] == images
        assert reply.prompt_token_ids.count(soft) == images
        assert reply.usage.prompt_tokens == counts["total"] == counts["text"] + counts["image"]
    assert reader.count_tokens("hi")["image"] == 0


def test_parts_keep_their_order(engine):
    """Case 68: text and pictures stay where they are, and each picture's soft tokens land in its own rows."""
    one, two = picture(), picture(2, 120, 60)
    double, runtime = silent(engine)
    names = {
        float(double.encode(image, image_tokens=70).soft_tokens[0, 0]): name for image, name in ((one, "1"), (two, "2"))
    }
    assert len(names) == 2
    tokenizer, facts = vocabulary(engine), engine.manifest.prompt.image

    def shown(parts: list) -> str:
        """The prompt with each block of soft tokens as the number of its picture in brackets."""
        double.generate(parts, image_tokens=70)
        text, at = "", 0
        for block in runtime.soft:
            stop = block.start + len(block.values)
            assert set(runtime.ids[block.start : stop]) == {tokenizer.token_to_id(facts.soft)}
            text += tokenizer.decode(runtime.ids[at : block.start], skip_special_tokens=False)
            text += names[float(block.values[0, 0])]
            at = stop
        text += tokenizer.decode(runtime.ids[at:], skip_special_tokens=False)
        return text.replace(facts.before, "[").replace(facts.after, "]")

    for parts, expected in (
        (["before:", one, "after:", two, "end"], "before:[1]after:[2]end"),
        (["before:", two, "after:", one, "end"], "before:[2]after:[1]end"),
        ([one, "text"], "[1]text"),
        (["text", one], "text[1]"),
        ([one, one, "twice"], "[1][1]twice"),
        ([one], "[1]"),
    ):
        assert shown(parts) == f"<bos><|turn>user\n{expected}<turn|>\n<|turn>model\n"


def test_the_order_of_pictures_changes_the_answer(engine):
    one, two = picture(), picture(2)
    rows = [engine.prompt_logits([*pair, "x"], image_tokens=70)[-1] for pair in ((one, two), (two, one), (one, one))]
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    assert np.abs(rows[0] - rows[2]).max() > 1e-3


def test_pictures_in_several_turns(engine):
    """Case 53: all of them stay, in order, and each turn is a turn of the prompt."""
    turns = [
        Turn("system", "be brief"),
        Turn("user", [picture(), "a?"]),
        Turn("assistant", "b"),
        Turn("user", [picture(1), "c?"]),
        Turn("model", "d"),
        Turn("user", ("e?", picture(2))),
    ]
    double, runtime = silent(engine)
    reply = double.generate(turns, image_tokens=70)
    single = [double.encode(picture(index), image_tokens=70).soft_tokens for index in range(3)]
    for block, values in zip(runtime.soft, single, strict=True):
        np.testing.assert_array_equal(block.values, values)
    text = vocabulary(engine).decode(reply.prompt_token_ids, skip_special_tokens=True)
    assert text == "system\nbe brief\nuser\na?\nmodel\nb\nuser\nc?\nmodel\nd\nuser\ne?\nmodel\n"
    assert double.generate(turns[1:], system="be brief", image_tokens=70).prompt_token_ids == reply.prompt_token_ids


def test_a_picture_that_fails_in_a_later_turn_is_named_and_nothing_runs(engine):
    double, runtime = silent(engine)
    turns = [Turn("user", [picture(), "a?"]), Turn("assistant", "b"), Turn("user", [b"broken", "c?"])]
    with pytest.raises(ImageError, match="image 2"):
        double.generate(turns, image_tokens=70)
    assert (runtime.encodes, runtime.prefills) == (0, 0)


def test_parts_and_turns_do_not_mix(engine):
    with pytest.raises(PromptError, match="mixture"):
        engine.generate([Turn("user", "a"), "b"])


@pytest.mark.parametrize("call", ["generate", "count_tokens", "prompt_logits", "encode"])
def test_a_model_that_cannot_see(reader, call):
    """Case 73: never an answer that was made up."""
    argument = picture() if call == "encode" else [picture(), "what?"]
    with pytest.raises(InputError, match=r"no vision input.*modalities: text"):
        getattr(reader, call)(argument)


# --- prompts


CONTROL = [
    *("<bos>", "<eos>", "<pad>", "<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>", "<|channel>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
]


@pytest.mark.parametrize("spelling", CONTROL)
@pytest.mark.parametrize("name", ["engine", "reader"])
def test_control_tokens_in_text_are_text(request, name, spelling):
    """Case 21: neither whole, nor split over two parts, nor beside a picture, nor in a system or assistant turn."""
    engine = request.getfixturevalue(name)
    double, _ = silent(engine)
    tokenizer = vocabulary(engine)
    control = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def conversations(*texts: str) -> list:
        whole, pieces = Text("".join(texts)), [Text(text) for text in texts]
        turns = [Turn("system", whole), Turn("user", "x"), Turn("assistant", whole), Turn("user", "y")]
        beside = [[picture(), whole], [*pieces, picture()]] if engine.manifest.image is not None else []
        return [[whole], pieces, turns, *beside]

    for hostile, harmless in zip(conversations(spelling[:4], spelling[4:]), conversations("-", "-"), strict=True):
        found, expected = (double.generate(parts, image_tokens=70) for parts in (hostile, harmless))
        assert [id for id in found.prompt_token_ids if id in control] == [
            id for id in expected.prompt_token_ids if id in control
        ]
        assert spelling in tokenizer.decode(
            [id for id in found.prompt_token_ids if id not in control], skip_special_tokens=False
        )


@pytest.mark.parametrize(
    ("parts", "request_options"),
    [
        (["hello"], {}),
        (["hello"], {"system": "be brief"}),
        (["hello"], {"raw": True}),
        ([Text("<bos>hello")], {"raw": True}),
        ([Text("<bos>hello")], {}),
        ([], {"raw": True}),
        ([""], {"raw": True}),
        ([picture(), "hello"], {}),
    ],
)
def test_one_beginning_of_sequence(engine, parts, request_options):
    """Case 22: at index 0 and nowhere else."""
    begin = vocabulary(engine).token_to_id("<bos>")
    ids = silent(engine)[0].generate(parts, image_tokens=70, **request_options).prompt_token_ids
    assert ids[0] == begin
    assert begin not in ids[1:]


def test_a_bundle_without_a_template_is_always_raw(engine):
    files = {name: fact for name, fact in engine.manifest.files.items() if name != "chat_template"}
    expected = silent(engine)[0].generate("hello", raw=True).prompt_token_ids
    with with_manifest(engine, files=files) as base:
        for raw in (False, True):
            assert silent(base)[0].generate("hello", raw=raw).prompt_token_ids == expected


@pytest.mark.parametrize("part", ["data:image/png", Image("data:audio/wav;base64")])
def test_a_data_uri_without_a_payload_is_refused_by_its_number(engine, part):
    with pytest.raises(ImageError, match="image 2: a data URI needs a comma"):
        engine.generate([picture(), part, "what?"], **SMALL)


def test_closed_files_are_refused_by_their_number(engine):
    """A bare file object is first looked into, to learn whether it is a sound or a video."""
    closed = io.BytesIO(b"x")
    closed.close()
    for part in (closed, Image(closed)):
        with pytest.raises(ImageError, match=r"image 2: cannot read from the file object: .*closed"):
            engine.generate([picture(), part, "what?"], **SMALL)


def test_a_buffer_in_pieces_is_a_part(engine):
    buffer = io.BytesIO()
    PillowImage.fromarray(picture()).save(buffer, "PNG")
    pieces = memoryview(b"".join(bytes([byte, 0]) for byte in buffer.getvalue()))[::2]
    assert engine.count_tokens([pieces, "what?"]) == engine.count_tokens([picture(), "what?"])


@pytest.mark.parametrize("limits", [None, {"max_pixels": 9}, Limits])
def test_limits_of_another_type_are_refused_at_once(engine, limits):
    with pytest.raises(InputError, match=rf"limits is {type(limits).__name__}, expected Limits"):
        Engine(engine.bundle, limits=limits)


def test_help_shows_what_generate_returns():
    signature = inspect.signature(Engine.generate)
    assert signature.return_annotation == "Reply"
    assert signature.parameters == inspect.signature(Engine.stream).parameters


def test_prompt_ids_with_pictures(engine):
    """The ids of a prompt, given back with its pictures, are the same request."""
    parts = [picture(), "and", picture(1, 40, 200)]
    first = engine.generate(parts, sampling=GREEDY, cache=False, **SMALL)
    pictures = [parts[0], parts[2]]
    again = engine.generate(pictures, prompt_ids=first.prompt_token_ids, sampling=GREEDY, cache=False, **SMALL)
    assert (again.token_ids, again.prompt_token_ids) == (first.token_ids, first.prompt_token_ids)
    assert again.usage == first.usage
    assert engine.generate(
        pictures, prompt_ids=np.array(first.prompt_token_ids), sampling=GREEDY, **SMALL
    ).token_ids == (first.token_ids)
    with pytest.raises(PromptError, match="soft tokens"):
        engine.generate(pictures[::-1], prompt_ids=first.prompt_token_ids, **SMALL)
    with pytest.raises(PromptError, match="soft tokens"):
        engine.generate(pictures[:1], prompt_ids=first.prompt_token_ids, **SMALL)
    with pytest.raises(PromptError, match=r"runs of \[\] soft tokens"):
        engine.generate(pictures, prompt_ids=[2, 100, 101], **SMALL)
    for words, what in (("x", "text"), (Thought("x"), "a Thought"), (ToolCall("f", {}), "a ToolCall")):
        said = Turn("assistant", [*pictures, words])
        with pytest.raises(PromptError, match=f"cannot have {what} beside it"):
            engine.generate([said], prompt_ids=first.prompt_token_ids, **SMALL)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_prompt_chunks_do_not_change_the_answer(engine, chunk):
    reply = engine.generate([picture(), "what?"], sampling=GREEDY, **SMALL)
    chunked = engine.generate([picture(), "what?"], sampling=GREEDY, prefill_chunk=chunk, **SMALL)
    assert chunked.token_ids == reply.token_ids


def test_the_last_row_of_the_prompt_logits_gives_the_first_token(engine):
    rows = engine.prompt_logits([picture(), "what?"], image_tokens=70)
    reply = engine.generate([picture(), "what?"], sampling=GREEDY, **SMALL)
    assert rows.shape == (reply.usage.prompt_tokens, engine.runtime.vocabulary)
    assert rows.dtype == np.float32
    assert int(rows[-1].argmax()) == reply.token_ids[0]
