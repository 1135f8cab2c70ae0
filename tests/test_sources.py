"""What a user may name as a source, and what the exporter sees of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from siglance.engine.bundle import Bundle
from siglance.engine.errors import ExportError
from siglance.export.checkpoint import Weights
from siglance.export.exporter import export
from siglance.export.families import ExportOptions
from siglance.export.sources import open_source
from siglance.kernels.quantize import dequantize

from . import tiny
from .tiny_gguf import Q4_0, write_gguf

FP32 = ExportOptions(precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("sources") / "tiny-gemma"
    tiny.write_gemma3(target, query_pre_attn_scalar=16)
    return target


@pytest.fixture(scope="module")
def file(folder):
    return write_gguf(folder, folder.parent / "tiny-gemma.gguf", {"ffn_up": Q4_0})


def test_a_source_is_named_without_its_path(folder, file, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for source, name in ((folder, "tiny-gemma"), (".", "tiny-gemma"), (str(file), "tiny-gemma.gguf")):
        checkpoint = open_source(source)
        assert (checkpoint.source, checkpoint.revision) == (name, None)
    assert open_source(folder).folder == folder
    assert open_source(file).folder is None


@pytest.mark.parametrize("source", ["folder", "file"])
def test_the_bundle_names_its_source(request, source, tmp_path):
    path = request.getfixturevalue(source)
    export(path, tmp_path / "bundle", FP32)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.source, manifest.revision) == (path.name, None)
    provenance = json.loads((tmp_path / "bundle" / "export.json").read_text())
    assert (provenance["source"], provenance["revision"]) == (path.name, None)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_weights_give_blocks_where_the_checkpoint_has_them(request, source):
    checkpoint = open_source(request.getfixturevalue(source))
    weights = Weights(checkpoint, {"text.": ("model.",)})
    name, shape = "text.layers.1.mlp.up_proj.weight", (96, 64)
    blocks = weights.blocks(name, shape)
    assert (blocks is not None) == (source == "file")
    if blocks is not None:
        np.testing.assert_array_equal(dequantize(blocks), weights.read(name, shape))
    with pytest.raises(ExportError, match=r"shape \[96, 64\], the configuration needs \[64, 96\]"):
        weights.blocks(name, (64, 96))
    with pytest.raises(ExportError, match="no tensor"):
        weights.blocks("text.nothing", shape)
    left = checkpoint.names() - {"model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(ExportError, match=f"{len(left)} tensors that this model does not use"):
        weights.check_all_used()


def test_a_tokenizer_beside_the_folder(folder, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    texts = open_source(folder, tokenizer=mine).write_texts(tmp_path)
    assert texts == {"tokenizer": "tokenizer.json", "chat_template": "chat_template.jinja"}
    assert (tmp_path / "tokenizer.json").read_bytes() == mine.read_bytes()
    with pytest.raises(ExportError, match="no such tokenizer file"):
        open_source(folder, tokenizer=tmp_path)


def test_a_template_keeps_its_bytes(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    text = "{{ bos_token }}\r\n{# é #}\n"
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "chat_template": text}))
    open_source(source).write_texts(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == text.encode()
    (source / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ExportError, match=r"chat_template\.jinja cannot be read as text"):
        open_source(source).write_texts(tmp_path)


def test_what_is_neither_says_both(tmp_path):
    with pytest.raises(ExportError, match="neither a folder or file on this machine nor a hub id"):
        open_source(tmp_path / "nowhere")


def test_a_file_of_another_kind(folder):
    with pytest.raises(ExportError, match=r"tokenizer\.json is not a GGUF file"):
        open_source(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("source", "package"), [("'acme/tiny'", "huggingface_hub"), ("sys.executable", "gguf")], ids=["hub", "gguf"]
)
def test_a_missing_package_is_named_with_its_cure(source, package):
    """An environment from before the source existed: the exporter is there, the package is not."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from siglance.engine.errors import ExportError\n"
        "from siglance.export.sources import open_source\n"
        f"try: open_source({source})\n"
        "except ExportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert package in done.stdout
    assert "pip install 'siglance[export]'" in done.stdout


def test_a_folder_needs_neither_package(folder):
    code = (
        "import sys; from siglance.export.sources import open_source\n"
        f"open_source({str(folder)!r}); print([n for n in ('gguf', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"
