"""Calibration: what it observes, what it chooses, and that the bundle holds what was calibrated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.engine.graph import Graph
from siglance.engine.runtime import Runtime
from siglance.export import calibration, calibration_run, checkpoint, exporter, graph_losses, plan
from siglance.export import piecewise as piecewise_module
from siglance.export.calibration import Calibration
from siglance.export.calibration_choice import Chosen, Goal, Measured, choose, goal_for
from siglance.export.calibration_inputs import exact_logits
from siglance.export.calibration_run import Request
from siglance.export.exporter import export
from siglance.export.families import ExportOptions
from siglance.export.piecewise import LazyGraph, Piecewise
from siglance.export.plan import Storage
from siglance.kernels.quantize import Blocks, dequantize, quantize

from . import reference_model, tiny, tiny_gemma4_large, tiny_siglip

IDS = np.random.default_rng(7).integers(20, 500, 60)
SMALL, MIDDLE, LARGE = Storage(4, 64), Storage(4, 32), Storage(8, 64)


def request_for(folder: Path, precision: str = "auto") -> Request:
    return Request(
        source=str(folder),
        revision=None,
        tokenizer=None,
        precision=precision,
        target="cpu",
        context=256,
        folder=str(folder),
        template=None,
        begin="<bos>",
    )


@pytest.fixture
def here(monkeypatch):
    """Child processes' work is done in this process, so that it can be changed."""

    def in_process(function: Any, *arguments: Any, progress: Any = None) -> Any:
        given = json.loads(json.dumps(arguments))
        return json.loads(json.dumps(function(*given, *([] if progress is None else [progress]))))

    monkeypatch.setattr(exporter, "in_child", in_process)


def run(folder: Path, ids: np.ndarray = IDS) -> np.ndarray:
    """Logits [V] of the last row."""
    return Runtime(Bundle.open(folder)).session().prefill(ids)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(folder: Path, exact: np.ndarray, ids: np.ndarray = IDS) -> float:
    """Mean divergence of predictions on `ids`, whose exact logits are given [L, V]."""
    found = Runtime(Bundle.open(folder)).session().prompt_logits(ids)
    first, second = log_softmax(exact), log_softmax(found)
    return float((np.exp(first) * (first - second)).sum(-1).mean())


TEXT = """A kettle that is watched boils as soon as any other, but it seems to take longer. This has been measured:
people who were asked to press a key once the water boiled guessed that 6 minutes had passed, when it had been 4."""


def text_ids(folder: Path) -> list[np.ndarray]:
    """A text that calibration does not have, as ids."""
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [np.array([2, *encoder.encode(TEXT, add_special_tokens=False).ids])]


# --- the model in pieces

WRITERS = {
    "gemma3": (tiny.write_gemma3, {}),
    "gemma3 untied": (tiny.write_gemma3, {"tie_word_embeddings": False, "final_logit_softcapping": 5.0}),
    "gemma4": (tiny.write_gemma4, {}),
    "experts": (tiny_gemma4_large.write_gemma4_experts, {}),
    "gemma3 vision": (tiny_siglip.write_gemma3_vision, {}),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_pieces_compute_what_the_bundle_computes(layout, tmp_path, monkeypatch):
    writer, arguments = WRITERS[layout]
    writer(tmp_path / "checkpoint", **arguments)
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(context=256))
    ids = IDS[:8]  # as many as the windows that layers of Gemma 4 share hold
    expected = Runtime(Bundle.open(tmp_path / "bundle")).session().prefill(ids)
    builds = request_for(tmp_path / "checkpoint").graphs()
    embed, decoder = LazyGraph("embed", np.unique([0, *ids])), LazyGraph("decoder")
    builds["embed"](embed)
    builds["decoder"](decoder)
    [values] = calibration.embedded(embed, decoder, [ids.tolist()])
    piecewise = Piecewise(decoder, [values])
    for stop in range(0, len(piecewise.nodes), 7):
        piecewise.run(stop)
    piecewise.advance()
    np.testing.assert_allclose(values["logits"][-1], expected, atol=1e-4)
    # And in the pieces that large models are run in, the head in slices.
    monkeypatch.setattr(piecewise_module, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(checkpoint, "SLICE_BYTES", 10_000)
    [logits] = exact_logits(decoder, calibration.embedded(embed, decoder, [ids.tolist()]))
    np.testing.assert_allclose(logits[-1], expected, atol=1e-4)


def test_a_row_that_no_text_has_is_an_error(tmp_path):
    tiny.write_gemma3(tmp_path)
    embed, decoder = LazyGraph("embed", np.array([0, 5, 6])), LazyGraph("decoder")
    builds = request_for(tmp_path).graphs()
    builds["embed"](embed)
    builds["decoder"](decoder)
    calibration.embedded(embed, decoder, [[5, 6]])
    with pytest.raises(Exception, match="out of"):
        calibration.embedded(embed, decoder, [[7]])


def observed(folder: Path, sequences: list[list[int]], formats: Any, files: Path) -> Calibration:
    builds = request_for(folder).graphs()
    files.mkdir()
    found = Calibration(builds["embed"], builds["decoder"], lambda columns, length: sequences, formats, files)
    found.observe(lambda stage: None)
    return found


def test_moments_are_those_of_the_reference(tmp_path, monkeypatch):
    tiny.write_gemma3(tmp_path / "checkpoint")
    sequences = [[2, *IDS[:30].tolist()], [2, *IDS[30:47].tolist()]]
    seen: dict[str, list[np.ndarray]] = {}
    attention, mlp = reference_model.gemma3_attention, reference_model.gated_mlp

    def see_attention(x, weights, prefix, config, kind):
        seen.setdefault(f"{prefix}.qkv", []).append(x)
        return attention(x, weights, prefix, config, kind)

    def see_mlp(x, weights, prefix):
        seen.setdefault(f"{prefix}.gate_up", []).append(x)
        gate, up = (x @ weights[f"{prefix}.{part}_proj.weight"].T for part in ("gate", "up"))
        seen.setdefault(f"{prefix}.down", []).append(reference_model.gelu_tanh(gate) * up)
        return mlp(x, weights, prefix)

    monkeypatch.setattr(reference_model, "gemma3_attention", see_attention)
    monkeypatch.setattr(reference_model, "gated_mlp", see_mlp)
    weights, config = reference_model.load_checkpoint(tmp_path / "checkpoint")
    table = weights["model.embed_tokens.weight"]
    for ids in sequences:
        logits = reference_model.gemma3_text_logits(weights, config, ids)
        seen.setdefault("head", []).append(np.linalg.lstsq(table, logits.T, rcond=None)[0].T)
    # One format: nothing is measured, so no sequence is held out.
    found = observed(tmp_path / "checkpoint", sequences, lambda columns: [MIDDLE], tmp_path / "files")
    assert found.tokens == sum(map(len, sequences))
    compared = 0
    for product in found._products:
        name = (
            product.key.replace("text.", "model.").replace("_proj.weight", "").replace("self_attn.qkv", "self_attn.qkv")
        )
        name = "head" if product is found._products[-1] else name
        if name not in seen:
            continue  # the inputs of o_proj have no name in the reference
        x = np.concatenate(seen[name])
        moments = np.load(found._moments_path(product, 0))
        np.testing.assert_allclose(moments, x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(x.T @ x).max())
        compared += 1
    assert compared == 3 * config["num_hidden_layers"] + 1


def test_steps_of_states_are_the_largest_of_the_reference(tmp_path, monkeypatch):
    """Of keys by pairs of channels, whatever their positions; of values over all of a layer."""
    tiny.write_gemma3(tmp_path / "checkpoint")
    sequences = [[2, *IDS[:30].tolist()], [2, *IDS[30:47].tolist()]]
    keys: dict[str, list[np.ndarray]] = {}
    values: dict[str, list[np.ndarray]] = {}
    attention, attend = reference_model.gemma3_attention, reference_model.attend
    inside = ""

    def see_attention(x, weights, prefix, config, kind):
        nonlocal inside
        inside = prefix
        return attention(x, weights, prefix, config, kind)

    def see_attend(query, key, value, mask, scale):
        keys.setdefault(inside, []).append(key)
        values.setdefault(inside, []).append(value)
        return attend(query, key, value, mask, scale)

    monkeypatch.setattr(reference_model, "gemma3_attention", see_attention)
    monkeypatch.setattr(reference_model, "attend", see_attend)
    weights, config = reference_model.load_checkpoint(tmp_path / "checkpoint")
    for ids in sequences:
        reference_model.gemma3_text_logits(weights, config, ids)
    found = observed(tmp_path / "checkpoint", sequences, lambda columns: [MIDDLE], tmp_path / "files").states.scales()
    assert sorted(found) == list(range(config["num_hidden_layers"]))
    for layer, scales in found.items():
        key, value = (np.concatenate(seen[f"model.layers.{layer}.self_attn"]) for seen in (keys, values))
        first, second = np.split(key, 2, axis=-1)
        lengths = np.sqrt(first**2 + second**2).max((0, 1))
        np.testing.assert_allclose(scales.keys, np.tile(lengths, 2) / 127, rtol=1e-4)
        assert scales.value == pytest.approx(np.abs(value).max() / 127, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "precision", "dtype"),
    [("gemma3", "int4", np.int8), ("gemma3", "auto", np.float32), ("gemma4", "int4", np.float32)],
)
@pytest.mark.usefixtures("brief_calibration")
def test_states_have_8_bits_only_where_that_was_measured(family, precision, dtype, tmp_path):
    getattr(tiny, f"write_{family}")(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision=precision))
    bundle = Bundle.open(tmp_path / "bundle")
    inputs = Runtime(bundle).decoder.inputs
    assert {inputs[pair.input].dtype for pair in bundle.manifest.state} == {dtype}
    report = json.loads((tmp_path / "bundle" / "export.json").read_text())["calibration"]
    assert bool(report["layers_with_states_of_8_bits"]) == (dtype is np.int8)


def test_wide_matrices_are_calibrated_in_groups(monkeypatch):
    assert calibration._groups(2048) == [(0, 2048)]
    assert calibration._groups(6144) == [(0, 2048), (2048, 4096), (4096, 6144)]
    for columns in (2176, 5376, 12288, 21504):
        spans = calibration._groups(columns)
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == columns
        assert all(start % 128 == 0 and 0 < stop - start <= 2048 for start, stop in spans)


def test_groups_give_a_matrix_of_all_columns(tmp_path, monkeypatch, here):
    """The same model with narrow groups is nearly as good: feedback ends at their borders."""
    tiny.write_gemma3(tmp_path / "checkpoint", num_hidden_layers=2, hidden_size=128, intermediate_size=256)
    export(tmp_path / "checkpoint", tmp_path / "fp32", ExportOptions(precision="fp32"))
    exact = Runtime(Bundle.open(tmp_path / "fp32")).session().prompt_logits(IDS)
    export(tmp_path / "checkpoint", tmp_path / "whole", ExportOptions(precision="int4"))
    monkeypatch.setattr(calibration, "_MOST_COLUMNS", 128)
    export(tmp_path / "checkpoint", tmp_path / "groups", ExportOptions(precision="int4"))
    assert divergence(tmp_path / "groups", exact) < 1.5 * divergence(tmp_path / "whole", exact)


# --- losses


def test_measured_losses_are_those_of_single_matrices(tmp_path, monkeypatch):
    """What calibration estimates from some rows and ratios, against models with one matrix quantised."""
    tiny.write_gemma3(tmp_path / "checkpoint")
    sequences = [[2, *np.random.default_rng(seed).integers(20, 500, 60).tolist()] for seed in range(12)]
    formats = lambda columns: [MIDDLE, Storage(8, 32)]  # noqa: E731
    monkeypatch.setattr(calibration, "_SAMPLE", 32)
    monkeypatch.setattr(calibration, "_PROBE_TOKENS", (60, 60))
    found = observed(tmp_path / "checkpoint", sequences, formats, tmp_path / "files")
    losses = {each.key: each.losses for each in found.measured()}
    probes = [sequences[0], sequences[6]]
    builds = request_for(tmp_path / "checkpoint").graphs()
    embed, decoder = LazyGraph("embed", np.arange(512)), LazyGraph("decoder")
    builds["embed"](embed)
    builds["decoder"](decoder)
    for key, measured in losses.items():
        if key == "embed_tokens.weight":
            continue  # its two uses are measured apart
        product = next(each for each in found._products if each.key == key)
        whole = Chosen(Measured(key, 0, product.shape[0], product.shape[1], measured), MIDDLE)
        spans = found.quantise([whole], lambda stage: None)[key]
        (tmp_path / "files" / "blocks-0.codes.npy").rename(tmp_path / "files" / f"{key}.codes.npy")
        (tmp_path / "files" / "blocks-0.scales.npy").rename(tmp_path / "files" / f"{key}.scales.npy")
        stored = dataclasses.replace(spans[0].blocks, path=tmp_path / "files" / key)
        replaced = {f"{key}.transposed": np.ascontiguousarray(dequantize(stored.load()).T)}
        total = 0.0
        for probe in probes:
            logits = []
            for weights in ({}, replaced):
                [values] = calibration.embedded(embed, decoder, [probe])
                piecewise = Piecewise(decoder, [values])
                piecewise.run(len(piecewise.nodes), replaced=lambda index, weights=weights: weights)
                logits.append(log_softmax(values["logits"][30:]))
            total += float((np.exp(logits[0]) * (logits[0] - logits[1])).sum(-1).mean()) / 2
        # The estimate is made with step 1 of quantisation only, and of a third of the rows.
        assert 0.5 < measured[MIDDLE] / total < 2.5, key
        assert measured[Storage(8, 32)] < 0.02 * measured[MIDDLE]


# --- the choice

LADDERS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.floats(0, 1), min_size=3, max_size=3)), min_size=1, max_size=6
)


def matrices(drawn: list[tuple[int, list[float]]]) -> list[Measured]:
    return [
        Measured(str(index), 0, rows, 64, dict(zip((SMALL, MIDDLE, LARGE), losses, strict=True)))
        for index, (rows, losses) in enumerate(drawn)
    ]


def size(chosen: list[Chosen]) -> int:
    return sum(each.nbytes for each in chosen)


def loss(chosen: list[Chosen]) -> float:
    return sum(each.loss or 0.0 for each in chosen)


@settings(max_examples=200, deadline=None)
@given(drawn=LADDERS, bits=st.floats(4.5, 8.5), wanted=st.floats(0, 2))
def test_the_choice_keeps_its_limits(drawn, bits, wanted):
    given = matrices(drawn)
    chosen = choose(given, Goal(wanted, 0.0, bits))
    assert [each.measured for each in chosen] == given
    weights = sum(each.shape[0] * each.shape[1] for each in given)
    assert size(chosen) * 8 <= bits * weights
    # No mixture as small is much better: at most one step of one matrix, the last that did not fit.
    every = itertools.product(*([Chosen(matrix, each) for each in matrix.losses] for matrix in given))
    fitting = [list(each) for each in every if size(list(each)) <= size(chosen)]
    best = min(map(loss, fitting))
    if loss(chosen) > wanted:
        steps = [max(matrix.losses.values()) - min(matrix.losses.values()) for matrix in given]
        assert loss(chosen) <= best + max(steps) + 1e-9


@settings(max_examples=100, deadline=None)
@given(drawn=LADDERS, limits=st.tuples(st.floats(4.5, 8.5), st.floats(4.5, 8.5)))
def test_everything_is_best_where_bytes_do_not_matter(drawn, limits):
    given = matrices(drawn)
    chosen = choose(given, Goal(0.0, 0.0, 9.0))
    assert loss(chosen) == pytest.approx(sum(min(each.losses.values()) for each in given))
    smallest = choose(given, Goal(100.0, 0.0, 9.0))
    assert size(smallest) == sum(SMALL.nbytes(each.shape) for each in given)


def test_the_choice_in_an_example():
    """Of two matrices of one size the more sensitive one gets the bits, if there are bits for one only."""
    losses = ({SMALL: 0.10, MIDDLE: 0.08, LARGE: 0.001}, {SMALL: 0.5, MIDDLE: 0.4, LARGE: 0.005})
    given = [Measured(name, 0, 64, 64, each) for name, each in zip("ab", losses, strict=True)]
    assert [each.storage for each in choose(given, Goal(0.02, 0.0, 6.5))] == [SMALL, LARGE]
    assert [each.storage for each in choose(given, Goal(0.02, 0.0, 9.0))] == [LARGE, LARGE]
    assert [each.storage for each in choose(given, Goal(0.7, 0.0, 9.0))] == [SMALL, SMALL]
    # int4: blocks as large as one and a half times the least loss allows.
    four = [Measured(each.key, 0, 64, 64, {s: each.losses[s] for s in (SMALL, MIDDLE)}) for each in given]
    assert [each.storage for each in choose(four, goal_for("int4"))] == [SMALL, SMALL]


def test_neighbours_of_one_format_are_joined():
    parts = [(0, 4, 0.4), (4, 8, 0.3), (8, 16, 0.0), (16, 32, 0.0)]
    given = [Measured("head", start, stop, 64, {SMALL: loss, LARGE: 0.0}) for start, stop, loss in parts]
    other = Measured("other", 0, 64, 64, {SMALL: None})
    chosen = choose([*given, other], Goal(0.0, 0.0, 8.0))
    assert [(each.measured.key, each.measured.start, each.measured.stop, each.storage) for each in chosen] == [
        ("head", 0, 8, LARGE),
        ("head", 8, 32, SMALL),
        ("other", 0, 64, SMALL),
    ]
    assert chosen[0].measured.losses[SMALL] == pytest.approx(0.7)


# --- bundles


def stored_matrices(folder: Path) -> dict[str, np.ndarray]:
    """The matrices of a bundle's graphs that are stored in blocks, by key, parts joined."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for graph in ("embed", "decoder"):
        values = ir.load(folder / f"{graph}.onnx").graph.initializers
        for name, value in values.items():
            key, _, kind = name.rpartition(".")
            if kind not in ("codes", "rows"):
                continue
            scales = values[f"{key}.scales"].const_value.numpy()
            codes = value.const_value.numpy().reshape(len(scales), -1)
            matrix_key, _, part = key.rpartition(".")
            start = int(part.split("-")[0]) if part[0].isdigit() else 0
            # How many bits there are follows from the columns, which are 64, 96 or a multiple of 128 in these models.
            bits = _bits(folder, key)
            blocks = Blocks(bits, codes.shape[1] * 8 // bits // scales.shape[1], codes, scales)
            found.setdefault(matrix_key if part[0].isdigit() else key, {})[start] = dequantize(blocks)
    return {key: np.concatenate([parts[at] for at in sorted(parts)]) for key, parts in found.items()}


def _bits(folder: Path, key: str) -> int:
    for graph in ("decoder", "embed"):
        for node in ir.traversal.RecursiveGraphIterator(ir.load(folder / f"{graph}.onnx").graph):
            if any(value is not None and value.name == f"{key}.scales" for value in node.inputs):
                return node.attributes["bits"].as_int()
    raise AssertionError(key)


@pytest.mark.parametrize("layout", ["gemma3", "gemma3 untied", "gemma4"])
@pytest.mark.parametrize("precision", ["int4", "auto"])
def test_bundles_compute_the_model_of_their_stored_matrices(layout, precision, tmp_path, monkeypatch, here):
    """Also where the head is cut into parts of different formats, which is looked up too when it is tied."""
    writer, arguments = WRITERS[layout]
    writer(tmp_path / "checkpoint", **arguments)
    monkeypatch.setattr(calibration, "_FIRST_PART", 64)
    exact = plan.plan_for(precision, "cpu")
    monkeypatch.setattr(exporter, "plan_for", lambda *arguments: dataclasses.replace(exact, accuracy_level=1))
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision=precision, context=256))
    matrices = stored_matrices(tmp_path / "bundle")
    report = json.loads((tmp_path / "bundle" / "export.json").read_text())["calibration"]["matrices"]
    assert {each["key"] for each in report} == set(matrices)
    head = "embed_tokens.weight" if layout != "gemma3 untied" else "lm_head.weight"
    if precision == "auto" and layout != "gemma3 untied":
        assert len([each for each in report if each["key"] == head]) > 1
    ids = IDS[:8]
    builds = request_for(tmp_path / "checkpoint").graphs()
    embed, decoder = LazyGraph("embed", np.arange(512)), LazyGraph("decoder")
    builds["embed"](embed)
    builds["decoder"](decoder)
    tables = {f"{key}.some": matrix for key, matrix in matrices.items() if embed.is_weight(embed_value(embed, key))}
    [values] = calibration.embedded(embed, decoder, [ids.tolist()], tables)
    turned = {f"{key}.transposed": np.ascontiguousarray(matrix.T) for key, matrix in matrices.items()}
    piecewise = Piecewise(decoder, [values])
    piecewise.run(len(piecewise.nodes), replaced=lambda index: turned | {head: matrices[head]})
    np.testing.assert_allclose(run(tmp_path / "bundle", ids), values["logits"][-1], atol=1e-3)


def embed_value(graph: LazyGraph, key: str) -> ir.Value | None:
    return graph.graph.initializers.get(f"{key}.some")


def test_calibrated_blocks_are_better_than_searched_ones(tmp_path, monkeypatch, here):
    tiny.write_gemma3(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "fp32", ExportOptions(precision="fp32"))
    [ids] = text_ids(tmp_path / "checkpoint")
    exact = Runtime(Bundle.open(tmp_path / "fp32")).session().prompt_logits(ids)
    monkeypatch.setitem(plan._LARGER, "cpu", ())  # blocks of 32 for both
    export(tmp_path / "checkpoint", tmp_path / "calibrated", ExportOptions(precision="int4"))
    searched = dataclasses.replace(plan.plan_for("int4", "cpu"), measured_bits=())
    monkeypatch.setattr(exporter, "plan_for", lambda *arguments: searched)
    export(tmp_path / "checkpoint", tmp_path / "searched", ExportOptions(precision="int4"))
    found = {name: divergence(tmp_path / name, exact, ids) for name in ("calibrated", "searched")}
    # Inputs of random matrices have little structure to make use of; a trained model gains far more (tests/real).
    assert found["calibrated"] < 0.9 * found["searched"]


def test_auto_is_the_default_and_keeps_its_budget(tmp_path):
    """As a user calls it, in processes of their own."""
    tiny.write_gemma3(tmp_path / "checkpoint")
    command = [
        sys.executable,
        "-P",
        "-m",
        "siglance.engine",
        "export",
        tmp_path / "checkpoint",
        "-o",
        tmp_path / "bundle",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    assert "best token as in float32" in done.stdout
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.precision == "auto"
    facts = json.loads(bundle.path("export").read_text())
    report = facts["calibration"]
    assert report["bits_per_weight"] <= goal_for("auto").bits
    assert {each["bits"] for each in report["matrices"]} == {4, 8}
    assert report["loss"] == pytest.approx(
        sum(each["losses"][f"int{each['bits']} in blocks of {each['block']}"] for each in report["matrices"]), abs=1e-4
    )
    assert facts["graphs"]["decoder"]["argmax_agreement"] > 0.6
    assert facts["graphs"]["decoder"]["cosine"] > 0.95


def test_the_same_checkpoint_gives_the_same_bundle(tmp_path):
    tiny.write_gemma3(tmp_path / "checkpoint")
    for name in ("first", "second"):
        export(tmp_path / "checkpoint", tmp_path / name / "bundle", ExportOptions(precision="auto"))
    files = sorted(path.name for path in (tmp_path / "first" / "bundle").iterdir())
    assert "weights.bin" in files
    for name in files:
        first, second = ((tmp_path / part / "bundle" / name).read_bytes() for part in ("first", "second"))
        assert first == second, name


def test_experts_are_searched_and_the_report_says_so(tmp_path):
    """Their inputs are inside a loop. All else is calibrated."""
    config = tiny_gemma4_large.write_gemma4_experts(tmp_path / "checkpoint")
    options = ExportOptions(precision="auto", accept_loss=True)
    export(tmp_path / "checkpoint", tmp_path / "bundle", options)
    report = json.loads((tmp_path / "bundle" / "export.json").read_text())["calibration"]["matrices"]
    experts = [each for each in report if "experts" in each["key"]]
    assert len(experts) == 2 * config["text_config"]["num_hidden_layers"]
    assert {(each["bits"], each["reason"]) for each in experts} == {(4, "its inputs are not seen: scales searched")}
    assert {each["reason"] for each in report if each not in experts} == {"measured loss"}
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    [name] = [name for name in tensors if name.endswith("layers.0.experts.down_proj")]
    matrix = np.float32(tensors[name]).reshape(-1, tensors[name].shape[-1])
    [facts] = [each for each in experts if each["key"].endswith("layers.0.experts.down_proj")]
    expected = dequantize(quantize(matrix, facts["bits"], facts["block"]))
    np.testing.assert_array_equal(stored_matrices(tmp_path / "bundle")[facts["key"]], expected)


def test_random_weights_are_not_calibrated(tmp_path):
    with exporter._calibrated(plan.plan_for("auto", "cpu"), None, tmp_path, lambda stage: None) as (found, said):
        assert found.storage("decoder", 640) == Storage(4, 32)
        assert said is not None
        assert "random" in said["skipped"]


# --- failures


def test_a_failure_in_calibration_leaves_nothing(tmp_path, monkeypatch, here):
    tiny.write_gemma3(tmp_path / "checkpoint")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration.np, "save", full)
    with pytest.raises(ExportError, match="No space left"):
        export(tmp_path / "checkpoint", tmp_path / "new" / "bundle", ExportOptions(precision="auto"))
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    export(tmp_path / "checkpoint", tmp_path / "new" / "bundle", ExportOptions(precision="int8"))


def test_an_error_in_the_child_process_leaves_nothing(tmp_path):
    tiny.write_gemma3(tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.inf
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        export(tmp_path / "checkpoint", tmp_path / "new" / "bundle", ExportOptions(precision="auto"))
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_cannot_be_read(tmp_path, here):
    tiny.write_gemma3(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="auto"))


def test_a_bundle_that_lost_the_model_is_refused_unless_it_is_wanted(tmp_path, monkeypatch, here):
    tiny.write_gemma3(tmp_path / "checkpoint")
    monkeypatch.setattr(graph_losses, "LEAST_AGREEMENT", 1.01)
    with pytest.raises(ExportError, match=r"'decoder' would be too inexact: argmax agreement 0\.\d+"):
        export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="int8"))
    assert not (tmp_path / "bundle").exists()
    report = export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="int8", accept_loss=True))
    assert 0.8 < report.graphs["decoder"]["argmax_agreement"] <= 1


def test_losses_of_graphs_are_those_of_the_bundles(tmp_path):
    """Against two bundles, one of them exact."""
    tiny.write_gemma3(tmp_path / "checkpoint")
    for precision in ("fp32", "int8"):
        export(tmp_path / "checkpoint", tmp_path / precision, ExportOptions(precision=precision, context=256))
    facts = json.loads((tmp_path / "int8" / "export.json").read_text())["graphs"]["decoder"]
    request = dataclasses.replace(request_for(tmp_path / "checkpoint"), template="chat_template.jinja")
    texts = request.sequences(128, 24)
    rows = []
    for ids in texts:
        exact, found = (
            Runtime(Bundle.open(tmp_path / each)).session().prompt_logits(np.array(ids))[len(ids) // 2 :]
            for each in ("fp32", "int8")
        )
        rows.append((exact, found))
    exact, found = (np.concatenate(each) for each in zip(*rows, strict=True))
    # The embedding graph of the second bundle rounds too, which `decoder` does not count.
    assert facts["argmax_agreement"] == pytest.approx((exact.argmax(1) == found.argmax(1)).mean(), abs=0.1)
    centred = [each - each.mean(1, keepdims=True) for each in (exact, found)]
    cosine = (centred[0] * centred[1]).sum(1) / np.prod([np.linalg.norm(each, axis=1) for each in centred], axis=0)
    assert facts["cosine"] == pytest.approx(cosine.mean(), abs=5e-3)


def test_losses_are_measured_on_memory_that_past_and_present_share(tmp_path, monkeypatch):
    """As CUDA's kernel of window buffers wants it: exports on a card failed, which no machine without one had seen."""
    tiny.write_gemma3(tmp_path / "checkpoint")
    run = Graph.run

    def strict(self: Graph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.name != "decoder" or not any(name.startswith("past.") for name in inputs), "memory of its own"
        return run(self, inputs)

    monkeypatch.setattr(Graph, "run", strict)
    report = export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="int8", context=256))
    assert report.graphs["decoder"]["cosine"] > 0.9


# --- the text


def test_the_text_is_of_all_kinds_and_of_the_wanted_length(tmp_path):
    tiny.write_gemma3(tmp_path)
    request = dataclasses.replace(request_for(tmp_path), template="chat_template.jinja")
    sequences = request.sequences(2000, 64)
    assert 2000 <= sum(map(len, sequences)) < 2064
    assert {ids[0] for ids in sequences} == {2}
    assert max(map(len, sequences)) == 64
    assert sequences == request.sequences(2000, 64)
    assert len({tuple(ids) for ids in sequences}) == len(sequences)
    # A part of the text has all kinds: the turns of conversations are in it.
    assert any(5 in ids or 6 in ids for ids in sequences[:8]) == any(5 in ids or 6 in ids for ids in sequences)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ strftime_now('%d') }}{{ messages[0].content }}"]
)
def test_a_template_that_cannot_lay_out_the_conversations(tmp_path, template):
    tiny.write_gemma3(tmp_path)
    (tmp_path / "other.jinja").write_text(template)
    plain = request_for(tmp_path).sequences(500, 64)
    assert dataclasses.replace(request_for(tmp_path), template="other.jinja").sequences(500, 64) == plain


def test_calibration_asks_for_enough_text(tmp_path, monkeypatch):
    """For eight tokens a column, and at least a thousand."""
    tiny.write_gemma3(tmp_path)
    asked = []
    sequences = Request.sequences
    monkeypatch.setattr(
        Request, "sequences", lambda self, tokens, length: asked.append(tokens) or sequences(self, 64, length)
    )
    (tmp_path / "files").mkdir()
    calibration_run.calibrate(dataclasses.asdict(request_for(tmp_path)), str(tmp_path / "files"), lambda stage: None)
    assert asked == [1024]
