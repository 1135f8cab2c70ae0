"""Who sees whom: pictures, windows, prefixes, chunks (facts 0.3 and 2.6)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from siglance.engine import runtime
from siglance.export import blocks

from .bench import WINDOW
from .edits import Mutation, attributes, facts, number, replaced, together
from .mutant import Mutant

# --- 0.3: pictures


def _no_blocks(*kinds: bool) -> Mutation:
    """In layers of these kinds (windowed or not) no row is in a block."""

    def wrong(right: Any) -> Any:
        def bias(graph: Any, inputs: Any, *, window: int | None = None, **more: Any) -> Any:
            if (window is not None) in kinds:
                nowhere = graph.op("Mul", inputs.block_ends, number(graph, 0, np.int64))
                inputs = dataclasses.replace(inputs, block_ends=nowhere)
            return right(graph, inputs, window=window, **more)

        return bias

    return replaced(blocks, "block_bias", wrong)


def _blocks_in_global_layers(right: Any) -> Any:
    def attention(
        graph: Any, query: Any, key: Any, value: Any, state: Any, inputs: Any, heads: Any, **more: Any
    ) -> Any:
        if more["bias"] is None:
            more["bias"] = blocks.block_bias(graph, inputs)
        return right(graph, query, key, value, state, inputs, heads, **more)

    return attention


def _prefix(change: Any) -> Mutation:
    """Another block than the whole prompt: `change(rows of the prompt, soft tokens)` -> list of blocks."""
    return replaced(runtime.Session, "_blocks", lambda right: lambda self, length, soft: change(length, soft))


PICTURES = "0.3 pictures see themselves"
PICTURE_MUTANTS = [
    Mutant(PICTURES, "E2B, nothing shared", "in windowed layers", facts(image_blocks=True)),
    Mutant(
        *(PICTURES, "E2B, nothing shared", "in all layers"),
        together(facts(image_blocks=True), replaced(blocks, "attention", _blocks_in_global_layers)),
    ),
    *(Mutant(PICTURES, layout, "in no layer", facts(image_blocks=False)) for layout in ("31B", "26B-A4B", "12B")),
    *(
        Mutant(PICTURES, layout, "in global layers too", replaced(blocks, "attention", _blocks_in_global_layers))
        for layout in ("31B", "26B-A4B", "12B")
    ),
    Mutant(
        *(PICTURES, "31B", "in global layers only"),
        together(_no_blocks(True), replaced(blocks, "attention", _blocks_in_global_layers)),
    ),
    Mutant(PICTURES, "Gemma 3 vision", "in no layer", _no_blocks(True, False)),
    Mutant(PICTURES, "Gemma 3 vision", "in windowed layers only", _no_blocks(False)),
    Mutant(PICTURES, "Gemma 3 vision", "in global layers only", _no_blocks(True)),
]
PROMPT = "0.3 the prompt of PaliGemma sees itself"
PROMPT_MUTANTS = [
    *(
        Mutant(PROMPT, layout, name, _prefix(change))
        for layout in ("PaliGemma 1", "PaliGemma 2")
        for name, change in {
            "not at all": lambda length, soft: [],
            "pictures only": lambda length, soft: runtime._seen_runs(soft),
            "every picture for itself": lambda length, soft: [
                (block.start, block.start + len(block.values)) for block in soft
            ],
            "all but the last token": lambda length, soft: [(0, length - 1)],
            "all but the first token": lambda length, soft: [(1, length)],
            "all but the pictures": lambda length, soft: [(32, length)],
        }.items()
    ),
    Mutant(PROMPT, "PaliGemma 2", "in windowed layers only", _no_blocks(False)),
    Mutant(PROMPT, "PaliGemma 2", "in global layers only", _no_blocks(True)),
]

# --- 2.6: windows


def _window(extra: int) -> Mutation:
    return facts(window=lambda right: right + extra)


def _window_of_masks(extra: int | None) -> Mutation:
    """Windows of masks alone; None: no window."""

    def wrong(right: Any) -> Any:
        def bias(graph: Any, inputs: Any, *, window: int | None = None, **more: Any) -> Any:
            if window is not None:
                window = window + extra if extra is not None else None
            return right(graph, inputs, window=window, **more)

        return bias

    return replaced(blocks, "block_bias", wrong)


WINDOWS = "2.6 windows are W keys"
WINDOW_MUTANTS = [
    *(
        Mutant(WINDOWS, layout, name, _window(extra))
        for layout in ("Gemma 3 text", "Gemma 3 vision", "PaliGemma 2", "E2B", "31B")
        for name, extra in {"W - 1": -1, "W + 1": 1, "no window": 1000}.items()
        if (layout, name) != ("E2B", "no window")
    ),
    Mutant(
        *(WINDOWS, "Gemma 3 text", "the operator's window is W + 1"),
        attributes(r"decoder/layers\.[013]/attention", local_window_size=WINDOW + 1),
    ),
    Mutant(
        *(WINDOWS, "Gemma 3 text", "the operator's window is W - 1"),
        attributes(r"decoder/layers\.[013]/attention", local_window_size=WINDOW - 1),
    ),
    Mutant(
        WINDOWS,
        "E2B",
        "the operator's window is W - 1",
        attributes(r"decoder/layers\.[01]/attention", local_window_size=WINDOW - 1),
    ),
]

KINDS = "2.6 which layers have windows"


def _kinds(change: Any) -> Mutation:
    return facts(windowed=change)


KIND_MUTANTS = [
    *(
        Mutant(KINDS, layout, name, _kinds(change))
        for layout in ("Gemma 3 text", "Gemma 3 vision", "PaliGemma 2")
        for name, change in {
            "one layer later": lambda windowed: (windowed[-1], *windowed[:-1]),
            "the other ones": lambda windowed: tuple(not flag for flag in windowed),
            "all": lambda windowed: (True,) * len(windowed),
            "the last one changed": lambda windowed: (*windowed[:-1], not windowed[-1]),
        }.items()
        if (layout, name) != ("PaliGemma 2", "one layer later")  # the same as "the other ones"
    ),
]

# --- 2.6: windows and blocks together

INSIDE = "2.6 windows inside blocks"


def _inside_window(flag: bool) -> Mutation:
    def wrong(right: Any) -> Any:
        return lambda graph, inputs, *, window=None, **_: right(graph, inputs, window=window, inside_window=flag)

    return replaced(blocks, "block_bias", wrong)


INSIDE_MUTANTS = [
    *(Mutant(INSIDE, layout, "blocks reach beyond it", _inside_window(False)) for layout in ("Gemma 3 vision", "31B")),
    Mutant(INSIDE, "PaliGemma 2", "it cuts the prompt", _inside_window(True)),
]

# --- 2.6: what a block is


def _runs(change: Any) -> Mutation:
    """Other blocks than the runs of soft tokens: `change(right blocks, soft tokens)`."""
    return replaced(runtime, "_seen_runs", lambda right: lambda soft: change(right(soft), soft))


def _each(soft: Any) -> list[tuple[int, int]]:
    return [(block.start, block.start + len(block.values)) for block in soft]


BLOCKS = "2.6 blocks are runs of soft tokens"
BLOCK_MUTANTS = [
    Mutant(BLOCKS, layout, name, _runs(change))
    for layout in ("Gemma 3 vision", "31B")
    for name, change in {
        "the begin token belongs to them": lambda runs, soft: [(first - 1, end) for first, end in runs],
        "the end token belongs to them": lambda runs, soft: [(first, end + 1) for first, end in runs],
        "the last soft token does not": lambda runs, soft: [(first, end - 1) for first, end in runs],
        "the first soft token does not": lambda runs, soft: [(first + 1, end) for first, end in runs],
        "all pictures are one": lambda runs, soft: [(runs[0][0], runs[-1][1])] if runs else [],
        "pictures side by side are two": lambda runs, soft: _each(soft),
        "only the first picture is one": lambda runs, soft: runs[:1],
        "the second one, in 31B a frame of a video, is none": lambda runs, soft: [*runs[:1], *runs[2:]],
        "longer ones than the window are none": lambda runs, soft: [
            (first, end) for first, end in runs if end - first <= WINDOW
        ],
    }.items()
]

# --- 2.6: chunks, steps, turns


def _cut_anywhere(right: Any) -> Any:
    return lambda length, chunk, blocks, start=0: right(length, chunk, [], start)


def _keep_the_next_chunk_whole(right: Any) -> Any:
    """Blocks are cut at the end of a chunk if they began before it."""
    return lambda length, chunk, blocks, start=0: right(length, chunk, blocks[1:], start)


def _ends_in_the_prompt(right: Any) -> Any:
    """Ends of blocks are counted from the start of the prompt, not of the sequence."""
    return lambda start, stop, blocks, base: right(start, stop, blocks, start)


def _answer_is_a_block(right: Any) -> Any:
    """Tokens of an answer that run at once see each other."""

    def ends(self: Any, wires: Any, block_ends: Any, wanted: Any, into: Any = None) -> Any:
        if len(block_ends) > 1 and not block_ends.any():
            block_ends = block_ends + self.length + len(block_ends)
        return right(self, wires, block_ends, wanted, into)

    return ends


def _answer_is_prompt(right: Any) -> Any:
    """Every token of an answer is in the block of all that came before."""

    def ends(self: Any, wires: Any, block_ends: Any, wanted: Any, into: Any = None) -> Any:
        return right(self, wires, np.full_like(block_ends, self.length + len(block_ends)), wanted, into)

    return ends


CHUNKS = "2.6 blocks are not cut"
STEPS = "2.6 answers are causal"
TURNS = "2.6 blocks of later turns"
FLOW_MUTANTS = [
    *(
        Mutant(CHUNKS, layout, "chunks end anywhere", replaced(runtime, "chunk_spans", _cut_anywhere))
        for layout in ("Gemma 3 vision", "31B", "12B", "PaliGemma 1", "PaliGemma 2")
    ),
    *(
        Mutant(CHUNKS, layout, "the first picture is", replaced(runtime, "chunk_spans", _keep_the_next_chunk_whole))
        for layout in ("Gemma 3 vision", "31B")
    ),
    *(
        Mutant(
            STEPS,
            layout,
            "tokens that run at once see each other",
            replaced(runtime.Session, "_run", _answer_is_a_block),
        )
        for layout in ("Gemma 3 vision", "31B", "PaliGemma 1", "PaliGemma 2")
    ),
    Mutant(STEPS, "PaliGemma 2", "they belong to the prompt", replaced(runtime.Session, "_run", _answer_is_prompt)),
    *(
        Mutant(TURNS, layout, "are counted from their prompt", replaced(runtime, "_block_ends", _ends_in_the_prompt))
        for layout in ("Gemma 3 vision", "31B")
    ),
]

MUTANTS = [
    *(*PICTURE_MUTANTS, *PROMPT_MUTANTS, *WINDOW_MUTANTS, *KIND_MUTANTS, *INSIDE_MUTANTS, *BLOCK_MUTANTS),
    *FLOW_MUTANTS,
]
