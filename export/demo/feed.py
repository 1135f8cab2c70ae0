"""Training batches from a background process: scenes are drawn while the model learns from the ones before."""

import multiprocessing
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .scenes import generator, scene

# How often a scene is looked at with each budget: mostly small ones, which cost least. A last, short run looks closer,
# so that the largest budget is worth its price.
BUDGET_SHARES = {16: 0.48, 36: 0.44, 64: 0.08}
LATE_BUDGET_SHARES = {16: 0.12, 36: 0.28, 64: 0.60}
PATCHES_PER_BATCH = 4700


def batches(first_scene: int, shares: dict[int, float]) -> Iterator[tuple[int, Any]]:
    """(scenes drawn so far, batch) without end; scenes of one patch grid are collected until they fill a batch."""
    from .packing import collate, example

    waiting: dict[tuple[int, int], list[Any]] = {}
    index = first_scene
    while True:
        rng = generator("train", index)
        index += 1
        budget = int(rng.choice(list(shares), p=list(shares.values())))
        grid, one = example(scene(rng), budget, rng)
        waiting.setdefault(grid, []).append(one)
        size = max(1, PATCHES_PER_BATCH // (grid[0] * grid[1]))
        if len(waiting[grid]) == 2 * size:  # sorted by length, so that less of each batch is padding
            ready = sorted(waiting.pop(grid), key=lambda each: len(each.ids))
            yield index, collate(grid, ready[:size])
            yield index, collate(grid, ready[size:])


def _work(first_scene: int, shares: dict[int, float], queue: Any) -> None:
    import torch

    torch.set_num_threads(1)
    for item in batches(first_scene, shares):
        queue.put(pickle.dumps(item))


@contextmanager
def background(first_scene: int, shares: dict[int, float]) -> Iterator[Iterator[tuple[int, Any]]]:
    """`batches`, made by another process."""
    context = multiprocessing.get_context("spawn")  # a forked child would inherit the state of torch's threads
    queue: Any = context.Queue(maxsize=12)
    worker = context.Process(target=_work, args=(first_scene, shares, queue), daemon=True)
    worker.start()
    try:
        yield iter(lambda: pickle.loads(queue.get()), None)
    finally:
        worker.terminate()
