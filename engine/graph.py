"""One ONNX graph on ONNX Runtime. The only module that imports onnxruntime.

A graph declares its inputs and outputs; shapes and dtypes are read from it, never from the manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from . import cuda
from .errors import BundleError, Cancelled, DeviceError, ModelOutputError
from .interruption import current_interruption
from .processes import kept_by_forks, thread_count, usable_cores

__all__ = [
    "Device",
    "Graph",
    "IOBinding",
    "OrtValue",
    "TensorFacts",
    "available_devices",
    "device_tensor",
    "has_device",
    "resolve_device",
    "tensor",
    "usable_cores",
    "versions",
]

IOBinding = onnxruntime.IOBinding
OrtValue = onnxruntime.OrtValue

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """dtype and shape of a declared tensor; a string in the shape is a dimension that varies."""

    dtype: type[np.generic]
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Device:
    """Where graphs run: kind "cpu" or "cuda", and the number of the card."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def available_devices() -> list[str]:
    """The device kinds whose execution providers this installation of onnxruntime has."""
    providers = onnxruntime.get_available_providers()
    return [kind for kind, provider in _PROVIDERS.items() if provider in providers]


def has_device(kind: str) -> bool:
    """Whether a device of this kind seems to be in this machine, as far as can be told without a session."""
    return kind in available_devices() and (kind == "cpu" or cuda.driver_version() is not None)


def resolve_device(name: str, target: str, *, foreign: bool = False) -> Device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device for a bundle exported for `target`.

    `foreign` accepts a device that the bundle is not made for: exact enough to check a bundle, far too slow to use one.
    Raises DeviceError when the device does not exist or the bundle is not made for it: there is no silent fallback.
    """
    kind, _, index = name.partition(":")
    if name == "auto":
        kind = target
    elif kind not in _PROVIDERS or (index and not (kind == "cuda" and index.isdecimal())):
        raise DeviceError(f"unknown device {name!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if kind not in available_devices():
        hint = f": {_cuda_problem() or cuda.INSTALL}" if kind == "cuda" else ""
        raise DeviceError(
            f"device {kind!r} was asked for, but onnxruntime {onnxruntime.__version__} here has only "
            f"{', '.join(available_devices())}{hint}"
        )
    if kind != target and not foreign:
        raise DeviceError(f"this bundle was exported for {target!r} and cannot run on {kind!r}")
    return Device(kind, int(index or 0))


def _cuda_problem() -> str | None:
    """What keeps onnxruntime from using CUDA here, if that can be told."""
    wheel = cuda.Wheel(onnxruntime.__version__, getattr(onnxruntime, "cuda_version", ""))
    return cuda.problem(wheel, cuda.installed_wheels(), cuda.driver_version())


@cache
def _load_cuda() -> str:
    """Load CUDA's libraries once for the process; returns complaints."""
    onnxruntime.set_default_logger_severity(3)  # errors: every session warns of things that nobody asked for
    return cuda.load_libraries(onnxruntime.preload_dlls)


class Graph:
    """A loaded graph.

    Raises BundleError when the file cannot be loaded, DeviceError when the session did not come up on `device`.

    With `capture`, runs on a GPU can be captured and replayed (a CUDA graph) if onnxruntime allows it for this graph:
    not if it has control flow, and not if any of its data crosses between host and device. `uncaptured_because` says
    why not.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        threads: int | None = None,
        prepack: bool = True,
        profile: Path | None = None,
        capture: bool = False,
    ):
        """`profile` is what the names of the files begin with that `end_profiling` leaves."""
        self.name = path.stem
        self.device = device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count(threads)
        options.inter_op_num_threads = 1
        # A planned block for all values of a run, one for each shape of its inputs, is held beside the memory that runs
        # without a plan took: 35 MB of 500 for prompts of a 270M decoder, and not faster.
        options.enable_mem_pattern = False
        options.log_severity_level = 4  # failures arrive as exceptions; nothing is printed beside them
        if not prepack:
            # Weights stay mapped from the file instead of being copied into the layout the kernels like best.
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.uncaptured_because: str | None = None if capture else "it was not asked for"
        self._thread: ThreadPoolExecutor | None = None
        if device.kind == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            self._complaint = _load_cuda()
            # A captured run belongs to the thread that captured it: another one would capture it again.
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"siglance-{self.name}")
        self._session = self._open(path, options, capture)
        kept_by_forks(self._session)
        self.captures = capture and self.uncaptured_because is None
        self._plain = self.run_options(-1) if self.captures else None
        self.inputs = {node.name: self._facts(node) for node in self._session.get_inputs()}
        self.outputs = {node.name: self._facts(node) for node in self._session.get_outputs()}

    @property
    def providers(self) -> list[str]:
        """The execution providers the session really has, best first."""
        return list(self._session.get_providers())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on host arrays and return all outputs by name."""
        try:
            values: Any = self._interruptibly(self._session.run, None, dict(feeds))
        except Cancelled:
            raise
        except Exception as error:
            raise ModelOutputError(f"graph {self.name!r} failed: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def bind(self) -> IOBinding:
        """A fresh binding of inputs and outputs to memory, for `run_bound`."""
        return self._session.io_binding()

    def run_bound(self, binding: IOBinding, options: object = None) -> None:
        """Run on what is bound; `options` of `run_options` make it a captured run."""
        try:
            if options is None:
                self._interruptibly(self._session.run_with_iobinding, binding)
            else:
                self._call(self._session.run_with_iobinding, binding, options)
        except Cancelled:
            raise
        except Exception as error:
            raise ModelOutputError(f"graph {self.name!r} failed: {_first_line(error)}") from error

    def run_options(self, number: int) -> onnxruntime.RunOptions:
        """Options of the captured run with this number, or of none for -1.

        The first run with a number is done three times over, and captured; later ones are replayed with the same
        memory and whatever lay on the host then.
        """
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def host_nodes(self) -> Counter[str]:
        """Operators of a graph on a GPU that run on the CPU, and how many of each: arithmetic on shapes, or worse."""
        parts: Sequence[Any] = self._session.get_provider_graph_assignment_info()
        return Counter(node.op_type for part in parts if part.ep_name == _PROVIDERS["cpu"] for node in part.get_nodes())

    def end_profiling(self) -> Path:
        """Close and name the file of events (JSON) of a graph that was loaded with `profile`."""
        return Path(self._session.end_profiling())

    def _open(self, path: Path, options: onnxruntime.SessionOptions, capture: bool) -> onnxruntime.InferenceSession:
        if self.device.kind == "cuda":
            return self._open_cuda(path, options, capture)
        try:
            return onnxruntime.InferenceSession(path, options, providers=[_PROVIDERS[self.device.kind]])
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise BundleError(f"{path.name} cannot be loaded: {_first_line(error)}") from None

    def _open_cuda(
        self, path: Path, options: onnxruntime.SessionOptions, capture: bool
    ) -> onnxruntime.InferenceSession:
        facts = {"device_id": str(self.device.index)}
        for extra in ({"enable_cuda_graph": "1"}, {}) if capture else ({},):
            try:
                session = onnxruntime.InferenceSession(
                    *(path, options),
                    providers=[(_PROVIDERS["cuda"], facts | extra)],
                    enable_fallback=0,  # onnxruntime's own is to print, and to run on the CPU
                )
            except Exception as error:
                if extra:  # the only difference; what else is wrong fails again
                    self.uncaptured_because = _first_line(error)
                    continue
                if "cuda" in str(error).lower():
                    reason = _cuda_problem() or _first_line(error)
                    raise DeviceError(f"{path.name} cannot run on {self.device}: {reason}") from None
                raise BundleError(f"{path.name} cannot be loaded: {_first_line(error)}") from None
            return self._on_device(session)
        raise AssertionError("unreachable")

    def _on_device(self, session: onnxruntime.InferenceSession) -> onnxruntime.InferenceSession:
        """`session`, if it came up on the device and not on the CPU instead."""
        provider, found = _PROVIDERS[self.device.kind], session.get_providers()[0]
        if found == provider:
            return session
        reason = _cuda_problem() or self._complaint or f"the CUDA provider did not load; {cuda.INSTALL}"
        raise DeviceError(f"{self.name}.onnx came up on {found} instead of {provider}: {reason}")

    def _interruptibly(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that runs the graph, not captured. Raises Cancelled if that was interrupted."""
        interruption = current_interruption()
        if interruption is None:
            return self._call(function, *arguments, self._plain)
        # Without a number, which only captured runs need, onnxruntime throws and catches something: 100 us a run.
        options = self.run_options(-1)
        options.log_severity_level = 4  # of the run: that it was ended is no news
        with interruption.run(options):
            return self._call(function, *arguments, options)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments) if self._thread is None else self._thread.submit(function, *arguments).result()

    def _facts(self, node: Any) -> TensorFacts:
        if node.type not in _DTYPES:
            raise BundleError(f"graph {self.name!r}: tensor {node.name!r} has type {node.type}, which is not supported")
        return TensorFacts(_DTYPES[node.type], tuple(node.shape))


def device_tensor(shape: Sequence[int], dtype: type[np.generic], device: Device) -> OrtValue:
    """A value of undefined content in the memory of `device`."""
    return OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device.kind, device.index)


def tensor(array: np.ndarray) -> onnxruntime.OrtValue:
    """An onnxruntime value over the memory of `array` (no copy on the CPU; the value keeps the array alive)."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def versions() -> dict[str, str]:
    """Versions that numbers depend on."""
    return {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
