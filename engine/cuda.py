"""Why CUDA cannot be used here, told from what is installed.

onnxruntime says little when its CUDA provider does not load: it writes to the log and runs on the CPU. The usual
reasons can be read off beforehand: the wheel without CUDA is installed, or both wheels are, in one folder; there is no
driver, or it is older than the wheel's CUDA needs; or CUDA's libraries are not installed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import DeviceError

__all__ = ["INSTALL", "Wheel", "captures_runs", "driver_version", "installed_wheels", "load_libraries", "problem"]

INSTALL = "pip install 'siglance[gpu]'"
_WHEELS = ("onnxruntime", "onnxruntime-gpu")
# First driver (Linux) of each CUDA, NVIDIA's CUDA Toolkit release notes, "minor version compatibility".
_DRIVERS = {12: 525, 13: 580}
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@dataclass(frozen=True, slots=True)
class Wheel:
    """The onnxruntime that was imported: its version, and the CUDA it was built with ("13.0"), "" without."""

    version: str
    cuda: str


def captures_runs() -> bool:
    """Whether runs may be captured: yes, unless the environment variable SIGLANCE_CUDA_GRAPH is 0.

    Raises DeviceError for a value that is neither 0 nor 1.
    """
    value = os.environ.get("SIGLANCE_CUDA_GRAPH", "1")
    if value not in ("0", "1"):
        raise DeviceError(f"SIGLANCE_CUDA_GRAPH is {value!r}, it must be 0 or 1")
    return value == "1"


def installed_wheels() -> list[str]:
    """Which of the two packages that bring onnxruntime are installed."""

    def is_installed(name: str) -> bool:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    return [name for name in _WHEELS if is_installed(name)]


def driver_version(module: Path = _KERNEL_MODULE, query: Sequence[str] = _QUERY) -> str | None:
    """The version of the NVIDIA driver, such as "580.65.06"; None if there is no driver.

    The loaded kernel module is asked first, then nvidia-smi, which also exists outside of Linux.
    """
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", module.read_text(encoding="ascii", errors="replace"))
    except OSError:
        found = None
    if found is not None:
        return found[1]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"\s*(\d+(?:\.\d+)+)", done.stdout)
    return None if found is None else found[1]


def load_libraries(preload: Callable[[], None]) -> str:
    """Load CUDA's libraries from the nvidia-* packages with onnxruntime's `preload_dlls`; returns what it complains of.

    It prints what it cannot load, and may raise; neither is of interest unless the session then has no CUDA.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stdout(complaint):
            preload()
    except Exception as error:
        return str(error)
    return "; ".join(line.strip() for line in complaint.getvalue().splitlines() if "Failed to load" in line)


def problem(wheel: Wheel, wheels: Sequence[str], driver: str | None) -> str | None:
    """What keeps this installation from using CUDA, and what to do; None if nothing is known to."""
    if len(wheels) > 1:
        return (
            f"{' and '.join(wheels)} are both installed and overwrite each other's files; "
            f"run: pip uninstall -y {' '.join(wheels)} && {INSTALL}"
        )
    if not wheel.cuda:
        return f"onnxruntime {wheel.version} is the wheel without CUDA; run: pip uninstall -y onnxruntime && {INSTALL}"
    if driver is None:
        return "no NVIDIA driver was found (nvidia-smi does not answer); install it, or give the container its devices"
    needed = _DRIVERS.get(_major(wheel.cuda))
    if needed is not None and _major(driver) < needed:
        return (
            f"onnxruntime-gpu {wheel.version} is built with CUDA {wheel.cuda}, which needs an NVIDIA driver of version "
            f"{needed} or later; this machine has {driver}. Update the driver (no release of onnxruntime-gpu on PyPI "
            "that siglance can use has an older CUDA)"
        )
    return None


def _major(version: str) -> int:
    return int(version.partition(".")[0])
