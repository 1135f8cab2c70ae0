"""Servers shared by the tests of the protocols."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from siglance.engine import Engine

from .running import Running, serving


@pytest.fixture(scope="session")
def demo() -> Iterator[Engine]:
    """The embedded demo."""
    with Engine.open("demo") as engine:
        yield engine


@pytest.fixture(scope="session")
def server(demo) -> Iterator[Running]:
    """The demo behind all protocols: `server.url`, `server.get(path)`, `server.post(path, body)`."""
    with serving(demo) as running:
        yield running
