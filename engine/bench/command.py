"""The command `siglance bench`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import perplexity as scoring
from ..bundle import Bundle
from ..errors import InputError
from ..runtime import Runtime
from .measure import compare, measure
from .report import (
    comparison_json,
    measured_json,
    print_comparison,
    print_measured,
    surroundings,
)
from .subject import Options, Subject

__all__ = ["bench_command"]

Report = Callable[[str], None]


_THRESHOLD = 5.0  # percent


def bench_command(
    bundle: str | None,
    pair: tuple[str, str] | None,
    threshold: float | None,
    text_file: Path | None,
    as_json: bool,
    report: Report,
    **options: Any,
) -> str | None:
    """Measure one bundle (the demo without a name) or a pair; see `_bench_two` for what is returned."""
    checked = Options(**options)
    if pair is None:
        if threshold is not None:
            raise InputError("--threshold belongs to --compare")
        _bench_bundle(bundle or "demo", checked, text_file, as_json, report)
        return None
    if bundle is not None:
        raise InputError(f"--compare names both bundles, so {bundle!r} is one too many")
    if threshold is not None and not 0 <= threshold < 100:
        raise InputError(f"--threshold is {threshold:g}, it must be a percentage from 0 to below 100")
    return _bench_two(pair, _THRESHOLD if threshold is None else threshold, checked, text_file, as_json, report)


def _bench_bundle(name: str, options: Options, text_file: Path | None, as_json: bool, report: Report) -> None:
    """Measure a bundle and print the results: a table, or one line of JSON."""
    text = None if text_file is None else scoring.read_text(text_file)
    bundle = Bundle.open(name)
    facts: dict[str, Any] = measured_json(measure(bundle, options, report)) | {"perplexity": None}
    if text is not None:
        report("scoring the text")
        facts["perplexity"] = _perplexity([bundle], options, *text)[0]
    if not as_json:
        print_measured(facts)
        if facts["perplexity"] is not None:
            print(_perplexity_line(facts["perplexity"]))
    else:
        print(json.dumps(facts))


def _bench_two(
    names: tuple[str, str], threshold: float, options: Options, text_file: Path | None, as_json: bool, report: Report
) -> str | None:
    """Measure two bundles in alternation and print the results.

    Returns one line that says what is slower in the second by more than `threshold` percent, None if nothing is.
    """
    text = None if text_file is None else scoring.read_text(text_file)
    bundles = [Bundle.open(name) for name in names]
    first, second = (Subject(bundle, options, seed=seed) for seed, bundle in enumerate(bundles))
    comparison = compare((first, second), report)
    facts: dict[str, Any] = comparison_json(comparison, names, options) | {"threshold_percent": threshold}
    facts |= surroundings(first.device, first.providers, options)
    first.close()
    second.close()
    if text is not None:
        report("scoring the text")
        found = _perplexity(bundles, options, *text)
        for side, one in zip("ab", found, strict=True):
            facts["compare"][side]["perplexity"] = one
    if not as_json:
        print_comparison(facts)
        for side in "ab" if text is not None else "":
            print(f"{side.upper()}: {_perplexity_line(facts['compare'][side]['perplexity'])}")
    else:
        print(json.dumps(facts))
    slower = comparison.slower(threshold)
    if not slower:
        return None
    stages = ", ".join(f"{name} at {ratio:.3f}" for name, ratio in slower.items())
    return f"{names[1]} is slower than {names[0]} by more than {threshold:g} %: {stages} of its speed"


def _perplexity(bundles: list[Bundle], options: Options, text: str, sha256: str) -> list[dict[str, Any]]:
    """Perplexity of each bundle; of a later one also how often its best token is that of the first."""
    runtimes = [Runtime(bundle, device=options.device, threads=options.threads, sees=False) for bundle in bundles]
    found = scoring.measure_all(runtimes, [scoring.text_ids(bundle, text) for bundle in bundles])
    return [dataclasses.asdict(one) | {"text_sha256": sha256} for one in found]


def _perplexity_line(facts: dict[str, Any]) -> str:
    agreement = facts["top1_agreement"]
    return (
        f"perplexity {facts['perplexity']:.3f} +- {facts['standard_error']:.3f} over {facts['scored_tokens']} of "
        f"{facts['tokens']} tokens" + ("" if agreement is None else f", best token as the other {agreement:.1%}")
    )
