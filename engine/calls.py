"""What a request says about calls: whether the model may make them, must, of which functions, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .call_grammar import call_grammar
from .errors import PromptError
from .grammar import Constraint, Constraints
from .thinking import Markers
from .tools import Tool, ToolLike, read_tools

__all__ = ["CHOICES", "CallRules", "ToolChoice", "make_call_rules"]

CHOICES = ("auto", "none", "required")

ToolChoice = str | Sequence[str]
"""Whether the model may call, or must, and what.

"auto": it decides. If one of the tools is strict, it can call none but those that are declared, and the strict ones
with valid arguments only.
"none": it cannot call, and is not shown the tools.
"required": the reply is calls, one or several, and nothing else but a thought before them. The arguments are valid by
the schemas of the tools, strict or not.
A name: the same, but one call, of this function.
A list of names: the same as "required", of these functions only. So one that is called "auto" can be chosen too.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """The calls of a reply.

    Attributes:
        tools: the functions that the model is shown.
        allowed: whether it may call at all.
        required: whether the reply is calls, and nothing else behind a thought.
        most: how many calls there may be, None for any number.
        constraint: what each call is held to behind the token that begins it, None for nothing.
    """

    tools: tuple[Tool, ...] = ()
    allowed: bool = True
    required: bool = False
    most: int | None = None
    constraint: Constraint | None = None


def make_call_rules(
    tools: Sequence[ToolLike], choice: ToolChoice, parallel: bool, constraints: Constraints, markers: Markers
) -> CallRules:
    """The rules of a request.

    Raises PromptError for tools and choices that cannot be, and GrammarError for schemas that calls cannot be held to.
    """
    declared = read_tools(tools)
    if not isinstance(parallel, bool):
        raise PromptError(f"parallel_tool_calls is {parallel!r}, expected True or False")
    if choice == "none":
        return CallRules(allowed=False)
    named = isinstance(choice, str) and choice not in CHOICES
    most = 1 if named or not parallel else None
    callable = _chosen(declared, choice)
    required = choice != "auto"
    if not required and not any(tool.strict for tool in declared):
        return CallRules(tools=declared, most=most)
    if markers.call < 0:
        raise PromptError("tools: the model of this bundle has no form for calls of tools")
    grammar = call_grammar(callable, quote=markers.quote, end=markers.call_end, all_held=required)
    return CallRules(tools=declared, required=required, most=most, constraint=constraints.compile_calls(grammar))


def _chosen(declared: Sequence[Tool], choice: ToolChoice) -> Sequence[Tool]:
    """The tools that may be called."""
    if choice == "auto":
        return declared
    if not isinstance(choice, str | list | tuple) or not all(isinstance(name, str) for name in choice):
        raise PromptError(
            f"tool_choice is {choice!r}, expected {', '.join(map(repr, CHOICES))}, the name of a tool or a list"
        )
    if not declared:
        raise PromptError(f"tool_choice is {choice!r}, and no tools are declared")
    if choice == "required":
        return declared
    names = dict.fromkeys([choice] if isinstance(choice, str) else choice)
    if not names:
        raise PromptError("tool_choice is a list without names")
    known = {tool.name: tool for tool in declared}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        shown = ", ".join(list(known)[:20])
        raise PromptError(f"tool_choice: no tool has the name {unknown!r} (declared: {shown})")
    return [known[name] for name in names]
