"""The checkpoint that the tests of this folder share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("SIGLANCE_TEST_CACHE") or Path(__file__).parents[2] / ".cache") / "gemma3-270m"


@pytest.fixture(scope="session")
def checkpoint():
    """The Hugging Face folder of the real Gemma 3 270M; its GGUF file lies beside it."""
    # In a process of its own: torch and the widened weights must not count as memory of the tests.
    command = [sys.executable, "-P", Path(__file__).with_name("checkpoint.py"), CACHE]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd="/")
    return Path(done.stdout.split()[-1])
