"""Google's client against our server: each test is a row of the client matrix, its parameter a column."""

from __future__ import annotations

import enum
import io
import json
import math

import pydantic
import pytest
from google.genai import errors, types
from PIL import Image as PillowImage

from siglance.engine import Image, Pdf, Sampling, Text, Turn

from ..pdf_files import numbered_pages
from ..scripted import picture
from .google_clients import COLUMNS, connected

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=COLUMNS)
def client(request, server):
    with connected(server.url, request.param) as client:
        yield client


@pytest.fixture(scope="module")
def png() -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(picture()).save(file, "png")
    return file.getvalue()


def said(demo, *parts, **options) -> str:
    """What the engine says itself."""
    return demo.generate([Turn("user", list(parts))], sampling=GREEDY, **options).text


def test_generate_content(client, demo):
    response = client.generate("describe")
    assert response.text == said(demo, Text("describe"))
    [candidate] = response.candidates
    assert candidate.finish_reason is types.FinishReason.STOP
    assert candidate.content.role == "model"
    assert candidate.index == 0
    assert response.model_version == "demo"
    assert response.response_id
    if client.vertex:  # elsewhere the client drops it
        assert response.create_time is not None


def test_usage(client, demo):
    usage = client.generate(["describe", types.Part.from_bytes(data=b"some words", mime_type="text/plain")])
    usage = usage.usage_metadata
    reply = demo.generate([Turn("user", [Text("describe"), Text("some words")])], sampling=GREEDY)
    assert usage.prompt_token_count == reply.usage.prompt_tokens
    assert usage.candidates_token_count == reply.usage.completion_tokens
    assert usage.total_token_count == reply.usage.prompt_tokens + reply.usage.completion_tokens
    [detail] = usage.prompt_tokens_details
    assert (detail.modality, detail.token_count) == (types.MediaModality.TEXT, reply.usage.prompt_tokens)


def test_stream(client, demo):
    *chunks, last = client.stream("describe")
    assert len(chunks) > 1
    assert "".join(chunk.text for chunk in [*chunks, last]) == said(demo, Text("describe"))
    assert [chunk.candidates[0].finish_reason for chunk in chunks] == [None] * len(chunks)
    assert last.candidates[0].finish_reason is types.FinishReason.STOP
    assert last.usage_metadata.candidates_token_count > 1
    assert len({chunk.response_id for chunk in [*chunks, last]}) == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_chat(client, demo, png, streamed):
    first = [types.Part.from_bytes(data=png, mime_type="image/png"), "describe"]
    texts, history = client.chat(first, "count", streamed=streamed)
    asked = [Turn("user", [Image(png), Text("describe")])]
    answered = demo.generate(asked, sampling=GREEDY)
    again = demo.generate([*asked, Turn.of(answered), Turn("user", [Text("count")])], sampling=GREEDY)
    assert texts == [answered.text, again.text]
    assert [content.role for content in history if content.parts[0].text != ""][:2] == ["user", "model"]
    assert "".join(part.text or "" for content in history if content.role == "model" for part in content.parts) == (
        answered.text + again.text
    )


def test_count_tokens(client, demo, png):
    contents = [types.Part.from_bytes(data=png, mime_type="image/png"), "describe"]
    counted = client.call("count_tokens", model="demo", contents=contents)
    assert counted.total_tokens == demo.count_tokens([Image(png), Text("describe")])["total"]


def test_count_tokens_with_system_instruction(client, demo):
    if not client.vertex:
        with pytest.raises(ValueError, match="system_instruction"):  # the client itself knows it for Vertex AI only
            client.call("count_tokens", model="demo", contents="hi", config={"system_instruction": "be brief"})
        return
    counted = client.call("count_tokens", model="demo", contents="hi", config={"system_instruction": "be brief"})
    assert counted.total_tokens == demo.count_tokens([Text("hi")], system="be brief")["total"]


@pytest.mark.parametrize("form", ["bytes", "pillow"])
def test_image(client, demo, png, form):
    part = types.Part.from_bytes(data=png, mime_type="image/png")
    if form == "pillow":
        part = PillowImage.fromarray(picture())
    response = client.generate([part, "describe"])
    if form == "bytes":  # the client packs pictures of Pillow itself, as it likes
        assert response.text == said(demo, Image(png), Text("describe"))
    seen = {one.modality: one.token_count for one in response.usage_metadata.prompt_tokens_details}
    assert seen[types.MediaModality.IMAGE] == demo.count_tokens([Image(png), Text("describe")])["image"]


def test_image_tokens_of_one_part(client, demo, png):
    part = types.Part(
        inline_data=types.Blob(data=png, mime_type="image/png"),
        media_resolution=types.PartMediaResolution(num_tokens=9),
    )
    usage = client.generate([part, "describe"]).usage_metadata
    seen = {one.modality: one.token_count for one in usage.prompt_tokens_details}
    assert seen[types.MediaModality.IMAGE] == demo.count_tokens([Image(png, tokens=9), Text("describe")])["image"]


def test_media_resolution(client, demo, png):
    part = types.Part.from_bytes(data=png, mime_type="image/png")
    usage = client.generate([part, "describe"], media_resolution="MEDIA_RESOLUTION_LOW").usage_metadata
    seen = {one.modality: one.token_count for one in usage.prompt_tokens_details}
    assert seen[types.MediaModality.IMAGE] == demo.count_tokens([Image(png, tokens=9), Text("describe")])["image"]


def test_pdf(client, demo):
    document = numbered_pages(2)
    response = client.generate([types.Part.from_bytes(data=document, mime_type="application/pdf"), "describe"])
    assert response.text == said(demo, Pdf(document), Text("describe"))
    seen = {one.modality: one.token_count for one in response.usage_metadata.prompt_tokens_details}
    counted = demo.count_tokens([Pdf(document), Text("describe")])
    assert seen[types.MediaModality.DOCUMENT] == counted["document"]


def test_system_instruction(client, demo):
    config = {"system_instruction": "Count everything."}
    assert client.generate("describe", **config).text == said(demo, Text("describe"), system="Count everything.")


class Thing(pydantic.BaseModel):
    count: int = pydantic.Field(ge=0, le=9)
    colour: str | None = pydantic.Field(max_length=8)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue and green"


JSON = {"response_mime_type": "application/json", "max_output_tokens": 60}


def test_json_schema_of_a_pydantic_model(client):
    response = client.generate("describe", response_schema=Thing, **JSON)
    assert isinstance(response.parsed, Thing)
    assert list(json.loads(response.text)) == ["count", "colour"]


def test_json_schema_of_a_list(client):
    response = client.generate("describe", response_schema=list[Colour], **JSON)
    assert all(isinstance(item, Colour) for item in response.parsed)


def test_json_schema_as_it_is(client):
    response = client.generate("describe", response_json_schema={"type": "array", "items": {"type": "null"}}, **JSON)
    assert set(json.loads(response.text)) <= {None}


def test_json_without_a_schema(client):
    response = client.generate("detect all", **JSON | {"max_output_tokens": 200})
    json.loads(response.text)


def test_json_that_is_cut(client):
    """Case 70: what is there is returned."""
    response = client.generate("describe", response_schema=Thing, **JSON | {"max_output_tokens": 3})
    assert '{"count": '.startswith(response.text)
    assert response.text
    assert response.parsed is None
    assert response.candidates[0].finish_reason is types.FinishReason.MAX_TOKENS


def test_enum(client):
    response = client.generate("describe", response_schema=Colour, response_mime_type="text/x.enum")
    assert response.parsed in Colour
    assert response.text == response.parsed.value


def test_logprobs(client):
    response = client.generate("describe", response_logprobs=True, logprobs=3)
    [candidate] = response.candidates
    result = candidate.logprobs_result
    assert "".join(chosen.token for chosen in result.chosen_candidates) == response.text
    assert all(len(place.candidates) == 3 for place in result.top_candidates)
    tops = [place.candidates[0].token_id for place in result.top_candidates]
    assert [chosen.token_id for chosen in result.chosen_candidates] == tops  # greedy
    total = sum(chosen.log_probability for chosen in result.chosen_candidates)
    assert math.isclose(candidate.avg_logprobs, total / len(tops))
    assert math.isclose(result.log_probability_sum, total)
    assert candidate.token_count == len(tops)


def test_seed_and_sampling(client, demo):
    options = {"temperature": 1.5, "top_p": 0.99, "top_k": 40, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    texts = [client.generate("detect all", seed=seed, **options, max_output_tokens=30).text for seed in (5, 5, 6)]
    reply = demo.generate([Turn("user", [Text("detect all")])], sampling=Sampling(**options, seed=5), max_tokens=30)
    assert texts[0] == texts[1] == reply.text
    assert texts[2] != texts[0]


def test_candidates(client, demo):
    options = {"temperature": 1.5, "seed": 3}
    response = client.generate("describe", candidate_count=3, max_output_tokens=6, **options)
    reply = demo.generate([Turn("user", [Text("describe")])], sampling=Sampling(**options), max_tokens=6, candidates=3)
    assert [candidate.index for candidate in response.candidates] == [0, 1, 2]
    texts = ["".join(part.text for part in candidate.content.parts) for candidate in response.candidates]
    assert texts == [candidate.text for candidate in reply.candidates]
    streamed = ["", "", ""]
    for chunk in client.stream("describe", candidate_count=3, max_output_tokens=6, **options):
        for candidate in chunk.candidates:
            streamed[candidate.index] += "".join(part.text for part in candidate.content.parts)
    assert streamed == texts
    assert [candidate.finish_reason for candidate in chunk.candidates] == [
        candidate.finish_reason for candidate in response.candidates
    ]


def test_stop_sequences(client, demo):
    whole = said(demo, Text("describe"))
    word = whole.split()[1]
    response = client.generate("describe", stop_sequences=["no such text", word])
    assert response.text == whole[: whole.index(word)]
    assert response.candidates[0].finish_reason is types.FinishReason.STOP


def test_max_output_tokens(client):
    response = client.generate("describe", max_output_tokens=2)
    assert response.candidates[0].finish_reason is types.FinishReason.MAX_TOKENS
    assert response.usage_metadata.candidates_token_count == 2


def test_safety_settings(client):
    """There is no classifier: what would block is reported to have no effect, and nothing is rated."""
    settings = [types.SafetySetting(category="HARM_CATEGORY_HATE_SPEECH", threshold="BLOCK_ONLY_HIGH")]
    response = client.generate("describe", safety_settings=settings)
    assert (
        "BLOCK_ONLY_HIGH for HARM_CATEGORY_HATE_SPEECH has no effect" in response.prompt_feedback.block_reason_message
    )
    assert response.prompt_feedback.block_reason is None
    assert response.candidates[0].safety_ratings is None
    settings[0].threshold = types.HarmBlockThreshold.BLOCK_NONE
    assert client.generate("describe", safety_settings=settings).prompt_feedback is None


def test_models_list_and_get(client):
    prefix = "publishers/google/models" if client.vertex else "models"
    assert client.names(1) == [f"{prefix}/demo"]
    model = client.call("get", model="demo")
    assert model.name == f"{prefix}/demo"
    assert "text, image" in model.description
    if not client.vertex:
        assert model.input_token_limit == 2048
        assert "generateContent" in model.supported_actions
    assert client.call("get", model="default").name == model.name


@pytest.mark.parametrize(
    ("arguments", "code", "status", "message"),
    [
        ({"model": "nothing"}, 404, "NOT_FOUND", "no model 'nothing'"),
        (
            {"temperature": 3},
            400,
            "INVALID_ARGUMENT",
            "generationConfig.temperature is 3.0, it must be between 0 and 2",
        ),
        ({"cached_content": "cachedContents/1"}, 400, "INVALID_ARGUMENT", "cachedContent is not known"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_errors(client, arguments, code, status, message, streamed):
    with pytest.raises(errors.ClientError, match=message) as caught:
        (client.stream if streamed else client.generate)("describe", **arguments)
    assert (caught.value.code, caught.value.status) == (code, status)


def test_remote_files_are_refused(client):
    part = types.Part.from_uri(file_uri="https://example.com/a.png", mime_type="image/png")
    with pytest.raises(errors.ClientError, match=r"contents\[0\].parts\[0\].fileData") as caught:
        client.generate([part, "describe"])
    assert (caught.value.code, caught.value.status) == (403, "PERMISSION_DENIED")
