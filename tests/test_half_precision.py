"""float16 bundles: right where a naive float16 graph overflows, and float32 outside of products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine.bundle import Bundle
from siglance.engine.errors import DeviceError, ExportError
from siglance.engine.image_policy import POLICIES
from siglance.engine.runtime import Runtime
from siglance.export import matrices
from siglance.export.builder import FLOAT, FLOAT16, GraphBuilder
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from . import tiny, tiny_gemma4_audio, tiny_gemma4_large, tiny_siglip

IDS = np.arange(100, 140)


def write_gemma3(folder: Path, scales: dict[str, float]) -> None:
    """A tiny checkpoint whose tensors with these endings are multiplied; norms count with their 1 +."""
    tiny.write_gemma3(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        for ending, factor in scales.items():
            if name.endswith(ending):
                tensors[name] = np.float32((1 + value) * factor - 1 if "norm" in ending else value * factor)
    save_file(tensors, folder / "model.safetensors")


def logits_of(folder: Path) -> np.ndarray:
    """Logits [V] of the last row; float16 bundles are made for GPUs and run here on the CPU, as self-tests do."""
    return Runtime(Bundle.open(folder), device="cpu", foreign=True).session().prefill(IDS)


def round_products(patch: pytest.MonkeyPatch) -> None:
    """Products of float16 round their inputs and outputs, as on a GPU.

    onnxruntime has no such products for CPUs: it widens the inputs and drops the rounding, overflow included.
    """
    right = GraphBuilder.ops

    def ops(self: GraphBuilder, operator: str, inputs: Any, outputs: Any, **options: Any) -> list[ir.Value]:
        if operator not in ("MatMul", "Gemm") or not self.is_half(inputs[1]):
            return right(self, operator, inputs, outputs, **options)
        wide = [self.op("Cast", value, to=int(FLOAT)) for value in inputs]
        [product] = right(self, operator, wide, outputs, **options)
        return [self.mark_half(self.op("Cast", product, to=int(FLOAT16)))]

    patch.setattr(GraphBuilder, "ops", ops)


def naive_logits(fp32: Path) -> np.ndarray:
    """The float32 bundle's graphs with every float32 tensor turned into float16, run on the same ids."""
    feeds: dict[str, np.ndarray] = {"input_ids": IDS[None]}
    outputs: dict[str, np.ndarray] = {}
    for name in ("embed", "decoder"):
        model = ir.load(fp32 / f"{name}.onnx")
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
        for key, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            assert tensor is not None
            if tensor.dtype == ir.DataType.FLOAT:
                with np.errstate(over="ignore"):
                    half = ir.tensor(tensor.numpy().astype(np.float16), name=key)
                value.const_value, value.type = half, ir.TensorType(ir.DataType.FLOAT16)
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        if name == "decoder":
            feeds = {"inputs_embeds": outputs["inputs_embeds"], "seqlens_k": np.array([len(IDS) - 1], np.int32)}
            feeds |= {"total_sequence_length": np.array(len(IDS), np.int32), "logit_rows": np.array([len(IDS) - 1])}
            for node in session.get_inputs():
                if node.name.startswith("past."):
                    shape = [side if isinstance(side, int) else 64 for side in node.shape]
                    feeds[node.name] = np.zeros(shape, np.float16)
        names = [node.name for node in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
    return outputs["logits"][0].astype(np.float32)


# What makes float16 overflow, each alone: the residual stream, the gated product, and the output of a norm.
HAZARDS = {
    "residual": {"post_feedforward_layernorm.weight": 2e4, "post_attention_layernorm.weight": 2e4},
    "gated product": {"gate_proj.weight": 150.0, "up_proj.weight": 150.0},
    "norm output": {"pre_feedforward_layernorm.weight": 6e4, "gate_proj.weight": 2e-3, "up_proj.weight": 2e-3},
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_naive_float16_graph_overflows_and_ours_does_not(hazard, tmp_path, monkeypatch):
    write_gemma3(tmp_path / "checkpoint", HAZARDS[hazard])
    export(tmp_path / "checkpoint", tmp_path / "fp32")
    round_products(monkeypatch)
    export(tmp_path / "checkpoint", tmp_path / "fp16", ExportOptions(precision="fp16", target="cuda"))
    expected, found = logits_of(tmp_path / "fp32"), logits_of(tmp_path / "fp16")
    assert not np.isfinite(naive_logits(tmp_path / "fp32")).all()
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < 0.01 * np.ptp(expected)
    assert found.argmax() == expected.argmax()


@pytest.mark.parametrize("hazard", ["gated product", "norm output"])
def test_products_overflow_without_their_factor(hazard, tmp_path, monkeypatch):
    """The test above sees the factor: the same graphs without it are not finite, or far off."""

    def unscaled(graph: GraphBuilder, x: ir.Value, key: str, multiply: Callable[[ir.Value], ir.Value]) -> ir.Value:
        return graph.op("Cast", multiply(graph.half(x)), to=int(FLOAT))

    write_gemma3(tmp_path / "checkpoint", HAZARDS[hazard])
    export(tmp_path / "checkpoint", tmp_path / "fp32")
    round_products(monkeypatch)
    monkeypatch.setattr(matrices, "half_product", unscaled)
    options = ExportOptions(precision="fp16", target="cuda", accept_loss=True)
    with pytest.raises(ExportError, match="not finite"):
        export(tmp_path / "checkpoint", tmp_path / "fp16", options)


def test_a_harmless_model_survives_the_naive_graph(tmp_path):
    """The comparison above means something: without a hazard the naive graph is as good as ours."""
    write_gemma3(tmp_path / "checkpoint", {})
    export(tmp_path / "checkpoint", tmp_path / "fp32")
    expected = logits_of(tmp_path / "fp32")
    assert np.abs(naive_logits(tmp_path / "fp32") - expected).max() < 0.05


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_float16_loses_no_more_than_rounding(family, tmp_path):
    getattr(tiny, f"write_{family}")(tmp_path / "checkpoint")
    for precision, target in (("fp32", "cpu"), ("fp16", "cuda")):
        export(tmp_path / "checkpoint", tmp_path / precision, ExportOptions(precision=precision, target=target))
    expected, found = logits_of(tmp_path / "fp32"), logits_of(tmp_path / "fp16")
    assert np.abs(found - expected).max() < 0.01 * np.ptp(expected)
    graph = ir.load(tmp_path / "fp16" / "decoder.onnx").graph
    states = [value for value in graph.inputs if value.name and value.name.startswith("past.")]
    assert states
    assert all(value.dtype == ir.DataType.FLOAT16 for value in states)


_SQUARES = ("LayerNormalization", "Pow", "Sqrt", "ReduceMean", "ReduceSum", "ReduceL2", "Reciprocal")
_WRITERS = {**vars(tiny), **vars(tiny_siglip), **vars(tiny_gemma4_audio), **vars(tiny_gemma4_large)}


@pytest.mark.parametrize(
    "family",
    ["gemma3", "gemma3_vision", "gemma4_audio", "gemma4_dense", "gemma4_experts", "gemma4_unified", "paligemma"],
)
def test_no_sum_of_squares_is_in_float16(family, tmp_path):
    """Cases 15 and 18: the input of every norm, with a weight or without, is float32 in every graph of every family."""
    _WRITERS[f"write_{family}"](tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "fp16", ExportOptions(precision="fp16", target="cuda"))
    norms = 0
    for path in (tmp_path / "fp16").glob("*.onnx"):
        for node in ir.load(path).graph.all_nodes():
            if any(name in node.op_type for name in _SQUARES):
                assert node.inputs[0].dtype != ir.DataType.FLOAT16, (path.name, node.name)
                norms += "LayerNormalization" in node.op_type
    assert norms >= 8


def test_patches_of_extreme_contrast_stay_finite(tmp_path):
    """Case 6: a product over the 6,912 values of a patch of 48 x 48 pixels, all of them black or white. Half of its
    outputs see exactly this pattern: 6,912 products of one sign, whose sum is beyond float16."""
    tiny_gemma4_large.write_gemma4_unified(tmp_path / "checkpoint")
    board = np.repeat((np.indices((384, 384)).sum(axis=0) % 2 * 255)[:, :, None], 3, axis=2).astype(np.uint8)
    pattern = np.float32(board[:48, :48].reshape(-1) / 127.5 - 1)
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    [name] = [name for name in tensors if name.endswith("vision_embedder.patch_dense.weight")]
    tensors[name][::2] = pattern * np.linspace(-30, 30, len(tensors[name][::2]), dtype=np.float32)[:, None]
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    for precision, target in (("fp32", "cpu"), ("fp16", "cuda")):
        export(tmp_path / "checkpoint", tmp_path / precision, ExportOptions(precision=precision, target=target))
    runtimes = [Runtime(Bundle.open(tmp_path / name), device="cpu", foreign=True) for name in ("fp32", "fp16")]
    facts = runtimes[0].manifest.image
    assert facts is not None
    policy = POLICIES[facts.policy]
    assert policy.prepare(board, facts, 70).values.std() == 127.5  # it has its size: nothing was resampled
    assert np.abs(pattern @ tensors[name].T).max() > 2 * float(np.finfo(np.float16).max)
    for picture in (board, 255 - board, np.zeros_like(board), np.full_like(board, 255)):
        patches = policy.prepare(picture, facts, 70)
        tokens = policy.layout(*picture.shape[:2], facts, 70).soft_tokens
        expected, found = (runtime.encode(patches.values, patches.positions, tokens) for runtime in runtimes)
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_float16_bundle_is_refused_on_a_cpu(tmp_path):
    tiny.write_gemma3(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="fp16", target="cuda"))
    with pytest.raises(DeviceError, match="cuda"):
        Runtime(Bundle.open(tmp_path / "bundle"))
    with pytest.raises(ExportError, match="fp16"):
        export(tmp_path / "checkpoint", tmp_path / "other", ExportOptions(precision="fp16"))


def test_weights_beyond_float16_are_refused(tmp_path):
    write_gemma3(tmp_path / "checkpoint", {"down_proj.weight": 1e7})
    with pytest.raises(ExportError, match=r"down_proj.*float16"):
        export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="fp16", target="cuda"))
    assert not (tmp_path / "bundle").exists()
