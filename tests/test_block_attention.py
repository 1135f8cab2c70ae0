"""Blocks of rows that see each other: what the engine tells the decoder, and that prefill never cuts one.

The decoder here is a toy of two attention layers, one of them with a window, built with the exporter's own blocks. The
arbiter is attention over the whole sequence at once in float64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.bundle import Bundle, demo_folder
from siglance.engine.errors import BundleError, UnsupportedBundle
from siglance.engine.manifest import (
    FORMAT,
    FileFact,
    Manifest,
    PromptFacts,
    ReplyFacts,
    SamplingFacts,
    StatePair,
    read_manifest,
)
from siglance.engine.runtime import Runtime, SoftTokens, chunk_spans
from siglance.export import blocks
from siglance.export.builder import GraphBuilder, WeightsFile

HIDDEN = HEAD = 16
VOCABULARY = 40
WINDOW = 6
CONTEXT = 512
SCALE = 0.7
FREQUENCIES = np.array([1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01])
PREFIX, IMAGES = "attention:prefix", "attention:image_blocks"
RNG = np.random.default_rng(5)
TABLE = RNG.normal(size=(VOCABULARY, HIDDEN))
LAYERS = [{name: RNG.normal(0, HIDDEN**-0.5, (HIDDEN, HIDDEN)) for name in "qkvo"} for _ in range(2)]


# --- the toy


@dataclass(frozen=True)
class Toy:
    """How the decoder masks: by `inside_window` as `blocks.block_bias` says, or causally without `blocks`."""

    requires: tuple[str, ...]
    inside_window: bool = True
    blocks: bool = True
    ends_dtype: ir.DataType = ir.DataType.INT64


def build(folder, toy: Toy) -> Bundle:
    with WeightsFile(folder / "weights.bin") as weights:
        embed = GraphBuilder("embed", weights)
        ids = embed.input("input_ids", ir.DataType.INT64, [1, "tokens"])
        table = embed.weight("table", TABLE.shape, lambda: [TABLE.astype(np.float32)])
        embed.output(embed.op("Gather", table, ids), "inputs_embeds", ir.DataType.FLOAT, [1, "tokens", HIDDEN])
        embed.save(folder / "embed.onnx", "toy")
        build_decoder(weights, toy).save(folder / "decoder.onnx", "toy")
    state = [(f"past.{layer}.{part}", f"present.{layer}.{part}") for layer in range(2) for part in ("key", "value")]
    manifest = Manifest(
        format=FORMAT,
        **{"family": "toy", "name": "toy", "source": "toy", "revision": None, "target": "cpu", "precision": "fp32"},
        requires=("state:global", "logit_rows:any", *toy.requires),
        modalities=("text",),
        context=CONTEXT,
        stop_ids=(1,),
        files={name: FileFact(path=f"{name}.onnx", size=0, sha256="") for name in ("embed", "decoder")},
        image=None,
        prompt=PromptFacts(begin="<bos>", image=None),
        reply=ReplyFacts(boxes="none", thought=None, tool_call=None),
        state=tuple(StatePair(input=past, output=present, kind="global") for past, present in state),
        sampling=SamplingFacts(temperature=0.0, top_k=None, top_p=None, min_p=None),
    )
    return Bundle(folder, manifest)


def build_decoder(weights: WeightsFile, toy: Toy) -> GraphBuilder:
    graph = GraphBuilder("decoder", weights)
    inputs = blocks.decoder_inputs(graph, HIDDEN, blocks=toy.blocks and toy.ends_dtype is ir.DataType.INT64)
    if toy.ends_dtype is not ir.DataType.INT64:
        graph.input("block_ends", toy.ends_dtype, ["tokens"])
    cos, sin = blocks.rope_tables(graph, "all", FREQUENCIES, CONTEXT)
    x = inputs.embeddings
    for layer, window in enumerate((None, WINDOW)):
        projected = {}
        for name, matrix in LAYERS[layer].items():
            key = f"{layer}.{name}"
            projected[name] = graph.weight(key, matrix.shape, lambda matrix=matrix: [matrix.astype(np.float32)])
        query, key, value = (graph.op("MatMul", x, projected[name]) for name in "qkv")
        state = blocks.key_value_state(graph, layer, 1, HEAD, None, "capacity")
        bias = None
        if inputs.block_ends is not None:
            bias = blocks.block_bias(graph, inputs, window=window, inside_window=toy.inside_window)
        facts = blocks.Attention(1, 1, HEAD, SCALE, cos, sin)
        mixed, _, _ = blocks.attention(graph, query, key, value, state, inputs, facts, bias=bias)
        x = graph.op("Add", x, graph.op("MatMul", mixed, projected["o"]))
    head = graph.weight("head", (HIDDEN, VOCABULARY), lambda: [TABLE.T.astype(np.float32)])
    logits = graph.op("MatMul", blocks.take_rows(graph, x, inputs, "rows"), head)
    logits = graph.op("Squeeze", logits, graph.constant(np.array([0], np.int64), "batch"))
    graph.output(logits, "logits", ir.DataType.FLOAT, ["logit_rows", VOCABULARY])
    return graph


# --- the arbiter


def rotate(x: np.ndarray) -> np.ndarray:
    angles = np.outer(np.arange(len(x)), FREQUENCIES)
    first, second = x[:, : HEAD // 2], x[:, HEAD // 2 :]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def visible(length: int, found: list[tuple[int, int]], window: int | None, inside_window: bool) -> np.ndarray:
    """Facts 2.6, written out pair by pair."""
    seen = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(length):
            # j < first is causal anyway; only with `inside_window` off does it matter, for a second prefix: it sees all
            # that came before, as the first one did.
            same = any(first <= i < end and j < end for first, end in found)
            near = window is None or j > i - window
            seen[i, j] = ((j <= i or same) and near) if inside_window else ((j <= i and near) or same)
    return seen


def reference(x: np.ndarray, found: list[tuple[int, int]], inside_window: bool = True) -> np.ndarray:
    """Logits of all rows of embeddings [L, D], rows of a block of `found` seeing each other."""
    for layer, window in enumerate((None, WINDOW)):
        query, key, value = (x @ LAYERS[layer][name] for name in "qkv")
        scores = rotate(query) @ rotate(key).T * SCALE
        scores[~visible(len(x), found, window, inside_window)] = -np.inf
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        x = x + shares / shares.sum(axis=1, keepdims=True) @ value @ LAYERS[layer]["o"]
    return x @ TABLE.T


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory):
    toys = {"images": Toy((IMAGES,)), "prefix": Toy((PREFIX,), inside_window=False)}
    return {name: Runtime(build(tmp_path_factory.mktemp(name), toy), threads=1) for name, toy in toys.items()}


def soft_at(start: int, length: int, seed: int = 0) -> SoftTokens:
    return SoftTokens(start, np.random.default_rng(seed).normal(size=(length, HIDDEN)).astype(np.float32))


def ids_of(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int64) * 7 % VOCABULARY


def embeddings(ids: np.ndarray, soft: list[SoftTokens]) -> np.ndarray:
    rows = TABLE[ids].copy()
    for run in soft:
        rows[run.start : run.start + len(run.values)] = run.values
    return rows


prompts = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), max_size=4).map(
    lambda runs: [(sum(map(sum, runs[:index])) + gap, length) for index, (length, gap) in enumerate(runs)]
)


# --- image blocks


@settings(deadline=None, max_examples=60)
@given(prompts, st.integers(1, 6), st.integers(1, 12))
def test_image_blocks_are_the_longest_runs_of_soft_tokens_at_any_chunk_size(runtimes, runs, tail, chunk):
    """Pictures without a token between them are one block."""
    soft = [soft_at(start, length, seed=start) for start, length in runs]
    ids = ids_of(max((start + length for start, length in runs), default=0) + tail)
    is_soft = np.zeros(len(ids) + 2, bool)
    for start, length in runs:
        is_soft[start + 1 : start + length + 1] = True
    edges = np.flatnonzero(np.diff(is_soft.astype(int)))
    found = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    expected = reference(embeddings(ids, soft), found)
    close(runtimes["images"].session().prompt_logits(ids, soft), expected)
    close(runtimes["images"].session().prefill(ids, soft, chunk=chunk), expected[-1])


def test_a_picture_sees_all_of_itself(runtimes):
    """The same numbers without blocks are far away, so the tests above can fail."""
    soft, ids = [soft_at(3, 8)], ids_of(14)
    causal = reference(embeddings(ids, soft), [])
    logits = runtimes["images"].session().prompt_logits(ids, soft)
    close(logits[:3], causal[:3])
    assert np.abs(logits[3:] - causal[3:]).max() > 0.5


def test_a_later_picture_changes_nothing_before_it(runtimes):
    """Case 10: with one block for all pictures, the first would see the second."""
    ids, first = ids_of(20), soft_at(2, 6, 1)
    one, other = (runtimes["images"].session().prompt_logits(ids, [first, soft_at(11, 6, seed)]) for seed in (2, 3))
    np.testing.assert_array_equal(one[:11], other[:11])
    assert np.abs(one[11:] - other[11:]).max() > 0.5


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_the_pictures_in_the_list_does_not_matter(runtimes, order):
    ids = ids_of(16)
    for soft, found in (
        ([soft_at(1, 4, 1), soft_at(7, 5, 2)], [(1, 5), (7, 12)]),
        ([soft_at(1, 4, 1), soft_at(5, 3, 2), soft_at(8, 4, 3)], [(1, 12)]),
    ):
        expected = reference(embeddings(ids, soft), found)
        close(runtimes["images"].session().prompt_logits(ids, soft[::order]), expected)
        close(runtimes["images"].session().prefill(ids, soft[::order], chunk=3), expected[-1])


@pytest.mark.parametrize("kind", ["images", "prefix"])
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_a_later_turn_has_blocks_of_its_own_at_absolute_positions(runtimes, kind, chunk):
    """Prefill, two steps, and a second prefill with another picture: one sequence."""
    first, second = [soft_at(2, 5, 1)], [soft_at(1, 6, 2)]
    ids = ids_of(9 + 2 + 10)
    session = runtimes[kind].session()
    session.prefill(ids[:9], first, chunk=chunk)
    session.step(int(ids[9]))
    session.step(int(ids[10]))
    last = session.prefill(ids[11:], second, chunk=chunk)
    rows = embeddings(ids, [*first, SoftTokens(12, second[0].values)])
    found = [(2, 7), (12, 18)] if kind == "images" else [(0, 9), (11, 21)]
    close(last, reference(rows, found, inside_window=kind == "images")[-1])
    rows = np.concatenate([rows, TABLE[[3]]])
    close(session.step(3), reference(rows, found, inside_window=kind == "images")[-1])


# --- prefix


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("length", [1, 12, 300])  # 300: the state grows before the one chunk runs
def test_a_prefix_is_one_block_and_what_follows_is_causal(runtimes, length, chunk):
    soft, ids = ([soft_at(0, 5)] if length > 5 else []), ids_of(length)
    session, rows = runtimes["prefix"].session(), embeddings(ids, soft)
    close(session.prefill(ids, soft, chunk=chunk), reference(rows, [(0, length)], inside_window=False)[-1])
    for token in (4, 9, 2):
        rows = np.concatenate([rows, TABLE[[token]]])
        close(session.step(token), reference(rows, [(0, length)], inside_window=False)[-1])


def test_all_rows_of_a_prefix_can_be_asked_for(runtimes):
    ids = ids_of(20)
    logits = runtimes["prefix"].session().prompt_logits(ids)
    close(logits, reference(TABLE[ids], [(0, 20)], inside_window=False))
    assert np.abs(logits - reference(TABLE[ids], [], inside_window=False)).max() > 0.5


# --- chunks


@given(prompts, st.integers(0, 20), st.integers(1, 15))
def test_chunks_cover_the_prompt_and_cut_no_block(runs, tail, chunk):
    found = [(start, start + length) for start, length in runs]
    length = max((end for _, end in found), default=0) + tail
    spans = list(chunk_spans(length, chunk, found))
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(length))
    cuts = {start for start, _ in spans}
    assert not any(first < cut < end for first, end in found for cut in cuts)
    for start, stop in spans:
        assert stop - start <= chunk or (start, stop) in found


def test_without_blocks_chunks_are_as_long_as_asked():
    assert list(chunk_spans(10, 4, [])) == [(0, 4), (4, 8), (8, 10)]


# --- refusals


def test_a_graph_and_a_manifest_that_disagree_are_refused(tmp_path):
    for name, toy, message in (
        ("a", Toy(()), "has the input 'block_ends', but the manifest requires none of 'attention:image_blocks'"),
        ("b", Toy((IMAGES,), blocks=False), "requires 'attention:image_blocks', but the decoder graph has no input"),
        ("c", Toy((PREFIX,), blocks=False), "requires 'attention:prefix', but the decoder graph has no input"),
        ("d", Toy((PREFIX,), blocks=False, ends_dtype=ir.DataType.INT32), "int32.*expected int64"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(BundleError, match=message):
            Runtime(build(tmp_path / name, toy), threads=1)


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ([IMAGES, PREFIX, "logit_rows:any"], "one kind of attention"),
        ([IMAGES, "logit_rows:last"], "'logit_rows:any' beside blocks"),
        (["attention:bidirectional", "logit_rows:any"], "requires 'attention:bidirectional'"),
    ],
)
def test_mechanisms_that_exclude_each_other_or_do_not_exist(requires, message):
    facts = json.loads((demo_folder() / "siglance.json").read_text())
    facts["requires"] = ["state:global", "state:window", "image:aspect_patches", *requires]
    with pytest.raises((BundleError, UnsupportedBundle), match=message):
        read_manifest(json.dumps(facts))
