"""The OpenAPI document of a server: what its protocols say about themselves, in one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .protocol import Protocol

__all__ = ["document"]

_TEXT = {"text/plain": {"schema": {"type": "string"}}}
_OWN: dict[str, Any] = {
    "/health": {
        "get": {
            "operationId": "health",
            "summary": "Whether the server is there. Needs no key.",
            "security": [],
            "responses": {
                "200": {
                    "description": "It is.",
                    "content": {
                        "application/json": {
                            "schema": {
                                "type": "object",
                                "required": ["status", "models"],
                                "properties": {
                                    "status": {"const": "ok"},
                                    "models": {"type": "array", "items": {"type": "string"}},
                                },
                            }
                        }
                    },
                }
            },
        }
    },
    "/metrics": {
        "get": {
            "operationId": "metrics",
            "summary": "Counters as Prometheus reads them.",
            "responses": {"200": {"description": "Counters.", "content": _TEXT}},
        }
    },
}


def document(protocols: Sequence[Protocol]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths, schemas = dict(_OWN), {}
    for protocol in protocols:
        paths |= protocol.openapi
        schemas |= protocol.schemas
    return {
        "openapi": "3.1.0",
        "info": {"title": "siglance", "version": _version(), "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-goog-api-key"},
                "query": {"type": "apiKey", "in": "query", "name": "key"},
            },
        },
        # Any of them; or none, where the server has no keys.
        "security": [{}, {"bearer": []}, {"header": []}, {"query": []}],
    }


def _version() -> str:
    try:
        return version("siglance")
    except PackageNotFoundError:
        return "unknown"
