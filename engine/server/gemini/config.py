"""What a Gemini request wants: generation, tools, safety.

Fields that this server cannot follow are not read here, so that they are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...calls import ToolChoice
from ...grammar import Grammar
from ...logprobs import MAX_LOGPROBS
from ...manifest import Manifest
from ...sampling import Sampling
from ...tools import Tool, read_tools
from ..access import Access
from ..bodies import Fields
from ..failures import Failure
from ..request import Request
from ..said import Said, fetched
from .contents import checked, read_contents, read_system, repeated
from .media import LEVELS
from .schemas import json_schema, plain_schema

__all__ = ["Asked", "read_count", "read_request"]

MAX_CANDIDATES = 8
MAX_STOPS = 5
MAX_FUNCTIONS = 512
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
_MAX_TOKENS = 2**31 - 1
_SEEDS = -(2**31), 2**64 - 1  # Google's are 32 bits with a sign

MODES = ("MODE_UNSPECIFIED", "AUTO", "ANY", "NONE", "VALIDATED")
THINKING = ("THINKING_LEVEL_UNSPECIFIED", "MINIMAL", "LOW", "MEDIUM", "HIGH")
MIME_TYPES = _PLAIN, _JSON, _ENUM = "text/plain", "application/json", "text/x.enum"
_SCHEMAS = ("responseSchema", "responseJsonSchema")

# The categories and thresholds of both of Google's APIs. There is no classifier on the device: nothing is ever blocked.
_CATEGORIES = (
    *("HARM_CATEGORY_UNSPECIFIED", "HARM_CATEGORY_HARASSMENT", "HARM_CATEGORY_HATE_SPEECH"),
    *("HARM_CATEGORY_SEXUALLY_EXPLICIT", "HARM_CATEGORY_DANGEROUS_CONTENT", "HARM_CATEGORY_CIVIC_INTEGRITY"),
    *("HARM_CATEGORY_JAILBREAK", "HARM_CATEGORY_IMAGE_HATE", "HARM_CATEGORY_IMAGE_HARASSMENT"),
    *("HARM_CATEGORY_IMAGE_DANGEROUS_CONTENT", "HARM_CATEGORY_IMAGE_SEXUALLY_EXPLICIT"),
)
_BLOCKING = ("BLOCK_LOW_AND_ABOVE", "BLOCK_MEDIUM_AND_ABOVE", "BLOCK_ONLY_HIGH")
THRESHOLDS = ("HARM_BLOCK_THRESHOLD_UNSPECIFIED", *_BLOCKING, "BLOCK_NONE", "OFF")
_METHODS = ("HARM_BLOCK_METHOD_UNSPECIFIED", "SEVERITY", "PROBABILITY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it was read.

    Attributes:
        turns: the conversation, with files that are not there yet.
        options: further fields of `Request`.
        thoughts: whether the thoughts are wanted in the reply.
        functions: names of those that the model may call.
        unenforced: what is said about thresholds that have no effect here, "" if there are none.
    """

    turns: Sequence[Said]
    options: dict[str, Any] = field(default_factory=dict)
    thoughts: bool = False
    functions: frozenset[str] = frozenset()
    unenforced: str = ""

    async def request(self, access: Access) -> Request:
        """With the files. Raises Failure."""
        return Request(conversation=await fetched(self.turns, access), **self.options)


def read_request(body: Fields, manifest: Manifest, models: Collection[str]) -> Asked:
    """A whole request. The model may be named in it too, by one of `models`. Raises Failure."""
    _check_model(body, models)
    config = body.object("generationConfig") or Fields({}, body.path("generationConfig"), both_cases=True)
    resolution = config.choice("mediaResolution", LEVELS)
    turns = read_contents(body, manifest, resolution)
    tools, choice = _allowed(body, _tools(body))
    thinking, thoughts = _thinking(config)
    options = _generation(config) | {
        "system": read_system(body),
        "tools": tools,
        "thinking": thinking,
        "tool_choice": choice,
    }
    config.finish()
    unenforced = _safety(body)
    _labels(body)
    body.finish()
    return Asked(
        turns=turns,
        options={name: value for name, value in options.items() if value is not None},
        thoughts=thoughts,
        functions=frozenset(tool.name for tool in tools),
        unenforced=unenforced,
    )


def read_count(body: Fields, manifest: Manifest, models: Collection[str]) -> Asked:
    """A request to count tokens: the fields of a request, or a whole one as `generateContentRequest`."""
    whole = body.object("generateContentRequest")
    if whole is None:
        return read_request(body, manifest, models)
    if "contents" in body:
        raise body.failure("generateContentRequest", "and contents exclude each other")
    _check_model(body, models)
    body.finish()
    return read_request(whole, manifest, models)


def _labels(body: Fields) -> None:
    """Vertex AI's bills are sorted by them; they change nothing."""
    labels = body.object("labels")
    if labels is not None:
        for name in body.value("labels"):
            labels.text(name, 63)


def _check_model(body: Fields, models: Collection[str]) -> None:
    named = body.text("model")
    # "models/demo", or "projects/../models/demo" as Vertex AI names it
    if named is not None and named.rpartition("models/")[2] not in models:
        raise body.failure("model", f"is {named[:60]!r}, another one than the model of the path")


# --- generation


def _generation(config: Fields) -> dict[str, Any]:
    """The fields of `Request` that generationConfig sets."""
    modalities = config.texts("responseModalities")
    if modalities is not None and [text.upper() for text in modalities] != ["TEXT"]:
        raise config.failure("responseModalities", f"is {str(modalities)[:60]}, only ['TEXT'] can be made")
    seed = config.integer("seed", *_SEEDS)
    sampling = Sampling(
        temperature=config.number("temperature", 0, MAX_TEMPERATURE),
        top_p=config.number("topP", 0, 1),
        top_k=config.integer("topK", 1, _MAX_TOKENS),
        presence_penalty=config.number("presencePenalty", -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=config.number("frequencyPenalty", -MAX_PENALTY, MAX_PENALTY),
        seed=None if seed is None else seed % 2**64,
    )
    return {
        "sampling": sampling,
        "candidates": config.integer("candidateCount", 1, MAX_CANDIDATES),
        "max_tokens": config.integer("maxOutputTokens", 1, _MAX_TOKENS),
        "stop": _stops(config),
        "logprobs": _logprobs(config),
        "format": _format(config),
    }


def _stops(config: Fields) -> tuple[str, ...]:
    stops = config.texts("stopSequences", MAX_STOPS) or ()
    if "" in stops:
        raise config.failure("stopSequences", "has an empty text")
    return tuple(stops)


def _logprobs(config: Fields) -> int | None:
    """How many of the most probable tokens are reported with each, None for no report."""
    wanted, top = config.flag("responseLogprobs"), config.integer("logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise config.failure("logprobs", "needs responseLogprobs: true")
    return (top or 0) if wanted else None


def _format(config: Fields) -> Grammar | None:
    """The form of the reply."""
    kind = config.choice("responseMimeType", MIME_TYPES) or _PLAIN
    given = [name for name in _SCHEMAS if name in config]
    if len(given) == 2:
        raise config.failure(_SCHEMAS[1], f"and {_SCHEMAS[0]} exclude each other")
    if kind == _PLAIN:
        if given:
            raise config.failure(given[0], f"needs responseMimeType: {_JSON} or {_ENUM}")
        return None
    place = config.path(given[0] if given else "responseMimeType")
    schema = _schema(config, given[0]) if given else {}
    if kind == _JSON:
        return checked(place, lambda: Grammar.json_schema(schema))
    values = schema.get("enum")
    if not values or not all(isinstance(value, str) for value in values):
        raise Failure(400, f"{place}: {_ENUM} needs a schema of type STRING with an enum", field=place)
    # A text of Lark is written like one of JSON.
    return checked(place, lambda: Grammar.lark("start: " + " | ".join(map(json.dumps, values))))


def _schema(config: Fields, name: str) -> dict[str, Any]:
    schema = config.object(name)
    assert schema is not None
    return config.value(name) if name == "responseJsonSchema" else json_schema(plain_schema(schema))


def _thinking(config: Fields) -> tuple[bool, bool]:
    """Whether the model thinks, and whether its thoughts are wanted in the reply."""
    thinking = config.object("thinkingConfig")
    if thinking is None:
        return False, False
    wanted, tokens = bool(thinking.flag("includeThoughts")), thinking.integer("thinkingBudget")
    level = thinking.choice("thinkingLevel", THINKING)
    thinking.finish()
    if level is not None and tokens is not None:
        raise thinking.failure("thinkingLevel", "and thinkingBudget exclude each other")
    if tokens not in (None, 0, -1):
        raise thinking.failure(
            "thinkingBudget", f"is {tokens}, but thoughts cannot be held to a number of tokens: 0 is off, -1 is on"
        )
    if wanted and tokens == 0:
        raise thinking.failure("includeThoughts", "is true, but thinkingBudget 0 switches thinking off")
    return wanted or tokens == -1 or level not in (None, THINKING[0]), wanted


# --- tools


def _tools(body: Fields) -> tuple[Tool, ...]:
    """All functions that are declared."""
    declared: list[Tool] = []
    for tool in repeated(body, "tools") or ():
        functions = repeated(tool, "functionDeclarations") or ()
        if len(declared) + len(functions) > MAX_FUNCTIONS:
            raise tool.failure("functionDeclarations", f"exceed the limit of {MAX_FUNCTIONS} functions")
        declared += [_function(function) for function in functions]
        tool.finish()
    return checked(body.path("tools"), lambda: read_tools(declared))


def _function(function: Fields) -> Tool:
    name, description = function.text("name"), function.text("description") or ""
    if name is None:
        raise function.missing("name")
    parameters = _either(function, "parameters", "parametersJsonSchema")
    returns = _either(function, "response", "responseJsonSchema")
    function.finish()
    if returns is not None:  # chat templates have no place of their own for it
        sentence = f"Returns a value of the JSON schema {json.dumps(returns, ensure_ascii=False)}."
        description = f"{description}\n{sentence}" if description else sentence
    return checked(function.place, lambda: Tool(name, description, parameters))


def _either(function: Fields, google: str, standard: str) -> dict[str, Any] | None:
    """A schema in Google's form or in that of JSON Schema."""
    if google in function and standard in function:
        raise function.failure(standard, f"and {google} exclude each other")
    if function.object(standard) is not None:
        return function.value(standard)
    schema = function.object(google)
    return None if schema is None else plain_schema(schema)


def _allowed(body: Fields, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The functions that the model is shown, and whether it may call them or must, by toolConfig.

    With ANY it is shown all and must call those that are allowed; otherwise it is shown those.
    """
    config = body.object("toolConfig")
    if config is None:
        return tools, "auto"
    calling = config.object("functionCallingConfig")
    config.finish()
    if calling is None:
        return tools, "auto"
    mode = calling.choice("mode", MODES) or MODES[0]
    names = calling.texts("allowedFunctionNames")
    calling.finish()
    known = {tool.name for tool in tools}
    unknown = next((name for name in names or () if name not in known), None)
    if unknown is not None:
        raise calling.failure("allowedFunctionNames", f"has {unknown[:40]!r}, which is not declared")
    if mode == "NONE":
        return (), "none"
    if mode == "ANY":
        if not tools:
            raise calling.failure("mode", "is ANY, and no functions are declared")
        return tools, names or "required"
    chosen = set(names or known)
    strict = mode == "VALIDATED"
    return tuple(dataclasses.replace(tool, strict=strict) for tool in tools if tool.name in chosen), "auto"


# --- safety


def _safety(body: Fields) -> str:
    """A sentence about the thresholds that have no effect, "" if there are none.

    BLOCK_NONE, OFF and HARM_BLOCK_THRESHOLD_UNSPECIFIED are what happens anyway: nothing is blocked, and nothing is
    rated. The others would need a classifier, so the reply says that they have no effect.
    """
    seen: dict[str, str] = {}
    for setting in repeated(body, "safetySettings") or ():
        category, threshold = setting.choice("category", _CATEGORIES), setting.choice("threshold", THRESHOLDS)
        setting.choice("method", _METHODS)
        setting.finish()
        if category is None or threshold is None:
            raise setting.missing("category" if category is None else "threshold")
        if category in seen:
            raise setting.failure("category", f"is {category} a second time")
        seen[category] = threshold
    asked = [f"{threshold} for {category}" for category, threshold in seen.items() if threshold in _BLOCKING]
    if not asked:
        return ""
    verb = "has" if len(asked) == 1 else "have"
    return f"Nothing is blocked: this server has no safety classifier, so {' and '.join(asked)} {verb} no effect."
