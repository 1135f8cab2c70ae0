"""Where the time of a decode step goes: kernels, the rest of onnxruntime, Python.

A run of its own with onnxruntime's profiler, because profiling costs time between the kernels. Taken from it are what
profiling leaves alone: the time inside kernels, and the time outside of the graphs' runs, which is Python. What is left
of a step without the profiler is the runtime's own work around the kernels.

The profiler counts whole microseconds and cuts off the rest: half of one is added for each kernel.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..graph import Graph
from ..runtime import Runtime
from .subject import Options

__all__ = ["Overhead", "kernel_times", "measure_overhead"]

_STEPS = 32
_CUT = 0.5e-6  # seconds


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a decode step, medians: inside kernels, and in Python outside of the runs of graphs.

    `by_operator` splits the kernels by operator type.
    """

    kernels: float
    python: float
    nodes: int
    by_operator: dict[str, float]


def measure_overhead(bundle: Bundle, options: Options, ids: np.ndarray, clock: Callable[[], float]) -> Overhead:
    """Decode behind the prompt `ids`, under the profiler."""
    steps = min(options.new_tokens, _STEPS)
    with tempfile.TemporaryDirectory() as folder:
        runtime = Runtime(bundle, device=options.device, threads=options.threads, sees=False)
        for name, threads in (("embed", 1), ("decoder", options.threads)):
            profile = Path(folder) / name
            setattr(runtime, name, Graph(bundle.path(name), runtime.device, threads=threads, profile=profile))
        session = runtime.session()
        logits = session.prefill(ids)
        took = []
        for _ in range(steps):
            begin = clock()
            logits = session.step(int(np.argmax(logits)))
            took.append(clock() - begin)
        runs = [
            kernel_times(json.loads(graph.end_profiling().read_text(encoding="utf-8")), steps)
            for graph in (runtime.embed, runtime.decoder)
        ]
    inside = [sum(run.seconds for run in of_step) for of_step in zip(*runs, strict=True)]
    kernels = [sum(sum(run.kernels.values()) for run in of_step) for of_step in zip(*runs, strict=True)]
    operators = sorted({name for graph in runs for run in graph for name in run.kernels})
    return Overhead(
        kernels=statistics.median(kernels),
        python=statistics.median(wall - graphs for wall, graphs in zip(took, inside, strict=True)),
        nodes=sum(graph[-1].nodes for graph in runs),
        by_operator={
            name: statistics.median(
                sum(run.kernels.get(name, 0.0) for run in of_step) for of_step in zip(*runs, strict=True)
            )
            for name in operators
        },
    )


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Seconds of one run of a graph, and of its kernels by operator type."""

    seconds: float
    kernels: dict[str, float]
    nodes: int


def kernel_times(events: list[dict[str, Any]], last: int) -> list[RunTimes]:
    """The last so many runs in the events of onnxruntime's profiler."""
    whole = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")[-last:]
    kernels = sorted(
        (event["ts"], event["dur"], event["args"]["op_name"])
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    )
    runs, at = [], 0
    for start, length in whole:
        times: dict[str, float] = {}
        count = 0
        while at < len(kernels) and kernels[at][0] < start:
            at += 1
        while at < len(kernels) and kernels[at][0] < start + length:
            _, duration, operator = kernels[at]
            times[operator] = times.get(operator, 0.0) + duration * 1e-6 + _CUT
            count, at = count + 1, at + 1
        runs.append(RunTimes(length * 1e-6, times, count))
    return runs
