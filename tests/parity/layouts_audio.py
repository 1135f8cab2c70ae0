"""Tiny Gemma 4 checkpoints with ears saved by transformers itself, and helpers that run its front ends and models.

Every parameter and buffer is drawn at random before saving, at scales at which windows, positions, bounds and norms
change the soft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedAudioFeatureExtractor,
    PreTrainedModel,
)

from . import checkpoints, layouts_gemma4_large

TOKEN_IDS = checkpoints.GEMMA4_TOKEN_IDS
processed = layouts_gemma4_large.processed
SLIDING, FULL = "sliding_attention", "full_attention"
TEXT = {
    **{"vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size": 64, "hidden_size_per_layer_input": 16},
    **{"intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "global_head_dim": 32},
    **{"sliding_window": 8, "final_logit_softcapping": 30.0, "max_position_embeddings": 1024},
    **{"num_hidden_layers": 7, "num_key_value_heads": 1, "num_kv_shared_layers": 4, "use_double_wide_mlp": True},
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
}
AUDIO = {
    **{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "output_proj_dims": 48},
    **{"subsampling_conv_channels": [128, 8], "attention_logit_cap": 6.0},
}


def _gemma4(**audio: Any) -> PreTrainedModel:
    config = Gemma4Config(text_config=TEXT, vision_config=checkpoints.VISION, audio_config=AUDIO | audio, **TOKEN_IDS)
    return Gemma4ForConditionalGeneration(config)


LAYOUTS = {
    # the published window, cap above what random scores reach
    "gemma4_e2b_audio": lambda: _gemma4(),
    # a tower of one wide layer, without bounds
    "gemma4_e2b_audio_unclipped": lambda: _gemma4(hidden_size=48, num_hidden_layers=1, use_clipped_linears=False),
    # frames of samples instead of a tower
    "gemma4_12b_audio": layouts_gemma4_large._unified,
}


def write(name: str, folder: Path | str, *, seed: int = 0) -> PreTrainedModel:
    """Save the layout `name` with random weights into `folder`; return the model in float32 with eager attention."""
    torch.manual_seed(seed)
    model = LAYOUTS[name]().to(torch.float32).eval()
    model.set_attn_implementation("eager")
    if model.config.model_type == "gemma4":
        checkpoints.randomise(model)
        _randomise_tower(model.model.audio_tower)
    else:
        layouts_gemma4_large.randomise(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def _randomise_tower(tower: torch.nn.Module) -> None:
    """What `checkpoints.randomise` does not know: convolutions by the size of their kernels, scales, a bias."""
    for name, value in tower.state_dict(keep_vars=True).items():
        if ".conv.weight" in name or "depthwise" in name:
            value.normal_(0, value[0].numel() ** -0.5)
        elif "per_dim_scale" in name:
            value.uniform_(-1.0, 2.5)
        elif name.endswith(".bias"):
            value.uniform_(-0.5, 0.5)


def features(clips: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log-mel frames [n, F, 128] of clips, as long as the longest, and which of them are valid, bool [n, F]."""
    outputs = Gemma4AudioFeatureExtractor()(list(clips), return_tensors="np")
    return outputs["input_features"], outputs["input_features_mask"]


def _inputs(model: PreTrainedModel, clips: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    if model.config.model_type == "gemma4":
        values, valid = features(clips)
    else:
        outputs = Gemma4UnifiedAudioFeatureExtractor()(list(clips), return_tensors="np")
        values, valid = outputs["input_features"], outputs["input_features_mask"]
    return {
        "input_features": torch.from_numpy(np.asarray(values, np.float32)),
        "input_features_mask": torch.from_numpy(np.asarray(valid, bool)),
    }


@torch.no_grad()
def soft_tokens(model: PreTrainedModel, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """float32 [n, D] of each clip, by `get_audio_features` of all of them at once, padded as its processor does."""
    outputs = model.model.get_audio_features(**_inputs(model, clips), return_dict=True)
    valid = outputs.attention_mask
    return [row[mask].numpy() for row, mask in zip(outputs.pooler_output, valid, strict=True)]


@torch.no_grad()
def picture_tokens(model: PreTrainedModel, picture: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """float32 [n, D] of (patches, positions), by `get_image_features`."""
    values, positions = (torch.from_numpy(part)[None] for part in picture)
    return model.model.get_image_features(values, positions, return_dict=True).pooler_output[0].numpy()


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    ids: Sequence[int],
    clips: Sequence[np.ndarray],
    pictures: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> np.ndarray:
    """Logits [L, V] of one sequence, without a cache; `pictures` are (patches, positions).

    With the masks of `create_masks_for_generate`, see `layouts_gemma4_large.logits`.
    """
    input_ids = torch.tensor(ids, dtype=torch.int64)[None]
    kinds = sum(
        kind * (input_ids == TOKEN_IDS[f"{name}_token_id"]) for kind, name in ((1, "image"), (2, "video"), (3, "audio"))
    )
    inputs = {"input_ids": input_ids, "mm_token_type_ids": kinds} | (_inputs(model, clips) if clips else {})
    if pictures:
        longest = max(len(values) for values, _ in pictures)
        longest += -longest % 9  # the pooler wants whole groups
        pixels = np.zeros((len(pictures), longest, pictures[0][0].shape[1]), np.float32)
        places = np.full((len(pictures), longest, 2), -1, np.int64)
        for index, (values, positions) in enumerate(pictures):
            pixels[index, : len(values)], places[index, : len(values)] = values, positions
        inputs |= {"pixel_values": torch.from_numpy(pixels), "image_position_ids": torch.from_numpy(places)}
    inputs["attention_mask"] = model.create_masks_for_generate(
        model.config,
        *(torch.zeros(1, len(ids), model.config.text_config.hidden_size), None, None, None),
        mm_token_type_ids=kinds,
    )
    return model(**inputs, use_cache=False).logits[0].numpy()
