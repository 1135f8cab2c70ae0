"""What it saves to compute only the last row once no later layer needs the others (Gemma 4 E2B and E4B).

    python -P benchmarks/last_row.py BUNDLE [--image-tokens N] [--chunk N...] [--rounds N] [--out RESULTS]

BUNDLE is for instance what `siglance export google/gemma-4-E2B-it --random --precision int4` wrote. In its decoder the
rows whose logits are wanted, normally the last, go on alone after the last layer that owns keys and values. Beside it
runs the same graph without that rule: all rows go through all layers, and only the head takes the last one. Both
prefill the same prompt with a picture in turns, and must agree on the logits. Writes RESULTS.json and RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from siglance.engine.bench.report import machine
from siglance.engine.bundle import Bundle
from siglance.engine.graph import Graph, usable_cores, versions
from siglance.engine.runtime import PREFILL_CHUNK, Runtime, SoftTokens

RULE, ALL = "last row", "all rows"
_TEXT = 20  # tokens around the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--image-tokens", type=int, default=280)
    parser.add_argument("--chunk", type=int, nargs="+", default=[PREFILL_CHUNK, 512], help="rows that run at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("last_row"), help="results, without an ending")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    if "logit_rows:last" not in bundle.manifest.requires:
        raise SystemExit(f"{options.bundle}: all of its layers own keys and values, so they need all rows")
    with tempfile.TemporaryDirectory(dir=bundle.folder.parent) as folder:
        runtimes = {RULE: Runtime(bundle, sees=False), ALL: Runtime(bundle, sees=False)}
        path = without_rule(bundle.path("decoder"), Path(folder))
        runtimes[ALL].decoder = Graph(path, runtimes[ALL].device)
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine() | {"threads": usable_cores()},
        "versions": versions(),
        "bundle": f"{bundle.manifest.name}, {bundle.manifest.precision}",
        "rounds": options.rounds,
        "image_tokens": options.image_tokens,
        "prompt_tokens": options.image_tokens + _TEXT,
        **measure(runtimes, options.image_tokens, options.chunk, options.rounds),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def without_rule(decoder: Path, folder: Path) -> Path:
    """A decoder in `folder` that takes the wanted rows in front of its last norm instead of behind the last owner."""
    model = ir.load(decoder)
    graph = model.graph
    [wanted] = [value for value in graph.inputs if value.name == "logit_rows"]
    [embeddings] = [value for value in graph.inputs if value.name == "inputs_embeds"]
    numbers = {value: ir.tensor(np.array(value, np.int64), name=f"number_{value}") for value in (0, 1)}
    zero, one = (ir.node("Constant", [], attributes={"value": tensor}) for tensor in numbers.values())
    shape = ir.node("Shape", [embeddings], attributes={"start": 1, "end": 2})
    count = ir.node("Squeeze", [shape.outputs[0]])
    rows = ir.node("Range", [zero.outputs[0], count.outputs[0], one.outputs[0]])
    for node in list(wanted.consumers()):
        for index, value in enumerate(node.inputs):
            if value is wanted:
                node.replace_input_with(index, rows.outputs[0])
    graph.insert_before(graph[0], [zero, one, shape, count, rows])
    [norm] = [node for node in graph if node.name == "norm"]
    first = norm.inputs[0]
    assert first is not None
    take = ir.node("Gather", [first, wanted], attributes={"axis": 1})
    norm.replace_input_with(0, take.outputs[0])
    graph.insert_before(norm, [take])
    data = json.loads(decoder.with_name("siglance.json").read_text(encoding="utf-8"))["files"]["weights"]["path"]
    os.link(decoder.with_name(data), folder / data)
    path = folder / "decoder.onnx"
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    return path


def measure(runtimes: dict[str, Runtime], picture: int, chunks: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of every round by chunk and graph, and how far apart the logits of the two are."""
    generator = np.random.default_rng(0)
    hidden = runtimes[RULE].hidden
    seconds: dict[str, dict[str, list[float]]] = {str(chunk): {name: [] for name in runtimes} for chunk in chunks}
    errors = []
    for round in range(-1, rounds):  # the first is a warm-up
        ids = generator.integers(1000, 50_000, picture + _TEXT)
        soft = [SoftTokens(_TEXT // 2, generator.normal(0, 1, (picture, hidden)).astype(np.float32))]
        for chunk in chunks:
            logits = {}
            for name, runtime in runtimes.items():
                session = runtime.session()
                begin = time.perf_counter()
                logits[name] = session.prefill(ids, soft, chunk=chunk)
                if round >= 0:
                    seconds[str(chunk)][name].append(time.perf_counter() - begin)
            errors.append(float(np.linalg.norm(logits[RULE] - logits[ALL]) / np.linalg.norm(logits[ALL])))
    if max(errors) > 0.05:
        raise SystemExit(f"the logits of the two graphs differ by {max(errors):.1%} of their norm")
    return {"seconds": seconds, "largest_relative_difference_of_logits": max(errors)}


def markdown(results: dict[str, Any]) -> str:
    """A row for each chunk: milliseconds of both graphs, and how many times as fast the rule is in the same rounds."""
    lines = ["| prompt | rows at once | last row | all rows | ratio (goal 2.5) |", "|---|---|---|---|---|"]
    for chunk, found in results["seconds"].items():
        ratios = [other / own for own, other in zip(found[RULE], found[ALL], strict=True)]
        cells = [f"{1e3 * statistics.median(v):.0f} ({1e3 * min(v):.0f} - {1e3 * max(v):.0f})" for v in found.values()]
        prompt = f"{results['prompt_tokens']} tokens, {results['image_tokens']} of a picture"
        ratio = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"
        lines.append(f"| {prompt} | {chunk} | {cells[0]} | {cells[1]} | {ratio} |")
    place = results["machine"]
    known = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    note = (
        f"{results['bundle']}: milliseconds of the decoder's prefill, median of {results['rounds']} rounds in turns "
        f"(smallest - largest). Logits differ by at most {results['largest_relative_difference_of_logits']:.2g} of "
        f"their norm. {place['cpu']}, {place['threads']} threads, {place['platform']}; {results['date']}; {known}."
    )
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main()
