"""transformers with torch on the processor: greedy steps with its default cache, no generation loop around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from serve import serve


class Transformers:
    def __init__(self, path: str, threads: int, dtype: str):
        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self._cache: Any = None

    def prefill(self, ids: list[int]) -> np.ndarray:
        self._cache = None
        return self._forward(ids, 1)[0]

    def step(self, token: int) -> np.ndarray:
        return self._forward([token], 1)[0]

    def rows(self, ids: list[int], first: int) -> np.ndarray:
        self._cache = None
        return self._forward(ids, len(ids) - first)

    @torch.inference_mode()
    def _forward(self, ids: list[int], keep: int) -> np.ndarray:
        found = self._model(
            input_ids=torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=keep
        )
        self._cache = found.past_key_values
        return found.logits[0].float().numpy()


def load(facts: dict[str, Any]) -> tuple[Transformers, dict[str, str]]:
    model = Transformers(facts["path"], facts["threads"], facts["dtype"])
    return model, {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
