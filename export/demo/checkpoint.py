"""Writes the demo model as an official Gemma 4 checkpoint and checks that transformers reads it the same way."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import architecture
from .images import patches
from .model import DemoModel
from .packing import full_masks
from .scenes import scene
from .tokenizer import encode, prompt_parts


def write(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a whole checkpoint folder; readers never see half a checkpoint."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    architecture.write(fresh)
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, fresh / "model.safetensors", {"format": "pt"}
    )
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load(folder: Path) -> DemoModel:
    """The model of a checkpoint folder, ready to answer."""
    model = DemoModel()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


@torch.no_grad()
def compare_with_transformers(folder: Path, budget: int = architecture.DEFAULT_BUDGET) -> float:
    """Largest difference of any logit between this implementation and transformers', on one scene."""
    from transformers import AutoModelForImageTextToText

    model = load(folder)
    pixels, grid = patches(scene(7).image, budget)
    prompt = "".join(prompt_parts("detect all", grid[0] * grid[1] // 9))
    ids = torch.tensor([encode(prompt + '[{"box_2d": [120, 340, 560, 780], "label": "red circle"}]')])
    pixels = torch.from_numpy(pixels)[None].float() / 255
    _, soft = model.see(pixels, grid)
    decoder = model.model.language_model
    positions = torch.arange(ids.shape[1])[None]
    ours = decoder.logits(decoder(ids, soft, positions, full_masks(positions)))
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    image_token = theirs.config.image_token_id
    outputs = theirs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        image_position_ids=torch.from_numpy(np.stack((column, row), -1))[None],
        mm_token_type_ids=(ids == image_token).long(),
    )
    return float((ours - outputs.logits).abs().max())


if __name__ == "__main__":
    for size in architecture.BUDGETS:
        print(f"budget {size}: largest logit difference {compare_with_transformers(Path(sys.argv[1]), size):.2e}")
