"""One ONNX graph on ONNX Runtime. The only module that imports onnxruntime.

A graph declares its inputs and outputs; shapes and dtypes are read from it, never from the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .errors import BundleError, DeviceError, ModelOutputError
from .processes import kept_by_forks, thread_count, usable_cores

__all__ = [
    "Device",
    "Graph",
    "IOBinding",
    "TensorFacts",
    "available_devices",
    "resolve_device",
    "tensor",
    "usable_cores",
    "versions",
]

IOBinding = onnxruntime.IOBinding

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
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
        hint = "; install siglance[gpu]" if kind == "cuda" else ""
        raise DeviceError(
            f"device {kind!r} was asked for, but onnxruntime {onnxruntime.__version__} here has only "
            f"{', '.join(available_devices())}{hint}"
        )
    if kind != target and not foreign:
        raise DeviceError(f"this bundle was exported for {target!r} and cannot run on {kind!r}")
    return Device(kind, int(index or 0))


class Graph:
    """A loaded graph.

    Raises BundleError when the file cannot be loaded, DeviceError when the session did not come up on `device`.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        threads: int | None = None,
        prepack: bool = True,
        profile: Path | None = None,
    ):
        """`profile` is what the names of the files begin with that `end_profiling` leaves."""
        self.name = path.stem
        self.device = device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count(threads)
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # failures arrive as exceptions; nothing is printed beside them
        if not prepack:
            # Weights stay mapped from the file instead of being copied into the layout the kernels like best.
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        provider = _PROVIDERS[device.kind]
        settings: list[Any] = [(provider, {"device_id": str(device.index)}) if device.kind == "cuda" else provider]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=settings)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise BundleError(f"{path.name} cannot be loaded: {_first_line(error)}") from None
        kept_by_forks(self._session)
        if self._session.get_providers()[0] != provider:
            raise DeviceError(f"{path.name} came up on {self._session.get_providers()[0]} instead of {provider}")
        self.inputs = {node.name: self._facts(node) for node in self._session.get_inputs()}
        self.outputs = {node.name: self._facts(node) for node in self._session.get_outputs()}

    @property
    def providers(self) -> list[str]:
        """The execution providers the session really has, best first."""
        return list(self._session.get_providers())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on host arrays and return all outputs by name."""
        try:
            values: Any = self._session.run(None, dict(feeds))
        except Exception as error:
            raise ModelOutputError(f"graph {self.name!r} failed: {_first_line(error)}") from error
        return dict(zip(self.outputs, values, strict=True))

    def bind(self) -> IOBinding:
        """A fresh binding of inputs and outputs to memory, for `run_bound`."""
        return self._session.io_binding()

    def run_bound(self, binding: IOBinding) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise ModelOutputError(f"graph {self.name!r} failed: {_first_line(error)}") from error

    def end_profiling(self) -> Path:
        """Close and name the file of events (JSON) of a graph that was loaded with `profile`."""
        return Path(self._session.end_profiling())

    def _facts(self, node: Any) -> TensorFacts:
        if node.type not in _DTYPES:
            raise BundleError(f"graph {self.name!r}: tensor {node.name!r} has type {node.type}, which is not supported")
        return TensorFacts(_DTYPES[node.type], tuple(node.shape))


def tensor(array: np.ndarray) -> onnxruntime.OrtValue:
    """An onnxruntime value over the memory of `array` (no copy on the CPU; the value keeps the array alive)."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def versions() -> dict[str, str]:
    """Versions that numbers depend on."""
    return {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
