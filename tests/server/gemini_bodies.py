"""Bodies of the Gemini API as requests to the engine, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from siglance.engine.manifest import Manifest
from siglance.engine.server.access import Access
from siglance.engine.server.bodies import Fields
from siglance.engine.server.failures import Failure
from siglance.engine.server.gemini.config import Asked, read_request
from siglance.engine.server.request import Request
from siglance.engine.server.settings import Settings

__all__ = ["HI", "asked", "refusal", "request_of"]

HI: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}


def asked(body: dict[str, Any], manifest: Manifest, read: Callable[..., Asked] = read_request) -> Asked:
    """A body as it is read."""
    return read(Fields(body, both_cases=True), manifest, {"demo", "default"})


def request_of(body: dict[str, Any], manifest: Manifest, **settings: Any) -> Request:
    """With its files."""
    return asyncio.run(asked(body, manifest).request(Access(Settings(**settings))))


def refusal(body: dict[str, Any], manifest: Manifest) -> Failure:
    """Why a body is a bad request."""
    with pytest.raises(Failure) as caught:
        request_of(body, manifest)
    assert caught.value.status == 400
    return caught.value
