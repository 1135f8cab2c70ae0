"""What is measured of a build, right or wrong: the largest difference from what is known to be right.

`ready` makes what a measurement compares with, before anything is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer

from siglance.engine.errors import ImageError
from siglance.engine.graph import Graph, resolve_device
from siglance.engine.image_policy import POLICIES
from siglance.engine.manifest import ImageFacts
from siglance.engine.prompt import Media, Message, PromptBuilder, Text
from siglance.engine.runtime import Runtime, SoftTokens, encode
from siglance.engine.template import ChatTemplate
from siglance.export.families import ExportOptions

from ..parity.test_reference_parity import BUDGETS, SIZES
from ..test_half_precision import round_products
from .bench import BUDGET, PICTURES, STEPS, Bench

LIMIT, SOFT_LIMIT = 1e-3, 1e-4  # what the tests of the families allow for logits and for soft tokens


@dataclass(frozen=True)
class Probe:
    """`measure(bench, layout, patch)` under the patches of a mutant. A difference up to `limit` counts as right."""

    name: str
    measure: Callable[[Bench, str, pytest.MonkeyPatch], float]
    ready: Callable[[Bench, str], object]
    limit: float = LIMIT


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference; infinite for what is not a number or has another shape."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max(initial=0.0))


# --- logits


def measure_logits(bench: Bench, layout: str, patch: pytest.MonkeyPatch) -> float:
    """Every row of a prompt with pictures; the last row however the prompt is cut, also into two turns; steps of an
    answer, and several tokens of it at once."""
    case = bench.case(layout)
    bundle = bench.export(bench.checkpoint(layout), ("embed", "decoder"), patch)
    runtime = Runtime(bundle, threads=1, sees=False)
    prompt, last = case.prompt, len(case.prompt) - 1
    found = [largest(runtime.session().prompt_logits(prompt, case.soft), case.logits[: last + 1])]
    found.append(largest(runtime.session().prefill(prompt, case.soft, chunk=7), case.logits[last]))
    session = runtime.session()
    found.append(largest(session.prefill(prompt, case.soft), case.logits[last]))
    steps = [session.step(token) for token in case.answer[:STEPS].tolist()]
    found.append(largest(np.stack(steps), case.logits[last + 1 :][:STEPS]))
    found.append(largest(session.extend(case.answer[STEPS:].tolist()), case.logits[-1]))
    if case.turn is not None:
        session, cut = runtime.session(), case.turn
        session.prefill(prompt[:cut], [soft for soft in case.soft if soft.start < cut])
        later = [SoftTokens(soft.start - cut, soft.values) for soft in case.soft if soft.start >= cut]
        found.append(largest(session.prefill(prompt[cut:], later), case.logits[last]))
    return max(found)


LOGITS = Probe("logits", measure_logits, lambda bench, layout: bench.case(layout))


# --- soft tokens


def measure_soft_tokens(
    bench: Bench, layout: str, patch: pytest.MonkeyPatch, options: ExportOptions | None = None
) -> float:
    """Pictures of three shapes, from pixels to soft tokens."""
    bundle = bench.export(bench.checkpoint(layout), ("vision",), patch, options)
    vision, facts = Graph(bundle.path("vision"), resolve_device("cpu", "cpu"), threads=1), bundle.manifest.image
    assert facts is not None
    found = []
    for picture, expected in zip(PICTURES, bench.soft_tokens(layout), strict=True):
        patches = POLICIES[facts.policy].prepare(picture, facts, BUDGET if BUDGET in facts.budgets else None)
        values = encode(vision, patches.values, patches.positions, *expected.shape)
        found.append(largest(values, expected))
    return max(found)


SOFT_TOKENS = Probe("soft tokens", measure_soft_tokens, lambda bench, layout: bench.soft_tokens(layout), SOFT_LIMIT)


# --- sizes of pictures

# Where the order of the operations decides (transformers' Gemma4ImageProcessorPil): (width, height) at budget 70.
ON_A_MULTIPLE = {(50, 35): (336, 480), (260, 182): (336, 480), (680, 119): (144, 912), (50, 140): (672, 240)}
GEMMA4_IMAGES = ImageFacts(
    policy="aspect_patches", patch_size=16, pool_size=3, budgets=BUDGETS, default_budget=280, resample="bicubic"
)


def measure_sizes(bench: Bench, layout: str, patch: pytest.MonkeyPatch) -> float:
    """Number of pictures and budgets with another size, another number of soft tokens, or none at all."""
    known = {(size, budget): table[index] for size, table in SIZES.items() for index, budget in enumerate(BUDGETS)}
    known |= {(size, 70): expected for size, expected in ON_A_MULTIPLE.items()}
    wrong = 0
    for ((width, height), budget), expected in known.items():
        try:
            found = POLICIES["aspect_patches"].layout(height, width, GEMMA4_IMAGES, budget)
        except ImageError:
            wrong += 1
            continue
        tokens = expected[0] * expected[1] // 48**2
        wrong += (found.height, found.width, found.soft_tokens) != (*expected, tokens)
    return float(wrong)


PICTURE_SIZES = Probe("picture sizes that are wrong", measure_sizes, lambda bench, layout: None)


# --- prompts of PaliGemma

# (parts, where a number is a picture of so many soft tokens; the string that stands for the prompt)
ASKED: tuple[tuple[tuple[str | int, ...], str], ...] = (
    ((3, "detect cat"), "<image><image><image><bos>detect cat\n"),
    ((2, 1, "what is this"), "<image><image><image><bos>what is this\n"),
    (("and this", 2), "<image><image><bos>and this\n"),
    ((1,), "<image><bos>\n"),
    (("hello",), "<bos>hello\n"),
)


def measure_prompts(bench: Bench, layout: str, patch: pytest.MonkeyPatch) -> float:
    """Number of prompts with other ids than those of the string that PaliGemma's processor builds."""
    bundle = bench.export(bench.checkpoint(layout), (), patch)
    file = str(bundle.path("tokenizer"))
    tokenizer, facts = Tokenizer.from_file(file), bundle.manifest
    prompts = PromptBuilder(Tokenizer.from_file(file), facts.prompt, ChatTemplate(NO_TEMPLATE))
    wrong = 0
    for parts, string in ASKED:
        asked = [Text(part) if isinstance(part, str) else Media(soft_tokens=part) for part in parts]
        expected = tokenizer.encode(string, add_special_tokens=False).ids
        wrong += prompts.chat([Message("user", asked)]).ids.tolist() != expected
    return float(wrong)


# Turns of one user: what a bundle would need if it did not put pictures first.
NO_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for item in message.content %}{{ '<image>' if item.type == 'image' else item.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
PROMPTS = Probe("prompts that are wrong", measure_prompts, lambda bench, layout: None)


# --- positions of PaliGemma


def measure_positions(bench: Bench, layout: str, patch: pytest.MonkeyPatch) -> float:
    """The tables of the rotary embedding: rows are positions 1, 2, 3, ..."""
    bundle = bench.export(bench.checkpoint(layout), ("decoder",), patch)
    initializers = ir.load(bundle.path("decoder")).graph.initializers
    found = []
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        table = initializers[f"rope.global.{name}"].const_value
        assert table is not None
        rows = np.arange(1, table.shape.numpy()[0] + 1)
        found.append(largest(table.numpy(), function(np.outer(rows, 1e4 ** (-np.arange(8) / 8)))))
    return max(found)


POSITIONS = Probe("rotary tables", measure_positions, lambda bench, layout: None)


# --- float16

FP16 = ExportOptions(precision="fp16", target="cuda")
ROUNDING = 0.01  # share of the spread of the right values that float16 may lose


def measure_half_logits(bench: Bench, layout: str, patch: pytest.MonkeyPatch) -> float:
    """A prompt and steps of an answer; float16 bundles are made for GPUs and run here on the CPU."""
    round_products(patch)
    case, bundle = bench.case(layout), bench.export(bench.checkpoint(layout), ("embed", "decoder"), patch, FP16)
    session = Runtime(bundle, device="cpu", foreign=True, threads=1).session()
    rows = [session.prefill(case.prompt), *(session.step(token) for token in case.answer[:STEPS].tolist())]
    return largest(np.stack(rows), case.logits[-len(case.answer) - 1 :][: len(rows)]) / float(np.ptp(case.logits))


def measure_half_soft_tokens(bench: Bench, layout: str, patch: pytest.MonkeyPatch) -> float:
    round_products(patch)
    spread = max(float(np.ptp(expected)) for expected in bench.soft_tokens(layout))
    return measure_soft_tokens(bench, layout, patch, FP16) / spread


HALF_LOGITS = Probe("float16 logits", measure_half_logits, LOGITS.ready, ROUNDING)
HALF_SOFT_TOKENS = Probe("float16 soft tokens", measure_half_soft_tokens, SOFT_TOKENS.ready, ROUNDING)
