"""Every mutant is caught, and the right build is not: the comparisons with the reference can fail.

Rules that no test can break by changing numbers, and what is said of them instead:

- The decoders of Gemma 4 E2B cannot be built with MLPs of one width, nor with heads of one width: matrices of another
  shape are refused, which is what those mutants must raise.
- Positions of PaliGemma: rotary embedding sees differences of positions only, so logits are the same from 0 on; the
  tables themselves are checked. `test_positions_are_relative` shows that.
- Audio, which forms no blocks, is not an input of any bundle.
- Pictures of E2B and E4B may be cut anywhere; that they are is part of what is measured of the right build.
- Softmax over the chosen experts alone is the renormalised softmax over all of them.
- A picture so thin that a side would vanish has a ratio beyond the budget, so how its ratio is rounded does not matter.
- Factors in front of a norm (sqrt(hidden) of the tower of E2B, 1 / sqrt(D) of per-layer inputs, the sum of the shares
  of experts) matter beside the norm's epsilon only: those are checked on checkpoints with faint numbers.
"""

from __future__ import annotations

import pytest

from siglance.export.families import paligemma

from .bench import Bench
from .edits import constant
from .mutant import Mutant, examine, right
from .probes import LOGITS, Probe
from .table import MUTANTS

RIGHT = {f"{mutant.probe.name} / {mutant.layout}": (mutant.probe, mutant.layout) for mutant in MUTANTS}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize(("probe", "layout"), RIGHT.values(), ids=RIGHT)
def test_the_right_build_is_right(bench: Bench, probe: Probe, layout: str, record_property):
    difference = right(bench, probe, layout)
    record_property("difference", difference)
    assert difference <= probe.limit


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_is_caught(bench: Bench, mutant: Mutant, record_property):
    finding = examine(bench, mutant)
    record_property("finding", str(finding))
    assert finding.caught, f"{mutant.id}: {finding}"


def test_mutants_have_names_of_their_own():
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("layout", ["PaliGemma 1", "PaliGemma 2"])
def test_positions_are_relative(bench: Bench, layout: str):
    counted_from_zero = Mutant("positions", layout, "from 0", constant(paligemma, "FIRST_POSITION", 0), LOGITS)
    assert examine(bench, counted_from_zero).difference <= LOGITS.limit
