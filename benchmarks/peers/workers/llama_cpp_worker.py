"""llama.cpp through the C functions that llama-cpp-python binds: no Python between its own kernels.

Its defaults but for the threads and the context: flash attention where it chooses it, keys and values in float16,
512 tokens of a prompt at once.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from serve import serve


class LlamaCpp:
    def __init__(self, path: str, threads: int, context: int):
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._width = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._length = 0

    def prefill(self, ids: list[int]) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return self._decode(ids)

    def step(self, token: int) -> np.ndarray:
        return self._decode([token])

    def rows(self, ids: list[int], first: int) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, id in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = id, place, place >= first
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        self._check(llama_cpp.llama_decode(self._context, batch))
        llama_cpp.llama_batch_free(batch)
        return np.stack([self._logits(place) for place in range(first, len(ids))])

    def _decode(self, ids: list[int]) -> np.ndarray:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        self._check(llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(ids))))
        return self._logits(-1)

    def _logits(self, place: int) -> np.ndarray:
        found = llama_cpp.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), shape=(self._width,))

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise SystemExit(f"llama_decode gave {status}")


def load(facts: dict[str, Any]) -> tuple[LlamaCpp, dict[str, str]]:
    model = LlamaCpp(facts["path"], facts["threads"], facts["context"])
    system = llama_cpp.llama_print_system_info().decode()
    return model, {"llama-cpp-python": llama_cpp.__version__, "llama.cpp": system.strip()}


if __name__ == "__main__":
    serve(load)
