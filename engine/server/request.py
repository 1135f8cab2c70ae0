"""A request in no protocol's words: what the engine is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..calls import ToolChoice
from ..engine import DEFAULT_MAX_TOKENS
from ..grammar import Grammar
from ..parts import Turn
from ..prompt import Text
from ..sampling import Sampling
from ..tools import ToolLike

__all__ = ["Request"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """The arguments of `Engine.stream` that a request may set, see there.

    Text of the parts must be `Text`, never a plain `str`, which could name a file.
    """

    conversation: tuple[Turn, ...]
    system: str | None = None
    image_tokens: int | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()
    format: Grammar | None = None
    candidates: int = 1
    logprobs: int | None = None
    tools: tuple[ToolLike, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking: bool = False

    def spoken(self) -> str:
        """What is asked, in one line for the log: texts as they are, everything else by its kind."""
        turns = [Turn("system", Text(self.system))] if self.system is not None else []
        said = []
        for turn in (*turns, *self.conversation):
            parts = turn.parts if isinstance(turn.parts, list | tuple) else (turn.parts,)
            words = (repr(part.text) if isinstance(part, Text) else f"<{type(part).__name__}>" for part in parts)
            said.append(f"{turn.role}: {' '.join(words)}")
        return ", ".join(said)

    def prompt_arguments(self) -> dict[str, Any]:
        """The arguments of `Engine.count_tokens`."""
        return {
            "conversation": self.conversation,
            "system": self.system,
            "image_tokens": self.image_tokens,
            "tools": self.tools,
            "thinking": self.thinking,
        }

    def stream_arguments(self) -> dict[str, Any]:
        """The arguments of `Engine.stream`."""
        return self.prompt_arguments() | {
            "max_tokens": self.max_tokens,
            "sampling": self.sampling,
            "stop": self.stop,
            "format": self.format,
            "candidates": self.candidates,
            "logprobs": self.logprobs,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
