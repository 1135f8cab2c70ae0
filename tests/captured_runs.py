"""What a card does with captured runs, done on the CPU: states in separate memory, and runs that are replayed.

A replay uses the memory that was bound at capture and the numbers that lay on the host then, whatever has happened to
them since; and a run that is captured is done several times over first. Both are facts of onnxruntime's CUDA provider.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest

from siglance.engine import engine
from siglance.engine.device_memory import DeviceMemory, HostMemory, Traffic
from siglance.engine.graph import Device, Graph
from siglance.engine.runtime import Runtime

WARM_UPS = 2  # full runs before the one that is captured; then that is replayed once


class CapturingGraph:
    """Gives a decoder on the CPU the captured runs of a card. Counts captures and replays."""

    def __init__(self, graph: Graph):
        self.captures = self.replays = 0
        self._graph, self._run_bound = graph, graph.run_bound
        self._captured: dict[int, onnxruntime.IOBinding] = {}
        graph.captures = True
        graph.run_options = lambda number: number
        graph.bind = lambda: _Binding(graph._session)
        graph.run_bound = self.run_bound

    def run_bound(self, binding: onnxruntime.IOBinding, options: object = None) -> None:
        if not isinstance(options, int):
            self._run_bound(binding)
            return
        if options not in self._captured:
            assert isinstance(binding, _Binding)
            for _ in range(WARM_UPS):
                self._run_bound(binding)
            self._captured[options] = binding.frozen()
            self.captures += 1
        else:
            self.replays += 1
        self._run_bound(self._captured[options])

    def undo(self) -> None:
        self._graph.captures = False
        for name in ("run_options", "bind", "run_bound"):
            delattr(self._graph, name)


class _Binding(onnxruntime.IOBinding):
    """Remembers what is bound."""

    def __init__(self, session: onnxruntime.InferenceSession):
        super().__init__(session)
        self._of, self._inputs, self._outputs = session, {}, {}

    def bind_ortvalue_input(self, name: str, ortvalue: onnxruntime.OrtValue) -> None:
        self._inputs[name] = ortvalue
        super().bind_ortvalue_input(name, ortvalue)

    def bind_ortvalue_output(self, name: str, ortvalue: onnxruntime.OrtValue) -> None:
        self._outputs[name] = ortvalue
        super().bind_ortvalue_output(name, ortvalue)

    def frozen(self) -> _Binding:
        """The same memory for everything on the device, and the numbers that lie on the host now."""
        twin = _Binding(self._of)
        for name, value in self._inputs.items():
            on_host = name == "total_sequence_length"
            copy = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(value.numpy())) if on_host else value
            twin.bind_ortvalue_input(name, copy)
        for name, value in self._outputs.items():
            twin.bind_ortvalue_output(name, value)
        return twin


@contextlib.contextmanager
def on_a_device(runtime: Runtime, *, captured: bool) -> Iterator[CapturingGraph | None]:
    """Keep the states of `runtime` in separate memory while the context is open, and capture its decode steps."""
    decoder = CapturingGraph(runtime.decoder) if captured else None
    runtime.keep_states_on(Device("cpu"))
    try:
        yield decoder
    finally:
        runtime.memory, runtime.device_step = HostMemory(), None
        if decoder is not None:
            decoder.undo()


def traffic(runtime: Runtime) -> Traffic:
    """The counters of the runtime's memory, which is that of a device."""
    assert isinstance(runtime.memory, DeviceMemory)
    return runtime.memory.traffic


# --- as a plugin of pytest (-p tests.captured_runs), for whole suites: see test_device_suites.py

_made: list[CapturingGraph] = []


def pytest_configure() -> None:
    """Every engine of this process keeps its states in separate memory and captures its steps."""

    def runtime_on_a_device(*arguments: Any, **options: Any) -> Runtime:
        runtime = Runtime(*arguments, **options)
        _made.append(CapturingGraph(runtime.decoder))
        runtime.keep_states_on(Device("cpu"))
        return runtime

    engine.Runtime = runtime_on_a_device  # pyright: ignore[reportAttributeAccessIssue]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    captures, replays = sum(each.captures for each in _made), sum(each.replays for each in _made)
    terminalreporter.write_line(f"captured {captures}, replayed {replays}")
