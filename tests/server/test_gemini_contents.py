"""What a Gemini request says: contents, parts and media, without HTTP. Case numbers are public bug reports."""

from __future__ import annotations

import base64
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine import Audio, Image, Pdf, Text, Thought, ToolCall, ToolResult, Video
from siglance.engine.manifest import VideoFacts
from siglance.engine.server.failures import Failure
from siglance.engine.server.gemini.contents import _Calls
from siglance.engine.server.gemini.media import budget

from .gemini_bodies import HI, refusal, request_of

DATA = b"\xff\xfe\x00some bytes\xfb"


@pytest.fixture(scope="module")
def manifest(demo):
    return demo.manifest


def parts(manifest, *listed, role="user", **options):
    """The parts of the only turn of a request with these parts."""
    [turn] = request_of({"contents": [{"role": role, "parts": list(listed)}]}, manifest, **options).conversation
    return turn.parts


def blob(mime, **more):
    return {"inlineData": {"mimeType": mime, "data": base64.b64encode(DATA).decode()}, **more}


# --- parts


def test_the_order_of_parts_is_kept(manifest):
    """Case 68."""
    read = parts(manifest, {"text": "a"}, blob("image/png"), {"text": "b"}, blob("image/jpeg"), {"text": ""})
    assert [type(part) for part in read] == [Text, Image, Text, Image, Text]
    assert read[1].source == read[3].source == DATA


def test_every_kind_of_medium(manifest):
    image, pdf, video, sound, raw, words = parts(
        manifest,
        blob("image/webp"),
        blob("application/pdf"),
        blob("video/mp4"),
        blob("audio/mp3"),
        blob("audio/L16; codec=pcm; rate=24000"),
        {"inlineData": {"mimeType": "text/plain", "data": base64.b64encode("é".encode()).decode()}},
    )
    assert (type(image), type(pdf), type(video), type(sound), type(raw)) == (Image, Pdf, Video, Audio, Audio)
    assert (sound.sample_rate, raw.sample_rate) == (None, 24_000)
    assert words == Text("é")
    assert parts(manifest, blob("audio/pcm"))[0].sample_rate == 16_000


def test_both_alphabets_of_base64(manifest):
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(DATA).decode()
        for data in (text, text.rstrip("=")):
            [part] = parts(manifest, {"inlineData": {"mimeType": "image/png", "data": data}})
            assert part.source == DATA


def test_the_part_of_a_video(manifest):
    metadata = {"startOffset": "1.5s", "end_offset": {"seconds": 3, "nanos": 250_000_000}, "fps": 0.5}
    [video] = parts(manifest, blob("video/mp4", videoMetadata=metadata))
    assert (video.start, video.end, video.fps, video.tokens) == (1.5, 3.25, 0.5, None)
    [video] = parts(manifest, blob("video/mp4", videoMetadata={}))
    assert (video.start, video.end, video.fps) == (None, None, None)


def test_files_of_folders_that_are_allowed(manifest, tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    uri = (tmp_path / "a").as_uri()
    [image, anything] = parts(
        manifest,
        {"fileData": {"mimeType": "image/png", "fileUri": uri}},
        {"file_data": {"file_uri": uri}},
        allow_dirs=(tmp_path,),
    )
    assert image.source == anything.source == DATA
    with pytest.raises(Failure, match="files are not read") as caught:
        parts(manifest, {"fileData": {"mimeType": "image/png", "fileUri": uri}})
    assert (caught.value.status, caught.value.field) == (403, "contents[0].parts[0].fileData.fileUri")


LEVELS = {"LOW": 9, "MEDIUM": 16, "HIGH": 25, "ULTRA_HIGH": 36, "UNSPECIFIED": None}


@pytest.mark.parametrize(("level", "tokens"), LEVELS.items())
def test_levels_of_media_resolution(manifest, level, tokens):
    facts = dataclasses.replace(manifest.image, default_budget=16)
    video = VideoFacts(budgets=(70, 140), default_budget=70, fps=1.0)
    known = dataclasses.replace(manifest, image=facts, video=video)
    name = f"MEDIA_RESOLUTION_{level}"
    own = {"mediaResolution": {"level": name}}
    image, pdf, clip = parts(known, blob("image/png", **own), blob("application/pdf", **own), blob("video/mp4", **own))
    assert (image.tokens, pdf.tokens) == (tokens, tokens)
    assert clip.tokens == {"LOW": 70, "MEDIUM": 70, "HIGH": 140, "ULTRA_HIGH": 140}.get(level)
    if level != "ULTRA_HIGH":  # which Google has for single parts only
        body = {"contents": [{"parts": [blob("image/png"), blob("image/png", mediaResolution={"numTokens": 36})]}]}
        [turn] = request_of(body | {"generationConfig": {"mediaResolution": name}}, known).conversation
        assert [part.tokens for part in turn.parts] == [tokens, 36]
    assert budget(dataclasses.replace(manifest, image=None), "image", name) is None


WRONG_PARTS = {
    "contents[0].parts[0] has no data": {},
    "contents[0].parts[0].executableCode is not known": {"executableCode": {}},
    "contents[0].parts[0].inlineData and text exclude each other": {"text": "", "inlineData": {}},
    "contents[0].parts[0].inlineData.data is missing": {"inlineData": {"mimeType": "image/png"}},
    "contents[0].parts[0].inlineData.mimeType is missing": {"inlineData": {"data": "AAAA"}},
    "contents[0].parts[0].inlineData.data is not base64": {"inlineData": {"mimeType": "image/png", "data": "*"}},
    "contents[0].parts[0].inlineData.data is empty": {"inlineData": {"mimeType": "image/png", "data": ""}},
    "contents[0].parts[0].inlineData.mimeType is 'image', which is no media type": blob("image"),
    "mimeType is 'image/png,x', which is no media type": blob("image/png,x"),
    "expected one of image/*, application/pdf, video/*, audio/*, text/*": blob("application/zip"),
    "contents[0].parts[0].inlineData is not UTF-8 at byte 0": blob("text/plain"),
    "contents[0].parts[0].inlineData.displayName is 1, expected a text": {
        "inlineData": {"mimeType": "image/png", "data": "AAAA", "displayName": 1}
    },
    "videoMetadata goes with a video, not with image/png": blob("image/png", videoMetadata={}),
    "videoMetadata.startOffset is '1.5', expected seconds such as '1.5s'": blob(
        "video/mp4", videoMetadata={"startOffset": "1.5"}
    ),
    "videoMetadata.fps is 0, it must be above 0 and at most 24": blob("video/mp4", videoMetadata={"fps": 0}),
    "videoMetadata.fps is 24.5, it must be between 0 and 24": blob("video/mp4", videoMetadata={"fps": 24.5}),
    "videoMetadata.contentLayers is not known": blob("video/mp4", videoMetadata={"contentLayers": []}),
    "contents[0].parts[0].videoMetadata is not known": {"text": "a", "videoMetadata": {}},
    "mediaResolution goes with what is seen": blob("audio/wav", mediaResolution={"numTokens": 9}),
    "mediaResolution.numTokens and level exclude each other": blob(
        "image/png", mediaResolution={"numTokens": 9, "level": "MEDIA_RESOLUTION_LOW"}
    ),
    "mediaResolution.numTokens is 0, it must be at least 1": blob("image/png", mediaResolution={"numTokens": 0}),
    "mediaResolution.level is 'LOW', expected one of": blob("image/png", mediaResolution={"level": "LOW"}),
    "thought is true, but only the model has thoughts": {"text": "a", "thought": True},
    "thought is true, but a thought is text": blob("image/png", thought=True),
    "contents[0].parts[0].thoughtSignature is not known": {"text": "a", "thoughtSignature": "AAAA"},
    "functionCall does not go with the role of contents[0]": {"functionCall": {"name": "f"}},
    "functionResponse answers no call of the turn before it: 'f'": {"functionResponse": {"name": "f", "response": {}}},
    "functionResponse.name is missing": {"functionResponse": {"response": {}}},
    "functionResponse.response is missing": {"functionResponse": {"name": "f"}},
    "functionResponse.willContinue is not known": {
        "functionResponse": {"name": "f", "response": {}, "willContinue": True}
    },
}


@pytest.mark.parametrize("message", WRONG_PARTS)
def test_parts_that_are_refused(manifest, message):
    failure = refusal({"contents": [{"parts": [WRONG_PARTS[message]]}]}, manifest)
    assert message in failure.message
    assert failure.field.startswith("contents[0].parts[0]")
    assert len(failure.message) < 300


# --- contents


def test_forms_of_contents(manifest):
    """A single object for a list of one, roles in any case, roles left out; both spellings."""
    expected = request_of(HI, manifest).conversation
    for contents in (
        {"role": "user", "parts": {"text": "hi"}},
        [{"role": "USER", "parts": [{"text": "hi"}]}],
        [{"parts": [{"text": "hi"}]}],
        [{"role": "", "parts": [{"text": "hi"}]}],
    ):
        [turn] = request_of({"contents": contents}, manifest).conversation
        assert (turn.role, turn.parts) == (expected[0].role, expected[0].parts) == ("user", [Text("hi")])


@pytest.mark.parametrize(
    ("instruction", "system"),
    [
        ("be brief", "be brief"),
        ("", ""),
        ({"parts": {"text": "be brief"}}, "be brief"),
        ({"role": "user", "parts": [{"text": "a"}, {"text": "b"}]}, "a\n\nb"),
        ({"parts": []}, ""),
        (None, None),
    ],
)
def test_system_instruction(manifest, instruction, system):
    for name in ("systemInstruction", "system_instruction"):
        assert request_of(HI | {name: instruction}, manifest).system == system


def test_calls_and_results(manifest):
    """By name and order, or by id; results are turns of their own, in the order of their calls."""
    call = [{"functionCall": {"id": id, "name": "f", "args": {"n": n}}} for id, n in (("x", 1), ("y", 2))]
    answers = [{"functionResponse": {"id": id, "name": "f", "response": {"of": id}}} for id in ("y", "x")]
    body = {
        "contents": [
            {"role": "user", "parts": [{"text": "hi"}]},
            {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": "so"}, *call]},
            {"role": "user", "parts": [*answers, {"text": "and?"}]},
        ]
    }
    turns = request_of(body, manifest).conversation
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "user"]
    assert turns[1].parts == [Thought("hm"), Text("so"), ToolCall("f", {"n": 1}), ToolCall("f", {"n": 2})]
    assert turns[2].parts == [ToolResult("f", {"of": "x"}), ToolResult("f", {"of": "y"})]
    assert turns[3].parts == [Text("and?")]
    apart = [{"role": "function", "parts": [answer]} for answer in answers]
    body["contents"][2:] = apart
    assert request_of(body, manifest).conversation[2].parts == turns[2].parts
    for answer in answers:
        del answer["functionResponse"]["id"]
    assert request_of(body, manifest).conversation[2].parts == [
        ToolResult("f", {"of": "y"}),
        ToolResult("f", {"of": "x"}),
    ]


def test_results_that_answer_nothing(manifest):
    call = {"role": "model", "parts": [{"functionCall": {"id": "x", "name": "f"}}]}
    for response in ({"name": "g"}, {"name": "f", "id": "z"}, {"name": "g", "id": "x"}):
        answer = {"functionResponse": response | {"response": {}}}
        failure = refusal({"contents": [HI["contents"][0], call, {"role": "user", "parts": [answer]}]}, manifest)
        assert failure.field == "contents[2].parts[0].functionResponse"
    twice = {"functionResponse": {"name": "f", "response": {}}}
    failure = refusal({"contents": [HI["contents"][0], call, {"role": "user", "parts": [twice, twice]}]}, manifest)
    assert failure.field == "contents[2].parts[1].functionResponse"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, "x", "y"]), st.sampled_from("fg")), max_size=6),
    st.lists(st.tuples(st.sampled_from([None, "x", "y"]), st.sampled_from("fg")), max_size=8),
)
def test_law_a_result_answers_the_first_call_that_fits(calls, results):
    """Of those that still wait: of its name, and of its id if it has one."""
    waiting, known = dict(enumerate(calls)), _Calls()
    for id, name in calls:
        known.add(id, name)
    for id, name in results:
        fits = [place for place, call in waiting.items() if call[1] == name and id in (None, call[0])]
        expected = min(fits, default=None)
        assert known.take(id, name) == expected
        waiting.pop(expected, None)
