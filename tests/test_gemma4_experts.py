"""Experts in a loop: every format of their matrices, any number of rows, and none that is not used is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from siglance.engine.bundle import Bundle
from siglance.engine.runtime import Runtime
from siglance.export import exporter
from siglance.export.builder import FLOAT, INT64, GraphBuilder, WeightsFile
from siglance.export.checkpoint import FolderCheckpoint, Weights
from siglance.export.exporter import export
from siglance.export.families import ExportOptions
from siglance.export.families._gemma4_config import ExpertFacts
from siglance.export.families._gemma4_experts import routed_experts
from siglance.export.plan import Plan, plan_for
from siglance.kernels.quantize import dequantize, quantize

from . import reference_gemma4_large as large
from . import reference_model, tiny_gemma4_large

HIDDEN, INNER, COUNT, USED = 64, 32, 8, 3
PREFIX = "layer"


def draw(seed: int, count: int = COUNT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {
        "router.proj.weight": rng.normal(0, 2, (count, HIDDEN)),
        "router.scale": rng.uniform(0.5, 1.5, HIDDEN),
        "router.per_expert_scale": rng.uniform(0.5, 2.0, count),
        "experts.gate_up_proj": rng.normal(0, HIDDEN**-0.5, (count, 2 * INNER, HIDDEN)),
        "experts.down_proj": rng.normal(0, INNER**-0.5, (count, HIDDEN, INNER)),
    }
    return {f"{PREFIX}.{name}": value.astype(np.float32) for name, value in tensors.items()}


def build(
    folder: Path, tensors: dict[str, np.ndarray], plan: Plan, used: int = USED
) -> tuple[onnxruntime.InferenceSession, int]:
    """A graph of one router with its experts, and its number of nodes."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    weights = Weights(FolderCheckpoint(folder), {})
    count = len(tensors[f"{PREFIX}.router.per_expert_scale"])
    with WeightsFile(folder / "weights.bin") as data:
        graph = GraphBuilder("decoder", data, plan)
        x, residual = (graph.input(name, FLOAT, [1, "rows", HIDDEN]) for name in ("x", "residual"))
        y = routed_experts(graph, weights, PREFIX, ExpertFacts(count, used, INNER), HIDDEN, x, residual)
        graph.output(y, "y", FLOAT, [1, "rows", HIDDEN])
        graph.save(folder / "graph.onnx", "experts")
    weights.check_all_used()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "graph.onnx", options), graph.summary()["nodes"]


def run(session: onnxruntime.InferenceSession, x: np.ndarray, residual: np.ndarray) -> np.ndarray:
    inputs = {"x": np.float32(x)[None], "residual": np.float32(residual)[None]}
    return session.run(None, inputs)[0][0]


def expected(tensors: dict[str, np.ndarray], x: np.ndarray, residual: np.ndarray, used: int = USED) -> np.ndarray:
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    shares = large.route(residual, weights, f"{PREFIX}.router", used)
    return large.experts(x, weights, f"{PREFIX}.experts", shares)


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    # The residual stream is not normed: the router has to do that.
    return rng.normal(0, 1, (count, HIDDEN)), rng.normal(0, 5, (count, HIDDEN))


def stored(tensors: dict[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """The tensors with expert matrices as `plan` keeps them; the router stays as it is."""

    return {
        name: np.stack([round_trip(matrix, plan) for matrix in value]) if ".experts." in name else value
        for name, value in tensors.items()
    }


def round_trip(matrix: np.ndarray, plan: Plan) -> np.ndarray:
    """What is left of a matrix of the decoder that is stored as `plan` says."""
    storage = plan.storage("decoder", matrix.shape[-1])
    if storage.block:
        return dequantize(quantize(matrix, storage.bits, storage.block))
    return matrix.astype(np.float16).astype(np.float32) if storage.bits == 16 else matrix


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return build(tmp_path_factory.mktemp("experts") / "fp32", draw(0), plan_for("fp32", "cpu"))[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_any_number_of_rows(session, count, seed):
    x, residual = rows(count, seed)
    np.testing.assert_allclose(run(session, x, residual), expected(draw(0), x, residual), atol=2e-5)


def test_shares_are_renormalised_and_scaled(session):
    """Both are invisible in a whole model where they are the same for all experts of a row: a norm follows."""
    x, residual = rows(6)
    weights = {name: value.astype(np.float64) for name, value in draw(0).items()}
    every = large.route(residual, weights, f"{PREFIX}.router", COUNT)  # of all experts: nothing to renormalise
    best = large.route(residual, weights, f"{PREFIX}.router", USED)
    found = run(session, x, residual)
    wrong = large.experts(x, weights, f"{PREFIX}.experts", np.where(best > 0, every, 0))
    assert np.abs(found - wrong).max() > 0.01


@pytest.mark.parametrize("used", [1, COUNT])
def test_one_expert_and_all_of_them(used, tmp_path):
    session, _ = build(tmp_path / "model", draw(1), plan_for("fp32", "cpu"), used)
    x, residual = rows(5)
    np.testing.assert_allclose(run(session, x, residual), expected(draw(1), x, residual, used), atol=2e-5)


@pytest.mark.parametrize(
    ("precision", "target"), [("int8", "cpu"), ("int4", "cpu"), ("fp16", "cuda"), ("int4", "cuda")]
)
def test_matrices_in_every_format(precision, target, tmp_path):
    """The numbers of the matrices as they are stored; the router's stay float32 and choose the same experts."""
    plan, tensors = plan_for(precision, target), draw(2)
    session, _ = build(tmp_path / "model", tensors, plan)
    x, residual = rows(9)
    tolerance = 1e-4 if target == "cpu" else 2e-2  # products in float16
    found = run(session, x, residual)
    np.testing.assert_allclose(found, expected(stored(tensors, plan), x, residual), atol=tolerance)
    assert np.abs(expected(stored(tensors, plan), x, residual) - expected(tensors, x, residual)).max() > tolerance / 100


def test_float16_experts_do_not_overflow(tmp_path):
    """The gated product reaches 1e6, beyond what float16 can hold."""
    tensors = draw(3)
    tensors[f"{PREFIX}.experts.gate_up_proj"] *= 400
    session, _ = build(tmp_path / "model", tensors, plan_for("fp16", "cuda"))
    x, residual = rows(4)
    right = expected(tensors, x, residual)
    assert np.abs(right).max() > 65504
    np.testing.assert_allclose(run(session, x, residual), right, atol=0.01 * np.abs(right).max())


def test_experts_that_no_row_uses_are_not_read(tmp_path):
    tensors = draw(4)
    x, residual = rows(2)
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    idle = large.route(residual, weights, f"{PREFIX}.router", USED).sum(axis=0) == 0
    assert idle.any()
    right = expected(tensors, x, residual)
    for name in ("gate_up_proj", "down_proj"):
        # Whatever is multiplied by these overflows, and a share of zero does not make it a number again.
        tensors[f"{PREFIX}.experts.{name}"][idle] = np.finfo(np.float32).max
    session, _ = build(tmp_path / "model", tensors, plan_for("fp32", "cpu"))
    np.testing.assert_allclose(run(session, x, residual), right, atol=2e-5)


def test_the_graph_does_not_grow_with_the_number_of_experts(tmp_path):
    sizes = [build(tmp_path / str(count), draw(5, count), plan_for("fp32", "cpu"))[1] for count in (4, 32)]
    assert sizes[0] == sizes[1] < 60


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_whole_model_in_blocks_is_the_model_of_its_rounded_matrices(precision, tmp_path, monkeypatch):
    tiny_gemma4_large.write_gemma4_experts(tmp_path / "checkpoint")
    # Level 1 multiplies in float32; level 4 also rounds activations, which is another thing.
    plan = dataclasses.replace(plan_for(precision, "cpu"), accuracy_level=1, measured_bits=())
    monkeypatch.setattr(exporter, "plan_for", lambda *arguments: plan)
    # Random weights in 4 bits choose other experts.
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision=precision, accept_loss=True))
    ids = np.arange(100, 130)
    found = Runtime(Bundle.open(tmp_path / "bundle")).session().prefill(ids)
    weights, config = reference_model.load_checkpoint(tmp_path / "checkpoint")
    right = large.logits(weights, config, ids)[-1]
    for name, value in weights.items():
        if "router" not in name and value.ndim > 1:
            stack = np.float32(value).reshape(-1, *value.shape[-2:])
            matrices = [round_trip(matrix, plan) for matrix in stack]
            weights[name] = np.stack(matrices).reshape(value.shape).astype(np.float64)
    rounded = large.logits(weights, config, ids)[-1]
    np.testing.assert_allclose(found, rounded, atol=1e-3)
    assert np.abs(rounded - right).max() > 0.05


# --- loops of the builder


def test_a_loop_runs_as_often_as_it_is_told_and_its_weights_are_stored_once(tmp_path):
    matrix = np.random.default_rng(0).normal(0, 0.5, (80, 80)).astype(np.float32)
    reads = []

    def read() -> list[np.ndarray]:
        reads.append(1)
        return [matrix]

    with WeightsFile(tmp_path / "weights.bin") as data:
        graph = GraphBuilder("loop", data)
        x = graph.input("x", FLOAT, ["rows", 80])
        count = graph.input("count", INT64, [])

        def step(index, carried):
            product = graph.op("MatMul", carried[0], graph.weight("matrix", matrix.shape, read))
            return [graph.op("Add", product, graph.op("Cast", index, to=int(FLOAT)))]

        with graph.scope("outer"):
            [y] = graph.loop(count, [x], step, "steps")
        graph.output(graph.op("MatMul", y, graph.weight("matrix", matrix.shape, read)), "y", FLOAT, ["rows", 80])
        graph.save(tmp_path / "graph.onnx", "loop")
    assert (tmp_path / "weights.bin").stat().st_size == matrix.nbytes
    assert reads == [1]
    assert graph.summary()["nodes"] == 6  # MatMul, Cast, Add and Identity inside, Loop and MatMul outside
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    start = np.random.default_rng(1).normal(0, 1, (3, 80)).astype(np.float32)
    for times in (0, 1, 4):
        right = start
        for index in range(times):
            right = right @ matrix + index
        found = session.run(None, {"x": start, "count": np.array(times)})[0]
        np.testing.assert_allclose(found, right @ matrix, rtol=1e-4, atol=1e-3)
