"""Whether a chat template supports tools and thinking, found out by rendering a small conversation with it.

A template is a program: its source says little about what it does, and an error inside it says less. What counts is
that it writes tools in the format in which replies are parsed, see `tool_format`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from .errors import PromptError
from .manifest import ReplyFacts
from .messages import MessageTurn, Text, template_messages
from .template import ChatTemplate
from .tool_format import QUOTE, render_call, render_declaration, render_response
from .tools import Tool, ToolCall, ToolResult

__all__ = ["TemplateCapabilities"]

_TOOL = Tool(
    "probe_tool",
    "probe-description",
    {
        "type": "object",
        "properties": {"probe_key": {"type": "string", "description": "probe-value"}},
        "required": ["probe_key"],
    },
)
_CALL = ToolCall("probe_tool", {"probe_key": "probe-argument"})
_RESULT = ToolResult("probe_tool", {"probe_key": "probe-result"})
_USER = MessageTurn(0, "user", [Text("probe-user")])
_CONVERSATION = [_USER, MessageTurn(1, "assistant", [], calls=(_CALL,)), MessageTurn(2, "tool", [], results=(_RESULT,))]


class TemplateCapabilities:
    """What `template` supports, for replies that are parsed by `facts`. Nothing is rendered before it is asked for."""

    def __init__(self, template: ChatTemplate, begin: str, facts: ReplyFacts):
        self._template = template
        self._begin = begin
        self._facts = facts

    def require_thinking(self) -> None:
        """Raises PromptError unless thinking can be switched on, and thoughts be told from answers."""
        if self._facts.thought is None:
            raise PromptError("thinking: the model of this bundle does not mark its thoughts")
        if not self._switches_thinking:
            raise PromptError("thinking: the chat template of this bundle does not know it (enable_thinking)")

    def require_tools(self) -> None:
        """Raises PromptError unless the template writes tools, their calls and results as replies are read."""
        if self._facts.tool_call is None:
            raise PromptError("tools: the model of this bundle has no form for calls of tools")
        if self._attaches_results is None:
            raise PromptError(
                "tools: the chat template of this bundle does not write tools, or not in the form in which replies are "
                "read"
            )

    @property
    def attaches_results(self) -> bool:
        """Whether results go to the template with their calls, or else in messages of their own."""
        return bool(self._attaches_results)

    @functools.cached_property
    def before_calls(self) -> str:
        """What the template writes between what the assistant says and the calls behind it.

        Some close the turn there, which the model does not do.
        """
        assert self._facts.tool_call is not None
        said = MessageTurn(1, "assistant", [Text("probe-said")], calls=(_CALL,))
        rendered = self._try([_USER, said, _CONVERSATION[2]], self.attaches_results) or ""
        behind = rendered.partition("probe-said")[2]
        between, call, _ = behind.partition(self._facts.tool_call[0])
        return between if call else ""

    @functools.cached_property
    def _switches_thinking(self) -> bool:
        plain, thinking = (self._try([_USER], enable_thinking=enabled) for enabled in (False, True))
        return thinking is not None and thinking != plain

    @functools.cached_property
    def _attaches_results(self) -> bool | None:
        """None if neither way works. Some templates read results in messages as text, some read no messages at all."""
        assert self._facts.tool_call is not None
        call, call_end = self._facts.tool_call
        wanted = [
            _without_space(f"<|tool>{QUOTE.join(render_declaration(_TOOL))}<tool|>"),
            _without_space(f"{call}{QUOTE.join(render_call(_CALL))}{call_end}"),
            _without_space(f"<|tool_response>{QUOTE.join(render_response(_RESULT))}<tool_response|>"),
        ]
        for attach in (True, False):
            rendered = self._try(_CONVERSATION, attach, tools=[_TOOL.declaration()])
            if rendered is not None and all(piece in _without_space(rendered) for piece in wanted):
                return attach
        return None

    def _try(self, turns: Sequence[MessageTurn], attach: bool = False, **variables: Any) -> str | None:
        messages = template_messages(turns, lambda text: text, attach_results=attach)
        try:
            return self._template.render(messages, bos_token=self._begin, add_generation_prompt=True, **variables)
        except PromptError:
            return None


def _without_space(text: str) -> str:
    return "".join(text.split())
