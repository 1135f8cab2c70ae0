"""Memory for the key and value buffers of a sequence: of this process, or of a device.

`HostMemory` gives numpy arrays, which graphs read and write in place without a copy. `DeviceMemory` gives onnxruntime
values on a device. Keys and values leave it only where a state is kept or restored, or has outgrown its bucket: there
is no copy of a part of a value, so those go through the host, buffer by buffer. Every copy is counted.

Device buffers come in buckets: one set of all buffers of a state, for one capacity. A bucket is lent to one state at a
time and lent again when that state is gone, so its addresses stay valid for as long as the process runs, and a run
captured on them (a CUDA graph) can be replayed for every later sequence of the same capacity.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import BundleError, DeviceError
from .graph import Device, OrtValue, TensorFacts, device_tensor, tensor

__all__ = ["Bucket", "Buffers", "DeviceBuffers", "DeviceMemory", "HostBuffers", "HostMemory", "Memory", "Traffic"]

Shapes = Mapping[str, TensorFacts]


class Buffers(Protocol):
    """The buffers of one state by the name of their input, each [1, heads, rows, head size].

    Buffers whose facts say that their rows vary have `capacity` rows.
    """

    @property
    def nbytes(self) -> int: ...

    def grown(self, capacity: int, length: int) -> Buffers:
        """Buffers of a larger capacity with the same first `length` rows; these ones must not be used any more."""
        ...

    def rows(self, name: str, length: int) -> np.ndarray:
        """A copy of the first `length` rows, or of all if there are fewer."""
        ...

    def set_rows(self, name: str, rows: np.ndarray) -> None:
        """Replace the first rows. What is in the others does not matter: it is not in use."""
        ...

    def copy(self) -> Buffers:
        """Buffers of their own with the same content."""
        ...

    def value(self, name: str) -> OrtValue:
        """The buffer itself, to be bound as input and output of a run."""
        ...


class Memory(Protocol):
    """Where states live."""

    def buffers(self, shapes: Shapes, capacity: int) -> Buffers: ...


def _shape(facts: TensorFacts, capacity: int) -> list[int]:
    return [size if isinstance(size, int) else capacity for size in facts.shape]


def _varies(facts: TensorFacts) -> bool:
    return not all(isinstance(size, int) for size in facts.shape)


# --- of this process


class HostBuffers(dict[str, np.ndarray]):
    """Numpy arrays by the name of their input."""

    def __init__(self, shapes: Shapes, capacity: int):
        super().__init__({name: _zeros(name, facts, capacity) for name, facts in shapes.items()})
        self._shapes = shapes

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.values())

    def grown(self, capacity: int, length: int) -> HostBuffers:
        """See `Buffers.grown`. One buffer after the other, so that only one of them exists twice at a time."""
        for name, facts in self._shapes.items():
            if _varies(facts):
                larger = _zeros(name, facts, capacity)
                larger[:, :, :length] = self[name][:, :, :length]
                self[name] = larger
        return self

    def rows(self, name: str, length: int) -> np.ndarray:
        return self[name][:, :, :length].copy()

    def set_rows(self, name: str, rows: np.ndarray) -> None:
        self[name][:, :, : rows.shape[2]] = rows

    def copy(self) -> HostBuffers:
        twin = HostBuffers({}, 0)
        twin._shapes = self._shapes
        twin.update({name: array.copy() for name, array in self.items()})
        return twin

    def value(self, name: str) -> OrtValue:
        return tensor(self[name])


class HostMemory:
    """Memory of this process."""

    def buffers(self, shapes: Shapes, capacity: int) -> HostBuffers:
        """New buffers of zeros. Raises BundleError if they do not fit."""
        return HostBuffers(shapes, capacity)


def _zeros(name: str, facts: TensorFacts, capacity: int) -> np.ndarray:
    shape = _shape(facts, capacity)
    try:
        return np.zeros(shape, facts.dtype)
    except (MemoryError, ValueError):
        raise BundleError(f"state {name!r} of shape {shape} does not fit into memory") from None


# --- of a device


@dataclass(slots=True)
class Traffic:
    """Bytes and number of copies between the host and the device, and of copies within the device."""

    to_device: int = 0
    to_host: int = 0
    within: int = 0
    copies: int = 0

    def count(self, way: str, nbytes: int) -> None:
        setattr(self, way, getattr(self, way) + nbytes)
        self.copies += 1


@dataclass(slots=True, eq=False)
class Bucket:
    """All buffers of a state for one capacity. `number` is its own for as long as the process runs."""

    number: int
    capacity: int
    values: dict[str, OrtValue]
    nbytes: int
    extra: object = None  # what else belongs to these addresses: see `device_step`


class DeviceMemory:
    """Memory of a device. Thread-safe.

    `prepare` is called once with this and every new bucket, while its content does not matter yet. The device may be
    the CPU: then the buffers are separate memory too, and everything is copied and counted as on a card.
    """

    def __init__(self, device: Device, prepare: Callable[[DeviceMemory, Bucket], None] | None = None):
        self.device = device
        self.traffic = Traffic()
        self.prepare = prepare
        # Free buckets by capacity. No lock: the steps are single operations of a dict, and buckets come back whenever
        # the garbage collector finds a state, maybe in the middle of one of these methods.
        self._free: dict[int, Bucket] = {}
        self._numbers = itertools.count(1)

    @property
    def free_bytes(self) -> int:
        """Bytes of buckets that no state uses at the moment."""
        return sum(bucket.nbytes for bucket in list(self._free.values()))

    def buffers(self, shapes: Shapes, capacity: int) -> DeviceBuffers:
        """Buffers whose content is undefined but finite. Raises DeviceError if they do not fit."""
        bucket = self._free.pop(capacity, None)
        return DeviceBuffers(self, shapes, self._new(shapes, capacity) if bucket is None else bucket)

    def tensor(self, array: np.ndarray) -> OrtValue:
        """A value on the device with the content of `array`."""
        value = device_tensor(array.shape, array.dtype.type, self.device)
        self.write(value, array)
        return value

    def write(self, value: OrtValue, array: np.ndarray) -> None:
        """Copy `array`, of the same shape and dtype, to the device."""
        value.update_inplace(array)
        self.traffic.count("to_device", array.nbytes)

    def read(self, value: OrtValue) -> np.ndarray:
        """A copy of `value` on the host."""
        array = value.numpy()
        self.traffic.count("to_host", array.nbytes)
        return array if array.flags.owndata else array.copy()  # on the CPU onnxruntime gives its own memory

    def duplicate(self, source: OrtValue, target: OrtValue, nbytes: int) -> None:
        """Copy one value of the device into another of the same shape and dtype, without the host."""
        target.update_inplace(source)
        self.traffic.count("within", nbytes)

    def _new(self, shapes: Shapes, capacity: int) -> Bucket:
        try:
            bucket = self._allocate(shapes, capacity)
        except Exception:  # onnxruntime raises a dozen unrelated classes
            self._free.clear()  # what nobody uses makes room
            try:
                bucket = self._allocate(shapes, capacity)
            except Exception as error:
                raise DeviceError(
                    f"the state of {capacity} tokens does not fit into the memory of {self.device}: {error}"
                ) from None
        if self.prepare is not None:
            self.prepare(self, bucket)
        return bucket

    def _allocate(self, shapes: Shapes, capacity: int) -> Bucket:
        # Memory of a device is not cleared, and a kernel may multiply what it masks by zero: NaN would stay NaN.
        zeros = {name: np.zeros(_shape(facts, capacity), facts.dtype) for name, facts in shapes.items()}
        values = {name: self.tensor(array) for name, array in zeros.items()}
        return Bucket(next(self._numbers), capacity, values, sum(array.nbytes for array in zeros.values()))

    def _take_back(self, bucket: Bucket) -> None:
        self._free.setdefault(bucket.capacity, bucket)  # one of each capacity is kept


class DeviceBuffers:
    """A bucket lent to one state; it goes back when nothing refers to these buffers any more."""

    def __init__(self, memory: DeviceMemory, shapes: Shapes, bucket: Bucket):
        self.bucket = bucket
        self._memory, self._shapes = memory, shapes
        self._return = weakref.finalize(self, memory._take_back, bucket)
        self._return.atexit = False

    @property
    def nbytes(self) -> int:
        return self.bucket.nbytes

    def grown(self, capacity: int, length: int) -> DeviceBuffers:
        """See `Buffers.grown`. Raises DeviceError, leaving these buffers as they are, if the larger ones do not fit."""
        larger = self._memory.buffers(self._shapes, capacity)
        if length:
            self._copy_to(larger, length)
        return larger

    def rows(self, name: str, length: int) -> np.ndarray:
        """See `Buffers.rows`: the whole buffer comes to the host."""
        return self._memory.read(self.bucket.values[name])[:, :, :length].copy()

    def set_rows(self, name: str, rows: np.ndarray) -> None:
        """See `Buffers.set_rows`: a whole buffer goes to the device, zeros behind the rows."""
        if rows.shape[2] == 0:
            return
        facts = self._shapes[name]
        whole = np.zeros(_shape(facts, self.bucket.capacity), facts.dtype)
        whole[:, :, : rows.shape[2]] = rows
        self._memory.write(self.bucket.values[name], whole)

    def copy(self) -> DeviceBuffers:
        twin = self._memory.buffers(self._shapes, self.bucket.capacity)
        self._duplicate(twin, self._shapes)
        return twin

    def value(self, name: str) -> OrtValue:
        return self.bucket.values[name]

    def _copy_to(self, larger: DeviceBuffers, length: int) -> None:
        self._duplicate(larger, [name for name, facts in self._shapes.items() if not _varies(facts)])
        for name, facts in self._shapes.items():
            if _varies(facts):
                larger.set_rows(name, self.rows(name, length))

    def _duplicate(self, other: DeviceBuffers, names: Iterable[str]) -> None:
        for name in names:
            facts = self._shapes[name]
            nbytes = int(np.prod(_shape(facts, self.bucket.capacity))) * np.dtype(facts.dtype).itemsize
            self._memory.duplicate(self.bucket.values[name], other.bucket.values[name], nbytes)
