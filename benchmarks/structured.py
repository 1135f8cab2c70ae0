"""Structured detection on the embedded demo: does every reply parse, how much of it is forced, what does it cost.

    python benchmarks/structured.py [BUNDLE] [--scenes N] [--json]

Each held-out scene is asked "detect all" twice, freely and with `Grammar.detections()`, in turns, so that a busy
machine is busy for both. The prefix cache is off: both read the picture's prompt. Replies are checked against the
schema by rules written here, not by the library that wrote them. The last line of --json output is one object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass

import llguidance
import onnxruntime

from siglance.engine import Engine, Grammar, Image, Reply, Text
from siglance.export.demo.scenes import scene


@dataclass
class Report:
    scenes: int
    valid: int
    same_text: int
    tokens: int
    forced_tokens: int
    forced_share: float
    free_ms: float
    structured_ms: float
    ratio: float
    compile_ms: float
    first_ms: float
    machine: str
    versions: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{self.valid} of {self.scenes} structured replies parse against the schema\n"
            f"{self.same_text} say the same as the free reply\n"
            f"{self.forced_share:.1%} of {self.tokens} tokens forced\n"
            f"median {self.structured_ms:.1f} ms structured, {self.free_ms:.1f} ms free: {self.ratio:.2f} times\n"
            f"grammar: {self.first_ms:.0f} ms for the first, with the vocabulary, {self.compile_ms:.2f} ms for others\n"
            f"{self.machine}, {', '.join(f'{name} {version}' for name, version in self.versions.items())}"
        )


def is_valid(text: str) -> bool:
    """Whether a text is a list of labelled boxes, to the letter of the schema."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, list) and all(
        isinstance(item, dict)
        and list(item) == ["box_2d", "label"]
        and len(item["box_2d"]) == 4
        and all(type(value) is int and 0 <= value <= 1000 for value in item["box_2d"])
        and isinstance(item["label"], str)
        and 1 <= len(item["label"]) <= 200
        for item in found
    )


def timed(engine: Engine, index: int, format: Grammar | None) -> tuple[Reply, float]:
    parts = [Image(scene(index).image), Text("detect all")]
    begin = time.perf_counter()
    reply = engine.generate(parts, format=format, max_tokens=300, cache=False)
    return reply, 1e3 * (time.perf_counter() - begin)


def measure(engine: Engine, scenes: int) -> Report:
    compiled = []
    for _ in range(20):
        begin = time.perf_counter()
        engine.generate("x", format=Grammar.detections(), max_tokens=1, cache=False)
        compiled.append(1e3 * (time.perf_counter() - begin))
    plain = []
    for _ in range(20):
        begin = time.perf_counter()
        engine.generate("x", max_tokens=1, cache=False)
        plain.append(1e3 * (time.perf_counter() - begin))
    timed(engine, 0, None)  # warm-up: the first picture

    free: list[tuple[Reply, float]] = []
    structured: list[tuple[Reply, float]] = []
    for index in range(scenes):
        for results, format in ((free, None), (structured, Grammar.detections())):
            results.append(timed(engine, index, format))
    usages = [reply.usage for reply, _ in structured]
    tokens, forced = sum(use.completion_tokens for use in usages), sum(use.forced_tokens for use in usages)
    return Report(
        scenes=scenes,
        valid=sum(is_valid(reply.text) for reply, _ in structured),
        same_text=sum(one.text == other.text for (one, _), (other, _) in zip(free, structured, strict=True)),
        tokens=tokens,
        forced_tokens=forced,
        forced_share=forced / tokens,
        free_ms=statistics.median(elapsed for _, elapsed in free),
        structured_ms=statistics.median(elapsed for _, elapsed in structured),
        ratio=statistics.median(b / a for (_, a), (_, b) in zip(free, structured, strict=True)),
        compile_ms=statistics.median(compiled[1:]) - statistics.median(plain),
        first_ms=compiled[0] - statistics.median(plain),
        machine=f"{os.cpu_count()} cores, {platform.platform()}",
        versions={"onnxruntime": onnxruntime.__version__, "llguidance": llguidance.__version__},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="demo")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with Engine.open(arguments.bundle) as engine:
        report = measure(engine, arguments.scenes)
    print(json.dumps(asdict(report)) if arguments.json else report)


if __name__ == "__main__":
    main()
