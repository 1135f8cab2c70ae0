"""Tiny checkpoints of the large Gemma 4 sizes saved by transformers itself, and helpers that run its models.

Every parameter and buffer is drawn at random before saving, at scales at which masks, windows, norms and routers change
the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
)

SLIDING, FULL = "sliding_attention", "full_attention"
# Ids of the media tokens; the real ones lie far beyond a vocabulary of 512.
TOKEN_IDS = {
    **{"boi_token_id": 500, "image_token_id": 501, "eoi_token_id": 502, "boa_token_id": 503},
    **{"audio_token_id": 504, "eoa_token_index": 505, "video_token_id": 506},
}
TEXT = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16},
    **{"global_head_dim": 32, "num_key_value_heads": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    **{"num_hidden_layers": 6, "sliding_window": 8, "final_logit_softcapping": 30.0, "max_position_embeddings": 1024},
    "use_bidirectional_attention": "vision",
}
GEMMA4 = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 0}
EXPERTS = {"enable_moe_block": True, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 32}
TOWER = {
    **{"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 16},
    **{"num_key_value_heads": 3, "position_embedding_size": 1024, "use_clipped_linears": False, "standardize": True},
}
BUDGET = 70


def _gemma4(**facts: Any) -> PreTrainedModel:
    config = Gemma4Config(text_config=TEXT | GEMMA4 | facts, vision_config=TOWER, **TOKEN_IDS)
    return Gemma4ForConditionalGeneration(config)


def _unified(**facts: Any) -> PreTrainedModel:
    vision = {"mm_embed_dim": 48, "output_proj_dims": 48}
    config = Gemma4UnifiedConfig(text_config=TEXT | facts, vision_config=vision, audio_config={}, **TOKEN_IDS)
    return Gemma4UnifiedForConditionalGeneration(config)


# Layouts by name. Each builds an untouched model; `write` draws its weights.
LAYOUTS = {
    # five sliding layers to one global with values that are its keys; every picture is longer than the window
    "gemma4_31b": _gemma4,
    # the window is longer than a picture and shorter than two
    "gemma4_31b_window": lambda: _gemma4(sliding_window=90),
    # experts in every layer, several global layers with two key/value heads
    "gemma4_26b": lambda: _gemma4(
        **EXPERTS,
        num_hidden_layers=5,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING, FULL],
        num_global_key_value_heads=2,
    ),
    # patches of 48 pixels without a tower, audio in the checkpoint
    "gemma4_12b": _unified,
    "gemma4_12b_window": lambda: _unified(sliding_window=90, num_key_value_heads=4),
    # the decoder alone, as a text-only fine-tune is saved
    "gemma4_26b_text": lambda: Gemma4ForCausalLM(Gemma4TextConfig(**TEXT | GEMMA4 | EXPERTS)),
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
    """Draw every saved parameter and buffer anew."""
    for name, value in model.state_dict(keep_vars=True).items():
        if name == "lm_head.weight":
            continue
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "layer_scalar":
            value.uniform_(0.6, 0.95)
        elif leaf == "bias":
            value.uniform_(-0.5, 0.5)
        elif "norm" in name or "patch_ln" in name:
            value.uniform_(*_norm_range(name, value.shape[-1]))
        elif leaf in ("std_bias", "std_scale", "per_expert_scale") or name.endswith("router.scale"):
            value.uniform_(0.4, 1.6)
        elif "router.proj" in name:
            value.normal_(0, 2.0)  # scores differ enough that rounding does not choose another expert
        elif "embed_tokens" in name:
            value.normal_(0, 0.2)
        elif "position_embedding_table" in name or "pos_embedding" in name:
            value.normal_(0, 0.5)
        else:
            value.normal_(0, value.shape[-1] ** -0.5)


def _norm_range(name: str, width: int) -> tuple[float, float]:
    if "q_norm" in name or "k_norm" in name:
        # The attention scale is 1, so these factors carry it; sharper attention would amplify rounding.
        return 0.8 * width**-0.25, 1.6 * width**-0.25
    return (0.7, 1.7) if "post_" in name else (0.5, 1.5)


def processed(model: PreTrainedModel, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 patches [n, values] in [0, 1] and int64 positions [n, 2] as the model takes them.

    Resized and cut by the Pillow image processor of Gemma 4. The processor of the 12B exists for torchvision only; it
    joins groups of 3 x 3 of the same patches to squares of 48 pixels, which is done here.
    """
    outputs = Gemma4ImageProcessorPil(max_soft_tokens=BUDGET)(Image.fromarray(picture), return_tensors="np")
    positions = outputs["image_position_ids"][0]
    real = positions[:, 0] >= 0
    values, positions = outputs["pixel_values"][0][real], positions[real]
    if model.config.model_type == "gemma4":
        return values, positions
    columns, rows = (positions.max(axis=0) + 1) // 3
    grid = values.reshape(rows, 3, columns, 3, 16, 16, 3).transpose(0, 2, 1, 4, 3, 5, 6)
    places = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1)
    return grid.reshape(rows * columns, -1), places.reshape(-1, 2)


@torch.no_grad()
def soft_tokens(model: PreTrainedModel, picture: np.ndarray) -> np.ndarray:
    """float32 [n, D] of one picture, by `get_image_features`."""
    values, positions = processed(model, picture)
    features = model.model.get_image_features(
        torch.from_numpy(values)[None], torch.from_numpy(positions)[None], return_dict=True
    )
    return features.pooler_output[0].numpy()


def media_inputs(
    model: PreTrainedModel, ids: Sequence[int], pictures: Sequence[np.ndarray], video: bool = False
) -> dict[str, torch.Tensor]:
    """Arguments of the model for one sequence; the pictures are images, or the frames of one video."""
    input_ids = torch.tensor(ids, dtype=torch.int64)[None]
    inputs = {"input_ids": input_ids}
    if not pictures:
        return inputs
    frames = [processed(model, picture) for picture in pictures]
    longest = max(len(values) for values, _ in frames)
    longest += -longest % 9  # the pooler wants whole groups
    pixels = np.zeros((len(frames), longest, frames[0][0].shape[1]), np.float32)
    places = np.full((len(frames), longest, 2), -1, np.int64)
    for index, (values, positions) in enumerate(frames):
        pixels[index, : len(values)], places[index, : len(values)] = values, positions
    kind = "video" if video else "image"
    is_medium = input_ids == TOKEN_IDS[f"{kind}_token_id"]
    values, positions = torch.from_numpy(pixels), torch.from_numpy(places)
    inputs["mm_token_type_ids"] = is_medium.to(torch.int64) * (2 if video else 1)
    if video:
        return inputs | {
            **{"pixel_values_videos": values, "video_position_ids": positions},
            "num_frames_per_video": torch.tensor([len(frames)]),
        }
    return inputs | {"pixel_values": values, "image_position_ids": positions}


@torch.no_grad()
def logits(
    model: PreTrainedModel, ids: Sequence[int], pictures: Sequence[np.ndarray] = (), video: bool = False
) -> np.ndarray:
    """Logits [L, V] of one sequence, without a cache.

    With the masks that the model's own `create_masks_for_generate` makes: pictures see all of themselves in sliding
    layers only, as in the JAX reference. `forward` of the 12B makes others by itself in 5.24.0, with global layers
    masked like Gemma 3; for the other sizes both are the same.
    """
    inputs = media_inputs(model, ids, pictures, video)
    if pictures:
        inputs["attention_mask"] = model.create_masks_for_generate(
            model.config,
            *(torch.zeros(1, len(ids), model.config.text_config.hidden_size), None, None, None),
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
    return model(**inputs, use_cache=False).logits[0].numpy()
