"""Row keys, and which state is found, kept and evicted. What the engine makes of it is in test_cache.py."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.prefix_cache import MOST_ENTRIES, Pin, PrefixCache, SoftRows, row_keys
from siglance.engine.state import Snapshot

LOTS = 10**9
SOFT = 99  # an id that stands in soft rows, always the same


def snapshot(length: int, *, evicted: bool = False, nbytes: int = 0) -> Snapshot:
    rows = {"past": np.zeros(nbytes, np.uint8)}
    return Snapshot(length, length if evicted else 0, rows)


def text(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)


# --- keys


def with_pictures(*items: int | tuple[bytes, int]) -> np.ndarray:
    """Keys of a prompt of ids and (content, soft tokens)."""
    ids, soft = [], []
    for item in items:
        if isinstance(item, tuple):
            soft.append(SoftRows(len(ids), item[1], item[0]))
            ids += [SOFT] * item[1]
        else:
            ids.append(item)
    return row_keys(np.array(ids), soft)


def common(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    return int((np.append(first[:length] == second[:length], False)).argmin())


def test_text_rows_are_their_ids():
    np.testing.assert_array_equal(row_keys(np.array([2, 5, 0]), []), [2, 5, 0])


def test_soft_rows_stand_for_the_picture():
    """Case 35: placeholders share an id, keys do not."""
    keys = with_pictures(2, (b"a", 4), 7)
    assert keys.dtype == np.int64
    assert (keys[1:5] < 0).all()
    assert len(set(keys[1:5].tolist())) == 4
    np.testing.assert_array_equal(keys, with_pictures(2, (b"a", 4), 7))
    assert common(keys, with_pictures(2, (b"b", 4), 7)) == 1
    assert common(keys, with_pictures(2, (b"a", 5), 7)) == 1
    assert common(with_pictures((b"a", 4), 7, (b"b", 4), 8), with_pictures((b"a", 4), 7, (b"c", 4), 8)) == 5
    # the place in the prompt does not matter: positions are those of the rows
    np.testing.assert_array_equal(keys[1:5], with_pictures(2, 3, 4, (b"a", 4))[3:])


def test_pictures_side_by_side_are_one():
    """Rows of both may see each other, so the first is another picture than it is alone."""
    keys = with_pictures(2, (b"a", 3), (b"b", 3), 7)
    assert common(keys, with_pictures(2, (b"a", 3), 7)) == 1
    assert common(keys, with_pictures(2, (b"a", 3), (b"c", 3), 7)) == 1
    assert common(keys, with_pictures(2, (b"ab", 6), 7)) == 1
    assert common(keys, with_pictures(2, (b"ab", 3), (b"", 3), 7)) == 1
    np.testing.assert_array_equal(keys, with_pictures(2, (b"a", 3), (b"b", 3), 7))


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(1, 30), st.integers(1, 30))
def test_law_equal_keys_mean_equal_pictures(first, second, rows, more):
    equal = np.array_equal(with_pictures((first, rows)), with_pictures((second, more)))
    assert equal == ((first, rows) == (second, more))


# --- find


def test_an_empty_cache_knows_nothing():
    assert PrefixCache(LOTS).find(text(1, 2, 3)) is None


def test_the_longest_beginning_is_found():
    cache = PrefixCache(LOTS)
    cache.add(text(1, 2, 9, 9, 9), snapshot(5))
    cache.add(text(1, 2, 3, 4, 8), snapshot(5))
    cache.add(text(1, 2, 3, 7), snapshot(4))
    match = cache.find(text(1, 2, 3, 4, 5, 6))
    assert match is not None
    assert (match.length, match.snapshot.length) == (4, 5)
    assert cache.find(text(3, 1, 2)) is None


def test_one_row_is_left_to_run():
    """Case 35: a hit of the exact full prompt."""
    cache = PrefixCache(LOTS)
    cache.add(text(1, 2, 3), snapshot(3))
    assert cache.find(text(1, 2, 3)).length == 2
    assert cache.find(text(1, 2)).length == 1
    assert cache.find(text(1)) is None
    assert cache.find(text(1, 2, 3, 4)).length == 3


def test_a_state_that_has_evicted_is_whole_or_nothing():
    cache = PrefixCache(LOTS)
    cache.add(text(1, 2, 3), snapshot(3, evicted=True))
    assert cache.find(text(1, 2, 3)) is None
    assert cache.find(text(1, 2, 4, 5)) is None
    assert cache.find(text(1, 2, 3, 4)).length == 3
    cache.add(text(1, 2), snapshot(2))
    assert cache.find(text(1, 2, 3)).length == 2
    assert cache.find(text(1, 2, 3, 4)).length == 3


def test_a_picture_is_never_parted():
    """A prompt that ends with a picture leaves all of it to run."""
    cache = PrefixCache(LOTS)
    keys = with_pictures(2, 3, (b"a", 5), (b"b", 2))
    cache.add(keys, snapshot(9))
    assert cache.find(keys).length == 2
    assert cache.find(np.append(keys, 7)).length == 9
    alone = with_pictures((b"a", 5))
    cache.add(alone, snapshot(5))
    assert cache.find(alone) is None


PROMPTS = st.lists(st.sampled_from([1, 2, (b"a", 2), (b"b", 2), (b"a", 3)]), min_size=1, max_size=6)


@settings(max_examples=300)
@given(st.lists(st.tuples(PROMPTS, st.booleans()), max_size=6), PROMPTS)
def test_law_what_is_found_is_the_best_of_what_was_added(added, wanted):
    """Against the definition, tried for every length of every entry."""
    cache = PrefixCache(LOTS)
    for prompt, evicted in added:
        keys = with_pictures(*prompt)
        cache.add(keys, snapshot(len(keys), evicted=evicted))
    keys = with_pictures(*wanted)
    best = 0
    for prompt, evicted in added:
        other = with_pictures(*prompt)
        for length in range(1, min(len(other), len(keys) - 1) + 1):
            parted = keys[length - 1] < 0 and keys[length] < 0
            if np.array_equal(other[:length], keys[:length]) and not parted and (length == len(other) or not evicted):
                best = max(best, length)
    match = cache.find(keys)
    assert (match.length if match else 0) == best


def test_with_its_logits_a_whole_prompt_is_found():
    """Case 35: a hit of the exact full prompt leaves nothing to run."""
    cache = PrefixCache(LOTS)
    logits = np.arange(5, dtype=np.float32)
    cache.add(text(1, 2, 3), snapshot(3, evicted=True), logits=logits)
    match = cache.find(text(1, 2, 3))
    assert match.length == 3
    np.testing.assert_array_equal(match.logits, logits)
    logits[:] = 0
    assert match.logits[4] == 4
    assert not match.logits.flags.writeable
    assert (cache.find(text(1, 2, 3, 4)).length, cache.find(text(1, 2, 3, 4)).logits) == (3, None)
    cache.add(text(1, 2, 3), snapshot(3, evicted=True))  # without logits it is less
    assert cache.find(text(1, 2, 3)).logits is not None
    assert cache.nbytes == 3 * 8 + 5 * 4


def test_behind_stops_only():
    """A state serves where both prompts were cut alike up to there."""
    cache = PrefixCache(LOTS)
    cache.add(text(*range(10)), snapshot(10), stops=[4, 7, 10], logits=np.zeros(2, np.float32))
    for stops, length in (
        ([4, 7, 10], 10),  # the same prompt
        ([4, 7, 9, 10], 7),
        ([4, 8, 10], 4),
        ([3, 4, 7, 10], 0),
        ([10], 0),
    ):
        match = cache.find(text(*range(10)), stops)
        assert (match.length if match else 0) == length
    for ids, stops, length in (
        ((0, 1, 2, 3, 4, 99), [4, 6], 4),
        ((0, 1, 2, 99, 4, 5, 6, 7), [4, 7, 8], 0),
        ((0, 1, 2, 3, 4, 5, 6, 99, 98), [4, 7, 9], 7),
        (tuple(range(13)), [4, 7, 10, 13], 10),
        ((0, 1, 2, 3), [4], 0),  # its last row is wanted
    ):
        match = cache.find(text(*ids), stops)
        assert (match.length if match else 0) == length


def test_stops_decide_what_covers_what():
    cache = PrefixCache(LOTS)
    cache.add(text(1, 2, 3), snapshot(3), stops=[2, 3])
    cache.add(text(1, 2, 3, 4), snapshot(4), stops=[2, 4])
    assert len(cache) == 2
    cache.add(text(1, 2, 3, 4, 5), snapshot(5), stops=[2, 3, 5])
    assert len(cache) == 2
    assert cache.find(text(1, 2, 3, 4, 9), [2, 3, 5]).length == 3
    assert cache.find(text(1, 2, 3, 4, 9), [2, 4, 5]).length == 4


# --- what is kept


def test_a_state_that_can_be_cut_out_of_another_is_not_kept():
    cache = PrefixCache(LOTS)
    cache.add(text(1, 2), snapshot(2))
    cache.add(text(1, 2, 3), snapshot(3))
    assert len(cache) == 1
    cache.add(text(1, 2), snapshot(2))
    assert len(cache) == 1
    cache.add(text(1, 2, 3, 4), snapshot(4, evicted=True))
    assert len(cache) == 2
    cache.add(text(1, 2, 3, 4), snapshot(4, evicted=True))
    assert len(cache) == 2
    assert cache.find(text(1, 2, 3, 9)).length == 3


def test_keys_beyond_the_state_are_left_out():
    """Of a reply the last token has not run."""
    cache = PrefixCache(LOTS)
    cache.add(text(1, 2, 3, 4), snapshot(3))
    assert cache.find(text(1, 2, 3, 4, 5)).length == 3
    with pytest.raises(ValueError, match="2 row keys for a state of 3 tokens"):
        cache.add(text(1, 2), snapshot(3))


def test_the_bound_holds_and_the_oldest_goes():
    entry = 3 * 8 + 1000
    cache = PrefixCache(2 * entry)
    for first in (10, 20):
        cache.add(text(first, 1, 2), snapshot(3, nbytes=1000))
    assert cache.nbytes == 2 * entry
    assert cache.find(text(10, 1, 5)).length == 2  # used: now 20 is the oldest
    cache.add(text(30, 1, 2), snapshot(3, nbytes=1000))
    assert cache.nbytes == 2 * entry
    assert cache.find(text(20, 1, 5)) is None
    assert cache.find(text(10, 1, 5)) is not None
    cache.add(text(40, 1, 2), snapshot(3, nbytes=3000))  # larger than the cache
    assert cache.find(text(40, 1, 5)) is None
    assert len(cache) == 2


def test_entries_are_counted_too():
    cache = PrefixCache(LOTS)
    for first in range(MOST_ENTRIES + 6):
        cache.add(text(first, 1), snapshot(2))
    assert len(cache) == MOST_ENTRIES
    assert cache.find(text(5, 1, 1)) is None
    assert cache.find(text(6, 1, 1)) is not None


def test_no_bytes_keep_nothing():
    cache = PrefixCache(0)
    cache.add(text(1, 2), snapshot(2))
    assert cache.find(text(1, 2, 3)) is None


def test_clear():
    cache = PrefixCache(LOTS)
    cache.add(text(1, 2), snapshot(2), Pin())
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


# --- pins


def test_pinned_states_stay_until_their_pin_is_gone():
    entry = 2 * 8 + 100
    cache = PrefixCache(3 * entry)
    pin = Pin()
    cache.add(text(1, 1), snapshot(2, nbytes=100), pin)
    for first in range(2, 20):
        cache.add(text(first, 1), snapshot(2, nbytes=100))
    assert cache.find(text(1, 1, 1)) is not None
    assert len(cache) == 3
    del pin
    gc.collect()
    for first in range(20, 24):
        cache.add(text(first, 1), snapshot(2, nbytes=100))
    assert cache.find(text(1, 1, 1)) is None


def test_the_bound_is_harder_than_pins():
    """When all are pinned the oldest goes, and a new one is never refused."""
    entry = 2 * 8 + 100
    cache = PrefixCache(2 * entry)
    pins = [Pin() for _ in range(3)]
    for first, pin in enumerate(pins):
        cache.add(text(first, 1), snapshot(2, nbytes=100), pin)
    assert cache.nbytes == 2 * entry
    assert [cache.find(text(first, 1, 1)) is not None for first in range(3)] == [False, True, True]
    cache.add(text(9, 1), snapshot(2, nbytes=100))
    assert cache.find(text(9, 1, 1)) is not None


@pytest.mark.parametrize("longer_first", [False, True])
def test_a_pin_goes_over_to_the_state_that_covers_its_own(longer_first):
    entry = 3 * 8 + 100
    cache = PrefixCache(entry)
    pin = Pin()
    additions = [(text(1, 1), snapshot(2, nbytes=100), pin), (text(1, 1, 1), snapshot(3, nbytes=100), None)]
    for addition in reversed(additions) if longer_first else additions:
        cache.add(*addition)
    cache = _with_room(cache, 2 * entry)
    cache.add(text(5, 1), snapshot(2, nbytes=100))
    cache.add(text(6, 1), snapshot(2, nbytes=100))
    assert cache.find(text(1, 1, 1, 1)).length == 3


def _with_room(cache: PrefixCache, max_bytes: int) -> PrefixCache:
    cache.max_bytes = max_bytes
    return cache


def test_threads():
    cache = PrefixCache(40 * (3 * 8 + 100))
    pins = [Pin() for _ in range(8)]

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(200):
            keys = random.integers(0, 4, 3)
            cache.add(keys, snapshot(3, nbytes=100), pins[seed] if random.random() < 0.2 else None)
            match = cache.find(np.append(keys, 1))
            assert match is None or match.length <= 3

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.nbytes <= cache.max_bytes
