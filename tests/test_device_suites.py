"""Requests, chats and caches with states in separate memory and captured steps: whole suites again. `make load`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.load


@pytest.mark.parametrize("suite", ["chat", "cache", "engine", "engine_state", "candidates", "perplexity"])
def test_a_suite_on_a_device(suite):
    command = ["-m", "pytest", "-q", "-p", "tests.captured_runs", f"tests/test_{suite}.py"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.search(r"captured (\d+), replayed (\d+)", done.stdout)
    assert found is not None
    # A perplexity is made of prompts alone.
    assert int(found[1]) > 0
    assert suite == "perplexity" or int(found[2]) > 0
