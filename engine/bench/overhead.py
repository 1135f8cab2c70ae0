"""Where the time of a decode step goes: kernels, the rest of onnxruntime, Python.

onnxruntime's profiler cannot say it by itself: it makes every kernel some microseconds longer, which is more than most
take. So the step is measured without it, and what is outside of the kernels is found piece by piece: Python is the time
of a step outside of the runs of its graphs, which profiling leaves alone; the runtime's own work is what
`Probes.runtime` measured, for each run and each node. The kernels are the rest.

Only the share of each operator comes from the profile. What the profiler added is known from a chain of additions of
single numbers, and is taken off each kernel.
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
from ..graph import Device, Graph
from ..runtime import Runtime
from .probes import Probes, chain_model
from .subject import Options

__all__ = ["Overhead", "kernel_times", "measure_overhead"]

_STEPS = 32
_CUT = 0.5e-6  # seconds: the profiler counts whole microseconds and cuts off the rest
_CHAIN = 200  # additions


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds of a decode step outside of its kernels: in the runtime and in Python.

    `by_operator` splits the kernels by operator type, without what the profiler adds to them.
    """

    runtime: float
    python: float
    nodes: int
    by_operator: dict[str, float]


def measure_overhead(
    bundle: Bundle, options: Options, ids: np.ndarray, probes: Probes, clock: Callable[[], float]
) -> Overhead:
    """Decode behind the prompt `ids`, under the profiler."""
    steps = min(options.new_tokens, _STEPS)
    with tempfile.TemporaryDirectory() as folder:
        added = _added(Path(folder), options.threads)
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
            kernel_times(_events(graph), steps, added) for graph in (runtime.embed, runtime.decoder)
        ]  # by graph, then by step
    by_step = list(zip(*runs, strict=True))
    per_run, per_node = probes.runtime()
    nodes = sum(graph[-1].nodes for graph in runs)
    python = [wall - sum(run.seconds for run in of_step) for wall, of_step in zip(took, by_step, strict=True)]
    operators = sorted({name for graph in runs for run in graph for name in run.kernels})
    return Overhead(
        runtime=len(runs) * per_run + nodes * per_node,
        python=statistics.median(python),
        nodes=nodes,
        by_operator={
            name: statistics.median(sum(run.kernels.get(name, 0.0) for run in of_step) for of_step in by_step)
            for name in operators
        },
    )


def _added(folder: Path, threads: int | None) -> float:
    """Seconds that the profiler adds to a kernel."""
    path = folder / "chain.onnx"
    path.write_bytes(chain_model(_CHAIN))
    graph = Graph(path, Device("cpu"), threads=threads, profile=folder / "chain")
    for _ in range(_STEPS):
        graph.run({"x": np.ones(1, np.float32)})
    runs = kernel_times(_events(graph), _STEPS, 0.0)
    return statistics.median(run.kernels["Add"] / run.nodes for run in runs)


def _events(graph: Graph) -> list[dict[str, Any]]:
    return json.loads(graph.end_profiling().read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Seconds of one run of a graph, and of its kernels by operator type."""

    seconds: float
    kernels: dict[str, float]
    nodes: int


def kernel_times(events: list[dict[str, Any]], last: int, added: float) -> list[RunTimes]:
    """The last so many runs in the events of onnxruntime's profiler, which has `added` seconds to every kernel."""
    whole = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")[-last:]
    kernels = sorted(
        (
            (event["ts"], event["dur"], event["args"]["op_name"])
            for event in events
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        ),
        key=lambda kernel: (kernel[0], -kernel[1]),  # control flow before what begins with it
    )
    runs, at = [], 0
    for start, length in whole:
        times: dict[str, float] = {}
        count = 0
        while at < len(kernels) and kernels[at][0] < start:
            at += 1
        while at < len(kernels) and kernels[at][0] < start + length:
            begin, duration, operator = kernels[at]
            at += 1
            if at < len(kernels) and kernels[at][0] < begin + duration:
                continue  # control flow: what it runs are the kernels that follow
            times[operator] = times.get(operator, 0.0) + max(duration * 1e-6 + _CUT - added, 0.0)
            count += 1
        runs.append(RunTimes(length * 1e-6, times, count))
    return runs
