"""A vision tower of transformers with random weights of the official shapes, on noise.

Gemma 4: patches in raster order with their positions, pooled 3x3. SigLIP: pixels, no pooling. What projects the
features into the decoder is left out, which is a thousandth of the work and in favour of this side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from serve import serve


class Gemma4:
    def __init__(self, config: dict[str, Any], dtype: torch.dtype, height: int, width: int):
        facts = transformers.Gemma4VisionConfig(**config)
        self._model = transformers.AutoModel.from_config(facts, dtype=dtype).eval()
        rows, columns, side = height // facts.patch_size, width // facts.patch_size, facts.patch_size
        x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
        self._positions = torch.stack([x.flatten(), y.flatten()], -1)[None]
        self._patches = torch.rand(1, rows * columns, 3 * side * side, dtype=dtype)

    @torch.inference_mode()
    def see(self) -> np.ndarray:
        found = self._model(pixel_values=self._patches, pixel_position_ids=self._positions)
        return found.last_hidden_state.reshape(-1, found.last_hidden_state.shape[-1]).float().numpy()


class Siglip:
    def __init__(self, config: dict[str, Any], dtype: torch.dtype, height: int, width: int):
        facts = transformers.SiglipVisionConfig(**config | {"vision_use_head": False})
        self._model = transformers.SiglipVisionModel(facts).to(dtype).eval()
        self._pixels = torch.rand(1, 3, height, width, dtype=dtype)

    @torch.inference_mode()
    def see(self) -> np.ndarray:
        return self._model(pixel_values=self._pixels).last_hidden_state[0].float().numpy()


def load(facts: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    torch.set_num_threads(facts["threads"])
    tower = Siglip if facts["config"].get("model_type") == "siglip_vision_model" else Gemma4
    config = {key: value for key, value in facts["config"].items() if key != "model_type"}
    model = tower(config, getattr(torch, facts["dtype"]), facts["height"], facts["width"])
    return model, {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
