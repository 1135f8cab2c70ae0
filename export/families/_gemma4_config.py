"""Configuration of Gemma 4: config.json -> the facts that the graphs need.

Defaults are those of transformers' Gemma4Config and Gemma4UnifiedConfig: published files leave out what equals them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...engine.errors import ExportError
from . import ConfigReader

__all__ = [
    "Config",
    "ConformerConfig",
    "ExpertFacts",
    "FrameConfig",
    "LayerFacts",
    "PatchConfig",
    "TextConfig",
    "VisionConfig",
    "read",
    "read_unified",
]

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One decoder layer. `owns_state` is false for layers that read the keys and values of an earlier one.

    `value_is_key` layers have no value projection: their values are the projected keys, normed but not rotated.
    """

    windowed: bool
    head_size: int
    key_value_heads: int
    intermediate: int
    owns_state: bool
    value_is_key: bool = False


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """The experts beside the MLP of every layer: how many, how many of them a token uses, and their width."""

    count: int
    used: int
    intermediate: int


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
    image_blocks: bool  # in windowed layers the soft tokens of a picture see each other
    experts: ExpertFacts | None


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
class PatchConfig:
    """Pictures without a tower (12B): one linear layer over raw patches of patch * pool pixels a side."""

    hidden: int
    patch: int
    pool: int
    table: int  # positions per axis


@dataclass(frozen=True, slots=True)
class ConformerConfig:
    """The audio tower of E2B and E4B. A row sees itself and the `window` - 1 rows before it."""

    hidden: int
    layers: int
    heads: int
    channels: tuple[int, int]  # of the two convolutions in front
    kernel: int  # rows that the convolution of each layer sees
    window: int
    soft_cap: float
    residual: float  # share of each feed-forward step that is added
    output: int  # width before the projection
    clipped: bool


@dataclass(frozen=True, slots=True)
class FrameConfig:
    """Sound without a tower (12B): one linear layer over frames of `samples` samples."""

    samples: int


@dataclass(frozen=True, slots=True)
class Config:
    text: TextConfig
    vision: VisionConfig | PatchConfig | None
    audio: ConformerConfig | FrameConfig | None
    media_ids: dict[str, int]  # placeholder ids: image, video, audio

    @property
    def has_audio(self) -> bool:
        return self.audio is not None


def read(values: dict[str, Any]) -> Config:
    """Read config.json of Gemma4ForConditionalGeneration, or of Gemma4ForCausalLM, which is the text part alone."""
    reader = ConfigReader(values)
    media_ids = _read_media_ids(reader)
    if values.get("model_type") == "gemma4_text":
        text = _read_text(reader, reader.flag("tie_word_embeddings", True), has_image=False)
        return Config(text=text, vision=None, audio=None, media_ids=media_ids)
    has_image, has_audio = (reader.optional(f"{kind}_config") is not None for kind in ("vision", "audio"))
    tied = reader.flag("tie_word_embeddings", True)
    return Config(
        text=_read_text(reader.section("text_config"), tied, has_image=has_image),
        vision=_read_vision(reader.section("vision_config")) if has_image else None,
        audio=_read_conformer(reader.section("audio_config")) if has_audio else None,
        media_ids=media_ids,
    )


def read_unified(values: dict[str, Any]) -> Config:
    """Read config.json of Gemma4UnifiedForConditionalGeneration or of Gemma4UnifiedForCausalLM."""
    reader = ConfigReader(values)
    tied, media_ids = reader.flag("tie_word_embeddings", True), _read_media_ids(reader)
    if values.get("model_type") == "gemma4_unified_text":
        text = _read_text(reader, tied, has_image=False, unified=True)
        return Config(text=text, vision=None, audio=None, media_ids=media_ids)
    has_image, has_audio = (reader.optional(f"{kind}_config") is not None for kind in ("vision", "audio"))
    return Config(
        text=_read_text(reader.section("text_config"), tied, has_image=has_image, unified=True),
        vision=_read_patches(reader.section("vision_config")) if has_image else None,
        audio=_read_frames(reader.section("audio_config")) if has_audio else None,
        media_ids=media_ids,
    )


def _read_media_ids(reader: ConfigReader) -> dict[str, int]:
    """Ids of the placeholders of media; a text-only configuration has none of its own."""
    defaults = {"image": 258880, "video": 258884, "audio": 258881}
    return {name: reader.integer(f"{name}_token_id", default) for name, default in defaults.items()}


def _read_text(reader: ConfigReader, tied: bool, *, has_image: bool, unified: bool = False) -> TextConfig:
    """The decoder. `unified` has the defaults of Gemma4UnifiedTextConfig, which knows neither per-layer inputs nor
    experts."""
    reader.expect("hidden_activation", (None, "gelu_pytorch_tanh"))
    reader.expect("attention_bias", (None, False))
    if unified:
        reader.expect("enable_moe_block", (None, False))
        reader.expect("hidden_size_per_layer_input", (None, 0))
    reader.expect("use_bidirectional_attention", (None, False, "vision"))
    reader.expect_epsilon(1e-6)
    bidirectional = reader.values.get("use_bidirectional_attention", "vision" if unified else None)
    layers = _read_layers(reader)
    owners = sum(layer.owns_state for layer in layers)
    image_blocks = has_image and bidirectional == "vision"
    if image_blocks and owners < len(layers):
        raise ExportError(
            f"{reader.where}: num_kv_shared_layers = {len(layers) - owners} is not supported beside"
            " use_bidirectional_attention = 'vision'"
        )
    for windowed in (True, False):
        sizes = sorted({layer.head_size for layer in layers if layer.windowed == windowed})
        if len(sizes) > 1:
            kind = SLIDING if windowed else FULL
            raise ExportError(f"{reader.where}: head_dim must be the same in all {kind} layers, not {sizes}")
    local_theta, global_theta, global_partial = _read_ropes(reader)
    heads = reader.integer("num_attention_heads", 8)
    for layer in layers:
        if layer.key_value_heads < 1 or heads % layer.key_value_heads:
            raise ExportError(
                f"{reader.where}: num_attention_heads = {heads} is no multiple of num_key_value_heads = "
                f"{layer.key_value_heads}"
            )
    return TextConfig(
        hidden=reader.integer("hidden_size", 2304),
        heads=heads,
        vocabulary=reader.integer("vocab_size", 262144),
        context=reader.count("max_position_embeddings", 262144 if unified else 131072),
        window=reader.count("sliding_window", 1024 if unified else 512),
        layers=layers,
        owners=owners,
        per_layer=0 if unified else reader.integer("hidden_size_per_layer_input", 256),
        per_layer_vocabulary=reader.integer("vocab_size_per_layer_input", 262144),
        local_theta=local_theta,
        global_theta=global_theta,
        global_partial=global_partial,
        soft_cap=reader.cap("final_logit_softcapping"),
        padding_id=reader.integer("pad_token_id", 0),
        tied=tied,
        image_blocks=image_blocks,
        experts=_read_experts(reader),
    )


def _read_experts(reader: ConfigReader) -> ExpertFacts | None:
    if not reader.flag("enable_moe_block", False):
        return None
    keys = ("num_experts", "top_k_experts", "moe_intermediate_size")
    count, used, intermediate = (reader.integer(key) for key in keys)
    if not 1 <= used <= count:
        raise ExportError(f"{reader.where}: top_k_experts = {used} must be from 1 to num_experts = {count}")
    return ExpertFacts(count, used, intermediate)


def _read_ropes(reader: ConfigReader) -> tuple[float, float, float | None]:
    """Base of the sliding layers, base of the global layers, and the share of the pairs that rotate in those."""
    if reader.optional("rope_parameters") is None:
        return 10_000.0, 1_000_000.0, 0.25
    ropes = reader.section("rope_parameters")
    local, everywhere = ropes.section(SLIDING), ropes.section(FULL)
    local.expect("rope_type", (None, "default"))
    everywhere.expect("rope_type", (None, "default", "proportional"))
    proportional = everywhere.optional("rope_type") == "proportional"
    for rope in (local, everywhere):
        rope.expect("factor", (None, 1, 1.0))
    return (
        local.positive("rope_theta", 10_000.0),
        everywhere.positive("rope_theta", 1_000_000.0),
        everywhere.number("partial_rotary_factor", 1.0) if proportional else None,
    )


def _read_kinds(reader: ConfigReader) -> list[str]:
    """Kind of every layer; the last one is global whatever the list says (Gemma4TextConfig.__post_init__)."""
    count = reader.integer("num_hidden_layers", 30)
    kinds = reader.strings("layer_types", []) or [FULL if (index + 1) % 6 == 0 else SLIDING for index in range(count)]
    unknown = sorted({str(kind) for kind in kinds} - {SLIDING, FULL})
    if unknown or len(kinds) != count:
        raise ExportError(
            f"{reader.where}: layer_types must have {count} known entries, has {len(kinds)}; unknown: {unknown}"
        )
    return [*kinds[:-1], FULL]


def _read_layers(reader: ConfigReader) -> tuple[LayerFacts, ...]:
    """Per-layer facts.

    Global layers have their own head size and, with `attention_k_eq_v`, their own number of key/value heads: in
    `per_layer_config`, or in the older `global_head_dim` and `num_global_key_value_heads`.
    """
    kinds = _read_kinds(reader)
    sharers = reader.integer("num_kv_shared_layers", 0)
    if not 0 <= sharers < len(kinds):
        raise ExportError(f"{reader.where}: num_kv_shared_layers = {sharers} of {len(kinds)} layers is not possible")
    owners = len(kinds) - sharers
    missing = set(kinds[owners:]) - set(kinds[:owners])
    if missing:
        raise ExportError(
            f"{reader.where}: layers from {owners} on share keys and values, but no layer before owns {sorted(missing)}"
        )
    value_is_key = reader.flag("attention_k_eq_v", False)
    head_size, key_value_heads = reader.integer("head_dim", 256), reader.integer("num_key_value_heads", 4)
    overrides = _read_overrides(reader, len(kinds))
    if overrides is None:
        older = {"head_dim": reader.integer("global_head_dim", 512)}
        if value_is_key:
            older["num_key_value_heads"] = reader.integer("num_global_key_value_heads", key_value_heads)
        override = ConfigReader(older, reader.where)
        overrides = {index: override for index, kind in enumerate(kinds) if kind == FULL}
    layers = []
    for index, kind in enumerate(kinds):
        own = overrides.get(index, ConfigReader({}, reader.where))
        wide = 2 if reader.flag("use_double_wide_mlp", False) and index >= owners else 1
        layers.append(
            LayerFacts(
                windowed=kind == SLIDING,
                head_size=own.integer("head_dim", head_size),
                key_value_heads=own.integer("num_key_value_heads", key_value_heads),
                intermediate=own.integer("intermediate_size", reader.integer("intermediate_size", 9216)) * wide,
                owns_state=index < owners,
                value_is_key=value_is_key and kind == FULL,
            )
        )
    return tuple(layers)


def _read_overrides(reader: ConfigReader, count: int) -> dict[int, ConfigReader] | None:
    """`per_layer_config`: layer number (as text) -> its own values; None for configurations without it."""
    if reader.optional("per_layer_config") is None:
        return None
    section = reader.section("per_layer_config")
    overrides = {}
    for key in section.values:
        if not key.isdecimal() or int(key) >= count:
            raise ExportError(f"{section.where}: {key!r} is not the number of one of the {count} layers")
        layer = section.section(key)
        unknown = sorted(set(layer.values) - {"head_dim", "num_key_value_heads", "intermediate_size"})
        if unknown:
            raise ExportError(f"{layer.where}: {', '.join(map(repr, unknown))} cannot differ between layers")
        overrides[int(key)] = layer
    return overrides


def _read_vision(reader: ConfigReader) -> VisionConfig:
    reader.expect("hidden_activation", (None, "gelu_pytorch_tanh"))
    reader.expect("attention_bias", (None, False))
    reader.expect_epsilon(1e-6)
    heads = reader.integer("num_attention_heads", 12)
    reader.expect("num_key_value_heads", (heads, *((None,) if heads == 12 else ())))
    rope = ConfigReader(reader.optional("rope_parameters") or {}, f"{reader.where}: rope_parameters")
    rope.expect("rope_type", (None, "default", "axial"))
    return VisionConfig(
        hidden=reader.integer("hidden_size", 768),
        layers=reader.integer("num_hidden_layers", 16),
        heads=heads,
        head_size=reader.integer("head_dim", 64),
        intermediate=reader.integer("intermediate_size", 3072),
        patch=reader.integer("patch_size", 16),
        pool=reader.integer("pooling_kernel_size", 3),
        table=reader.integer("position_embedding_size", 10240),
        theta=rope.number("rope_theta", 100.0),
        clipped=reader.flag("use_clipped_linears", False),
        standardize=reader.flag("standardize", False),
    )


def _read_patches(reader: ConfigReader) -> PatchConfig:
    reader.expect_epsilon(1e-6)
    hidden = reader.integer("mm_embed_dim", 3840)
    reader.expect("output_proj_dims", (hidden, *((None,) if hidden == 3840 else ())))
    return PatchConfig(
        hidden=hidden,
        patch=reader.integer("patch_size", 16),
        pool=reader.integer("pooling_kernel_size", 3),
        table=reader.integer("mm_posemb_size", 1120),
    )


def _read_conformer(reader: ConfigReader) -> ConformerConfig:
    reader.expect("hidden_act", (None, "silu"))
    reader.expect("attention_context_right", (None, 0))
    reader.expect("gradient_clipping", (None, 1e10))  # no float32 reaches it
    reader.expect_epsilon(1e-6)
    # Gemma4AudioRelPositionalEncoding has no other distances than those of one block.
    window = reader.integer("attention_context_left", 13) - 1
    reader.expect("attention_chunk_size", (window, *((None,) if window == 12 else ())))
    channels: list[Any] = reader.strings("subsampling_conv_channels", [128, 32])
    # Gemma4AudioSubSampleConvProjection takes the first for the number of mel filters.
    if len(channels) != 2 or channels[0] != 128 or not (type(channels[1]) is int and channels[1] > 0):
        raise ExportError(f"{reader.where}: subsampling_conv_channels = {channels!r} must be 128 and another number")
    hidden, heads = reader.integer("hidden_size", 1024), reader.integer("num_attention_heads", 8)
    if hidden % 2 or heads < 1 or hidden % heads:
        raise ExportError(f"{reader.where}: hidden_size = {hidden} cannot be cut into {heads} heads")
    return ConformerConfig(
        hidden=hidden,
        layers=reader.integer("num_hidden_layers", 12),
        heads=heads,
        channels=(128, channels[1]),
        kernel=reader.integer("conv_kernel_size", 5),
        window=window,
        soft_cap=reader.number("attention_logit_cap", 50.0),
        residual=reader.number("residual_weight", 0.5),
        output=reader.integer("output_proj_dims", 1536),
        clipped=reader.flag("use_clipped_linears", True),
    )


def _read_frames(reader: ConfigReader) -> FrameConfig:
    reader.expect_epsilon(1e-6)
    return FrameConfig(samples=reader.integer("audio_embed_dim", 640))
