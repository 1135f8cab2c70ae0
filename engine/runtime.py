"""Graphs, wires and state: from pixels and token ids to logits. Knows no text, no sampling and no stopping.

Tensors are wired by name: whatever the `embed` graph puts out and the `decoder` graph declares flows from one to the
other. Soft tokens overwrite their rows of `inputs_embeds`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np

from . import heap
from .bundle import Bundle
from .cuda import captures_runs
from .device_memory import DeviceBuffers, DeviceMemory, HostMemory
from .device_step import DeviceStep
from .errors import InputError, ModelOutputError, PromptError
from .graph import Device, Graph, IOBinding, resolve_device, tensor
from .state import DecoderState, Snapshot
from .wiring import BLOCK_ENDS, check_audio, check_wiring

__all__ = ["PREFILL_CHUNK", "Runtime", "Session", "SoftTokens", "chunk_spans"]

# Tokens of the prompt that run at once. 512 hold 25 MB more of a 270M decoder's activations and are no faster: every
# row of a chunk is multiplied with the keys of all of it, later ones too.
PREFILL_CHUNK = 256


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

        self._load = partial(_load, bundle, self.device, threads=threads, prepack=prepack)
        self.embed = self._load("embed")
        with heap.huge_pages():
            self.decoder = self._load("decoder")
        self.vision = self._load("vision") if sees and "vision" in bundle.manifest.files else None
        check_wiring(self.manifest, self.embed, self.decoder, self.vision)
        self._hears = sees and "audio" in bundle.manifest.files
        self._audio: Graph | None = None
        self._audio_lock = Lock()
        self.hidden = int(self.embed.outputs["inputs_embeds"].shape[-1])
        self.vocabulary = int(self.decoder.outputs["logits"].shape[-1])
        self.memory: HostMemory | DeviceMemory = HostMemory()
        self.device_step: DeviceStep | None = None
        if self.device.kind != "cpu":
            self.keep_states_on(self.device)
        heap.give_back()

    def keep_states_on(self, device: Device) -> None:
        """Keep the states of later sessions in the memory of `device`, the one that the decoder runs on."""
        self.memory = DeviceMemory(device)
        self.device_step = DeviceStep(self.embed, self.decoder, self.manifest.state, self.memory)
        self.memory.prepare = self.device_step.prepare

    @property
    def rounds_states(self) -> bool:
        """Whether keys and values enter the state in 8 bits, so that later rows see less of them than their own do."""
        return any(self.decoder.inputs[pair.input].dtype == np.int8 for pair in self.manifest.state)

    @property
    def providers(self) -> dict[str, list[str]]:
        """The execution providers that each graph loaded so far really runs on."""
        graphs = {"vision": self.vision, "audio": self._audio, "embed": self.embed, "decoder": self.decoder}
        return {name: graph.providers for name, graph in graphs.items() if graph is not None}

    @property
    def audio(self) -> Graph | None:
        """The graph of sounds, loaded when it is first asked for: most requests have none, and it is large.

        Raises BundleError when it cannot be loaded or does not fit.
        """
        with self._audio_lock:
            if self._audio is None and self._hears:
                audio = self._load("audio")
                check_audio(audio, self.embed.outputs["inputs_embeds"])
                self._audio = audio
            return self._audio

    def encode(self, patches: np.ndarray, positions: np.ndarray, soft_tokens: int) -> np.ndarray:
        """patches uint8 [n, 3 p p] and positions int64 [n, 2], block-major -> soft tokens float32 [soft_tokens, D]."""
        if self.vision is None:
            raise PromptError("this bundle has no vision input")
        return encode(self.vision, patches, positions, soft_tokens, self.hidden)

    def hear(self, waveform: np.ndarray, soft_tokens: int) -> np.ndarray:
        """waveform float32 [samples] in [-1, 1] at the rate of the manifest -> soft tokens float32 [soft_tokens, D]."""
        audio = self.audio
        if audio is None:
            raise PromptError("this bundle has no audio input")
        return hear(audio, waveform, soft_tokens, self.hidden)

    def session(self) -> Session:
        """A new, empty sequence."""
        return Session(self)


def _load(bundle: Bundle, device: Device, name: str, *, threads: int | None, prepack: bool) -> Graph:
    with heap.mapped_to_load(bundle.path("weights" if "weights" in bundle.manifest.files else name)):
        if name == "embed":
            # Tables are looked up where they lie, mapped from the file: a device would hold gigabytes to read rows of
            # them. That is no work for several threads, and idle ones would spin beside the decoder's.
            return Graph(bundle.path(name), Device("cpu"), threads=1, prepack=prepack)
        captures = name == "decoder" and device.kind != "cpu" and captures_runs()
        return Graph(bundle.path(name), device, threads=threads, prepack=prepack, capture=captures)


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


class Session:
    """One sequence: feed token ids, get logits."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._state = DecoderState(runtime.decoder, runtime.manifest.state, runtime.manifest.context, runtime.memory)
        self._wires = [name for name in runtime.decoder.inputs if name in runtime.embed.outputs]
        self._has_blocks = BLOCK_ENDS in runtime.decoder.inputs
        self._binding = runtime.decoder.bind()
        self._one_token: _OneToken | None = None

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

    def reply_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every row of a text, as steps would give them, float32 [L, V].

        Rows of one run see each other's keys and values before a state of 8 bits rounds them: then they run one by one.
        """
        if not self._runtime.rounds_states:
            return self.prompt_logits(ids)
        return np.stack([self.step(token) for token in ids.tolist()])

    def step(self, token: int) -> np.ndarray:
        """Append one token and return the logits that follow it, float32 [V]."""
        return self.extend([token])

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """Append tokens of a reply in one run and return the logits that follow the last, float32 [V]."""
        self._state.reserve(len(tokens))
        if len(tokens) == 1:
            return self._append(tokens[0])
        ids = np.array(tokens, np.int64)
        last = np.array([len(ids) - 1], np.int64)
        return self._run(self._splice(ids, 0, ()), np.zeros(len(ids), np.int64), last)[0]

    def _append(self, token: int) -> np.ndarray:
        """Append one token for which the state has room."""
        if self._runtime.device_step is not None:
            return self._append_on_device(self._runtime.device_step, token)
        if self._one_token is None:
            self._one_token = _OneToken(self._runtime, self._wires)
        logits = np.empty((1, self._runtime.vocabulary), np.float32)
        decoder = self._one_token.embed(token, self._state.length + 1)
        return self._run_decoder(decoder, 1, logits)[0]

    def _append_on_device(self, step: DeviceStep, token: int) -> np.ndarray:
        memory, buffers = self._runtime.memory, self._state.buffers
        assert isinstance(memory, DeviceMemory)
        assert isinstance(buffers, DeviceBuffers)
        try:
            logits = step.run(memory, token, buffers, self._state.length + 1)
        except BaseException:
            self._state.fail(1)
            raise
        self._state.advance(1)
        return logits

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
            binding.bind_cpu_input(BLOCK_ENDS, block_ends)
        return self._run_decoder(binding, len(block_ends), logits)

    def _run_decoder(self, binding: IOBinding, tokens: int, logits: np.ndarray) -> np.ndarray:
        """Run the decoder on the inputs that are bound, `tokens` of them; returns `logits`, filled."""
        self._state.bind(binding)
        binding.bind_ortvalue_output("logits", tensor(logits))
        try:
            self._runtime.decoder.run_bound(binding)
        except BaseException:
            self._state.fail(tokens)
            raise
        self._state.advance(tokens)
        return logits


class _OneToken:
    """The inputs of a run of one token. They are bound once, and only their numbers change from step to step."""

    def __init__(self, runtime: Runtime, wires: Sequence[str]):
        """`wires` are the outputs of the embed graph that the decoder reads."""
        embed, decoder = runtime.embed, runtime.decoder
        self._graph = embed
        self._ids = np.zeros((1, 1), np.int64)
        self._lengths, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._embed, self._decoder = embed.bind(), decoder.bind()
        self._kept: list[np.ndarray] = []  # a binding does not keep the memory of its values alive
        self._embed.bind_ortvalue_input("input_ids", tensor(self._ids))
        for name, facts in embed.outputs.items():
            row = self._keep(np.empty([size if isinstance(size, int) else 1 for size in facts.shape], facts.dtype))
            self._embed.bind_ortvalue_output(name, tensor(row))
            if name in wires:
                self._decoder.bind_ortvalue_input(name, tensor(row))
        made = {"seqlens_k": self._lengths, "total_sequence_length": self._total, "logit_rows": np.zeros(1, np.int64)}
        if BLOCK_ENDS in decoder.inputs:
            made[BLOCK_ENDS] = np.zeros(1, np.int64)
        for name, array in made.items():
            self._decoder.bind_ortvalue_input(name, tensor(self._keep(array)))

    def embed(self, token: int, total: int) -> IOBinding:
        """Look the token up; returns the binding of a decoder run after which the state holds `total` tokens."""
        self._ids[0, 0] = token
        self._lengths[0], self._total[()] = total - 1, total
        self._graph.run_bound(self._embed)
        return self._decoder

    def _keep(self, array: np.ndarray) -> np.ndarray:
        self._kept.append(array)
        return array


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
