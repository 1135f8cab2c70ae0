"""A model behind a server that says what a test tells it to, with tools and thoughts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from siglance.engine import Engine

from ..scripted import ScriptedRuntime, scripted
from ..tool_template import speller, thinking_bundle

__all__ = ["Actor"]


class Actor:
    """An engine of a tiny bundle whose chat template knows tools and thinking.

    `says(*texts)` gives it its lines: each request takes the next one, in which the markers of thoughts and calls are
    spelled out. `heard` are the prompts of these requests, with their markers.
    """

    def __init__(self, folder: Path):
        self._whole = Engine.open(thinking_bundle(folder), threads=1)
        self._spell = speller(self._whole)
        self.engine, _ = scripted(self._whole, [])
        self._runtime = _Lines(self._whole.runtime)
        self.engine._runtime = self._runtime

    def says(self, *texts: str) -> None:
        end = self._whole.manifest.stop_ids[0]
        self._runtime.lines = [[*self._spell(text), end] for text in texts]
        self._runtime.prompts = []

    @contextlib.contextmanager
    def failing(self, run: int, error: Exception) -> Iterator[None]:
        """The decoder's run of this number raises an error, in each request."""
        self._runtime.errors = {run: error}
        try:
            yield
        finally:
            self._runtime.errors = {}

    @property
    def heard(self) -> list[str]:
        decode = self._whole._tokenizer.decode
        return [decode(ids, skip_special_tokens=False) for ids in self._runtime.prompts]

    def close(self) -> None:
        self._whole.close()


class _Lines(ScriptedRuntime):
    """Gives each session a runtime of its own, with the next of its lines."""

    def __init__(self, real):
        super().__init__(real, [])
        self.lines: list[list[int]] = []
        self.prompts: list[list[int]] = []

    def session(self):
        double = copy.copy(self)
        double.script = self.lines.pop(0)
        return ScriptedRuntime.session(double)

    def logits(self, run: int) -> np.ndarray:
        if run == 0:
            self.prompts.append(self.ids)
        return super().logits(run)
