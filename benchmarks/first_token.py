"""From the start of the program to the first token, and what loading takes, with files in memory and without.

    python -P benchmarks/first_token.py [BUNDLE]... [--rounds N] [--out RESULTS]

For each bundle two processes in turns: the program `siglance run` with a picture, until the first byte of its answer,
and one that only loads the engine and then says how long that took and how much memory it had at most. "Cold" means
that the system was asked before to forget the files of the bundle and of all modules and libraries that are used; what
other processes have mapped stays, and the last column says how much that was. "New" is a first start: the hashes of the
bundle's files are not known yet, so all of it is read. Writes RESULTS.json and RESULTS.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from siglance.engine.bench.report import machine
from siglance.engine.bundle import find_bundle
from siglance.engine.graph import versions
from siglance.engine.manifest import read_manifest

_PICTURE = Path(__file__).parents[1] / "tests" / "data" / "scene.png"
_WAYS = ("new", "cold", "warm")
_LOAD = """
import json, re, sys, time
begin = time.perf_counter()
from siglance.engine import Engine
imported = time.perf_counter()
engine = Engine.open(sys.argv[1])
loaded = time.perf_counter()
with open("/proc/self/status") as file:
    status = file.read()
peak, now = (int(re.search(rf"^{name}:\\s*(\\d+)", status, re.M)[1]) * 1024 / 1e6 for name in ("VmHWM", "VmRSS"))
print(json.dumps({"import": imported - begin, "load": loaded - imported, "peak_mb": peak, "resident_mb": now}))
"""

_LIST = """
import json, sys
import siglance.engine.cli
from siglance.engine import Engine
with Engine.open("demo") as engine:
    engine.generate("count", max_tokens=2)
names = ("__file__", "__cached__")
files = {str(getattr(module, name, None)) for module in [*sys.modules.values()] for name in names}
with open("/proc/self/maps") as maps:
    files |= {line.split(None, 5)[5].strip() for line in maps if "/" in line}
print(json.dumps(sorted(files)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", default=["demo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("first_token"), help="results, without an ending")
    options = parser.parse_args()
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
        "rounds": options.rounds,
        "bundles": [measure(name, options.rounds) for name in options.bundles],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Seconds and megabytes of every round, by way of starting."""
    folder = find_bundle(name).resolve()
    manifest = read_manifest((folder / "siglance.json").read_text(encoding="utf-8"))
    files = list(_files(folder))
    question = ["-p", "describe", *(["-i", str(_PICTURE)] if manifest.image is not None else [])]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
    with tempfile.TemporaryDirectory() as home:
        for way in _WAYS * rounds:
            known = Path(home) / "verified.json"
            if way == "new":
                known.unlink(missing_ok=True)
            left = _forget(files) if way != "warm" else 0
            first = _first_byte(["run", str(folder), *question, "--max-tokens", "8"], home)
            if way == "new":
                known.unlink(missing_ok=True)
            left = max(left, _forget(files)) if way != "warm" else 0
            found[way].append({"first_token": first, "left_mb": left / 1e6, **_load(folder, home)})
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"name": manifest.name, "precision": manifest.precision, "mb": size / 1e6, "ways": found}


def _files(bundle: Path) -> Iterator[Path]:
    """The files that a start reads: of the bundle, and those of the modules and libraries of a run of the demo."""
    done = subprocess.run([sys.executable, "-P", "-c", _LIST], capture_output=True, text=True, check=True)
    yield from (path for path in bundle.iterdir() if path.is_file())
    yield from (path for path in map(Path, json.loads(done.stdout)) if path.is_file())


def _forget(files: list[Path]) -> int:
    """Ask the system to drop the pages of these files; returns the bytes of the large ones that it kept."""
    os.sync()
    left = 0
    for file in files:
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError:  # gone since
            continue
        try:
            size = os.fstat(handle).st_size
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            left += _cached(handle, size) if size > 1 << 20 else 0
        finally:
            os.close(handle)
    return left


def _cached(handle: int, size: int) -> int:
    """How many bytes of a file are in memory, whoever has read them."""
    library, page = ctypes.CDLL(None), mmap.PAGESIZE
    with mmap.mmap(handle, size, flags=mmap.MAP_PRIVATE) as mapping:
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        pages = np.zeros(-(-size // page), np.uint8)
        library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages.ctypes.data_as(ctypes.c_void_p))
    return int((pages & 1).sum()) * page


def _first_byte(arguments: list[str], home: str) -> float:
    """Seconds until the program writes the first byte of its answer."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "siglance.engine", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "SIGLANCE_HOME": home},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.read(1)
    took = time.perf_counter() - begin
    process.stdout.read()
    complaint = process.stderr.read().decode()
    if process.wait() or not first:
        raise SystemExit(f"siglance run gave no answer: {complaint.strip().splitlines()[-1:]}")
    return took


def _load(folder: Path, home: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _LOAD, str(folder)],
        env={**os.environ, "SIGLANCE_HOME": home},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def markdown(results: dict[str, Any]) -> str:
    """A row for each bundle and way of starting: medians, and smallest and largest."""
    columns = ("bundle", "start", "`siglance run` to first token", "load of the engine", "peak MB", "resident MB")
    lines = [f"| {' | '.join([*columns, 'left in memory'])} |", "|---" * (len(columns) + 1) + "|"]
    for bundle in results["bundles"]:
        for way, rounds in bundle["ways"].items():
            seconds = [_seconds([one[key] for one in rounds]) for key in ("first_token", "load")]
            sizes = [statistics.median(one[key] for one in rounds) for key in ("peak_mb", "resident_mb", "left_mb")]
            name = f"{bundle['name']}, {bundle['precision']}, {bundle['mb']:.0f} MB"
            kept = f"{sizes[2]:.0f} MB" if way != "warm" else "all"
            lines.append(f"| {name} | {way} | {seconds[0]} | {seconds[1]} | {sizes[0]:.0f} | {sizes[1]:.0f} | {kept} |")
    place = results["machine"]
    known = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    note = (
        f"Seconds, median of {results['rounds']} rounds in turns (smallest - largest), from the start of the process; "
        f"a load is without the import of the package. {place['cpu']}, {place['cores']} cores, {place['platform']}; "
        f"{results['date']}; {known}."
    )
    return "\n".join([*lines, "", note, ""])


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


if __name__ == "__main__":
    main()
