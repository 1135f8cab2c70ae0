"""What a user may name as a source: a folder, a file or a hub id, opened as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import Checkpoint, FolderCheckpoint

__all__ = ["open_source"]


def open_source(source: Path | str, *, revision: str | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """The checkpoint that `source` names. `tokenizer` is a tokenizer.json to use instead of the checkpoint's own.

    Raises ExportError for a source that cannot be opened.
    """
    return FolderCheckpoint(Path(source), tokenizer=tokenizer)
