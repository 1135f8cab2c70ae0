"""An engine whose model says what a test tells it to: everything is real but the graphs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from siglance.engine import Bundle, Engine
from siglance.engine.runtime import SoftTokens
from siglance.engine.self_test import formula_picture

__all__ = ["ScriptedRuntime", "picture", "scripted", "with_manifest"]


class ScriptedRuntime:
    """Stands in for `Runtime`: the decoder's runs give the ids of `script`, the first one as the prefill of a prompt.

    After its end the script repeats its last id. `rows` replaces the logits of single runs (0 is the prefill), and
    `errors` raises instead. Counts runs, and keeps what the last prefill was given.
    """

    def __init__(
        self,
        real,
        script: Sequence[int],
        *,
        rows: dict[int, np.ndarray] | None = None,
        errors: dict[int, Exception] | None = None,
    ):
        self.vocabulary, self.device, self.providers = real.vocabulary, real.device, real.providers
        self.script, self.rows, self.errors = script, rows or {}, errors or {}
        self.prefills = self.steps = self.encodes = 0
        self.extended: list[list[int]] = []  # the tokens of each step
        self.ids: list[int] = []
        self.soft: list[SoftTokens] = []
        self.hidden = real.hidden

    def encode(self, patches: np.ndarray, positions: np.ndarray, soft_tokens: int) -> np.ndarray:
        """Soft tokens that all hold the mean of the picture, so that pictures can be told apart."""
        self.encodes += 1
        return np.full((soft_tokens, self.hidden), patches.mean(), np.float32)

    def session(self) -> _ScriptedSession:
        return _ScriptedSession(self)

    def logits(self, run: int) -> np.ndarray:
        """One hot: the id of the script at `run`."""
        if run in self.errors:
            raise self.errors[run]
        if run in self.rows:
            return self.rows[run]
        logits = np.zeros(self.vocabulary, np.float32)
        logits[self.script[min(run, len(self.script) - 1)]] = 100.0
        return logits


class _ScriptedSession:
    def __init__(self, runtime: ScriptedRuntime):
        self.length = self.run = 0
        self._runtime = runtime

    def evicts(self, length: int) -> bool:
        return False

    def prefill(
        self, ids: np.ndarray, soft: Sequence[SoftTokens] = (), *, chunk: int = 1, first: int = 0
    ) -> np.ndarray:
        runtime = self._runtime
        runtime.prefills += 1
        runtime.ids, runtime.soft = ids.tolist(), list(soft)
        self.length = len(ids)
        return runtime.logits(0)

    def prefill_chunks(
        self, ids: np.ndarray, soft: Sequence[SoftTokens] = (), *, chunk: int = 1, first: int = 0
    ) -> Iterator[np.ndarray]:
        yield self.prefill(ids, soft, chunk=chunk, first=first)

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """One run; the script goes on behind the last token."""
        self._runtime.steps += 1
        self._runtime.extended.append(list(tokens))
        self.length += len(tokens)
        self.run += len(tokens)
        return self._runtime.logits(self.run)

    def snapshot(self) -> tuple[int, int]:
        return self.length, self.run

    def restore(self, snapshot: tuple[int, int]) -> None:
        self.length, self.run = snapshot


def scripted(engine: Engine, script: Sequence[int], **faults: dict) -> tuple[Engine, ScriptedRuntime]:
    """A copy of `engine` that runs `script` and caches nothing, and its runtime to look into."""
    runtime = ScriptedRuntime(engine.runtime, script, **faults)
    double = copy.copy(engine)
    double._runtime = runtime
    double._reuse = engine._reuse.off()
    return double, runtime


def with_manifest(engine: Engine, **changes: object) -> Engine:
    """An engine of the same bundle with other facts in its manifest."""
    bundle = engine.bundle
    return Engine(Bundle(bundle.folder, dataclasses.replace(bundle.manifest, **changes)), threads=1)


def picture(index: int = 0, height: int = 60, width: int = 90) -> np.ndarray:
    """One of several pictures that differ in brightness and content."""
    return np.roll(formula_picture(height, width), 13 * index, axis=1) // (index + 1)
