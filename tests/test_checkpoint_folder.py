"""Which files of a folder are the checkpoint, and which tensors are copies of others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglance.engine.errors import ExportError
from siglance.export.checkpoint import FolderCheckpoint, Weights
from siglance.export.exporter import export
from siglance.export.families import ExportOptions

from . import tiny, tiny_siglip

INDEX = "model.safetensors.index.json"
FAMILIES = {"gemma3": tiny.write_gemma3, "gemma4": tiny.write_gemma4, "paligemma": tiny_siglip.write_paligemma}


def _folder(folder: Path, files: dict[str, dict[str, float]], index: dict[str, str] | None = None) -> FolderCheckpoint:
    """A folder with weights files of one-element tensors."""
    (folder / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file({key: np.array([value], np.float32) for key, value in tensors.items()}, folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return FolderCheckpoint(folder)


def test_a_single_file_goes_before_an_index_and_before_strangers(tmp_path):
    """As in transformers: what else lies there is older, or another model's."""
    files = {"model.safetensors": {"a": 1.0}, "old.safetensors": {"a": 2.0}, "zz.safetensors": {"optimizer": 3.0}}
    checkpoint = _folder(tmp_path, files, index={"a": "old.safetensors"})
    assert checkpoint.names() == {"a"}
    assert checkpoint.read("a") == [1.0]


def test_an_index_goes_before_strangers(tmp_path):
    files = {"one.safetensors": {"a": 1.0}, "two.safetensors": {"b": 2.0}, "zz.safetensors": {"a": 3.0}}
    checkpoint = _folder(tmp_path, files, index={"a": "one.safetensors", "b": "two.safetensors"})
    assert checkpoint.names() == {"a", "b"}
    assert checkpoint.read("a") == [1.0]


def test_one_tensor_in_two_files_is_no_choice_of_ours(tmp_path):
    checkpoint = _folder(tmp_path, {"one.safetensors": {"a": 1.0}, "two.safetensors": {"a": 2.0}})
    with pytest.raises(ExportError, match=r"'a' is in one\.safetensors and in two\.safetensors"):
        checkpoint.names()


@pytest.mark.parametrize(
    ("head", "same"), [({}, True), ({"head": 1.0}, True), ({"head": 2.0}, False)], ids=["absent", "equal", "another"]
)
def test_a_copy_is_one(head, same, tmp_path):
    weights = Weights(_folder(tmp_path, {"model.safetensors": {"table": 1.0, **head}}), {})
    if same:
        weights.drop_copy("head", "table")
    else:
        with pytest.raises(ExportError, match="ties 'head' to 'table', but the checkpoint has both and they differ"):
            weights.drop_copy("head", "table")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_head_beside_a_configuration_that_ties_it_is_not_dropped(family, tmp_path):
    """transformers uses both then; silently using one gives another model."""
    FAMILIES[family](tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    table = next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    head = "language_model.lm_head.weight" if family == "paligemma" else "lm_head.weight"
    save_file(tensors | {head: table + 1}, path)
    with pytest.raises(ExportError, match="tie_word_embeddings"):
        export(tmp_path / "checkpoint", tmp_path / "bundle", ExportOptions(precision="fp32"))
    assert not (tmp_path / "bundle").exists()
