"""Fixtures of the micro-benchmarks: the embedded demo and one picture."""

from __future__ import annotations

import pytest

from siglance.engine import Engine
from siglance.engine.self_test import formula_picture


@pytest.fixture(scope="session")
def engine():
    with Engine.open("demo") as opened:
        yield opened


@pytest.fixture(scope="session")
def photo():
    """A picture of 1920 x 1080, uint8."""
    return formula_picture(1080, 1920)
