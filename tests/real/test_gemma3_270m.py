"""The real Gemma 3 270M at fp32: golden tokens and logits of transformers, and the memory that its export needs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from siglance.engine import Engine, Sampling

pytestmark = pytest.mark.real

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "gemma3-270m.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
MEGABYTE = 1e6


def resident_bytes(root: int) -> int:
    """Proportional resident memory of process `root` and everything it has started."""
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
            for task in Path(f"/proc/{process}/task").iterdir():
                if task.name != str(process):
                    children += (task / "children").read_text().split()
        except OSError:
            continue
        total += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
        waiting += map(int, children)
    return total


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """(bundle folder, peak resident bytes of the export and its child processes)."""
    folder = tmp_path_factory.mktemp("real") / "gemma-3-270m"
    process = subprocess.Popen(
        [sys.executable, "-m", "siglance.engine", "export", checkpoint, "-o", folder, "--precision", "fp32"], cwd="/"
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    assert code == 0
    return folder, peak


@pytest.fixture(scope="module")
def engine(exported):
    with Engine.open(exported[0]) as opened:
        yield opened


def test_export_peak_memory(exported):
    """The most is the self-test in a child: the weights, mapped once (1.07 GB), and two interpreters beside them."""
    print(f"export of the 270M fp32 folder: peak {exported[1] / MEGABYTE:.0f} MB resident, children included")
    assert exported[1] < 1300 * MEGABYTE


@pytest.mark.parametrize("name", CASES)
def test_golden_ids_and_logits(engine, name):
    case = CASES[name]
    reply = engine.generate([], prompt_ids=case["input_ids"], max_tokens=32, sampling=Sampling(temperature=0))
    assert list(reply.token_ids) == case["greedy_ids"]
    logits = engine.runtime.session().prefill(np.array(case["input_ids"]))
    top = {entry["id"]: entry["logit"] for entry in case["first_step_top5"]}
    difference = max(abs(float(logits[token]) - expected) for token, expected in top.items())
    print(f"{name}: 32 of 32 greedy ids, top-5 logits within {difference:.1e}")
    assert difference < 2e-3


@pytest.mark.parametrize("name", CASES)
def test_golden_prompt_text(engine, name):
    """The tokenizer and the one beginning-of-sequence token: the prompt's text gives the golden ids."""
    case = CASES[name]
    if case["prompt"] is not None:
        prompt = engine.generate(case["prompt"], raw=True, max_tokens=1).prompt_token_ids
        assert list(prompt) == case["input_ids"]


@pytest.mark.parametrize("chunk", [64, 7])
def test_chunked_prefill_gives_the_same_tokens(engine, chunk):
    case = CASES["long600"]
    reply = engine.generate(
        [], prompt_ids=case["input_ids"], max_tokens=32, sampling=Sampling(temperature=0), prefill_chunk=chunk
    )
    assert list(reply.token_ids) == case["greedy_ids"]


def test_verify(engine):
    report = engine.verify()
    assert report.result == "equal"
    assert report.max_logit_difference < 1e-3
