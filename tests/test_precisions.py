"""Bundles in blocks of 8 and 4 bits: they compute the model whose matrices are the dequantised ones, exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.image_policy import POLICIES
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.export import exporter
from siglance.export.checkpoint import Weights
from siglance.export.exporter import export
from siglance.export.families import ExportOptions
from siglance.export.plan import plan_for
from siglance.kernels.quantize import dequantize, quantize

from . import tiny

IDS = np.arange(100, 140)


def run(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits [V] of the last row, and soft tokens of a picture where the bundle sees."""
    runtime = Runtime(Bundle.open(folder))
    facts = runtime.manifest.image
    if facts is None:
        return runtime.session().prefill(IDS), None
    patches = POLICIES[facts.policy].prepare(formula_picture(120, 168), facts, facts.budgets[0])
    values = runtime.encode(patches.values, patches.positions, len(patches.values) // facts.pool_size**2)
    ids = np.concatenate([IDS[:1], np.full(len(values), 99), IDS[1:]])
    return runtime.session().prefill(ids, [SoftTokens(1, values)]), values


def round_trip(matrix: np.ndarray, bits: int) -> np.ndarray:
    """What is left of a matrix that is stored in blocks, by the plan's own choice of block."""
    precision = {8: "int8", 4: "int4"}[bits]
    storage = plan_for(precision, "cpu").storage("decoder", matrix.shape[-1])
    if not storage.block:
        return matrix
    return dequantize(quantize(matrix, storage.bits, storage.block))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_the_graphs_compute_the_dequantised_model(family, precision, tmp_path, monkeypatch):
    getattr(tiny, f"write_{family}")(tmp_path / "checkpoint")
    decoder_bits = 8 if precision == "int8" else 4
    with monkeypatch.context() as patch:
        # Level 1 multiplies in float32; level 4 also rounds activations, which is another thing. Searched blocks can
        # be made here again; what calibration stores is compared in tests/test_calibration.py.
        facts: dict[str, Any] = {"accuracy_level": 1, "measured_bits": ()}
        exact = lambda *arguments: dataclasses.replace(plan_for(*arguments), **facts)  # noqa: E731
        patch.setattr(exporter, "plan_for", exact)
        export(tmp_path / "checkpoint", tmp_path / "blocks", ExportOptions(precision=precision))
    found, found_soft = run(tmp_path / "blocks")

    read, read_rows = Weights.read, Weights.read_rows

    def rounded(name: str, matrix: np.ndarray) -> np.ndarray:
        # The projection of patches stays float: the centring of pixels is folded into it.
        is_matrix = matrix.ndim == 2 and "patch_embedder" not in name
        bits = 8 if name.startswith(("vision.", "embed_vision.")) else decoder_bits
        return round_trip(matrix, bits) if is_matrix else matrix

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "read", lambda self, name, shape=None: rounded(name, read(self, name, shape)))
        patch.setattr(
            *(Weights, "read_rows"),
            lambda self, name, shape: (rounded(name, rows) for rows in read_rows(self, name, shape)),
        )
        export(tmp_path / "checkpoint", tmp_path / "fp32", ExportOptions(precision="fp32"))
    expected, expected_soft = run(tmp_path / "fp32")
    assert np.abs(found - expected).max() < 1e-3
    if expected_soft is not None:
        assert found_soft is not None
        assert np.abs(found_soft - expected_soft).max() < 1e-3


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@pytest.mark.usefixtures("brief_calibration")
def test_a_tied_table_is_stored_once(family, precision, tmp_path):
    getattr(tiny, f"write_{family}")(tmp_path / "checkpoint", vocab_size=4096)
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision=precision))
    places = {}
    for graph in ("embed", "decoder"):
        for name, value in ir.load(tmp_path / "bundle" / f"{graph}.onnx").graph.initializers.items():
            tensor = value.const_value
            if name.startswith("embed_tokens.weight") and isinstance(tensor, ir.ExternalTensor):
                places.setdefault(name.rsplit(".", 1)[-1].replace("rows", "codes"), set()).add(tensor.offset)
    assert set(places) == {"codes", "scales"}
    assert all(len(offsets) == 1 for offsets in places.values())


@pytest.mark.usefixtures("brief_calibration")
def test_vision_keeps_eight_bits(tmp_path):
    tiny.write_gemma4(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="int4"))
    for graph, bits in (("vision", {8}), ("decoder", {4})):
        nodes = ir.load(tmp_path / "bundle" / f"{graph}.onnx").graph
        assert {node.attributes["bits"].as_int() for node in nodes if node.op_type == "MatMulNBits"} == bits


@pytest.mark.usefixtures("brief_calibration")
def test_the_report_counts_bytes_by_dtype(tmp_path):
    tiny.write_gemma3(tmp_path / "checkpoint")
    report = export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="int4"))
    written = json.loads((tmp_path / "bundle" / "export.json").read_text())["graphs"]
    assert written == report.graphs
    for facts in report.graphs.values():
        assert sum(facts["dtypes"].values()) == facts["weight_bytes"]
        assert facts["dtypes"]["uint8"] > 0
