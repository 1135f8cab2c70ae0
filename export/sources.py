"""What a user may name as a source, opened as a checkpoint: a folder, a GGUF file or a name on the hub.

A path that exists wins over a hub id of the same spelling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..engine.errors import ExportError
from .checkpoint import Checkpoint, FolderCheckpoint

__all__ = ["open_source"]


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
    if path.is_dir():
        return _folder(path, tokenizer)
    with _packages():
        from .gguf_checkpoint import GgufCheckpoint
    return GgufCheckpoint(path, tokenizer=tokenizer)


def _folder(path: Path, tokenizer: Path | None) -> Checkpoint:
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if files:
            raise ExportError(f"{path} has no config.json; name one of its GGUF files: {', '.join(files[:5])}")
    return FolderCheckpoint(path, tokenizer=tokenizer)


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
