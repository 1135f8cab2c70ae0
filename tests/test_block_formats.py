"""What blocks are for: an outlier spoils its neighbours and nothing else, and the runtime keeps weights small."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from siglance.export.exporter import export
from siglance.export.families import ExportOptions
from siglance.kernels.quantize import dequantize, quantize

from . import tiny


def per_tensor(matrix: np.ndarray, bits: int) -> np.ndarray:
    """The matrix with one scale for all of it."""
    scale = np.abs(matrix).max() / (2 ** (bits - 1) - 1)
    return np.round(matrix / scale) * scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_one_channel_a_hundred_times_the_others(bits, axis):
    """Case 74: with one scale for the whole matrix nothing else would be left of it."""
    matrix = np.random.default_rng(0).normal(0, 1, (64, 128)).astype(np.float32)
    large = [slice(None), slice(None)]
    large[axis] = 5
    matrix[tuple(large)] *= 100
    stored = dequantize(quantize(matrix, bits, 32))
    others = np.delete(np.arange(matrix.size).reshape(matrix.shape), 5, axis=axis)
    if axis == 1:  # columns that share a block with the large one cannot be exact
        others = others[:, 31:]

    def error(found: np.ndarray) -> float:
        difference = (found - matrix).ravel()[others]
        return float(np.linalg.norm(difference) / np.linalg.norm(matrix.ravel()[others]))

    assert error(stored) < {4: 0.1, 8: 0.008}[bits]
    assert error(per_tensor(matrix, bits)) > {4: 0.9, 8: 0.2}[bits]


@pytest.mark.usefixtures("brief_calibration")
def test_the_level_of_products_is_in_the_report(tmp_path):
    """Case 19: level 4 rounds what is multiplied too, which changes greedy replies, and the bundle says so."""
    tiny.write_gemma4(tmp_path / "checkpoint")
    for precision, levels in (("fp32", None), ("int4", [4])):
        report = export(tmp_path / "checkpoint", tmp_path / precision, ExportOptions(precision=precision))
        written = json.loads((tmp_path / precision / "export.json").read_text())["graphs"]
        nodes = onnx.load(tmp_path / precision / "decoder.onnx", load_external_data=False).graph.node
        found = {one.i for node in nodes for one in node.attribute if one.name == "accuracy_level"}
        assert found == set(levels or [])
        for name in ("vision", "decoder"):
            assert written[name].get("accuracy_levels") == report.graphs[name].get("accuracy_levels") == levels


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.usefixtures("brief_calibration")
def test_the_runtime_multiplies_blocks(precision, tmp_path):
    """Case 74: onnxruntime does not fold codes and scales back into floats when it loads a graph."""
    tiny.write_gemma4(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision=precision))

    def products(path) -> list[str]:
        nodes = onnx.load(path, load_external_data=False).graph.node
        return sorted(node.op_type for node in nodes if "MatMul" in node.op_type or "Dequantize" in node.op_type)

    for name in ("vision", "decoder"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.optimised.onnx")
        options.log_severity_level = 4
        path = tmp_path / "bundle" / f"{name}.onnx"
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        assert "MatMulNBits" in products(path)
        kept = products(tmp_path / f"{name}.optimised.onnx")
        assert kept.count("MatMulNBits") == products(path).count("MatMulNBits")
        assert not any("Dequantize" in kind for kind in kept)
