"""States in the memory of a device and captured decode steps, on the CPU: see captured_runs.py.

All laws of test_state.py hold for them too. Tests on a card are in tests/gpu.
"""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.device_memory import DeviceBuffers, DeviceMemory, HostMemory, Traffic
from siglance.engine.errors import DeviceError, ModelOutputError
from siglance.engine.graph import Device, TensorFacts
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.state import FIRST_CAPACITY
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from . import test_state, tiny, tiny_siglip
from .captured_runs import on_a_device, traffic

# The laws of states, run again on the runtime below.
for _name, _test in vars(test_state).items():
    if _name.startswith("test_") and _name != "test_state_stays_where_it_is":
        globals()[_name] = _test


@pytest.fixture(
    scope="module",
    params=[(*model, captured) for model in test_state.MODELS.values() for captured in (False, True)],
    ids=[f"{name}, {how}" for name in test_state.MODELS for how in ("bound", "captured")],
)
def runtime(request, tiny_model):
    family, arguments, captured = request.param
    runtime = tiny_model(family, **arguments).runtime
    with on_a_device(runtime, captured=captured):
        yield runtime


tokens = test_state.tokens


def moved(counters: Traffic, before: Traffic) -> Traffic:
    return Traffic(*(getattr(counters, name) - getattr(before, name) for name in Traffic.__slots__))


def now(counters: Traffic) -> Traffic:
    return Traffic(*(getattr(counters, name) for name in Traffic.__slots__))


def addresses(session) -> dict[str, int]:
    buffers = session._state.buffers
    assert isinstance(buffers, DeviceBuffers)
    return {name: value.data_ptr() for name, value in buffers.bucket.values.items()}


def test_a_step_moves_a_row_in_and_a_row_out(runtime):
    """Case 72: keys and values never leave the device while tokens are appended."""
    session = runtime.session()
    session.prefill(tokens(20))
    session.step(5)
    before, where = now(traffic(runtime)), addresses(session)
    for token in tokens(30, seed=1):
        session.step(int(token))
    step = moved(traffic(runtime), before)
    row = sum(
        4 * int(runtime.embed.outputs[name].shape[-1])
        for name in runtime.decoder.inputs
        if name in runtime.embed.outputs
    )
    assert (step.to_device, step.to_host, step.within) == (30 * (row + 4), 30 * 4 * runtime.vocabulary, 0)
    assert addresses(session) == where


def test_a_bucket_is_lent_again_and_captured_once(tiny_model):
    runtime = tiny_model("gemma3").runtime
    with on_a_device(runtime, captured=True) as decoder:
        assert decoder is not None
        session = runtime.session()
        first = addresses(session)
        session.prefill(tokens(FIRST_CAPACITY - 2))
        for token in tokens(6, seed=1):
            session.step(int(token))
        # One bucket each for the first capacity and its double, captured before anything was in them.
        assert (decoder.captures, decoder.replays) == (2, 6)
        assert addresses(session) != first
        other = runtime.session()
        assert addresses(other) == first
        other.prefill(tokens(9))
        other.step(3)
        twin = runtime.session()  # while the first bucket is in use
        assert addresses(twin) not in (first, addresses(session))
        twin.prefill(tokens(9))
        np.testing.assert_array_equal(twin.step(3), runtime.session().prefill(np.append(tokens(9), 3), chunk=9))
        grown = session._state.nbytes
        del session, other, twin
        gc.collect()
        memory = runtime.memory
        assert isinstance(memory, DeviceMemory)
        captures = decoder.captures
        assert memory.free_bytes > grown
        for length in (4, 40, FIRST_CAPACITY + 1) * 3:  # what is kept is kept, and no more
            session = runtime.session()
            session.prefill(tokens(length))
            session.step(3)
            del session
        assert decoder.captures == captures


def test_nothing_captured_on_an_empty_bucket_stays_in_it(tiny_model):
    """A capture appends a token several times; a window buffer that evicts would lose as many rows."""
    runtime = tiny_model("gemma4", vision=False).runtime  # its sharers read a buffer of exactly the window
    ids = tokens(60)
    expected = runtime.session().prefill(ids)
    with on_a_device(runtime, captured=True):
        session = runtime.session()
        session.prefill(ids[:30])
        np.testing.assert_allclose(
            [session.step(int(token)) for token in ids[30:]][-1], expected, rtol=0, atol=test_state.TOLERANCE
        )


def test_sequences_in_threads_get_their_own_rows(runtime):
    """All of them go through the same inputs and outputs on the device."""

    def answer(seed: int) -> np.ndarray:
        session = runtime.session()
        session.prefill(tokens(12, seed))
        return np.stack([session.step(int(token)) for token in tokens(20, seed + 100)])

    expected = [answer(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for found, one in zip(pool.map(answer, range(6)), expected, strict=True):
            np.testing.assert_array_equal(found, one)


@pytest.fixture(scope="module", params=["gemma4", "gemma3_vision"])
def gpu_bundle(request, tmp_path_factory) -> Bundle:
    """A bundle for GPUs: float16, window buffers of exactly the window; shared states, or blocks of pictures."""
    folder = tmp_path_factory.mktemp("gpu")
    writers = {"gemma4": tiny.write_gemma4, "gemma3_vision": tiny_siglip.write_gemma3_vision}
    writers[request.param](folder / "checkpoint")
    export(folder / "checkpoint", folder / "bundle", ExportOptions(precision="fp16", target="cuda"))
    return Bundle.open(folder / "bundle")


def test_a_bundle_for_gpus_gives_the_same_captured_and_not(gpu_bundle):
    """Bit for bit: the operators get the capacity instead of the length as the bound of what is used."""
    runtime = Runtime(gpu_bundle, device="cpu", foreign=True)
    soft = [SoftTokens(2, np.random.default_rng(0).normal(size=(6, runtime.hidden)).astype(np.float32))]
    ids = tokens(20)

    def answer() -> np.ndarray:
        session = runtime.session()
        logits = [session.prefill(ids, soft, chunk=9)]
        return np.stack([*logits, *(session.step(int(token)) for token in tokens(40, seed=1))])

    expected = answer()
    assert np.isfinite(expected).all()
    for captured in (False, True):
        with on_a_device(runtime, captured=captured):
            np.testing.assert_array_equal(answer(), expected)


# --- memory by itself

SHAPES = {
    "global": TensorFacts(np.float32, (1, 2, "capacity", 4)),
    "window": TensorFacts(np.float16, (1, 1, 8, 4)),
}


@pytest.fixture(params=[HostMemory, lambda: DeviceMemory(Device("cpu"))], ids=["host", "device"])
def memory(request):
    return request.param()


def filled(rows: int, name: str) -> np.ndarray:
    _, heads, _, size = SHAPES[name].shape
    return np.random.default_rng(0).normal(size=(1, int(heads), rows, int(size))).astype(SHAPES[name].dtype)


def test_buffers_keep_their_rows_when_they_grow_and_when_they_are_copied(memory):
    buffers = memory.buffers(SHAPES, 16)
    content = {name: filled(8, name) for name in SHAPES}
    for name, rows in content.items():
        buffers.set_rows(name, rows)
    twin = buffers.copy()
    grown = buffers.grown(64, 8)
    assert (twin.nbytes, grown.nbytes) == (16 * 32 + 64, 64 * 32 + 64)
    twin.set_rows("global", np.zeros_like(content["global"]))
    for name, rows in content.items():
        np.testing.assert_array_equal(grown.rows(name, 8), rows)
        np.testing.assert_array_equal(grown.rows(name, 3), rows[:, :, :3])
        assert not grown.rows(name, 0).size
    assert not twin.rows("global", 8).any()
    np.testing.assert_array_equal(twin.rows("window", 8), content["window"])


def test_rows_are_copies(memory):
    buffers = memory.buffers(SHAPES, 16)
    before = buffers.rows("global", 4)
    buffers.set_rows("global", filled(4, "global"))
    assert not before.any()


def test_new_memory_of_a_device_holds_no_garbage():
    buffers = DeviceMemory(Device("cpu")).buffers(SHAPES, 64)
    assert all(not buffers.rows(name, 64).any() for name in SHAPES)


def test_a_device_that_is_full_gives_up_what_is_free_first(monkeypatch):
    memory = DeviceMemory(Device("cpu"))
    del_me = memory.buffers(SHAPES, 16)
    del del_me
    gc.collect()
    assert memory.free_bytes == 16 * 32 + 64
    allocate, room = memory._allocate, 0

    def full(shapes, capacity):
        if memory.free_bytes > room:
            raise RuntimeError("out of memory")
        return allocate(shapes, capacity)

    monkeypatch.setattr(memory, "_allocate", full)
    held = memory.buffers(SHAPES, 32)
    assert memory.free_bytes == 0
    room = -1
    with pytest.raises(DeviceError, match="64 tokens does not fit into the memory of cpu: out of memory"):
        held.grown(64, 4)
    assert held.nbytes == 32 * 32 + 64


def test_a_state_that_cannot_grow_is_as_before(tiny_model, monkeypatch):
    runtime = tiny_model("gemma3").runtime
    ids = tokens(FIRST_CAPACITY)
    with on_a_device(runtime, captured=False):
        session = runtime.session()
        session.prefill(ids)
        monkeypatch.setattr(runtime.memory, "_allocate", lambda *_: (_ for _ in ()).throw(RuntimeError("full")))
        with pytest.raises(DeviceError, match="full"):
            session.step(5)
        assert session.length == FIRST_CAPACITY
        monkeypatch.undo()
        session.step(5)
        assert session.length == FIRST_CAPACITY + 1


def test_a_graph_of_a_device_runs_on_one_thread(tiny_model):
    """Captured runs belong to the thread that captured them, and requests come from any."""
    runtime = Runtime(tiny_model("gemma3").bundle)
    decoder, seen = runtime.decoder, set()
    run = decoder._session.run_with_iobinding

    class Session:
        def run_with_iobinding(self, *arguments):
            seen.add(threading.get_ident())
            return run(*arguments)

        def __getattr__(self, name):
            return getattr(real, name)

    real, decoder._session = decoder._session, Session()
    decoder._thread = ThreadPoolExecutor(1)
    session = runtime.session()
    for _ in range(2):
        worker = threading.Thread(target=session.prefill, args=(tokens(5),))
        worker.start()
        worker.join()
    session.prefill(tokens(5))
    assert len(seen) == 1
    assert seen != {threading.get_ident()}
    assert session.length == 15
    decoder._session.run_with_iobinding = lambda *_: (_ for _ in ()).throw(RuntimeError("card fell off"))
    with pytest.raises(ModelOutputError, match="card fell off"):
        session.prefill(tokens(5))
