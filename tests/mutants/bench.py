"""Tiny checkpoints, what the reference says about them, and bundles of them, right and wrong."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine.bundle import Bundle
from siglance.engine.image_policy import resize
from siglance.engine.runtime import SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.export import exporter
from siglance.export.builder import FLOAT, GraphBuilder
from siglance.export.checkpoint import Weights
from siglance.export.families import ExportOptions
from siglance.export.self_check import tokenizer_ids
from siglance.kernels import reference

from .. import reference_gemma4_large, reference_model, reference_siglip, tiny, tiny_gemma4_large, tiny_siglip
from ..parity.test_reference_parity import resized
from ..test_half_precision import HAZARDS, write_gemma3


def write_large_features(folder: Path) -> None:
    """31B whose tower has features beyond float16 and subtracts numbers of that size, as the published one does."""
    tiny_gemma4_large.write_gemma4_dense(folder)
    _enlarge(folder, lambda name: "std_bias" in name or ("vision_tower" in name and "layernorm" in name), 3e4)


def write_large_embedder(folder: Path) -> None:
    """12B whose first linear layer gives numbers beyond float16."""
    tiny_gemma4_large.write_gemma4_unified(folder)
    _enlarge(folder, lambda name: "patch_dense.weight" in name, 2e5)


def write_faint_experts(folder: Path) -> None:
    """26B-A4B whose experts give numbers close to the epsilon of the norm behind them, which hides scales otherwise."""
    tiny_gemma4_large.write_gemma4_experts(folder)
    _enlarge(folder, lambda name: "experts.down_proj" in name, 1e-3)


def write_faint(folder: Path) -> None:
    """E2B whose tower and per-layer inputs give numbers close to the epsilon of the norms behind them."""
    tiny.write_gemma4(folder)
    parts = re.compile(r".*(per_layer_(model_)?projection\.weight|vision_tower.*(patch_embedder|layernorm).*)")
    _enlarge(folder, lambda name: parts.fullmatch(name) is not None, 1e-3)


def _enlarge(folder: Path, chosen: Callable[[str], bool], factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    larger = {name: value * np.float32(factor) for name, value in tensors.items() if chosen(name)}
    save_file(tensors | larger, folder / "model.safetensors")


# A model by the name that the table of mutants shows: who writes it, and with which arguments.
LAYOUTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Gemma 3 text": (tiny.write_gemma3, {"num_key_value_heads": 2}),
    "Gemma 3 vision": (tiny_siglip.write_gemma3_vision, {}),
    "PaliGemma 1": (tiny_siglip.write_paligemma, {}),
    "PaliGemma 2": (tiny_siglip.write_paligemma, {"text": "gemma2"}),
    # Like the published file, with keys and values in layers that share those of others.
    "E2B": (tiny.write_gemma4, {"dead_shared_kv": True}),
    # Per-layer inputs and causal pictures as in E2B, but nothing shared: blocks could be built.
    "E2B, nothing shared": (tiny.write_gemma4, {"num_kv_shared_layers": 0}),
    "E4B": (tiny.write_gemma4, {"use_double_wide_mlp": False, "num_key_value_heads": 2}),
    "31B": (tiny_gemma4_large.write_gemma4_dense, {}),
    "26B-A4B": (tiny_gemma4_large.write_gemma4_experts, {}),
    # Scales at which float16 overflows.
    **{f"Gemma 3, {hazard}": (write_gemma3, {"scales": scales}) for hazard, scales in HAZARDS.items()},
    "31B, large features": (write_large_features, {}),
    # Numbers so small that a norm does not hide their scale.
    "E2B, faint": (write_faint, {}),
    "26B-A4B, faint experts": (write_faint_experts, {}),
    "12B, large embedder": (write_large_embedder, {}),
    "12B": (tiny_gemma4_large.write_gemma4_unified, {"key_style": "hub", "seed": 3}),
}
WINDOW = 8  # of all layouts
LENGTHS = (14, 20, 6, 5)  # soft tokens of the pictures of a prompt
STEPS, EXTENSION = 12, 4  # tokens of the answer: one by one, then all at once
BUDGET = 70
# The last one has two grey levels: the variance of its values is close to the epsilon of a layer norm.
FAINT = np.full((96, 144, 3), 200, np.uint8) + (np.arange(144) // 5 % 2)[None, :, None].astype(np.uint8)
PICTURES = (formula_picture(31, 500), FAINT)


@dataclass(frozen=True)
class Case:
    """A prompt and an answer of one model, and the logits of all their rows by the reference."""

    prompt: np.ndarray
    soft: list[SoftTokens]
    answer: np.ndarray
    logits: np.ndarray
    turn: int | None  # a row at which a second turn can begin; None where a second turn sees more than the reference


class Bench:
    """Makes checkpoints once and bundles as often as asked; everything lies in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._numbers = itertools.count()
        self.checkpoint, self.source = cache(self._checkpoint), cache(self._source)
        self.case, self.soft_tokens = cache(self._case), cache(self._soft_tokens)

    def export(
        self, source: Path, graphs: Sequence[str], patch: pytest.MonkeyPatch, options: ExportOptions | None = None
    ) -> Bundle:
        """A bundle of a checkpoint, made by whatever `patch` has left of the exporter.

        To save time only `graphs` are real, tokens are looked up in this process, and no self-test is recorded.
        """
        find = exporter.find_family

        def find_some(values: dict[str, Any]) -> Any:
            family = find(values)

            def some(facts: Any) -> dict[str, Any]:
                right = family.graphs(facts)
                return {name: build if name in graphs else _build_nothing for name, build in right.items()}

            return dataclasses.replace(family, graphs=some)

        def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments) if function is tokenizer_ids else {"self_test": "{}", "graphs": {}}

        patch.setattr(exporter, "find_family", find_some)
        patch.setattr(exporter, "in_child", in_process)
        patch.setattr(Weights, "check_all_used", lambda self: None)  # the other graphs use the rest
        folder = self.folder / f"bundle-{next(self._numbers)}"
        exporter.export(source, folder, options or ExportOptions(precision="fp32"))
        return Bundle.open(folder)

    # --- the reference

    def _checkpoint(self, layout: str) -> Path:
        folder = self.folder / f"checkpoint-{next(self._numbers)}"
        write, arguments = LAYOUTS[layout]
        write(folder, **arguments)
        return folder

    def _source(self, layout: str) -> tuple[reference_model.Weights, reference_model.Config]:
        weights, config = reference_model.load_checkpoint(self.checkpoint(layout))
        siglip = config["model_type"] in ("paligemma", "gemma3")
        return reference_siglip.canonical(weights) if siglip else weights, config

    def _case(self, layout: str) -> Case:
        _, config = self.source(layout)
        prompts = {"paligemma": _paligemma_prompt, "gemma3_text": _text_prompt}
        prompt, lengths, starts, turn = prompts.get(config["model_type"], _prompt)(config)
        rng = np.random.default_rng(3)
        values = [rng.normal(0, 1, (length, 64)) for length in lengths]
        soft = [SoftTokens(start, np.float32(rows)) for start, rows in zip(starts, values, strict=True)]
        answer = _text(STEPS + EXTENSION, seed=9)
        logits = self._logits(layout, [*prompt, *answer], values, len(prompt))
        return Case(np.array(prompt), soft, np.array(answer), logits, turn)

    def _logits(self, layout: str, ids: list[int], soft: list[np.ndarray], prompt: int) -> np.ndarray:
        weights, config = self.source(layout)
        if config["model_type"] == "gemma3_text":
            return reference_model.gemma3_text_logits(weights, config, ids)
        if config["model_type"] == "gemma3":
            return reference_siglip.gemma3_vision_logits(weights, config, ids, soft)
        if config["model_type"] == "paligemma":
            return reference_siglip.paligemma_logits(weights, config, ids, soft, prompt)
        if config["text_config"].get("hidden_size_per_layer_input"):
            return reference_model.gemma4_text_logits(weights, config, ids, soft)
        return reference_gemma4_large.logits(weights, config, ids, soft)

    def _soft_tokens(self, layout: str) -> list[np.ndarray]:
        """Of all `PICTURES`, by the reference, from sizes and filters that are written down here."""
        weights, config = self.source(layout)
        kind = config["model_type"]
        if kind in ("paligemma", "gemma3"):
            side, first = config["vision_config"]["image_size"], kind == "paligemma"
            shown = [resize(picture, side, side, "bicubic" if first else "bilinear") for picture in PICTURES]
            siglip = reference_siglip.paligemma_soft_tokens if first else reference_siglip.gemma3_soft_tokens
            return [siglip(weights, config, picture) for picture in shown]
        unified = kind == "gemma4_unified"
        tower = reference_gemma4_large.unified_soft_tokens if unified else reference_model.gemma4_soft_tokens
        soft = []
        for picture in PICTURES:
            height, width = resized(picture.shape[1], picture.shape[0], BUDGET)
            raster = reference.patchify(resize(picture, height, width, "bicubic"), 48 if unified else 16)
            soft.append(tower(weights, config, raster.values / 255.0, raster.positions))
        return soft


def _build_nothing(graph: GraphBuilder, *_: object) -> None:
    """In the place of a graph that nobody runs."""
    value = graph.op("Identity", graph.input("nothing", FLOAT, [1]))
    graph.output(value, "still_nothing", FLOAT, [1])


# --- prompts: (ids, lengths of the pictures, their first rows, where a second turn can begin)

_Prompt = tuple[list[int], Sequence[int], list[int], int | None]


def _text(length: int, seed: int = 0) -> list[int]:
    """Ids of ordinary text in all vocabularies."""
    return np.random.default_rng(seed).integers(60, 380, length).tolist()


def _text_prompt(config: reference_model.Config) -> _Prompt:
    return [2, *_text(45)], (), [], 20


def _paligemma_prompt(config: reference_model.Config) -> _Prompt:
    """Two pictures, the beginning of the sequence, text, and a last token: all of them see each other."""
    image = config["image_token_index"]
    return [*[image] * 32, 2, *_text(9), 17], (16, 16), [0, 16], None


def _prompt(config: reference_model.Config) -> _Prompt:
    """Text, a picture, text, a longer one, text, two pictures without a token between them, text.

    In the large sizes the second is a frame of a video. In the small ones, which have none, placeholders of video and
    audio stand in the text.
    """
    suffix = "id" if "boi_token_id" in config else "index"
    begin, end, image = (config[f"{name}_token_{suffix}"] for name in ("boi", "eoi", "image"))
    kinds, ids = [image] * len(LENGTHS), [2, *_text(5)]
    if config["model_type"].startswith("gemma4"):
        video, audio = config["video_token_id"], config["audio_token_id"]
        if config["text_config"].get("hidden_size_per_layer_input"):
            ids += [video, audio, 77]
        else:
            kinds[1] = video
    starts = []
    for index, (kind, length) in enumerate(zip(kinds, LENGTHS, strict=True)):
        ids += [] if index == 3 else [*_text(3, seed=index), begin]  # between the last two is nothing
        starts.append(len(ids))
        ids += [kind] * length + ([] if index == 2 else [end])
    return [*ids, *_text(9, seed=7)], LENGTHS, starts, starts[1] - 2
