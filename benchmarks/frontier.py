"""Perplexity against decode speed, a point for every engine of a result of peers/run.py: RESULTS.json OUT.svg.

    python benchmarks/frontier.py benchmarks/results/peers.json benchmarks/results/frontier.svg

Needs matplotlib. Engines without a perplexity are left out; so are those beyond `--worst`. `--perplexity` is another
result of peers/run.py, where scoring was a run of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--perplexity", type=Path, help="results that perplexities are taken from")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--worst", type=float, default=30.0, help="perplexity")
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if options.perplexity is not None:
        scores = json.loads(options.perplexity.read_text(encoding="utf-8"))["engines"]
        results["engines"] = {name: facts | scores.get(name, {}) for name, facts in results["engines"].items()}
    points = _points(results, options.prompt_tokens, options.worst)
    matplotlib.rcParams |= {"svg.hashsalt": "siglance", "font.family": "sans-serif"}
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, (perplexity, low, speed, high) in points.items():
        colour = "#c0392b" if name.startswith("siglance") else "#34495e"
        axes.errorbar(perplexity, speed, [[speed - low], [high - speed]], fmt="o", color=colour, capsize=3)
        axes.annotate(name, (perplexity, speed), xytext=(7, 5), textcoords="offset points", fontsize=9, color=colour)
    place = results["machine"]
    axes.set_title(
        f"Gemma 3 270M, decode after {options.prompt_tokens} tokens: {place['cpu']}, {place['threads']} threads, "
        f"{results['date']}",
        fontsize=10,
    )
    axes.set_xlabel("perplexity on the text of the GPL 3 (lower is better)")
    axes.set_ylabel("tokens a second (median, smallest to largest)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.18)
    axes.grid(alpha=0.3)
    figure.savefig(options.picture, metadata={"Date": None})


def _points(results: dict[str, Any], tokens: int, worst: float) -> dict[str, tuple[float, float, float, float]]:
    """Perplexity and smallest, median and largest speed by engine."""
    points = {}
    for name, facts in results["engines"].items():
        speeds = [run["decode"] for run in results["runs"] if run["engine"] == name and run["prompt_tokens"] == tokens]
        if speeds and facts.get("perplexity", worst + 1) <= worst:
            points[name] = (facts["perplexity"], min(speeds), statistics.median(speeds), max(speeds))
    return points


if __name__ == "__main__":
    main()
