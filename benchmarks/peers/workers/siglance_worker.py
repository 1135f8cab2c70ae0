"""siglance: a session of a bundle."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import onnxruntime
from serve import serve

from siglance.engine import Engine


class Siglance:
    """The whole engine is loaded, tokenizer included, as its users have it."""

    def __init__(self, path: str, threads: int):
        self._engine = Engine.open(path, threads=threads, cache_bytes=0, feature_cache_bytes=0)
        self._session = self._engine.runtime.session()

    def prefill(self, ids: list[int]) -> np.ndarray:
        self._session = self._engine.runtime.session()
        return self._session.prefill(np.array(ids, np.int64))

    def step(self, token: int) -> np.ndarray:
        return self._session.step(token)

    def rows(self, ids: list[int], first: int) -> np.ndarray:
        self._session = self._engine.runtime.session()
        self._session.prefill(np.array(ids[:first], np.int64))
        return self._session.reply_logits(np.array(ids[first:], np.int64))


def load(facts: dict[str, Any]) -> tuple[Siglance, dict[str, str]]:
    versions = {"siglance": metadata.version("siglance"), "onnxruntime": onnxruntime.__version__}
    return Siglance(facts["path"], facts["threads"]), versions


if __name__ == "__main__":
    serve(load)
