"""Sizes of pictures, prompts and positions of PaliGemma, scales of features (facts 0.7, 0.10, 0.11)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from siglance.engine import runtime
from siglance.engine.errors import ImageError
from siglance.engine.prompt import PromptBuilder
from siglance.export.families import paligemma
from siglance.kernels import geometry

from .edits import Mutation, constant, replaced, scaled, together, without
from .mutant import Mutant
from .probes import PICTURE_SIZES, POSITIONS, PROMPTS, SOFT_TOKENS

# --- 0.7


def _size(
    factor: Any = lambda height, width, pixels: math.sqrt(pixels / (height * width)),
    side: Any = lambda factor, length, step: math.floor(factor * length / step) * step,
    thin: Any = lambda long, short, budget: min(math.floor(long / short), budget),
    pixels: Any = lambda patch_size, pool_size, budget: budget * (pool_size * patch_size) ** 2,
) -> Mutation:
    """The rule in small, with one of its pieces replaced."""

    def wrong(height: int, width: int, *, patch_size: int, pool_size: int, budget: int) -> tuple[int, int]:
        step = patch_size * pool_size
        scale = factor(height, width, pixels(patch_size, pool_size, budget))
        new_height, new_width = side(scale, height, step), side(scale, width, step)
        if new_height == 0:
            return step, thin(width, height, budget) * step
        return (new_height, new_width) if new_width else (thin(height, width, budget) * step, step)

    return constant(geometry, "aspect_patches_size", wrong)


def _refusing(right: Any) -> Any:
    def refuse(height: int, width: int, facts: Any, budget: Any) -> Any:
        layout = right(height, width, facts, budget)
        if layout.height * layout.width > height * width:
            raise ImageError("the picture is too small")
        return layout

    return refuse


def _policy(make: Any) -> Mutation:
    from siglance.engine.image_policy import POLICIES

    def apply(patch: Any) -> None:
        policy = POLICIES["aspect_patches"]
        patch.setitem(POLICIES, "aspect_patches", dataclasses.replace(policy, layout=make(policy.layout)))

    return apply


def _right_factor(height: int, width: int, pixels: int) -> float:
    return math.sqrt(pixels / (height * width))


SIZES = "0.7 pictures fill the budget"
SIZE_MUTANTS = [
    Mutant(SIZES, "E2B", name, mutation, PICTURE_SIZES)
    for name, mutation in {
        "small ones are not enlarged": _size(factor=lambda *sizes: min(1.0, _right_factor(*sizes))),
        "small ones are refused": _policy(_refusing),
        "at most doubled": _size(factor=lambda *sizes: min(2.0, _right_factor(*sizes))),
        "sides rounded": _size(side=lambda factor, length, step: round(factor * length / step) * step),
        "sides rounded up": _size(side=lambda factor, length, step: math.ceil(factor * length / step) * step),
        "multiples of two tokens": _size(side=lambda factor, length, step: math.floor(factor * length / 96) * 96),
        "budget in patches": _size(pixels=lambda patch, pool, budget: budget * patch**2),
        "thin ones are one token": _size(thin=lambda long, short, budget: 1),
        "thin ones are not bound by the budget": _size(thin=lambda long, short, budget: long // short),
        "root of each": _size(factor=lambda height, width, pixels: math.sqrt(pixels) / math.sqrt(height * width)),
        "sides divided first": _size(side=lambda factor, length, step: math.floor(factor * (length / step)) * step),
    }.items()
]

# --- 0.10


def _layout(change: Any) -> Mutation:
    """Other items in other places: `change(media, begin, text with the end)` -> items."""

    def wrong(right: Any) -> Any:
        def assemble(self: Any, items: Any, guard: Any) -> Any:
            *media, begin, text = items
            return right(self, change(media, begin, text), guard)

        return assemble

    return replaced(PromptBuilder, "_assemble", wrong)


def _facts(**values: Any) -> Mutation:
    """Other facts for the manifest."""
    return replaced(
        paligemma,
        "FAMILY",
        lambda family: dataclasses.replace(
            family, finish=lambda *arguments: dataclasses.replace(family.finish(*arguments), **values)
        ),
    )


LAYOUT = "0.10 prompts of PaliGemma"
LAYOUT_MUTANTS = [
    Mutant(LAYOUT, "PaliGemma 1", name, mutation, PROMPTS)
    for name, mutation in {
        "begin before the pictures": _layout(lambda media, begin, text: [begin, *media, text]),
        "begin on both sides": _layout(lambda media, begin, text: [begin, *media, begin, text]),
        "no begin": _layout(lambda media, begin, text: [*media, text]),
        "text before the pictures": _layout(lambda media, begin, text: [begin, text, *media]),
        "text between pictures and begin": _layout(
            lambda media, begin, text: [*media, text.rstrip("\n"), begin + "\n"]
        ),
        "begin after every picture": _layout(
            lambda media, begin, text: [*(item for medium in media for item in (medium, begin)), text]
        ),
        "no newline": _facts(prompt_end=""),
        "two newlines": _facts(prompt_end="\n\n"),
        "a space instead of the newline": _facts(prompt_end=" "),
        "newline before the text": _layout(lambda media, begin, text: [*media, begin, "\n" + text[:-1]]),
        "pictures where they were given": _facts(
            **{"layout": "inline", "prompt_end": ""},
            requires=("state:global", "logit_rows:any", "attention:prefix", "image:squash"),
        ),
    }.items()
]
COUNT = "0.10 positions of PaliGemma begin at 1"
COUNT_MUTANTS = [
    Mutant(COUNT, layout, f"at {first}", constant(paligemma, "FIRST_POSITION", first), POSITIONS)
    for layout in ("PaliGemma 1", "PaliGemma 2")
    for first in (0, 2)
]

# --- 0.11


def _soft_tokens_times(factor: float) -> Mutation:
    """The engine scales soft tokens when it puts them among the embeddings."""

    def wrong(right: Any) -> Any:
        def splice(self: Any, ids: Any, start: int, soft: Any) -> Any:
            return right(self, ids, start, [dataclasses.replace(run, values=run.values * factor) for run in soft])

        return splice

    return replaced(runtime.Session, "_splice", wrong)


ROOT = math.sqrt(64)  # of the hidden size
FEATURES = "0.11 features are not scaled, text is"
FEATURE_MUTANTS = [
    *(
        Mutant(FEATURES, layout, name, scaled(node, factor), SOFT_TOKENS)
        for layout, node in {
            "PaliGemma 1": "vision/Reshape",
            "PaliGemma 2": "vision/Reshape",
            "Gemma 3 vision": "vision/projector",
            "E2B": "vision/embedding_projection",
            "12B": "vision/projection",
        }.items()
        for name, factor in {"features times sqrt(D)": ROOT, "features over sqrt(D)": 1 / ROOT}.items()
    ),
    *(
        Mutant(FEATURES, layout, "soft tokens times sqrt(D) among embeddings", _soft_tokens_times(ROOT))
        for layout in ("PaliGemma 1", "PaliGemma 2", "Gemma 3 vision", "E2B", "31B")
    ),
    *(
        Mutant(FEATURES, layout, "text not scaled", without("embed/scale_embeddings"))
        for layout in ("PaliGemma 1", "PaliGemma 2", "Gemma 3 text", "Gemma 3 vision", "E2B", "31B")
    ),
    *(
        Mutant(
            *(FEATURES, layout, "neither is scaled, features over sqrt(D)"),
            together(without("embed/scale_embeddings"), _soft_tokens_times(1 / ROOT)),
        )
        for layout in ("PaliGemma 1", "PaliGemma 2")
    ),
]

MUTANTS = [*SIZE_MUTANTS, *LAYOUT_MUTANTS, *COUNT_MUTANTS, *FEATURE_MUTANTS]
