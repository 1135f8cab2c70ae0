"""onnxruntime-genai: its generator, one token at a time."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime_genai
from serve import serve


class Genai:
    def __init__(self, path: str, threads: int, context: int):
        config = onnxruntime_genai.Config(path)
        config.overlay(
            '{"model": {"decoder": {"session_options": {"intra_op_num_threads": %d}}}}' % threads  # noqa: UP031
        )
        self._model = onnxruntime_genai.Model(config)
        self._context = context
        self._generator: Any = None

    def prefill(self, ids: list[int]) -> np.ndarray:
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._context, do_sample=False)
        self._generator = onnxruntime_genai.Generator(self._model, params)
        self._generator.append_tokens(np.array([ids], np.int32))
        return self._logits()

    def step(self, token: int) -> np.ndarray:
        self._generator.append_tokens(np.array([[token]], np.int32))
        return self._logits()

    def rows(self, ids: list[int], first: int) -> np.ndarray:
        self.prefill(ids)
        every = np.asarray(self._generator.get_output("logits"), np.float32)  # its graph computes all rows
        return every.reshape(len(ids), -1)[first:]

    def _logits(self) -> np.ndarray:
        return np.asarray(self._generator.get_logits(), np.float32).reshape(-1)


def load(facts: dict[str, Any]) -> tuple[Genai, dict[str, str]]:
    model = Genai(facts["path"], facts["threads"], facts["context"])
    return model, {"onnxruntime-genai": metadata.version("onnxruntime-genai")}


if __name__ == "__main__":
    serve(load)
