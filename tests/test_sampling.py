"""Sampling: the fast chain against the float64 definition, and the draws against the distribution.

Penalties, bias and mask are in test_sampling_penalties.py. The laws of the chain are listed in kernels/README.md.

The chi-square tests use fixed seeds, so they give the same result on each run. Their bound is the value that a right
sampler exceeds with probability 1e-6 per test: a change of generator would fail one of the five with odds of 1 to
200,000, a wrong filter fails for sure.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.errors import ModelOutputError, SamplingError
from siglance.engine.manifest import SamplingFacts
from siglance.engine.sampling import Effective, Sampler, Sampling, resolve
from siglance.kernels import reference_sampling as reference
from siglance.kernels import topk

EXAMPLES = 300
VOCABULARIES = (1, 2, *[97] * 7, 1025)  # awkward ones; the loops of the definition make the large one dear
GEMMA = SamplingFacts(temperature=1.0, top_k=64, top_p=0.95, min_p=None)


def effective(**values) -> Effective:
    return Effective(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7} | values))


def random_row(size: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


@st.composite
def rows(draw) -> np.ndarray:
    """Rows of awkward sizes: random, few distinct values (many ties), peaked, all equal, -inf all but one."""
    size = draw(st.sampled_from(VOCABULARIES))
    kind = draw(st.sampled_from(["random", "ties", "peaked", "equal", "masked", "one"]))
    seed = draw(st.integers(0, 2**32 - 1))
    row = random_row(size, seed)
    generator = np.random.default_rng(seed)
    if kind == "ties":
        row = np.round(row).astype(np.float32)
    elif kind == "peaked":
        row[generator.integers(size)] = 80.0
    elif kind == "equal":
        row[:] = -2.5
    elif kind == "masked":
        row[generator.random(size) < 0.5] = -np.inf
        row[generator.integers(size)] = 1.0
    elif kind == "one":
        best = generator.integers(size)
        row[np.arange(size) != best] = -np.inf
    return row


FILTERS = {
    "top_k": st.sampled_from([0, 1, 2, 5, 64, 96, 97, 10**6]),
    "top_p": st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.95, 0.999999, 1.0]) | st.floats(0, 1),
    "min_p": st.sampled_from([0.0, 1e-9, 0.05, 0.5, 1.0]) | st.floats(0, 1),
}
TEMPERATURES = st.sampled_from([0.0, 1e-300, 1e-7, 0.4, 1.0, 2.0, 1e30])


def near_boundary(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether a filter's decision hangs on the last bits, where float32 and float64 may differ."""
    candidates = list(enumerate(map(float, logits)))
    if top_k:
        candidates = reference.keep_top_k(candidates, top_k)
    by_rank = sorted(reference.probabilities(candidates, 1.0).values(), reverse=True)
    near_p = bool(np.any(np.abs(np.cumsum(by_rank) - top_p) < 1e-6)) and 0 < top_p < 1
    return near_p or any(abs(value / by_rank[0] - min_p) < 1e-6 * min_p for value in by_rank if min_p < 1)


# -- fast against reference ------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows(), st.fixed_dictionaries(FILTERS), TEMPERATURES, st.integers(0, 2**64 - 1))
def test_law_the_sampler_draws_what_the_definition_draws(logits, filters, temperature, seed):
    token = Sampler(effective(temperature=temperature, seed=seed, **filters))(logits)
    expected = reference.distribution(logits.tolist(), temperature, **filters)
    if token in expected and temperature > 0:
        # The draw is the definition's for the same uniform number, up to float32 rounding of the running sum.
        uniform = np.random.Generator(np.random.PCG64(seed)).random()
        before = math.fsum(value for id, value in expected.items() if id < token)
        slack = 1e-5 if not near_boundary(logits, **filters) else 1.0
        assert before - slack <= uniform <= before + expected[token] + slack
    else:
        assert token in expected or near_boundary(logits, **filters)


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows(), st.data())
def test_law_each_filter_keeps_what_the_definition_keeps(logits, data):
    candidates = list(enumerate(map(float, logits)))

    def ids(kept) -> list[int]:
        return sorted(id for id, _ in kept)

    k = data.draw(FILTERS["top_k"].filter(bool))
    assert topk.top_k(logits, k).tolist() == ids(reference.keep_top_k(candidates, k))
    p = data.draw(FILTERS["top_p"])
    if not near_boundary(logits, 0, p, 0.0) and p < 1:
        assert topk.top_p(logits, p).tolist() == ids(reference.keep_top_p(candidates, p))
    p = data.draw(FILTERS["min_p"].filter(bool))
    if not near_boundary(logits, 0, 1.0, p):
        kept = topk.min_p(logits, p)
        # exp underflows in the definition far below the best token; the difference of logits does not
        assert [id for id in kept.tolist() if logits[id] > -np.inf] == [
            id for id in ids(reference.keep_min_p(candidates, p)) if logits[id] > -np.inf
        ]


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows(), FILTERS["top_p"], FILTERS["min_p"], TEMPERATURES, st.integers(0, 2**64 - 1))
def test_law_top_k_of_1_and_temperature_0_are_greedy(logits, top_p, min_p, temperature, seed):
    greedy = int(np.argmax(logits))
    filters = {"top_p": top_p, "min_p": min_p, "seed": seed}
    assert Sampler(effective(temperature=temperature, top_k=1, **filters))(logits) == greedy
    assert Sampler(effective(temperature=0.0, top_k=5, **filters))(logits) == greedy


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows(), st.data())
def test_law_order_of_the_vocabulary_does_not_matter(logits, data):
    """Another order of the tokens keeps the same tokens, as long as no two are equal."""
    logits = np.unique(logits)  # without ties, and ascending
    order = np.array(data.draw(st.permutations(range(logits.size))))
    k, p, ratio = data.draw(FILTERS["top_k"].filter(bool)), data.draw(FILTERS["top_p"]), data.draw(FILTERS["min_p"])
    for filter, value in ((topk.top_k, k), (topk.top_p, p), (topk.min_p, ratio or 1.0)):
        kept, mixed = filter(logits, value), filter(logits[order], value)
        if filter is topk.top_p and near_boundary(logits, 0, p, 0.0):
            continue
        assert sorted(order[mixed].tolist()) == kept.tolist()


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(-1000, 1000), st.data())
def test_law_a_shift_of_all_logits_does_not_matter(size, seed, shift, data):
    """Filters and weights see differences only. In eighths and with whole shifts float32 is exact."""
    logits = (np.random.default_rng(seed).integers(-80, 80, size) / 8).astype(np.float32)
    shifted = logits + np.float32(shift)
    k, p, ratio = data.draw(FILTERS["top_k"].filter(bool)), data.draw(FILTERS["top_p"]), data.draw(FILTERS["min_p"])
    for filter, value in ((topk.top_k, k), (topk.top_p, p), (topk.min_p, ratio or 1.0)):
        assert filter(logits, value).tolist() == filter(shifted, value).tolist()
    temperature = data.draw(TEMPERATURES.filter(bool))
    assert np.array_equal(topk.relative_weights(logits, temperature), topk.relative_weights(shifted, temperature))
    values = {"temperature": temperature, "top_p": p, "seed": seed}
    assert Sampler(effective(**values))(logits) == Sampler(effective(**values))(shifted)


LARGE = {
    "peaked": lambda generator, size: generator.permutation(-2.4 * np.log(np.arange(1, size + 1))),
    "wide": lambda generator, size: generator.normal(0, 4, size),
    "flat": lambda generator, size: generator.normal(0, 1, size),
    "ties": lambda generator, size: np.round(generator.normal(0, 3, size)),
    "equal": lambda generator, size: np.full(size, -2.5),
    "few": lambda generator, size: np.where(generator.random(size) < 0.001, generator.normal(0, 3, size), -np.inf),
    "one": lambda generator, size: np.where(np.arange(size) == size // 3, 0.0, -np.inf),
    "huge": lambda generator, size: generator.uniform(-3e38, 3e38, size),
    "tiny": lambda generator, size: generator.uniform(0, 1e-40, size),
}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(LARGE)),
    st.sampled_from([8191, 8192, 12_289, 40_000]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 64, 1000, 4096, 4097, 8191]),
    st.sampled_from([0.0, 1e-9, 0.3, 0.9, 0.95, 0.999, 0.9999999]),
)
def test_law_large_rows_keep_what_sorting_keeps(kind, size, seed, k, p):
    """Narrowing down before sorting changes nothing: the definition by a full sort, in numpy, at large sizes."""
    logits = LARGE[kind](np.random.default_rng(seed), size).astype(np.float32)
    if not (logits > -np.inf).any():
        logits[0] = 0
    order = np.argsort(-logits, kind="stable")
    assert topk.top_k(logits, k).tolist() == np.sort(order[:k]).tolist()
    with np.errstate(over="ignore"):
        weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    reached = np.cumsum(weights[order]) / weights.sum()
    kept = topk.top_p(logits, p)
    # Where the running sum passes p within the precision of float32 weights, any of those places is right.
    fewest, most = (int(np.searchsorted(reached, value)) + 1 for value in (p - 1e-5, p + 1e-5))
    assert fewest <= kept.size <= most
    assert kept.tolist() == np.sort(order[: kept.size]).tolist()


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 1025])
def test_draw_covers_its_range_and_skips_weight_zero(size):
    weights = np.zeros(size, dtype=np.float32)
    weights[size // 2] = 1.0
    for uniform in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        assert topk.draw(weights, uniform) == size // 2
    ones = np.ones(size, dtype=np.float32)
    for position in range(size):
        assert topk.draw(ones, (position + 0.5) / size) == position


def test_reference_draw_walks_the_running_sum():
    probability = {3: 0.25, 5: 0.5, 9: 0.25}
    assert [reference.draw(probability, uniform) for uniform in (0.0, 0.24, 0.25, 0.74, 0.75, 0.9999)] == [
        *(3, 3, 5, 5, 9, 9)
    ]


def test_top_p_takes_ties_by_lowest_id():
    logits = np.zeros(97, dtype=np.float32)
    assert topk.top_p(logits, 10 / 97 - 1e-9).tolist() == list(range(10))
    assert topk.top_p(logits, 0.0).tolist() == [0]
    assert topk.top_k(logits, 3).tolist() == [0, 1, 2]


# -- draws against the distribution ----------------------------------------------------------------------------------


def chi_square_bound(freedom: int, deviations: float = 4.7534) -> float:
    """The value exceeded with probability 1e-6 (4.7534 standard deviations), by Wilson and Hilferty (1931)."""
    ninth = 2 / (9 * freedom)
    return freedom * (1 - ninth + deviations * math.sqrt(ninth)) ** 3


def chi_square(counts: np.ndarray, expected: dict[int, float]) -> tuple[float, float]:
    """Pearson's statistic of counts by id, and the value that it exceeds with probability 1e-6. No id is impossible."""
    draws = int(counts.sum())
    assert {int(id) for id in np.flatnonzero(counts)} <= set(expected)
    # Cells that expect fewer than 5 draws are counted together, as the test demands.
    cells = [(counts[id], draws * p) for id, p in expected.items() if draws * p >= 5]
    rest = (draws - sum(count for count, _ in cells), draws - sum(expect for _, expect in cells))
    cells += [rest] if rest[1] > 1e-6 else []
    return sum((count - expect) ** 2 / expect for count, expect in cells), chi_square_bound(len(cells) - 1)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.7},
        {"top_k": 12},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_20000_draws_follow_the_distribution(values):
    logits, draws = random_row(97, seed=3, scale=1.5), 20_000
    sampler = Sampler(effective(**values))
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=97)
    filters = {name: value for name, value in values.items() if name != "temperature"}
    expected = reference.distribution(logits.tolist(), values.get("temperature", 1.0), **filters)
    statistic, bound = chi_square(counts, expected)
    assert statistic < bound


def test_chi_square_notices_a_wrong_temperature():
    """The check of the check: draws at temperature 0.8 do not pass for temperature 1."""
    logits, draws = random_row(97, seed=3, scale=1.5), 8_000
    sampler = Sampler(effective(temperature=0.8))
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=97)
    expected = reference.distribution(logits.tolist(), 1.0)
    statistic = sum((counts[id] - draws * p) ** 2 / (draws * p) for id, p in expected.items())
    assert statistic > 2 * chi_square_bound(96)


def test_the_temperature_comes_after_the_filters():
    """At temperature 4 top-p still keeps what it keeps at temperature 1 (transformers would keep more)."""
    logits = np.log(np.array([0.6, 0.3, 0.06, 0.04], dtype=np.float32))
    sampler = Sampler(effective(temperature=4.0, top_p=0.9 - 1e-6))
    assert {sampler(logits) for _ in range(500)} == {0, 1}


def test_top_p_counts_after_top_k():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    sampler = Sampler(effective(top_k=2, top_p=0.5))  # 0.4 / 0.7 reaches 0.5, 0.4 would not
    assert {sampler(logits) for _ in range(200)} == {0}


def test_a_row_of_the_real_size():
    logits = random_row(262_144, seed=1, scale=2.0)
    logits[200_000] = 14.0
    for values in ({}, {"top_k": 64, "top_p": 0.95}, {"top_p": 0.95}, {"min_p": 0.1}, {"temperature": 0.0}):
        assert 0 <= Sampler(effective(**values))(logits) < 262_144
    assert topk.top_k(logits, 64).tolist() == sorted(np.argsort(-logits, kind="stable")[:64].tolist())
    ordered = np.argsort(-logits, kind="stable")
    reached = np.cumsum(topk.relative_weights(logits, 1.0)[ordered], dtype=np.float64)
    kept = int(np.searchsorted(reached / reached[-1], 0.95)) + 1
    assert kept > 256  # more than the first guess
    assert topk.top_p(logits, 0.95).tolist() == sorted(ordered[:kept].tolist())


# -- case 27, case 17: extremes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1e-7, 1e-8, 5e-324])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 1}, {"top_k": 10**6}, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}]
)
def test_case_27_tiny_temperatures_are_greedy(temperature, filters):
    logits = random_row(97)
    logits[41] = 60.0
    assert Sampler(effective(temperature=temperature, **filters))(logits) == 41


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 50}])
def test_case_27_the_highest_temperatures_draw_nothing_that_is_ruled_out(temperature, filters):
    logits = random_row(97)
    logits[::2] = -np.inf
    sampler = Sampler(effective(temperature=temperature, **filters))
    assert {sampler(logits) % 2 for _ in range(100)} == {1}
    assert sampler(random_row(97), mask=np.array([4], np.uint8)) == 2


def test_case_27_top_p_0_keeps_exactly_the_best_token():
    logits = np.array([1.0, 5.0, 5.0, 4.999], dtype=np.float32)
    sampler = Sampler(effective(top_p=0.0))
    assert {sampler(logits) for _ in range(100)} == {1}


@pytest.mark.parametrize("values", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5, "min_p": 0.5}])
def test_case_27_minus_inf_everywhere_but_one(values):
    logits = np.full(97, -np.inf, dtype=np.float32)
    logits[96] = -1e30
    assert Sampler(effective(**values))(logits) == 96


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, -1e-9, math.nan, math.inf, 10**400, True, "1", [1.0])),
        *(("top_k", value) for value in (-1, 1.5, 40.0, math.nan, True, "40", 2**63)),
        *(("top_p", value) for value in (-0.1, 1.1, math.nan, True, "0.9")),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan, False, "0.1")),
        *(("seed", value) for value in (-1, 1.5, True, "7", 2**64)),
    ],
)
def test_case_27_values_out_of_range_are_refused_by_name_and_range(name, value):
    with pytest.raises(SamplingError, match=f"^{name} is .*, expected an? "):
        Sampling(**{name: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[math.nan] * 4, [math.inf, 0, 0, 0], [-math.inf] * 4, [0, math.nan, -math.inf, 0]])
def test_case_17_non_finite_logits_are_an_error(bad, temperature):
    with pytest.raises(ModelOutputError, match=r"^non-finite logits: .* of 4$"):
        Sampler(effective(temperature=temperature))(np.array(bad, dtype=np.float32))


def test_case_17_all_equal_is_legal_and_greedy_takes_the_lowest_id():
    equal = np.full(97, 3.25, dtype=np.float32)
    assert Sampler(effective(temperature=0.0))(equal) == 0
    assert len({Sampler(effective(seed=seed))(equal) for seed in range(200)}) > 50


# -- case 63: defaults, and seeds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_values", "expected"),
    [
        ({}, (1.0, 64, 0.95, 0.0)),
        ({"temperature": 0.3}, (0.3, 64, 0.95, 0.0)),
        ({"temperature": None, "top_k": None}, (1.0, 64, 0.95, 0.0)),
        ({"temperature": 0}, (0.0, 64, 0.95, 0.0)),
        ({"top_k": 0, "top_p": 1, "min_p": 0.1}, (1.0, 0, 1.0, 0.1)),
    ],
)
def test_case_63_request_then_bundle_then_off(request_values, expected):
    found = resolve(Sampling(**request_values), GEMMA)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == expected


def test_case_63_a_bundle_without_defaults_filters_nothing():
    found = resolve(Sampling(seed=1), SamplingFacts(temperature=0.0, top_k=None, top_p=None, min_p=None))
    assert found == Effective(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)


@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, 0.5, Sampling])
def test_anything_but_sampling_is_refused_by_type(sampling):
    with pytest.raises(SamplingError, match=rf"sampling is {type(sampling).__name__}, expected Sampling"):
        resolve(sampling, GEMMA)


def test_a_bundle_default_out_of_range_is_refused():
    with pytest.raises(SamplingError, match=r"top_p is 3\.0"):
        resolve(Sampling(), SamplingFacts(temperature=1.0, top_k=None, top_p=3.0, min_p=None))


def test_a_seed_is_drawn_reported_and_repeats_the_reply():
    first, second = resolve(Sampling(), GEMMA), resolve(Sampling(), GEMMA)
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**53
    logits = random_row(1025)
    again = resolve(Sampling(seed=first.seed), GEMMA)
    one, two = Sampler(first), Sampler(again)
    assert [one(logits) for _ in range(50)] == [two(logits) for _ in range(50)]


def test_same_seed_same_draws_whatever_runs_between():
    logits = random_row(1025)
    alone = Sampler(effective(seed=11))
    expected = [alone(logits) for _ in range(50)]
    one, other = Sampler(effective(seed=11)), Sampler(effective(seed=12))
    found = []
    for _ in range(50):
        np.random.default_rng().random()
        other(logits)
        found.append(one(logits))
    assert found == expected


def test_the_sampler_does_not_change_its_input():
    logits = random_row(1025)
    before = logits.copy()
    logits.flags.writeable = False
    Sampler(effective(top_k=40, top_p=0.9, min_p=0.05))(logits)
    assert np.array_equal(logits, before)


def test_the_table_of_laws_names_the_tests():
    folder = Path(__file__).parent
    tests = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("test_sampling*.py")))
    laws = set(re.findall(r"^def (test_law_\w+|test_20000_draws\w+)", tests, re.MULTILINE))
    table = (folder.parent / "kernels" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)` \|$", table, re.MULTILINE)) == laws
