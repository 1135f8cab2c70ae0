"""Random tiny checkpoints of Gemma 4 E2B with ears, in the layout of the published files; see `tiny.py`.

The tower has the official front end and window, and is narrow. Its numbers are chosen so that every rule changes the
soft tokens: attention sharp enough for positions to matter and a cap that bends its scores, clip bounds that cut, a
convolution whose taps differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import tiny
from .tiny import Config
from .tiny_tokenizer import GEMMA4_TEMPLATE, GEMMA4_TOKENS, write_tokenizer

# What config.json on the hub need not say, because it is the default of Gemma4AudioConfig.
_UNSAID = {
    *("attention_chunk_size", "attention_context_left", "attention_context_right", "attention_invalid_logits_value"),
    *("conv_kernel_size", "gradient_clipping", "hidden_act", "initializer_range", "residual_weight", "rms_norm_eps"),
    *("use_clipped_linears",),
}


def write_gemma4_audio(
    folder: Path | str,
    *,
    seed: int = 0,
    vision: bool = True,
    audio_overrides: Config | None = None,
    storage: str = "float32",
    shards: int = 1,
    key_style: str = "saved",
    **overrides: Any,
) -> Config:
    """Write a tiny `Gemma4ForConditionalGeneration` with an audio tower into `folder`; return its config.json.

    `overrides` replace keys of text_config, `audio_overrides` keys of audio_config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = tiny._gemma4_text_config(storage, key_style, dict(overrides))
    ids = write_tokenizer(folder, GEMMA4_TOKENS, text["vocab_size"])
    tower = tiny._gemma4_vision_config(storage, key_style, {}) if vision else None
    audio = tiny._override(AUDIO, audio_overrides or {})
    config: Config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "audio_config": audio,
        **{"boi_token_id": ids["<|image>"], "image_token_id": ids["<|image|>"], "eoi_token_id": ids["<image|>"]},
        **{"boa_token_id": ids["<|audio>"], "audio_token_id": ids["<|audio|>"], "eoa_token_index": ids["<audio|>"]},
        **{"video_token_id": ids["<|video|>"], "dtype": storage, "initializer_range": 0.02, "text_config": text},
        **{"tie_word_embeddings": True, "transformers_version": "5.24.0", "vision_config": tower},
    }
    weights = tiny._gemma4_weights(config, seed, False)
    draw = tiny._RandomWeights(seed + 1000)
    draw_tower(draw, audio)
    draw.linear("model.embed_audio.embedding_projection", text["hidden_size"], audio["output_proj_dims"])
    if key_style == "hub":
        config["audio_config"] = {key: value for key, value in audio.items() if key not in _UNSAID}
    tiny._write_checkpoint(folder, config, weights | draw.tensors, storage, shards)
    (folder / "chat_template.jinja").write_text(GEMMA4_TEMPLATE, encoding="utf-8")
    tiny._write_generation_config(folder, [1, ids["<turn|>"], ids["<|tool_response>"]])
    facts = tiny._gemma4_processor_config({"patch_size": 16, "pooling_kernel_size": 3})
    facts["feature_extractor"] = FEATURE_EXTRACTOR
    tiny._write_json(folder / "processor_config.json", facts)
    return config | {"audio_config": audio}


AUDIO: Config = {
    "model_type": "gemma4_audio",
    **{"attention_chunk_size": 12, "attention_context_left": 13, "attention_context_right": 0},
    **{"attention_invalid_logits_value": -1e9, "attention_logit_cap": 6.0, "conv_kernel_size": 5},
    **{"gradient_clipping": 1e10, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02},
    **{"num_attention_heads": 4, "num_hidden_layers": 2, "output_proj_dims": 48, "residual_weight": 0.5},
    **{"rms_norm_eps": 1e-6, "subsampling_conv_channels": [128, 8], "use_clipped_linears": True},
}
FEATURE_EXTRACTOR: Config = {
    "feature_extractor_type": "Gemma4AudioFeatureExtractor",
    **{"dither": 0.0, "feature_size": 128, "fft_length": 512, "fft_overdrive": False, "frame_length": 320},
    **{"hop_length": 160, "input_scale_factor": 1.0, "max_frequency": 8000.0, "mel_floor": 0.001},
    **{"min_frequency": 0.0, "padding_side": "right", "padding_value": 0.0, "per_bin_mean": None},
    **{"per_bin_stddev": None, "preemphasis": 0.0, "preemphasis_htk_flavor": True, "return_attention_mask": True},
    "sampling_rate": 16000,
}


def draw_tower(draw: tiny._RandomWeights, audio: Config) -> None:
    """Tensor names of the published files."""
    hidden, tower = audio["hidden_size"], "model.audio_tower"
    channels = (1, *audio["subsampling_conv_channels"])
    prefix = f"{tower}.subsample_conv_projection"
    for index in range(2):
        shape = (channels[index + 1], channels[index], 3, 3)
        draw.tensors[f"{prefix}.layer{index}.conv.weight"] = draw.rng.normal(0, (9 * channels[index]) ** -0.5, shape)
        draw.norm(f"{prefix}.layer{index}.norm", channels[index + 1])
    draw.linear(f"{prefix}.input_proj_linear", hidden, 32 * channels[2])
    for layer in range(audio["num_hidden_layers"]):
        _layer(draw, f"{tower}.layers.{layer}", audio)
    draw.linear(f"{tower}.output_proj", audio["output_proj_dims"], hidden)
    draw.uniform(f"{tower}.output_proj.bias", audio["output_proj_dims"], -0.5, 0.5)


def _layer(draw: tiny._RandomWeights, prefix: str, audio: Config) -> None:
    hidden, heads = audio["hidden_size"], audio["num_attention_heads"]
    for name in ("norm_pre_attn", "norm_out", "lconv1d.pre_layer_norm", "lconv1d.conv_norm"):
        draw.norm(f"{prefix}.{name}", hidden)
    draw.norm(f"{prefix}.norm_post_attn", hidden, 1.0, 2.5)
    linears = {f"self_attn.{name}": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "post")}
    linears |= {"lconv1d.linear_start": (2 * hidden, hidden), "lconv1d.linear_end": (hidden, hidden)}
    for half in ("feed_forward1", "feed_forward2"):
        draw.norm(f"{prefix}.{half}.pre_layer_norm", hidden)
        draw.norm(f"{prefix}.{half}.post_layer_norm", hidden, 1.0, 2.5)
        linears |= {f"{half}.ffw_layer_1": (4 * hidden, hidden), f"{half}.ffw_layer_2": (hidden, 4 * hidden)}
    for name, shape in linears.items():
        draw.linear(f"{prefix}.{name}.linear", *shape)
        if audio["use_clipped_linears"]:
            _bounds(draw, f"{prefix}.{name}")
    draw.uniform(f"{prefix}.self_attn.per_dim_scale", (hidden // heads,), -1.0, 2.5)
    draw.linear(f"{prefix}.self_attn.relative_k_proj", hidden, hidden)
    shape = (hidden, 1, audio["conv_kernel_size"])
    draw.tensors[f"{prefix}.lconv1d.depthwise_conv1d.weight"] = draw.rng.normal(0, shape[2] ** -0.5, shape)


def _bounds(draw: tiny._RandomWeights, name: str) -> None:
    """Near one standard deviation of what they cut, and not symmetric."""
    ends = {"input_min": (-1.6, -0.8), "input_max": (0.8, 1.6), "output_min": (-1.5, -0.7), "output_max": (0.7, 1.5)}
    for end, (low, high) in ends.items():
        draw.uniform(f"{name}.{end}", (), low, high)
