"""Many requests at once on one engine: every answer is the one it would have got alone. `make load`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from siglance.engine import Engine, Image, Sampling, Text
from siglance.engine.self_test import formula_picture

pytestmark = pytest.mark.load

THREADS, REQUESTS = 16, 400
GROWTH = 30_000_000


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
