"""Measurements as JSON for machines and as a table for people."""

from __future__ import annotations

import dataclasses
import math
import platform
import re
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..graph import usable_cores, versions
from .measure import Comparison, Measured, Spread
from .subject import PICTURE, Options, Request

__all__ = [
    "comparison_json",
    "machine",
    "measured_json",
    "print_comparison",
    "print_measured",
    "stages",
    "surroundings",
]

STAGES = ("decode_file", "resize", "vision", "audio", "prefill", "first_sample")


def measured_json(measured: Measured) -> dict[str, Any]:
    """All results; the keys that come first are promised, see the README."""
    subject, memory = measured.subject, measured.memory
    speeds = measured.speeds()
    facts: dict[str, Any] = {name: _speed(measured, name, speeds[name]) for name in speeds}
    facts.setdefault("vision", None)
    facts["decode"] |= {"per_token_ms": _percentiles(measured), "outside_kernels": _outside(measured)}
    cost = measured.costs
    facts |= {
        "ttft_ms": stages(measured.requests),
        "peak_mb": None if memory is None else _short(memory.peak_mb),
        "memory": None if memory is None else _shortened(dataclasses.asdict(memory)),
        "bytes": {
            "per_decode_token": cost["decode"].nbytes,
            "per_prompt_token": round(cost["prefill"].nbytes / subject.options.prompt_tokens),
            "vision": cost["vision"].nbytes if "vision" in cost else None,
            "decode": {name: getattr(cost["decode"], f"{name}_bytes") for name in ("weight", "lookup", "state")},
        },
        "rates": _rates(measured),
        "bundle": {
            "name": subject.bundle.manifest.name,
            "precision": subject.bundle.manifest.precision,
            "folder": str(subject.bundle.folder),
        },
        "options": _options(subject.options),
        **surroundings(subject.device, subject.providers, subject.options),
    }
    return facts


def comparison_json(comparison: Comparison, names: tuple[str, str], options: Options) -> dict[str, Any]:
    """Speeds of both and the ratio B / A."""
    return {
        "compare": {
            side: {"bundle": name, **{stage: _spread(found) for stage, found in speeds.items()}}
            for side, name, speeds in zip("ab", names, comparison.speeds, strict=True)
        },
        "ratio": {stage: _spread(found) for stage, found in comparison.ratios.items()},
        "options": _options(options),
    }


def surroundings(device: str, providers: dict[str, list[str]], options: Options) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "device": device,
        "providers": providers,
        "threads": options.threads or usable_cores(),
        "machine": machine(),
        "versions": {"siglance": metadata.version("siglance"), "python": platform.python_version(), **versions()},
    }


def machine() -> dict[str, Any]:
    """The computer: its processor, how many of its cores this process may use, its system."""
    return {"cpu": _cpu_name(), "cores": usable_cores(), "platform": platform.platform()}


def stages(requests: list[Request]) -> dict[str, Any]:
    """Time to the first token by stage, of the request whose total is the median.

    `first_sample` is the rest: laying out the prompt, and drawing the first token.
    """
    ordered = sorted(requests, key=lambda request: request.timings.first_token)
    middle = ordered[(len(ordered) - 1) // 2]
    timings = middle.timings
    named = {name: getattr(timings, name) for name in STAGES[:-1]}
    named["first_sample"] = max(timings.first_token - sum(named.values()), 0.0)
    return {
        **_shortened(named),
        "total": _short(timings.first_token),
        "spread": _spread(Spread.of([request.timings.first_token for request in requests])),
        "prompt_tokens": middle.prompt_tokens,
        "per_token_after": _short(statistics.median(request.timings.per_token for request in requests)),
    }


def _speed(measured: Measured, name: str, found: Spread) -> dict[str, Any]:
    """One stage: tokens a second, and percent of the limit (None on a device whose limit is not measured)."""
    facts: dict[str, Any] = {"tokens_per_second": _short(found.median), "percent_of_limit": None}
    facts |= {"min": _short(found.min), "max": _short(found.max)}
    limit = None if measured.limits is None else measured.limits[name]
    if limit is not None:
        best = _tokens(measured, name) / limit.seconds
        facts["percent_of_limit"] = _short(100 * found.median / best)
        facts["limit"] = {
            "tokens_per_second": _short(best),
            "bound_by": limit.bound_by,
            "memory_ms": _short(1e3 * limit.memory),
            "arithmetic_ms": _short(1e3 * limit.arithmetic),
        }
    return facts


def _tokens(measured: Measured, name: str) -> int:
    subject = measured.subject
    return {"decode": 1, "prefill": subject.options.prompt_tokens, "vision": subject.soft_tokens}[name]


def _percentiles(measured: Measured) -> dict[str, float]:
    steps = np.concatenate([one.steps for one in measured.rounds]) * 1e3
    return {f"p{share}": _short(float(np.percentile(steps, share))) for share in (50, 90, 99)}


def _outside(measured: Measured) -> dict[str, Any] | None:
    """Milliseconds of a decode step: kernels, the runtime around them, Python; percent outside of the kernels."""
    overhead = measured.overhead
    if overhead is None:
        return None
    step = float(np.median(np.concatenate([one.steps for one in measured.rounds])))
    outside = min(overhead.runtime + overhead.python, step)
    slowest = sorted(overhead.by_operator.items(), key=lambda item: -item[1])
    return {
        "percent": _short(100 * outside / step),
        "step_ms": _short(1e3 * step),
        "kernels_ms": _short(1e3 * (step - outside)),
        "runtime_ms": _short(1e3 * overhead.runtime),
        "python_ms": _short(1e3 * overhead.python),
        "nodes": overhead.nodes,
        "by_operator_ms": {name: _short(1e3 * seconds) for name, seconds in slowest},
    }


def _rates(measured: Measured) -> dict[str, Any] | None:
    """What the probes measured: None on a device whose limit is not measured."""
    probes = measured.probes
    if probes is None:
        return None
    return {
        "read_gb_per_second": _short(probes.bandwidth() / 1e9),
        "read_spread": _spread(Spread.of([rate / 1e9 for rate in probes.bandwidths()])),
        "products": [
            {"format": str(format), "inputs": inputs, "rows": rows, "gflop_per_second": _short(rate / 1e9)}
            for (format, inputs, rows), rate in probes.products().items()
        ],
    }


def _options(options: Options) -> dict[str, Any]:
    height, width = PICTURE
    return dataclasses.asdict(options) | {"picture": f"{width}x{height} JPEG"}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _spread(found: Spread) -> dict[str, float]:
    return {"median": _short(found.median), "min": _short(found.min), "max": _short(found.max)}


def _shortened(values: dict[str, float]) -> dict[str, float]:
    return {name: _short(value) for name, value in values.items()}


def _short(value: float) -> float:
    """Four significant digits: no measurement of time is worth more."""
    if not value:
        return 0.0
    return round(value, max(0, 3 - math.floor(math.log10(abs(value)))))


# --- for people


def print_measured(facts: dict[str, Any]) -> None:
    """The table of `measured_json`."""
    console = _console()
    options, rows = facts["options"], []
    for name in ("decode", "prefill", "vision"):
        speed = facts[name]
        if speed is None:
            continue
        spread = f"{speed['min']:g} - {speed['max']:g}"
        share = speed["percent_of_limit"]
        limit = speed.get("limit")
        reached = f"{share:.0f} % of {limit['tokens_per_second']:g}, bound by {limit['bound_by']}" if limit else "-"
        rows.append((name, f"{speed['tokens_per_second']:g}", spread, reached))
    title = (
        f"{facts['bundle']['name']}, {facts['bundle']['precision']}: {options['prompt_tokens']} prompt tokens, "
        f"{options['new_tokens']} new ones, median of {options['repeats']}"
    )
    _print_table(console, title, ("", "tokens/s", "spread", "of what this machine could do"), rows)
    if facts["rates"] is None:
        console.print(f"what {facts['device']} could do, and the time outside of its kernels, is not measured")
    for line in _lines(facts):
        console.print(line, soft_wrap=True, highlight=False)


def _lines(facts: dict[str, Any]) -> list[str]:
    percentiles, outside, ttft = facts["decode"]["per_token_ms"], facts["decode"]["outside_kernels"], facts["ttft_ms"]
    named = ", ".join(f"{name.replace('_', ' ')} {ttft[name]:g}" for name in STAGES if ttft[name])
    count, memory, rates = facts["bytes"], facts["memory"], facts["rates"]
    lines = [
        f"per token: p50 {percentiles['p50']:g}, p90 {percentiles['p90']:g}, p99 {percentiles['p99']:g} ms; "
        f"{ttft['per_token_after']:g} ms in a whole request",
        f"first token after {ttft['total']:g} ms of {ttft['prompt_tokens']} tokens: {named}",
        f"reads: {count['per_decode_token'] / 1e6:.4g} MB a decode step, {count['per_prompt_token'] / 1e6:.3g} MB a "
        f"prompt token" + (f", {count['vision'] / 1e6:.4g} MB a picture" if count["vision"] else ""),
    ]
    if outside is not None:
        lines.insert(
            1,
            f"outside of kernels: {outside['percent']:g} % of a step (runtime {outside['runtime_ms']:g}, Python "
            f"{outside['python_ms']:g} of {outside['step_ms']:g} ms; {outside['nodes']} nodes)",
        )
    if memory is not None:
        lines.append(
            f"memory: {memory['resident_mb']:g} MB resident after an answer ({memory['anonymous_mb']:g} without mapped "
            f"files), peak {memory['peak_mb']:g} MB, {memory['loaded_mb']:g} MB after loading, which took "
            f"{memory['load_seconds']:g} s"
        )
    if rates is not None:
        products = "; ".join(
            f"{one['format']} x {one['rows']} {one['gflop_per_second']:.0f} GFLOP/s" for one in rates["products"]
        )
        spread = rates["read_spread"]
        lines.append(
            f"this machine: reads {spread['median']:g} GB/s ({spread['min']:g} - {spread['max']:g} beside the rounds); "
            f"{products}"
        )
    lines.append(_surroundings_line(facts))
    return lines


def _surroundings_line(facts: dict[str, Any]) -> str:
    known = " ".join(f"{name} {version}" for name, version in facts["versions"].items())
    provider = facts["providers"]["decoder"][0]
    return f"{facts['machine']['cpu']}, {facts['threads']} threads, {facts['device']} ({provider}); {known}"


def print_comparison(facts: dict[str, Any]) -> None:
    """The table of `comparison_json`."""
    a, b = facts["compare"]["a"], facts["compare"]["b"]
    rows = [
        (
            stage,
            *(f"{side[stage]['median']:g} ({side[stage]['min']:g} - {side[stage]['max']:g})" for side in (a, b)),
            f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})",
        )
        for stage, ratio in facts["ratio"].items()
    ]
    title = f"A = {a['bundle']}, B = {b['bundle']}: tokens/s, {facts['options']['repeats']} rounds in alternation"
    _print_table(_console(), title, ("", "A", "B", "B / A"), rows)


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout)


def _print_table(console: Any, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if not index or index == len(columns) - 1 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
