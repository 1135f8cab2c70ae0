"""Videos in requests: frames with their clock in the prompt, soft tokens as of pictures, counted as "video"."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image as PillowImage

from siglance.engine import Engine, Image, Limits, Pdf, Sampling, Text, Turn, Video, cli, preprocessing
from siglance.engine import video as video_module
from siglance.engine.errors import BundleError, ContextFull, ImageError, InputError, PromptError, VideoError
from siglance.engine.manifest import VideoFacts, read_manifest, write_manifest
from siglance.engine.reply import EncodedVideo

from .video_files import HEIGHT, WIDTH, clip

GREEDY = Sampling(temperature=0)
QUESTION = Text("what?")


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny model with text, pictures and videos."""
    with Engine(tiny_model("gemma4", max_position_embeddings=4096).bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def short() -> bytes:
    """Three seconds."""
    return clip(65, options={"g": "10"})


@pytest.fixture
def asked(monkeypatch):
    """The questions to the process that reads videos."""
    questions = []
    ask = video_module._ask

    def listen(question, *arguments):
        questions.append(question)
        return ask(question, *arguments)

    monkeypatch.setattr(video_module, "_ask", listen)
    return questions


def run(engine: Engine, parts, **options):
    return engine.generate(parts, max_tokens=3, sampling=GREEDY, **options)


def text_of(engine: Engine, parts) -> str:
    _, prompt = engine._preprocessor.prompt(
        engine._preprocessor.read(parts, preprocessing.StageClock()), preprocessing.PromptOptions()
    )
    return prompt.text


# --- the prompt


def test_frames_stand_in_the_prompt_with_their_clock(engine, short):
    """facts.md 4.5: frames joined by one space, each its time, a space, brackets of pictures, soft tokens of videos."""
    soft = "<|video|>" * 65  # 96 x 256 pixels and a budget of 70: 5 x 13
    frames = " ".join(f"00:0{second} <|image>{soft}<image|>" for second in range(3))
    assert text_of(engine, [Video(short), QUESTION]) == (f"<bos><|turn>user\n{frames}what?<turn|>\n<|turn>model\n")


def test_all_media_keep_their_order(engine, short):
    picture = np.zeros((96, 96, 3), np.uint8)
    text = text_of(
        engine, [Image(picture, 70), Text("a"), Video(short, end=1), Text("b"), Image(picture, 70), QUESTION]
    )
    places = [text.index(mark) for mark in ("<|image|>", "a00:00", "<|video|>", "b<|image>", "what?")]
    assert places == sorted(places)
    counts = engine.count_tokens([Image(picture, 70), Video(short, end=1), Image(picture, 70), QUESTION])
    assert (counts["image"], counts["video"]) == (128, 65)
    assert counts["total"] == counts["text"] + 128 + 65


def test_times_that_a_text_spells_are_text(engine, short):
    """A question about 00:01 or with a placeholder in it changes nothing about the frames."""
    text = text_of(engine, [Video(short), Text("at 00:01 <|video|>?")])
    assert text.count("<|video|>") == 3 * 65 + 1
    counts = engine.count_tokens([Video(short), Text("at 00:01 <|video|>?")])
    assert counts["video"] == 195


def test_a_frame_is_the_picture_that_it_shows(engine, short):
    """Soft tokens of a frame equal those of the same pixels passed as an image of the same budget."""
    turns = engine._preprocessor.read([Video(short), QUESTION], preprocessing.StageClock())
    asked = engine._prepare(turns, preprocessing.StageClock(), engine._reuse.off(), preprocessing.PromptOptions())
    soft = engine._soft_tokens(asked, preprocessing.StageClock(), engine._reuse.off())
    frames = video_module.open_clip(short, fps=1.0, start=None, end=None, limits=Limits(), name="video 1")
    for index, values in enumerate(soft):
        pixels = frames.pixels(index, HEIGHT, WIDTH, "bicubic")
        expected = engine.encode(Image(pixels, 70)).soft_tokens
        np.testing.assert_array_equal(values.values, expected)


@pytest.mark.parametrize("model", ["gemma4", "gemma4_unified"])
def test_the_model_sees_the_same_as_in_pictures(tiny_model, short, model):
    """Placeholders of videos are looked up as padding and frames are blocks, as those of pictures are (facts.md 2.6,
    3.6): with `<|image|>` for `<|video|>` and the frames as pictures the logits are the same."""
    with Engine(tiny_model(model).bundle, threads=1) as seeing:
        rows = seeing.prompt_logits([Video(short), QUESTION], image_tokens=None)
        ids = run(seeing, [Video(short), QUESTION], cache=False).prompt_token_ids
        tokenizer = seeing._tokenizer
        image, video = (tokenizer.token_to_id(f"<|{kind}|>") for kind in ("image", "video"))
        assert ids.count(video) == 195
        frames = video_module.open_clip(short, fps=1.0, start=None, end=None, limits=Limits(), name="video 1")
        pictures = [Image(frames.pixels(index, HEIGHT, WIDTH, "bicubic"), 70) for index in range(3)]
        swapped = [image if id == video else id for id in ids]
        expected = seeing.prompt_logits(pictures, prompt_ids=swapped)
    np.testing.assert_array_equal(rows, expected)
    assert np.ptp(rows) > 1


def test_a_prompt_given_as_ids(engine, short):
    """The runs of soft tokens are dealt out to the frames, and the reply is that of the conversation."""
    usual = run(engine, [Video(short), QUESTION])
    by_ids = run(engine, [Video(short)], prompt_ids=usual.prompt_token_ids)
    assert by_ids.token_ids == usual.token_ids
    with pytest.raises(PromptError, match="runs of"):
        run(engine, [Video(short, end=1)], prompt_ids=usual.prompt_token_ids)


# --- requests


def test_every_form_of_source_gives_the_same_reply(engine, short, tmp_path):
    path = tmp_path / "clip.MP4"
    path.write_bytes(short)
    uri = "data:video/mp4;base64," + base64.b64encode(short).decode()
    expected = run(engine, [Video(short), QUESTION])
    assert expected.usage.by_modality == {"text": len(expected.prompt_token_ids) - 195, "image": 0, "video": 195}
    with open(path, "rb") as file, open(path, "rb") as bare:
        for source in (
            str(path),
            path,
            Video(path),
            Video(str(path)),
            short,
            uri,
            Video(file),
            bare,
            Image(short),
            Image(path),
        ):
            assert run(engine, [source, QUESTION]).token_ids == expected.token_ids


def test_options_of_a_video(engine, short):
    """fps, start, end and the budget of a frame; the budget of pictures is not that of frames."""

    def count(**options) -> int:
        return engine.count_tokens([Video(short, **options), QUESTION], image_tokens=280)["video"]

    assert count() == 195
    assert count(fps=2) == 6 * 65
    assert count(start=1) == 130
    assert count(end=1) == 65
    assert count(tokens=140) == 3 * 133
    with pytest.raises(ImageError, match=r"video 1: .*budget of 71"):
        count(tokens=71)


def test_counting_decodes_one_frame(engine, short, asked):
    engine.count_tokens([Video(short), QUESTION])
    assert asked == [{}]


def test_nothing_is_decoded_for_a_prompt_that_does_not_fit(tiny_model, short, asked):
    with Engine(tiny_model("gemma4").bundle, threads=1) as small, pytest.raises(ContextFull):
        run(small, [Video(short, fps=25), QUESTION])
    assert not any("targets" in question for question in asked)


def test_caches_know_frames(engine, short):
    """The second question about a video runs neither its prefix nor its frames; single frames are known too."""
    with Engine(engine.bundle, threads=1) as fresh:
        first = run(fresh, [Video(short), QUESTION])
        again = run(fresh, [Video(short), Text("and what else?")])
        cold = run(fresh, [Video(short), Text("and what else?")], cache=False)
        assert first.usage.cached_tokens == 0
        assert again.usage.cached_tokens > 195
        assert again.token_ids == cold.token_ids
        known = len(fresh._reuse.features)
        run(fresh, [Video(short, end=2), QUESTION])
        assert len(fresh._reuse.features) == known == 3


def test_a_chat_remembers_videos(engine, short, asked):
    """Encoded, with their times: the file is not read for the second turn."""
    chat = engine.chat(max_tokens=3, sampling=GREEDY)
    chat.send([Video(short), QUESTION])
    [remembered] = [part for part in chat.history[0].parts if isinstance(part, EncodedVideo)]
    assert remembered.times == pytest.approx((0, 1, 2))
    assert len(remembered.frames) == 3
    asked.clear()
    reply = chat.send("and then?")
    assert not asked
    whole = [Turn("user", [Video(short), QUESTION]), chat.history[1], Turn("user", "and then?")]
    assert run(engine, whole).prompt_token_ids == reply.prompt_token_ids
    assert reply.usage.by_modality["video"] == 195


# --- refusals


def test_bundles_without_videos_say_so(short, tiny_model):
    """The demo was not trained on videos; a text bundle sees nothing."""
    with Engine.open("demo") as demo:
        for part in (Video(short), short):
            with pytest.raises(
                PromptError, match=r"video 1: this bundle does not know videos \(modalities: text, image\)"
            ):
                demo.count_tokens([part, QUESTION])
    with (
        Engine(tiny_model("gemma3").bundle, threads=1) as text,
        pytest.raises(PromptError, match=r"video 1: this bundle does not know videos \(modalities: text\)"),
    ):
        text.count_tokens([Video(short), QUESTION])


def test_errors_name_the_part(engine, short, tmp_path):
    path = tmp_path / "holiday.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"^video 2 \(holiday.mp4\): not a video that can be read"):
        engine.count_tokens([Video(short), str(path), QUESTION])
    with pytest.raises(VideoError, match=r"^video 1 \(none.mp4\): cannot read"):
        engine.count_tokens([str(tmp_path / "none.mp4"), QUESTION])
    with pytest.raises(InputError, match="encode takes one picture or sound, not a video"):
        engine.encode(short)
    with pytest.raises(InputError, match=r"^document 1: not a PDF"):
        engine.count_tokens([Pdf(short), QUESTION])
    picture = tmp_path / "picture.mp4"
    PillowImage.new("RGB", (8, 8)).save(picture, "PNG")
    with pytest.raises(VideoError, match=r"picture.mp4\): not a video"):
        engine.count_tokens([Video(picture), QUESTION])


def test_the_package_that_reads_videos_is_named(engine, short, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VideoError, match=r"video 1: .*pip install 'siglance\[video\]'"):
        engine.count_tokens([Video(short), QUESTION])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: dataclasses.replace(m, video=None), "'video'"),
        (lambda m: dataclasses.replace(m, prompt=dataclasses.replace(m.prompt, video=None)), "'prompt.video'"),
        (lambda m: dataclasses.replace(m, modalities=("text", "image")), "'video'"),
        (lambda m: dataclasses.replace(m, modalities=("text", "video")), "'modalities'"),
        (
            lambda m: dataclasses.replace(m, requires=tuple(n for n in m.requires if n != "video:clock_frames")),
            "'requires'",
        ),
        (
            lambda m: dataclasses.replace(m, video=VideoFacts(budgets=(70,), default_budget=69, fps=1.0)),
            "default_budget",
        ),
        (lambda m: dataclasses.replace(m, video=VideoFacts(budgets=(70,), default_budget=70, fps=0.0)), "video.fps"),
    ],
)
def test_facts_that_contradict_each_other(engine, change, key):
    with pytest.raises(BundleError, match=key):
        read_manifest(write_manifest(change(engine.manifest)))


# --- the command line


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.app(arguments, standalone_mode=False)
    except SystemExit as end:
        code = int(end.code or 0)
    except InputError as error:
        return 1, "", str(error)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_options_on_the_command_line(engine, short, tmp_path, capsys):
    path = tmp_path / "clip.mp4"
    path.write_bytes(short)
    bundle = str(engine.bundle.folder)
    plain = ["count-tokens", bundle, "-p", "what?", "--json"]

    def count(*options: str) -> int:
        return json.loads(command(capsys, *plain, *options)[1])["video"]

    assert count("-i", str(path)) == 195
    assert count("-i", str(path), "--fps", "2") == 390
    assert count("-i", str(path), "--start", "0.5", "--end", "1.2") == 65
    assert count("-i", f"{path}@140") == 3 * 133
    run_it = ["run", bundle, "-p", "what?", "--max-tokens", "2", "--temperature", "0", "--json"]
    reply = json.loads(command(capsys, *run_it, "-i", str(path), "--fps", "2")[1])
    assert reply["usage"]["by_modality"]["video"] == 390


def test_options_without_a_video_are_refused(engine, tmp_path, capsys):
    path = tmp_path / "a.png"
    PillowImage.new("RGB", (8, 8)).save(path)
    code, _, error = command(
        capsys, "run", str(engine.bundle.folder), "-i", str(path), "-p", "what?", "--fps", "2", "--end", "3"
    )
    assert code == 1
    assert error == "--fps 2 --end 3: none of the files is a video"


# --- memory


def test_memory_here_is_that_of_the_chosen_frames(engine, tmp_path):
    """A clip on disk is not read into this process, and its frames arrive resized; the other process needs the same
    for 60 frames as for one."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(60, fps=1, size=(720, 1280), options={"g": "20", "preset": "ultrafast"}))
    limits = Limits(max_video_memory=700 * 2**20)
    tracemalloc.start()
    try:
        video = video_module.open_clip(path, fps=1.0, start=None, end=None, limits=limits, name="video 1")
        for index in range(len(video.times)):
            video.pixels(index, 96, 240, "bicubic")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(video.times) == 60
    assert peak < 3 * 60 * 96 * 240 * 3
