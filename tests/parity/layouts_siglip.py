"""Tiny PaliGemma and Gemma 3 vision checkpoints saved by transformers itself, and helpers that run its models.

Every parameter is drawn at random before saving, at scales at which masks, caps, windows and norms change the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipImageProcessorPil,
)

IMAGE_ID = 500  # the real ones lie far beyond a vocabulary of 512
TEXT = {"vocab_size": 512, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 96}


def _siglip(size: int) -> dict[str, Any]:
    """Two heads of 72 as in the So400m tower, 4304 = 16 * 269 columns become 80 = 16 * 5."""
    tower = {"model_type": "siglip_vision_model", "hidden_size": 144, "intermediate_size": 80, "num_hidden_layers": 2}
    return tower | {"num_attention_heads": 2, "patch_size": 14, "image_size": size, "vision_use_head": False}


def _paligemma(kind: str, size: int = 70, **facts: Any) -> PreTrainedModel:
    text = TEXT | {"model_type": kind, "num_key_value_heads": 1, "num_hidden_layers": 4} | facts
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=_siglip(size),
            text_config=text,
            projection_dim=text["hidden_size"],
            image_token_index=IMAGE_ID,
        )
    )


def _gemma3(**facts: Any) -> PreTrainedModel:
    """12 x 12 patches, pooled 4 x 4 to nine soft tokens; RoPE factor 8 on global layers."""
    scaling = {"rope_type": "linear", "factor": 8.0}
    text = TEXT | {"num_key_value_heads": 2, "sliding_window": 16, "rope_scaling": scaling} | facts
    return Gemma3ForConditionalGeneration(
        Gemma3Config(vision_config=_siglip(168), text_config=text, mm_tokens_per_image=9, image_token_index=IMAGE_ID)
    )


# Layouts by name. Each builds an untouched model; `write` draws its weights.
LAYOUTS = {
    # Gemma 1: two norms a layer, one key/value head, no caps
    "paligemma_3b": lambda: _paligemma("gemma"),
    # Gemma 2: four norms, caps low enough to bend the scores, a window that nothing reaches
    "paligemma2_3b": lambda: _paligemma(
        "gemma2",
        num_key_value_heads=2,
        query_pre_attn_scalar=16,
        sliding_window=512,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    # a window shorter than one picture, scale different from head_dim ** -0.5 (the 28B has this)
    "paligemma2_28b_window": lambda: _paligemma(
        "gemma2",
        num_key_value_heads=2,
        query_pre_attn_scalar=18,
        sliding_window=8,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    # five sliding layers to one global, the last two sliding, a window longer than a picture
    "gemma3_4b": lambda: _gemma3(num_hidden_layers=8, query_pre_attn_scalar=16),
    # the last layer global, a scale of its own, a window shorter than a picture
    "gemma3_27b": lambda: _gemma3(num_hidden_layers=6, query_pre_attn_scalar=21, sliding_window=8),
}


def write(name: str, folder: Path | str, *, seed: int = 0) -> PreTrainedModel:
    """Save the layout `name` with random weights into `folder`; return the model in float32 with eager attention."""
    torch.manual_seed(seed)
    model = LAYOUTS[name]().to(torch.float32).eval()
    model.set_attn_implementation("eager")
    randomise(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Draw every parameter anew."""
    for name, value in model.named_parameters():
        width = value[0].numel() if value.ndim > 1 else value.shape[0]
        if name.endswith("bias"):
            value.normal_(0, 0.3)
        elif "vision_tower" in name and "norm" in name:
            value.uniform_(0.5, 1.5)
        elif "norm" in name:
            low, high = _norm_range(name)
            value.uniform_(low - 1, high - 1)  # stored without the one that is added
        elif "position_embedding" in name:
            value.normal_(0, 0.7)
        elif "embed_tokens" in name:
            value.normal_(0, 0.6 * width**-0.5)
        elif "mm_input_projection_weight" in name:
            value.normal_(0, value.shape[0] ** -0.5)
        else:
            # Sharper attention where no norm of queries carries the scale.
            sharp = "language_model" in name and "q_proj" in name and "gemma3" not in model.config.model_type
            value.normal_(0, (2 if sharp else 1) * width**-0.5)


def _norm_range(name: str) -> tuple[float, float]:
    """Range of the effective factor of the decoder's norm called `name`."""
    if "q_norm" in name or "k_norm" in name:
        return 0.8, 2.0
    if "post_attention" in name or "post_feedforward" in name:
        return 0.8, 2.0
    return (1.5, 3.5) if name.endswith("language_model.norm.weight") else (0.5, 1.5)


def pixel_values(model: PreTrainedModel, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """float32 [pictures, 3, S, S] by the Pillow image processor of the family."""
    size = model.config.vision_config.image_size
    facts = {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    paligemma = model.config.model_type == "paligemma"
    processor = SiglipImageProcessorPil(**facts) if paligemma else Gemma3ImageProcessorPil(**facts)
    outputs = processor([Image.fromarray(picture) for picture in pictures], return_tensors="np")
    return torch.from_numpy(np.float32(outputs["pixel_values"]))


@torch.no_grad()
def soft_tokens(model: PreTrainedModel, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [pictures, n, D], by `get_image_features`."""
    return model.model.get_image_features(pixel_values(model, pictures), return_dict=True).pooler_output.numpy()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[int], pictures: Sequence[np.ndarray], prefix: int) -> np.ndarray:
    """Logits [L, V] of one sequence, without a cache. `prefix` ids are the prompt, the rest is the answer."""
    input_ids = torch.tensor(ids, dtype=torch.int64)[None]
    if model.config.model_type == "paligemma":
        types = (torch.arange(len(ids)) >= prefix).to(torch.int64)[None]
    else:
        types = (input_ids == IMAGE_ID).to(torch.int64)
    inputs = {"input_ids": input_ids, "token_type_ids": types, "attention_mask": torch.ones_like(input_ids)}
    if pictures:
        inputs["pixel_values"] = pixel_values(model, pictures)
    return model(**inputs, use_cache=False).logits[0].numpy()
