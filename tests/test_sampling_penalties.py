"""Penalties, bias and mask: before the filters, against the float64 definition, alone and in the whole chain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.errors import ModelOutputError, SamplingError
from siglance.engine.sampling import Sampler, Sampling, check_token_ids, read_logit_bias
from siglance.kernels import logits as rows
from siglance.kernels import reference_sampling as reference

from .test_sampling import chi_square, effective, near_boundary, random_row

EXAMPLES = 300
SIZE = 97
IDS = st.lists(st.integers(0, SIZE - 1), max_size=12)
PENALTIES = st.fixed_dictionaries(
    {
        "presence": st.sampled_from([0.0, 0.5, 2.0, -2.0]),
        "frequency": st.sampled_from([0.0, 0.3, 2.0, -1.0]),
        "repetition": st.sampled_from([1.0, 1.1, 2.0, 0.5, 100.0, 0.01]),
    }
)
BIAS = st.dictionaries(st.integers(0, SIZE - 1), st.sampled_from([-100.0, -1.5, 0.0, 3.0, 100.0]), max_size=5)
# At least one token is allowed.
ALLOWED = st.none() | st.sets(st.integers(0, SIZE - 1), min_size=1)


def sampler(logits_of: dict, penalties: dict, bias: dict, prompt: list[int], reply: list[int]) -> Sampler:
    made = Sampler(
        effective(
            presence_penalty=penalties["presence"],
            frequency_penalty=penalties["frequency"],
            repetition_penalty=penalties["repetition"],
            logit_bias=bias,
            **logits_of,
        ),
        prompt,
    )
    for id in reply:
        made.add(id)
    return made


def mask_of(allowed: set[int] | None, size: int = SIZE) -> np.ndarray | None:
    if allowed is None:
        return None
    bits = np.isin(np.arange(size), list(allowed))
    return np.packbits(bits, bitorder="little")


# -- fast against reference ------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 3.0, 1e30]), PENALTIES, IDS, IDS)
def test_law_penalties_are_the_definition(seed, scale, penalties, prompt, reply):
    logits = random_row(SIZE, seed, scale)
    logits[seed % SIZE] = -np.inf
    expected = reference.penalise(list(enumerate(map(float, logits))), prompt, reply, **penalties)
    ids = np.array(sorted({*prompt, *reply}), np.int64)
    counts = np.array([reply.count(id) for id in ids.tolist()], np.int64)
    found = rows.penalise(logits, ids, counts, **penalties)
    largest = float(np.finfo(np.float32).max)
    clipped = [value if value == -math.inf else max(-largest, min(value, largest)) for _, value in expected]
    np.testing.assert_allclose(found, np.array(clipped, np.float32), rtol=1e-6, atol=1e-12)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**32 - 1), BIAS, ALLOWED, st.sampled_from([1, 7, 8, 9, 97]))
def test_law_bias_and_mask_are_the_definition(seed, bias, allowed, size):
    logits = random_row(size, seed)
    candidates = list(enumerate(map(float, logits)))
    bias = {id: value for id, value in bias.items() if id < size}
    found = rows.add_bias(logits, np.array([*bias], np.int64), np.array([*bias.values()], np.float64))
    expected = [value for _, value in reference.add_bias(candidates, bias)]
    np.testing.assert_allclose(found, np.array(expected, np.float32), rtol=1e-6)
    if allowed is not None:
        kept = rows.keep_allowed(logits, mask_of(allowed, size))
        assert kept.tolist() == [value for _, value in reference.keep_allowed(candidates, allowed)]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    PENALTIES,
    BIAS,
    IDS,
    IDS,
    ALLOWED,
    st.sampled_from([0.0, 0.4, 1.0, 2.0]),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([0.5, 0.95, 1.0]),
    st.integers(0, 2**64 - 1),
)
def test_law_the_whole_chain_draws_what_the_definition_draws(
    row, penalties, bias, prompt, reply, allowed, temperature, top_k, top_p, seed
):
    logits = random_row(SIZE, row)
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    token = sampler(values, penalties, bias, prompt, reply)(logits, mask_of(allowed))
    changes = {"prompt": prompt, "reply": reply, **penalties, "bias": bias, "allowed": allowed}
    expected = reference.distribution(logits.tolist(), temperature, top_k, top_p, **changes)
    if allowed is not None:
        assert token in allowed
    before = reference.distribution(logits.tolist(), 1.0, **changes)
    hangs = near_boundary(np.log(np.array([before.get(id, 1e-300) for id in range(SIZE)])), top_k, top_p, 0.0)
    if token in expected and temperature > 0:
        uniform = np.random.Generator(np.random.PCG64(seed)).random()
        reached = math.fsum(value for id, value in expected.items() if id < token)
        slack = 1.0 if hangs else 1e-5
        assert reached - slack <= uniform <= reached + expected[token] + slack
    else:
        assert token in expected or hangs


@pytest.mark.parametrize(
    "values",
    [
        {"presence": 1.5},
        {"frequency": 0.7},
        {"repetition": 1.8},
        {"bias": {3: 2.0, 50: -100.0}},
        {"allowed": set(range(0, SIZE, 3))},
        {
            **{"presence": 0.4, "frequency": 0.3, "repetition": 1.2, "bias": {3: 2.0}, "allowed": set(range(5, 90))},
            **{"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        },
    ],
    ids=lambda values: "the whole chain" if len(values) > 1 else next(iter(values)),
)
def test_20000_draws_follow_the_distribution(values):
    prompt, reply = [5, 17, 30, 31], [17, 17, 60, 61, 62, 61, 17]
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "bias": {}, "allowed": None} | values
    penalties = {"presence": 0.0, "frequency": 0.0, "repetition": 1.0} | {
        name: values.pop(name) for name in ("presence", "frequency", "repetition") if name in values
    }
    bias, allowed = values.pop("bias"), values.pop("allowed")
    logits = random_row(SIZE, seed=3, scale=1.5)
    draw, mask = sampler(values, penalties, bias, prompt, reply), mask_of(allowed)
    counts = np.bincount([draw(logits, mask) for _ in range(20_000)], minlength=SIZE)
    expected = reference.distribution(
        logits.tolist(), **values, prompt=prompt, reply=reply, **penalties, bias=bias, allowed=allowed
    )
    statistic, bound = chi_square(counts, expected)
    assert statistic < bound


# -- what the definitions say ----------------------------------------------------------------------------------------


def test_openai_penalties_look_at_the_reply_and_repetition_at_the_prompt_too():
    logits = np.array([2.0, 2.0, 2.0, -2.0, -2.0], np.float32)
    candidates = list(enumerate(logits.tolist()))
    once_and_thrice = reference.penalise(candidates, [0, 3], [1, 2, 2, 2, 4], 0.5, 0.25, 1.0)
    assert [value for _, value in once_and_thrice] == [2.0, 1.25, 0.75, -2.0, -2.75]
    doubled = reference.penalise(candidates, [0, 3], [1], 0.0, 0.0, 2.0)
    assert [value for _, value in doubled] == [1.0, 1.0, 2.0, -4.0, -2.0]


def test_repetition_comes_before_the_subtractions():
    """4 / 2 - 1, not (4 - 1) / 2."""
    assert reference.penalise([(0, 4.0)], [], [0], 1.0, 0.0, 2.0) == [(0, 1.0)]
    found = rows.penalise(
        np.array([4.0], np.float32), np.array([0]), np.array([1]), presence=1, frequency=0, repetition=2
    )
    assert found.tolist() == [1.0]


def test_transformers_has_the_same_repetition_penalty():
    """Values worked out with RepetitionPenaltyLogitsProcessor's rule: score < 0 times the penalty, else divided."""
    logits = np.array([1.5, -0.5, 0.0, 3.0], np.float32)
    found = rows.penalise(logits, np.array([0, 1, 2]), np.zeros(3, np.int64), presence=0, frequency=0, repetition=1.5)
    assert found.tolist() == [1.0, -0.75, 0.0, 3.0]


def test_penalties_and_bias_decide_at_temperature_0():
    logits = np.array([3.0, 2.9, 2.0, 2.0], np.float32)
    greedy = {"temperature": 0.0}
    none = {"presence": 0.0, "frequency": 0.0, "repetition": 1.0}
    assert sampler(greedy, none, {}, [], [0])(logits) == 0
    assert sampler(greedy, none | {"presence": 0.2}, {}, [], [0])(logits) == 1
    assert sampler(greedy, none | {"presence": 0.2}, {}, [0], [])(logits) == 0  # the prompt does not count
    assert sampler(greedy, none | {"frequency": 0.06}, {}, [], [0, 0])(logits) == 1
    assert sampler(greedy, none | {"repetition": 1.1}, {}, [0], [])(logits) == 1
    assert sampler(greedy, none, {2: 100.0, 3: 100.0}, [], [])(logits) == 2  # the lowest id of equals
    assert sampler(greedy, none, {0: -100.0}, [], [])(logits, mask_of({0, 3}, 4)) == 3


def test_a_bias_of_100_is_exclusive_and_of_minus_100_a_ban():
    logits = random_row(SIZE, scale=5)  # models with a soft cap have logits between -30 and 30
    none = {"presence": 0.0, "frequency": 0.0, "repetition": 1.0}
    only, never = sampler({}, none, {40: 100.0}, [], []), sampler({}, none, {int(logits.argmax()): -100.0}, [], [])
    assert {only(logits) for _ in range(300)} == {40}
    assert int(logits.argmax()) not in {never(logits) for _ in range(300)}


def test_a_mask_of_one_token_draws_it_whatever_the_model_thinks():
    logits = random_row(SIZE)
    logits[11] = -3e38
    for temperature in (0.0, 1e-300, 1.0):
        draw = Sampler(effective(temperature=temperature, top_k=3, top_p=0.1, min_p=0.9))
        assert draw(logits, mask_of({11})) == 11


def test_a_mask_that_leaves_only_impossible_tokens_is_an_error():
    logits = random_row(SIZE)
    logits[11] = -np.inf
    with pytest.raises(ModelOutputError, match="rules out every token that the grammar allows"):
        Sampler(effective())(logits, mask_of({11}))


def test_a_short_mask_allows_nothing_beyond_its_end():
    assert rows.keep_allowed(np.zeros(20, np.float32), np.array([255], np.uint8)).tolist() == [0] * 8 + [-np.inf] * 12


def test_nothing_changes_the_logits_of_the_model():
    logits = random_row(SIZE)
    before = logits.copy()
    logits.flags.writeable = False
    draw = sampler({}, {"presence": 1.0, "frequency": 1.0, "repetition": 1.3}, {3: 4.0}, [1], [2])
    draw(logits, mask_of({1, 2, 3}))
    assert np.array_equal(logits, before)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 300.0]))
def test_law_log_probabilities_are_the_definition(seed, scale):
    logits = random_row(SIZE, seed, scale)
    logits[seed % SIZE] = -np.inf
    ids = np.arange(SIZE)
    expected = np.array(reference.log_probabilities(logits.tolist()))
    np.testing.assert_allclose(rows.log_probabilities(logits, ids), expected, rtol=1e-6, atol=1e-6)


# -- values that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("presence_penalty", value, "between -2 and 2") for value in (-2.1, 2.1, math.nan, True, "1")),
        *(("frequency_penalty", value, "between -2 and 2") for value in (-2.1, 3, math.inf, False, [])),
        *(
            ("repetition_penalty", value, "between 0.01 and 100")
            for value in (0, 5e-324, 1e-40, 0.0099, -1, 101, math.nan, math.inf, True)
        ),
        *(("logit_bias", {5: value}, "between -100 and 100") for value in (-101, 100.5, math.nan, True, "1", None)),
        *(("logit_bias", {key: 1.0}, "a token id") for key in (-1, 1.5, "5", True, 2**31)),
        *(("logit_bias", value, "a mapping") for value in ([(1, 2.0)], 3, "5=1")),
    ],
)
def test_case_27_values_out_of_range_are_refused_by_name_and_range(name, value, expected):
    with pytest.raises(SamplingError, match=f"{name}.* expected .*{expected}"):
        Sampling(**{name: value})


def test_the_ends_of_the_ranges_are_in_range():
    Sampling(presence_penalty=-2, frequency_penalty=2, repetition_penalty=100, logit_bias={0: -100, 1: 100.0})
    Sampling(presence_penalty=np.float32(0.5), repetition_penalty=0.01, logit_bias={np.int64(3): np.float32(1)})


@pytest.mark.parametrize("ids", [[SIZE], [-1], [1.0], [True], ["1"], "1", 1, None])
def test_token_ids_outside_of_the_vocabulary_are_refused(ids):
    with pytest.raises(SamplingError, match="stop_ids"):
        check_token_ids("stop_ids", ids, SIZE)


def test_token_ids_in_any_container():
    for ids in ([1, 2, 2], (1, 2), {1, 2}, np.array([1, 2]), {1: 0.5, 2: 0.1}.keys()):
        assert check_token_ids("stop_ids", ids, SIZE) == {1, 2}


def test_a_bias_is_read_from_texts():
    assert read_logit_bias(["5=1.5", "7=-100", "5=2"]) == {5: 2.0, 7: -100.0}
    for wrong in ("5", "=1", "a=1", "5=b", ""):
        with pytest.raises(SamplingError, match=r"expected a token id, '=' and a number"):
            read_logit_bias([wrong])
