"""Requests that go on from earlier ones answer like requests that do not. Case numbers are public bug reports.

Conversations are asked twice: by an engine that has answered others before, and without its caches. Token ids must be
equal and logits within 1e-3, whatever was swapped, repeated, re-encoded or evicted in between.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from siglance.engine import Engine, Image, Pdf, Sampling, Text, Turn, media, pdf
from siglance.engine.errors import ContextFull, ImageError, InputError
from siglance.engine.sampling import Sampler
from siglance.engine.self_test import formula_picture
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from .pdf_files import numbered_pages
from .scripted import with_manifest
from .test_pan_and_scan import CROPS

TOLERANCE = 1e-3
GREEDY = Sampling(temperature=0, seed=0)


# --- cold = warm


def pixels(index: int, height: int, width: int) -> np.ndarray:
    """Pixels that come out of a JPEG file, so that the file and lossless ones agree."""
    drawn = np.roll(formula_picture(height, width), (7 * index, 11 * index), axis=(0, 1)) // (index % 3 + 1)
    return np.asarray(PIL.Image.open(io.BytesIO(jpeg(drawn))))


def jpeg(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "JPEG", quality=90)
    return file.getvalue()


def lossless(array: np.ndarray, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


FORMS = {
    "array": lambda array: array,
    "image": PIL.Image.fromarray,
    "png": lambda array: lossless(array, "PNG"),
    "packed png": lambda array: lossless(array, "PNG", compress_level=9, optimize=True),
    "bmp": lambda array: lossless(array, "BMP"),
    "webp": lambda array: lossless(array, "WEBP", lossless=True),
    "file": lambda array: io.BytesIO(lossless(array, "TIFF")),
    "data URI": lambda array: "data:image/png;base64," + base64.b64encode(lossless(array, "PNG")).decode(),
}


class Script:
    """Random conversations of one engine's pictures, with replies as they come."""

    def __init__(self, engine: Engine, seed: int, sizes: int = 200):
        self._random = np.random.default_rng(seed)
        facts = engine.manifest.image
        self._budgets = [None, *(facts.budgets[:2] if facts else ())]
        shapes = [(60, 90), (90, 60), (sizes, 2 * sizes)]
        self._pixels = [pixels(index, *shapes[index % 3]) for index in range(6)] if facts else []
        self._questions = ["what is this?", "and the red one?", "describe", "count", "The cat and the dog\n\nagain"]

    def _pick(self, items):
        return items[self._random.integers(len(items))]

    def _picture(self) -> tuple[int, int | None]:
        return int(self._random.integers(len(self._pixels))), self._pick(self._budgets)

    def _turn(self) -> list:
        count = self._random.choice([0, 1, 1, 2]) if self._pixels else 0
        pictures = [self._picture() for _ in range(count)]
        texts = [f"{self._pick(self._questions)} {self._random.integers(3)}"]
        return [*pictures, *texts] if self._random.random() < 0.7 else [*texts, *pictures]

    def _form(self, part):
        """A picture in one of many forms, newly made each time."""
        if isinstance(part, str):
            return Text(part)
        forms = [name for name in FORMS if name != "file"]  # which is read only once
        return Image(FORMS[self._pick(forms)](self._pixels[part[0]]), part[1])

    def requests(self) -> Iterator[list[Turn]]:
        """The growing conversation. Send the reply's text to each request."""
        turns: list[list] = []
        replies: list[str] = []
        for _ in range(self._random.integers(1, 4)):
            turns.append(self._turn())
            if self._random.random() < 0.3:  # another picture, budget or question in an earlier turn
                turn = turns[self._random.integers(len(turns))]
                place = self._random.integers(len(turn))
                turn[place] = self._pick(self._questions) if isinstance(turn[place], str) else self._picture()
            conversation = []
            for index, turn in enumerate(turns):
                conversation.append(Turn("user", [self._form(part) for part in turn]))
                conversation += [Turn("assistant", Text(reply)) for reply in replies[index : index + 1]]
            replies.append((yield conversation))


@contextlib.contextmanager
def recorded() -> Iterator[list[np.ndarray]]:
    """All rows of logits that are sampled from."""
    rows = []
    sample = Sampler.__call__

    def record(self, logits, mask=None):
        rows.append(logits.copy())
        return sample(self, logits, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", record)
        yield rows


def ask(engine: Engine, conversation, **options) -> tuple:
    with recorded() as rows:
        reply = engine.generate(conversation, sampling=GREEDY, **options)
    return reply, np.stack(rows)


def compare(engine: Engine, conversations: int, seed: int, **options) -> tuple[float, float, int, int]:
    """Largest difference of logits, share of prompt tokens that did not run, requests, and those beyond the windows."""
    largest, cached, total, count, beyond = 0.0, 0, 0, 0, 0
    for index in range(conversations):
        script = Script(engine, seed + index)
        requests = script.requests()
        conversation = next(requests)
        with contextlib.suppress(StopIteration, ContextFull):
            while True:
                warm, warm_logits = ask(engine, conversation, **options)
                cold, cold_logits = ask(engine, conversation, cache=False, **options)
                assert warm.token_ids == cold.token_ids
                assert warm.prompt_token_ids == cold.prompt_token_ids
                assert cold.usage.cached_tokens == 0
                largest = max(largest, float(np.abs(warm_logits - cold_logits).max()))
                cached, total = cached + warm.usage.cached_tokens, total + warm.usage.prompt_tokens
                count += 1
                beyond += engine.runtime.session().evicts(warm.usage.prompt_tokens)
                conversation = requests.send(warm.text)
    return largest, cached / total, count, beyond


MODELS = {
    "gemma4": {},  # windows of 8, layers that share keys and values, logits of the last row only
    "gemma3": {},  # windows of 8 in buffers of 24, text only
    "gemma3_vision": {},  # pictures that see themselves
    "gemma4_dense": {},
    "gemma4_unified": {},
}


@pytest.fixture(scope="module", params=MODELS)
def engine(request, tiny_model):
    with Engine(tiny_model(request.param, **MODELS[request.param]).bundle, threads=1) as engine:
        yield engine


def test_cold_equals_warm(engine):
    """Case 35."""
    largest, cached, _, _ = compare(engine, 12, seed=100, max_tokens=5)
    assert largest <= TOLERANCE
    assert cached > 0.15, "hardly anything was reused, so this says nothing"


@pytest.fixture(scope="module")
def demo():
    with Engine.open("demo", threads=1) as engine:
        yield engine


def test_cold_equals_warm_on_the_demo(demo):
    largest, cached, _, beyond = compare(demo, 6, seed=0, max_tokens=24)
    assert largest <= TOLERANCE
    assert cached > 0.3
    assert beyond > 3


@pytest.mark.load
def test_cold_equals_warm_in_200_conversations(demo):
    """The figure: 200 conversations on the demo, beyond its windows of 64 rows, with budgets of 9, 16 and 36."""
    largest, cached, count, beyond = compare(demo, 200, seed=1000, max_tokens=24)
    print(
        f"\n{count} requests of 200 conversations, {beyond} of them beyond the windows: "
        f"logits within {largest:.1e}, {cached:.0%} of prompt tokens reused"
    )
    assert largest <= TOLERANCE
    assert cached > 0.3
    assert beyond > 100


ROUGH = {"gemma4": "int4", "gemma3": "int4", "gemma3_vision": "int8"}


@pytest.fixture(scope="module", params=ROUGH)
def rough(request, tiny_model, tmp_path_factory):
    """Models in blocks of few bits. Their activations are rounded too: a bit of difference grows to a word."""
    folder = tmp_path_factory.mktemp("rough") / "bundle"
    export(tiny_model(request.param).checkpoint, folder, ExportOptions(precision=ROUGH[request.param]))
    with Engine.open(folder, threads=1) as engine:
        yield engine


def test_cold_equals_warm_bit_for_bit_where_rounding_grows(rough):
    largest, cached, _, _ = compare(rough, 12, seed=300, max_tokens=5)
    assert largest == 0
    assert cached > 0.1
    # Where rows end that ran before is no place to go on from. Whether the logits would differ is up to the kernels of
    # the machine: some round one row as they round many.
    rough._reuse.clear()
    anywhere = copy.copy(rough)
    anywhere._reuse = dataclasses.replace(rough._reuse, exact=False)
    ids = [2, *range(300, 340)]
    for asked, reused in ((anywhere, len(ids) - 1), (rough, 0)):
        ask(asked, [], prompt_ids=ids[:-1], max_tokens=1)
        reply, _ = ask(asked, [], prompt_ids=ids, max_tokens=1)
        assert reply.usage.cached_tokens == reused
        rough._reuse.clear()


def test_the_same_seed_gives_the_same_reply_whatever_ran_between(rough):
    """With the caches and rounding that grows."""
    pictures = [pixels(index, 60, 90) for index in range(2)] if rough.manifest.image else ["left", "right"]
    requests = [
        ([picture, Text(f"{start} {end}")], seed)
        for seed, (picture, start, end) in enumerate(
            itertools.product(pictures, ("what is it?", "and the cat?"), ("", "again", "The red one"))
        )
    ]

    def answer(number: int, **options) -> tuple[int, ...]:
        parts, seed = requests[number]
        sampling = Sampling(temperature=1.2, seed=seed)
        return rough.generate(parts, sampling=sampling, max_tokens=6, **options).token_ids

    alone = [answer(number, cache=False) for number in range(len(requests))]
    order = np.random.default_rng(0).integers(0, len(requests), 3 * len(requests))
    assert [answer(number) for number in order] == [alone[number] for number in order]


def test_a_chat_is_its_turns_bit_for_bit(rough):
    chat = rough.chat(sampling=Sampling(temperature=1, seed=1), max_tokens=6)
    cached = 0
    for turn in ([RED, "what?"] if rough.manifest.image else "what?", "and the cat?", "the dog?", "and?"):
        asked = [*chat.history, Turn("user", turn)]
        reply = chat.send(turn)
        whole = rough.generate(asked, sampling=Sampling(temperature=1, seed=1), max_tokens=6, cache=False)
        assert reply.token_ids == whole.token_ids
        cached = reply.usage.cached_tokens
    assert cached > 0.5 * reply.usage.prompt_tokens


def test_threads_get_cold_answers(tiny_model):
    """Case 64, with conversations that share their beginnings."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        first = pixels(0, 60, 90)
        asked = [[Image(first, 70), Text(f"what {'and ' * (index % 3)}is it {index % 5}")] for index in range(40)]
        cold = [engine.generate(parts, sampling=GREEDY, max_tokens=5, cache=False).token_ids for parts in asked]
        with ThreadPoolExecutor(8) as pool:
            warm = list(pool.map(lambda parts: engine.generate(parts, sampling=GREEDY, max_tokens=5), asked))
        assert [reply.token_ids for reply in warm] == cold
        assert sum(reply.usage.cached_tokens for reply in warm) > 0


# --- what is reused


@pytest.fixture
def fresh(tiny_model):
    """A model whose windows are shorter than any prompt, with nothing cached."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


@pytest.fixture
def wide(tiny_model):
    """A model whose buffers never evict, with nothing cached."""
    with Engine(tiny_model("gemma3_vision").bundle, threads=1) as engine:
        yield engine


def small(engine: Engine, conversation, **options):
    budget = 70 if 70 in engine.manifest.image.budgets else None
    return engine.generate(conversation, **{"sampling": GREEDY, "max_tokens": 4, "image_tokens": budget} | options)


def square(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((90, 90, 3), colour, np.uint8)


RED, BLUE = square((250, 10, 10)), square((10, 10, 250))


def picture_end(reply, engine: Engine) -> int:
    soft = engine._preprocessor._prompts._control[engine.manifest.prompt.image.soft]
    return max(row for row, id in enumerate(reply.prompt_token_ids) if id == soft) + 1


def test_red_blue_red(demo, fresh, wide):
    """Case 35: one text, three times two pictures."""
    for engine, budget in ((demo, 16), (fresh, 70), (wide, 9)):
        engine._reuse.clear()
        cold = [small(engine, [picture, "what?"], cache=False, image_tokens=budget) for picture in (RED, BLUE)]
        assert cold[0].prompt_token_ids == cold[1].prompt_token_ids
        first = picture_end(cold[0], engine) - cold[0].usage.by_modality["image"]
        for turn, picture in enumerate((RED, BLUE, RED, BLUE, RED)):
            reply = small(engine, [picture, "what?"], image_tokens=budget)
            assert reply.token_ids == cold[turn % 2].token_ids
            if turn == 1:
                assert reply.usage.cached_tokens <= first
            if turn > 1:
                assert reply.usage.cached_tokens >= picture_end(reply, engine)


def test_the_same_pixels_from_another_file(fresh):
    source = pixels(2, 60, 90)
    small(fresh, [source, "what?"])
    for name, form in FORMS.items():
        reply = small(fresh, [Image(form(source)), f"where is the {name}?"])
        assert reply.usage.cached_tokens == picture_end(reply, fresh)
        assert reply.timings.vision == 0
    again = small(fresh, [Image(lossless(source, "JPEG", quality=60)), "what?"])
    assert again.usage.cached_tokens < 10  # other pixels


def test_the_file_that_jpeg_pixels_came_from(fresh):
    drawn = formula_picture(60, 90)
    file = jpeg(drawn)
    small(fresh, [file, "what?"])
    reply = small(fresh, [np.asarray(PIL.Image.open(io.BytesIO(file))), "what else?"])
    assert reply.usage.cached_tokens == picture_end(reply, fresh)


def test_another_budget_is_another_picture(demo):
    demo._reuse.clear()
    source = pixels(1, 300, 300)
    small(demo, [Image(source, 9), "describe"])
    reply = small(demo, [Image(source, 16), "describe"])
    assert reply.usage.cached_tokens <= 5
    assert reply.timings.vision > 0
    again = small(demo, [Image(source, 9), "count"])
    assert again.usage.cached_tokens >= picture_end(again, demo)


def test_budgets_that_mean_the_same_are_the_same(demo):
    """A small picture may have one layout under two budgets."""
    demo._reuse.clear()
    source = pixels(1, 40, 480)
    first = small(demo, [Image(source, 9), "describe"])
    second = small(demo, [Image(source, None), "describe"], image_tokens=9)
    assert second.usage.cached_tokens == first.usage.prompt_tokens - 1


def test_an_encoded_picture_is_its_file(fresh):
    seen = fresh.encode(RED, image_tokens=70)
    assert not seen.soft_tokens.flags.writeable
    small(fresh, [lossless(RED, "PNG"), "what?"])
    reply = small(fresh, [seen, "and where?"])
    assert reply.usage.cached_tokens == picture_end(reply, fresh)


def test_a_picture_encoded_by_hand_is_known_by_its_values(fresh):
    seen = fresh.encode(RED, image_tokens=70)
    changed = type(seen)(seen.soft_tokens * 1.5, seen.size, seen.bundle)
    small(fresh, [changed, "what?"])
    assert small(fresh, [seen, "what?"]).usage.cached_tokens < 10
    again = type(seen)(seen.soft_tokens * 1.5, seen.size, seen.bundle)
    reply = small(fresh, [again, "where?"])
    assert reply.usage.cached_tokens == picture_end(reply, fresh)


def test_an_exact_repetition_runs_one_row(wide):
    first = small(wide, [RED, "what?"])
    again = small(wide, [RED, "what?"])
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, first.usage.prompt_tokens - 1)
    assert again.token_ids == first.token_ids


def test_beyond_the_window_a_question_goes_on_behind_the_picture(fresh):
    """Evicted rows do not come back: what is left are the states at the end of the picture, prompt and reply."""
    first = small(fresh, [RED, "what?"])
    end = picture_end(first, fresh)
    assert fresh.runtime.session().evicts(end)
    assert small(fresh, [RED, "where is it?"]).usage.cached_tokens == end
    again = small(fresh, [RED, "what?"])
    assert again.usage.cached_tokens == first.usage.prompt_tokens  # the logits behind the prompt are kept
    assert again.token_ids == first.token_ids
    followed = [Turn("user", [RED, "what?"]), Turn("assistant", Text("else")), Turn("user", "and?")]
    assert small(fresh, followed).usage.cached_tokens == first.usage.prompt_tokens


def test_a_prompt_that_ends_with_a_picture(wide):
    """A run of soft tokens is one block: none of its rows can be left to run alone."""
    first = small(wide, [Text("what"), RED], raw=True)
    ids = first.prompt_token_ids[: picture_end(first, wide)]
    for _ in range(2):
        reply = small(wide, [RED], prompt_ids=ids)
        assert reply.usage.cached_tokens == len(ids) - reply.usage.by_modality["image"]
        assert reply.token_ids == small(wide, [RED], prompt_ids=ids, cache=False).token_ids


def test_pictures_side_by_side_see_each_other(wide):
    """So the first of two is not the first alone, in either order."""
    both = small(wide, [RED, BLUE, "what?"], raw=True)
    rows = len(wide.encode(RED))
    soft = both.prompt_token_ids[picture_end(both, wide) - 1]
    two, one = [2, *[soft] * (2 * rows), 100, 101], [2, *[soft] * rows, 100, 101]
    wide._reuse.clear()
    for ids, pictures in ((two, [RED, BLUE]), (one, [RED]), (two, [RED, BLUE]), (two, [BLUE, RED])):
        warm, logits = ask(wide, pictures, prompt_ids=ids, max_tokens=3)
        _, cold = ask(wide, pictures, prompt_ids=ids, max_tokens=3, cache=False)
        np.testing.assert_allclose(logits, cold, rtol=0, atol=TOLERANCE)
    assert warm.usage.cached_tokens == 1


def test_a_prompt_that_sees_itself_is_never_reused(tiny_model):
    """Case 25: where the prompt is one block, no beginning of it stands for itself."""
    with Engine(tiny_model("paligemma").bundle, threads=1) as engine:
        assert "attention:prefix" in engine.manifest.requires
        for _ in range(2):
            reply = engine.generate([RED, "what?"], sampling=GREEDY, max_tokens=4)
            assert reply.usage.cached_tokens == 0
        assert engine._reuse.prefixes.nbytes == 0
        assert len(engine._reuse.features) == 1


def test_crops_are_views_of_their_own(tiny_model):
    """Pan and scan: the whole and the crops are looked up one by one."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as plain:
        image = dataclasses.replace(plain.manifest.image, pan_and_scan=CROPS)
        engine = with_manifest(plain, image=image)
    with engine:
        wide = formula_picture(300, 1000)
        small(engine, [wide, "what?"])
        with_crops = small(engine, [wide, "what?"], pan_and_scan=True)
        assert with_crops.usage.by_modality["image"] > 70
        assert len(engine._reuse.features) == 1 + 3  # the whole was known
        again = small(engine, [wide, "where?"], pan_and_scan=True)
        assert again.usage.cached_tokens == picture_end(again, engine)
        cold = small(engine, [wide, "where?"], pan_and_scan=True, cache=False)
        assert again.token_ids == cold.token_ids


def test_pages_of_documents(fresh):
    document = numbered_pages(2)
    first = small(fresh, [Pdf(document, pages=1), "what?"])
    again = small(fresh, [Pdf(document, pages=1), "where?"])
    assert again.usage.cached_tokens == picture_end(again, fresh)
    assert again.usage.by_modality["document"] == first.usage.by_modality["document"]
    assert small(fresh, [Pdf(document, pages=2), "where?"]).usage.cached_tokens < 10


def test_candidates_go_on_from_the_cache(fresh):
    sampling = Sampling(temperature=1.5, seed=5)
    cold = small(fresh, [RED, "what?"], sampling=sampling, candidates=3, cache=False)
    small(fresh, [RED, "where?"])
    warm = small(fresh, [RED, "what?"], sampling=sampling, candidates=3)
    assert warm.usage.cached_tokens > 0
    assert [one.token_ids for one in warm.candidates] == [one.token_ids for one in cold.candidates]
    assert len({one.token_ids for one in cold.candidates}) == 3


# --- files that come again


@contextlib.contextmanager
def decoded() -> Iterator[list[str]]:
    """The names of all pictures that are decoded, and of all pages that are drawn."""
    names = []
    load, draw = media.load_image, pdf.Page.draw

    def record_load(source, *, limits, name):
        names.append(name)
        return load(source, limits=limits, name=name)

    def record_draw(page, height, width):
        names.append(page.name)
        return draw(page, height, width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "load_image", record_load)
        patch.setattr(pdf.Page, "draw", record_draw)
        yield names


def test_a_file_that_comes_again_is_not_decoded_again(fresh, tmp_path):
    """A server is sent all pictures of a conversation with every question."""
    file = lossless(RED, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(file)
    with decoded() as names:
        cold = small(fresh, [file, "what?"], cache=False)
        first = small(fresh, [file, "what?"])
        assert names == ["image 1", "image 1"]
        for source in (path, io.BytesIO(file), file):
            again = small(fresh, [source, "what?"])
            assert again.token_ids == first.token_ids == cold.token_ids
            assert again.usage == dataclasses.replace(first.usage, cached_tokens=again.usage.cached_tokens)
        assert fresh.count_tokens([path, "what?"], image_tokens=70)["total"] == first.usage.prompt_tokens
        assert len(names) == 2
        small(fresh, [file, "what?"], cache=False)
        assert len(names) == 3


def test_another_budget_looks_again(demo):
    demo._reuse.clear()
    file = lossless(pixels(1, 300, 300), "PNG")
    with decoded() as names:
        for budget in (9, 16, 9, 16):
            warm = small(demo, [Image(file, budget), "describe"])
            assert warm.token_ids == small(demo, [Image(file, budget), "describe"], cache=False).token_ids
        assert len(names) == 2 + 4


def test_known_files_whose_features_are_gone_are_decoded(fresh):
    file = lossless(RED, "PNG")
    cold = small(fresh, [file, "what?"])
    fresh._reuse.features.clear()
    fresh._reuse.prefixes.clear()
    with decoded() as names:
        assert small(fresh, [file, "what?"]).token_ids == cold.token_ids
        assert names == ["image 1"]


def test_pages_that_come_again_are_not_drawn_again(fresh):
    document = numbered_pages(2)
    with decoded() as names:
        first = small(fresh, [Pdf(document), "what?"])
        assert names == ["document 1, page 1", "document 1, page 2"]
        assert small(fresh, [Pdf(document), "what?"]).token_ids == first.token_ids
        small(fresh, [Pdf(document, pages=2), "what?"])
        assert len(names) == 2


def test_a_broken_file_is_broken_every_time(fresh):
    for _ in range(2):
        with pytest.raises(ImageError, match="image 1"):
            small(fresh, [lossless(RED, "PNG")[:60], "what?"])
    assert len(fresh._reuse.files) == 0


# --- what is kept


def test_without_the_cache_nothing_is_taken_and_nothing_is_left(fresh):
    for _ in range(2):
        reply = small(fresh, [RED, "what?"], cache=False)
        assert reply.usage.cached_tokens == 0
        assert reply.timings.vision > 0
    assert (len(fresh._reuse.prefixes), len(fresh._reuse.features)) == (0, 0)


def test_counting_and_logits_leave_states_alone(fresh):
    fresh.count_tokens([RED, "what?"], image_tokens=70)
    before = fresh.prompt_logits([RED, "what?"], image_tokens=70)
    assert len(fresh._reuse.prefixes) == 0
    small(fresh, [RED, "what?"])
    np.testing.assert_array_equal(fresh.prompt_logits([RED, "what?"], image_tokens=70), before)


def test_the_bounds_of_an_engine(tiny_model):
    bundle = tiny_model("gemma4").bundle
    with Engine(bundle, threads=1, cache_bytes=300_000, feature_cache_bytes=40_000) as engine:
        for index in range(12):
            small(engine, [pixels(index, 60, 90), f"what {index}?"])
            assert 0 < engine._reuse.prefixes.nbytes <= 300_000
            assert 0 < engine._reuse.features.nbytes <= 40_000
    assert (engine._reuse.prefixes.nbytes, engine._reuse.features.nbytes) == (0, 0)  # closed
    with Engine(bundle, threads=1, cache_bytes=0, feature_cache_bytes=0) as engine:
        for _ in range(2):
            assert small(engine, [RED, "what?"]).usage.cached_tokens == 0
        assert (engine._reuse.prefixes.nbytes, engine._reuse.features.nbytes) == (0, 0)


@pytest.mark.parametrize("name", ["cache_bytes", "feature_cache_bytes", "feature_cache_dir_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None])
def test_bounds_that_are_none(tiny_model, name, value):
    with pytest.raises(InputError, match=rf"{name} is .*, it must be an integer of at least 0"):
        Engine(tiny_model("gemma4").bundle, **{name: value})


def test_a_stream_that_is_closed_leaves_the_prompt(fresh):
    stream = fresh.stream([RED, "what?"], sampling=GREEDY, max_tokens=30, image_tokens=70)
    next(stream)
    stream.close()
    cold = small(fresh, [RED, "what?"], cache=False)
    followed = [Turn("user", [RED, "what?"]), Turn("assistant", Text("no")), Turn("user", "and?")]
    assert small(fresh, followed).usage.cached_tokens == cold.usage.prompt_tokens
    assert small(fresh, [RED, "what?"]).token_ids == cold.token_ids


class Broken(Exception):
    pass


@pytest.mark.parametrize("at", range(5))
def test_a_run_that_fails_leaves_what_is_true(fresh, at):
    """Case 53: whichever run of the decoder fails, later requests get cold answers."""
    cold = small(fresh, [RED, "what?"], cache=False)
    small(fresh, [RED, "where?"])
    run_bound, calls = fresh.runtime.decoder.run_bound, iter(range(100))

    def fail(binding):
        run_bound(binding)
        if next(calls) == at:
            for buffer in binding.get_outputs():
                buffer.numpy()[...] = np.nan
            raise Broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh.runtime.decoder, "run_bound", fail)
        with pytest.raises(Broken):
            small(fresh, [RED, "what?"], max_tokens=9)
    for _ in range(2):
        assert small(fresh, [RED, "what?"]).token_ids == cold.token_ids


# --- features on disk


def test_pictures_are_encoded_once_in_two_processes_lives(tiny_model, tmp_path):
    bundle = tiny_model("gemma4").bundle
    with Engine(bundle, threads=1, feature_cache_dir=tmp_path / "features") as engine:
        cold = small(engine, [RED, "what?"])
    with Engine(bundle, threads=1, feature_cache_dir=tmp_path / "features") as engine:
        engine.runtime.vision = None  # would raise
        assert small(engine, [RED, "what?"]).token_ids == cold.token_ids
        with pytest.raises(InputError, match="no vision input"):
            small(engine, [RED, "what?"], cache=False)
        with pytest.raises(InputError, match="no vision input"):
            small(engine, [BLUE, "what?"])
    [file] = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    with Engine(bundle, threads=1, feature_cache_dir=str(tmp_path / "features")) as engine:
        assert small(engine, [RED, "what?"]).token_ids == cold.token_ids
    with Engine(bundle, threads=1, feature_cache_dir=tmp_path / "features") as engine:
        engine.runtime.vision = None
        assert small(engine, [RED, "what?"]).token_ids == cold.token_ids


def test_another_bundle_has_its_own_features(tiny_model, tmp_path):
    for arguments in ({}, {"seed": 3}):
        with Engine(tiny_model("gemma4", **arguments).bundle, threads=1, feature_cache_dir=tmp_path) as engine:
            warm = [small(engine, [RED, "what?"]) for _ in range(2)]
            cold = small(engine, [RED, "what?"], cache=False)
            assert {reply.token_ids for reply in warm} == {cold.token_ids}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_used(tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="feature_cache_dir"):
        Engine(tiny_model("gemma4").bundle, feature_cache_dir=tmp_path / "file")
