"""Vision towers against transformers: the same shapes, picture size and threads, random weights, in alternation.

    python benchmarks/peers/vision.py --tower google/gemma-4-E2B-it=BUNDLE --out RESULTS

BUNDLE is what `siglance export google/gemma-4-E2B-it --random` wrote; the name tells the shapes of the other side.
Other people's weights are not needed: the work does not depend on them. Repeat --tower for more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines import Worker
from environments import Unavailable, python_of

from siglance.engine.bench.report import machine
from siglance.engine.bundle import Bundle
from siglance.engine.graph import usable_cores
from siglance.engine.image_policy import POLICIES
from siglance.export.official import official_config

PICTURE = (1080, 1920)  # height and width, before it is resized
OURS, PEERS = "siglance", {"transformers fp32": "float32", "transformers bf16": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", action="append", required=True, metavar="MODEL=BUNDLE")
    parser.add_argument("--image-tokens", type=int, help="budget, for towers that have one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "siglance-peers")
    parser.add_argument("--environment", type=Path, metavar="DIR", help="an environment that has transformers")
    parser.add_argument("--add", action="store_true", help="add rounds and towers to the results that are there")
    parser.add_argument("--out", type=Path, default=Path("vision"), help="results, without an ending")
    options = parser.parse_args()
    options.cache = options.cache.resolve()
    given = {} if options.environment is None else {"transformers": options.environment.resolve()}
    try:
        python = python_of("transformers", options.cache, given)
    except Unavailable as error:
        raise SystemExit(str(error)) from None
    towers = [_measure(*text.rsplit("=", 1), python, options) for text in options.tower]
    towers = _joined(_earlier(options), towers)
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine() | {"threads": options.threads},
        "towers": towers,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def _earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The towers that --add goes on from."""
    path = options.out.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8"))["towers"] if options.add and path.is_file() else []


def _joined(earlier: list[dict[str, Any]], towers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rounds of the same tower and size one after the other."""
    facts = ("model", "precision", "pixels", "soft_tokens")
    for tower in towers:
        for known in earlier:
            if all(known[name] == tower[name] for name in facts):
                for name, seconds in tower["seconds"].items():
                    known["seconds"][name] += seconds
                break
        else:
            earlier.append(tower)
    return earlier


def _measure(model: str, path: str, python: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One tower: seconds of every round by engine."""
    bundle = Bundle.open(path)
    facts = bundle.manifest.image
    if facts is None:
        raise SystemExit(f"{path} does not see")
    layout = POLICIES[facts.policy].layout(*PICTURE, facts, options.image_tokens)
    size = {"threads": options.threads, "height": layout.height, "width": layout.width}
    logs = options.cache / "logs"
    workers = {
        OURS: Worker(
            Path(sys.executable), "siglance_vision.py", {"path": str(bundle.folder), **size}, logs / "vision.txt"
        )
    }
    config = official_config(model)["vision_config"]
    for name, dtype in PEERS.items():
        question = {"config": config, "dtype": dtype, **size}
        workers[name] = Worker(python, "transformers_vision.py", question, logs / f"vision-{dtype}.txt")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for round in range(-1, options.rounds):  # the first is a warm-up
        for name, worker in workers.items():
            took = worker.ask("see")["seconds"]
            if round >= 0:
                seconds[name].append(took)
    for worker in workers.values():
        worker.close()
    return {
        "model": model,
        "precision": bundle.manifest.precision,
        "pixels": [layout.height, layout.width],
        "soft_tokens": layout.soft_tokens,
        "seconds": seconds,
        "versions": {key: value for worker in workers.values() for key, value in worker.versions.items()},
    }


def markdown(results: dict[str, Any]) -> str:
    """One row for each tower: milliseconds, and how many times as fast ours is in the same rounds."""
    lines = ["| tower | picture | " + " | ".join([OURS, *PEERS]) + " |", "|---" * (3 + len(PEERS)) + "|"]
    for tower in results["towers"]:
        height, width = tower["pixels"]
        own = tower["seconds"][OURS]
        cells = [f"{tower['model']}, bundle {tower['precision']}"]
        cells += [f"{width}x{height}, {tower['soft_tokens']} tokens", _milliseconds(own)]
        for name in PEERS:
            theirs = tower["seconds"][name]
            ratio = statistics.median(other / ours for ours, other in zip(own, theirs, strict=True))
            cells.append(f"{_milliseconds(theirs)}: ours {ratio:.2f}x")
        lines.append("| " + " | ".join(cells) + " |")
    place = results["machine"]
    rounds = min(len(tower["seconds"][OURS]) for tower in results["towers"])
    known = sorted({f"{key} {value}" for tower in results["towers"] for key, value in tower["versions"].items()})
    note = (
        f"Milliseconds, median of {rounds} alternating rounds (smallest - largest). {place['cpu']}, "
        f"{place['threads']} threads, {place['platform']}; {results['date']}; {', '.join(known)}."
    )
    return "\n".join([*lines, "", note, ""])


def _milliseconds(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.0f} ({1e3 * min(values):.0f} - {1e3 * max(values):.0f})"


if __name__ == "__main__":
    main()
