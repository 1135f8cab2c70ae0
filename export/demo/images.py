"""Images to patches, by Gemma 4's rule for variable resolution."""

import numpy as np
from PIL import Image

from .architecture import PATCH, target_size


def patches(image: Image.Image, budget: int) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 patches [rows * columns, 768], row by row with the channel running fastest, and (rows, columns)."""
    image = image.convert("RGB")
    height, width = target_size(image.height, image.width, budget)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = height // PATCH, width // PATCH
    # [rows, PATCH, columns, PATCH, 3] -> [rows, columns, PATCH, PATCH, 3]
    split = np.asarray(image).reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return split.reshape(rows * columns, PATCH * PATCH * 3), (rows, columns)
