"""The loop of every worker: one line of JSON in, one line of JSON out.

A worker is a process in the environment of its engine that holds one loaded model. Standard output belongs to the
answers; whatever a library prints goes to standard error.

    {"do": "run", "ids": [...], "steps": n}  -> {"prefill": seconds, "steps": [seconds, ...], "tokens": [...]}
    {"do": "score", "chunks": [[...], ...]}  -> {"losses": [...]}      rows 256 to 510 of each chunk of 512 ids
    {"do": "memory"}                         -> {"resident_mb": f, "anonymous_mb": f, "peak_mb": f}
    {"do": "see"}                            -> {"seconds": f, "soft_tokens": n}   vision towers
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

FIRST_SCORED = 256


class Model(Protocol):
    """A loaded model and one sequence."""

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Begin anew with these tokens; the logits behind the last, float32 [V]."""
        ...

    def step(self, token: int) -> np.ndarray:
        """Append a token; the logits behind it."""
        ...

    def rows(self, ids: list[int], first: int) -> np.ndarray:
        """Logits of rows `first` and later of a text that begins anew, float32 [len(ids) - first, V]."""
        ...


class Tower(Protocol):
    """A loaded vision tower with a picture that is ready for it."""

    def see(self) -> np.ndarray:
        """The features of the picture, float32 [soft tokens, width]."""
        ...


def serve(load: Callable[[dict[str, Any]], tuple[Any, dict[str, str]]]) -> None:
    """Load as the first argument of the program says, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    begin = time.perf_counter()
    model, versions = load(json.loads(sys.argv[1]))
    print(json.dumps({"load_seconds": time.perf_counter() - begin, "versions": versions}), file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        answer = {"run": _run, "score": _score, "memory": _memory, "see": _see}[question.pop("do")](model, **question)
        print(json.dumps(answer), file=answers)


def _run(model: Model, ids: list[int], steps: int) -> dict[str, Any]:
    begin = time.perf_counter()
    logits = model.prefill(ids)
    prefill = time.perf_counter() - begin
    took, tokens = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        tokens.append(int(np.argmax(logits)))
        logits = model.step(tokens[-1])
        took.append(time.perf_counter() - begin)
    return {"prefill": prefill, "steps": took, "tokens": tokens}


def _score(model: Model, chunks: list[list[int]]) -> dict[str, Any]:
    """-log p of the tokens behind rows 256 to 510, as llama-perplexity does."""
    losses: list[float] = []
    for chunk in chunks:
        logits = model.rows(chunk[:-1], FIRST_SCORED).astype(np.float64)
        largest = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
        losses += (total - logits[np.arange(len(logits)), chunk[FIRST_SCORED + 1 :]]).tolist()
    return {"losses": losses}


def _see(model: Tower) -> dict[str, Any]:
    begin = time.perf_counter()
    features = model.see()
    seconds = time.perf_counter() - begin
    if not np.isfinite(features).all():
        raise SystemExit("features that are not finite")
    return {"seconds": seconds, "soft_tokens": len(features)}


def _memory(model: Model) -> dict[str, float]:
    with open("/proc/self/status", encoding="ascii") as file:
        status = file.read()
    return {
        name: int(re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE)[1]) * 1024 / 1e6
        for name, field in (("resident_mb", "VmRSS"), ("anonymous_mb", "RssAnon"), ("peak_mb", "VmHWM"))
    }
