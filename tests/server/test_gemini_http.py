"""The paths of the Gemini API and of Vertex AI, as anyone may ask them. Case numbers are public bug reports."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading

import pytest
from google import genai
from google.genai import types
from google.oauth2.credentials import Credentials
from PIL import Image as PillowImage

from siglance.engine import Engine, Image, Sampling, Text, Turn
from siglance.engine.server.failures import Failure
from siglance.engine.server.gemini.replies import error_json
from siglance.engine.server.gemini.routes import owns
from siglance.engine.server.settings import Settings

from ..scripted import picture, scripted
from .gemini_bodies import HI
from .running import serving

DESCRIBE = {"contents": [{"parts": [{"text": "describe"}]}]}
BETA = "/v1beta/models/demo"
PROJECT = "/projects/my-project/locations/here/publishers/google/models/demo"
PLACES = [
    *("/v1beta/models/demo", "/v1/models/demo", "/v1alpha/models/demo", "/v1beta/models/default"),
    *(f"{version}{place}" for version in ("/v1", "/v1beta1") for place in (PROJECT, "/publishers/google/models/demo")),
]


@pytest.fixture(scope="module")
def png() -> str:
    file = io.BytesIO()
    PillowImage.fromarray(picture()).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def answer(demo) -> str:
    return demo.generate([Turn("user", [Text("describe")])], sampling=Sampling(temperature=0)).text


def text_of(*replies) -> str:
    return "".join(part["text"] for reply in replies for part in reply["candidates"][0]["content"]["parts"])


def events_of(body: bytes) -> list:
    *events, end = body.decode("ascii").split("\r\n\r\n")
    assert end == ""
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def ids_of(engine, text: str) -> list[int]:
    return engine._tokenizer.encode(text, add_special_tokens=False).ids


def error_of(answer, status: int):
    """The error of an answer, which has Google's form."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error["code"] == status
    return error


# --- paths


@pytest.mark.parametrize("place", PLACES)
def test_every_path_answers(server, answer, place):
    reply = server.post(f"{place}:generateContent", DESCRIBE).json()
    assert text_of(reply) == answer
    assert reply["modelVersion"] == "demo"
    assert text_of(*server.post(f"{place}:streamGenerateContent", DESCRIBE).json()) == answer
    assert text_of(*events_of(server.post(f"{place}:streamGenerateContent?alt=sse", DESCRIBE).body)) == answer
    assert server.post(f"{place}:countTokens", DESCRIBE).json()["totalTokens"] == 10


def test_whose_paths_are_whose():
    """The two APIs meet in /v1/models: OpenAI has it, and Google what is below it with a verb."""
    for path in (
        "/v1alpha",
        "/v1beta",
        "/v1beta/x",
        "/v1beta1/models",
        "/v1/models/demo:x",
        "/v1/projects/p",
        "/v1/publishers",
    ):
        assert owns(path)
    for path in (
        "/v1/models",
        "/v1/models/demo",
        "/v1/chat/completions",
        "/v1",
        "/v1beta2/x",
        "/health",
        "/v1/vlm/a/b:c",
    ):
        assert not owns(path)


def test_models_for_clients_of_both_apis(server):
    """Google's clients say that they are Google's."""
    assert server.get("/v1/models").json()["object"] == "list"
    assert server.get("/v1/models/demo").json()["object"] == "model"
    for header in ({"x_goog_api_key": "any"}, {"x_goog_api_client": "google-genai-sdk/3.6.1"}):
        assert server.get("/v1/models", **header).json() == server.get("/v1beta/models").json()
        assert server.get("/v1/models/demo", **header).json()["name"] == "models/demo"
        assert error_of(server.get("/v1/models/nothing", **header), 404)["status"] == "NOT_FOUND"


def test_pages_of_models(demo):
    with serving(dict.fromkeys(("a", "b", "c"), demo)) as server:
        for path, listed in (("/v1beta/models", "models"), ("/v1beta1/publishers/google/models", "publisherModels")):
            names, token = [], ""
            for _ in range(2):
                page = server.get(f"{path}?pageSize=2&pageToken={token}").json()
                names += [model["name"].rpartition("/")[2] for model in page[listed]]
                token = page.get("nextPageToken")
            assert (names, token) == (["a", "b", "c"], None)
            for query in (
                "pageSize=-1",
                "pageSize=x",
                "pageToken=4",
                "pageToken=zz",
                "page=1",
                "pageSize=1&pageSize=2",
            ):
                assert error_of(server.get(f"{path}?{query}"), 400)["status"] == "INVALID_ARGUMENT"
            assert len(server.get(f"{path}?pageSize=0").json()[listed]) == 3


def test_vertex_without_googles_credentials(server, answer):
    """Ways to point Google's client at a server of one's own in Vertex mode: any token, a key, or a whole path."""
    place = f"{server.url}/v1beta1/projects/p/locations/l"
    for arguments, options in (
        ({"project": "p", "location": "l", "credentials": Credentials("any")}, {"base_url": server.url}),
        ({"api_key": "any"}, {"base_url": server.url}),
        ({}, {"base_url": place, "base_url_resource_scope": types.ResourceScope.COLLECTION}),
    ):
        with genai.Client(vertexai=True, http_options=types.HttpOptions(**options), **arguments) as client:
            assert client.models.generate_content(model="demo", contents="describe").text == answer


# --- spellings


def test_both_spellings(server, demo, png):
    snake = {
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"inline_data": {"mime_type": "image/png", "data": png}, "media_resolution": {"num_tokens": 9}},
                    {"text": "describe"},
                ],
            }
        ],
        "system_instruction": {"parts": [{"text": "Look."}]},
        "generation_config": {"max_output_tokens": 3, "response_logprobs": True, "stop_sequences": ["no such"]},
        "safety_settings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}],
    }
    camel = {
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"inlineData": {"mimeType": "image/png", "data": png}, "mediaResolution": {"numTokens": 9}},
                    {"text": "describe"},
                ],
            }
        ],
        "systemInstruction": "Look.",
        "generationConfig": {"maxOutputTokens": 3, "responseLogprobs": True, "stopSequences": ["no such"]},
        "safetySettings": {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"},
    }
    # The first one fills the cache, with which log-probabilities are rounded differently.
    _, *replies = [server.post(f"{BETA}:generateContent", body).json() for body in (snake, snake, camel)]
    for reply in replies:
        assert reply.pop("responseId")
        assert reply.pop("createTime").endswith("Z")
        reply["usageMetadata"].pop("cachedContentTokenCount", None)
    assert replies[0] == replies[1]
    parts = [Image(base64.b64decode(png), tokens=9), Text("describe")]
    counts = demo.count_tokens([Turn("user", parts)], system="Look.")
    assert replies[0]["usageMetadata"]["promptTokensDetails"] == [
        {"modality": name.upper(), "tokenCount": count} for name, count in counts.items() if name != "total"
    ]
    [candidate] = replies[0]["candidates"]
    assert "topCandidates" not in candidate["logprobsResult"]
    assert len(candidate["logprobsResult"]["chosenCandidates"]) == 3


def test_what_was_cached_is_reported(server):
    body = {"contents": [{"parts": [{"text": "describe the same thing twice"}]}]}
    usages = [server.post(f"{BETA}:generateContent", body).json()["usageMetadata"] for _ in range(2)]
    assert 0 < usages[1]["cachedContentTokenCount"] < usages[1]["promptTokenCount"]


# --- errors


def test_errors_name_the_field(server):
    body = DESCRIBE | {"generation_config": {"top_k": 1.5}}
    error = error_of(server.post(f"{BETA}:generateContent", body), 400)
    assert error["status"] == "INVALID_ARGUMENT"
    [detail] = error["details"]
    assert detail["@type"] == "type.googleapis.com/google.rpc.BadRequest"
    assert detail["fieldViolations"] == [{"field": "generation_config.top_k", "description": error["message"]}]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "name"),
    [
        ("POST", "/v1beta/models/nothing:generateContent", HI, 404, "NOT_FOUND"),
        ("POST", f"{BETA}:embedContent", HI, 404, "NOT_FOUND"),
        ("GET", "/v1beta/models/nothing", None, 404, "NOT_FOUND"),
        ("GET", "/v1beta1/publishers/google/models/nothing", None, 404, "NOT_FOUND"),
        ("GET", "/v1beta/files", None, 404, "NOT_FOUND"),
        ("POST", "/v1/projects/p/locations/l/publishers/other/models/demo:generateContent", HI, 404, "NOT_FOUND"),
        ("PUT", f"{BETA}:generateContent", HI, 405, "UNIMPLEMENTED"),
        ("POST", "/v1beta/models", HI, 405, "UNIMPLEMENTED"),
        ("POST", f"{BETA}:generateContent", b"{", 400, "INVALID_ARGUMENT"),
        ("POST", f"{BETA}:generateContent", [], 400, "INVALID_ARGUMENT"),
        ("POST", f"{BETA}:generateContent", {}, 400, "INVALID_ARGUMENT"),
        ("POST", f"{BETA}:generateContent?alt=sse", HI, 400, "INVALID_ARGUMENT"),
        ("POST", f"{BETA}:generateContent?fields=candidates", HI, 400, "INVALID_ARGUMENT"),
        ("POST", f"{BETA}:streamGenerateContent?alt=sse", {}, 400, "INVALID_ARGUMENT"),
        ("POST", f"{BETA}:countTokens", {}, 400, "INVALID_ARGUMENT"),
    ],
)
def test_errors(server, method, path, body, status, name):
    assert error_of(server.ask(method, path, body), status)["status"] == name


def test_other_types_of_bodies(server):
    error = error_of(server.post(f"{BETA}:generateContent", b"a=b", content_type="text/plain"), 415)
    assert error["status"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("status", "name"),
    [
        *((401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (429, "RESOURCE_EXHAUSTED"), (500, "INTERNAL")),
        *((503, "UNAVAILABLE"), (504, "DEADLINE_EXCEEDED"), (413, "INVALID_ARGUMENT"), (599, "INTERNAL")),
    ],
)
def test_names_of_statuses(status, name):
    error = error_json(Failure(status, "so it is", retry_after=3))["error"]
    assert error == {
        "code": status,
        "message": "so it is",
        "status": name,
        "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3s"}],
    }


def test_keys(demo):
    with serving(demo, Settings(api_keys=("secret",))) as server:
        assert error_of(server.post(f"{BETA}:countTokens", HI), 401)["status"] == "UNAUTHENTICATED"
        assert server.post(f"{BETA}:countTokens?key=secret", HI).status == 200
        assert server.post(f"{BETA}:countTokens", HI, x_goog_api_key="secret").status == 200
        assert server.post(f"{BETA}:countTokens", HI, authorization="Bearer secret").status == 200


EMPTY = {
    "no contents": [],
    "no parts": [{"parts": []}],
    "an empty text": [{"parts": [{"text": ""}]}],
    "white space": [{"parts": [{"text": " "}]}],
    "the model alone": [{"role": "model", "parts": [{"text": "hi"}]}],
    "the model last": [*HI["contents"], {"role": "model", "parts": [{"text": "hi"}]}],
    "a call without its result": [
        *HI["contents"],
        {"role": "model", "parts": [{"functionCall": {"name": "f"}}]},
        *HI["contents"],
    ],
}


@pytest.mark.parametrize("contents", EMPTY.values(), ids=EMPTY)
def test_nothing_to_answer(server, contents):
    """Case 79."""
    for verb in ("generateContent", "countTokens"):
        error_of(server.post(f"{BETA}:{verb}", {"contents": contents}), 400)


def test_little_to_answer(server, png):
    """Case 79: legal all the same."""
    alone = {"contents": {"parts": {"inlineData": {"mimeType": "image/png", "data": png}}}}
    assert server.post(f"{BETA}:generateContent", alone).status == 200
    for instruction in ("", {"parts": []}, {"parts": [{"text": ""}]}):
        assert server.post(f"{BETA}:generateContent", DESCRIBE | {"systemInstruction": instruction}).status == 200
    most = DESCRIBE | {"generationConfig": {"maxOutputTokens": 10**9}}
    assert server.post(f"{BETA}:generateContent", most).json()["candidates"][0]["finishReason"] == "STOP"


def test_a_model_that_cannot_see(tiny_model, png):
    """Case 73: a picture is refused, never left out."""
    with Engine(tiny_model("gemma3").bundle, threads=1) as engine, serving({"blind": engine}) as server:
        assert "takes text" in server.get("/v1beta/models/blind").json()["description"]
        for mime in ("image/png", "application/pdf", "video/mp4", "audio/wav"):
            part = {"inlineData": {"mimeType": mime, "data": png}}
            body = {"contents": [{"parts": [part, {"text": "describe"}]}]}
            for verb in ("generateContent", "countTokens"):
                error = error_of(server.post(f"/v1beta/models/blind:{verb}", body), 400)
                assert "this bundle" in error["message"]


# --- streams


@pytest.mark.parametrize("query", ["", "?alt=sse"])
def test_pieces_are_sent_as_they_come(demo, query):
    """The first is there while the model waits for us."""
    double, runtime = scripted(demo, [*ids_of(demo, "one two three"), 1])
    go_on, logits = threading.Event(), runtime.logits

    def wait(run):
        if run == 2:
            assert go_on.wait(30)
        return logits(run)

    runtime.logits = wait
    with serving(double) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        body = json.dumps(DESCRIBE)
        connection.request("POST", f"{BETA}:streamGenerateContent{query}", body, {"content-type": "application/json"})
        response = connection.getresponse()
        begin = response.read1()
        assert b'"text"' in begin
        go_on.set()
        data = begin + response.read()
        pieces = events_of(data) if query else json.loads(data)
        connection.close()
        assert text_of(*pieces) == double.generate([Text("x")]).text
        assert pieces[-1]["candidates"][0]["finishReason"] == "STOP"


@pytest.mark.parametrize("query", ["", "?alt=sse"])
def test_a_client_that_leaves(demo, query):
    double, runtime = scripted(demo, ids_of(demo, "a b") * 500)
    steps, go_on, logits = [], threading.Event(), runtime.logits

    def wait(run):
        steps.append(run)
        if run == 2:
            assert go_on.wait(30)
        return logits(run)

    runtime.logits = wait
    with serving(double) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        body = json.dumps(DESCRIBE)
        connection.request("POST", f"{BETA}:streamGenerateContent{query}", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.read1()
        response.close()
        connection.close()
        server.get("/health")  # the server has seen the end of the connection
        go_on.set()
        server.settle()
        assert len(steps) < 100


@pytest.mark.parametrize("first", [False, True], ids=["within", "at once"])
def test_an_array_is_whole_whatever_happens(demo, first):
    """Google's clients unwrap a list of one error."""
    double, _ = scripted(demo, ids_of(demo, "one two three"), errors={0 if first else 3: RuntimeError("a secret")})
    with serving(double) as server:
        answer = server.post(f"{BETA}:streamGenerateContent", DESCRIBE)
        *pieces, last = answer.json()
        assert last["error"]["status"] == "INTERNAL"
        assert answer.status == (500 if first else 200)
        assert bool(pieces) is not first
        assert b"secret" not in answer.body
    assert server.service is not None


def test_safety_is_reported_once(server):
    setting = {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_ONLY_HIGH"}
    first, *others = server.post(f"{BETA}:streamGenerateContent", DESCRIBE | {"safetySettings": setting}).json()
    assert "has no effect" in first["promptFeedback"]["blockReasonMessage"]
    assert all("promptFeedback" not in piece for piece in others)


def test_the_context_is_full(server, demo):
    """A prompt that does not fit is refused, but counted; a reply that does not is cut, and says why."""
    long = {"contents": [{"parts": [{"text": "describe " * 3000}]}]}
    error = error_of(server.post(f"{BETA}:generateContent", long), 400)
    assert "the context of this bundle holds 2048" in error["message"]
    total = server.post(f"{BETA}:countTokens", long).json()["totalTokens"]
    assert f"has {total} tokens" in error["message"]
    double, _ = scripted(demo, ids_of(demo, "a"))
    with serving(double) as talking:
        body = DESCRIBE | {"generationConfig": {"maxOutputTokens": 10_000}}
        [candidate] = talking.post(f"{BETA}:generateContent", body).json()["candidates"]
    assert candidate["finishReason"] == "MAX_TOKENS"
    assert candidate["finishMessage"] == "the context of 2048 tokens is full"
    assert candidate["tokenCount"] > 2000


# --- the document


def test_the_document(server):
    """Every reference has its schema, and every example is answered."""
    document = server.get("/openapi.json").json()
    text = json.dumps(document)
    names = {name for name in document["components"]["schemas"] if name.startswith("Gemini")}
    used = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= used
    assert used <= set(document["components"]["schemas"])
    posted = {
        path: item["post"]["requestBody"]["content"]["application/json"]["example"]
        for path, item in document["paths"].items()
        if ":" in path
    }
    assert len(posted) == 21
    for path, example in posted.items():
        filled = path.replace("{model}", "demo").replace("{project}", "p").replace("{location}", "l")
        assert server.post(filled, example).status == 200
