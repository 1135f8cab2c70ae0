"""Configurations of the official models, for `--random`: sizes, load times and speed without the weights.

Every entry is what the family's reader needs of the model's config.json. Sources: the configuration classes and the
conversion scripts of transformers 5.24.
"""

from __future__ import annotations

from typing import Any

from ..engine.errors import ExportError

__all__ = ["OFFICIAL", "official_config"]

Config = dict[str, Any]


def official_config(name: str) -> Config:
    """config.json of the official model `name`, e.g. "google/gemma-4-E2B-it".

    Raises ExportError listing the known names.
    """
    if name not in OFFICIAL:
        raise ExportError(f"--random knows no model {name!r}; it knows {', '.join(OFFICIAL)}")
    return OFFICIAL[name]


def _siglip(size: int, projection: int | None = None) -> Config:
    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
    tower |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": size, "patch_size": 14}
    return tower | ({} if projection is None else {"projection_dim": projection, "vision_use_head": False})


def _paligemma(size: int, text: Config) -> Config:
    return {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "eos_token_id": 1,
        "projection_dim": text["hidden_size"],
        "text_config": text | {"vocab_size": 257216, "max_position_embeddings": 8192},
        "vision_config": _siglip(size, text["hidden_size"]),
    }


def _decoder(hidden: int, layers: int, heads: int, key_value_heads: int, head_size: int, mlp: int) -> Config:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_size,
        "intermediate_size": mlp,
    }


def _gemma2(decoder: Config, scalar: int) -> Config:
    return decoder | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": scalar,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }


def _gemma3_text(decoder: Config, **facts: Any) -> Config:
    common = {"model_type": "gemma3_text", "sliding_window_pattern": 6, "rope_theta": 1e6, "eos_token_id": [1, 106]}
    return decoder | common | {"rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256} | facts


def _gemma3(decoder: Config, **facts: Any) -> Config:
    scaling = {"rope_type": "linear", "factor": 8.0}
    text = _gemma3_text(decoder, vocab_size=262208, sliding_window=1024, max_position_embeddings=131072)
    return {
        "model_type": "gemma3",
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 106],
        "text_config": text | {"rope_scaling": scaling} | facts,
        "vision_config": _siglip(896),
    }


def _layer_types(layers: int, period: int) -> list[str]:
    kinds = ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)]
    return [*kinds[:-1], "full_attention"]


def _gemma4_text(decoder: Config, period: int, **facts: Any) -> Config:
    return decoder | {
        "global_head_dim": 512,
        "layer_types": _layer_types(decoder["num_hidden_layers"], period),
        "final_logit_softcapping": 30.0,
        "vocab_size": 262144,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        },
        **facts,
    }


def _gemma4(text: Config, vision: Config, model_type: str = "gemma4", *, audio: Config | None = None) -> Config:
    return {
        "model_type": model_type,
        "image_token_id": 258880,
        "video_token_id": 258884,
        "audio_token_id": 258881,
        "eos_token_id": [1, 106, 50],
        "audio_config": audio,
        "text_config": text | {"model_type": f"{model_type}_text"},
        "vision_config": vision,
    }


def _gemma4_small(decoder: Config, period: int, sharers: int, wide: bool) -> Config:
    text = _gemma4_text(
        decoder,
        period,
        sliding_window=512,
        max_position_embeddings=131072,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        num_kv_shared_layers=sharers,
        use_double_wide_mlp=wide,
    )
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12}
    tower |= {"num_key_value_heads": 12, "head_dim": 64, "use_clipped_linears": True, "standardize": False}
    return _gemma4(text, tower, audio=_CONFORMER)


def _gemma4_large_text(decoder: Config, global_heads: int, **facts: Any) -> Config:
    return _gemma4_text(
        decoder,
        6,
        sliding_window=1024,
        max_position_embeddings=262144,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=global_heads,
        use_bidirectional_attention="vision",
        **facts,
    )


_CONFORMER: Config = {
    "model_type": "gemma4_audio",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "subsampling_conv_channels": [128, 32],
    "output_proj_dims": 1536,
    "use_clipped_linears": True,
}
_GEMMA4_LARGE_TOWER: Config = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "use_clipped_linears": False,
    "standardize": True,
}
_GEMMA1 = _decoder(2048, 18, 8, 1, 256, 16384) | {"model_type": "gemma"}
_GEMMA2 = {
    "3b": _gemma2(_decoder(2304, 26, 8, 4, 256, 9216), 256),
    "10b": _gemma2(_decoder(3584, 42, 16, 8, 256, 14336), 256),
    "28b": _gemma2(_decoder(4608, 46, 32, 16, 128, 36864), 144),
}
_EXPERTS: Config = {
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}

OFFICIAL: dict[str, Config] = {
    **{f"google/paligemma-3b-pt-{size}": _paligemma(size, _GEMMA1) for size in (224, 448, 896)},
    **{f"google/paligemma-3b-mix-{size}": _paligemma(size, _GEMMA1) for size in (224, 448)},
    **{
        f"google/paligemma2-{text}-pt-{size}": _paligemma(size, _GEMMA2[text])
        for text in _GEMMA2
        for size in (224, 448, 896)
    },
    "google/gemma-3-270m-it": _gemma3_text(
        _decoder(640, 18, 4, 1, 256, 2048), vocab_size=262144, sliding_window=512, max_position_embeddings=32768
    ),
    "google/gemma-3-1b-it": _gemma3_text(
        _decoder(1152, 26, 4, 1, 256, 6912), vocab_size=262144, sliding_window=512, max_position_embeddings=32768
    ),
    "google/gemma-3-4b-it": _gemma3(_decoder(2560, 34, 8, 4, 256, 10240)),
    "google/gemma-3-12b-it": _gemma3(_decoder(3840, 48, 16, 8, 256, 15360)),
    "google/gemma-3-27b-it": _gemma3(_decoder(5376, 62, 32, 16, 128, 21504), query_pre_attn_scalar=168),
    "google/gemma-4-E2B-it": _gemma4_small(_decoder(1536, 35, 8, 1, 256, 6144), 5, 20, True),
    "google/gemma-4-E4B-it": _gemma4_small(_decoder(2560, 42, 8, 2, 256, 10240), 6, 18, False),
    "google/gemma-4-12B-it": _gemma4(
        _gemma4_large_text(_decoder(3840, 48, 16, 8, 256, 15360), 1),
        {},
        "gemma4_unified",
        audio={"audio_embed_dim": 640},
    ),
    "google/gemma-4-26B-A4B-it": _gemma4(
        _gemma4_large_text(_decoder(2816, 30, 16, 8, 256, 2112), 2, **_EXPERTS), _GEMMA4_LARGE_TOWER
    ),
    "google/gemma-4-31B-it": _gemma4(
        _gemma4_large_text(_decoder(5376, 60, 32, 16, 256, 21504), 4), _GEMMA4_LARGE_TOWER
    ),
}
