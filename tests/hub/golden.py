"""Recorded answers of official checkpoints about a named photograph (tests/goldens/hub), and their comparison.

What the figures mean and how to use them with weights of your own is in tests/goldens/hub/README.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siglance.engine import Engine, Image, Sampling, Text
from siglance.engine.self_test import CLOSE

__all__ = ["FOLDER", "GOLDENS", "Golden", "check_greedy", "check_logits", "check_prompt"]

FOLDER = Path(__file__).parents[1] / "goldens" / "hub"


@dataclass(frozen=True)
class Golden:
    """One recording."""

    model_id: str
    photo: Path
    image_size: tuple[int, int]  # (height, width) in pixels
    prompt: str
    input_ids: list[int]
    first_token_top10: list[tuple[int, float]]
    greedy_ids: list[int]
    greedy_text: str

    @property
    def is_chat(self) -> bool:
        """The base model was asked to complete a text."""
        return self.model_id.endswith("-it")

    @property
    def prompt_ids(self) -> list[int]:
        """The ids that a prompt has: where the recording has two beginning-of-sequence tokens, ours has one.

        (Gemma 3's template writes the token and the tokenizer added another when the recording was made.)
        """
        return self.input_ids[1:] if self.input_ids[:2] == [2, 2] else self.input_ids

    @property
    def parts(self) -> list[Image | Text]:
        return [Image(self.photo), Text(self.prompt)]


def read(path: Path) -> Golden:
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ids: list[int] = []
    for item in facts["input_ids"]:  # [id, count] is a run
        ids += [item[0]] * item[1] if isinstance(item, list) else [item]
    return Golden(
        model_id=facts["model_id"],
        photo=FOLDER / facts["image"],
        image_size=tuple(facts["image_size"]),
        prompt=facts["prompt"],
        input_ids=ids,
        first_token_top10=[(id, logit) for id, logit in facts["first_token_top10"]],
        greedy_ids=facts["greedy_ids"],
        greedy_text=facts["greedy_text"],
    )


GOLDENS = {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}


def check_prompt(engine: Engine, golden: Golden) -> None:
    """Our tokenizer, template and image layout give the recorded prompt."""
    reply = engine.generate(golden.parts, raw=not golden.is_chat, max_tokens=1, sampling=Sampling(temperature=0))
    assert list(reply.prompt_token_ids) == golden.prompt_ids


def check_logits(engine: Engine, golden: Golden) -> None:
    """The ten best first tokens, on the recorded prompt.

    The best is the same, and all ten lie within a tenth of their spread: the rule of `siglance verify` for "close".
    Equal they cannot be, because the recording resized the photograph with another resampler (up to 2 of 255 levels).
    """
    logits = engine.prompt_logits([Image(golden.photo)], prompt_ids=golden.input_ids)[-1]
    ids, expected = zip(*golden.first_token_top10, strict=True)
    assert int(np.argmax(logits)) == ids[0]
    difference = np.abs(logits[list(ids)] - np.array(expected)).max()
    assert difference <= CLOSE * (max(expected) - min(expected)), f"largest difference {difference:.3f}"


def check_greedy(engine: Engine, golden: Golden) -> None:
    """The greedy continuation of the recorded prompt."""
    stop_ids = engine.manifest.stop_ids
    expected = [id for id in golden.greedy_ids if id not in stop_ids]
    reply = engine.generate(
        [Image(golden.photo)],
        prompt_ids=golden.input_ids,
        max_tokens=len(golden.greedy_ids),
        sampling=Sampling(temperature=0),
    )
    assert list(reply.token_ids) == expected, f"{reply.text!r} instead of {golden.greedy_text!r}"
