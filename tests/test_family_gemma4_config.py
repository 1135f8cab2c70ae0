"""Configurations of Gemma 4: what sparse ones mean, older and newer keys, refusals before a weight is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine import Bundle, Engine
from siglance.engine.errors import ExportError
from siglance.export.exporter import export
from siglance.export.families import find_family
from siglance.export.official import OFFICIAL

from . import tiny, tiny_gemma4_large

SLIDING, FULL = "sliding_attention", "full_attention"


def read(config):
    return find_family(config).read(config)


# name: (D, layers, query heads, key/value heads in windows and in global layers, MLP, window, context, period)
SIZES = {
    "google/gemma-4-E2B-it": (1536, 35, 8, 1, 1, 6144, 512, 131072, 5),
    "google/gemma-4-E4B-it": (2560, 42, 8, 2, 2, 10240, 512, 131072, 6),
    "google/gemma-4-12B-it": (3840, 48, 16, 8, 1, 15360, 1024, 262144, 6),
    "google/gemma-4-26B-A4B-it": (2816, 30, 16, 8, 2, 2112, 1024, 262144, 6),
    "google/gemma-4-31B-it": (5376, 60, 32, 16, 4, 21504, 1024, 262144, 6),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    config = read(OFFICIAL[name])
    hidden, count, heads, windowed_heads, global_heads, mlp, window, context, period = SIZES[name]
    text = config.text
    assert (text.hidden, len(text.layers), text.heads, text.window, text.context) == (
        *(hidden, count, heads, window, context),
    )
    large = hidden != 1536 and hidden != 2560
    for index, layer in enumerate(text.layers):
        everywhere = (index + 1) % period == 0
        assert layer.windowed == (not everywhere)
        assert layer.head_size == (512 if everywhere else 256)
        assert layer.key_value_heads == (global_heads if everywhere else windowed_heads)
        assert layer.value_is_key == (everywhere and large)
        assert layer.intermediate == mlp * (2 if not layer.owns_state and "E2B" in name else 1)
    assert text.owners == {"google/gemma-4-E2B-it": 15, "google/gemma-4-E4B-it": 24}.get(name, count)
    assert text.image_blocks == large
    experts = text.experts and (text.experts.count, text.experts.used, text.experts.intermediate)
    assert experts == ((128, 8, 704) if "26B" in name else None)
    assert (text.local_theta, text.global_theta, text.global_partial, text.soft_cap) == (1e4, 1e6, 0.25, 30.0)


def test_the_12b_needs_next_to_nothing_said():
    """Defaults of Gemma4UnifiedConfig: window, context, pictures that see themselves, rotary positions, patches."""
    config = read({"model_type": "gemma4_unified", "text_config": {}, "vision_config": {}, "audio_config": {}})
    text = config.text
    assert (text.window, text.context, text.per_layer, text.image_blocks) == (1024, 262144, 0, True)
    assert (text.local_theta, text.global_theta, text.global_partial) == (1e4, 1e6, 0.25)
    assert [layer.windowed for layer in text.layers] == [True, True, True, True, True, False] * 5
    assert (config.vision.hidden, config.vision.patch, config.vision.pool, config.vision.table) == (3840, 16, 3, 1120)
    assert config.has_audio
    assert config.media_ids == {"image": 258880, "video": 258884, "audio": 258881}


def test_defaults_of_gemma4_are_others():
    text = read({"model_type": "gemma4", "text_config": {}, "vision_config": None}).text
    assert (text.window, text.context, text.per_layer, text.image_blocks) == (512, 131072, 256, False)
    assert (text.hidden, text.heads, text.layers[0].intermediate, text.soft_cap) == (2304, 8, 9216, None)
    assert not any(layer.value_is_key for layer in text.layers)


@pytest.mark.parametrize("shared", [True, False])
def test_older_and_newer_keys_of_global_layers_mean_the_same(shared):
    """The number of global key/value heads counts only where values are keys."""
    base = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL], "attention_k_eq_v": shared}
    older = base | {"global_head_dim": 128, "num_global_key_value_heads": 2}
    own = {"head_dim": 128} | ({"num_key_value_heads": 2} if shared else {})
    newer = base | {"per_layer_config": {"1": own, "03": own}}
    texts = [read({"model_type": "gemma4", "text_config": text}).text for text in (older, newer)]
    assert texts[0] == texts[1]
    assert texts[0].layers[1].key_value_heads == (2 if shared else 4)


def test_per_layer_values_win_over_older_keys():
    text = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "per_layer_config": {}, "global_head_dim": 128}
    assert [layer.head_size for layer in read({"model_type": "gemma4", "text_config": text}).text.layers] == [256, 256]


def test_the_last_layer_is_global_whatever_the_list_says():
    text = {"num_hidden_layers": 2, "layer_types": [SLIDING, SLIDING]}
    assert not read({"model_type": "gemma4", "text_config": text}).text.layers[1].windowed


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_unified"])
def test_a_decoder_alone_has_no_pictures_and_windows_of_its_own(kind):
    text = {"num_hidden_layers": 2, "use_bidirectional_attention": "vision", "attention_k_eq_v": True}
    config = read({"model_type": f"{kind}_text", **text})
    assert config.vision is None
    assert not config.text.image_blocks


# --- refusals

WRONG_TEXT = [
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ({"num_kv_shared_layers": 2}, r"num_kv_shared_layers = 2 is not supported beside use_bidirectional_attention"),
    ({"num_kv_shared_layers": 5}, "num_kv_shared_layers = 5 of 5 layers"),
    ({"layer_types": [SLIDING] * 4}, "layer_types must have 5"),
    ({"layer_types": [SLIDING] * 4 + ["chunked_attention"]}, "chunked_attention"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value_heads = 3"),
    ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
    ({"head_dim": "16"}, "head_dim = '16' has the wrong type"),
    ({"rope_parameters": {SLIDING: {"rope_type": "yarn"}, FULL: {}}}, "sliding_attention: rope_type = 'yarn'"),
    ({"rope_parameters": {SLIDING: {}, FULL: {"rope_type": "linear", "factor": 8.0}}}, "rope_type = 'linear'"),
    ({"rope_parameters": {SLIDING: {}, FULL: {"factor": 2.0}}}, "full_attention: factor = 2.0"),
    ({"rope_parameters": {SLIDING: {}}}, "rope_parameters has no 'full_attention'"),
    ({"per_layer_config": {"9": {"head_dim": 32}}}, "'9' is not the number of one of the 5 layers"),
    ({"per_layer_config": {"first": {"head_dim": 32}}}, "'first' is not the number"),
    ({"per_layer_config": {"2": {"sliding_window": 4}}}, "per_layer_config: 2: 'sliding_window' cannot differ"),
    ({"per_layer_config": {"2": {"head_dim": 32}}}, "head_dim must be the same in all full_attention layers"),
    ({"per_layer_config": {"2": 32}}, "2 = 32 has the wrong type"),
]
WRONG_EXPERTS = [
    ({"top_k_experts": None}, "has no 'top_k_experts'"),
    ({"top_k_experts": 9}, "top_k_experts = 9 must be from 1 to num_experts = 8"),
    ({"top_k_experts": 0}, "top_k_experts = 0"),
    ({"num_experts": None}, "has no 'num_experts'"),
]
WRONG_UNIFIED = [
    ({"enable_moe_block": True}, "enable_moe_block = True"),
    ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256"),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        *(("dense", *case) for case in WRONG_TEXT),
        *(("experts", *case) for case in WRONG_EXPERTS),
        *(("unified", *case) for case in WRONG_UNIFIED),
    ],
)
def test_unsupported_values_are_refused_by_name_before_weights_are_read(family, changes, message, tmp_path):
    folder = tmp_path / "checkpoint"
    config = getattr(tiny_gemma4_large, f"write_gemma4_{family}")(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | changes}))
    with pytest.raises(ExportError, match=message) as error:
        export(folder, tmp_path / "bundle")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("dense", {"num_key_value_heads": 1}, "vision_config: num_key_value_heads = 1"),
        ("dense", {"rope_parameters": {"rope_type": "linear"}}, "rope_type = 'linear'"),
        ("dense", {"rms_norm_eps": 1e-5}, "vision_config: rms_norm_eps"),
        ("unified", {"output_proj_dims": 64}, "output_proj_dims = 64"),
    ],
)
def test_unsupported_vision_is_refused_by_name(family, changes, message, tmp_path):
    config = getattr(tiny_gemma4_large, f"write_gemma4_{family}")(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=message):
        read(config | {"vision_config": config["vision_config"] | changes})


def test_a_processor_that_cuts_other_patches_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    tiny_gemma4_large.write_gemma4_unified(folder)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["patch_size"] = 14
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ExportError, match="patch_size = 14"):
        export(folder, tmp_path / "bundle")


def test_budgets_are_those_of_the_processor(tmp_path):
    """Cases 8 and 47: a default is read and not known by heart, and has to be one that the tower is made for."""
    folder = tmp_path / "checkpoint"
    tiny.write_gemma4(folder)
    path = folder / "processor_config.json"
    facts = json.loads(path.read_text())
    for default in (280, 560):
        facts["image_processor"] = facts.get("image_processor", {}) | {"max_soft_tokens": default}
        path.write_text(json.dumps(facts))
        export(folder, tmp_path / str(default))
        image = Bundle.open(tmp_path / str(default)).manifest.image
        assert (image.default_budget, image.budgets) == (default, (70, 140, 280, 560, 1120))
        with Engine.open(tmp_path / str(default), threads=1) as engine:
            counts = engine.count_tokens([np.zeros((512, 512, 3), np.uint8), "what?"])
        assert counts["image"] == {280: 256, 560: 529}[default]
    facts["image_processor"]["max_soft_tokens"] = 300
    path.write_text(json.dumps(facts))
    with pytest.raises(ExportError, match="max_soft_tokens 300 is not one of the budgets"):
        export(folder, tmp_path / "300")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.language_model.layers.0.experts.gate_up_proj", (8, 64), r"experts.gate_up_proj.*\[8, 64\]"),
        ("model.language_model.layers.2.self_attn.v_proj.weight", (32, 64), "does not use.*layers.2.self_attn.v_proj"),
    ],
)
def test_tensors_of_another_shape_or_too_many(name, shape, message, tmp_path):
    folder = tmp_path / "checkpoint"
    tiny_gemma4_large.write_gemma4_experts(folder, vision=False)
    tensors = load_file(folder / "model.safetensors") | {name: np.zeros(shape, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ExportError, match=message):
        export(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
