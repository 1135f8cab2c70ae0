"""PaliGemma and Gemma 3 with vision: what sparse configurations mean, what is refused, what the manifest says."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.engine.manifest import ImageFacts, PlaceholderFacts, PromptFacts
from siglance.export.exporter import export
from siglance.export.families import ExportOptions, find_family

from . import tiny_siglip

# --- what config.json leaves out

# The files of the hub say little more than this; sizes are those of facts published with the models.
SPARSE_TOWER = {
    "model_type": "siglip_vision_model",
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27},
    **{"patch_size": 14, "vision_use_head": False},
}


def sparse_paligemma(hidden: int, image_size: int | None, **text) -> dict:
    tower = SPARSE_TOWER | ({} if image_size is None else {"image_size": image_size})
    config = {"model_type": "paligemma", "image_token_index": 257152, "projection_dim": hidden, "eos_token_id": 1}
    return config | {"text_config": {"hidden_size": hidden, "vocab_size": 257216, **text}, "vision_config": tower}


def sparse_gemma3(hidden: int, layers: int, mlp: int, **text) -> dict:
    text |= {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    tower = SPARSE_TOWER | {"image_size": 896}
    return {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text, "vision_config": tower}


def gemma1() -> dict:
    return {"model_type": "gemma", "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18} | {
        "num_key_value_heads": 1
    }


def gemma2(layers: int, heads: int, key_value_heads: int, mlp: int, **more) -> dict:
    text = {"model_type": "gemma2", "num_hidden_layers": layers, "intermediate_size": mlp}
    return text | {"num_attention_heads": heads, "num_key_value_heads": key_value_heads} | more


# name: (config, (D, layers, query heads, key/value heads, head size, MLP, window, vocabulary, context, scale^-2, side))
PUBLISHED = {
    "paligemma 3B 224": (
        sparse_paligemma(2048, None, **gemma1()),
        (2048, 18, 8, 1, 256, 16384, None, 257216, 8192, 256, 16),
    ),
    "paligemma 3B 896": (
        sparse_paligemma(2048, 896, **gemma1()),
        (2048, 18, 8, 1, 256, 16384, None, 257216, 8192, 256, 64),
    ),
    "paligemma2 3B 448": (
        sparse_paligemma(2304, 448, **gemma2(26, 8, 4, 9216)),
        (2304, 26, 8, 4, 256, 9216, 4096, 257216, 8192, 256, 32),
    ),
    "paligemma2 10B 224": (
        sparse_paligemma(3584, 224, **gemma2(42, 16, 8, 14336)),
        (3584, 42, 16, 8, 256, 14336, 4096, 257216, 8192, 256, 16),
    ),
    "paligemma2 28B 896": (
        sparse_paligemma(4608, 896, **gemma2(46, 32, 16, 36864, head_dim=128, query_pre_attn_scalar=144)),
        (4608, 46, 32, 16, 128, 36864, 4096, 257216, 8192, 144, 64),
    ),
    "gemma3 4B": (sparse_gemma3(2560, 34, 10240), (2560, 34, 8, 4, 256, 10240, 1024, 262208, 131072, 256, 64)),
    "gemma3 12B": (
        sparse_gemma3(3840, 48, 15360, num_attention_heads=16, num_key_value_heads=8),
        (3840, 48, 16, 8, 256, 15360, 1024, 262208, 131072, 256, 64),
    ),
    "gemma3 27B": (
        sparse_gemma3(5376, 62, 21504)
        | {
            "text_config": sparse_gemma3(5376, 62, 21504)["text_config"]
            | {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168}
        },
        (5376, 62, 32, 16, 128, 21504, 1024, 262208, 131072, 168, 64),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sparse_configurations_are_the_published_models(name):
    values, expected = PUBLISHED[name]
    config = find_family(values).read(values)
    text = config.text if "paligemma" in name else config
    found = (text.hidden, text.layers, text.heads, text.key_value_heads, text.head_size, text.intermediate)
    found += (text.window, text.vocabulary, text.context, round(text.scale**-2), config.vision.side)
    assert found == expected
    assert (config.vision.hidden, config.vision.layers, config.vision.head_size) == (1152, 27, 72)
    assert text.tied


def test_what_sparse_configurations_say_about_layers():
    read = {name: find_family(values).read(values) for name, (values, _) in PUBLISHED.items()}
    second = read["paligemma2 3B 448"].text
    assert second.windowed == (True, False) * 13
    assert (second.attention_cap, second.logits_cap, second.theta) == (50.0, 30.0, 10_000.0)
    first = read["paligemma 3B 224"].text
    assert not any(first.windowed)
    assert (first.attention_cap, first.logits_cap, first.sandwich) == (None, None, False)
    for name, last in (("gemma3 4B", 29), ("gemma3 12B", 47), ("gemma3 27B", 59)):
        config = read[name]
        assert [index for index, windowed in enumerate(config.windowed) if not windowed] == list(range(5, last + 1, 6))
        assert (config.local_rope.theta, config.local_rope.linear_factor) == (10_000.0, 1.0)
        assert (config.global_rope.theta, config.global_rope.linear_factor) == (1_000_000.0, 8.0)
        assert config.pool == 4


def test_soft_caps_that_a_file_says_are_null_are_off():
    values = sparse_paligemma(2304, 448, **gemma2(26, 8, 4, 9216, attn_logit_softcapping=None))
    text = find_family(values).read(values).text
    assert (text.attention_cap, text.logits_cap) == (None, 30.0)


def test_without_sections_the_defaults_of_the_classes_hold():
    values = {"model_type": "paligemma"}
    config = find_family(values).read(values)
    assert (config.text.hidden, config.text.layers, config.text.vocabulary) == (2048, 18, 257152)
    assert (config.vision.hidden, config.vision.layers, config.vision.side) == (1152, 27, 16)


# --- what is refused, before a weight is read


@pytest.mark.parametrize(
    ("name", "section", "change", "named"),
    [
        ("paligemma 3B 224", "text_config", {"model_type": "llama"}, r"'llama'.*'gemma', 'gemma2'"),
        ("paligemma 3B 224", "vision_config", {"vision_use_head": True}, "vision_use_head"),
        ("paligemma 3B 224", "vision_config", {"model_type": "clip_vision_model"}, "siglip_vision_model"),
        ("paligemma 3B 224", "vision_config", {"hidden_act": "gelu"}, "hidden_act"),
        ("paligemma 3B 224", "vision_config", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ("paligemma 3B 224", "vision_config", {"image_size": 225}, "image_size = 225 is not a multiple of 14"),
        ("paligemma 3B 224", "vision_config", {"patch_size": 0}, "patch_size|image_size"),
        ("paligemma 3B 224", "vision_config", {"num_channels": 1}, "num_channels"),
        ("paligemma 3B 224", None, {"projection_dim": 1024}, "projection_dim"),
        ("paligemma 3B 224", None, {"projector_type": "mlp2x_gelu"}, r"projector_type.*'linear'"),
        ("paligemma 3B 224", None, {"text_config": ["gemma"]}, "text_config"),
        ("paligemma2 3B 448", "text_config", {"layer_types": ["full_attention"]}, "layer_types"),
        ("paligemma2 3B 448", "text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ("paligemma2 3B 448", "text_config", {"attention_bias": True}, "attention_bias"),
        ("gemma3 4B", "text_config", {"model_type": "gemma2"}, "gemma3_text"),
        ("gemma3 4B", "text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3 4B", "text_config", {"rope_scaling": {"rope_type": "yarn"}}, "text_config.*yarn"),
        ("gemma3 4B", "vision_config", {"vision_use_head": True}, "vision_use_head"),
        ("gemma3 4B", None, {"mm_tokens_per_image": 255}, "mm_tokens_per_image = 255"),
        ("gemma3 4B", None, {"mm_tokens_per_image": 9}, "64 x 64"),
        ("gemma3 4B", None, {"mm_tokens_per_image": -4}, "mm_tokens_per_image = -4"),
        ("gemma3 4B", None, {"projector_type": "linear"}, "projector_type"),
    ],
)
def test_configurations_that_are_not_supported(tmp_path, name, section, change, named):
    values, _ = PUBLISHED[name]
    values = values | (change if section is None else {section: values[section] | change})
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(values))
    (tmp_path / "source" / "model.safetensors").write_bytes(b"not even a header")
    with pytest.raises(ExportError, match=named):
        export(tmp_path / "source", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("preprocessor_config.json", {"size": {"height": 112, "width": 112}}, "size"),
        ("preprocessor_config.json", {"resample": 0}, r"resample = 0.*2, 3"),
        ("preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41]}, "image_mean"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ("processor_config.json", {"image_processor": "SiglipImageProcessor"}, "image_processor"),
        ("processor_config.json", {"image_processor": {"image_std": [1.0, 1.0, 1.0]}}, "image_std"),
    ],
)
def test_processors_that_are_not_supported(tmp_path, file, change, named):
    tiny_siglip.write_paligemma(tmp_path / "source", key_style="hub", num_hidden_layers=1)
    path = tmp_path / "source" / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    with pytest.raises(ExportError, match=named):
        export(tmp_path / "source", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_tensors_of_a_pooling_head_are_named(tmp_path):
    """A file with a head that config.json does not mention is not the model that the graphs compute."""
    tiny_siglip.write_paligemma(tmp_path / "source", num_hidden_layers=1)
    file = tmp_path / "source" / "model.safetensors"
    save_file(load_file(file) | {"vision_tower.head.probe": np.zeros((1, 1, 144), np.float32)}, file)
    with pytest.raises(ExportError, match=r"vision_tower\.head\.probe"):
        export(tmp_path / "source", tmp_path / "bundle")


# --- facts


def test_facts_of_paligemma(tiny_model):
    """Case 25: the layout, the stop token, and what the state costs."""
    model = tiny_model("paligemma", text="gemma2")
    manifest = model.bundle.manifest
    assert set(manifest.requires) == {
        *("state:global", "logit_rows:any", "attention:prefix", "image:squash", "prompt:media_first")
    }
    assert manifest.image == ImageFacts(
        policy="squash", patch_size=14, pool_size=1, budgets=(16,), default_budget=16, resample="bicubic"
    )
    image = PlaceholderFacts(item="<image>", before="", soft="<image>", after="")
    assert manifest.prompt == PromptFacts(begin="<bos>", layout="media_first", end="\n", image=image)
    assert (manifest.stop_ids, manifest.reply.boxes, manifest.sampling.temperature) == ((1,), "loc", 0.0)
    assert {pair.kind for pair in manifest.state} == {"global"}
    note, context = json.loads(model.bundle.path("export").read_text())["notes"]
    assert "the context is" in context
    # 4 layers with 2 heads of 16 keys and 16 values each, 4 bytes a number; every other layer has the window of 8.
    assert "1024 bytes a token" in note
    assert "512 of them in 2 layers whose window of 8 tokens" in note


def test_positions_of_paligemma_count_from_one(tiny_model):
    """Rotations are relative, so logits cannot tell; rounding can, and the tables say so themselves."""
    graph = ir.load(tiny_model("paligemma", text="gemma2").bundle.path("decoder")).graph
    frequencies = 10_000.0 ** (-np.arange(8) / 8)
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        table = graph.initializers[f"rope.global.{name}"].const_value.numpy()
        np.testing.assert_allclose(table[0], function(frequencies), atol=1e-6)
        np.testing.assert_allclose(table[-1], function(1024 * frequencies), atol=1e-6)


def test_facts_of_gemma3(tiny_model):
    model = tiny_model("gemma3_vision")
    manifest = model.bundle.manifest
    assert set(manifest.requires) == {"state:global", "logit_rows:any", "attention:image_blocks", "image:squash"}
    assert manifest.image.policy == "squash"
    assert (manifest.image.pool_size, manifest.image.budgets, manifest.image.resample) == (4, (9,), "bilinear")
    crops = manifest.image.pan_and_scan
    assert (crops.min_crop, crops.max_crops, crops.min_ratio) == (256, 4, 1.2)
    assert manifest.prompt.image.before == "\n\n<start_of_image>"
    assert manifest.reply.boxes == "none"
    assert {pair.kind for pair in manifest.state} == {"global"}
    assert json.loads(model.bundle.path("export").read_text())["notes"]


def test_text_only_gemma3_keeps_its_window_buffers(tiny_model):
    manifest = tiny_model("gemma3").bundle.manifest
    assert {pair.kind for pair in manifest.state} == {"global", "window"}
    assert "state:window" in manifest.requires


@pytest.mark.parametrize(("asked", "expected"), [(16384, 8192), (64, 64)])
def test_the_context_of_a_sparse_configuration_is_the_default_of_its_class(tmp_path, asked, expected):
    """Positions beyond it have no row in the rotary tables."""
    source = tmp_path / "source"
    tiny_siglip.write_paligemma(source, key_style="hub", num_hidden_layers=1)
    values = json.loads((source / "config.json").read_text())
    del values["text_config"]["max_position_embeddings"]
    (source / "config.json").write_text(json.dumps(values))
    export(source, tmp_path / "bundle", ExportOptions(context=asked))
    assert Bundle.open(tmp_path / "bundle").manifest.context == expected
    tables = ir.load(tmp_path / "bundle" / "decoder.onnx").graph.initializers
    assert tables["rope.global.cos"].shape == (expected, 8)


def test_without_end_of_sequence_ids_the_tokens_themselves_stop(tmp_path):
    source = tmp_path / "source"
    tiny_siglip.write_paligemma(source, key_style="hub", num_hidden_layers=1)
    values = json.loads((source / "config.json").read_text())
    del values["eos_token_id"]
    (source / "config.json").write_text(json.dumps(values))
    (source / "generation_config.json").unlink()
    export(source, tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.stop_ids == (1,)
