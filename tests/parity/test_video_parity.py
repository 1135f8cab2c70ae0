"""Prompts with videos against Gemma4Processor of transformers: times, placeholders of every frame, what joins them."""

from __future__ import annotations

import pytest

from siglance.engine import Engine, Image, Text, Video
from siglance.engine.preprocessing import PromptOptions
from siglance.engine.reply import StageClock
from siglance.engine.self_test import formula_picture

from ..video_files import clip

# The fast suite collects this file in environments without transformers, and deselects all of it.
transformers = pytest.importorskip("transformers", reason="transformers is in the parity extra only")

pytestmark = pytest.mark.parity

# Frames of the file, its rate, options of the part, and the frames that are shown of it.
CLIPS = {
    "one a second": (100, 25, {}, [0, 25, 50, 75]),
    "two a second": (60, 30, {"fps": 2.0}, [0, 15, 30, 45]),
    "more tokens": (60, 30, {"tokens": 140}, [0, 30]),
    "a part": (100, 25, {"start": 2.0}, [50, 75]),
    "one frame": (1, 25, {}, [0]),
    "minutes": (130, 1, {"start": 58.0, "end": 62.0}, [58, 59, 60, 61]),
    "an hour": (3603, 1, {"start": 3598.0}, [3598, 3599, 3600, 3601, 3602]),
}


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Engine(tiny_model("gemma4", max_position_embeddings=4096).bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def processor(engine):
    """The processor of transformers on our tokenizer, without what decodes and resizes videos: that needs torchvision,
    with which its pictures would be others."""
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    file = str(engine.bundle.path("tokenizer"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **special, extra_special_tokens=extra)
    made = object.__new__(transformers.Gemma4Processor)
    made.tokenizer, made.video_token = tokenizer, "<|video|>"
    made.image_token, made.boi_token, made.eoi_token = (
        extra[name] for name in ("image_token", "boi_token", "eoi_token")
    )
    return made


def frames(processor, count: int, fps: float, shown: list[int], rows: int = 65) -> str:
    """What the processor writes for the placeholder of a video with `rows` soft tokens a frame."""
    metadata = transformers.video_utils.VideoMetadata(total_num_frames=count, fps=fps, frames_indices=shown)
    inputs = {"num_soft_tokens_per_video": [rows], "video_metadata": [metadata]}
    return processor.replace_video_token(inputs, video_idx=0)


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_of_a_video(engine, processor, name):
    """Frames are chosen by their time here and are given to transformers by their number: the prompt is the same."""
    count, fps, options, shown = CLIPS[name]
    file = clip(count, fps=fps, options={"g": "250", "preset": "ultrafast"})
    turns = engine._preprocessor.read([Video(file, **options), Text("what happens?")], StageClock())
    _, prompt = engine._preprocessor.prompt(turns, PromptOptions())
    rows = {None: 65, 140: 133}[options.get("tokens")]  # of 96 x 256 pixels
    written = frames(processor, count, fps, shown, rows)
    expected = f"<bos><|turn>user\n{written}what happens?<turn|>\n<|turn>model\n"
    assert prompt.text == expected
    assert prompt.ids.tolist() == processor.tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_videos_and_pictures_in_one_prompt(engine, processor):
    first, second = clip(50), clip(30, fps=30)
    parts = [Text("a"), Video(first), Text("b"), Image(formula_picture(96, 96), 70), Video(second), Text("which?")]
    _, prompt = engine._preprocessor.prompt(engine._preprocessor.read(parts, StageClock()), PromptOptions())
    image = processor.replace_image_token({"num_soft_tokens_per_image": [64]}, image_idx=0)
    written = f"a{frames(processor, 50, 25, [0, 25])}b{image}{frames(processor, 30, 30, [0])}which?"
    expected = f"<bos><|turn>user\n{written}<turn|>\n<|turn>model\n"
    assert prompt.text == expected
    assert prompt.ids.tolist() == processor.tokenizer(expected, add_special_tokens=False)["input_ids"]
