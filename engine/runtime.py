"""Graphs, wires and state: from pixels and token ids to logits. Knows no text, no sampling and no stopping.

Tensors are wired by name: whatever the `embed` graph puts out and the `decoder` graph declares flows from one to the
other. Soft tokens overwrite their rows of `inputs_embeds`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .bundle import Bundle
from .errors import BundleError, InputError, ModelOutputError, PromptError
from .graph import Device, Graph, TensorFacts, resolve_device, tensor
from .manifest import ImageFacts
from .state import DecoderState, Snapshot, check_state

__all__ = ["PREFILL_CHUNK", "Runtime", "Session", "SoftTokens", "chunk_spans"]

PREFILL_CHUNK = 512  # tokens of the prompt that run at once: bounds the memory of activations

_MADE_BY_ENGINE = ("seqlens_k", "total_sequence_length", "logit_rows")
_BLOCK_ENDS = "block_ends"
# Mechanisms with which the decoder declares `block_ends`; without one of them attention is causal.
_BLOCKS = frozenset({"attention:image_blocks", "attention:prefix"})


@dataclass(frozen=True, slots=True)
class SoftTokens:
    """Soft tokens float32 [n, D] and the row of the prompt at which they begin.

    `seen` says that they are of a picture: where runs of those form blocks ("attention:image_blocks"), sounds do not.
    """

    start: int
    values: np.ndarray
    seen: bool = True


class Runtime:
    """The loaded graphs of a bundle. Stateless between sequences; a `Session` is one sequence.

    `prepack=False` trades speed for memory: weights stay mapped from the file. `foreign` accepts a device that the
    bundle is not made for, see `resolve_device`. `sees=False` leaves the graphs of pictures and sounds out.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        threads: int | None = None,
        prepack: bool = True,
        foreign: bool = False,
        sees: bool = True,
    ):
        self.manifest = bundle.manifest
        self.device: Device = resolve_device(device, bundle.manifest.target, foreign=foreign)
        graphs = {
            # Looking up rows is no work for several threads, and idle ones would spin beside the decoder's.
            name: Graph(bundle.path(name), self.device, threads=1 if name == "embed" else threads, prepack=prepack)
            for name in ("embed", "decoder", *(("vision", "audio") if sees else ()))
            if name in bundle.manifest.files
        }
        self.embed, self.decoder = graphs["embed"], graphs["decoder"]
        self.vision, self.audio = graphs.get("vision"), graphs.get("audio")
        self._check_wiring()
        self.hidden = int(self.embed.outputs["inputs_embeds"].shape[-1])
        self.vocabulary = int(self.decoder.outputs["logits"].shape[-1])

    @property
    def providers(self) -> dict[str, list[str]]:
        """The execution providers each graph really runs on."""
        graphs = {"vision": self.vision, "audio": self.audio, "embed": self.embed, "decoder": self.decoder}
        return {name: graph.providers for name, graph in graphs.items() if graph is not None}

    def encode(self, patches: np.ndarray, positions: np.ndarray, soft_tokens: int) -> np.ndarray:
        """patches uint8 [n, 3 p p] and positions int64 [n, 2], block-major -> soft tokens float32 [soft_tokens, D]."""
        if self.vision is None:
            raise PromptError("this bundle has no vision input")
        return encode(self.vision, patches, positions, soft_tokens, self.hidden)

    def hear(self, waveform: np.ndarray, soft_tokens: int) -> np.ndarray:
        """waveform float32 [samples] in [-1, 1] at the rate of the manifest -> soft tokens float32 [soft_tokens, D]."""
        if self.audio is None:
            raise PromptError("this bundle has no audio input")
        return hear(self.audio, waveform, soft_tokens, self.hidden)

    def session(self) -> Session:
        """A new, empty sequence."""
        return Session(self)

    def _check_wiring(self) -> None:
        embed, decoder = self.embed, self.decoder
        state_inputs = {pair.input for pair in self.manifest.state}
        for graph, outputs in ((embed, ("inputs_embeds",)), (decoder, ("logits",))):
            for name in outputs:
                if name not in graph.outputs or not _has_width(graph.outputs[name]):
                    raise BundleError(f"graph {graph.name!r} has no output {name!r} of known width")
        check_state(decoder, self.manifest.state)
        for name, facts in decoder.inputs.items():
            if name in state_inputs or name in _MADE_BY_ENGINE or name == _BLOCK_ENDS:
                continue
            source = embed.outputs.get(name)
            if source is None:
                raise BundleError(f"decoder input {name!r} has no source: neither a graph nor the engine makes it")
            if source.dtype != facts.dtype or source.shape[-1:] != facts.shape[-1:]:
                raise BundleError(f"decoder input {name!r} is {facts}, the embed graph makes {source}")
        missing = [name for name in _MADE_BY_ENGINE if name not in decoder.inputs]
        if missing:
            raise BundleError(f"the decoder graph does not declare {', '.join(missing)}")
        _check_block_ends(decoder, self.manifest.requires)
        if "input_ids" not in embed.inputs:
            raise BundleError("the embed graph has no input 'input_ids'")
        if self.vision is not None and self.manifest.image is not None:
            _check_vision(self.vision, self.manifest.image, embed.outputs["inputs_embeds"])
        if self.audio is not None:
            _check_audio(self.audio, embed.outputs["inputs_embeds"])


def encode(vision: Graph, patches: np.ndarray, positions: np.ndarray, soft_tokens: int, hidden: int) -> np.ndarray:
    """Run the vision graph; see `Runtime.encode`. Raises ModelOutputError for a wrong shape or non-finite values."""
    values = vision.run({"patches": patches, "positions": positions})["soft_tokens"]
    return _checked(values, "vision", (soft_tokens, hidden))


def hear(audio: Graph, waveform: np.ndarray, soft_tokens: int, hidden: int) -> np.ndarray:
    """Run the audio graph; see `Runtime.hear`. Raises ModelOutputError for a wrong shape or non-finite values."""
    return _checked(audio.run({"waveform": waveform})["soft_tokens"], "audio", (soft_tokens, hidden))


def _checked(values: np.ndarray, name: str, shape: tuple[int, int]) -> np.ndarray:
    if values.shape != shape:
        raise ModelOutputError(
            f"the {name} graph returned soft tokens of shape {list(values.shape)}, expected {list(shape)}"
        )
    if not np.isfinite(values).all():
        raise ModelOutputError(f"the {name} graph returned soft tokens that are not finite")
    return values


def _has_width(facts: TensorFacts) -> bool:
    return bool(facts.shape) and isinstance(facts.shape[-1], int)


def _check_block_ends(decoder: Graph, requires: Sequence[str]) -> None:
    """Raise BundleError unless the graph declares `block_ends` if, and only if, the manifest names what blocks are."""
    facts = decoder.inputs.get(_BLOCK_ENDS)
    if facts is None and not _BLOCKS.isdisjoint(requires):
        raise BundleError(
            f"the manifest requires {min(_BLOCKS.intersection(requires))!r}, but the decoder graph has no input "
            f"{_BLOCK_ENDS!r}"
        )
    if facts is not None and _BLOCKS.isdisjoint(requires):
        raise BundleError(
            f"the decoder graph has the input {_BLOCK_ENDS!r}, but the manifest requires none of "
            f"{', '.join(map(repr, sorted(_BLOCKS)))}"
        )
    if facts is not None and (facts.dtype is not np.int64 or len(facts.shape) != 1):
        raise BundleError(f"decoder input {_BLOCK_ENDS!r} is {facts}, expected int64 [tokens]")


def _check_vision(vision: Graph, image: ImageFacts, embeddings: TensorFacts) -> None:
    """Raise BundleError unless the graph takes the patches that the manifest describes and fits the embeddings."""
    patches, soft = vision.inputs.get("patches"), vision.outputs.get("soft_tokens")
    if patches is None or "positions" not in vision.inputs:
        raise BundleError("the vision graph does not declare 'patches' and 'positions'")
    if patches.shape[-1:] != (3 * image.patch_size**2,):
        raise BundleError(
            f"the vision graph takes patches {patches}, the manifest says {image.patch_size} pixels a side"
        )
    if soft is None or soft.shape[-1:] != embeddings.shape[-1:]:
        raise BundleError("the vision graph has no output 'soft_tokens' as wide as the embeddings")


def _check_audio(audio: Graph, embeddings: TensorFacts) -> None:
    """Raise BundleError unless the graph takes samples and fits the embeddings."""
    waveform, soft = audio.inputs.get("waveform"), audio.outputs.get("soft_tokens")
    if waveform is None or waveform.dtype is not np.float32 or len(waveform.shape) != 1:
        raise BundleError(f"the audio graph takes 'waveform' {waveform}, expected float32 [samples]")
    if soft is None or soft.shape[-1:] != embeddings.shape[-1:]:
        raise BundleError("the audio graph has no output 'soft_tokens' as wide as the embeddings")


class Session:
    """One sequence: feed token ids, get logits."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._state = DecoderState(runtime.decoder, runtime.manifest.state, runtime.manifest.context)
        self._wires = [name for name in runtime.decoder.inputs if name in runtime.embed.outputs]
        self._has_blocks = _BLOCK_ENDS in runtime.decoder.inputs
        self._binding = runtime.decoder.bind()

    @property
    def length(self) -> int:
        """Tokens in the state."""
        return self._state.length

    @property
    def state_bytes(self) -> int:
        return self._state.nbytes

    def run_ends(self, stops: Sequence[int], seen: Sequence[tuple[int, int]], chunk: int) -> list[int]:
        """The ends of all runs of a prompt of which every part up to one of `stops` is prefilled by itself.

        `seen` are its runs of soft tokens of pictures, first row and end; the last stop is its length.
        """
        blocks = seen if "attention:image_blocks" in self._runtime.manifest.requires else []
        starts = [0, *stops[:-1]]
        spans = (chunk_spans(stop, chunk, blocks, start) for start, stop in zip(starts, stops, strict=True))
        return [end for part in spans for _, end in part]

    def evicts(self, length: int) -> bool:
        """Whether a state of this length can no more be cut back."""
        return self._state.evicts(length)

    def snapshot(self) -> Snapshot:
        """A copy of the state, to go on from here another time."""
        return self._state.snapshot()

    def restore(self, snapshot: Snapshot, length: int | None = None) -> None:
        """Become what `snapshot` of the same bundle held, or its first `length` tokens: see `DecoderState.restore`."""
        self._state.restore(snapshot, length)

    def prefill(
        self, ids: np.ndarray, soft: Sequence[SoftTokens] = (), *, chunk: int = PREFILL_CHUNK, first: int = 0
    ) -> np.ndarray:
        """Run the prompt ids int64 [L] in chunks and return the logits of the last row, float32 [V].

        Rows before `first` are left out, because the state holds them already; `soft` may leave theirs out too.
        """
        if not len(ids[first:]):
            raise PromptError("the prompt is empty")
        return list(self.prefill_chunks(ids, soft, chunk=chunk, first=first))[-1]

    def prefill_chunks(
        self, ids: np.ndarray, soft: Sequence[SoftTokens] = (), *, chunk: int = PREFILL_CHUNK, first: int = 0
    ) -> Iterator[np.ndarray]:
        """Like `prefill`, yielding the logits of each chunk's last row, so that a caller can stop in between.

        A chunk may be shorter or longer than `chunk` so that no block of mutually visible rows is cut; `first` must not
        cut one either.
        """
        if chunk < 1:
            raise InputError(f"the prefill chunk is {chunk}, it must be at least 1")
        blocks = self._blocks(len(ids), soft)
        self._state.reserve(len(ids) - first)
        for start, stop in chunk_spans(len(ids), chunk, blocks, first):
            wires = self._splice(ids[start:stop], start, soft)
            last = np.array([stop - start - 1], np.int64)
            yield self._run(wires, _block_ends(start, stop, blocks, self.length), last)[0]

    def prompt_logits(self, ids: np.ndarray, soft: Sequence[SoftTokens] = ()) -> np.ndarray:
        """Logits of every prompt row, float32 [L, V].

        Bundles whose later layers see only the last row of a chunk ("logit_rows:last") are run one token at a time.
        """
        any_rows = "logit_rows:any" in self._runtime.manifest.requires
        blocks = self._blocks(len(ids), soft)
        self._state.reserve(len(ids))
        rows = np.empty((len(ids), self._runtime.vocabulary), np.float32)
        for start, stop in chunk_spans(len(ids), PREFILL_CHUNK if any_rows else 1, blocks):
            wires = self._splice(ids[start:stop], start, soft)
            wanted = np.arange(stop - start, dtype=np.int64)
            self._run(wires, _block_ends(start, stop, blocks, self.length), wanted, into=rows[start:stop])
        return rows

    def step(self, token: int) -> np.ndarray:
        """Append one token and return the logits that follow it, float32 [V]."""
        return self.extend([token])

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens of a reply in one run and return the logits that follow the last, float32 [V]."""
        self._state.reserve(len(tokens))
        ids = np.array(tokens, np.int64)
        last = np.array([len(ids) - 1], np.int64)
        return self._run(self._splice(ids, 0, ()), np.zeros(len(ids), np.int64), last)[0]

    def _blocks(self, length: int, soft: Sequence[SoftTokens]) -> list[_Block]:
        """The blocks of mutually visible rows in a prompt of `length` rows, as the bundle's mechanism defines them."""
        requires = self._runtime.manifest.requires
        if "attention:prefix" in requires:
            return [(0, length)]
        return _seen_runs(soft) if "attention:image_blocks" in requires else []

    def _splice(self, ids: np.ndarray, start: int, soft: Sequence[SoftTokens]) -> dict[str, np.ndarray]:
        """The wires of a chunk that begins at prompt row `start`, soft tokens in place."""
        wires = self._runtime.embed.run({"input_ids": ids[None, :]})
        rows = wires["inputs_embeds"]
        for block in soft:
            first, stop = max(block.start, start), min(block.start + len(block.values), start + len(ids))
            if first < stop:
                rows[0, first - start : stop - start] = block.values[first - block.start : stop - block.start]
        return wires

    def _run(
        self,
        wires: dict[str, np.ndarray],
        block_ends: np.ndarray,
        wanted: np.ndarray,
        into: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run one chunk through the decoder; returns logits [len(wanted), V], in `into` if it is given.

        The state grows only if that succeeds; otherwise see `DecoderState.fail`.
        """
        total = self._state.length + len(block_ends)
        logits = np.empty((len(wanted), self._runtime.vocabulary), np.float32) if into is None else into
        binding = self._binding
        for name in self._wires:
            binding.bind_cpu_input(name, wires[name])
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_cpu_input("logit_rows", wanted)
        if self._has_blocks:
            binding.bind_cpu_input(_BLOCK_ENDS, block_ends)
        self._state.bind(binding)
        binding.bind_ortvalue_output("logits", tensor(logits))
        try:
            self._runtime.decoder.run_bound(binding)
        except BaseException:
            self._state.fail(len(block_ends))
            raise
        self._state.advance(len(block_ends))
        return logits


_Block = tuple[int, int]  # first row and the row after the last, counted from the start of the prompt


def _seen_runs(soft: Sequence[SoftTokens]) -> list[_Block]:
    """The longest runs of consecutive soft tokens of pictures; two without a token between them are one run."""
    runs: list[_Block] = []
    for first, end in sorted((block.start, block.start + len(block.values)) for block in soft if block.seen):
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((first, end))
    return runs


def chunk_spans(length: int, chunk: int, blocks: Sequence[_Block], start: int = 0) -> Iterator[tuple[int, int]]:
    """Cut rows `start` to `length` into (start, stop) of at most `chunk` rows, and never inside a block.

    Rows of a block see its later rows, so the whole block must be there when they run. A chunk ends before a block
    that it cannot hold; a block that is longer than a chunk is a chunk by itself.
    """
    while start < length:
        stop = min(start + chunk, length)
        for first, end in blocks:
            if first < stop < end:
                stop = first if first > start else end
        yield start, stop
        start = stop


def _block_ends(start: int, stop: int, blocks: Sequence[_Block], base: int) -> np.ndarray:
    """For rows start..stop of a prompt the end of their block, 0 outside of blocks: int64 [stop - start].

    Ends are positions in the sequence: row `start` stands at position `base`.
    """
    ends = np.zeros(stop - start, np.int64)
    for first, end in blocks:
        ends[max(first - start, 0) : max(end - start, 0)] = end - start + base
    return ends
