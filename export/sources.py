"""What a user may name as a source, opened as a checkpoint: a folder, a GGUF file or a name on the hub.

A path that exists wins over a hub id of the same spelling.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engine.errors import ExportError
from .checkpoint import Checkpoint, FolderCheckpoint

__all__ = ["open_source"]

_COMMIT = re.compile("[0-9a-f]{40}")


def open_source(source: Path | str, *, revision: str | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """The checkpoint that `source` names.

    `revision` is a branch, tag or commit of a hub id. `tokenizer` is a tokenizer.json to use instead of the
    checkpoint's own. Raises ExportError for a source that cannot be opened.
    """
    path = Path(source)
    if tokenizer is not None and not tokenizer.is_file():
        raise ExportError(f"no such tokenizer file: {tokenizer}")
    if not path.exists():
        return _from_hub(os.fspath(source), revision, tokenizer)
    if revision is not None:
        raise ExportError(f"{path} is on this machine and has no revision {revision!r}; revisions are for hub ids")
    name, commit = _in_hub_cache(path)
    if path.is_dir():
        return _folder(path, name, commit, tokenizer)
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise ExportError(f"{path} is one file of a checkpoint; name its folder")
    with _packages():
        from .gguf_checkpoint import GgufCheckpoint
    return GgufCheckpoint(path, source=name, revision=commit, tokenizer=tokenizer)


def _in_hub_cache(path: Path) -> tuple[str | None, str | None]:
    """The hub id (with the path of a file) and the commit of what lies in the cache of huggingface-hub.

    There it is models--OWNER--NAME/snapshots/COMMIT/...; a file is a link to a blob whose name says nothing.
    """
    place = Path(os.path.abspath(path))
    for folder in (place, *place.parents):
        kind, *name = folder.parent.parent.name.split("--")
        if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) and kind == "models" and all(name):
            inside = place.relative_to(folder).parts
            return "/".join([*name, *inside]), folder.name
    return None, None


def _folder(path: Path, name: str | None, commit: str | None, tokenizer: Path | None) -> Checkpoint:
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if files:
            raise ExportError(f"{path} has no config.json; name one of its GGUF files: {', '.join(files[:5])}")
    return FolderCheckpoint(path, source=name, revision=commit, tokenizer=tokenizer)


def _from_hub(name: str, revision: str | None, tokenizer: Path | None) -> Checkpoint:
    with _packages():
        from .hub import is_hub_name, open_hub
    if not is_hub_name(name):
        raise ExportError(
            f"no such checkpoint: {name!r} is neither a folder or file on this machine nor a hub id (owner/name)"
        )
    return open_hub(name, revision=revision, tokenizer=tokenizer)


@contextmanager
def _packages() -> Iterator[None]:
    """The packages behind a source are loaded for that source only."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExportError(f"this source needs the package {error.name!r}: pip install 'siglance[export]'") from None
