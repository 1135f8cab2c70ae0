"""Runs of graphs are ended from another thread, and nothing is the worse for it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest

from siglance.engine import Engine, Sampling
from siglance.engine.errors import Cancelled, ModelOutputError
from siglance.engine.interruption import Interruption
from siglance.engine.self_test import formula_picture

from .endless import ENDLESS, spinning, turns

GREEDY = {"sampling": Sampling(temperature=0), "max_tokens": 6, "cache": False}
ASKED = [formula_picture(60, 90), "describe"]


def ended(interruption: Interruption, work) -> type[BaseException] | None:
    """What a thread that `work`s ends with, once `interruption` is set while it computes."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            with interruption.here():
                work()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    begin = time.process_time()
    while time.process_time() < begin + 0.05:  # of which this thread itself needs next to nothing
        thread.join(0.001)
    interruption.set()
    thread.join(30)
    assert not thread.is_alive()
    return type(found[0]) if found[0] is not None else None


def test_a_run_is_ended_in_its_middle(tmp_path):
    graph = spinning(tmp_path)
    expected = graph.run(turns(3))["y"]
    assert ended(Interruption(), lambda: graph.run(turns(ENDLESS))) is Cancelled
    assert graph.run(turns(3))["y"] == expected


def test_a_bound_run_is_ended_too(tmp_path):
    graph = spinning(tmp_path)
    binding = graph.bind()
    for name, value in turns(ENDLESS).items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("y")
    assert ended(Interruption(), lambda: graph.run_bound(binding)) is Cancelled


def test_runs_elsewhere_go_on(tmp_path):
    """In other threads, and outside of the block."""
    graph, interruption = spinning(tmp_path), Interruption()
    other = Interruption()
    with other.here():
        assert graph.run(turns(1))
    assert ended(interruption, lambda: graph.run(turns(ENDLESS))) is Cancelled
    assert graph.run(turns(1))
    with other.here():
        assert graph.run(turns(1))
    with interruption.here(), pytest.raises(Cancelled):
        graph.run(turns(1))


def test_other_errors_stay_what_they_are(tmp_path):
    graph = spinning(tmp_path)
    with Interruption().here(), pytest.raises(ModelOutputError, match="graph 'spin' failed"):
        graph.run({"x": turns(1)["x"]})


class AtRun(Interruption):
    """Ends the run of a number, just as it begins."""

    def __init__(self, number: int):
        super().__init__()
        self.runs, self._number = 0, number

    @contextmanager
    def run(self, options):
        with super().run(options):
            if self.runs == self._number:
                self.set()
            self.runs += 1
            yield


@pytest.fixture(scope="module")
def demo():
    with Engine.open("demo", threads=1) as engine:
        yield engine


@pytest.mark.parametrize("cache", [False, True])
def test_an_engine_answers_as_before_whatever_run_was_ended(demo, cache):
    """Tower, embedding, prompt, steps: each in turn."""
    expected = demo.generate(ASKED, **GREEDY)
    options = GREEDY | {"cache": cache}
    number = 0
    while True:
        interruption = AtRun(number)
        try:
            with interruption.here():
                demo.generate(ASKED, **options, cancelled=interruption.is_set)
        except Cancelled:
            demo._reuse.clear()
            number += 1
            again = demo.generate(ASKED, **options)
            assert (again.text, again.token_ids) == (expected.text, expected.token_ids)
            demo._reuse.clear()
        else:
            break
    assert number == interruption.runs > 8


@pytest.mark.parametrize("wanted", [1, 3])
def test_a_prompt_is_left_between_its_chunks(demo, monkeypatch, wanted):
    """`cancelled` alone, of a caller that interrupts nothing, is looked at before each chunk."""
    runs = []
    run = demo.runtime.decoder.run_bound

    def counted(binding):
        runs.append(binding)
        run(binding)

    monkeypatch.setattr(demo.runtime.decoder, "run_bound", counted)
    with pytest.raises(Cancelled):
        demo.generate("count the red circles", **GREEDY, prefill_chunk=2, cancelled=lambda: len(runs) == wanted)
    assert len(runs) == wanted
