"""Random tiny checkpoints in the layout of the official ones, written without torch or transformers.

`write_gemma3` and `write_gemma4` fill a folder with everything an exporter reads: config.json, safetensors under the
official tensor names, generation_config.json, processor_config.json, tokenizer.json, tokenizer_config.json and
chat_template.jinja. The models are small but leave nothing out, and their numbers are chosen so that every mechanism
changes the logits: no norm weight is one, no layer scalar is one, clip bounds cut off a good part of the values, the
window is shorter than any sensible prompt. Logits reach about 5.

Token ids are not the official ones (the vocabulary has 512 entries); token texts are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from .tiny_tokenizer import GEMMA3_TEMPLATE, GEMMA3_TOKENS, GEMMA4_TEMPLATE, GEMMA4_TOKENS, write_tokenizer

Config = dict[str, Any]
Weights = dict[str, np.ndarray]

STORAGE = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class _RandomWeights:
    """Draws tensors under official names; every scale is stated where it is drawn."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: Weights = {}

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        """A [outputs, inputs] matrix that keeps the size of its input."""
        self.tensors[f"{name}.weight"] = self.rng.normal(0, inputs**-0.5, (outputs, inputs))

    def table(self, name: str, rows: int, width: int, scale: float) -> None:
        self.tensors[f"{name}.weight"] = self.rng.normal(0, scale, (rows, width))

    def uniform(self, name: str, shape: int | tuple[int, ...], low: float, high: float) -> None:
        self.tensors[name] = self.rng.uniform(low, high, shape)

    def norm(self, name: str, width: int, low: float = 0.5, high: float = 1.5, plus_one: bool = False) -> None:
        """Norm weights whose effective factor lies in [low, high]; Gemma 3 stores the factor minus one."""
        self.uniform(f"{name}.weight", width, low - plus_one, high - plus_one)


def write_gemma3(
    folder: Path | str,
    *,
    seed: int = 0,
    storage: str = "float32",
    shards: int = 1,
    key_style: str = "saved",
    **overrides: Any,
) -> Config:
    """Write a tiny `Gemma3ForCausalLM` (layout of the 270M and 1B models) into `folder`; return its config.json.

    `key_style` "saved" writes the configuration keys of transformers 5 (`layer_types`, `rope_parameters`), "hub" the
    older ones of the files on the hub (`sliding_window_pattern`, `rope_theta`, `rope_local_base_freq`,
    `rope_scaling`). `overrides` replace keys of the configuration; `sliding_window_pattern` and `rope_scaling`
    (of the global layers) are accepted in both styles.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _gemma3_config(storage, key_style, dict(overrides))
    ids = write_tokenizer(folder, GEMMA3_TOKENS, config["vocab_size"])
    weights = _gemma3_weights(config, seed)
    _write_checkpoint(folder, config, weights, storage, shards)
    (folder / "chat_template.jinja").write_text(GEMMA3_TEMPLATE, encoding="utf-8")
    _write_generation_config(folder, [1, ids["<end_of_turn>"]], cache_implementation="hybrid")
    return config


def _gemma3_config(storage: str, key_style: str, overrides: Config) -> Config:
    pattern = overrides.pop("sliding_window_pattern", 3)  # default: sliding, sliding, global, sliding
    rope_scaling = overrides.pop("rope_scaling", None)
    config: Config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **{"attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None},
        **{"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "dtype": storage, "final_logit_softcapping": None},
        **{"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 64, "initializer_range": 0.02},
        **{"intermediate_size": 96, "max_position_embeddings": 1024, "num_attention_heads": 4, "num_hidden_layers": 4},
        **{"num_key_value_heads": 1, "query_pre_attn_scalar": 20, "rms_norm_eps": 1e-6, "sliding_window": 8},
        **{"tie_word_embeddings": True, "transformers_version": "5.24.0", "use_bidirectional_attention": False},
        **{"use_cache": True, "vocab_size": 512},
    }
    layers = overrides.get("num_hidden_layers", config["num_hidden_layers"])
    if key_style == "hub":
        config |= {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": rope_scaling}
        config |= {"sliding_window_pattern": pattern}
    else:
        global_rope = {"rope_theta": 1_000_000.0, "rope_type": "default"} | (rope_scaling or {})
        local_rope = {"rope_theta": 10_000.0, "rope_type": "default"}
        config |= {"_sliding_window_pattern": pattern, "layer_types": _layer_types(layers, pattern)}
        config |= {"rope_parameters": {"full_attention": global_rope, "sliding_attention": local_rope}}
    return _override(config, overrides)


def _gemma3_weights(config: Config, seed: int) -> Weights:
    """Tensor names of a saved `Gemma3ForCausalLM`; norm weights are stored without their +1."""
    draw = _RandomWeights(seed)
    hidden, mlp, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    # 0.6 after the embedding scale: a tied head would otherwise repeat its input for ever
    draw.table("model.embed_tokens", config["vocab_size"], hidden, 0.6 * hidden**-0.5)
    if not config["tie_word_embeddings"]:
        draw.table("lm_head", config["vocab_size"], hidden, 0.6 * hidden**-0.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        _sandwich_norms(draw, prefix, hidden, plus_one=True)
        for name in ("q_norm", "k_norm"):  # factors above one: sharper attention, so that positions and windows matter
            draw.norm(f"{prefix}.self_attn.{name}", head_dim, 0.8, 2.0, plus_one=True)
        _attention(draw, f"{prefix}.self_attn", config, head_dim)
        _gated_mlp(draw, f"{prefix}.mlp", hidden, mlp)
    draw.norm("model.norm", hidden, 1.5, 3.5, plus_one=True)
    return draw.tensors


def write_gemma4(
    folder: Path | str,
    *,
    seed: int = 0,
    vision: bool = True,
    vision_overrides: Config | None = None,
    storage: str = "float32",
    shards: int = 1,
    dead_shared_kv: bool = False,
    key_style: str = "saved",
    **overrides: Any,
) -> Config:
    """Write a tiny `Gemma4ForConditionalGeneration` (layout of E2B and E4B) into `folder`; return its config.json.

    `dead_shared_kv` also writes the k_proj, v_proj and k_norm tensors that the layers without keys and values of
    their own have in the published files, where nothing reads them. `key_style` "saved" writes the per-layer head
    width as transformers 5.24 does (`per_layer_config`), "hub" as `global_head_dim`. `overrides` replace keys of
    text_config (`global_head_dim` is accepted in both styles), `vision_overrides` keys of vision_config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = _gemma4_text_config(storage, key_style, dict(overrides))
    ids = write_tokenizer(folder, GEMMA4_TOKENS, text["vocab_size"])
    config: Config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "audio_config": None,
        **{"boi_token_id": ids["<|image>"], "image_token_id": ids["<|image|>"], "eoi_token_id": ids["<image|>"]},
        **{"boa_token_id": ids["<|audio>"], "audio_token_id": ids["<|audio|>"], "eoa_token_index": ids["<audio|>"]},
        **{"video_token_id": ids["<|video|>"], "dtype": storage, "initializer_range": 0.02, "text_config": text},
        **{"tie_word_embeddings": True, "transformers_version": "5.24.0"},
        "vision_config": _gemma4_vision_config(storage, key_style, vision_overrides or {}) if vision else None,
    }
    weights = _gemma4_weights(config, seed, dead_shared_kv)
    _write_checkpoint(folder, config, weights, storage, shards)
    (folder / "chat_template.jinja").write_text(GEMMA4_TEMPLATE, encoding="utf-8")
    _write_generation_config(folder, [1, ids["<turn|>"], ids["<|tool_response>"]])
    if vision:
        _write_json(folder / "processor_config.json", _gemma4_processor_config(config["vision_config"]))
    return config


def _gemma4_text_config(storage: str, key_style: str, overrides: Config) -> Config:
    global_head_dim = overrides.pop("global_head_dim", 32)
    # E2B in small: three layers with keys and values of their own, then four that share those of layers 1 and 2
    sliding, full = "sliding_attention", "full_attention"
    layer_types = [sliding, sliding, full, sliding, full, sliding, full]
    global_rope = {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"}
    local_rope = {"rope_theta": 10_000.0, "rope_type": "default"}
    config: Config = {
        "model_type": "gemma4_text",
        **{"attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": False, "bos_token_id": 2},
        **{"enable_moe_block": False, "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 16},
        **{"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 64, "hidden_size_per_layer_input": 16},
        **{"initializer_range": 0.02, "intermediate_size": 96, "layer_types": layer_types},
        **{"max_position_embeddings": 1024, "moe_intermediate_size": None, "num_attention_heads": 4},
        **{"num_experts": None, "num_hidden_layers": 7, "num_key_value_heads": 1, "num_kv_shared_layers": 4},
        **{"pad_token_id": 0, "rms_norm_eps": 1e-6, "sliding_window": 8, "tie_word_embeddings": True},
        "rope_parameters": {"full_attention": global_rope, "sliding_attention": local_rope},
        **{"top_k_experts": None, "use_bidirectional_attention": None, "use_cache": True, "use_double_wide_mlp": True},
        **{"vocab_size": 512, "vocab_size_per_layer_input": overrides.get("vocab_size", 512)},
    }
    config = _override(config, overrides)
    if key_style == "hub":
        return config | {"dtype": storage, "global_head_dim": global_head_dim, "num_global_key_value_heads": None}
    full = [index for index, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    return config | {"per_layer_config": {str(index): {"head_dim": global_head_dim} for index in full}}


def _gemma4_vision_config(storage: str, key_style: str, overrides: Config) -> Config:
    config: Config = {
        "model_type": "gemma4_vision",
        **{"attention_bias": False, "attention_dropout": 0.0, "head_dim": 16, "hidden_size": 48},
        **{"hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "intermediate_size": 64},
        **{"max_position_embeddings": 131072, "num_attention_heads": 3, "num_hidden_layers": 2},
        **{"num_key_value_heads": 3, "patch_size": 16, "pooling_kernel_size": 3, "rms_norm_eps": 1e-6},
        # 10240 in the real models; 1024 covers every image at the default budget (largest index 3 * 280 - 1)
        **{"position_embedding_size": 1024, "standardize": False, "use_clipped_linears": True},
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default" if key_style == "hub" else "axial"},
    }
    return _override(config | ({"dtype": storage} if key_style == "hub" else {}), overrides)


def _gemma4_weights(config: Config, seed: int, dead_shared_kv: bool) -> Weights:
    """Tensor names of a saved `Gemma4ForConditionalGeneration`; norm weights are the factors themselves."""
    draw = _RandomWeights(seed)
    text, vision = config["text_config"], config["vision_config"]
    hidden, per_layer, prefix = text["hidden_size"], text["hidden_size_per_layer_input"], "model.language_model"
    layers = text["num_hidden_layers"]
    draw.table(f"{prefix}.embed_tokens", text["vocab_size"], hidden, 1.6 * hidden**-0.5)
    if per_layer:
        packed = layers * per_layer
        draw.table(f"{prefix}.embed_tokens_per_layer", text["vocab_size_per_layer_input"], packed, per_layer**-0.5)
        draw.linear(f"{prefix}.per_layer_model_projection", packed, hidden)
        draw.norm(f"{prefix}.per_layer_projection_norm", per_layer)
    for layer in range(layers):
        _gemma4_layer(draw, f"{prefix}.layers.{layer}", text, layer, dead_shared_kv)
    draw.norm(f"{prefix}.norm", hidden, 0.8, 1.6)
    if vision:
        _gemma4_vision_tower(draw, vision)
        draw.linear("model.embed_vision.embedding_projection", hidden, vision["hidden_size"])
    return draw.tensors


def _gemma4_layer(draw: _RandomWeights, prefix: str, text: Config, layer: int, dead_shared_kv: bool) -> None:
    hidden, per_layer = text["hidden_size"], text["hidden_size_per_layer_input"]
    overrides = text.get("per_layer_config", {}).get(str(layer), {})
    is_global = text["layer_types"][layer] == "full_attention"
    head_dim = overrides.get(
        "head_dim", text.get("global_head_dim", text["head_dim"]) if is_global else text["head_dim"]
    )
    is_sharer = layer >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
    _sandwich_norms(draw, prefix, hidden)
    own_kv = dead_shared_kv or not is_sharer
    for name in ("q_norm", "k_norm") if own_kv else ("q_norm",):
        # The attention scale is 1, so these factors carry it. Sharper attention would amplify rounding from layer to
        # layer until float32 runs disagree.
        draw.norm(f"{prefix}.self_attn.{name}", head_dim, 0.8 * head_dim**-0.25, 1.6 * head_dim**-0.25)
    _attention(draw, f"{prefix}.self_attn", text, head_dim, own_kv)
    wide = 2 if is_sharer and text["use_double_wide_mlp"] else 1
    _gated_mlp(draw, f"{prefix}.mlp", hidden, wide * text["intermediate_size"])
    if per_layer:
        draw.linear(f"{prefix}.per_layer_input_gate", per_layer, hidden)
        draw.linear(f"{prefix}.per_layer_projection", hidden, per_layer)
        draw.norm(f"{prefix}.post_per_layer_input_norm", hidden)
    draw.uniform(f"{prefix}.layer_scalar", (1,), 0.6, 0.95)


def _gemma4_vision_tower(draw: _RandomWeights, vision: Config) -> None:
    hidden, mlp, head_dim = vision["hidden_size"], vision["intermediate_size"], vision["head_dim"]
    tower = "model.vision_tower"
    draw.linear(f"{tower}.patch_embedder.input_proj", hidden, 3 * vision["patch_size"] ** 2)
    shape = (2, vision["position_embedding_size"], hidden)
    draw.tensors[f"{tower}.patch_embedder.position_embedding_table"] = draw.rng.normal(0, 0.5, shape)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        _sandwich_norms(draw, prefix, hidden)
        for name in ("q_norm", "k_norm"):
            draw.norm(f"{prefix}.self_attn.{name}", head_dim, 0.8 * head_dim**-0.25, 1.6 * head_dim**-0.25)
        _attention(draw, f"{prefix}.self_attn", vision, head_dim, suffix=".linear")
        _gated_mlp(draw, f"{prefix}.mlp", hidden, mlp, suffix=".linear")
        if vision["use_clipped_linears"]:
            _clip_bounds(draw, prefix)
    if vision["standardize"]:
        draw.uniform(f"{tower}.std_bias", hidden, -2.0, 2.0)
        draw.uniform(f"{tower}.std_scale", hidden, 0.2, 0.5)


def _sandwich_norms(draw: _RandomWeights, prefix: str, hidden: int, plus_one: bool = False) -> None:
    """Norms before and after attention and MLP; the ones after are strong, so that layers outweigh the embedding."""
    for name in ("input_layernorm", "pre_feedforward_layernorm"):
        draw.norm(f"{prefix}.{name}", hidden, plus_one=plus_one)
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        draw.norm(f"{prefix}.{name}", hidden, 1.0, 2.5, plus_one=plus_one)


def _attention(
    draw: _RandomWeights, prefix: str, config: Config, head_dim: int, own_kv: bool = True, suffix: str = ""
) -> None:
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    draw.linear(f"{prefix}.q_proj{suffix}", heads * head_dim, hidden)
    for name in ("k_proj", "v_proj") if own_kv else ():
        draw.linear(f"{prefix}.{name}{suffix}", kv_heads * head_dim, hidden)
    draw.linear(f"{prefix}.o_proj{suffix}", hidden, heads * head_dim)


def _gated_mlp(draw: _RandomWeights, prefix: str, hidden: int, mlp: int, suffix: str = "") -> None:
    draw.linear(f"{prefix}.gate_proj{suffix}", mlp, hidden)
    draw.linear(f"{prefix}.up_proj{suffix}", mlp, hidden)
    draw.linear(f"{prefix}.down_proj{suffix}", hidden, mlp)


def _clip_bounds(draw: _RandomWeights, prefix: str) -> None:
    """Bounds near one standard deviation, not symmetric; q, k and v read one tensor, as do gate and up."""
    groups = (("self_attn", ("q_proj",)), ("self_attn", ("k_proj", "v_proj")), ("self_attn", ("o_proj",)))
    for module, names in (*groups, ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",))):
        small = 0.4 if names[0] in ("o_proj", "down_proj") else 1.0  # the inputs of these are averages and products
        ends = {
            "input_min": (-1.6, -0.8),
            "input_max": (0.8, 1.6),
            "output_min": (-1.5, -0.7),
            "output_max": (0.7, 1.5),
        }
        for end, (low, high) in ends.items():
            bound = draw.rng.uniform(small * low, small * high)
            for name in names:
                draw.tensors[f"{prefix}.{module}.{name}.{end}"] = np.float64(bound).reshape(())


def _gemma4_processor_config(vision: Config) -> Config:
    image_processor = {
        "image_processor_type": "Gemma4ImageProcessor",
        **{"do_convert_rgb": True, "do_normalize": False, "do_rescale": True, "do_resize": True},
        **{"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "max_soft_tokens": 280},
        **{"patch_size": vision["patch_size"], "pooling_kernel_size": vision["pooling_kernel_size"]},
        **{"resample": 3, "rescale_factor": 1 / 255},
    }
    processor = {"processor_class": "Gemma4Processor", "image_seq_length": 280, "image_processor": image_processor}
    return processor | {"audio_seq_length": 750, "audio_ms_per_token": 40}


def _layer_types(layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th layer is global."""
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]


def _override(config: Config, overrides: Config) -> Config:
    if unknown := overrides.keys() - config.keys():
        raise ValueError(f"no such configuration keys: {', '.join(sorted(unknown))}")
    return config | overrides


def _write_generation_config(folder: Path, eos: list[int], **more: Any) -> None:
    facts = {"bos_token_id": 2, "do_sample": True, "eos_token_id": eos, "pad_token_id": 0, "temperature": 1.0}
    facts |= {"top_k": 64, "top_p": 0.95, "transformers_version": "5.24.0"}
    _write_json(folder / "generation_config.json", facts | more)


def _write_checkpoint(folder: Path, config: Config, weights: Weights, storage: str, shards: int) -> None:
    """config.json and the tensors, in one file or in `shards` files with an index."""
    _write_json(folder / "config.json", config)
    stored = {name: np.asarray(value, STORAGE[storage], order="C") for name, value in sorted(weights.items())}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in list(stored)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    totals = {"total_parameters": sum(value.size for value in stored.values())}
    totals |= {"total_size": sum(value.nbytes for value in stored.values())}
    _write_json(folder / "model.safetensors.index.json", {"metadata": totals, "weight_map": weight_map})


def _write_json(path: Path, value: Config) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
