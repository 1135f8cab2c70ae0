"""The self-test of a bundle: fixed inputs with the logits they must give, replayed on the device that will run it.

`record` writes what a bundle gives where it was exported; `replay` compares. Inputs are token ids, and pictures and
sounds made by a formula, so that a self-test needs neither tokenizer nor files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.patches import Patches
from .bundle import Bundle
from .errors import BundleError, ModelOutputError
from .graph import Device, Graph, has_device, resolve_device
from .image_policy import POLICIES
from .manifest import AudioFacts, ImageFacts
from .runtime import Runtime, SoftTokens, encode, hear
from .sounds import count_soft_tokens, longest_clip

__all__ = ["CaseResult", "VerifyReport", "formula_picture", "formula_sound", "record", "replay"]

_STEPS = 8  # greedy steps after the prompt
_TOP = 10  # logits stored per step
_TEXT_TOKENS = 12
_MOST_PIXELS = 2**20  # of a stored picture; those that are recorded have 20,160
EQUAL = 1e-3  # largest logit difference that counts as equal: fp32 on another machine
CLOSE = 0.1  # share of the logits' spread that another precision or device may lose


def formula_picture(height: int, width: int) -> np.ndarray:
    """A picture with colour, edges and texture, uint8 [height, width, 3]: integer arithmetic, the same anywhere."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x // 7 ^ y // 5) * 37 % 256)
    return np.stack(channels, axis=-1).astype(np.uint8)


def formula_sound(samples: int) -> np.ndarray:
    """A rising buzz, float32 [samples] in [-1/3, 1/3]: integer arithmetic, the same anywhere."""
    index = np.arange(samples, dtype=np.int64)
    return ((index * (index // 8 + 97) % 20_001 - 10_000) / 30_000).astype(np.float32)


def record(bundle: Bundle, *, prepack: bool = False) -> dict[str, Any]:
    """Run `bundle` where it was exported and return the content of its self_test.json; for `prepack` see `Runtime`."""
    # A machine without a GPU records the self-test of a GPU bundle on its CPU: same graphs, same weights.
    here = has_device(bundle.manifest.target)
    device = "auto" if here else "cpu"
    soft = _record_media(bundle, resolve_device(device, bundle.manifest.target, foreign=not here), prepack)
    runtime = Runtime(bundle, device=device, prepack=prepack, foreign=not here, sees=False)
    return {"format": 1, "cases": [_record_case(runtime, case, soft) for case in _cases(runtime)]}


def _record_media(bundle: Bundle, device: Device, prepack: bool) -> dict[str, np.ndarray]:
    """Soft tokens of the self-test's picture and sound. Each graph is gone before the next is loaded: memory."""
    soft = {}
    picture, sound = bundle.manifest.image, bundle.manifest.audio
    if picture is not None:
        vision = Graph(bundle.path("vision"), device, prepack=prepack)
        patches = _patches(_picture_case(picture), picture)
        count, width = len(patches.values) // picture.pool_size**2, vision.outputs["soft_tokens"].shape[-1]
        soft["image"] = encode(vision, patches.values, patches.positions, count, int(width))
        del vision
    if sound is not None:
        audio = Graph(bundle.path("audio"), device, prepack=prepack)
        width = audio.outputs["soft_tokens"].shape[-1]
        samples = _sound_case(sound)["samples"]
        soft["audio"] = hear(audio, formula_sound(samples), count_soft_tokens(samples, sound), int(width))
    return soft


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: largest difference of the stored logits, and the share of steps whose best token agrees."""

    name: str
    max_logit_difference: float
    argmax_agreement: float
    spread: float  # difference between the largest and smallest stored logit, the scale to judge differences by


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`result` is "equal" (within 1e-3), "close" (within a tenth of the spread and 7 of 8 best tokens) or "wrong"."""

    result: str
    max_logit_difference: float
    argmax_agreement: float
    cases: tuple[CaseResult, ...]


def replay(bundle: Bundle, runtime: Runtime) -> VerifyReport:
    """Run the self-test of `bundle` on `runtime`. Raises BundleError when it has none or it is malformed."""
    try:
        stored = json.loads(bundle.path("self_test").read_text(encoding="utf-8"))
        cases = tuple(_replay_case(runtime, case) for case in stored["cases"])
        if stored["format"] != 1 or not cases:
            raise ValueError("no cases of format 1")
    except (LookupError, TypeError, ValueError, OSError, MemoryError) as error:
        raise BundleError(f"self_test.json cannot be used: {type(error).__name__}: {error}") from None
    difference = max(case.max_logit_difference for case in cases)
    agreement = min(case.argmax_agreement for case in cases)
    close = agreement >= 7 / 8 and all(case.max_logit_difference <= CLOSE * case.spread for case in cases)
    result = "equal" if difference <= EQUAL and agreement == 1.0 else "close" if close else "wrong"
    return VerifyReport(result, difference, agreement, cases)


def _cases(runtime: Runtime) -> list[dict[str, Any]]:
    """Text alone; for a bundle that sees, one picture at its smallest budget; for one that hears, a short sound.

    Ids are spread over the table.
    """
    facts, sound = runtime.manifest.image, runtime.manifest.audio
    text = (np.arange(1, _TEXT_TOKENS + 1) * 2_654_435_761 % runtime.vocabulary).tolist()
    cases: list[dict[str, Any]] = [{"name": "text", "ids": text, "picture": None}]
    if facts is not None:
        cases.append({"name": "image", "ids": text, "picture": _picture_case(facts)})
    if sound is not None:
        cases.append({"name": "audio", "ids": text, "picture": None, "sound": _sound_case(sound)})
    return cases


def _picture_case(facts: ImageFacts) -> dict[str, int]:
    return {"height": 120, "width": 168, "budget": facts.budgets[0]}


def _sound_case(facts: AudioFacts) -> dict[str, int]:
    """Half a second, or as much as the model takes."""
    return {"samples": min(facts.sample_rate // 2, longest_clip(facts))}


def _patches(picture: dict[str, int], facts: ImageFacts) -> Patches:
    return POLICIES[facts.policy].prepare(
        formula_picture(picture["height"], picture["width"]), facts, picture["budget"]
    )


def _record_case(runtime: Runtime, case: dict[str, Any], soft: dict[str, np.ndarray]) -> dict[str, Any]:
    steps, token = [], None
    for logits in _run(runtime, case, soft.get(case["name"]), None):
        best = np.argsort(-logits, kind="stable")[:_TOP]
        token = int(best[0])
        steps.append(
            {"ids": best.tolist(), "logits": [round(float(value), 6) for value in logits[best]], "next": token}
        )
    return {**case, "steps": steps}


def _replay_case(runtime: Runtime, case: dict[str, Any]) -> CaseResult:
    difference, agreed, low, high = 0.0, 0, np.inf, -np.inf
    soft = _replay_soft_tokens(runtime, case["picture"], case.get("sound"))
    for logits, step in zip(_run(runtime, case, soft, case["steps"]), case["steps"], strict=True):
        expected = np.array(step["logits"], np.float64)
        if not np.isfinite(expected).all():  # a comparison with NaN would find no difference
            raise ValueError("logits that are not finite")
        difference = max(difference, float(np.abs(logits[np.array(step["ids"])] - expected).max()))
        agreed += int(np.argmax(logits)) == step["next"]
        low, high = min(low, expected.min()), max(high, expected.max())
    return CaseResult(case["name"], difference, agreed / len(case["steps"]), float(high - low))


def _replay_soft_tokens(
    runtime: Runtime, picture: dict[str, int] | None, sound: dict[str, int] | None
) -> np.ndarray | None:
    facts, heard = runtime.manifest.image, runtime.manifest.audio
    if sound is not None:
        if heard is None:
            raise BundleError("self_test.json has a sound, the bundle has no audio input")
        samples = sound["samples"]
        if not 0 < samples <= longest_clip(heard):
            raise BundleError(f"self_test.json has a sound of {samples} samples, which the model does not take")
        return runtime.hear(formula_sound(samples), count_soft_tokens(samples, heard))
    if picture is None:
        return None
    if facts is None:
        raise BundleError("self_test.json has a picture, the bundle has no vision input")
    pixels = picture["height"] * picture["width"]
    if not 0 < pixels <= _MOST_PIXELS:  # before anything of that size is made: a bundle is untrusted
        raise BundleError(f"self_test.json has a picture of {pixels} pixels, the limit is {_MOST_PIXELS}")
    patches = _patches(picture, facts)
    return runtime.encode(patches.values, patches.positions, len(patches.values) // facts.pool_size**2)


def _run(runtime: Runtime, case: dict[str, Any], values: np.ndarray | None, stored: list[dict[str, Any]] | None) -> Any:
    """Logits after the prompt and after each following token: the stored ones when replaying, else the best ones.

    `values` are the soft tokens of the picture or sound, which stands behind the first token.
    """
    ids = np.array(case["ids"], np.int64)
    soft = []
    if values is not None:
        soft = [SoftTokens(1, values, seen=case["picture"] is not None)]
        ids = np.concatenate([ids[:1], np.zeros(len(values), np.int64), ids[1:]])
    session = runtime.session()
    logits = session.prefill(ids, soft)
    for index in range(_STEPS):
        if not np.isfinite(logits).all():
            raise ModelOutputError(f"self-test {case['name']!r}: the logits of step {index} are not finite")
        yield logits
        if index < _STEPS - 1:
            logits = session.step(stored[index]["next"] if stored else int(np.argmax(logits)))
