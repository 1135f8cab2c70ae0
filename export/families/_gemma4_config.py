"""Configuration of Gemma 4: config.json -> the facts that the graphs need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...engine.errors import ExportError
from . import ConfigReader

__all__ = ["Config", "LayerFacts", "TextConfig", "VisionConfig", "read"]


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One decoder layer. `owns_state` is false for layers that read the keys and values of an earlier one."""

    windowed: bool
    head_size: int
    key_value_heads: int
    intermediate: int
    owns_state: bool


@dataclass(frozen=True, slots=True)
class TextConfig:
    hidden: int
    heads: int
    vocabulary: int
    context: int
    window: int
    layers: tuple[LayerFacts, ...]
    owners: int  # layers below this index own keys and values
    per_layer: int  # width of the per-layer inputs, 0: none
    per_layer_vocabulary: int
    local_theta: float
    global_theta: float
    global_partial: float | None  # share of the rotating pairs; None: all of them
    soft_cap: float | None
    padding_id: int
    tied: bool


@dataclass(frozen=True, slots=True)
class VisionConfig:
    hidden: int
    layers: int
    heads: int
    head_size: int
    intermediate: int
    patch: int
    pool: int
    table: int
    theta: float
    clipped: bool
    standardize: bool


@dataclass(frozen=True, slots=True)
class Config:
    text: TextConfig
    vision: VisionConfig | None
    media_ids: dict[str, int]  # placeholder ids: image, video, audio
    has_audio: bool


def read(values: dict[str, Any]) -> Config:
    """Read config.json of Gemma4ForConditionalGeneration; defaults are those of transformers' Gemma4Config."""
    reader = ConfigReader(values)
    vision = reader.optional("vision_config")
    return Config(
        text=_read_text(reader.section("text_config"), reader.flag("tie_word_embeddings", True)),
        vision=None if vision is None else _read_vision(reader.section("vision_config")),
        media_ids={
            "image": reader.integer("image_token_id", 258880),
            "video": reader.integer("video_token_id", 258884),
            "audio": reader.integer("audio_token_id", 258881),
        },
        has_audio=reader.optional("audio_config") is not None,
    )


def _read_text(reader: ConfigReader, tied: bool) -> TextConfig:
    reader.expect("hidden_activation", (None, "gelu_pytorch_tanh"))
    reader.expect("attention_bias", (None, False))
    reader.expect("enable_moe_block", (None, False))
    reader.expect("attention_k_eq_v", (None, False))
    reader.expect("use_bidirectional_attention", (None, False))
    reader.expect_epsilon(1e-6)
    ropes = reader.section("rope_parameters")
    local, everywhere = ropes.section("sliding_attention"), ropes.section("full_attention")
    local.expect("rope_type", (None, "default"))
    everywhere.expect("rope_type", (None, "default", "proportional"))
    proportional = everywhere.optional("rope_type") == "proportional"
    layers = _read_layers(reader)
    owners = sum(layer.owns_state for layer in layers)
    soft_cap = reader.optional("final_logit_softcapping")
    return TextConfig(
        hidden=reader.integer("hidden_size", 2304),
        heads=reader.integer("num_attention_heads", 8),
        vocabulary=reader.integer("vocab_size", 262144),
        context=reader.integer("max_position_embeddings", 131072),
        window=reader.integer("sliding_window", 512),
        layers=layers,
        owners=owners,
        per_layer=reader.integer("hidden_size_per_layer_input", 256),
        per_layer_vocabulary=reader.integer("vocab_size_per_layer_input", 262144),
        local_theta=local.number("rope_theta", 10_000.0),
        global_theta=everywhere.number("rope_theta", 1_000_000.0),
        global_partial=everywhere.number("partial_rotary_factor", 1.0) if proportional else None,
        soft_cap=None if soft_cap is None else float(soft_cap),
        padding_id=reader.integer("pad_token_id", 0),
        tied=tied,
    )


def _read_layers(reader: ConfigReader) -> tuple[LayerFacts, ...]:
    """Per-layer facts. Global layers have their own head size, in `per_layer_config` or the older `global_head_dim`."""
    count = reader.integer("num_hidden_layers", 30)
    kinds = reader.strings("layer_types", [])
    if not kinds:
        kinds = ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(count)]
        kinds[-1] = "full_attention"
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != count:
        raise ExportError(
            f"{reader.where}: layer_types must have {count} known entries, has {len(kinds)}; unknown: {unknown}"
        )
    overrides = {int(index): value for index, value in (reader.optional("per_layer_config") or {}).items()}
    global_size = reader.integer("global_head_dim", 512)
    owners = count - reader.integer("num_kv_shared_layers", 0)
    missing = set(kinds[owners:]) - set(kinds[:owners])
    if missing:
        raise ExportError(
            f"{reader.where}: layers from {owners} on share keys and values, but no layer before owns {sorted(missing)}"
        )
    layers = []
    for index, kind in enumerate(kinds):
        windowed, owns = kind == "sliding_attention", index < owners
        size = reader.integer("head_dim", 256) if windowed or overrides else global_size
        override = ConfigReader(overrides.get(index, {}), f"{reader.where}: per_layer_config {index}")
        wide = 2 if reader.flag("use_double_wide_mlp", False) and not owns else 1
        layers.append(
            LayerFacts(
                windowed=windowed,
                head_size=override.integer("head_dim", size),
                key_value_heads=override.integer("num_key_value_heads", reader.integer("num_key_value_heads", 4)),
                intermediate=override.integer("intermediate_size", reader.integer("intermediate_size", 9216)) * wide,
                owns_state=owns,
            )
        )
    return tuple(layers)


def _read_vision(reader: ConfigReader) -> VisionConfig:
    reader.expect("hidden_activation", (None, "gelu_pytorch_tanh"))
    reader.expect("attention_bias", (None, False))
    reader.expect_epsilon(1e-6)
    heads = reader.integer("num_attention_heads", 12)
    reader.expect("num_key_value_heads", (heads, *((None,) if heads == 12 else ())))
    rope = reader.optional("rope_parameters") or {}
    return VisionConfig(
        hidden=reader.integer("hidden_size", 768),
        layers=reader.integer("num_hidden_layers", 16),
        heads=heads,
        head_size=reader.integer("head_dim", 64),
        intermediate=reader.integer("intermediate_size", 3072),
        patch=reader.integer("patch_size", 16),
        pool=reader.integer("pooling_kernel_size", 3),
        table=reader.integer("position_embedding_size", 10240),
        theta=float(rope.get("rope_theta", 100.0)),
        clipped=reader.flag("use_clipped_linears", False),
        standardize=reader.flag("standardize", False),
    )
