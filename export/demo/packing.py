"""Training batches: several questions about one image share the image, in one sequence.

[prefix with the image][question 1, answer 1][question 2, answer 2]... Each branch continues the positions of the prefix
and sees the prefix and itself only, so it is computed exactly as if it stood alone, and the image is paid for once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .architecture import POOL, TEXT_CONFIG
from .images import patches
from .scenes import LABELS, SIGN_WORDS, Scene, normalised
from .tasks import answer, questions
from .tokenizer import encode, prompt_parts

TURN_END = "<turn|>"
SIGN_CLASS = 1 + len(LABELS)  # class 0 is background
CLASSES = SIGN_CLASS + 1

_ENCODED: dict[str, list[int]] = {}


def encode_cached(text: str) -> list[int]:
    """`encode`, remembering: training repeats itself."""
    if text not in _ENCODED:
        if len(_ENCODED) > 50_000:
            _ENCODED.clear()
        _ENCODED[text] = encode(text)
    return _ENCODED[text]


@dataclass
class Example:
    """One image and its packed questions, as arrays."""

    pixels: np.ndarray  # [patches, 768] uint8
    ids: np.ndarray  # [length]
    positions: np.ndarray  # [length]
    branches: np.ndarray  # [length]; 0 is the shared prefix
    targets: np.ndarray  # [length]; the token that follows, or -1 where nothing is learnt
    patch_class: np.ndarray  # [patches]
    patch_box: np.ndarray  # [patches, 4], 0..1
    cell_class: np.ndarray  # [soft tokens]
    cell_box: np.ndarray  # [soft tokens, 4]
    cell_text: np.ndarray  # [soft tokens]; index into SIGN_WORDS, or -1


def example(scene: Scene, budget: int, rng: np.random.Generator) -> tuple[tuple[int, int], Example]:
    """The patch grid of `scene` at `budget`, and everything to learn from it."""
    pixels, grid = patches(scene.image, budget)
    ids, positions, branches, targets = _pack(scene, grid[0] * grid[1] // POOL**2, questions(scene, rng))
    patch_class, patch_box, _ = _cover(scene, grid)
    cells = grid[0] // POOL, grid[1] // POOL
    cell_class, cell_box, cell_text = _cover(scene, cells)
    return grid, Example(
        pixels, ids, positions, branches, targets, patch_class, patch_box, cell_class, cell_box, cell_text
    )


def _pack(scene: Scene, soft_tokens: int, asked: list[str]) -> tuple[np.ndarray, ...]:
    prefix = encode_cached(prompt_parts("", soft_tokens)[0])
    ids, branches, targets = list(prefix), [0] * len(prefix), [-1] * len(prefix)
    positions = list(range(len(prefix)))
    for branch, question in enumerate(asked, start=1):
        head = encode_cached(prompt_parts(question, soft_tokens)[1])
        tail = [*encode_cached(answer(scene, question)), *encode_cached(TURN_END)]
        row = head + tail[:-1]
        ids += row
        branches += [branch] * len(row)
        positions += range(len(prefix), len(prefix) + len(row))
        targets += [-1] * (len(head) - 1) + tail
    return np.array(ids), np.array(positions), np.array(branches), np.array(targets)


def _cover(scene: Scene, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What lies on each cell of a grid over the image: class [cells], box [cells, 4] in 0..1, sign text [cells].

    A cell that several things touch belongs to the one that has the largest share of itself there.
    """
    rows, columns = grid
    width, height = scene.image.size
    best = np.full((rows, columns), 0.0)
    kind, text = np.zeros((rows, columns), np.int64), np.full((rows, columns), -1)
    box = np.zeros((rows, columns, 4), np.float32)
    things = [(1 + LABELS.index(thing.label), -1, thing.box) for thing in scene.objects]
    if scene.sign:
        things.append((SIGN_CLASS, SIGN_WORDS.index(scene.sign.text), scene.sign.box))
    cell = height * width / (rows * columns)
    for number, spelt, (x1, y1, x2, y2) in things:
        edges_x, edges_y = np.arange(columns + 1) * width / columns, np.arange(rows + 1) * height / rows
        across = np.clip(np.minimum(edges_x[1:], x2) - np.maximum(edges_x[:-1], x1), 0, None)
        down = np.clip(np.minimum(edges_y[1:], y2) - np.maximum(edges_y[:-1], y1), 0, None)
        overlap = np.outer(down, across)
        share = overlap / ((x2 - x1) * (y2 - y1))
        wins = (share > best) & ((overlap > 0.1 * cell) | (share > 0.15))
        best[wins], kind[wins], text[wins] = share[wins], number, spelt
        box[wins] = np.array(normalised((x1, y1, x2, y2), scene.image.size)) / 1000
    return kind.ravel(), box.reshape(-1, 4), text.ravel()


@dataclass
class Batch:
    """Examples of one patch grid, as padded tensors; see `Example`."""

    grid: tuple[int, int]
    pixels: Tensor
    ids: Tensor
    positions: Tensor
    branches: Tensor
    targets: Tensor
    patch_class: Tensor
    patch_box: Tensor
    cell_class: Tensor
    cell_box: Tensor
    cell_text: Tensor


def collate(grid: tuple[int, int], examples: list[Example]) -> Batch:
    """Stack examples; sequences are padded with branch -1."""
    length = max(len(each.ids) for each in examples)

    def padded(name: str, fill: int) -> Tensor:
        rows = [getattr(each, name) for each in examples]
        return torch.from_numpy(np.stack([np.pad(row, (0, length - len(row)), constant_values=fill) for row in rows]))

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(each, name) for each in examples]))

    return Batch(
        grid,
        stacked("pixels"),
        padded("ids", 0),
        padded("positions", 0),
        padded("branches", -1),
        padded("targets", -1),
        *(stacked(name) for name in ("patch_class", "patch_box", "cell_class", "cell_box", "cell_text")),
    )


def masks(positions: Tensor, branches: Tensor) -> dict[str, Tensor]:
    """Which keys each query sees, [batch, 1, length, length], per kind of layer."""
    distance = positions[:, :, None] - positions[:, None, :]
    branch, key_branch = branches[:, :, None], branches[:, None, :]
    seen = (distance >= 0) & ((key_branch == branch) | ((key_branch == 0) & (branch >= 0)))
    near = distance < TEXT_CONFIG["sliding_window"]
    return {"full_attention": seen[:, None], "sliding_attention": (seen & near)[:, None]}


def full_masks(positions: Tensor) -> dict[str, Tensor]:
    """`masks` of plain sequences, one branch each."""
    return masks(positions, torch.zeros_like(positions))
