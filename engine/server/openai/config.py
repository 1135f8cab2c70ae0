"""What a request wants besides its messages: a model, sampling, limits, a format, tools, a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...calls import CHOICES, ToolChoice
from ...decoding import MAX_CANDIDATES
from ...engine import DEFAULT_MAX_TOKENS
from ...errors import PromptError
from ...grammar import Grammar
from ...logprobs import MAX_LOGPROBS
from ...parts import Turn
from ...sampling import REPETITION, Sampling
from ...tools import Tool
from ..access import Access
from ..bodies import Fields
from ..failures import Failure
from ..request import Request
from ..said import Said, fetched
from ..service import Model, Service
from .messages import Media, read_messages, refuse

__all__ = ["EFFORTS", "MAX_STOPS", "MAX_TOOLS", "Asked", "model_of", "read_chat"]

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_STOPS = 4
MAX_TOOLS = 128

_SEEDS = 2**64
_BOOKKEEPING = {"user": None, "safety_identifier": 128, "prompt_cache_key": None}  # texts: most characters
_TIERS = ("auto", "default")
_NOT_HERE = {
    "audio": "replies are text",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "moderation": "there is no classifier on the device",
    "prediction": "nothing is predicted by the caller here",
    "prompt_cache_options": "the server alone decides what it keeps",
    "prompt_cache_retention": "the server alone decides what it keeps",
    "verbosity": "say in a message how long the answer should be",
    "web_search_options": "nothing is searched on the web",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A chat completion as it was asked for.

    `tier` says that the reply has to name its service tier.
    """

    model: Model
    request: Request
    stream: bool
    include_usage: bool
    tier: bool


async def read_chat(data: dict[str, Any], service: Service, access: Access) -> Asked:
    """The body of a chat completion. Raises Failure or InputError; fields that are not known are refused by name."""
    turns, asked = await asyncio.to_thread(_read, data, service)  # a body may be long
    return asked(await fetched(turns, access))


def _read(data: dict[str, Any], service: Service) -> tuple[Sequence[Said], Callable[[tuple[Turn, ...]], Asked]]:
    """The turns, with files that are not there yet, and what makes the rest of them when they are."""
    body = Fields(data)
    model = model_of(service, body.text("model"))
    stream = bool(body.flag("stream"))
    include_usage = _stream_options(body, stream)
    tools, choice = _tools(body)
    form = _format(body)
    if form is not None and choice not in ("auto", "none"):
        raise body.failure("response_format", "excludes a tool_choice by which calls must come")
    turns = read_messages(body, Media(model.engine.manifest.image))
    request = partial(
        Request,
        max_tokens=_max_tokens(body),
        sampling=_sampling(body),
        stop=_stop(body),
        format=form,
        candidates=body.integer("n", 1, MAX_CANDIDATES) or 1,
        logprobs=_logprobs(body),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.flag("parallel_tool_calls") is not False,
        thinking=body.choice("reasoning_effort", EFFORTS) not in (None, "none"),
    )
    tier = _bookkeeping(body)
    body.finish()

    def asked(conversation: tuple[Turn, ...]) -> Asked:
        whole = request(conversation=conversation)
        return Asked(model=model, request=whole, stream=stream, include_usage=include_usage, tier=tier)

    return turns, asked


def model_of(service: Service, name: str | None) -> Model:
    """The model of this name. Raises Failure."""
    if name is None:
        raise Failure(400, "model is missing", field="model")
    try:
        return service.model(name)
    except Failure as failure:
        failure.field = "model"
        raise


def _stream_options(body: Fields, stream: bool) -> bool:
    options = body.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise body.failure("stream_options", "is only for stream: true")
    if options.flag("include_obfuscation"):
        raise options.failure("include_obfuscation", "is not supported, it must be false")
    include_usage = bool(options.flag("include_usage"))
    options.finish()
    return include_usage


def _tools(body: Fields) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that the model is shown, and whether it may call them or must.

    With the choice "none" it is shown none. Of those that are allowed by a list it is shown these.
    """
    tools = tuple(_tool(item) for item in body.objects("tools", MAX_TOOLS) or ())
    choice = body.value("tool_choice")
    if isinstance(choice, dict):
        return _object_choice(body.object("tool_choice") or Fields({}), tools)
    choice = body.choice("tool_choice", CHOICES) or "auto"
    if choice == "required" and not tools:
        raise body.failure("tool_choice", "is 'required', and there are no tools")
    return () if choice == "none" else tools, choice


def _object_choice(choice: Fields, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], ToolChoice]:
    kind = choice.choice("type", ("function", "allowed_tools"))
    if kind is None:
        raise choice.missing("type")
    if kind == "function":
        name = _named(choice, tools)
        choice.finish()
        return tools, (name if name not in CHOICES else [name])
    allowed = choice.object("allowed_tools")
    if allowed is None:
        raise choice.missing("allowed_tools")
    choice.finish()
    mode, items = allowed.choice("mode", ("auto", "required")), allowed.objects("tools", MAX_TOOLS)
    allowed.finish()
    if mode is None or not items:
        raise allowed.missing("tools" if mode else "mode")
    names: list[str] = []
    for item in items:
        if item.choice("type", ("function",)) is None:
            raise item.missing("type")
        names.append(_named(item, tools))
        item.finish()
    if mode == "required":
        return tools, names
    return tuple(tool for tool in tools if tool.name in names), "auto"


def _named(choice: Fields, tools: tuple[Tool, ...]) -> str:
    """The name of a tool that is declared."""
    function = choice.object("function")
    if function is None:
        raise choice.missing("function")
    name = function.text("name")
    if name is None:
        raise function.missing("name")
    function.finish()
    if all(tool.name != name for tool in tools):
        raise function.failure("name", f"is {name[:60]!r}, which is none of the tools")
    return name


def _tool(item: Fields) -> Tool:
    if item.choice("type", ("function",)) is None:
        raise item.missing("type")
    function = item.object("function")
    if function is None:
        raise item.missing("function")
    name = function.text("name")
    if name is None:
        raise function.missing("name")
    strict = bool(function.flag("strict"))
    description, parameters = function.text("description") or "", function.object("parameters")
    function.finish()
    item.finish()
    try:
        return Tool(name, description, None if parameters is None else function.value("parameters"), strict)
    except PromptError as error:
        raise Failure(400, f"{item.path('function')}: {error}", field=item.path("function")) from None


def _format(body: Fields) -> Grammar | None:
    form = body.object("response_format")
    if form is None:
        return None
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise form.missing("type")
    grammar = {"text": None, "json_object": Grammar.json_schema({"type": "object"})}.get(kind)
    if kind == "json_schema":
        grammar = _json_schema(form)
    form.finish()
    return grammar


def _json_schema(form: Fields) -> Grammar:
    """Replies are held to the schema, `strict` or not: what is held to a schema more strictly than asked is held."""
    named = form.object("json_schema")
    if named is None:
        raise form.missing("json_schema")
    if named.text("name", 64) is None:  # a label
        raise named.missing("name")
    refuse(named, "description", "the model is not shown it, say it in a message")
    named.flag("strict")
    if named.object("schema") is None:
        raise named.missing("schema")
    schema = named.value("schema")
    named.finish()
    return Grammar.json_schema(schema)


def _max_tokens(body: Fields) -> int:
    """The older and the newer name of one limit."""
    old, new = body.integer("max_tokens", 1), body.integer("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise body.failure("max_tokens", f"is {old}, and max_completion_tokens is {new}: give one of them")
    return new or old or DEFAULT_MAX_TOKENS


def _sampling(body: Fields) -> Sampling:
    """OpenAI's fields, and three that servers of open models have besides; top_k -1 is 0, all tokens."""
    top_k, seed = body.integer("top_k", -1, 2**31 - 1), body.integer("seed", -(2**63), _SEEDS - 1)
    return Sampling(
        temperature=body.number("temperature", 0, 2),
        top_k=None if top_k is None else max(top_k, 0),
        top_p=body.number("top_p", 0, 1),
        min_p=body.number("min_p", 0, 1),
        presence_penalty=body.number("presence_penalty", -2, 2),
        frequency_penalty=body.number("frequency_penalty", -2, 2),
        repetition_penalty=body.number("repetition_penalty", *REPETITION),
        logit_bias=_logit_bias(body),
        seed=None if seed is None else seed % _SEEDS,
    )


def _logit_bias(body: Fields) -> dict[int, float] | None:
    given = body.object("logit_bias")
    if given is None:
        return None
    bias: dict[int, float] = {}
    for key in body.value("logit_bias"):
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key):
            raise body.failure("logit_bias", f"has the key {key[:60]!r}, expected a token id")
        value = given.number(key, -100, 100)
        if value is None:
            raise given.missing(key)
        bias[int(key)] = value
    return bias


def _stop(body: Fields) -> tuple[str, ...]:
    """A text or several."""
    value = body.value("stop")
    stops = [value] if isinstance(value, str) else body.texts("stop", MAX_STOPS) or ()
    if "" in stops:
        raise body.failure("stop", "has an empty text, which is everywhere")
    return tuple(stops)


def _logprobs(body: Fields) -> int | None:
    wanted, top = body.flag("logprobs"), body.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise body.failure("top_logprobs", "is only for logprobs: true")
    return top or 0 if wanted else None


def _bookkeeping(body: Fields) -> bool:
    """Fields that change nothing: labels, and what is true anyway. Returns whether a service tier was asked for."""
    for name, most in _BOOKKEEPING.items():
        body.text(name, most)
    metadata = body.object("metadata")
    if metadata is not None:
        for name in body.value("metadata"):
            metadata.text(name, 512)
    if body.flag("store"):
        raise body.failure("store", "is not supported: nothing is kept here, it must be false")
    if body.list("modalities") not in (None, ["text"]):
        raise body.failure("modalities", 'is not supported but as ["text"]: replies are text')
    for name, why in _NOT_HERE.items():
        refuse(body, name, why)
    return body.choice("service_tier", _TIERS) is not None
