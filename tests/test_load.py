"""Many requests: every answer is the one it would have got alone, and memory and open files stay level. `make load`."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from siglance.engine import Engine, Image, Pdf, Sampling, Text
from siglance.engine.errors import DocumentError
from siglance.engine.self_test import formula_picture

from .pdf_files import PdfPage, numbered_pages, packed, pdf, quadrants
from .picture_files import encoded

pytestmark = pytest.mark.load

THREADS, REQUESTS = 16, 400
GROWTH = 30_000_000
SIZES, LONG_RUN = 200, 1000
CACHES = {"cache_bytes": 8_000_000, "feature_cache_bytes": 2_000_000}  # full, and evicting, when the warm-up ends


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def requests() -> list[tuple[list, Sampling]]:
    """Text and pictures of many sizes, greedy and sampled."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(REQUESTS):
        question = Text(("describe", "count", "detect all", "read")[index % 4])
        height, width = rng.integers(40, 400, 2)
        picture = [Image(formula_picture(int(height), int(width)), (9, 16, 36)[index % 3])] if index % 5 else []
        made.append(([*picture, question], Sampling(temperature=(0.0, 1.0)[index % 2], seed=index)))
    return made


def test_concurrent_answers_equal_single_answers():
    asked = requests()
    with Engine.open("demo") as engine:

        def answer(request: tuple[list, Sampling]) -> str:
            return engine.generate(request[0], sampling=request[1], max_tokens=24).text

        def streamed(request: tuple[list, Sampling]) -> str:
            stream = engine.stream(request[0], sampling=request[1], max_tokens=24)
            return "".join(chunk.text for chunk in stream)

        alone = [answer(request) for request in asked]
        with ThreadPoolExecutor(THREADS) as pool:
            # Warm up under load: every thread's allocator keeps memory of its own.
            list(pool.map(answer, asked))
            before = resident_bytes()
            together = list(pool.map(lambda pair: (answer, streamed)[pair[0] % 2](pair[1]), enumerate(asked)))
            grown = resident_bytes() - before
    wrong = sum(one != other for one, other in zip(alone, together, strict=True))
    print(f"{REQUESTS} requests on {THREADS} threads: {wrong} wrong, resident memory {grown / 1e6:+.1f} MB")
    assert wrong == 0
    assert grown < GROWTH


def pictures(folder: Path) -> list[object]:
    """Pictures of 200 sizes in turn as a path, as bytes, as a PIL image and as an array, in four formats."""
    rng = np.random.default_rng(1)
    made: list[object] = []
    for index in range(SIZES):
        height, width = (int(side) for side in rng.integers(30, 900, 2))
        pixels = formula_picture(height, width)
        data = encoded(PIL.Image.fromarray(pixels), ("PNG", "JPEG", "WEBP", "TIFF")[index // 4 % 4])
        if index % 4 == 0:
            path = folder / f"{index}.bin"
            path.write_bytes(data)
            made.append(path)
        else:
            made.append((data, PIL.Image.fromarray(pixels), pixels)[index % 4 - 1])
    return made


def documents(folder: Path) -> list[Pdf]:
    """Documents as paths and as bytes, of other page sizes each; every third is damaged."""
    made = []
    for index in range(30):
        page = PdfPage(b"1 0 0 rg 0 0 100 100 re f", f"0 0 {200 + 31 * index} {900 - 17 * index}")
        data = (pdf(page, quadrants()), packed(page), numbered_pages(3)[:-200])[index % 3]
        path = folder / f"{index}.pdf"
        path.write_bytes(data)
        made.append(Pdf(path if index % 2 else data, pages=1))
    return made


def run_level(engine: Engine, media: Callable[[int], object], name: str) -> None:
    """Warm up with every size once, then run: memory and open files must be where they were."""

    def ask(index: int) -> int:
        part = media(index)
        try:
            engine.generate([part, Text("describe")], image_tokens=(9, 16, 25, 36)[index % 4], max_tokens=8)
        except DocumentError:
            return 1
        return 0

    for index in range(SIZES):
        ask(index)
    files, before = len(os.listdir("/proc/self/fd")), resident_bytes()
    refused = highest = 0
    for index in range(SIZES, SIZES + LONG_RUN):
        refused += ask(index)
        highest = max(highest, resident_bytes() - before)
    grown, opened = resident_bytes() - before, len(os.listdir("/proc/self/fd")) - files
    print(
        f"{LONG_RUN} requests, {name}: {refused} refused, resident memory {grown / 1e6:+.1f} MB at the end, "
        f"{highest / 1e6:+.1f} MB at most, {opened:+d} open files"
    )
    assert highest < GROWTH
    assert opened == 0


def test_memory_is_level_over_many_image_sizes(tmp_path):
    made = pictures(tmp_path)
    with Engine.open("demo", **CACHES) as engine:
        # Every size meets every budget.
        run_level(engine, lambda index: made[(index + index // SIZES) % SIZES], f"{SIZES} image sizes")


def test_memory_is_level_with_documents_between(tmp_path):
    made, papers = pictures(tmp_path), documents(tmp_path)
    with Engine.open("demo", **CACHES) as engine:

        def media(index: int) -> object:
            return papers[index // 5 % len(papers)] if index % 5 == 0 else made[(index + index // SIZES) % SIZES]

        run_level(engine, media, f"{SIZES} image sizes, every fifth a document")
    with pytest.raises(ChildProcessError):  # every process that read a document has ended and was waited for
        os.waitpid(-1, os.WNOHANG)
