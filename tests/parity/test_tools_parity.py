"""Tools against transformers: prompts that its templates write, and calls that its parser for Gemma 4 reads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.manifest import PromptFacts, ReplyFacts
from siglance.engine.messages import Message, Text, Thought
from siglance.engine.prompt import PromptBuilder
from siglance.engine.template import ChatTemplate
from siglance.engine.text import special_ids
from siglance.engine.thinking import Markers, ReplyParts
from siglance.engine.tool_format import QUOTE, render_call
from siglance.engine.tools import Tool, ToolCall, ToolResult

from ..test_text import TOKENIZER, ids_of
from ..tool_template import tool_template
from ..tool_trees import same

pytest.importorskip("transformers", reason="transformers is in the parity extra only")

pytestmark = pytest.mark.parity

FACTS = ReplyFacts(boxes="none", thought=("<|channel>", "<channel|>"), tool_call=("<|tool_call>", "<tool_call|>"))
WEATHER = Tool(
    "weather",
    "Weather of a city",
    {
        "type": "object",
        "properties": {
            "days": {"type": "array", "items": {"type": "integer"}, "description": "which"},
            "city": {"type": "string", "enum": ["Paris", "Rome"]},
        },
        "required": ["city"],
    },
)
CALLS = [
    ToolCall("weather", {"city": "Paris", "days": [1, 2.5]}),
    ToolCall("weather", {"city": "Rome", "B": None, "a": True}),
]
RESULTS = [
    ToolResult("weather", {"sky": 'a "blue" one', "celsius": -1e-7}),
    ToolResult("weather", {"value": "no idea"}),
]


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("over", [True, False])
def test_prompts(large, thinking, over):
    """The same template, with the messages in the form of OpenAI's API."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tool_template(large=large, attached=False)
    said = [
        Message("user", "hi"),
        Message("assistant", [Text("Let me see."), Thought("hmm"), *CALLS]),
        Message("tool", RESULTS),
    ]
    calls = [
        {"id": f"id{index}", "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for index, call in enumerate(CALLS)
    ]
    theirs = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see."},
        {"role": "assistant", "content": "", "reasoning_content": "hmm", "tool_calls": calls},
        *(
            {"role": "tool", "tool_call_id": f"id{index}", "name": result.name, "content": result.fields}
            for index, result in enumerate(RESULTS)
        ),
    ]
    if over:
        said += [Message("assistant", "Warm."), Message("user", "thanks")]
        theirs += [{"role": "assistant", "content": "Warm."}, {"role": "user", "content": "thanks"}]
    [expected], _ = render_jinja_template(
        conversations=[theirs],
        tools=[WEATHER.declaration()],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<bos>",
        **({"enable_thinking": True} if thinking else {}),
    )
    builder = PromptBuilder(TOKENIZER, PromptFacts(begin="<bos>", image=None), ChatTemplate(template), None, FACTS)
    assert builder.chat(said, tools=[WEATHER], thinking=thinking).text == expected


_texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co"]), max_size=12).filter(
    lambda text: "<|" not in text
)
_keys = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
_numbers = st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9, allow_subnormal=False).filter(
    lambda x: "e" not in repr(x)
)
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(calls=st.lists(st.builds(ToolCall, _keys, st.dictionaries(_keys, _values, max_size=4)), min_size=1, max_size=3))
def test_calls(calls):
    """Thought, calls and answer of one reply. Their parser reads text, so a string cannot spell a marker there."""
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
    from transformers.utils.chat_parsing import parse_response

    template = next(value for kinds, value in _RESPONSE_TEMPLATE_FALLBACKS.items() if "gemma4" in kinds)
    spelled = "".join(f"<|tool_call>{QUOTE.join(render_call(call))}<tool_call|>" for call in calls)
    theirs = parse_response(
        f"<|channel>thought\nhmm<channel|>{spelled}<|tool_response>", template, prefix="<|turn>model\n"
    )
    pieces = ["<|channel>", "thought\nhmm", "<channel|>"]
    for call in calls:
        segments = [piece for segment in render_call(call) for piece in (segment, QUOTE)][:-1]
        pieces += ["<|tool_call>", *segments, "<tool_call|>"]
    parts = ReplyParts(TOKENIZER, Markers.read(TOKENIZER, FACTS), (), special_ids(TOKENIZER))
    found = [*map(parts.push, ids_of(*pieces)), parts.finish()]
    assert theirs["reasoning_content"] == "".join(piece.thought for piece in found) == "hmm"
    read = [(one["function"]["name"], one["function"]["arguments"]) for one in theirs["tool_calls"]]
    assert len(read) == len(parts.calls) == len(calls)
    for (name, arguments), ours, made in zip(read, parts.calls, calls, strict=True):
        assert name == ours.name == made.name
        assert same(arguments, ours.arguments)
        assert same(dict(made.arguments), ours.arguments)
