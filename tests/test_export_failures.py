"""Exports that fail or are stopped, from every kind of source: one clear line, no bundle left, the source untouched."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.export import builder
from siglance.export.exporter import export

from . import tiny
from .tiny_gguf import Q4_0, Q8_0, write_gguf

MATRIX = {"folder": "model.layers.1.mlp.up_proj.weight", "gguf": "blk.1.ffn_up.weight"}
KINDS = {"ffn_up": Q4_0, "token_embd": Q8_0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.write_gemma3(folder, query_pre_attn_scalar=16)
    return folder


@pytest.fixture(params=["folder", "gguf"])
def source(request, checkpoint, tmp_path):
    """Makes a source of the kind: called with a function that edits the tensors, by the kind's own names."""

    def make(change=lambda tensors: None) -> Path:
        if request.param == "gguf":
            # Blocks are kept: shapes and names must be checked on that path too.
            return write_gguf(checkpoint, tmp_path / "tiny.gguf", KINDS, change=lambda _, tensors: change(tensors))
        folder = tmp_path / "source"
        shutil.copytree(checkpoint, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    make.kind = request.param  # type: ignore[attr-defined]
    return make


def fingerprint(source: Path) -> dict[str, str]:
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(source: Path, tmp_path: Path) -> str:
    before = fingerprint(source)
    with pytest.raises(ExportError) as error:
        export(source, tmp_path / "new" / "bundle")
    assert not (tmp_path / "new").exists()
    assert fingerprint(source) == before
    message = str(error.value)
    assert "\n" not in message
    return message


# --- sources that are wrong


@pytest.mark.parametrize("cut", [np.s_[:-1], np.s_[:, :32]], ids=["rows", "columns"])
def test_a_tensor_of_another_shape(source, tmp_path, cut):
    def change(tensors):
        name = MATRIX[source.kind]
        tensors[name] = np.ascontiguousarray(tensors[name][cut])

    message = refused(source(change), tmp_path)
    assert "mlp.up_proj.weight" in message
    assert "the configuration needs [96, 64]" in message


def test_a_table_of_another_shape(source, tmp_path):
    name = {"folder": "model.embed_tokens.weight", "gguf": "token_embd.weight"}[source.kind]

    def change(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][:, :32])

    assert "embed_tokens.weight" in refused(source(change), tmp_path)


def test_a_missing_tensor(source, tmp_path):
    assert "no tensor 'model.layers.1.mlp.up_proj.weight'" in refused(
        source(lambda tensors: tensors.pop(MATRIX[source.kind])), tmp_path
    )


def test_a_left_over_tensor(source, tmp_path):
    def change(tensors):
        tensors["extra.weight"] = np.zeros((2, 2), np.float32)

    assert "1 tensors that this model does not use: extra.weight" in refused(source(change), tmp_path)


def test_a_checkpoint_cut_short(source, tmp_path):
    path = source()
    file = path / "model.safetensors" if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-1000])
    assert file.name in refused(path, tmp_path)


def test_an_unknown_rope_type(checkpoint, source, tmp_path):
    path = source()
    if path.is_dir():
        config = json.loads((path / "config.json").read_text())
        config["rope_parameters"]["full_attention"]["rope_type"] = "yarn"
        (path / "config.json").write_text(json.dumps(config))
    else:
        write_gguf(checkpoint, path, change=lambda metadata, _: metadata.update({"rope.scaling.type": "yarn"}))
    assert "'yarn' is not supported" in refused(path, tmp_path)


def test_a_file_that_is_cut_while_it_is_read(source, tmp_path):
    """The header has been read; the tensors are gone when they are asked for."""
    path = source()
    file = path / "model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()

    def cut(stage: str) -> None:
        if stage == "decoder":
            file.write_bytes(whole[:20_000])

    with pytest.raises(ExportError, match=file.name):
        export(path, tmp_path / "new" / "bundle", progress=cut)
    assert not (tmp_path / "new").exists()


# --- no space


def exporting(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, as a program would call the exporter."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        **{"cwd": "/", "check": False, "capture_output": True, "text": True, **options},  # type: ignore[call-overload]
    )


CLI = "import sys; from siglance.engine.cli import main; main()"


def test_no_space_at_any_point_leaves_nothing(checkpoint, tmp_path):
    """The system refuses to let a file grow beyond a size: in the weights, in the first file."""
    before = fingerprint(checkpoint)
    export(checkpoint, tmp_path / "whole")
    sizes = sorted({file.stat().st_size for file in (tmp_path / "whole").iterdir()}, reverse=True)
    for limit in (sizes[0] - 1, 100):

        def limited(limit=limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        arguments = ("export", checkpoint, "-o", tmp_path / "new" / "bundle", "--precision", "fp32")
        done = exporting(CLI, *arguments, preexec_fn=limited)
        assert done.returncode == 1
        [line] = done.stderr.strip().splitlines()
        assert line.startswith(f"siglance: the bundle cannot be written to {tmp_path / 'new'}")
        assert "File too large" in line
        assert not (tmp_path / "new").exists()
    assert fingerprint(checkpoint) == before


@pytest.mark.parametrize("writes", [0, 1, 5])
def test_a_full_disk_while_weights_are_written(source, tmp_path, monkeypatch, writes):
    write, done = builder.WeightsFile._write, []

    def full(self, data):
        done.append(data)
        if len(done) > writes:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(builder.WeightsFile, "_write", full)
    assert "No space left on device" in refused(source(), tmp_path)


# --- stopped


@pytest.mark.parametrize("stage", ["tokenizer", "weights", "embed", "decoder", "self-test"])
def test_control_c_at_any_stage_leaves_nothing(source, tmp_path, stage):
    path, seen = source(), []
    before = fingerprint(path)

    def interrupt(name: str) -> None:
        seen.append(name)
        if name == stage:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        export(path, tmp_path / "new" / "bundle", progress=interrupt)
    assert seen[-1] == stage
    assert not (tmp_path / "new").exists()
    assert fingerprint(path) == before


# The terminal sends the signal to all processes of its group; here the exporter does, once its child is there.
INTERRUPTED = """
import os, signal
from siglance.engine import cli
from siglance.export import child

send = child._send

def interrupt(process, request):
    if b"%s" in request:
        os.killpg(os.getpgid(0), signal.SIGINT)
    send(process, request)

child._send = interrupt
cli.main()
"""


@pytest.mark.parametrize("work", ["calibrate", "record_self_test"])
def test_control_c_in_a_terminal_while_a_child_process_works(work, checkpoint, tmp_path):
    arguments = ("export", checkpoint, "-o", tmp_path / "new" / "bundle", "--precision", "int4")
    done = exporting(INTERRUPTED % work, *arguments, start_new_session=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_the_same_export_succeeds_afterwards(checkpoint, tmp_path):
    """Nothing of a failure is left that would stop the next try."""
    path = write_gguf(checkpoint, tmp_path / "tiny.gguf")
    with pytest.raises(KeyboardInterrupt):
        export(path, tmp_path / "bundle", progress=lambda stage: os.kill(os.getpid(), signal.SIGINT))
    export(path, tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.precision == "keep"
