"""Decoder state: copies, snapshots, cutting back, and what a failed run leaves.

The arbiter is always a fresh sequence that runs all tokens again. Rows that are not in use are poisoned with NaN.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.errors import ContextFull, ModelOutputError
from siglance.engine.runtime import Runtime, Session
from siglance.engine.state import FIRST_CAPACITY

TOLERANCE = 1e-4
MODELS = {
    "window of 8 in a buffer of 24": ("gemma3", {}),
    "layers that share keys and values": ("gemma4", {"vision": False}),
    "no window": ("gemma3", {"sliding_window_pattern": 1}),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def runtime(request, tiny_model) -> Runtime:
    family, arguments = request.param
    return tiny_model(family, **arguments).runtime


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 500, length).astype(np.int64)


def cold(runtime: Runtime, ids: np.ndarray) -> np.ndarray:
    return runtime.session().prefill(ids)


def smallest_window(runtime: Runtime) -> int:
    facts = [runtime.decoder.inputs[pair.input] for pair in runtime.manifest.state if pair.kind == "window"]
    return min((int(fact.shape[2]) for fact in facts), default=10**9)


def poison(session: Session) -> None:
    """NaN in every row that is not in use."""
    state, decoder = session._state, session._runtime.decoder
    for pair in session._runtime.manifest.state:
        facts = decoder.inputs[pair.input]
        shape = [size if isinstance(size, int) else state._capacity for size in facts.shape]
        rows = np.full(shape, np.nan, facts.dtype)
        used = state._buffers.rows(pair.input, state.length)
        rows[:, :, : used.shape[2]] = used
        state._buffers.set_rows(pair.input, rows)


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 30), st.integers(1, 12)),
    st.tuples(st.just("keep"), st.just(0), st.just(0)),
    st.tuples(st.just("restore"), st.integers(0, 9), st.floats(0, 1)),
    st.tuples(st.just("cut"), st.just(0), st.floats(0, 1)),
    st.tuples(st.just("copy"), st.just(0), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, max_size=9), st.integers(0, 2**32 - 1))
def test_law_any_history_of_a_state_equals_a_fresh_sequence(runtime, operations, seed):
    """Case 34: nothing is shifted; a state is cut only where it then equals running the tokens again."""
    session, ids = runtime.session(), np.zeros(0, np.int64)
    kept = [(session.snapshot(), ids)]
    new = np.random.default_rng(seed)
    for name, number, part in operations:
        if name == "append":
            more = new.integers(3, 500, number).astype(np.int64)
            ids = np.concatenate([ids, more])
            session.prefill(ids, chunk=int(part), first=len(ids) - number)
        elif name == "keep":
            kept.append((session.snapshot(), ids))
        elif name == "restore":
            snapshot, held = kept[number % len(kept)]
            length = snapshot.shortest + round(part * (snapshot.length - snapshot.shortest))
            session.restore(snapshot, length)
            ids = held[:length]
            poison(session)
        elif name == "cut":
            shortest = session._state.shortest
            length = shortest + round(part * (len(ids) - shortest))
            session._state.truncate(length)
            ids = ids[:length]
            poison(session)
        else:
            session._state = session._state.copy()
    assert session.length == len(ids)
    last = tokens(1, seed=1)
    np.testing.assert_allclose(
        session.step(int(last[0])), cold(runtime, np.concatenate([ids, last])), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("length", [7, 8, 9, 23, 24, 25, 60])
def test_what_has_been_evicted_cannot_be_had_back(runtime, length):
    session = runtime.session()
    session.prefill(tokens(length), chunk=5)
    snapshot = session.snapshot()
    evicted = length > smallest_window(runtime)
    assert snapshot.shortest == session._state.shortest == (length if evicted else 0)
    for cut in {1, length - 1}:
        if evicted:
            with pytest.raises(ValueError, match="cannot be cut"):
                session._state.truncate(cut)
            with pytest.raises(ValueError, match="cannot be cut"):
                runtime.session().restore(snapshot, cut)
            assert session.length == length
        else:
            other = runtime.session()
            other.restore(snapshot, cut)
            poison(other)
            again = other.prefill(tokens(length), first=cut)
            np.testing.assert_allclose(again, cold(runtime, tokens(length)), rtol=0, atol=TOLERANCE)
    for cut in (-1, length + 1):
        with pytest.raises(ValueError, match="cannot be cut"):
            session._state.truncate(cut)


def test_branches_do_not_see_each_other(runtime):
    """Two sequences go on from one snapshot in turns, and the snapshot stays as it was."""
    session = runtime.session()
    session.prefill(tokens(20))
    snapshot = session.snapshot()
    before = {name: rows.copy() for name, rows in snapshot.rows.items()}
    branches = [runtime.session() for _ in range(3)]
    for branch in branches:
        branch.restore(snapshot)
    for step in range(12):
        for index, branch in enumerate(branches):
            logits = branch.step(10 + 20 * index + step)
            if step == 11:
                ids = [*tokens(20), *range(10 + 20 * index, 22 + 20 * index)]
                np.testing.assert_allclose(logits, cold(runtime, np.array(ids)), rtol=0, atol=TOLERANCE)
    for name, rows in snapshot.rows.items():
        np.testing.assert_array_equal(rows, before[name])
        with pytest.raises(ValueError, match="read-only"):
            rows[:] = 0


def test_copies_do_not_see_each_other(runtime):
    session = runtime.session()
    session.prefill(tokens(20))
    twin = runtime.session()
    twin._state = session._state.copy()
    for step in range(12):
        session.step(100 + step)
    for step in range(12):
        logits = twin.step(200 + step)
    ids = np.array([*tokens(20), *range(200, 212)])
    np.testing.assert_allclose(logits, cold(runtime, ids), rtol=0, atol=TOLERANCE)


def test_a_snapshot_holds_what_is_used(runtime):
    """Not the capacity of the buffers."""
    session = runtime.session()
    session.prefill(tokens(20))
    snapshot = session.snapshot()
    expected = 0
    for pair in runtime.manifest.state:
        facts = runtime.decoder.inputs[pair.input]
        _, heads, capacity, size = facts.shape
        rows = 20 if pair.kind == "global" else min(20, int(capacity))
        assert snapshot.rows[pair.input].shape == (1, heads, rows, size)
        expected += int(heads) * rows * int(size) * np.dtype(facts.dtype).itemsize
    assert snapshot.nbytes == expected < session.state_bytes


def test_state_stays_where_it_is(runtime):
    """Case 72: what the graph writes is what it reads next, in the same memory; nothing is copied between two steps.
    Memory moves where a global buffer has to grow, which doubling makes rare."""
    session = runtime.session()
    session.prefill(tokens(5))
    moved = 0
    for token in tokens(400, seed=1):
        before = {name: buffer.ctypes.data for name, buffer in session._state._buffers.items()}
        session.step(int(token))
        after = {name: buffer.ctypes.data for name, buffer in session._state._buffers.items()}
        moved += before != after
    capacities = {FIRST_CAPACITY * 2**doublings for doublings in range(20)}
    buffers = session._state._buffers
    grown = {buffers[pair.input].shape[2] for pair in runtime.manifest.state if pair.kind == "global"}
    assert moved == 1
    assert grown <= capacities


def test_bound_memory_gives_what_copies_give(runtime):
    """Case 72: bit for bit the logits of runs that are handed the state as arrays and give it back as arrays."""
    ids = tokens(30)
    session = runtime.session()
    found = np.stack([session.prefill(ids[:20]), *(session.step(int(token)) for token in ids[20:])])
    graph = runtime.decoder
    state = {
        pair.input: np.zeros([size if isinstance(size, int) else 64 for size in graph.inputs[pair.input].shape], "f4")
        for pair in runtime.manifest.state
    }
    expected, length = [], 0
    for piece in (ids[:20], *np.split(ids[20:], 10)):
        wires = runtime.embed.run({"input_ids": piece[None]})
        feeds = {name: value for name, value in wires.items() if name in graph.inputs} | state
        length += len(piece)
        feeds |= {"seqlens_k": np.array([length - 1], np.int32), "total_sequence_length": np.array(length, np.int32)}
        outputs = graph.run(feeds | {"logit_rows": np.array([len(piece) - 1])})
        state = {pair.input: outputs[pair.output] for pair in runtime.manifest.state}
        expected.append(outputs["logits"][0])
    np.testing.assert_array_equal(found, np.stack(expected))


def test_a_snapshot_of_nothing(runtime):
    snapshot = runtime.session().snapshot()
    assert (snapshot.length, snapshot.nbytes) == (0, 0)
    session = runtime.session()
    session.prefill(tokens(30))
    session.restore(snapshot)
    np.testing.assert_allclose(session.prefill(tokens(9, 1)), cold(runtime, tokens(9, 1)), rtol=0, atol=TOLERANCE)


def test_a_long_snapshot_in_a_small_state(runtime):
    """Buffers grow to what is restored."""
    ids = tokens(600)
    session = runtime.session()
    session.prefill(ids)
    other = runtime.session()
    other.restore(session.snapshot())
    np.testing.assert_allclose(other.step(5), cold(runtime, np.append(ids, 5)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("before", "more"), [(3, 4), (5, 30), (40, 1)])
def test_a_failed_run(runtime, monkeypatch, before, more):
    """The state is as before, or it says that it is lost: never something in between."""
    ids = tokens(before + more)
    session = runtime.session()
    session.prefill(ids[:before])
    run_bound = runtime.decoder.run_bound

    def fail_after_writing(*arguments) -> None:
        run_bound(*arguments)
        poison(session)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runtime.decoder, "run_bound", fail_after_writing)
        with pytest.raises(MemoryError):
            session.prefill(ids, first=before)
    assert session.length == before
    if before + more > smallest_window(runtime):
        for use in (session.snapshot, lambda: session.step(1), lambda: session.prefill(ids, first=before)):
            with pytest.raises(ModelOutputError, match="earlier run"):
                use()
        session.restore(runtime.session().snapshot())
        before = 0
    np.testing.assert_allclose(session.prefill(ids, first=before), cold(runtime, ids), rtol=0, atol=TOLERANCE)


def test_the_context_holds_for_restored_states(runtime):
    """Case 33: both numbers, and nothing is overwritten."""
    context = runtime.manifest.context
    session = runtime.session()
    session.prefill(tokens(context - 1))
    other = runtime.session()
    other.restore(session.snapshot())
    other.step(7)
    with pytest.raises(ContextFull) as refusal:
        other.step(8)
    assert (refusal.value.prompt_tokens, refusal.value.context) == (context + 1, context)
    with pytest.raises(ContextFull):
        other.prefill(tokens(context + 2), first=context)
    assert other.length == context
