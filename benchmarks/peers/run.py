"""Peers on the same weights, prompts and threads, in alternation with bundles of ours.

    python benchmarks/peers/run.py --checkpoint DIR --gguf FILE --bundle NAME=DIR --out RESULTS

builds the peers (once, under --cache), and writes RESULTS.json and RESULTS.md. Every round gives each engine the same
fresh prompt of random common words, then decodes greedily; a median over rounds is compared with the median of the
first engine, round by round. An engine that cannot be built or run here is reported with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from engines import ENGINES, Sources, Worker, start
from environments import ENVIRONMENTS, Unavailable
from tokenizers import Tokenizer

from siglance.engine.bench.report import machine
from siglance.engine.graph import usable_cores

_WARM_UP = 8  # tokens
# What of a process is in memory after its rounds, how much of that is no mapped file, and the most there ever was.
_MEMORY = {"resident MB": "resident_mb", "anonymous MB": "anonymous_mb", "peak MB": "peak_mb"}
CHUNK = 512  # tokens of a chunk whose second half is scored
_WORDS = (
    "The quick brown fox jumps over the lazy dog while seven wizards quietly mix a large pot of soup for people who "
    "came from the next town to see what was there, and when it was ready they sat down at one long table to eat. "
    "Blue red green small square circle two three four left right above below near far word number name street door."
)


def main() -> None:
    options = _arguments()
    bundles = dict(_named(text) for text in options.bundle)
    sources = Sources(
        checkpoint=options.checkpoint,
        gguf=options.gguf,
        bundles=bundles,
        cache=options.cache,
        environments=dict(_named(text) for text in options.environment),
        threads=options.threads or usable_cores(),
        context=options.context,
    )
    names = [*bundles, *(options.engine or ENGINES)]
    if options.prepare:
        for name in names:
            worker = _started(name, sources, {})
            if worker is not None:
                worker.close()
        return
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    failures: dict[str, str] = {}
    workers = {name: worker for name in names if (worker := _started(name, sources, failures)) is not None}
    earlier = _earlier(options)
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine() | {"threads": sources.threads},
        "new_tokens": options.new_tokens,
        "baseline": options.baseline,
        "engines": earlier.get("engines", {}),
        "unavailable": failures,
        "runs": earlier.get("runs", []),
    }
    for name, worker in workers.items():
        facts = results["engines"].setdefault(name, {})
        facts |= {"versions": worker.versions, "load_seconds": worker.load_seconds}
    for runs in _rounds(workers, tokenizer, options, failures, results["runs"]):
        results["runs"] += runs
        _write(results, options.out)
    for name, worker in workers.items():
        if name not in failures:
            if options.rounds:
                results["engines"][name] |= worker.ask("memory")
            if options.text is not None:
                results["engines"][name] |= _score(worker, tokenizer, options.text)
            worker.close()
    _write(results, options.out)
    print(markdown(results))


def _earlier(options: argparse.Namespace) -> dict[str, Any]:
    """The results that --add goes on from."""
    path = options.out.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if options.add and path.is_file() else {}


def _write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the Hugging Face folder")
    parser.add_argument("--gguf", type=Path, required=True, help="the same weights as a GGUF file")
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="NAME=DIR", help="a bundle of ours; repeatable"
    )
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="only these peers; repeatable")
    parser.add_argument("--baseline", default="llama.cpp Q4_0", help="the engine that ratios refer to")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--text", type=Path, help="also measure perplexity on this text")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "siglance-peers")
    parser.add_argument(
        "--environment",
        action="append",
        default=[],
        metavar="PEER=DIR",
        help=f"an environment that is there already, for {', '.join(ENVIRONMENTS)}; repeatable",
    )
    parser.add_argument("--prepare", action="store_true", help="only build environments and models")
    parser.add_argument("--add", action="store_true", help="add rounds and engines to the results that are there")
    parser.add_argument("--out", type=Path, default=Path("peers"), help="results, without an ending")
    options = parser.parse_args()
    if max(options.prompt_tokens) + options.new_tokens > options.context:
        parser.error(f"--context {options.context} does not hold the longest prompt and its reply")
    options.cache = options.cache.resolve()
    return options


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.rpartition("=")
    if not separator:
        raise SystemExit(f"{text!r} must be NAME=DIR")
    return name, Path(path).resolve()


def _started(name: str, sources: Sources, failures: dict[str, str]) -> Worker | None:
    print(f"{name} ...", file=sys.stderr)
    try:
        return start(name, sources)
    except Unavailable as error:
        failures[name] = str(error)
        print(f"{name}: {error}", file=sys.stderr)
        return None


def _rounds(
    workers: dict[str, Worker],
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    failures: dict[str, str],
    earlier: list[dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """The runs of each round: every engine, one after the other, for each prompt. Before the first is a warm-up."""
    start = max((run["round"] + 1 for run in earlier), default=0)
    generator = np.random.default_rng(start)
    first, *words = tokenizer.encode(_WORDS).ids
    for round in range(start - 1 if options.rounds else start, start + options.rounds):
        runs = []
        for tokens in options.prompt_tokens:
            ids = [first, *generator.choice(words, tokens - 1).tolist()]
            for name, worker in workers.items():
                if name in failures:
                    continue
                try:
                    found = worker.ask("run", ids=ids, steps=options.new_tokens if round >= start else _WARM_UP)
                except Unavailable as error:
                    failures[name] = str(error)
                    continue
                facts = {"engine": name, "round": round, "prompt_tokens": tokens}
                facts |= {"prefill": tokens / found["prefill"], "decode": len(found["steps"]) / sum(found["steps"])}
                runs.append(facts | {"first_tokens": found["tokens"][:8]})
        if round >= start:
            yield runs


def _score(worker: Worker, tokenizer: Tokenizer, text: Path) -> dict[str, Any]:
    ids = tokenizer.encode(text.read_text(encoding="utf-8")).ids
    chunks = [[ids[0], *ids[at + 1 : at + CHUNK]] for at in range(0, len(ids) - CHUNK + 1, CHUNK)]
    begin = time.perf_counter()
    losses = worker.ask("score", chunks=chunks)["losses"]
    return {"perplexity": math.exp(statistics.fmean(losses)), "scoring_seconds": time.perf_counter() - begin}


def markdown(results: dict[str, Any]) -> str:
    """The table of a run: medians, spread, and the ratio to the baseline of the same rounds."""
    lengths = sorted({run["prompt_tokens"] for run in results["runs"]})
    header = ["engine", *(f"{what} {length}" for what in ("prefill", "decode after") for length in lengths)]
    lines = ["| " + " | ".join([*header, *_MEMORY, "perplexity"]) + " |", "|---" * (len(header) + 4) + "|"]
    for name, facts in results["engines"].items():
        cells = [name]
        for what in ("prefill", "decode"):
            cells += [_cell(results, name, what, length) for length in lengths]
        perplexity = f"{facts['perplexity']:.2f}" if "perplexity" in facts else "-"
        cells += [f"{facts[key]:.0f}" if key in facts else "-" for key in _MEMORY.values()]
        lines.append("| " + " | ".join([*cells, perplexity]) + " |")
    known = {f"{key} {value}" for facts in results["engines"].values() for key, value in facts["versions"].items()}
    place = results["machine"]
    versions = ", ".join(sorted(known))
    rounds = len({run["round"] for run in results["runs"]})
    notes = [
        f"Tokens a second, median of {rounds} alternating rounds (smallest - largest), behind it the ratio "
        f"to {results['baseline']} in the same rounds; {results['new_tokens']} tokens decoded.",
        f"{place['cpu']}, {place['threads']} threads, {place['platform']}; {results['date']}; {versions}.",
        *(f"{name}: {reason}" for name, reason in results["unavailable"].items()),
    ]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


def _cell(results: dict[str, Any], name: str, what: str, length: int) -> str:
    def values(engine: str) -> dict[int, float]:
        return {
            run["round"]: run[what]
            for run in results["runs"]
            if run["engine"] == engine and run["prompt_tokens"] == length
        }

    own, base = values(name), values(results["baseline"])
    if not own:
        return "-"
    text = f"{statistics.median(own.values()):.0f} ({min(own.values()):.0f} - {max(own.values()):.0f})"
    ratios = [own[round] / base[round] for round in own if round in base]
    return f"{text} {statistics.median(ratios):.2f}x" if ratios and name != results["baseline"] else text


if __name__ == "__main__":
    main()
