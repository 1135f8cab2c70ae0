"""Gemma 4 with a vision tower (E2B, E4B, 26B-A4B, 31B), and the decoder of any size alone.

The decoder, the vision graph and the configuration are in the files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...engine.errors import ExportError
from ...engine.manifest import (
    AudioFacts,
    FramesFacts,
    ImageFacts,
    PlaceholderFacts,
    ReplyFacts,
    VideoFacts,
)
from .. import blocks
from ..checkpoint import Checkpoint, Weights
from . import ConfigReader, ExportOptions, Facts, Family, full_state_note
from ._gemma4_audio import HOP, RATE, build_audio
from ._gemma4_config import Config, TextConfig, read
from ._gemma4_decoder import build_decoder, build_embed, layer_name
from ._gemma4_vision import build_vision

__all__ = ["FAMILY", "TEXT_PREFIXES", "audio_facts", "decoder_facts", "image_facts", "video_facts"]

OFFICIAL_BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens per image that Gemma 4 was trained for
# "model." alone: the decoder without anything else.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")


def _graphs(config: Config) -> dict[str, object]:
    vision = {"vision": build_vision} if config.vision is not None else {}
    audio = {"audio": build_audio} if config.audio is not None else {}
    return {**vision, **audio, "embed": build_embed, "decoder": build_decoder}


def finish(checkpoint: Checkpoint, weights: Weights, config: Config, options: ExportOptions) -> Facts:
    vision = config.vision
    image = None if vision is None else image_facts(checkpoint, vision.patch, vision.pool)
    audio = None if config.audio is None else _log_mel_facts(checkpoint)
    return decoder_facts(weights, config.text, image, video_facts(checkpoint, image), audio)


def decoder_facts(
    weights: Weights, text: TextConfig, image: ImageFacts | None, video: VideoFacts | None, audio: AudioFacts | None
) -> Facts:
    """What all of Gemma 4 has in common; marks what published files carry and no graph reads."""
    if text.tied:
        weights.drop_copy("lm_head.weight", "text.embed_tokens.weight")
    for layer in range(text.owners, len(text.layers)):
        for part in ("k_proj", "v_proj", "k_norm"):
            weights.drop(f"{layer_name(layer)}.self_attn.{part}.weight")
    buffered = [layer.windowed and not text.image_blocks for layer in text.layers]
    state = blocks.state_pairs(buffered[: text.owners])
    rows = "logit_rows:any" if text.owners == len(text.layers) else "logit_rows:last"
    return Facts(
        requires=(
            *(f"state:{kind}" for kind in ("global", "window") if any(pair.kind == kind for pair in state)),
            rows,
            *(("attention:image_blocks",) if text.image_blocks else ()),
            *((f"image:{image.policy}",) if image is not None else ()),
            *(("video:clock_frames",) if video is not None else ()),
            *((f"audio:{audio.policy}",) if audio is not None else ()),
        ),
        state=state,
        image=image,
        image_prompt=None
        if image is None
        else PlaceholderFacts(item="<|image|>", before="<|image>", soft="<|image|>", after="<image|>"),
        video=video,
        video_prompt=None
        if video is None
        else FramesFacts(item="<|video|>", before=" <|image>", soft="<|video|>", after="<image|>", between=" "),
        audio=audio,
        audio_prompt=None
        if audio is None
        else PlaceholderFacts(item="<|audio|>", before="<|audio>", soft="<|audio|>", after="<audio|>"),
        reply=ReplyFacts(
            boxes="box_2d",
            thought=("<|channel>", "<channel|>"),
            tool_call=("<|tool_call>", "<tool_call|>"),
        ),
        turn_ends=("<turn|>", "<|tool_response>"),
        context=text.context,
        notes=_notes(text),
    )


def _notes(text: TextConfig) -> tuple[str, ...]:
    notes = []
    if text.image_blocks:
        values = [2 * layer.key_value_heads * layer.head_size for layer in text.layers]
        windowed = [layer.windowed for layer in text.layers]
        notes.append(full_state_note(values, windowed, text.window, "pictures did not see all of themselves"))
    if text.experts is not None:
        notes.append(
            f"a token uses {text.experts.used} of {text.experts.count} experts in each layer; their matrices are read"
            " from the mapped file and turned into floats one by one, each once for all rows of a chunk"
        )
    return tuple(notes)


def image_facts(checkpoint: Checkpoint, patch: int, pool: int) -> ImageFacts:
    """Image policy from processor_config.json or preprocessor_config.json, with Gemma4ImageProcessor's defaults.

    `patch` and `pool` are what the vision configuration says about its pixels and soft tokens.
    """
    values = checkpoint.json("preprocessor_config.json")
    processor = checkpoint.json("processor_config.json")
    reader = ConfigReader({**values, **processor, **processor.get("image_processor", {})}, "processor_config.json")
    for key, expected in (("patch_size", patch), ("pooling_kernel_size", pool), ("resample", 3)):
        reader.expect(key, (None, expected))
    default = reader.integer("max_soft_tokens", 280)
    budgets = tuple(sorted(reader.strings("siglance_budgets", list(OFFICIAL_BUDGETS))))
    if default not in budgets:
        raise ExportError(f"processor_config.json: max_soft_tokens {default} is not one of the budgets {budgets}")
    return ImageFacts(
        policy="aspect_patches",
        patch_size=patch,
        pool_size=pool,
        budgets=tuple(int(budget) for budget in budgets),
        default_budget=default,
        resample="bicubic",
    )


def video_facts(checkpoint: Checkpoint, image: ImageFacts | None) -> VideoFacts | None:
    """Frames of videos, with Gemma4VideoProcessor's default budget; None for a model that was not made for it."""
    processor = checkpoint.json("processor_config.json")
    values = {**checkpoint.json("video_preprocessor_config.json"), **processor.get("video_processor", {})}
    default = ConfigReader(values, "processor_config.json: video_processor").integer("max_soft_tokens", 70)
    if image is None or default not in image.budgets:
        return None
    return VideoFacts(budgets=image.budgets, default_budget=default, fps=1.0)


def audio_facts(checkpoint: Checkpoint, expected: Mapping[str, object], **facts: Any) -> AudioFacts:
    """Audio policy: processor_config.json or preprocessor_config.json must say what the graph has, or nothing."""
    processor = checkpoint.json("processor_config.json")
    values = {**checkpoint.json("preprocessor_config.json"), **processor.get("feature_extractor", {})}
    reader = ConfigReader(values, "processor_config.json: feature_extractor")
    for key, value in expected.items():
        reader.expect(key, (None, value))
    tokens = ConfigReader(processor, "processor_config.json").integer("audio_seq_length", 750)
    return AudioFacts(sample_rate=RATE, max_tokens=tokens, **facts)


def _log_mel_facts(checkpoint: Checkpoint) -> AudioFacts:
    return audio_facts(checkpoint, _LOG_MEL, policy="log_mel", frame_step=HOP, frames_per_token=4)


# Gemma4AudioFeatureExtractor, as the graph has it.
_LOG_MEL: dict[str, object] = {
    **{"feature_size": 128, "sampling_rate": RATE, "frame_length": 2 * HOP, "hop_length": HOP, "fft_length": 512},
    **{"min_frequency": 0.0, "max_frequency": 8000.0, "mel_floor": 1e-3, "preemphasis": 0.0, "dither": 0.0},
    **{"input_scale_factor": 1.0, "per_bin_mean": None, "per_bin_stddev": None, "fft_overdrive": False},
}


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text"),
    prefixes={
        "text.": TEXT_PREFIXES,
        "vision.": ("model.vision_tower.", "vision_tower."),
        "embed_vision.": ("model.embed_vision.", "embed_vision."),
        "audio.": ("model.audio_tower.", "audio_tower."),
        "embed_audio.": ("model.embed_audio.", "embed_audio."),
    },
    read=read,
    graphs=_graphs,  # pyright: ignore[reportArgumentType]
    finish=finish,
)
