"""On a card: what the other tests only imitate. `pytest -m gpu`; benchmarks/gpu.md says how to set a machine up.

With the null driver (see null_driver/README.md) kernels do nothing, so only the tests that do not look at numbers run.
"""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from siglance.engine import Engine, Sampling
from siglance.engine.bundle import Bundle
from siglance.engine.device_memory import DeviceMemory, Traffic
from siglance.engine.graph import has_device
from siglance.engine.runtime import Runtime, Session
from siglance.engine.self_test import formula_picture
from siglance.engine.state import FIRST_CAPACITY
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from .. import tiny, tiny_gemma4_audio, tiny_gemma4_large, tiny_siglip

NULL = os.environ.get("SIGLANCE_NULL_DRIVER") == "1"
WRITERS = {
    "gemma3": tiny.write_gemma3,
    "gemma3_vision": tiny_siglip.write_gemma3_vision,
    "gemma4": tiny.write_gemma4,
    "gemma4_audio": tiny_gemma4_audio.write_gemma4_audio,
    "gemma4_dense": tiny_gemma4_large.write_gemma4_dense,
    "gemma4_experts": tiny_gemma4_large.write_gemma4_experts,
    "gemma4_unified": tiny_gemma4_large.write_gemma4_unified,
    "paligemma": tiny_siglip.write_paligemma,
}
EXPERTS = "gemma4_experts"
# Arithmetic on shapes, which belongs on the host; and what has no CUDA kernel, once for each layer of experts.
SHAPES = {"Add", "Concat", "Div", "Mul", "Slice", "Squeeze", "Sub"}
HOST = {EXPERTS: SHAPES | {"Unique"}}
GREEDY = Sampling(temperature=0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (NULL or has_device("cuda")), reason="no CUDA device and driver, or no onnxruntime-gpu"),
]
counts = pytest.mark.skipif(NULL, reason="the null driver does no arithmetic")


@pytest.fixture(scope="module", params=[(name, each) for name in WRITERS for each in ("fp16", "int4")], ids="-".join)
def bundle(request, tmp_path_factory) -> Bundle:
    name, precision = request.param
    if NULL and name == EXPERTS:
        pytest.skip("the null driver cannot choose experts")
    folder: Path = tmp_path_factory.mktemp(f"{name}-{precision}")
    WRITERS[name](folder / "checkpoint")
    export(folder / "checkpoint", folder / name, ExportOptions(precision=precision, target="cuda"))
    return Bundle.open(folder / name)


@pytest.fixture(scope="module")
def runtime(bundle) -> Runtime:
    return Runtime(bundle, device="cuda")


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 200, length).astype(np.int64)


def memory(runtime: Runtime) -> DeviceMemory:
    assert isinstance(runtime.memory, DeviceMemory)
    return runtime.memory


def spread(logits: np.ndarray) -> float:
    return float(np.ptp(logits))


# --- where things run


def test_nothing_falls_to_the_cpu(bundle, runtime):
    for graph in (runtime.decoder, runtime.vision):
        if graph is not None:
            assert graph.providers[0] == "CUDAExecutionProvider"
            assert set(graph.host_nodes()) <= HOST.get(bundle.folder.name, SHAPES)


def test_steps_are_captured_unless_the_graph_forbids_it(bundle, runtime):
    assert runtime.decoder.captures == (bundle.folder.name != EXPERTS), runtime.decoder.uncaptured_because


def test_a_step_moves_a_row_in_and_a_row_out(runtime):
    session = runtime.session()
    session.prefill(tokens(20))
    session.step(5)
    counters = memory(runtime).traffic
    before = [getattr(counters, name) for name in Traffic.__slots__]
    for token in tokens(10, seed=1):
        session.step(int(token))
    step = Traffic(*(getattr(counters, name) - was for name, was in zip(Traffic.__slots__, before, strict=True)))
    wires = [name for name in runtime.decoder.inputs if name in runtime.embed.outputs]
    row = sum(4 * int(runtime.embed.outputs[name].shape[-1]) for name in wires)
    assert (step.to_device, step.to_host, step.within) == (10 * (row + 4), 40 * runtime.vocabulary, 0)


def card_memory() -> int:
    """Megabytes in use on the card."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


@counts
def test_memory_stays_level(runtime):
    def ask(length: int) -> None:
        session = runtime.session()
        session.prefill(tokens(length))
        for token in tokens(8, seed=1):
            session.step(int(token))

    lengths = (10, FIRST_CAPACITY - 4, 2 * FIRST_CAPACITY - 4)
    for length in lengths:
        ask(length)
    before = card_memory()
    for length in lengths * 20:
        ask(length)
    assert card_memory() - before <= 8


# --- what comes out


@counts
def test_graphs_give_what_float32_gives(bundle, request):
    """The export on this card has compared every graph with its float32 original, which runs on the CPU."""
    graphs = json.loads((bundle.folder / "export.json").read_text())["graphs"]
    least = 0.999 if "fp16" in request.node.callspec.id else 0.9
    cosines = {name: facts["cosine"] for name, facts in graphs.items()}
    assert min(cosines.values()) >= least, cosines


@counts
def test_the_self_test_agrees(bundle):
    """Recorded on this card, at export."""
    with Engine(bundle, device="cuda") as engine:
        report = engine.verify()
    assert report.result in ("equal", "close"), report


def steps(session: Session, prompt: np.ndarray, replies: np.ndarray) -> np.ndarray:
    return np.stack([session.prefill(prompt), *(session.step(int(token)) for token in replies)])


@counts
def test_captured_and_not_give_the_same(bundle, runtime, monkeypatch):
    """Over the end of a bucket, and in a bucket that another sequence has used."""
    prompt, replies = tokens(FIRST_CAPACITY - 20), tokens(40, seed=1)
    runtime.session().prefill(tokens(100, seed=2))
    captured = steps(runtime.session(), prompt, replies)
    monkeypatch.setenv("SIGLANCE_CUDA_GRAPH", "0")
    plain = Runtime(bundle, device="cuda")
    assert not plain.decoder.captures
    found = steps(plain.session(), prompt, replies)
    np.testing.assert_allclose(captured, found, rtol=0, atol=0.01 * spread(found))
    np.testing.assert_array_equal(captured.argmax(axis=1), found.argmax(axis=1))


@counts
def test_token_by_token_is_what_one_prompt_gives(runtime):
    """A window buffer that evicts twice, or positions that were frozen at capture, would not."""
    ids = tokens(80)
    whole = runtime.session().prefill(ids)
    by_token = steps(runtime.session(), ids[:10], ids[10:])[-1]
    np.testing.assert_allclose(by_token, whole, rtol=0, atol=0.05 * spread(whole))


@counts
def test_a_state_that_was_kept_goes_on(runtime):
    session = runtime.session()
    session.prefill(tokens(60))
    snapshot = session.snapshot()
    expected = [session.step(int(token)) for token in tokens(5, seed=1)]
    other = runtime.session()
    other.restore(snapshot)
    found = [other.step(int(token)) for token in tokens(5, seed=1)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.01 * spread(np.stack(expected)))


@counts
def test_requests_from_several_threads(bundle):
    def ask(index: int) -> list[int]:
        parts = [f"question {index}"]
        if bundle.manifest.image is not None:
            parts = [formula_picture(60 + 20 * index, 90), *parts]
        return list(engine.generate(parts, sampling=GREEDY, max_tokens=12, raw=True).token_ids)

    with Engine(bundle, device="cuda", cache_bytes=0) as engine:
        expected = [ask(index) for index in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, list(range(4)) * 2)) == expected * 2
