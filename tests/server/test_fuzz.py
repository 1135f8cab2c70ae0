"""Bodies that nobody meant to send, over all protocols: refused or answered, never a server error, never a hang.

`make fuzz`; SIGLANCE_FUZZ_INPUTS sets the number, 20,000 bodies by default.
"""

from __future__ import annotations

import base64
import copy
import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from siglance.engine.self_test import formula_picture

from ..audio_files import tone, wav
from ..pdf_files import pdf, quadrants
from ..picture_files import encoded
from .process import Process, started

pytestmark = pytest.mark.fuzz

INPUTS = int(os.environ.get("SIGLANCE_FUZZ_INPUTS", "5000"))
BODIES = 4 * INPUTS
SEED, CLIENTS = 20_261_125, 4
SLOWEST = 60.0  # seconds for one body
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "allow_header_conformance",
    "unsupported_method",
)

PICTURE = base64.b64encode(encoded(PIL.Image.fromarray(formula_picture(40, 50)), "PNG")).decode()
PAPER = base64.b64encode(pdf(quadrants())).decode()
SOUND = base64.b64encode(wav(tone(0.1, 16_000))).decode()
SCHEMA = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
CALL = {
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def gemini_bodies() -> list[dict[str, Any]]:
    text, shown = {"text": "describe"}, {"inlineData": {"mimeType": "image/png", "data": PICTURE}}
    config = {
        "temperature": 0.5,
        "topP": 0.9,
        "topK": 20,
        "candidateCount": 1,
        "maxOutputTokens": 8,
        "seed": 1,
        "stopSequences": ["."],
        "presencePenalty": 0.1,
        "frequencyPenalty": 0.1,
    }
    turns = [
        {"role": "user", "parts": [shown, text]},
        {"role": "model", "parts": [text]},
        {"role": "user", "parts": [text]},
    ]
    return [
        {"contents": [{"parts": [text]}], "generationConfig": config, "systemInstruction": {"parts": [text]}},
        {"contents": turns, "generationConfig": {"maxOutputTokens": 8, "mediaResolution": "MEDIA_RESOLUTION_LOW"}},
        {
            "contents": [
                {"role": "user", "parts": [{"inlineData": {"mimeType": "application/pdf", "data": PAPER}}, text]}
            ],
            "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}],
        },
        {
            "contents": [{"parts": [text]}],
            "generationConfig": {
                "responseMimeType": "application/json",
                "responseSchema": SCHEMA,
                "maxOutputTokens": 8,
                "responseLogprobs": True,
                "logprobs": 2,
            },
        },
        {"contents": [{"parts": [{"fileData": {"fileUri": "file:///etc/passwd", "mimeType": "image/png"}}]}]},
        {
            "contents": [{"parts": [text]}],
            "tools": [{"functionDeclarations": [CALL]}],
            "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
        },
        {
            "contents": [
                {
                    "parts": [
                        {"functionCall": {"name": "weather", "args": {"city": "x"}}},
                        {"functionResponse": {"name": "weather", "response": {"a": 1}}},
                    ]
                }
            ]
        },
        {
            "contents": [
                {"parts": [{"inlineData": {"mimeType": "video/mp4", "data": PICTURE}, "videoMetadata": {"fps": 1}}]}
            ]
        },
    ]


def openai_bodies() -> list[dict[str, Any]]:
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}", "detail": "low"}}
    text = {"type": "text", "text": "describe"}
    common: dict[str, Any] = {"model": "demo", "max_tokens": 8}
    return [
        {
            **common,
            "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "count"}],
            "stop": ["."],
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "n": 2,
            "presence_penalty": 0.1,
            "logprobs": True,
            "top_logprobs": 2,
        },
        {
            **common,
            "messages": [{"role": "user", "content": [shown, text]}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        {
            **common,
            "messages": [{"role": "user", "content": [text]}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        },
        {
            **common,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "file",
                            "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PAPER}"},
                        },
                        {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
                    ],
                }
            ],
        },
        {
            **common,
            "messages": [{"role": "user", "content": "a"}],
            "tools": [{"type": "function", "function": CALL}],
            "tool_choice": "auto",
        },
        {
            **common,
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "{}"},
            ],
        },
        {
            **common,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}],
                }
            ],
        },
    ]


def nim_bodies() -> list[dict[str, Any]]:
    shown = f'describe <img src="data:image/png;base64,{PICTURE}" />'
    return [
        {
            "messages": [{"role": "user", "content": shown}],
            "max_tokens": 8,
            "temperature": 0.2,
            "top_p": 0.7,
            "stream": False,
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "count"},
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
                    ],
                }
            ],
            "max_tokens": 8,
            "stream": True,
        },
    ]


GEMINI_VERBS = ("generateContent", "streamGenerateContent", "streamGenerateContent?alt=sse", "countTokens")
ODD = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        1.5,
        10**9,
        -(10**9),
        10**30,
        1e300,
        5e-324,
        "",
        " ",
        "10",
        "null",
        "\0",
        "x" * 5000,
    ),
    *(
        "data:",
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
        "\U0001f600",
        "<bos>",
        "\u202e",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        [0] * 300,
        {"a": {"b": {"c": []}}},
        "</s><start_of_turn>",
        "%00",
        "../..",
        "é" * 100,
    ),
    *({"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"text": "x"}, [{"text": "x"}], "(" * 50),
)
RAW = (
    b"NaN",
    b"Infinity",
    b"1e999",
    b"-0",
    b"01",
    b"0x1",
    b"'a'",
    b"\xff\xfe",
    b'"\\ud800"',
    b"9" * 5000,
    b"[" * 300,
    b"//",
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*path, key), *places(inner, (*path, key)))]


def inside(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(rng: np.random.Generator, body: dict[str, Any]) -> dict[str, Any]:
    """One to three fields with another value, gone, twice, renamed or somewhere else."""
    body = copy.deepcopy(body)
    for _ in range(rng.integers(1, 4)):
        found = places(body)
        if not found:
            return body
        *path, key = found[rng.integers(len(found))]
        holder = inside(body, tuple(path))
        kind = rng.integers(5)
        if kind <= 1:
            holder[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
        elif kind == 2:
            del holder[key]
        elif kind == 3 and isinstance(holder, dict):
            names = ("contents", "messages", "parts", "text", "role", "extra", key.upper(), f"{key}s", snake(key))
            holder[names[rng.integers(len(names))]] = holder.pop(key)
        elif isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[:50]))
        else:
            holder[key] = copy.deepcopy(inside(body, found[rng.integers(len(found))]))
    return body


def snake(name: str) -> str:
    return re.sub("(?<!^)(?=[A-Z])", "_", name).lower()


def broken(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes flipped, cut, put in or doubled."""
    body = bytearray(data)
    kind = rng.integers(4)
    place = int(rng.integers(len(body)))
    if kind == 0:
        for _ in range(rng.integers(1, 6)):
            body[rng.integers(len(body))] = int(rng.integers(256))
    elif kind == 1:
        del body[place:]
    elif kind == 2:
        body[place:place] = RAW[rng.integers(len(RAW))]
    else:
        colons = [match.end() for match in re.finditer(rb":", bytes(body))] or [0]
        place = colons[rng.integers(len(colons))]
        end = next((index for index in range(place, len(body)) if body[index : index + 1] in b",}]"), len(body))
        body[place:end] = RAW[rng.integers(len(RAW))]
    return bytes(body)


def request(index: int) -> tuple[str, bytes]:
    """The path and the body of a number."""
    rng = np.random.default_rng((SEED, index))
    bodies = (gemini_bodies, openai_bodies, nim_bodies)[index % 3]()
    if index % 3 == 0:
        verb = GEMINI_VERBS[rng.integers(len(GEMINI_VERBS))]
        path = f"{('/v1beta', '/v1/projects/p/locations/l/publishers/google')[rng.integers(2)]}/models/demo:{verb}"
    else:
        path = "/v1/chat/completions" if index % 3 == 1 else "/v1/vlm/google/paligemma"
    body = changed(rng, bodies[rng.integers(len(bodies))])
    data = json.dumps(body, ensure_ascii=bool(rng.integers(2))).encode("utf-8", "surrogatepass")
    return path, broken(rng, data) if rng.random() < 0.3 else data


def shape(path: str, status: int, answer: bytes) -> None:
    """An error is written as its protocol writes one."""
    error = json.loads(answer)
    if path.startswith("/v1/vlm"):
        assert error["status"] == status
        assert error["title"]
    elif path == "/v1/chat/completions":
        assert set(error["error"]) == {"message", "type", "param", "code"}
    else:
        error = (error[0] if isinstance(error, list) else error)["error"]
        assert error["code"] == status
        assert error["message"]
        assert error["status"]


def ask_all(server: Process, numbers: list[int]) -> Counter:
    """Statuses by protocol of many bodies."""
    statuses: Counter = Counter()
    errors: list[str] = []
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection(*server.address(), timeout=SLOWEST)
        while True:
            with lock:
                if not numbers or errors:
                    break
                number = numbers.pop()
            try:
                path, body = request(number)
                connection.request("POST", path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                received = answer.read()
                assert answer.status == 200 or 400 <= answer.status < 500, (answer.status, received[:300])
                if answer.status != 200:
                    shape(path, answer.status, received)
            except Exception as error:
                errors.append(f"body {number}: {type(error).__name__}: {error}")
                break
            with lock:
                statuses[f"{('gemini', 'openai', 'nim')[number % 3]} {answer.status}"] += 1
        connection.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return statuses


def test_mutated_bodies():
    with started() as server:
        # What is not mutated is answered, so that the rest begins near to something.
        for bodies, path in (
            (gemini_bodies()[:4], "/v1beta/models/demo:generateContent"),
            (openai_bodies()[:3], "/v1/chat/completions"),
            (nim_bodies(), "/v1/vlm/google/paligemma"),
        ):
            for body in bodies:
                status, answer = server.ask("POST", path, body)
                assert status == 200, answer
        statuses = ask_all(server, list(range(BODIES)))
        assert server.ask("GET", "/health")[0] == 200
        failed = [line for line in server.lines if "failed" in line or "Traceback" in line]
        assert not failed, failed[:3]
    print(f"\n{BODIES} bodies: {', '.join(f'{name}: {count}' for name, count in sorted(statuses.items()))}")
    assert sum(statuses.values()) == BODIES
    for name in ("gemini", "openai", "nim"):
        assert statuses[f"{name} 200"] > BODIES / 100  # some are left what they were meant to be
        assert statuses[f"{name} {422 if name == 'nim' else 400}"] > BODIES / 20


def test_schemathesis_finds_no_server_error(tmp_path):
    """Requests made from the OpenAPI document: right ones, wrong ones, and the edges of both."""
    program = Path(sys.executable).parent / "schemathesis"
    phases = "examples,fuzzing" if INPUTS < 5000 else "examples,coverage,fuzzing"
    with started() as server:
        host, port = server.address()
        done = subprocess.run(
            [
                *(program, "run", f"http://{host}:{port}/openapi.json", "--no-color", "--seed", str(SEED)),
                *("--phases", phases, "--max-examples", str(max(2, INPUTS // 200)), "--request-timeout", str(SLOWEST)),
                *("--checks", ",".join(CHECKS), "--warnings", "off"),
            ],
            capture_output=True,
            text=True,
            timeout=3600,
            cwd=tmp_path,  # it leaves a folder of what it has found
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert server.ask("GET", "/health")[0] == 200
        failed = [line for line in server.lines if "failed" in line or "Traceback" in line]
        assert not failed, failed[:3]
    [cases] = re.findall(r"(\d+) generated, \1 passed", done.stdout)
    [operations] = re.findall(r"Tested: (\d+)", done.stdout)
    print(f"\nschemathesis: {cases} requests to {operations} operations ({phases}), none answered wrong")
