"""Tiny checkpoints saved by transformers itself, and helpers that run its models: the outside opinion.

Every parameter and buffer is drawn at random before saving, so nothing (norm weights, layer scalars, clip bounds)
stays at the one or the infinity it is initialised with. The layouts follow the published models in small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    PreTrainedModel,
)

SLIDING, FULL = "sliding_attention", "full_attention"

# Ids of the media tokens; the real ones lie far beyond a vocabulary of 512.
GEMMA4_TOKEN_IDS = {
    **{"boi_token_id": 500, "image_token_id": 501, "eoi_token_id": 502, "boa_token_id": 503},
    **{"audio_token_id": 504, "eoa_token_index": 505, "video_token_id": 506},
}
VISION = {
    **{"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 16},
    **{"num_key_value_heads": 3, "position_embedding_size": 1024, "use_clipped_linears": True},
}

# Clip bounds near one standard deviation of what they clip.
CLIP_BOUNDS = {"input_min": (-1.6, -0.8), "input_max": (0.8, 1.6), "output_min": (-1.5, -0.7), "output_max": (0.7, 1.5)}


def _gemma3(**facts: Any) -> PreTrainedModel:
    common = {"vocab_size": 512, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 1}
    common |= {"intermediate_size": 96, "sliding_window": 8, "max_position_embeddings": 1024}
    return Gemma3ForCausalLM(Gemma3TextConfig(**common | facts))


def _gemma4(vision: dict[str, Any] | None = None, **facts: Any) -> PreTrainedModel:
    common = {
        "vocab_size": 512,
        "vocab_size_per_layer_input": 512,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 16,
    }
    common |= {"intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "global_head_dim": 32}
    common |= {"sliding_window": 8, "final_logit_softcapping": 30.0, "max_position_embeddings": 1024}
    return Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=common | facts, vision_config=VISION | (vision or {}), **GEMMA4_TOKEN_IDS)
    )


# Layouts by name. Each builds an untouched model; `write` draws its weights.
LAYOUTS = {
    # five sliding layers to one global, the last layer global; attention scale is head_dim ** -0.5
    "gemma3_270m": lambda: _gemma3(num_hidden_layers=6, query_pre_attn_scalar=16),
    # two sliding layers after the last global one; scale different from head_dim ** -0.5 (the 27B has this)
    "gemma3_1b": lambda: _gemma3(num_hidden_layers=8, query_pre_attn_scalar=21, num_key_value_heads=2),
    # global layers with linear RoPE scaling (4B and larger) and a head of its own
    "gemma3_scaled_untied": lambda: _gemma3(
        num_hidden_layers=3,
        sliding_window_pattern=3,
        query_pre_attn_scalar=16,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        tie_word_embeddings=False,
    ),
    # four sliding to one global, one key-value head, layers 5 to 9 share and have the doubled MLP
    "gemma4_e2b": lambda: _gemma4(
        num_hidden_layers=10,
        layer_types=[*(SLIDING,) * 4, FULL] * 2,
        num_key_value_heads=1,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
    ),
    # two key-value heads, four sharing layers, no doubled MLP
    "gemma4_e4b": lambda: _gemma4(
        num_hidden_layers=7,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
        num_key_value_heads=2,
        num_kv_shared_layers=4,
    ),
    # the tower of the 26B and 31B: no clip bounds, standardised soft tokens; nothing shared, no per-layer inputs
    "gemma4_plain": lambda: _gemma4(
        vision={"use_clipped_linears": False, "standardize": True},
        num_hidden_layers=3,
        layer_types=[SLIDING, SLIDING, FULL],
        num_key_value_heads=2,
        hidden_size_per_layer_input=0,
    ),
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
    """Draw every saved parameter and buffer of `model` anew, at scales that keep logits near 5."""
    state = model.state_dict(keep_vars=True)
    gemma3 = model.config.model_type.startswith("gemma3")
    for name, value in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        leaf = name.rsplit(".", 1)[-1]
        if leaf in CLIP_BOUNDS:
            value.uniform_(*CLIP_BOUNDS[leaf])
        elif leaf == "layer_scalar":
            value.uniform_(0.6, 0.95)
        elif "norm" in name:
            low, high = _norm_range(name, value.shape[-1], gemma3)
            value.uniform_(low - gemma3, high - gemma3)  # Gemma 3 stores the factor minus one
        elif leaf in ("std_bias", "std_scale"):
            value.uniform_(0.2, 2.0)
        elif "embed_tokens" in name or "position_embedding_table" in name:
            value.normal_(0, 0.1 if gemma3 else 0.2)
        elif "per_layer_input_gate" in name:
            # Gates far below zero vanish, all sixteen at once for some tokens; the norm behind them would blow the
            # rounding of float32 up to a visible size. The published models have 256.
            value.normal_(0, 0.3 * value.shape[-1] ** -0.5)
        else:
            value.normal_(0, value.shape[-1] ** -0.5)
    _share_bounds(state)


def _norm_range(name: str, width: int, gemma3: bool) -> tuple[float, float]:
    """Range of the effective factor of the norm called `name`."""
    if "q_norm" in name or "k_norm" in name:
        # The attention scale of Gemma 4 is 1, so these factors carry it. Sharper attention than this would amplify
        # the rounding of float32 layer by layer, beyond the tolerances of the comparison.
        return (0.8, 2.0) if gemma3 else (0.8 * width**-0.25, 1.6 * width**-0.25)
    if "post_attention" in name or "post_feedforward" in name:
        return (1.0, 2.5) if gemma3 else (0.7, 1.7)
    return (1.5, 3.5) if gemma3 and name == "model.norm.weight" else (0.5, 1.5)


def _share_bounds(state: dict[str, torch.Tensor]) -> None:
    """In the published files k and v have the same bounds, and so have gate and up."""
    for name, value in state.items():
        for copy, source in (("v_proj", "k_proj"), ("up_proj", "gate_proj")):
            if f".{copy}." in name and name.rsplit(".", 1)[-1] in CLIP_BOUNDS:
                value.copy_(state[name.replace(copy, source)])


@dataclass(frozen=True)
class ProcessedImage:
    """What the image processor of transformers makes of one image, without its padding rows."""

    pixel_values: np.ndarray  # float32 [n, 768] in [0, 1], raster order, channel fastest
    position_ids: np.ndarray  # int64 [n, 2], (x, y)
    soft_tokens: int  # n / 9

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels after resizing."""
        columns, rows = self.position_ids.max(axis=0) + 1
        return 16 * int(rows), 16 * int(columns)


def hf_processor_outputs(image: Image.Image, budget: int) -> ProcessedImage:
    """Run `Gemma4ImageProcessorPil` on one image with `max_soft_tokens` = `budget`."""
    outputs = Gemma4ImageProcessorPil(max_soft_tokens=budget)(image, return_tensors="np")
    positions = outputs["image_position_ids"][0]
    real = positions[:, 0] >= 0
    return ProcessedImage(
        outputs["pixel_values"][0][real], positions[real], int(outputs["num_soft_tokens_per_image"][0])
    )


@torch.no_grad()
def hf_soft_tokens(model: PreTrainedModel, patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Soft tokens [n / 9, D] float32 of one image, by `Gemma4Model.get_image_features`."""
    features = model.model.get_image_features(
        torch.from_numpy(np.float32(patches))[None], torch.from_numpy(positions)[None], return_dict=True
    )
    return features.pooler_output[0].numpy()


def hf_inputs(
    model: PreTrainedModel, input_ids: Sequence[int], images: Sequence[tuple[np.ndarray, np.ndarray]] = ()
) -> dict[str, torch.Tensor]:
    """What a model takes for one sequence; `images` are (patches, positions), padded to a batch as usual."""
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor(input_ids, dtype=torch.int64)[None]}
    if images:
        longest = max(len(patches) for patches, _ in images)
        pixels = np.zeros((len(images), longest, images[0][0].shape[1]), np.float32)
        position_ids = np.full((len(images), longest, 2), -1, np.int64)
        for index, (patches, positions) in enumerate(images):
            pixels[index, : len(patches)], position_ids[index, : len(positions)] = patches, positions
        is_image = inputs["input_ids"] == model.config.image_token_id
        inputs |= {"pixel_values": torch.from_numpy(pixels), "image_position_ids": torch.from_numpy(position_ids)}
        inputs |= {"mm_token_type_ids": is_image.to(torch.int64)}
    return inputs


@torch.no_grad()
def hf_logits(
    model: PreTrainedModel, input_ids: Sequence[int], images: Sequence[tuple[np.ndarray, np.ndarray]] = ()
) -> np.ndarray:
    """Logits [L, V] float32 of one sequence; see `hf_inputs`."""
    return model(**hf_inputs(model, input_ids, images), use_cache=False).logits[0].numpy()


@torch.no_grad()
def hf_greedy(
    model: PreTrainedModel,
    input_ids: Sequence[int],
    images: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    *,
    tokens: int,
) -> list[int]:
    """Ids of a greedy reply by `generate`, with the cache and the masks that it makes for itself."""
    inputs = hf_inputs(model, input_ids, images)
    mask = torch.ones_like(inputs["input_ids"])
    outputs = model.generate(**inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return outputs[0, len(input_ids) :].tolist()
