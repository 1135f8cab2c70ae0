"""Greedy answers of the PyTorch demo model, many at once: used to follow the training.

`python -m siglance.export.demo.answering CHECKPOINT [COUNT]` prints the scores of a checkpoint as text and as JSON.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .architecture import BUDGETS, POOL, TEXT_CONFIG
from .checkpoint import load
from .evaluate import Report, questions, score
from .images import patches
from .model import DemoModel
from .packing import TURN_END, full_masks
from .tokenizer import SPECIAL_TOKENS, encode, prompt_parts, shared

Request = tuple[Image.Image, str, int]  # image, question, budget in soft tokens

_LONGEST_REPLY = 80
_MOST_AT_ONCE = 64


def answer_all(model: DemoModel, requests: list[Request]) -> list[str]:
    """One reply per request; those whose prompts have equal shapes run together, so that nothing is padded."""
    groups: dict[tuple[tuple[int, int], int], list[tuple[int, Tensor, list[int]]]] = defaultdict(list)
    for index, (image, question, budget) in enumerate(requests):
        pixels, grid = patches(image, budget)
        ids = encode("".join(prompt_parts(question, grid[0] * grid[1] // POOL**2)))
        groups[grid, len(ids)].append((index, torch.from_numpy(pixels), ids))
    replies = [""] * len(requests)
    for (grid, _), members in groups.items():
        for start in range(0, len(members), _MOST_AT_ONCE):
            part = members[start : start + _MOST_AT_ONCE]
            pixels = torch.stack([each[1] for each in part])
            texts = _greedy(model, pixels, grid, torch.tensor([each[2] for each in part]))
            for (index, _, _), text in zip(part, texts, strict=True):
                replies[index] = text
    return replies


@torch.no_grad()
def _greedy(model: DemoModel, pixels: Tensor, grid: tuple[int, int], ids: Tensor) -> list[str]:
    """Replies to prompts of one length; pixels [batch, patches, 768] uint8, ids [batch, length]."""
    decoder = model.model.language_model
    _, soft = model.see(pixels.float() / 255, grid)
    batch, length = ids.shape
    positions = torch.arange(length).expand(batch, -1)
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    hidden = decoder(ids, soft, positions, full_masks(positions), cache)
    end = SPECIAL_TOKENS[TURN_END]
    out = [decoder.logits(hidden[:, -1:]).argmax(-1)]
    done = out[0] == end
    while not bool(done.all()) and len(out) < _LONGEST_REPLY:
        place = length + len(out) - 1
        seen = torch.ones(batch, 1, 1, place + 1, dtype=torch.bool)
        near = seen & (place - torch.arange(place + 1) < TEXT_CONFIG["sliding_window"])
        masks = {"full_attention": seen, "sliding_attention": near}
        hidden = decoder(out[-1], None, torch.full((batch, 1), place), masks, cache)
        out.append(decoder.logits(hidden).argmax(-1))
        done |= out[-1] == end
    rows = torch.cat(out, 1).tolist()
    return [shared().decode(row[: row.index(end)] if end in row else row, skip_special_tokens=False) for row in rows]


def score_model(model: DemoModel, scenes: int, budgets: tuple[int, ...] = BUDGETS) -> Report:
    """`evaluate.evaluate` with the PyTorch model, in batches."""
    asked = questions(scenes, budgets)
    return score(asked, answer_all(model, [(each.scene.image, each.text, each.budget) for each in asked]))


def main() -> None:
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    report = score_model(load(Path(sys.argv[1])), count)
    print(report, report.to_json(), sep="\n\n")


if __name__ == "__main__":
    main()
