"""optimum-onnx: its export of the checkpoint, run as its users do, with its own cache handling."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from serve import serve


class Optimum:
    def __init__(self, path: str, threads: int):
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._model = ORTModelForCausalLM.from_pretrained(path, session_options=options)
        self._cache: Any = None
        self._length = 0

    def prefill(self, ids: list[int]) -> np.ndarray:
        self._cache, self._length = None, 0
        return self._forward(ids)[-1]

    def step(self, token: int) -> np.ndarray:
        return self._forward([token])[-1]

    def rows(self, ids: list[int], first: int) -> np.ndarray:
        self._cache, self._length = None, 0
        return self._forward(ids)[first:]

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> np.ndarray:
        start, self._length = self._length, self._length + len(ids)
        found = self._model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones((1, self._length), dtype=torch.int64),
            position_ids=torch.arange(start, self._length)[None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = found.past_key_values
        return np.asarray(found.logits[0].float())


def load(facts: dict[str, Any]) -> tuple[Optimum, dict[str, str]]:
    names = ("optimum", "optimum-onnx", "transformers", "onnxruntime", "torch")
    return Optimum(facts["path"], facts["threads"]), {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    serve(load)
