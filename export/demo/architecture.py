"""The demo model's configuration files, in the form Hugging Face checkpoints of Gemma 4 have."""

import json
import math
from pathlib import Path
from typing import Any

from . import tokenizer
from .tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE

PATCH, POOL = 16, 3
BUDGETS = (9, 16, 25, 36)  # soft tokens per image that may be asked for
LARGEST_TRAINED_BUDGET = 64  # seen in training, where it sharpens the smaller ones; it finds no more than 36 does
DEFAULT_BUDGET = 36

_SLIDING, _FULL = "sliding_attention", "full_attention"
_LAYER_TYPES = [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING, _FULL]

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": VOCABULARY_SIZE,
    "vocab_size_per_layer_input": VOCABULARY_SIZE,
    "hidden_size": 128,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 256,
    "use_double_wide_mlp": True,
    "num_hidden_layers": len(_LAYER_TYPES),
    "layer_types": _LAYER_TYPES,
    "num_kv_shared_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "enable_moe_block": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "sliding_window": 64,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    },
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

VISION_CONFIG: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    "pooling_kernel_size": POOL,
    "patch_size": PATCH,
    "position_embedding_size": POOL * LARGEST_TRAINED_BUDGET,  # the longest side a budget allows, in patches
    "use_clipped_linears": False,
    "standardize": False,
}


def model_config() -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "float32",
        "text_config": TEXT_CONFIG,
        "vision_config": VISION_CONFIG,
        "audio_config": None,
        "boi_token_id": SPECIAL_TOKENS["<|image>"],
        "image_token_id": SPECIAL_TOKENS["<|image|>"],
        "eoi_token_id": SPECIAL_TOKENS["<image|>"],
        "boa_token_id": SPECIAL_TOKENS["<|audio>"],
        "audio_token_id": SPECIAL_TOKENS["<|audio|>"],
        "eoa_token_index": SPECIAL_TOKENS["<audio|>"],
        "video_token_id": SPECIAL_TOKENS["<|video|>"],
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
    }


def processor_config() -> dict[str, Any]:
    """processor_config.json; `siglance_budgets` lists the budgets this model was trained for."""
    image_processor = {
        "image_processor_type": "Gemma4ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": False,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "patch_size": PATCH,
        "pooling_kernel_size": POOL,
        "max_soft_tokens": DEFAULT_BUDGET,
        "image_seq_length": DEFAULT_BUDGET,
    }
    return {
        "processor_class": "Gemma4Processor",
        "image_seq_length": DEFAULT_BUDGET,
        "image_processor": image_processor,
        "siglance_budgets": list(BUDGETS),
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json: greedy, ending at `<eos>`, `<turn|>` or `<|tool_response>`."""
    return {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [1, 106, 50], "do_sample": False}


def target_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """(height, width) in pixels that an image is resized to: Gemma 4's rule, in its exact order of operations."""
    side = PATCH * POOL
    factor = math.sqrt(budget * POOL * POOL * PATCH * PATCH / (height * width))
    high = math.floor(factor * height / side) * side
    wide = math.floor(factor * width / side) * side
    if high == 0:
        return side, min(width // height * side, budget * side)
    if wide == 0:
        return min(height // width * side, budget * side), side
    return high, wide


def write(folder: Path) -> None:
    """Write every file of the checkpoint except the weights."""
    tokenizer.write(folder)
    processor = processor_config()
    files = {
        "config.json": model_config(),
        "generation_config.json": generation_config(),
        "processor_config.json": processor,
        "preprocessor_config.json": processor["image_processor"] | {"processor_class": "Gemma4Processor"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
