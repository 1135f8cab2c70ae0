"""Tiny random checkpoints of the families with a SigLIP tower: PaliGemma 1 and 2, and Gemma 3 with vision.

Like those of `tiny.py` they leave nothing out, and every mechanism changes the logits: no norm is the identity, soft
caps are low enough to bend the scores, windows are shorter than a picture, heads of the tower are 72 wide as in the
published one. Three styles of names are written, because all three are met:

- "saved": what transformers 5.24 saves, with every key of the configuration;
- "hub": the files of the hub, whose config.json leaves out whatever is a default of transformers' classes;
- "nested": names as transformers 4.52 to 5.2 saved them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from . import tiny
from .tiny import Config, Weights
from .tiny_tokenizer import GEMMA3_TEMPLATE, GEMMA3_TOKENS, write_tokenizer

LOCATIONS = (*(f"<loc{place:04d}>" for place in range(1024)), *(f"<seg{code:03d}>" for code in range(128)))

# Module names of transformers 5.24 -> names in files, by style.
STYLES = {
    "saved": {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""},
    "hub": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    },
    "nested": {"model.vision_tower.": "model.vision_tower.vision_model."},
}
# What config.json on the hub does not say.
_UNSAID = {
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_activation", "initializer_range"),
    *("layer_types", "pad_token_id", "rms_norm_eps", "rope_parameters", "use_cache"),
    *("tie_word_embeddings", "use_bidirectional_attention", "hidden_act", "layer_norm_eps", "num_channels"),
    "_sliding_window_pattern",
}


def write_paligemma(
    folder: Path | str,
    *,
    seed: int = 0,
    text: str = "gemma",
    storage: str = "float32",
    shards: int = 1,
    key_style: str = "saved",
    vision_overrides: Config | None = None,
    **overrides: Any,
) -> Config:
    """Write a tiny `PaliGemmaForConditionalGeneration` into `folder`; return its config.json.

    `text` is "gemma" (PaliGemma 1) or "gemma2" (PaliGemma 2). `overrides` replace keys of text_config. A picture is
    4 x 4 patches and as many soft tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    image_id = _write_paligemma_tokenizer(folder)
    text_config = tiny._override(_gemma_config(text, overrides.get("num_hidden_layers", 4)), overrides)
    vision = tiny._override(_siglip_config(56), vision_overrides or {})
    config: Config = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        **{"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "dtype": storage, "hidden_size": 2048},
        **{"image_token_index": image_id, "projection_dim": text_config["hidden_size"]},
        **{"tie_word_embeddings": True, "text_config": text_config, "transformers_version": "5.24.0"},
        "vision_config": vision,
    }
    weights = _siglip_weights(vision, seed)
    draw = tiny._RandomWeights(seed + 1)
    draw.linear("model.multi_modal_projector.linear", text_config["hidden_size"], vision["hidden_size"])
    draw.tensors["model.multi_modal_projector.linear.bias"] = draw.rng.normal(0, 0.3, text_config["hidden_size"])
    _gemma_weights(draw, text_config)
    _write(folder, config, weights | draw.tensors, storage, shards, key_style)
    tiny._write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0})
    _write_processor(folder, key_style, "SiglipImageProcessor", "PaliGemmaProcessor", vision, 3)
    return config


def write_gemma3_vision(
    folder: Path | str,
    *,
    seed: int = 0,
    storage: str = "float32",
    shards: int = 1,
    key_style: str = "saved",
    vision_overrides: Config | None = None,
    **overrides: Any,
) -> Config:
    """Write a tiny `Gemma3ForConditionalGeneration` (4B, 12B, 27B) into `folder`; return its config.json.

    A picture is 12 x 12 patches and, pooled 4 x 4, nine soft tokens: one more than the window. `overrides` replace keys
    of text_config; `rope_scaling` (of the global layers) and `sliding_window_pattern` are accepted too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scaling = {"rope_type": "linear", "factor": 8.0}
    text = tiny._gemma3_config(
        storage,
        "hub" if key_style == "hub" else "saved",
        {"rope_scaling": scaling, "query_pre_attn_scalar": 21, "num_key_value_heads": 2} | overrides,
    )
    ids = write_tokenizer(folder, GEMMA3_TOKENS, 512)
    vision = tiny._override(_siglip_config(168), vision_overrides or {})
    config: Config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        **{"boi_token_index": ids["<start_of_image>"], "eoi_token_index": ids["<end_of_image>"]},
        **{"image_token_index": ids["<image_soft_token>"], "eos_token_id": [1, ids["<end_of_turn>"]]},
        **{"dtype": storage, "initializer_range": 0.02, "mm_tokens_per_image": 9, "tie_word_embeddings": True},
        **{"transformers_version": "5.24.0", "vision_config": vision},
    }
    weights = _siglip_weights(vision, seed)
    draw = tiny._RandomWeights(seed + 1)
    projector, shape = "model.multi_modal_projector", (vision["hidden_size"], text["hidden_size"])
    draw.tensors[f"{projector}.mm_input_projection_weight"] = draw.rng.normal(0, shape[0] ** -0.5, shape)
    draw.norm(f"{projector}.mm_soft_emb_norm", shape[0], plus_one=True)
    for name, value in tiny._gemma3_weights(text, seed).items():
        is_head = name.startswith("lm_head.")
        draw.tensors[name if is_head else name.replace("model.", "model.language_model.", 1)] = value
    for key in ("architectures", "transformers_version", "dtype"):
        del text[key]
    _write(folder, config | {"text_config": text}, weights | draw.tensors, storage, shards, key_style)
    (folder / "chat_template.jinja").write_text(GEMMA3_TEMPLATE, encoding="utf-8")
    tiny._write_generation_config(folder, [1, ids["<end_of_turn>"]], cache_implementation="hybrid")
    _write_processor(folder, key_style, "Gemma3ImageProcessor", "Gemma3Processor", vision, 2)
    return config


def _write_paligemma_tokenizer(folder: Path) -> int:
    """Location and segment codes behind the vocabulary, `<image>` behind those, as published; returns its id."""
    write_tokenizer(folder, (), 512)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in LOCATIONS])
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    image_id = tokenizer.token_to_id("<image>")
    assert image_id == 512 + len(LOCATIONS)
    return image_id


def _siglip_config(size: int) -> Config:
    return {
        "model_type": "siglip_vision_model",
        **{"attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 144, "image_size": size},
        **{"intermediate_size": 80, "layer_norm_eps": 1e-6, "num_attention_heads": 2, "num_channels": 3},
        **{"num_hidden_layers": 2, "patch_size": 14, "vision_use_head": False},
    }


def _gemma_config(kind: str, layers: int) -> Config:
    config: Config = {
        "model_type": kind,
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 16},
        **{"hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 1024},
        **{"num_attention_heads": 4, "num_hidden_layers": layers, "num_key_value_heads": 1, "pad_token_id": 0},
        **{"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
        # 15 rows more than there are tokens
        **{"tie_word_embeddings": True, "use_bidirectional_attention": True, "use_cache": True, "vocab_size": 1680},
    }
    if kind == "gemma":
        return config | {"hidden_act": "gelu_pytorch_tanh"}
    return config | {
        **{"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "hidden_activation": "gelu_pytorch_tanh"},
        **{"layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]},
        **{"num_key_value_heads": 2, "query_pre_attn_scalar": 20, "sliding_window": 8},
    }


def _siglip_weights(vision: Config, seed: int) -> Weights:
    draw = tiny._RandomWeights(seed)
    hidden, mlp, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    tower = "model.vision_tower"

    def norm(name: str) -> None:
        draw.norm(name, hidden)
        draw.tensors[f"{name}.bias"] = draw.rng.normal(0, 0.3, hidden)

    def linear(name: str, outputs: int, inputs: int) -> None:
        draw.linear(name, outputs, inputs)
        draw.tensors[f"{name}.bias"] = draw.rng.normal(0, 0.3, outputs)

    kernel, width = f"{tower}.embeddings.patch_embedding", 3 * patch**2
    draw.tensors[f"{kernel}.weight"] = draw.rng.normal(0, 2 * width**-0.5, (hidden, 3, patch, patch))
    draw.tensors[f"{kernel}.bias"] = draw.rng.normal(0, 0.3, hidden)
    draw.table(f"{tower}.embeddings.position_embedding", (vision["image_size"] // patch) ** 2, hidden, 0.7)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        norm(f"{prefix}.layer_norm1")
        norm(f"{prefix}.layer_norm2")
        for part in ("q", "k", "v", "out"):
            linear(f"{prefix}.self_attn.{part}_proj", hidden, hidden)
        linear(f"{prefix}.mlp.fc1", mlp, hidden)
        linear(f"{prefix}.mlp.fc2", hidden, mlp)
    norm(f"{tower}.post_layernorm")
    return draw.tensors


def _gemma_weights(draw: Any, text: Config) -> None:
    """Gemma 1 has two norms in a layer, Gemma 2 four; all are stored without their +1."""
    hidden, size, prefix = text["hidden_size"], text["head_dim"], "model.language_model"
    draw.table(f"{prefix}.embed_tokens", text["vocab_size"], hidden, 0.6 * hidden**-0.5)
    for layer in range(text["num_hidden_layers"]):
        name = f"{prefix}.layers.{layer}"
        if text["model_type"] == "gemma2":
            tiny._sandwich_norms(draw, name, hidden, plus_one=True)
        else:
            for part in ("input_layernorm", "post_attention_layernorm"):
                draw.norm(f"{name}.{part}", hidden, plus_one=True)
        tiny._attention(draw, f"{name}.self_attn", text, size)
        draw.tensors[f"{name}.self_attn.q_proj.weight"] *= 2  # sharper attention, so that masks and caps matter
        tiny._gated_mlp(draw, f"{name}.mlp", hidden, text["intermediate_size"])
    draw.norm(f"{prefix}.norm", hidden, 1.5, 3.5, plus_one=True)


def _write(folder: Path, config: Config, weights: Weights, storage: str, shards: int, key_style: str) -> None:
    """config.json and the tensors under the names of `key_style`."""
    renames = STYLES[key_style]

    def renamed(name: str) -> str:
        prefix = next((prefix for prefix in renames if name.startswith(prefix)), None)
        return name if prefix is None else renames[prefix] + name[len(prefix) :]

    if key_style == "hub":
        parts = ("text_config", "vision_config")
        config = config | {part: _sparse(config[part]) for part in parts}
        config = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    tiny._write_checkpoint(folder, config, {renamed(name): value for name, value in weights.items()}, storage, shards)


def _sparse(section: Config) -> Config:
    return {key: value for key, value in section.items() if key not in _UNSAID}


def _write_processor(
    folder: Path, key_style: str, image_class: str, processor_class: str, vision: Config, resample: int
) -> None:
    """preprocessor_config.json as on the hub, or the processor_config.json that newer versions save."""
    size, half = vision["image_size"], np.full(3, 0.5).tolist()
    facts: Config = {
        "image_processor_type": image_class,
        **{"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": half, "image_std": half},
        **{"resample": resample, "rescale_factor": 1 / 255, "size": {"height": size, "width": size}},
    }
    if processor_class == "Gemma3Processor":
        facts |= {f"pan_and_scan_{key}": None for key in ("max_num_crops", "min_crop_size", "min_ratio_to_activate")}
        facts |= {"do_pan_and_scan": None, "image_seq_length": 256}
    if key_style == "hub":
        tiny._write_json(folder / "preprocessor_config.json", facts | {"processor_class": processor_class})
    else:
        tiny._write_json(
            folder / "processor_config.json", {"image_processor": facts, "processor_class": processor_class}
        )
