"""Random tiny checkpoints of the large Gemma 4 sizes: 31B (dense), 26B-A4B (experts) and 12B (unified).

Like those of `tiny.py` they leave nothing out, and every mechanism changes the logits: global layers whose values are
their keys, with a number of key/value heads of their own; soft tokens that see each other in windowed layers; a window
much shorter than any picture; routers whose scores differ, and experts with scales of their own.

`key_style` "saved" writes the configuration as transformers 5.24 does, "hub" as the published files do: sparse, with
`global_head_dim` and `num_global_key_value_heads`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import tiny
from .tiny import Config, Weights
from .tiny_tokenizer import GEMMA4_TEMPLATE, GEMMA4_TOKENS, write_tokenizer

SLIDING, FULL = "sliding_attention", "full_attention"
GLOBAL = {"head_dim": 32, "num_key_value_heads": 1}  # of global layers; windowed ones have 16 and 2

# What config.json on the hub does not say, because it is the default of transformers' classes.
_UNSAID = {
    *("attention_bias", "attention_dropout", "hidden_activation", "initializer_range", "rope_parameters", "use_cache"),
    *("rms_norm_eps", "tie_word_embeddings", "num_kv_shared_layers", "use_double_wide_mlp", "pad_token_id"),
    *("bos_token_id", "eos_token_id"),
}
_UNSAID_UNIFIED = _UNSAID | {"use_bidirectional_attention"}
# Module names of transformers 5.24 -> names in the published files of the 12B.
_PUBLISHED = {
    "model.embed_vision.multimodal_embedder.": "model.embed_vision.",
    "model.embed_vision.": "model.vision_embedder.",
}


def write_gemma4_dense(
    folder: Path | str,
    *,
    seed: int = 0,
    vision: bool = True,
    vision_overrides: Config | None = None,
    storage: str = "float32",
    shards: int = 1,
    key_style: str = "saved",
    **overrides: Any,
) -> Config:
    """Write a tiny 31B (`Gemma4ForConditionalGeneration`) into `folder`; return its config.json.

    `overrides` replace keys of text_config, `vision_overrides` keys of vision_config.
    """
    folder = Path(folder)
    text = _text_config(_GEMMA4 | {"model_type": "gemma4_text"}, key_style, overrides)
    tower = tiny._gemma4_vision_config(
        storage, key_style, {"standardize": True, "use_clipped_linears": False} | (vision_overrides or {})
    )
    config, ids = _config(folder, "gemma4", text, tower if vision else None, storage)
    draw = _decoder_weights(text, seed)
    if vision:
        tiny._gemma4_vision_tower(draw, tower)
        draw.linear("model.embed_vision.embedding_projection", text["hidden_size"], tower["hidden_size"])
    _write(folder, config, draw.tensors, ids, storage, shards)
    return config


def write_gemma4_experts(folder: Path | str, **arguments: Any) -> Config:
    """Write a tiny 26B-A4B, with 8 experts of which a token uses 3; arguments as those of `write_gemma4_dense`."""
    experts = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 32}
    return write_gemma4_dense(folder, **experts | arguments)


def write_gemma4_unified(
    folder: Path | str,
    *,
    seed: int = 0,
    storage: str = "float32",
    shards: int = 1,
    key_style: str = "saved",
    names: str = "published",
    audio: bool = True,
    **overrides: Any,
) -> Config:
    """Write a tiny 12B (`Gemma4UnifiedForConditionalGeneration`) into `folder`; return its config.json.

    `names` "published" are those of the files (transformers saves them too), "modules" those inside transformers 5.24.
    """
    folder = Path(folder)
    text = _text_config({"model_type": "gemma4_unified_text"}, key_style, overrides)
    embedder: Config = {
        "model_type": "gemma4_unified_vision",
        **{"initializer_range": 0.02, "mm_embed_dim": 48, "mm_posemb_size": 1120, "output_proj_dims": 48},
        **{"patch_size": 16, "pooling_kernel_size": 3, "rms_norm_eps": 1e-6},
    }
    if key_style == "hub":
        embedder = {key: embedder[key] for key in ("model_type", "mm_embed_dim", "output_proj_dims")}
    config, ids = _config(folder, "gemma4_unified", text, embedder, storage)
    draw = _decoder_weights(text, seed)
    _embedder_weights(draw, text["hidden_size"], 48)
    if audio:
        config["audio_config"] = {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640}
        draw.linear("model.embed_audio.embedding_projection", text["hidden_size"], 640)
    weights = draw.tensors if names == "modules" else {published(name): value for name, value in draw.tensors.items()}
    _write(folder, config, weights, ids, storage, shards)
    return config


# --- configurations

_GEMMA4: Config = {  # keys of Gemma4TextConfig that Gemma4UnifiedTextConfig does not have
    **{"enable_moe_block": False, "hidden_size_per_layer_input": 0, "moe_intermediate_size": None},
    **{"num_experts": None, "top_k_experts": None, "vocab_size_per_layer_input": 512},
}


def _text_config(more: Config, key_style: str, overrides: Config) -> Config:
    layer_types = [SLIDING, SLIDING, FULL, SLIDING, FULL]
    global_rope = {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"}
    config: Config = {
        **{"attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": True, "bos_token_id": 2},
        **{"eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 16, "hidden_size": 64},
        **{"hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "intermediate_size": 96},
        **{"layer_types": layer_types, "max_position_embeddings": 1024, "num_attention_heads": 4},
        **{"num_hidden_layers": 5, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "pad_token_id": 0},
        "per_layer_config": None,
        "rope_parameters": {FULL: global_rope, SLIDING: {"rope_theta": 10_000.0, "rope_type": "default"}},
        **{"rms_norm_eps": 1e-6, "sliding_window": 8, "tie_word_embeddings": True, "use_cache": True},
        **{"use_bidirectional_attention": "vision", "use_double_wide_mlp": False, "vocab_size": 512},
    }
    config = tiny._override(config | more, overrides)
    own = {key: value for key, value in GLOBAL.items() if key == "head_dim" or config["attention_k_eq_v"]}
    if key_style == "saved":
        if config["per_layer_config"] is None:
            layers = [index for index, kind in enumerate(config["layer_types"]) if kind == FULL]
            config["per_layer_config"] = {str(index): own for index in layers}
        return config
    config |= {"global_head_dim": own["head_dim"], "num_global_key_value_heads": own.get("num_key_value_heads")}
    unsaid = _UNSAID if config["model_type"] == "gemma4_text" else _UNSAID_UNIFIED
    return {key: value for key, value in config.items() if key not in unsaid and value is not None}


def _config(
    folder: Path, model_type: str, text: Config, vision: Config | None, storage: str
) -> tuple[Config, dict[str, int]]:
    """config.json, and the ids of the special tokens of the tokenizer that is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, GEMMA4_TOKENS, text["vocab_size"])
    name = "".join(part.capitalize() for part in model_type.split("_"))
    config: Config = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "audio_config": None,
        **{"boi_token_id": ids["<|image>"], "image_token_id": ids["<|image|>"], "eoi_token_id": ids["<image|>"]},
        **{"boa_token_id": ids["<|audio>"], "audio_token_id": ids["<|audio|>"], "eoa_token_index": ids["<audio|>"]},
        **{"video_token_id": ids["<|video|>"], "dtype": storage, "initializer_range": 0.02, "text_config": text},
        **{"tie_word_embeddings": True, "transformers_version": "5.24.0", "vision_config": vision},
    }
    return config, ids


def _write(folder: Path, config: Config, weights: Weights, ids: dict[str, int], storage: str, shards: int) -> None:
    tiny._write_checkpoint(folder, config, weights, storage, shards)
    (folder / "chat_template.jinja").write_text(GEMMA4_TEMPLATE, encoding="utf-8")
    tiny._write_generation_config(folder, [1, ids["<turn|>"], ids["<|tool_response>"]])
    if config["vision_config"] is not None:
        facts = {"patch_size": 16, "pooling_kernel_size": 3}
        tiny._write_json(folder / "processor_config.json", tiny._gemma4_processor_config(facts))


# --- weights


def _decoder_weights(text: Config, seed: int) -> tiny._RandomWeights:
    draw = tiny._RandomWeights(seed)
    prefix, hidden = "model.language_model", text["hidden_size"]
    draw.table(f"{prefix}.embed_tokens", text["vocab_size"], hidden, 1.6 * hidden**-0.5)
    for layer, kind in enumerate(text["layer_types"]):
        name = f"{prefix}.layers.{layer}"
        tiny._sandwich_norms(draw, name, hidden)
        _attention(draw, f"{name}.self_attn", text, kind, text.get("per_layer_config", {}).get(str(layer)))
        tiny._gated_mlp(draw, f"{name}.mlp", hidden, text["intermediate_size"])
        if text.get("enable_moe_block"):
            _experts(draw, name, text)
        draw.uniform(f"{name}.layer_scalar", (1,), 0.6, 0.95)
    draw.norm(f"{prefix}.norm", hidden, 0.8, 1.6)
    return draw


def _attention(draw: tiny._RandomWeights, prefix: str, text: Config, kind: str, own: Config | None) -> None:
    hidden, heads, shared = text["hidden_size"], text["num_attention_heads"], kind == FULL and text["attention_k_eq_v"]
    if own is None and kind == FULL:
        own = {"head_dim": text.get("global_head_dim", text["head_dim"])}
        own["num_key_value_heads"] = text.get("num_global_key_value_heads", text["num_key_value_heads"])
    own = own or {}
    size, count = own.get("head_dim", text["head_dim"]), own.get("num_key_value_heads", text["num_key_value_heads"])
    for name in ("q_norm", "k_norm"):  # the attention scale is 1, so these factors carry it
        draw.norm(f"{prefix}.{name}", size, 0.8 * size**-0.25, 1.6 * size**-0.25)
    draw.linear(f"{prefix}.q_proj", heads * size, hidden)
    for name in ("k_proj",) if shared else ("k_proj", "v_proj"):
        draw.linear(f"{prefix}.{name}", count * size, hidden)
    draw.linear(f"{prefix}.o_proj", hidden, heads * size)


def _experts(draw: tiny._RandomWeights, prefix: str, text: Config) -> None:
    count, inner, hidden = text["num_experts"], text["moe_intermediate_size"], text["hidden_size"]
    # Router scores of standard deviation 2: the experts of a token differ in weight, and no two are nearly equal.
    draw.table(f"{prefix}.router.proj", count, hidden, 2.0)
    draw.uniform(f"{prefix}.router.scale", (hidden,), 0.5, 1.5)
    draw.uniform(f"{prefix}.router.per_expert_scale", (count,), 0.5, 2.0)
    draw.tensors[f"{prefix}.experts.gate_up_proj"] = draw.rng.normal(0, hidden**-0.5, (count, 2 * inner, hidden))
    draw.tensors[f"{prefix}.experts.down_proj"] = draw.rng.normal(0, inner**-0.5, (count, hidden, inner))
    draw.norm(f"{prefix}.pre_feedforward_layernorm_2", hidden)
    for branch in (1, 2):
        draw.norm(f"{prefix}.post_feedforward_layernorm_{branch}", hidden, 1.0, 2.5)


def _embedder_weights(draw: tiny._RandomWeights, hidden: int, width: int) -> None:
    """Names inside transformers 5.24; layer norms have neither weights of one nor biases of zero."""
    prefix, values = "model.embed_vision", 3 * 48**2
    for name, size in (("patch_ln1", values), ("patch_ln2", width), ("pos_norm", width)):
        draw.norm(f"{prefix}.{name}", size)
        draw.uniform(f"{prefix}.{name}.bias", size, -0.5, 0.5)
    draw.linear(f"{prefix}.patch_dense", width, values)
    draw.uniform(f"{prefix}.patch_dense.bias", width, -0.5, 0.5)
    draw.tensors[f"{prefix}.pos_embedding"] = draw.rng.normal(0, 0.5, (1120, 2, width))
    draw.linear(f"{prefix}.multimodal_embedder.embedding_projection", hidden, width)


def published(name: str) -> str:
    """The name in the published files of a tensor of the 12B that transformers 5.24 calls `name`."""
    for module, published in _PUBLISHED.items():
        if name.startswith(module):
            return published + name[len(module) :]
    return name
