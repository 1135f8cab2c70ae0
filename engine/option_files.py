"""What options of the command line name by a file: UTF-8, with or without the mark that Windows puts in front."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import InputError, PromptError
from .grammar import MAX_GRAMMAR_BYTES, Grammar
from .tools import Tool, read_tools

__all__ = ["read_format", "read_ids", "read_tools_file"]

_MAX_TOOLS_CHARACTERS = 2**20


def read_format(schema: Path | None, regex: str | None, grammar: Path | None, detections: bool) -> Grammar | None:
    """The form of the reply that the options ask for. Raises InputError."""
    options = {"--schema": schema, "--regex": regex, "--grammar": grammar, "--detections": detections or None}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other")
    if schema is not None:
        return Grammar.json_schema(_read_text("--schema", schema))
    if regex is not None:
        return Grammar.regex(regex)
    if grammar is not None:
        return Grammar.lark(_read_text("--grammar", grammar))
    return Grammar.detections() if detections else None


def _read_text(option: str, path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MAX_GRAMMAR_BYTES + 1)  # one too many is refused
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Why a file cannot be used, without its name, which stands in front already."""
    return getattr(error, "strerror", None) or str(error)


def read_ids(path: Path) -> list[int]:
    """The ids of the option --prompt-ids. Raises PromptError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"--prompt-ids {path}: {_reason(error)}") from None
    if not isinstance(value, list):
        raise PromptError(f"--prompt-ids {path}: expected a JSON list of token ids, found {type(value).__name__}")
    return value


def read_tools_file(path: Path | None) -> tuple[Tool, ...]:
    """The tools of the option --tools. Raises PromptError."""
    if path is None:
        return ()
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MAX_TOOLS_CHARACTERS + 1)
        if len(text) > _MAX_TOOLS_CHARACTERS:
            raise PromptError(f"more than {_MAX_TOOLS_CHARACTERS} characters")
        return read_tools(json.loads(text))
    except (OSError, ValueError, RecursionError) as error:  # PromptError is a ValueError
        raise PromptError(f"--tools {path}: {_reason(error)}") from None
