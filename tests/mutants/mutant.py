"""One mutant, and what is found of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from siglance.engine.errors import SiglanceError

from .bench import Bench
from .edits import Mutation
from .probes import LOGITS, Probe


@dataclass(frozen=True)
class Mutant:
    """A rule, and one way to break it in one layout.

    `refusal` is for mutants that the product does not build or run at all: a pattern of the typed error it must raise.
    """

    rule: str
    layout: str
    name: str
    mutation: Mutation
    probe: Probe = LOGITS
    refusal: str | None = None

    @property
    def id(self) -> str:
        return f"{self.rule} / {self.layout}: {self.name}"


@dataclass(frozen=True)
class Finding:
    """`difference` of the measurement, or the error that refused it."""

    difference: float
    refused: str | None
    caught: bool

    def __str__(self) -> str:
        return f"{self.difference:.2g}" if self.refused is None else f"refused: {self.refused}"


def examine(bench: Bench, mutant: Mutant) -> Finding:
    """Measure a mutant. Errors other than the refusal it names are errors of the mutant itself and are raised."""
    mutant.probe.ready(bench, mutant.layout)
    with pytest.MonkeyPatch.context() as patch:
        mutant.mutation(patch)
        try:
            difference = mutant.probe.measure(bench, mutant.layout, patch)
        except SiglanceError as error:
            if mutant.refusal is None:
                raise
            text = f"{type(error).__name__}: {error}"
            return Finding(float("inf"), text, re.search(mutant.refusal, text) is not None)
    return Finding(difference, None, mutant.refusal is None and difference > mutant.probe.limit)


def right(bench: Bench, probe: Probe, layout: str) -> float:
    """The same measurement with nothing patched."""
    probe.ready(bench, layout)
    with pytest.MonkeyPatch.context() as patch:
        return probe.measure(bench, layout, patch)
