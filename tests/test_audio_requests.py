"""Sounds in requests: every form, order with text and pictures, counts, caches, conversations, refusals."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest

from siglance.engine import Audio, Bundle, EncodedSound, Engine, Image, Sampling, Text, Turn, Video
from siglance.engine.errors import AudioError, BundleError, ContextFull, InputError, PromptError
from siglance.engine.limits import Limits
from siglance.engine.media import PictureSource, interleaved
from siglance.engine.prompt import Media, Message, PromptBuilder
from siglance.engine.runtime import SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.engine.template import ChatTemplate
from siglance.engine.text import load_tokenizer
from siglance.engine.video import Clip

from . import reference_audio, reference_gemma4_large, reference_model
from .audio_files import encoded, tone, video_with_sound, wav
from .test_audio_graph import speechlike
from .test_cli import siglance as siglance  # a fixture

GREEDY = Sampling(temperature=0)
SMALL = {"image_tokens": 70, "max_tokens": 6, "sampling": GREEDY}
CLIP = (speechlike(16_000) * 32768).round() / np.float32(32768)  # as 16 bits hold it: 25 soft tokens


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny E2B: it reads, sees and hears."""
    with Engine(tiny_model("gemma4_audio").bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def unified(tiny_model):
    """A tiny 12B."""
    with Engine(tiny_model("gemma4_unified").bundle, threads=1) as engine:
        yield engine


@pytest.fixture
def counted(engine, monkeypatch):
    """How many samples each run of the audio graph had."""
    runs: list[int] = []
    hear = type(engine.runtime).hear
    monkeypatch.setattr(
        type(engine.runtime), "hear", lambda self, wave, count: runs.append(len(wave)) or hear(self, wave, count)
    )
    return runs


# --- what a sound may be


def test_every_form_of_a_sound_is_the_same_sound(engine, tmp_path):
    data = wav(CLIP)
    path = tmp_path / "a b ü.wav"
    path.write_bytes(data)
    uri = "data:audio/wav;base64," + base64.b64encode(data).decode()
    forms = [path, str(path), data, bytearray(data), io.BytesIO(data), uri, Audio(path), Audio(data), Image(path)]
    forms += [Audio(CLIP, sample_rate=16_000), Audio(np.stack([CLIP, CLIP]), sample_rate=16_000)]
    expected = engine.prompt_logits([Audio(CLIP, sample_rate=16_000), "what?"])
    for form in forms:
        np.testing.assert_array_equal(engine.prompt_logits([form, "what?"]), expected)


@pytest.mark.parametrize(
    ("part", "is_sound"),
    [
        ("missing.wav", True),
        ("My Song.MP3", True),
        ("a.opus", True),
        ("data:audio/mpeg;base64,AAAA", True),
        ("what does wav mean?", False),
        ("two lines\nsong.mp3", False),
        (Text("missing.wav"), False),
    ],
)
def test_a_string_is_a_sound_only_if_it_looks_like_one(engine, part, is_sound):
    if is_sound:
        with pytest.raises(AudioError, match=r"^audio 1"):
            engine.count_tokens([part])
    else:
        assert "audio" not in engine.count_tokens([part])


# --- prompts


def reference_logits(model_folder, ids, soft) -> np.ndarray:
    weights, config = reference_model.load_checkpoint(model_folder)
    unified = config["model_type"] == "gemma4_unified"
    function = reference_gemma4_large.logits if unified else reference_model.gemma4_text_logits
    return function(weights, config, ids, soft)


@pytest.mark.parametrize("family", ["gemma4_audio", "gemma4_unified"])
def test_text_pictures_and_sounds_in_one_prompt_keep_their_order(tiny_model, family):
    """The whole path, down to the logits of the float64 reference."""
    model = tiny_model(family)
    weights, config = reference_model.load_checkpoint(model.checkpoint)
    photo, second = formula_picture(60, 90), speechlike(8000, seed=5)
    second_sound = Audio(second, sample_rate=16_000)
    conversation = ["hello", Audio(CLIP, sample_rate=16_000), "The", photo, "world", second_sound, photo]
    with Engine(model.bundle, threads=1) as engine:
        reply = engine.generate(conversation, **SMALL)
        logits = engine.prompt_logits(conversation, image_tokens=70)
        seen = engine.encode(photo, image_tokens=70).soft_tokens
    ids = np.array(reply.prompt_token_ids)
    image, audio = config["image_token_id"], config["audio_token_id"]
    kinds = ids[np.isin(ids, [image, audio])]
    runs = kinds[np.flatnonzero(np.diff(kinds, prepend=-1))].tolist()
    assert runs == [audio, image, audio, image]
    unified = family == "gemma4_unified"
    heard = [
        reference_audio.unified_soft_tokens(weights, clip)
        if unified
        else reference_audio.soft_tokens(weights, config, clip)
        for clip in (CLIP, second)
    ]
    expected = reference_logits(model.checkpoint, ids, [heard[0], seen, heard[1], seen])
    assert np.abs(logits - expected).max() < 2e-3
    assert reply.usage.by_modality["audio"] == len(heard[0]) + len(heard[1])
    assert reply.usage.by_modality["image"] == 2 * len(seen)
    assert sum(reply.usage.by_modality.values()) == reply.usage.prompt_tokens == len(ids)
    assert reply.timings.audio > 0


def test_the_prompt_is_the_one_of_the_template(engine):
    """`<|audio>` + soft tokens + `<audio|>`, with nothing around it."""
    prompt = "<bos><|turn>user\n<|audio>" + "<|audio|>" * 25 + "<audio|>What is this?<turn|>\n<|turn>model\n"
    ids = engine.generate([Audio(CLIP, sample_rate=16_000), "What is this?"], **SMALL).prompt_token_ids
    tokenizer = load_tokenizer(engine.bundle.path("tokenizer"), ())
    assert tokenizer.decode(list(ids), skip_special_tokens=False) == prompt
    assert engine.count_tokens([Audio(CLIP, sample_rate=16_000), "What is this?"])["audio"] == 25


def test_a_spelled_placeholder_stays_text(engine):
    counts = engine.count_tokens(["<|audio|><|audio><audio|>", Audio(CLIP, sample_rate=16_000)])
    assert counts["audio"] == 25
    assert "audio" not in engine.count_tokens(["<|audio|>"])


def test_raw_prompts_take_sounds(engine):
    ids = engine.generate([Text("hello"), Audio(CLIP, sample_rate=16_000)], raw=True, **SMALL).prompt_token_ids
    assert len(ids) == 2 + 25 + 2


def test_prompts_given_as_ids(engine):
    conversation = ["hello", Audio(CLIP, sample_rate=16_000), "The", formula_picture(60, 90)]
    reply = engine.generate(conversation, **SMALL)
    again = engine.generate([conversation[1], conversation[3]], prompt_ids=reply.prompt_token_ids, **SMALL)
    assert again.token_ids == reply.token_ids
    assert again.usage.by_modality == reply.usage.by_modality
    for media in ([conversation[3], conversation[1]], [conversation[1]], [conversation[3]] * 2):
        with pytest.raises(PromptError, match=r"the prompt ids have runs of .*25 audio.* soft tokens, the media give"):
            engine.generate(media, prompt_ids=reply.prompt_token_ids, **SMALL)


def test_a_template_that_mixes_media_up_is_refused(engine):
    """Placeholders are told apart by kind: a template may not swap a sound and a picture."""
    facts = engine.manifest.prompt
    source = "{% for item in messages[0].content | reverse %}<|{{ item.type }}|>{% endfor %}"
    builder = PromptBuilder(load_tokenizer(engine.bundle.path("tokenizer"), ()), facts, ChatTemplate(source))
    image, audio = Media(soft_tokens=3), Media(kind="audio", soft_tokens=4)
    with pytest.raises(PromptError, match="another order than theirs"):
        builder.chat([Message("user", [image, audio])])
    prompt = builder.chat([Message("user", [audio, audio])])
    assert [(span.kind, span.length, span.media_index) for span in prompt.spans] == [("audio", 4, 0), ("audio", 4, 1)]
    with pytest.raises(PromptError, match="a sound needs at least 1 soft token"):
        builder.chat([Message("user", [Media(kind="audio", soft_tokens=0)])])
    with pytest.raises(PromptError, match="this model has no smell input"):
        builder.chat([Message("user", [Media(kind="smell", soft_tokens=1)])])
    lost = PromptBuilder(load_tokenizer(engine.bundle.path("tokenizer"), ()), facts, ChatTemplate("{{ bos_token }}"))
    with pytest.raises(PromptError, match="0 placeholders for 2 attached media"):
        lost.chat([Message("user", [image, audio])])


def test_a_soft_token_must_be_a_special_token(engine):
    audio = engine.manifest.prompt.audio
    assert audio is not None
    facts = dataclasses.replace(engine.manifest.prompt, audio=dataclasses.replace(audio, soft="hello"))
    with pytest.raises(BundleError, match="'hello'"):
        PromptBuilder(load_tokenizer(engine.bundle.path("tokenizer"), ()), facts, None)


# --- length


def test_a_sound_that_is_too_long_is_refused_or_split(engine):
    """30 s at once: 750 soft tokens; more becomes several clips of about the same length, if that is asked for."""
    long = speechlike(480_000 + 160)
    with pytest.raises(AudioError, match=r"audio 1: longer than 30 s, what the model hears at once: choose .* split"):
        engine.count_tokens([Audio(long, sample_rate=16_000)])
    assert engine.count_tokens([Audio(long[:480_000], sample_rate=16_000)])["audio"] == 750
    assert engine.count_tokens([Audio(long, 0, 30.0, sample_rate=16_000)])["audio"] == 750
    counts = engine.count_tokens([Audio(long, split=True, sample_rate=16_000)])
    assert counts["audio"] == 375 * 2
    assert counts["text"] == engine.count_tokens([Audio(CLIP, sample_rate=16_000)] * 2)["text"]


def test_clips_of_a_split_sound_are_heard_one_after_another(tiny_model):
    """Each by itself, as two sounds would be."""
    model = tiny_model("gemma4_unified")
    facts = dataclasses.replace(model.bundle.manifest.audio, max_tokens=10)
    manifest = dataclasses.replace(model.bundle.manifest, audio=facts)
    with Engine(Bundle(model.bundle.folder, manifest), threads=1) as engine:
        split = engine.prompt_logits([Audio(CLIP[:15_000], split=True, sample_rate=16_000), "what?"])
        parts = [Audio(CLIP[5000 * i : 5000 * (i + 1)], sample_rate=16_000) for i in range(3)]
        np.testing.assert_array_equal(split, engine.prompt_logits([*parts, "what?"]))
        with pytest.raises(AudioError, match=r"longer than 0\.4 s"):
            engine.count_tokens([Audio(CLIP, sample_rate=16_000)])
        with pytest.raises(InputError, match="encode takes one clip, not a sound of 3"):
            engine.encode(Audio(CLIP, split=True, sample_rate=16_000))


def test_limits_of_split_sounds(tiny_model):
    model = tiny_model("gemma4_unified")
    with Engine(model.bundle, threads=1, limits=Limits(max_audio_length=60)) as engine:
        minute = np.zeros(16_000 * 61, np.float32)
        with pytest.raises(AudioError, match="longer than 60 s, the limit for a sound"):
            engine.count_tokens([Audio(minute, split=True, sample_rate=16_000)])
        with pytest.raises(ContextFull):  # 1024 tokens
            engine.generate([Audio(minute[:-16_000], split=True, sample_rate=16_000)])


@pytest.mark.parametrize(("samples", "heard"), [(1, False), (160, False), (161, True)])
def test_a_sound_that_is_too_short_is_refused(engine, unified, samples, heard):
    clip = Audio(CLIP[:samples], sample_rate=16_000)
    assert unified.count_tokens([clip])["audio"] == 1
    if heard:
        assert engine.count_tokens([clip])["audio"] == 1
    else:
        with pytest.raises(AudioError, match=f"audio 1: {samples} samples .* too short for the model to hear"):
            engine.count_tokens([clip])


# --- refusals


def test_bundles_without_ears_say_so(tiny_model):
    for family in ("gemma4", "gemma3"):
        with (
            Engine(tiny_model(family).bundle, threads=1) as engine,
            pytest.raises(PromptError, match=r"audio 1: this bundle has no audio input \(modalities: text"),
        ):
            engine.count_tokens([wav(CLIP)])


def test_a_bundle_may_hear_and_not_see(tiny_model):
    with Engine(tiny_model("gemma4_audio", vision=False).bundle, threads=1) as engine:
        reply = engine.generate([wav(CLIP), "what?"], **SMALL)
        assert reply.usage.by_modality["audio"] == 25
        assert reply.boxes == ()
        with pytest.raises(PromptError, match="image 1: this bundle has no vision input"):
            engine.generate([formula_picture(9, 9)])


def test_a_sound_has_no_token_budget(engine):
    with pytest.raises(InputError, match="audio 1: a sound has no token budget"):
        engine.count_tokens([Image(wav(CLIP), tokens=70)])


def test_a_video_or_a_document_is_no_sound(engine):
    with pytest.raises(AudioError, match="audio 1: not a sound"):
        engine.count_tokens([Audio(b"%PDF-1.7")])


def test_attachments_are_counted_together(engine):
    with pytest.raises(AudioError, match=r"^audio 3: "):
        engine.count_tokens([formula_picture(9, 9), "x", wav(CLIP), "y", Audio(b"RIFF")])


# --- sounds of videos


class Stretch:
    """What `interleaved` needs of a clip of sound."""

    def __init__(self, seconds: float):
        self.seconds = seconds


@pytest.mark.parametrize(
    ("times", "seconds", "begin", "expected"),
    [
        ([0, 1, 2], [3], 0, ["0 1 2", "s"]),
        ([0, 1, 2, 3], [2, 2], 0, ["0 1", "s", "2 3", "s"]),
        ([0, 1, 2, 3, 9], [2, 2], 0, ["0 1", "s", "2 3 9", "s"]),  # pictures go on behind the sound
        ([0, 3.5], [1, 1, 2], 0, ["0", "s", "s", "3.5", "s"]),
        ([10, 11, 12], [1.5, 1.5], 10, ["10 11", "s", "12", "s"]),  # a start: times are those of the file
    ],
)
def test_frames_stand_in_front_of_the_sound_they_are_shown_with(times, seconds, begin, expected):
    clip = Clip("v", 8, 8, tuple(times), Limits(), None, "time", tuple((index, 0) for index in range(len(times))))
    source = PictureSource("v", "video", (8, 8), (8, 8), lambda height, width: np.zeros((8, 8, 3), np.uint8), clip=clip)
    media = interleaved(source, [Stretch(length) for length in seconds], begin)
    assert [
        " ".join(f"{time:g}" for time in medium.clip.times) if isinstance(medium, PictureSource) else "s"
        for medium in media
    ] == expected
    parts = [medium.clip._targets for medium in media if isinstance(medium, PictureSource)]
    assert [target for part in parts for target in part] == [(index, 0) for index in range(len(times))]


def test_a_video_with_its_sound(engine, tmp_path):
    """The same prompt as frames and sound one after the other; from a path, from bytes and from a file that is open."""
    data = video_with_sound(3.0)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    separate = engine.generate([Video(path), Audio(path), "what?"], **SMALL)
    for source in (path, data, io.BytesIO(data)):
        together = engine.generate([Video(source, sound=True), "what?"], **SMALL)
        assert together.prompt_token_ids == separate.prompt_token_ids
        assert together.token_ids == separate.token_ids
    assert together.usage.by_modality["video"] > 0
    assert together.usage.by_modality["audio"] in (75, 76)
    part = engine.count_tokens([Video(path, start=1, end=2, sound=True)])
    assert part["audio"] == 25


def test_a_long_video_is_heard_in_clips_between_its_frames(tiny_model, tmp_path):
    model = tiny_model("gemma4_unified")
    facts = dataclasses.replace(model.bundle.manifest.audio, max_tokens=50)  # two seconds
    manifest = dataclasses.replace(model.bundle.manifest, audio=facts)
    path = tmp_path / "a.mp4"
    path.write_bytes(video_with_sound(3.9))
    with Engine(Bundle(model.bundle.folder, manifest), threads=1) as engine:
        ids = engine.generate([Video(path, sound=True), "what?"], **SMALL).prompt_token_ids
        text = load_tokenizer(engine.bundle.path("tokenizer"), ()).decode(list(ids), skip_special_tokens=False)
        chat = engine.chat(max_tokens=4, sampling=GREEDY)
        chat.send([Video(path, sound=True), "what?"])
        path.unlink()
        chat.send("and now?")
    text = re.sub(r"(<\|(video|audio)\|>)+", r"\1", text)
    frame = "{} <|image><|video|><image|>"
    pieces = [frame.format(f"00:0{second}") for second in range(4)]
    heard = "<|audio><|audio|><audio|>"
    assert f"user\n{pieces[0]} {pieces[1]}{heard}{pieces[2]} {pieces[3]}{heard}what?" in text
    kinds = [type(part).__name__ for part in chat.history[0].parts]
    assert kinds == ["EncodedVideo", "EncodedSound", "EncodedVideo", "EncodedSound", "Text"]


def test_a_video_without_sound_says_so(engine, tiny_model, tmp_path):
    path = tmp_path / "silent.mp4"
    path.write_bytes(video_with_sound(with_sound=False))
    assert "video" in engine.count_tokens([Video(path)])
    with pytest.raises(AudioError, match=r"audio 1 \(silent.mp4\): no sound in it, only video"):
        engine.count_tokens([Video(path, sound=True)])
    with (
        Engine(tiny_model("gemma4").bundle, threads=1) as deaf,
        pytest.raises(PromptError, match="audio 1: this bundle has no audio input"),
    ):
        deaf.count_tokens([Video(path, sound=True)])


def test_large_videos_are_not_held_in_memory_for_their_sound(engine, tmp_path):
    """The limit for files in memory does not count for them, that for videos does."""
    path = tmp_path / "a.mp4"
    path.write_bytes(video_with_sound())
    with Engine(engine.bundle, threads=1, limits=Limits(max_bytes=1000)) as small:
        assert small.count_tokens([Video(path, sound=True)])["audio"] > 0
        with pytest.raises(AudioError, match="over the limit of 1000 bytes"):
            small.count_tokens([Audio(path)])


# --- caches


def test_a_sound_is_heard_once_whatever_file_it_comes_from(engine, counted, tmp_path):
    clip = speechlike(9000, seed=77)
    clip = (clip * 32768).round() / np.float32(32768)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(clip))
    first = engine.generate([path, "what?"], cache=True, **SMALL)
    assert counted == [9000]
    for form in (
        wav(clip),
        Audio(clip, sample_rate=16_000),
        Audio(np.concatenate([clip, clip]), 0, 9000 / 16_000, sample_rate=16_000),
    ):
        again = engine.generate([form, "and this?"], **SMALL)
        assert counted == [9000]
    assert again.usage.by_modality["audio"] == first.usage.by_modality["audio"]
    engine.generate([path, "what?"], cache=False, **SMALL)
    assert counted == [9000, 9000]


def test_other_sounds_of_the_same_length_share_nothing(engine):
    """The same prompt but for the sound: neither soft tokens nor states are taken from the one before."""
    clips = [Audio(speechlike(16_000, seed=seed), sample_rate=16_000) for seed in (1, 2)]
    cold = [engine.generate([clip, "what is this?"], cache=False, **SMALL) for clip in clips]
    for _ in range(2):
        for clip, expected in zip(clips, cold, strict=True):
            warm = engine.generate([clip, "what is this?"], **SMALL)
            assert warm.token_ids == expected.token_ids
    assert warm.usage.cached_tokens == warm.usage.prompt_tokens


@pytest.mark.parametrize("family", ["gemma4_audio", "gemma4_unified"])
def test_warm_answers_equal_cold_ones(tiny_model, family):
    """A conversation that grows by a sound and a picture: logits with and without what was kept."""
    photo, clip = formula_picture(60, 90), Audio(CLIP, sample_rate=16_000)
    with Engine(tiny_model(family).bundle, threads=1) as engine:
        turns: list[Turn] = []
        for parts in ([clip, "what?"], [photo, "and this?"], ["once more", clip]):
            turns.append(Turn("user", parts))
            warm, cold = (engine.generate(turns, cache=cache, **SMALL) for cache in (True, False))
            assert warm.token_ids == cold.token_ids
            turns.append(Turn.of(warm))
        assert warm.usage.cached_tokens > 0


def test_encoded_sounds(engine, unified, counted):
    seen = engine.encode(Audio(CLIP, sample_rate=16_000))
    assert isinstance(seen, EncodedSound)
    assert (len(seen), seen.seconds, seen.soft_tokens.shape) == (25, 1.0, (25, 64))
    heard = len(counted)
    direct = engine.prompt_logits([Audio(CLIP, sample_rate=16_000), "what?"])
    np.testing.assert_array_equal(engine.prompt_logits([seen, "what?"]), direct)
    assert len(counted) == heard
    with pytest.raises(InputError, match="audio 1 was encoded by another bundle"):
        unified.count_tokens([seen])
    with pytest.raises(InputError, match="a sound as Audio"):
        engine.encode(wav(CLIP))
    by_hand = EncodedSound(seen.soft_tokens, 1.0, seen.bundle)
    np.testing.assert_array_equal(engine.prompt_logits([by_hand, "what?"]), direct)


def test_chats_keep_sounds_encoded(engine, tmp_path, counted):
    path = tmp_path / "a.wav"
    path.write_bytes(wav((speechlike(7000, seed=9) * 32768).round() / np.float32(32768)))
    chat = engine.chat(max_tokens=4, sampling=GREEDY)
    chat.send([path, "what?"])
    path.unlink()
    heard = len(counted)
    reply = chat.send("and now?")
    assert len(counted) == heard
    [first, *_] = chat.history
    assert [type(part) for part in first.parts] == [EncodedSound, Text]
    assert reply.usage.by_modality["audio"] == 11
    expected = engine.generate(
        [*chat.history[:2], Turn("user", "and now?")], max_tokens=4, sampling=GREEDY, cache=False
    )
    assert reply.token_ids == expected.token_ids


def test_soft_tokens_on_disk(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("gemma4_audio")
    for attempt in range(2):
        with Engine(model.bundle, threads=1, feature_cache_dir=tmp_path) as engine:
            if attempt:
                monkeypatch.setattr(type(engine.runtime), "hear", None)
            engine.generate([Audio(CLIP, sample_rate=16_000), "what?"], **SMALL)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("chunk", [1, 7, 30, 512])
def test_prompts_are_cut_inside_sounds_and_not_inside_pictures(unified, chunk):
    conversation = ["hello", Audio(CLIP, sample_rate=16_000), formula_picture(60, 90), "The"]
    whole = unified.prompt_logits(conversation, image_tokens=70)[-1]
    reply = unified.generate(conversation, prefill_chunk=chunk, cache=False, logprobs=1, **SMALL)
    assert reply.token_ids[0] == int(whole.argmax())


def test_a_picture_next_to_a_sound_is_a_block_of_its_own(unified):
    """Without a token between them; only the picture's rows see later ones."""
    ids = [2, 100, *[unified_id(unified, "<|audio|>")] * 5, *[unified_id(unified, "<|image|>")] * 6, 101]
    rng = np.random.default_rng(0)
    heard, seen = (rng.normal(size=(count, 64)).astype(np.float32) for count in (5, 6))
    blocks = [SoftTokens(2, heard, seen=False), SoftTokens(7, seen)]
    found = unified.runtime.session().prompt_logits(np.array(ids), blocks)
    weights, config = reference_model.load_checkpoint(unified.bundle.folder.parent / "checkpoint")
    expected = reference_gemma4_large.logits(weights, config, ids, [heard, seen])
    assert np.abs(found - expected).max() < 1e-3


def unified_id(engine: Engine, token: str) -> int:
    identifier = load_tokenizer(engine.bundle.path("tokenizer"), ()).token_to_id(token)
    assert identifier is not None
    return identifier


# --- the command line


def test_run_takes_sounds(siglance, engine, tmp_path):
    path = tmp_path / "clip.flac"
    path.write_bytes(encoded("flac", [tone(1.0, 48_000)] * 2))
    folder = engine.bundle.folder
    code, out, err = siglance("run", folder, "-i", path, "-p", "what?", "--max-tokens", 6)
    assert code == 0
    assert out == engine.generate([path, "what?"], **SMALL).text + "\n"
    assert "(0 of pictures, 25 of sounds)" in err
    assert "audio " in err
    code, out, _ = siglance("run", folder, "-i", path, "-p", "what?", "--max-tokens", 6, "--json")
    reply = json.loads(out)
    assert reply["usage"]["by_modality"]["audio"] == 25
    assert reply["timings_ms"]["audio"] > 0
    assert set(reply["providers"]) == {"vision", "audio", "embed", "decoder"}
    code, out, _ = siglance("count-tokens", folder, "-i", path, "-p", "what?", "--json")
    assert (code, json.loads(out)["audio"]) == (0, 25)


def test_the_command_line_refuses_sounds_in_one_line(siglance, engine, tmp_path):
    path = tmp_path / "long.wav"
    path.write_bytes(wav(np.zeros(16_000 * 31, np.float32)))
    for arguments, reason in (
        (("-i", path), r"audio 1 (long.wav): longer than 30 s"),
        (("-i", f"{path}@70"), "audio 1: a sound has no token budget"),
        (("-i", path, "--limit", "bytes=1000"), "over the limit of 1000 bytes"),
        (("-i", path, "--limit", "audio_seconds=0.001"), "not decoded after 0.001 seconds"),
    ):
        code, out, err = siglance("run", engine.bundle.folder, *arguments, "-p", "x")
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert reason in err


def test_a_part_of_a_sound_on_the_command_line(siglance, engine, tmp_path):
    path = tmp_path / "long.wav"
    path.write_bytes(wav(np.zeros(16_000 * 31, np.float32)))
    code, out, _ = siglance("count-tokens", engine.bundle.folder, "-i", path, "--start", 2, "--end", 4, "--json")
    assert (code, json.loads(out)["audio"]) == (0, 50)
    code, _, err = siglance("count-tokens", engine.bundle.folder, "-i", path, "--fps", 2)
    assert (code, "--fps 2: none of the files is a video\n" in err) == (1, True)


def test_inspect_shows_ears(siglance, engine):
    code, out, _ = siglance("inspect", engine.bundle.folder, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["longest_sound_seconds"] == 30
    assert facts["graphs"]["audio"]["inputs"] == {"waveform": "float32 [samples]"}


def test_verify_replays_a_sound(siglance, engine):
    code, out, _ = siglance("verify", engine.bundle.folder, "--json")
    assert code == 0
    assert [case["name"] for case in json.loads(out)["cases"]] == ["text", "image", "audio"]
