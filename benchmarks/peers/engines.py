"""What is compared: engines by name, how their models are made from one checkpoint, and the processes that run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import Unavailable, python_of

__all__ = ["ENGINES", "Sources", "Worker", "start"]

WORKERS = Path(__file__).parent / "workers"
# llama.h, enum llama_ftype; ggml.h, enum ggml_type
_FTYPE_Q4_0, _TYPE_Q4_0, _TYPE_Q8_0 = 2, 2, 8


@dataclass(frozen=True, slots=True)
class Sources:
    """One model in its forms: a Hugging Face folder, a GGUF file, bundles of ours by name."""

    checkpoint: Path
    gguf: Path
    bundles: dict[str, Path]
    cache: Path
    environments: dict[str, Path]  # made by hand, by peer
    threads: int
    context: int

    def python(self, peer: str) -> Path:
        return python_of(peer, self.cache, self.environments)

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A file or folder in the cache, made once: a run that is killed leaves nothing that looks complete."""
        target = self.cache / "models" / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(f"{target.name}.part")
            make(fresh)
            fresh.rename(target)
        return target


class Worker:
    """A process that holds one loaded model; see workers/serve.py."""

    def __init__(self, python: Path, script: str, facts: dict[str, Any], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._process = subprocess.Popen(
            [str(python), "-P", str(WORKERS / script), json.dumps(facts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            cwd=log.parent,  # never the repository: its folder `kernels` would hide Hugging Face's package
            env={"PYTHONPATH": _python_path(), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        )
        hello = self._read()
        self.versions: dict[str, str] = hello["versions"]
        self.load_seconds: float = hello["load_seconds"]

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **question}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            lines = self._log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise Unavailable(f"its process ended with exit code {self._process.returncode}: {lines[-1]}")
        return json.loads(line)


def _siglance(name: str) -> Callable[[Sources], tuple[Path, str, dict[str, Any]]]:
    def prepare(sources: Sources) -> tuple[Path, str, dict[str, Any]]:
        return Path(sys.executable), "siglance_worker.py", {"path": str(sources.bundles[name].resolve())}

    return prepare


def _llama_cpp(name: str, embedding: int | None) -> Callable[[Sources], tuple[Path, str, dict[str, Any]]]:
    def prepare(sources: Sources) -> tuple[Path, str, dict[str, Any]]:
        python, path = sources.python("llama.cpp"), sources.gguf
        if embedding is not None:

            def quantise(target: Path) -> None:
                numbers = [str(_FTYPE_Q4_0), str(embedding)]
                _call(python, "llama_cpp_quantize.py", str(sources.gguf.resolve()), str(target.resolve()), *numbers)

            path = sources.made(f"{name}.gguf", quantise)
        return python, "llama_cpp_worker.py", {"path": str(path.resolve())}

    return prepare


def _transformers(dtype: str) -> Callable[[Sources], tuple[Path, str, dict[str, Any]]]:
    def prepare(sources: Sources) -> tuple[Path, str, dict[str, Any]]:
        facts = {"path": str(sources.checkpoint.resolve()), "dtype": dtype}
        return sources.python("transformers"), "transformers_worker.py", facts

    return prepare


def _optimum(sources: Sources) -> tuple[Path, str, dict[str, Any]]:
    python = sources.python("optimum")
    path = sources.made(
        "optimum", lambda target: _call(python, "optimum_export.py", str(sources.checkpoint.resolve()), str(target))
    )
    return python, "optimum_worker.py", {"path": str(path.resolve())}


def _genai(sources: Sources) -> tuple[Path, str, dict[str, Any]]:
    python = sources.python("onnxruntime-genai")
    path = sources.made(
        "genai-int4", lambda target: _call(python, "genai_export.py", str(sources.checkpoint.resolve()), str(target))
    )
    return python, "genai_worker.py", {"path": str(path.resolve())}


ENGINES: dict[str, Callable[[Sources], tuple[Path, str, dict[str, Any]]]] = {
    "llama.cpp Q4_0": _llama_cpp("q4_0", _TYPE_Q4_0),
    "llama.cpp Q4_0, 8-bit embedding": _llama_cpp("q4_0-embed8", _TYPE_Q8_0),
    "llama.cpp Q4_K_M": _llama_cpp("q4_k_m", None),
    "onnxruntime-genai int4": _genai,
    "optimum-onnx fp32": _optimum,
    "transformers fp32": _transformers("float32"),
    "transformers bf16": _transformers("bfloat16"),
}


def start(name: str, sources: Sources) -> Worker:
    """Make the model of an engine and load it. Raises Unavailable."""
    prepare = _siglance(name) if name in sources.bundles else ENGINES[name]
    python, script, facts = prepare(sources)
    log = sources.cache / "logs" / f"{name.replace(' ', '-').replace('/', '-')}.txt"
    return Worker(python, script, facts | {"threads": sources.threads, "context": sources.context}, log)


def _python_path() -> str:
    """Where workers find what they share, and what this program was told to take siglance from."""
    return os.pathsep.join([str(WORKERS), *filter(None, [os.environ.get("PYTHONPATH")])])


def _call(python: Path, script: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(python), "-P", str(WORKERS / script), *arguments], capture_output=True, text=True, check=False, cwd="/"
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Unavailable(f"{script} ended with exit code {done.returncode}: {lines[-1]}")
