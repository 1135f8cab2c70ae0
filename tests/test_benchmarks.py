"""What benchmarks compute: the graph without the last-row rule, the split of a step, goals and ratios."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.graph import Graph
from siglance.engine.runtime import Runtime

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by its name; its folder is on the path for as long as the test runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)

    yield importlib.import_module

    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if path is not None and FOLDER in Path(path).parents:
            del sys.modules[name]


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


def test_the_graph_without_the_rule_gives_the_same_logits(load, demo, tmp_path):
    path = load("last_row").without_rule(demo.path("decoder"), tmp_path)
    own, other = Runtime(demo, sees=False), Runtime(demo, sees=False)
    other.decoder = Graph(path, own.device)
    ids = np.random.default_rng(0).integers(100, own.vocabulary, 40)
    sessions = own.session(), other.session()
    for part in (ids[:33], ids[33:]):  # a second chunk sees the first
        logits = [session.prefill(part) for session in sessions]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
    assert not np.allclose(logits[0], own.session().prefill(ids[:33]), atol=0.1)


def test_without_the_rule_only_the_head_takes_the_wanted_rows(load, demo, tmp_path):
    graph = ir.load(load("last_row").without_rule(demo.path("decoder"), tmp_path)).graph
    [wanted] = [value for value in graph.inputs if value.name == "logit_rows"]
    [take] = wanted.consumers()
    [norm] = take.outputs[0].consumers()
    assert norm.name == "norm"


def test_attention_is_split_by_the_buffers_that_it_reads(load, demo):
    long_context: ModuleType = load("long_context")
    kinds = list(long_context._kinds(demo).values())
    assert {long_context.WINDOWED, long_context.GLOBAL} == set(kinds)
    assert len(kinds) >= len(demo.manifest.state) // 2  # layers that share have nodes too
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": {"op_name": operator}}
        for name, operator, durations in (
            (next(iter(long_context._kinds(demo))), "GroupQueryAttention", (9000, 2000, 2000)),
            ("a", "MatMulNBits", (5000, 3000, 3000)),
            ("b", "MatMul", (0, 1000, 3000)),
            ("c", "Add", (0, 500, 500)),
        )
        for duration in durations
    ]
    parts = long_context._split(events, long_context._kinds(demo), 2)
    assert sorted(parts.values()) == [0.0, 0.5, 2.0, 5.0]
    assert parts[long_context.PRODUCTS] == 5.0
    assert parts[long_context.REST] == 0.5


def test_ratios_are_of_common_rounds_and_goals_are_called_by_their_name(load):
    results: ModuleType = load("results")
    runs = [
        {"engine": engine, "round": round, "prompt_tokens": 512, "decode": speed}
        for engine, speeds in (("siglance a", (10, 30, 20)), ("other", (10, 10, 10, 1)))
        for round, speed in enumerate(speeds)
    ]
    facts = {"siglance a": {"perplexity": 15.0}, "other": {"perplexity": 10.0}}
    assert results.ratio({"runs": runs}, "decode", 512, "siglance a", "other") == 2.0
    assert results.ratio({"runs": runs}, "decode", 1024, "siglance a", "other") is None
    assert results.fastest({"runs": runs, "engines": facts}, 15.0) == "siglance a"
    assert results.fastest({"runs": runs, "engines": facts}, 14.0) is None
    assert results.goal("speed", 1.04, 1.1) == "| speed | at least 1.1x | 1.04x **missed** |"
    assert results.goal("speed", 1.1, 1.1) == "| speed | at least 1.1x | 1.10x reached |"
    assert results.goal("memory", 450, 450, " MB", most=True) == "| memory | under 450 MB | 450 MB **missed** |"
    assert results.goal("speed", None, 2) == "| speed | at least 2x | not measured |"


def test_rounds_of_a_tower_are_joined_and_other_towers_stay_apart(load):
    joined = load("results").vision._joined

    def tower(model: str, *seconds: float, side: int = 8) -> dict[str, object]:
        return {
            "model": model,
            "precision": "int4",
            "pixels": [side, 8],
            "soft_tokens": 4,
            "seconds": {"a": [*seconds]},
        }

    found = joined([tower("x", 1.0)], [tower("x", 2.0, 3.0), tower("y", 4.0), tower("x", 5.0, side=16)])
    assert found == [tower("x", 1.0, 2.0, 3.0), tower("y", 4.0), tower("x", 5.0, side=16)]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to forget a file")
def test_files_are_forgotten_and_what_stays_is_counted(load, tmp_path):
    first_token: ModuleType = load("first_token")
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    with path.open("rb") as file:
        assert first_token._cached(file.fileno(), 4 << 20) == 4 << 20
        left = first_token._forget([path, tmp_path / "gone"])
        assert left == first_token._cached(file.fileno(), 4 << 20)
        assert path.read_bytes() == bytes(4 << 20)
        assert first_token._cached(file.fileno(), 4 << 20) == 4 << 20
