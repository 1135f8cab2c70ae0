"""Attention over window buffers, chunk by chunk, against attention over the whole sequence at once in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from siglance.engine.graph import Device, Graph, tensor
from siglance.export import blocks
from siglance.export.builder import FLOAT, GraphBuilder, WeightsFile
from siglance.export.plan import plan_for

from . import reference_model

HEADS, GROUPS, SIZE, WINDOW, CAPACITY = 4, 2, 16, 6, 9
FREQUENCIES = blocks.inverse_frequencies(SIZE, 10_000.0)


def build(
    folder: Path, scale: float, soft_cap: float | None = None, window: int | None = WINDOW, target: str = "cpu"
) -> ir.Graph:
    """A graph of attention alone, over a window buffer or a global one."""
    folder.mkdir(exist_ok=True)
    with WeightsFile(folder / "weights.bin") as weights:
        graph = GraphBuilder("decoder", weights, plan_for("fp32" if target == "cpu" else "fp16", target))
        widths = {"query": HEADS * SIZE, "key": GROUPS * SIZE, "value": GROUPS * SIZE}
        query, key, value = (graph.input(name, FLOAT, [1, "tokens", width]) for name, width in widths.items())
        inputs = blocks.decoder_inputs(graph, 1)
        cos, sin = blocks.rope_tables(graph, "all", FREQUENCIES, 64)
        state = blocks.key_value_state(graph, 0, GROUPS, SIZE, window, "capacity" if window is None else CAPACITY)
        facts = blocks.Attention(HEADS, GROUPS, SIZE, scale, cos, sin, soft_cap)
        mixed, _, _ = blocks.attention(graph, query, key, value, state, inputs, facts)
        graph.output(mixed, "mixed", FLOAT, [1, "tokens", HEADS * SIZE])
        graph.save(folder / "decoder.onnx", "windows")
    return graph.graph


def sinks(graph: ir.Graph) -> list[np.ndarray]:
    """The sinks of the heads, of those nodes of attention that have any."""
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert nodes
    found = [node.inputs[11] for node in nodes if len(node.inputs) > 11]
    return [value.const_value.numpy() for value in found if value is not None and value.const_value is not None]


def run(folder: Path, parts: dict[str, np.ndarray], chunks: list[int]) -> np.ndarray:
    """The outputs [L, H d] for `parts` [L, width], in chunks of these lengths."""
    graph = Graph(folder / "decoder.onnx", Device("cpu"), threads=1)
    states = {name: np.zeros((1, GROUPS, CAPACITY, SIZE), np.float32) for name in ("0.key", "0.value")}
    found, start = [], 0
    for count in chunks:
        stop, mixed = start + count, np.empty((1, count, HEADS * SIZE), np.float32)
        binding = graph.bind()
        for name, rows in parts.items():
            binding.bind_cpu_input(name, rows[None, start:stop].astype(np.float32))
        made = {
            "inputs_embeds": np.zeros((1, count, 1), np.float32),
            "seqlens_k": np.array([stop - 1], np.int32),
            "total_sequence_length": np.array(stop, np.int32),
            "logit_rows": np.zeros(1, np.int64),
        }
        for name, array in made.items():
            if name in graph.inputs:
                binding.bind_cpu_input(name, array)
        for name, array in states.items():
            binding.bind_ortvalue_input(f"past.{name}", tensor(array))
            binding.bind_ortvalue_output(f"present.{name}", tensor(array))
        binding.bind_ortvalue_output("mixed", tensor(mixed))
        graph.run_bound(binding)
        found.append(mixed[0])
        start = stop
    return np.concatenate(found)


def exact(parts: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """What `run` must give, from the whole sequence at once."""
    length = len(parts["query"])
    query, key, value = (reference_model.heads(parts[name], SIZE) for name in ("query", "key", "value"))
    positions = np.arange(length)
    query, key = (reference_model.rotate(each, positions, FREQUENCIES) for each in (query, key))
    mask = reference_model.attention_mask(length, WINDOW)
    return reference_model.attend(query, key, value, mask, scale)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("chunks", [[1] * 24, [5, 1, 1, 8, 1, 1, 1, 6], [24]], ids=["steps", "mixed", "at once"])
def test_windows_are_exact_before_and_after_they_evict(scale, chunks, tmp_path):
    rng = np.random.default_rng(3)
    # Queries this large leave some heads with one key that takes all, and others with all alike.
    parts = {
        name: rng.normal(size=(24, count * SIZE)) * np.repeat(rng.choice([0.01, 1, 6], count), SIZE)
        for name, count in (("query", HEADS), ("key", GROUPS), ("value", GROUPS))
    }
    build(tmp_path, scale)
    np.testing.assert_allclose(run(tmp_path, parts, chunks), exact(parts, scale), rtol=2e-5, atol=2e-5)


def test_only_windows_on_the_cpu_have_sinks_and_they_take_nothing(tmp_path):
    [nothing] = sinks(build(tmp_path / "window", 1.0))
    assert nothing.shape == (HEADS,)
    assert np.exp(nothing).tolist() == [0.0] * HEADS
    # Elsewhere they would gain nothing, hold scores of whole sequences, or not be understood.
    assert not sinks(build(tmp_path / "scaled", 0.25))
    assert not sinks(build(tmp_path / "capped", 1.0, soft_cap=20.0))
    assert not sinks(build(tmp_path / "global", 1.0, window=None))
    assert not sinks(build(tmp_path / "gpu", 1.0, target="cuda"))
