"""One token at a time on a device: inputs and outputs at fixed addresses, so that the run can be captured.

Embeddings are looked up on the host, where their tables stay mapped from the file; a row of them goes to the device
and a row of logits comes back. Everything else is there already: see `device_memory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

import numpy as np

from .device_memory import Bucket, DeviceBuffers, DeviceMemory
from .graph import Graph, IOBinding, OrtValue, tensor
from .manifest import StatePair
from .wiring import BLOCK_ENDS

__all__ = ["DeviceStep"]


@dataclass(slots=True, eq=False)
class _Bound:
    """What belongs to one bucket: the binding, with the number on the host that it reads, and how it is run."""

    binding: IOBinding
    total: np.ndarray
    options: object  # of `Graph.run_options`; None where runs are not captured


class DeviceStep:
    """The inputs and outputs of a run of one token, shared by all sequences, which take turns. Thread-safe.

    Where the decoder captures, `total_sequence_length` is the capacity of the bucket: it lies on the host, so a replay
    sees what was there at capture, and only says what space there is. The lengths, on the device, say what is used.
    """

    def __init__(self, embed: Graph, decoder: Graph, pairs: Iterable[StatePair], memory: DeviceMemory):
        self._embed, self._decoder, self._pairs = embed, decoder, tuple(pairs)
        self._wires = [name for name in decoder.inputs if name in embed.outputs]
        self._turn = Lock()
        made = {name: embed.outputs[name] for name in self._wires}
        zeros = {
            name: np.zeros([size if isinstance(size, int) else 1 for size in facts.shape], facts.dtype)
            for name, facts in made.items()
        }
        zeros |= {"seqlens_k": np.zeros(1, np.int32), "logit_rows": np.zeros(1, np.int64)}
        if BLOCK_ENDS in decoder.inputs:
            zeros[BLOCK_ENDS] = np.zeros(1, np.int64)
        self._inputs = {name: memory.tensor(array) for name, array in zeros.items()}
        self._logits = memory.tensor(np.zeros((1, int(decoder.outputs["logits"].shape[-1])), np.float32))

    def prepare(self, memory: DeviceMemory, bucket: Bucket) -> None:
        """Capture the run on the addresses of a new bucket.

        A captured run is done several times over before it is replayed, and a window buffer that evicts does so each
        time. Here the buckets are empty, and a sequence of one token leaves nothing but an unused row.
        """
        bound = self._bind(bucket)
        if self._decoder.captures:
            with self._turn:
                memory.write(self._inputs["seqlens_k"], np.zeros(1, np.int32))
                self._decoder.run_bound(bound.binding, bound.options)

    def run(self, memory: DeviceMemory, token: int, buffers: DeviceBuffers, total: int) -> np.ndarray:
        """Append one token, after which `buffers` hold `total`; returns the logits behind it, float32 [V].

        Raises ModelOutputError.
        """
        wires: Mapping[str, np.ndarray] = self._embed.run({"input_ids": np.array([[token]], np.int64)})
        bound = buffers.bucket.extra
        assert isinstance(bound, _Bound)
        if bound.options is None:
            bound.total[()] = total
        with self._turn:
            for name in self._wires:
                memory.write(self._inputs[name], wires[name])
            memory.write(self._inputs["seqlens_k"], np.array([total - 1], np.int32))
            self._decoder.run_bound(bound.binding, bound.options)
            return memory.read(self._logits)[0]

    def _bind(self, bucket: Bucket) -> _Bound:
        options = self._decoder.run_options(bucket.number) if self._decoder.captures else None
        bound = _Bound(self._decoder.bind(), np.array(bucket.capacity, np.int32), options)
        values: dict[str, OrtValue] = {**self._inputs, "total_sequence_length": tensor(bound.total)}
        for name, value in values.items():
            bound.binding.bind_ortvalue_input(name, value)
        for pair in self._pairs:
            bound.binding.bind_ortvalue_input(pair.input, bucket.values[pair.input])
            bound.binding.bind_ortvalue_output(pair.output, bucket.values[pair.input])
        bound.binding.bind_ortvalue_output("logits", self._logits)
        bucket.extra = bound
        return bound
