"""Checkpoints as people have them: saved by other tools and older versions, half downloaded, or not a model at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.engine.runtime import Runtime
from siglance.export.exporter import export
from siglance.export.families import ExportOptions, find_family
from siglance.export.sources import open_source

from . import tiny
from .tiny_gguf import write_gguf

IDS = np.arange(100, 124)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 1072419256\n"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "google/gemma-3-270m-it"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.write_gemma3(folder, query_pre_attn_scalar=16)
    return folder


@pytest.fixture
def source(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(scope="module")
def expected(original, tmp_path_factory):
    return logits(original, tmp_path_factory.mktemp("expected"))


def logits(source: Path, tmp_path: Path) -> np.ndarray:
    export(source, tmp_path / "bundle", ExportOptions(context=256))
    return Runtime(Bundle.open(tmp_path / "bundle")).session().prefill(IDS)


def refused(source: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as error:
        export(source, tmp_path / "new" / "bundle", ExportOptions(context=256, **options))
    assert not (tmp_path / "new").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def change_json(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values))


def change_tensors(source: Path, change: Any) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | change(tensors), source / "model.safetensors")


# --- what is not a model, or not all of one


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_is_refused_by_name(source, tmp_path, has_config):
    """Fine-tuning leaves a folder of its own, often with the files of the tokenizer and the model's config.json."""
    (source / "model.safetensors").unlink()
    change_json(source / "adapter_config.json", **ADAPTER)
    save_file({"base_model.model.lora_A.weight": np.zeros((8, 64), np.float32)}, source / "adapter_model.safetensors")
    if not has_config:
        (source / "config.json").unlink()
    message = refused(source, tmp_path)
    assert "holds an adapter (LoRA) for 'google/gemma-3-270m-it', not a model" in message
    assert "merge" in message


def test_a_merged_model_beside_its_adapter(source, tmp_path, expected):
    change_json(source / "adapter_config.json", **ADAPTER)
    save_file({"base_model.model.lora_A.weight": np.zeros((8, 64), np.float32)}, source / "adapter_model.safetensors")
    np.testing.assert_array_equal(logits(source, tmp_path), expected)


def test_an_adapter_inside_the_weights(source, tmp_path):
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    change_tensors(source, lambda tensors: {name: np.zeros((8, 64), np.float32)})
    assert f"tensors of an adapter that is not merged, such as {name!r}" in refused(source, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pth"])
def test_pickled_weights_are_named_and_not_opened(source, tmp_path, name):
    (source / "model.safetensors").rename(source / name)
    message = refused(source, tmp_path)
    assert f"has its weights in {name}: only *.safetensors are read" in message


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_clone_without_its_large_files(source, tmp_path, name):
    """`git clone` without Git LFS leaves small texts in their places."""
    (source / name).write_text(POINTER)
    assert f"{name} is a pointer of Git LFS and not the file itself" in refused(source, tmp_path)


def test_a_gguf_file_that_is_a_pointer(tmp_path):
    (tmp_path / "a.gguf").write_text(POINTER)
    assert "a.gguf is a pointer of Git LFS" in refused(tmp_path / "a.gguf", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_checkpoint_instead_of_its_folder(source, tmp_path, name):
    assert f"{name} is one file of a checkpoint; name its folder" in refused(source / name, tmp_path)


def test_a_bundle_is_not_exported_again(original, tmp_path):
    export(original, tmp_path / "bundle", ExportOptions(context=256))
    assert "is a bundle already" in refused(tmp_path / "bundle", tmp_path)


def test_a_link_to_weights_that_are_gone(source, tmp_path):
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(source / "gone")
    message = refused(source, tmp_path)
    assert message.endswith("has no weights file 'model.safetensors'")


def test_without_a_tokenizer_json_the_way_to_one_is_named(source, tmp_path):
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    assert "--tokenizer" in refused(source, tmp_path)


# --- quantised by others


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "torchao"])
@pytest.mark.parametrize("section", [None, "text_config"])
def test_quantised_checkpoints_are_refused_by_method_before_weights_are_read(source, tmp_path, method, section):
    facts = {"quantization_config": {"quant_method": method, "bits": 4}}
    change_json(source / "config.json", **(facts if section is None else {section: facts}))
    (source / "model.safetensors").write_bytes(b"not even a header")
    assert f"the matrices are quantised by {method!r}" in refused(source, tmp_path)


def test_quantised_by_mlx(source, tmp_path):
    facts = {"group_size": 64, "bits": 4}
    change_json(source / "config.json", quantization=facts, quantization_config=facts)
    assert "the matrices are quantised by 'mlx'" in refused(source, tmp_path)


@pytest.mark.parametrize("facts", [None, {}, {"weights": {"num_bits": 4}}])
def test_plain_numbers_that_were_trained_for_quantisation(source, tmp_path, expected, facts):
    """Google's checkpoints of quantisation-aware training say so, and name no method."""
    change_json(source / "config.json", quantization_config=facts)
    np.testing.assert_array_equal(logits(source, tmp_path), expected)


# --- numbers


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "auto"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(source, tmp_path, precision, value):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        matrix = tensors[name].astype(ml_dtypes.bfloat16)
        matrix[3, 4] = value
        return {name: matrix}

    change_tensors(source, change)
    assert f"tensor '{name}' has values that are not finite" in refused(source, tmp_path, precision=precision)


def test_a_row_of_embeddings_that_is_not_finite_is_named_though_no_text_has_it(source, tmp_path):
    name = "model.embed_tokens.weight"

    def change(tensors):
        matrix = tensors[name].copy()
        matrix[-1, 4] = np.nan
        return {name: matrix}

    change_tensors(source, change)
    assert f"tensor '{name}' has values that are not finite" in refused(source, tmp_path, precision="int4")


def test_types_may_differ_from_tensor_to_tensor(source, tmp_path, expected):
    """What is stored in more than 32 bits is rounded, the rest widens without loss."""

    def change(tensors):
        return {
            name: value.astype([np.float32, np.float64][index % 2])
            for index, (name, value) in enumerate(tensors.items())
        }

    change_tensors(source, change)
    np.testing.assert_array_equal(logits(source, tmp_path), expected)


def test_buffers_of_older_versions_are_passed_over(source, tmp_path, expected):
    change_tensors(
        source,
        lambda tensors: {
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
            "model.rotary_emb_local.inv_freq": np.zeros(8, np.float32),
            "model.embed_tokens.embed_scale": np.array(8.0, np.float32),
            "vision_tower.vision_model.embeddings.position_ids": np.arange(16)[None],
        },
    )
    np.testing.assert_array_equal(logits(source, tmp_path), expected)


# --- config.json


def test_a_byte_order_mark(source, tmp_path, expected):
    path = source / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_array_equal(logits(source, tmp_path), expected)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "linear"}}, "rope_scaling has no 'factor'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": "8"}}, "factor = '8'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0.0 must be above 0"),
        ({"rope_parameters": None, "rope_scaling": ["linear"]}, "rope_scaling = ['linear'] has the wrong type"),
        ({"rope_parameters": None, "rope_theta": -1}, "rope_theta = -1.0 must be above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5}}, "rope_parameters has no 'sliding_attention'"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": float("nan")}}}, "rope_theta = nan must be finite"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "has no 'factor'"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern = 0 must be at least 1"),
        ({"sliding_window": None}, "sliding_window is null, but"),
        ({"sliding_window": 0}, "sliding_window = 0 must be at least 1"),
        ({"sliding_window": -1}, "sliding_window = -1 must be at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0 must be at least 1"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0.0 must be above 0"),
        ({"query_pre_attn_scalar": -4}, "query_pre_attn_scalar = -4.0 must be above 0"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0.0 must be above 0"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping = '30' has the wrong type"),
    ],
)
def test_values_that_no_model_has_are_refused_by_key(original, values, named):
    config = json.loads((original / "config.json").read_text()) | values
    with pytest.raises(ExportError) as error:
        find_family(config).read(config)
    assert named in str(error.value)


# --- chat templates, wherever the version of the day keeps them


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json", "tokenizer_config.json", "list"])
def test_every_place_of_a_chat_template(source, tmp_path, place):
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    value = named if place == "list" else template
    change_json(source / ("tokenizer_config.json" if place == "list" else place), chat_template=value)
    open_source(source).write_texts(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template


def test_the_file_of_its_own_goes_first(source, tmp_path):
    for name in ("chat_template.json", "tokenizer_config.json"):
        change_json(source / name, chat_template="another")
    open_source(source).write_texts(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


def test_several_templates_without_a_default(source, tmp_path):
    (source / "chat_template.jinja").unlink()
    change_json(source / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])
    assert "chat templates ['rag'], of which none is called 'default'" in refused(source, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_template_that_does_not_compile_is_refused_at_export(original, source, tmp_path, kind):
    """And not when somebody opens the bundle."""
    broken = "{% for message in messages %}{{ message }"
    if kind == "folder":
        (source / "chat_template.jinja").write_text(broken)
    else:
        source = write_gguf(
            original,
            tmp_path / "a.gguf",
            change=lambda metadata, _: metadata.update({"tokenizer.chat_template": broken}),
        )
    assert "the chat template does not compile" in refused(source, tmp_path)
