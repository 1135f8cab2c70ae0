"""Decode steps behind short and long prompts: what of them grows with the past.

    python -P benchmarks/long_context.py BUNDLE [--past N...] [--steps N] [--rounds N] [--out RESULTS]

Layers with a window see as many keys behind 8,192 tokens as behind 512, so only the attention of global layers may take
longer. Speeds are of plain steps, in turns; the split by kind of layer comes from one more pass under onnxruntime's
profiler, which makes every kernel about a microsecond longer. Writes RESULTS.json and RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from siglance.engine.bench.graph_file import read_graph
from siglance.engine.bench.report import machine
from siglance.engine.bundle import Bundle
from siglance.engine.graph import Graph, usable_cores, versions
from siglance.engine.runtime import Runtime

WINDOWED, GLOBAL, PRODUCTS, REST = "attention, windowed", "attention, global", "matrix products", "everything else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--past", type=int, nargs="+", default=[512, 1024, 8192])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("long_context"), help="results, without an ending")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine() | {"threads": usable_cores()},
        "versions": versions(),
        "bundle": f"{bundle.manifest.name}, {bundle.manifest.precision}",
        "rounds": options.rounds,
        "steps": options.steps,
        **measure(bundle, options.past, options.steps, options.rounds),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def measure(bundle: Bundle, pasts: list[int], steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step for every round, and of its parts, by the length of the past."""
    runtime = Runtime(bundle, sees=False)
    ids = np.random.default_rng(0).integers(1000, 50_000, max(pasts))
    kept = {}
    for past in pasts:  # every round goes on from the same states: a long prompt runs once
        session = runtime.session()
        session.prefill(ids[:past])
        kept[past] = session.snapshot()
    took: dict[str, list[float]] = {str(past): [] for past in pasts}
    for round in range(-1, rounds):  # the first is a warm-up
        for past in pasts:
            session = runtime.session()
            session.restore(kept[past])
            logits = session.step(1000)  # binds the buffers
            begin = time.perf_counter()
            for _ in range(steps):
                logits = session.step(int(np.argmax(logits)))
            if round >= 0:
                took[str(past)].append(1e3 * (time.perf_counter() - begin) / steps)
    kinds = _kinds(bundle)
    parts, events = {}, []
    for past in pasts:
        with tempfile.TemporaryDirectory() as folder:
            runtime.decoder = Graph(bundle.path("decoder"), runtime.device, profile=Path(folder) / "decoder")
            session = runtime.session()
            session.restore(kept[past])
            for _ in range(steps):
                session.step(1000)
            events = json.loads(runtime.decoder.end_profiling().read_text(encoding="utf-8"))
        parts[str(past)] = _split(events, kinds, steps)
    return {"step_ms": took, "parts_ms": parts, "layers": _layers(events, kinds)}


def _kinds(bundle: Bundle) -> dict[str, str]:
    """The kind of attention of each node that is one: which buffers it reads says whether it has a window."""
    graph = read_graph(bundle.path("decoder"))
    owners = {output: node for node in graph.all_nodes() for output in node.outputs if output}
    windows = {pair.input for pair in bundle.manifest.state if pair.kind == "window"}
    kinds = {}
    for node in graph.all_nodes():
        if node.op_type == "GroupQueryAttention":
            past = node.inputs[3]
            while past not in graph.inputs:  # what another layer has written, or a state of 8 bits, widened
                past = owners[past].inputs[0 if owners[past].op_type == "DequantizeLinear" else 3]
            kinds[node.name] = WINDOWED if past in windows else GLOBAL
    return kinds


def _layers(events: list[dict[str, Any]], kinds: dict[str, str]) -> dict[str, int]:
    """How many layers there are of each kind: by what ran, for a layer may have a node for single rows alone."""
    ran = {event["name"].removesuffix("_kernel_time") for event in events}
    return {kind: sum(of == kind and name in ran for name, of in kinds.items()) for kind in (WINDOWED, GLOBAL)}


def _split(events: list[dict[str, Any]], kinds: dict[str, str], steps: int) -> dict[str, float]:
    """Milliseconds of a step by part: the median over the steps for each node, then the sum of its nodes.

    Nodes that an If runs have times of their own.
    """
    nodes: dict[tuple[str, str], list[float]] = {}
    for event in events:
        is_kernel = event["cat"] == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and event["args"]["op_name"] != "If":
            name = event["name"].removesuffix("_kernel_time")
            nodes.setdefault((name, event["args"]["op_name"]), []).append(event["dur"] / 1e3)
    parts: dict[str, float] = dict.fromkeys((WINDOWED, GLOBAL, PRODUCTS, REST), 0.0)
    for (name, operator), times in nodes.items():
        kind = kinds.get(name) or (PRODUCTS if operator in ("MatMulNBits", "MatMul", "Gemm") else REST)
        parts[kind] += statistics.median(times[-steps:])
    return parts


def markdown(results: dict[str, Any]) -> str:
    """A row for each length of the past, and what the longest has over the shortest."""
    layers = results["layers"]
    names = [f"{kind} ({layers[kind]} layers)" if kind in layers else kind for kind in (WINDOWED, GLOBAL)]
    lines = [
        f"| past tokens | tokens a second | ms a step | {' | '.join([*names, PRODUCTS, REST])} |",
        "|---" * 7 + "|",
    ]
    for past, steps in results["step_ms"].items():
        speeds = [1e3 / step for step in steps]
        speed = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} - {max(speeds):.0f})"
        parts = " | ".join(f"{value:.2f}" for value in results["parts_ms"][past].values())
        lines.append(f"| {past} | {speed} | {statistics.median(steps):.2f} | {parts} |")
    first, *_, last = results["step_ms"]
    ratio = statistics.median(b / a for a, b in zip(results["step_ms"][first], results["step_ms"][last], strict=True))
    place = results["machine"]
    known = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    note = (
        f"{results['bundle']}: {results['steps']} steps, median of {results['rounds']} rounds in turns (smallest - "
        f"largest); behind {last} tokens a step takes {ratio:.2f} times as long as behind {first}. Parts are kernel "
        f"milliseconds under the profiler. {place['cpu']}, {place['threads']} threads, {place['platform']}; "
        f"{results['date']}; {known}."
    )
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main()
