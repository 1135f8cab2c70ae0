"""One virtual environment for each peer, made once under a cache folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Unavailable", "python_of"]


class Unavailable(Exception):
    """A peer that cannot be measured here, and why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed for a peer. `variables` are set while it is built."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    imports: str = ""


# Versions are those that the published results were measured with.
ENVIRONMENTS = {
    "llama.cpp": Environment(
        ("llama-cpp-python==0.3.36",),
        # From source, for the instructions of this processor: a wheel has those of an old one.
        options=("--no-binary", "llama-cpp-python"),
        variables={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
            "-DLLAMA_BUILD_SERVER=OFF"
        },
        imports="llama_cpp",
    ),
    "onnxruntime-genai": Environment(
        ("onnxruntime-genai==0.18.0", "onnxruntime", "torch==2.13.0", "transformers==5.24.0", "onnx-ir"),
        imports="onnxruntime_genai",
    ),
    "transformers": Environment(("torch==2.13.0", "transformers==5.24.0"), imports="transformers, torch"),
    "optimum": Environment(
        ("optimum-onnx[onnxruntime]==0.1.0", "torch==2.13.0", "accelerate"), imports="optimum.onnxruntime"
    ),
}


def python_of(peer: str, cache: Path, given: dict[str, Path]) -> Path:
    """The interpreter of a peer's environment, which is made unless it is there or one is given.

    Raises Unavailable with the last words of what failed.
    """
    environment = ENVIRONMENTS[peer]
    if peer in given:
        python = given[peer] / "bin" / "python"
        _run([python, "-c", f"import {environment.imports}"], f"the environment given for {peer} cannot be used")
        return python
    folder = cache / "environments" / peer
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return python
    if peer == "llama.cpp" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise Unavailable("llama.cpp is built from source, and there is no C++ compiler here")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", folder], f"no environment for {peer}")
    install = [python, "-m", "pip", "install", "--quiet", *environment.options, *environment.requirements]
    _run(install, f"{peer} could not be built", environment.variables)
    _run([python, "-c", f"import {environment.imports}"], f"{peer} was built but cannot be imported")
    (folder / "complete").touch()
    return python


def _run(command: list[object], failure: str, variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(variables or {})},
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Unavailable(f"{failure}: {last}")
