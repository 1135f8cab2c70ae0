"""What a Gemini request wants: fields, generation, tools, safety, schemas, without HTTP."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine import Sampling, Text
from siglance.engine.server.bodies import Fields
from siglance.engine.server.failures import Failure
from siglance.engine.server.gemini.config import read_count
from siglance.engine.server.gemini.schemas import json_schema, plain_schema

from .gemini_bodies import HI, asked, refusal, request_of


@pytest.fixture(scope="module")
def manifest(demo):
    return demo.manifest


WRONG_BODIES = {
    "contents is missing": {},
    "contents is empty": {"contents": []},
    "contents is 'hi', expected a list": {"contents": "hi"},
    "contents[0] is 'hi', expected an object": {"contents": ["hi"]},
    "contents[0].parts is missing": {"contents": [{"role": "user"}]},
    "contents[0].parts is empty": {"contents": [{"parts": []}]},
    "contents[0].role is 'system', expected 'user' or 'model'": {"contents": [{"role": "system", "parts": []}]},
    "contents[0].name is not known": {"contents": [{"name": "a", "parts": [{"text": "hi"}]}]},
    "systemInstruction.parts[0].text is missing": HI | {"systemInstruction": {"parts": [{"inlineData": {}}]}},
    "systemInstruction.parts[0].thought is not known": HI
    | {"systemInstruction": {"parts": [{"text": "", "thought": True}]}},
    "cachedContent is not known": HI | {"cachedContent": "cachedContents/1"},
    "labels.a is 1, expected a text": HI | {"labels": {"a": 1}},
    "safety_settings, safetySettings": HI | {"safetySettings": [], "safety_settings": []},
    "model is 'models/other', another one than": HI | {"model": "models/other"},
    "tools[0].googleSearch is not known": HI | {"tools": [{"googleSearch": {}}]},
    "tools: two tools have the name 'f'": HI | {"tools": [{"functionDeclarations": [{"name": "f"}, {"name": "f"}]}]},
    "tools[0].functionDeclarations exceed the limit of 512 functions": HI
    | {"tools": [{"functionDeclarations": [{"name": "f"}] * 513}]},
    "tools.functionDeclarations.name is missing": HI | {"tools": {"functionDeclarations": {}}},
    "parametersJsonSchema and parameters exclude each other": HI
    | {"tools": {"functionDeclarations": {"name": "f", "parameters": {}, "parametersJsonSchema": {}}}},
    "toolConfig.functionCallingConfig.mode is ANY, and no functions are declared": HI
    | {"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}},
    "toolConfig.functionCallingConfig.mode is 'some', expected one of": HI
    | {"toolConfig": {"functionCallingConfig": {"mode": "some"}}},
    "toolConfig.retrievalConfig is not known": HI | {"toolConfig": {"retrievalConfig": {}}},
    "safetySettings.category is 'HATE', expected one of": HI
    | {"safetySettings": {"category": "HATE", "threshold": "OFF"}},
    "safetySettings[0].threshold is 'NO', expected one of": HI
    | {"safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "NO"}]},
    "safetySettings[0].threshold is missing": HI | {"safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT"}]},
    "safetySettings[1].category is HARM_CATEGORY_HARASSMENT a second time": HI
    | {"safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF"}] * 2},
    "safetySettings[0].method is 'X', expected one of": HI
    | {"safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF", "method": "X"}]},
}


@pytest.mark.parametrize("message", WRONG_BODIES)
def test_bodies_that_are_refused(manifest, message):
    failure = refusal(WRONG_BODIES[message], manifest)
    if message == "safety_settings, safetySettings":
        assert "given twice" in failure.message
        return
    assert message in failure.message


def test_the_model_may_be_named(manifest):
    for name in ("models/demo", "demo", "projects/p/locations/l/publishers/google/models/demo", "models/default"):
        request_of(HI | {"model": name}, manifest)


# --- generationConfig


def test_generation_config(manifest):
    config = {
        "temperature": 0.5,
        "topP": 0.9,
        "topK": 3.0,
        "candidateCount": 2,
        "maxOutputTokens": 7,
        "stopSequences": ["a", "b"],
        "presencePenalty": -1,
        "frequencyPenalty": 2,
        "seed": -1,
        "responseLogprobs": True,
        "logprobs": 4,
        "responseModalities": ["TEXT"],
        "responseMimeType": "text/plain",
    }
    read = request_of(HI | {"generationConfig": config}, manifest)
    assert read.sampling == Sampling(
        temperature=0.5, top_p=0.9, top_k=3, presence_penalty=-1, frequency_penalty=2, seed=2**64 - 1
    )
    assert (read.candidates, read.max_tokens, read.stop, read.logprobs) == (2, 7, ("a", "b"), 4)
    assert read.format is None
    snake = {"".join(f"_{c.lower()}" if c.isupper() else c for c in name): value for name, value in config.items()}
    assert "max_output_tokens" in snake
    again = request_of(HI | {"generation_config": snake}, manifest)
    assert again.stream_arguments() | {"conversation": 0} == read.stream_arguments() | {"conversation": 0}
    assert request_of(HI | {"generationConfig": {"responseLogprobs": True}}, manifest).logprobs == 0
    assert request_of(HI | {"generationConfig": {"responseLogprobs": False}}, manifest).logprobs is None


def test_numbers_may_be_texts(manifest):
    """As in all JSON of protocol buffers, whose 64-bit integers are always texts."""
    plain = {"temperature": 0.5, "topP": 1, "topK": 3, "maxOutputTokens": 7, "seed": -1, "frequencyPenalty": -0.02}
    texts = {"temperature": "0.5", "topP": "1", "topK": "3.0", "maxOutputTokens": "7", "seed": "-1"}
    read = request_of(HI | {"generationConfig": plain}, manifest)
    again = request_of(HI | {"generationConfig": texts | {"frequencyPenalty": "-2e-2"}}, manifest)
    assert (again.sampling, again.max_tokens) == (read.sampling, read.max_tokens)


def test_choices_may_be_small(manifest):
    """Examples of Google's own write {"mode": "none"}."""
    body = HI | {
        "tools": [{"functionDeclarations": [{"name": "f"}]}],
        "toolConfig": {"functionCallingConfig": {"mode": "none"}},
        "safetySettings": [{"category": "harm_category_harassment", "threshold": "block_only_high"}],
        "generationConfig": {"responseMimeType": "Application/JSON"},
    }
    read = asked(body, manifest)
    assert read.options["tool_choice"] == "none"
    assert "BLOCK_ONLY_HIGH for HARM_CATEGORY_HARASSMENT" in read.unenforced
    assert read.options["format"] is not None


def test_labels_change_nothing(manifest):
    labels = {"labels": {"team": "research"}}
    blob = {"inlineData": {"mimeType": "text/plain", "data": "aGk="}}
    named = {"inlineData": {**blob["inlineData"], "displayName": "greeting.txt"}}
    plain, labelled = ({"contents": [{"parts": [part]}]} for part in (blob, named))
    read, again = request_of(plain, manifest), request_of(labelled | labels, manifest)
    assert again.stream_arguments() == read.stream_arguments()


WRONG_CONFIGS = {
    "temperature is 2.5, it must be between 0 and 2": {"temperature": 2.5},
    "temperature is -0.1, it must be between 0 and 2": {"temperature": -0.1},
    "temperature is 'hot', expected a number between 0 and 2": {"temperature": "hot"},
    "topP is 1.1, it must be between 0 and 1": {"topP": 1.1},
    "topK is 0, it must be between 1 and": {"topK": 0},
    "topK is 1.5, expected an integer": {"topK": 1.5},
    "candidateCount is 0, it must be between 1 and 8": {"candidateCount": 0},
    "candidateCount is 9, it must be between 1 and 8": {"candidateCount": 9},
    "maxOutputTokens is 0, it must be between 1 and": {"maxOutputTokens": 0},
    "maxOutputTokens is -1, it must be between 1 and": {"maxOutputTokens": -1},
    "maxOutputTokens is 1.5, expected an integer": {"maxOutputTokens": 1.5},
    "maxOutputTokens is 0, it must be between": {"maxOutputTokens": "0"},
    "maxOutputTokens is true, expected an integer": {"maxOutputTokens": True},
    "stopSequences has 6 items, over the limit of 5": {"stopSequences": ["a"] * 6},
    "stopSequences has an empty text": {"stopSequences": [""]},
    "stopSequences[0] is 1, expected a text": {"stopSequences": [1]},
    "presencePenalty is 2.1, it must be between -2": {"presencePenalty": 2.1},
    "frequencyPenalty is -3, it must be between -2": {"frequencyPenalty": -3},
    "seed is 36893488147419103232, it must be between": {"seed": 2**65},
    "logprobs needs responseLogprobs: true": {"logprobs": 3},
    "logprobs is 21, it must be between 0 and 20": {"responseLogprobs": True, "logprobs": 21},
    "responseModalities is ['IMAGE'], only ['TEXT'] can be made": {"responseModalities": ["IMAGE"]},
    "responseMimeType is 'image/png', expected one of text/plain": {"responseMimeType": "image/png"},
    "responseSchema needs responseMimeType": {"responseSchema": {"type": "STRING"}},
    "responseJsonSchema and responseSchema exclude each other": {"responseSchema": {}, "responseJsonSchema": {}},
    "responseSchema: text/x.enum needs a schema of type STRING": {
        "responseMimeType": "text/x.enum",
        "responseSchema": {"type": "INTEGER", "enum": ["1"]},
    },
    "responseMimeType: text/x.enum needs a schema": {"responseMimeType": "text/x.enum"},
    "responseSchema.type is 'TEXT', expected one of STRING": {
        "responseMimeType": "application/json",
        "responseSchema": {"type": "TEXT"},
    },
    "responseSchema.properties.a.oneOf is not known": {
        "responseMimeType": "application/json",
        "responseSchema": {"type": "OBJECT", "properties": {"a": {"oneOf": []}}},
    },
    "mediaResolution is 'MEDIA_RESOLUTION_ULTRA_HIGH', expected one of": {
        "mediaResolution": "MEDIA_RESOLUTION_ULTRA_HIGH"
    },
    "speechConfig is not known": {"speechConfig": {}},
    "thinkingConfig.thinkingLevel is 'SOME', expected one of": {"thinkingConfig": {"thinkingLevel": "SOME"}},
    "thinkingConfig.thinkingLevel and thinkingBudget exclude": {
        "thinkingConfig": {"thinkingLevel": "HIGH", "thinkingBudget": -1}
    },
    "topK is 5.5, expected an integer": {"topK": "5.5"},
    "topK is '٥', expected an integer": {"topK": "٥"},
    "topK is ' 5', expected an integer": {"topK": " 5"},
    "temperature is 'NaN', expected a number": {"temperature": "NaN"},
    "temperature is '', expected a number": {"temperature": ""},
    "temperature is '1e999', expected a number": {"temperature": "1e999"},
    "topP is true, expected a number": {"topP": True},
    "thinkingConfig.thinkingBudget is 5, but thoughts cannot": {"thinkingConfig": {"thinkingBudget": 5}},
    "maxOutputTokens is given twice": {"maxOutputTokens": 1, "max_output_tokens": 1},
}


@pytest.mark.parametrize("message", WRONG_CONFIGS)
def test_configs_that_are_refused(manifest, message):
    failure = refusal(HI | {"generationConfig": WRONG_CONFIGS[message]}, manifest)
    assert failure.message.startswith(f"generationConfig.{message}")
    assert failure.field.startswith("generationConfig.")


def test_thinking(manifest):
    for config, thinking, thoughts in (
        ({}, False, False),
        ({"includeThoughts": True}, True, True),
        ({"include_thoughts": False, "thinking_budget": -1}, True, False),
        ({"thinkingBudget": 0}, False, False),
        ({"thinkingLevel": "low"}, True, False),
        ({"thinkingLevel": "HIGH", "includeThoughts": True}, True, True),
        ({"thinkingLevel": "THINKING_LEVEL_UNSPECIFIED"}, False, False),
    ):
        read = asked(HI | {"generationConfig": {"thinkingConfig": config}}, manifest)
        assert (read.options["thinking"], read.thoughts) == (thinking, thoughts)


def test_safety_settings(manifest):
    setting = {"category": "HARM_CATEGORY_HATE_SPEECH", "threshold": "BLOCK_NONE", "method": "SEVERITY"}
    for given_as in (setting, [setting], []):
        assert asked(HI | {"safetySettings": given_as}, manifest).unenforced == ""
    strict = [setting | {"threshold": "BLOCK_ONLY_HIGH"}, {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF"}]
    for name in ("safetySettings", "safety_settings"):
        assert asked(HI | {name: strict}, manifest).unenforced == (
            "Nothing is blocked: this server has no safety classifier, so BLOCK_ONLY_HIGH for "
            "HARM_CATEGORY_HATE_SPEECH has no effect."
        )


def test_count_takes_a_whole_request(manifest):
    for body in (HI, {"generateContentRequest": HI | {"model": "models/demo"}}, {"generate_content_request": HI}):
        read = asked(body, manifest, read_count)
        assert read.turns == [("user", [Text("hi")])]
    with pytest.raises(Failure, match="generateContentRequest and contents exclude each other"):
        asked(HI | {"generateContentRequest": HI}, manifest, read_count)
    with pytest.raises(Failure, match=r"generateContentRequest.generationConfig.topP is 2, it must be"):
        asked({"generateContentRequest": HI | {"generationConfig": {"topP": 2}}}, manifest, read_count)
    with pytest.raises(Failure, match="contents is missing"):
        asked({}, manifest, read_count)


# --- anything else

RICH = {
    "model": "models/demo",
    "contents": [
        {"role": "user", "parts": [{"text": "hi"}, {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}]},
        {"role": "model", "parts": [{"functionCall": {"id": "x", "name": "f", "args": {"a": 1}}}]},
        {"role": "user", "parts": [{"functionResponse": {"id": "x", "name": "f", "response": {"b": 2}}}]},
        {
            "parts": [
                {
                    "fileData": {"mimeType": "video/mp4", "fileUri": "file:///a"},
                    "videoMetadata": {"startOffset": "1s", "fps": 1},
                    "mediaResolution": {"numTokens": 9},
                }
            ]
        },
    ],
    "systemInstruction": {"parts": [{"text": "be brief"}]},
    "tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT", "properties": {"a": {}}}}]}],
    "toolConfig": {"functionCallingConfig": {"mode": "AUTO", "allowedFunctionNames": ["f"]}},
    "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF"}],
    "generationConfig": {
        "temperature": 1,
        "stopSequences": ["a"],
        "responseMimeType": "application/json",
        "responseSchema": {"type": "OBJECT", "properties": {"a": {"type": "STRING", "enum": ["x"]}}},
        "thinkingConfig": {"includeThoughts": True},
    },
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=9), inner, max_size=2),
    max_leaves=4,
)


def places(value, path=()):
    """Paths of everything inside of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*places(RICH)][1:]), ANYTHING), min_size=1, max_size=2))
def test_law_a_body_is_read_or_refused(manifest, changes):
    """Whatever stands somewhere in it: no other error, and what is refused has a place."""
    body = RICH
    for path, new in sorted(changes, key=lambda change: -len(change[0])):  # no place is within one changed before
        body = changed(body, path, new)
    read = read_or_refused(body, manifest)
    if isinstance(read, Failure):
        assert read.status == 400
        assert read.field
        assert len(read.message) < 1000
    else:
        assert read.turns
        assert all(parts for _, parts in read.turns)


def read_or_refused(body, manifest):
    try:
        return asked(body, manifest)
    except Failure as failure:
        return failure


# --- schemas


def schema(value):
    return json_schema(plain_schema(Fields(value, "s", both_cases=True)))


def test_schemas():
    google = {
        "type": "OBJECT",
        "title": "Thing",
        "properties": {
            "b_c": {"type": "STRING", "nullable": True, "maxLength": "5", "format": "date-time"},
            "bC": {"type": "integer", "format": "int32", "minimum": 0},
            "a": {"type": "ARRAY", "items": {"any_of": [{"type": "NUMBER"}, {"ref": "#/defs/x"}]}, "min_items": 1},
            "e": {"type": "INTEGER", "enum": ["1", "-2"]},
            "f": {"type": "NUMBER", "enum": ["1.5", "2"], "format": "float", "example": 1.5},
        },
        "propertyOrdering": ["a", "bC"],
        "required": ["a"],
        "defs": {"x": {"type": "BOOLEAN", "description": "yes or no"}},
    }
    read = schema(google)
    assert read == {
        "type": "object",
        "title": "Thing",
        "properties": {
            "a": {
                "type": "array",
                "items": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/x"}]},
                "minItems": 1,
            },
            "bC": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            "b_c": {"anyOf": [{"type": "string", "maxLength": 5, "format": "date-time"}, {"type": "null"}]},
            "e": {"type": "integer", "enum": [1, -2]},
            "f": {"type": "number", "enum": [1.5, 2]},
        },
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"x": {"type": "boolean", "description": "yes or no"}},
    }
    assert list(read["properties"]) == ["a", "bC", "b_c", "e", "f"]
    assert schema({"type": "TYPE_UNSPECIFIED"}) == {}
    assert schema({"type": "OBJECT", "additionalProperties": {"type": "NULL"}}) == {
        "type": "object",
        "additionalProperties": {"type": "null"},
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": 3}, "s.type is 3, expected a text"),
        ({"maxItems": "-1"}, "s.maxItems is -1, it must be between 0 and"),
        ({"maxItems": "9" * 30}, "s.maxItems is 999999999999999999999999999999, it must be"),
        ({"items": []}, "s.items is a list, expected an object"),
        ({"properties": {"a": None}}, "s.properties.a is null, expected an object"),
        ({"properties": {"a": {}}, "propertyOrdering": ["b"]}, "s.propertyOrdering has 'b', which is no property"),
        ({"type": "INTEGER", "enum": ["one"]}, "s.enum has 'one', which is no integer"),
        ({"type": "NUMBER", "enum": ["nan"]}, "s.enum has 'nan', which is no number"),
        ({"ref": "http://example.com"}, "s.ref is 'http://example.com', expected '#/defs/NAME'"),
        ({"allOf": []}, "s.allOf is not known"),
    ],
)
def test_schemas_that_are_refused(value, message):
    with pytest.raises(Failure) as caught:
        schema(value)
    assert caught.value.message.startswith(message)


GOOGLE_SCHEMAS = st.recursive(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["STRING", "NUMBER", "INTEGER", "BOOLEAN", "NULL"])},
        optional={"nullable": st.booleans(), "description": st.text(max_size=5)},
    ),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "ARRAY", "items": items}, inner),
        st.builds(
            lambda properties: {"type": "OBJECT", "properties": properties, "required": [*properties]},
            st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
        ),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(GOOGLE_SCHEMAS)
def test_law_names_of_properties_are_left_alone(value):
    """Whatever they are called; and both forms are JSON."""

    def names(schema):
        if isinstance(schema, dict):
            inner = schema.get("properties", {})
            yield from inner
            for one in [*inner.values(), schema.get("items"), *schema.get("anyOf", ())]:
                yield from names(one)

    plain = plain_schema(Fields(value, both_cases=True))
    assert list(names(plain)) == list(names(value)) == list(names(json_schema(plain)))
    json.dumps(json_schema(plain), allow_nan=False)
