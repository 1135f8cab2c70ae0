"""What a protocol gives to the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from .failures import Failure

__all__ = ["Protocol"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """One way to talk to the server.

    Attributes:
        name: for metrics: "gemini", "openai" or "nim".
        routes: paths and what answers them. An endpoint raises `Failure`, and the application has it written.
        open_paths: of these, the ones that need no key, as /health does: probes.
        owns: whether errors under this path are written in the protocol's shape, unknown paths included.
        write_failure: an error in the protocol's shape.
        openapi: path items by path template, as OpenAPI 3.1 has them.
        schemas: what the path items refer to as "#/components/schemas/...".
    """

    name: str
    routes: list[Route]
    owns: Callable[[str], bool]
    write_failure: Callable[[Failure], Response]
    openapi: dict[str, Any]
    schemas: dict[str, Any] = field(default_factory=dict)
    open_paths: frozenset[str] = frozenset()
