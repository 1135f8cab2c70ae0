"""What each precision costs and saves: export a checkpoint in all of them, and score the bundles on one text.

    python -P benchmarks/precisions.py CHECKPOINT TEXT [--gguf FILE] [--bundles DIR] [--json]

CHECKPOINT is a Hugging Face folder, and `--gguf` the same model as a GGUF file, for the precision `keep`. For every
precision: perplexity by the protocol of llama.cpp, how often the best token is that of float32, megabytes of weights
that are read for a token, size of the folder, and time and peak memory of the export. Where matrices have 4 or 8 bits,
also the perplexity with products in float32 (accuracy level 1): what is left then is the loss of the weights, and the
rest that of the activations, which level 4 rounds to 8 bits. `--bundles` keeps the bundles, and uses those it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir

from siglance.engine import perplexity
from siglance.engine.bench.report import machine
from siglance.engine.bench.traffic import Traffic
from siglance.engine.bundle import Bundle
from siglance.engine.graph import versions
from siglance.engine.manifest import FileFact, write_manifest
from siglance.engine.runtime import Runtime

PRECISIONS = ("fp32", "int8", "int4", "auto")


def resident_bytes(root: int) -> int:
    """Proportional resident memory of a process and all that it has started."""
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            tasks = [task.name for task in Path(f"/proc/{process}/task").iterdir()]
            children = [Path(f"/proc/{process}/task/{task}/children").read_text() for task in tasks]
        except OSError:  # it has ended meanwhile
            continue
        total += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
        waiting += map(int, " ".join(children).split())
    return total


def export(source: Path, folder: Path, precision: str) -> dict[str, float]:
    """Export in a process of its own; seconds and peak megabytes of it and its child processes."""
    command = [sys.executable, "-P", "-m", "siglance.engine", "export", source, "-o", folder, "--precision", precision]
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, resident_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"the export as {precision} failed")
    return {"export_seconds": round(time.perf_counter() - begin, 1), "export_peak_mb": round(peak / 1e6)}


def with_float_products(bundle: Bundle, folder: Path) -> Bundle:
    """The same bundle, whose block-quantised products multiply in float32."""
    folder.mkdir()
    for fact in bundle.manifest.files.values():
        os.link(bundle.folder / fact.path, folder / fact.path)
    path = folder / "decoder.onnx"
    model = ir.load(path)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    path.unlink()
    ir.save(model, path)
    data = path.read_bytes()
    fact = FileFact(path=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = dataclasses.replace(bundle.manifest, files={**bundle.manifest.files, "decoder": fact})
    (folder / "siglance.json").write_text(write_manifest(manifest), encoding="utf-8")
    return Bundle.open(folder)


def measure(checkpoint: Path, text: str, gguf: Path | None, folder: Path) -> dict[str, dict[str, Any]]:
    """The facts of every precision, by name."""
    found: dict[str, dict[str, Any]] = {}
    sources = dict.fromkeys(PRECISIONS, checkpoint) | ({} if gguf is None else {"keep": gguf})
    bundles = {}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for precision, source in sources.items():
            target = folder / precision
            costs = {} if target.exists() else export(source.resolve(), target.resolve(), precision)
            bundles[precision] = bundle = Bundle.open(target)
            size = sum(path.stat().st_size for path in target.iterdir())
            cost = Traffic(bundle).step(0)
            read = cost.weight_bytes + cost.lookup_bytes
            found[precision] = {"read_mb": round(read / 1e6, 1), "folder_mb": round(size / 1e6, 1), **costs}
            if precision != "fp32":
                bundles[f"{precision}, level 1"] = with_float_products(bundle, Path(temporary) / precision)
        scored = perplexity.measure_all(
            [Runtime(bundle) for bundle in bundles.values()],
            [perplexity.text_ids(bundle, text) for bundle in bundles.values()],
        )
    for name, score in zip(bundles, scored, strict=True):
        precision, _, level = name.partition(", ")
        suffix = "_float_products" if level else ""
        found[precision] |= {f"perplexity{suffix}": score.perplexity, f"agreement{suffix}": score.top1_agreement}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The facts as a table in Markdown."""
    exact = found["fp32"]["perplexity"]
    lines = [
        "| precision | perplexity | of fp32 | at level 1 | best token as fp32 | MB a token | MB folder | export |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, facts in found.items():
        level = facts.get("perplexity_float_products")
        agreement, seconds = facts["agreement"], facts.get("export_seconds")
        columns = [
            name,
            f"{facts['perplexity']:.3f}",
            f"{facts['perplexity'] / exact:.3f}",
            "" if level is None else f"{level:.3f}",
            "" if agreement is None else f"{agreement:.1%}",
            f"{facts['read_mb']:.1f}",
            f"{facts['folder_mb']:.0f}",
            "" if seconds is None else f"{seconds:.0f} s, {facts['export_peak_mb']} MB",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--bundles", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    text, sha256 = perplexity.read_text(arguments.text)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.bundles or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(arguments.checkpoint, text, arguments.gguf, folder)
    facts = {"precisions": found, "text_sha256": sha256, "machine": machine(), "versions": versions()}
    print(json.dumps(facts) if arguments.json else table(found))


if __name__ == "__main__":
    main()
