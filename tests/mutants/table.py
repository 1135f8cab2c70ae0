"""All mutants, and the table that says what was found of them."""

from __future__ import annotations

from collections.abc import Iterable

from . import decoders, halves, inputs, masks, norms, sharing, towers
from .mutant import Finding, Mutant

MUTANTS: list[Mutant] = sorted(
    (mutant for module in (norms, masks, sharing, inputs, halves, towers, decoders) for mutant in module.MUTANTS),
    key=lambda mutant: mutant.rule,
)


def lines(found: Iterable[tuple[Mutant, Finding]]) -> list[str]:
    """A Markdown table of the findings, and the counts by rule."""
    rows, counts = [], dict[str, list[int]]()
    for mutant, finding in found:
        caught = "yes" if finding.caught else "NO"
        rows.append(f"| {mutant.rule} | {mutant.layout}: {mutant.name} | {mutant.probe.name} | {finding} | {caught} |")
        tried = counts.setdefault(mutant.rule, [0, 0])
        tried[0] += 1
        tried[1] += finding.caught
    head = ["| rule | mutation | measured | difference found | caught |", "|---|---|---|---|---|"]
    summary = ["", "| rule | tried | caught |", "|---|---|---|"]
    summary += [f"| {rule} | {tried} | {caught} |" for rule, (tried, caught) in counts.items()]
    tried, caught = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    return [*head, *rows, *summary, f"| all | {tried} | {caught} |"]
