"""Attention over window buffers, chunk by chunk, against attention over the whole sequence at once in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.graph import Device, Graph, tensor
from siglance.export import blocks
from siglance.export.builder import FLOAT, GraphBuilder, WeightsFile
from siglance.export.plan import StateScales, plan_for

from . import reference_model

HEADS, GROUPS, SIZE, WINDOW, CAPACITY = 4, 2, 16, 6, 9
FREQUENCIES = blocks.inverse_frequencies(SIZE, 10_000.0)


def build(
    folder: Path,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = WINDOW,
    target: str = "cpu",
    scales: StateScales | None = None,
) -> ir.Graph:
    """A graph of attention alone, over a window buffer or a global one."""
    folder.mkdir(exist_ok=True)
    plan = plan_for("fp32" if target == "cpu" else "fp16", target)
    plan = dataclasses.replace(plan, states={} if scales is None else {0: scales})
    with WeightsFile(folder / "weights.bin") as weights:
        graph = GraphBuilder("decoder", weights, plan)
        widths = {"query": HEADS * SIZE, "key": GROUPS * SIZE, "value": GROUPS * SIZE}
        query, key, value = (graph.input(name, FLOAT, [1, "tokens", width]) for name, width in widths.items())
        inputs = blocks.decoder_inputs(graph, 1)
        cos, sin = blocks.rope_tables(graph, "all", FREQUENCIES, 144)
        capacity = "capacity" if window is None else CAPACITY
        state = blocks.key_value_state(graph, 0, GROUPS, SIZE, window, capacity, scales)
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


def run(folder: Path, parts: dict[str, np.ndarray], chunks: list[int], threads: int = 1) -> np.ndarray:
    """The outputs [L, H d] for `parts` [L, width], in chunks of these lengths."""
    graph = Graph(folder / "decoder.onnx", Device("cpu"), threads=threads)
    facts = graph.inputs["past.0.key"]
    capacity = facts.shape[2] if isinstance(facts.shape[2], int) else sum(chunks) + 3
    states = {name: np.zeros((1, GROUPS, capacity, SIZE), facts.dtype) for name in ("0.key", "0.value")}
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


# --- states of 8 bits


def in_steps(parts: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], StateScales]:
    """What the graph takes: keys in units of the steps of their channels, which queries make up for; and the steps."""
    key = parts["key"].reshape(len(parts["key"]), GROUPS, 2, SIZE // 2)
    keys = np.tile(np.hypot(key[:, :, 0], key[:, :, 1]).max((0, 1)) / 127, 2)
    scales = StateScales(tuple(map(float, keys)), float(np.abs(parts["value"]).max() / 127))
    return parts | {
        "query": parts["query"] * np.tile(keys, HEADS),
        "key": parts["key"] / np.tile(keys, GROUPS),
    }, scales


def rounded_attention(
    parts: dict[str, np.ndarray], scales: StateScales, chunks: list[int], window: int | None
) -> np.ndarray:
    """What `run` must give with a state of 8 bits, for parts from `in_steps`, in float64.

    Rotated keys and values are rounded to whole steps where they come from the state, and those of a single row too.
    Rows that run together see each other as they are.
    """
    length, positions = len(parts["query"]), np.arange(len(parts["query"]))
    query, key, value = (reference_model.heads(parts[name], SIZE) for name in ("query", "key", "value"))
    query, key = (reference_model.rotate(each, positions, FREQUENCIES) for each in (query, key))
    rounded_key = np.clip(np.round(key), -128, 127)
    rounded_value = np.clip(np.round(value / scales.value), -128, 127) * scales.value
    mask, found, start = reference_model.attention_mask(length, window), [], 0
    for count in chunks:
        stop = start + count
        own = slice(start, stop if count > 1 else start)
        seen_key, seen_value = rounded_key.copy(), rounded_value.copy()
        seen_key[own], seen_value[own] = key[own], value[own]
        rows = (query[start:stop], seen_key, seen_value, mask[start:stop])
        found.append(reference_model.attend(*rows, 1.0))
        start = stop
    return np.concatenate(found)


def some_parts(seed: int, length: int) -> dict[str, np.ndarray]:
    """Heads and channels of very different sizes."""
    rng = np.random.default_rng(seed)
    parts = {
        name: rng.normal(size=(length, count * SIZE)) * np.repeat(rng.choice([0.3, 1, 3], count), SIZE)
        for name, count in (("query", HEADS), ("key", GROUPS), ("value", GROUPS))
    }
    parts["key"] *= np.tile(np.tile(rng.choice([0.1, 1, 5], SIZE // 2), 2), GROUPS)
    return parts


@pytest.mark.parametrize("window", [WINDOW, None], ids=["window", "global"])
@given(seed=st.integers(0, 2**32), chunks=st.lists(st.integers(1, 12), min_size=1, max_size=12))
@settings(max_examples=60)
def test_a_state_of_8_bits_is_rounded_once_and_nothing_else(window, seed, chunks, tmp_path_factory):
    """Whatever single rows and chunks follow each other, before and after a window evicts."""
    parts, scales = in_steps(some_parts(seed, sum(chunks)))
    folder = tmp_path_factory.mktemp("bytes")
    build(folder, 1.0, window=window, scales=scales)
    found, expected = run(folder, parts, chunks), rounded_attention(parts, scales, chunks, window)
    # A number half way between two steps may go to either in float32: rare, and worth a step of one key.
    close = np.isclose(found, expected, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.9
    np.testing.assert_allclose(found, expected, atol=4 * scales.value)
