"""Checkpoints on the Hugging Face hub, by way of huggingface-hub: its cache, its login, its progress bars.

A name is resolved to a commit once, and everything comes from that commit. The small files come first, so that a model
that is not supported is refused before its weights are downloaded. Without a network the cache serves what it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm, validate_repo_id

from ..engine.errors import ExportError
from .checkpoint import Checkpoint, FolderCheckpoint, refuse_others
from .gguf_checkpoint import GgufCheckpoint

__all__ = ["HubCheckpoint", "is_hub_name", "open_hub"]

_SMALL_FILES = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_SUBFOLDERS = ["*/*"]  # other formats, other precisions
_COMMIT = re.compile("[0-9a-f]{40}")
Result = TypeVar("Result")


class _Bar(tqdm):
    """The library's progress bar, silent where stderr is not a terminal."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"disable": None, **options})


def is_hub_name(text: str) -> bool:
    """Whether `text` is spelled like a repository (owner/name) or a GGUF file in one (owner/name/path/file.gguf)."""
    parts = text.split("/")
    if len(parts) < 2 or set(parts) & {"", ".", ".."} or (len(parts) > 2 and not text.endswith(".gguf")):
        return False
    try:
        validate_repo_id("/".join(parts[:2]))
    except HFValidationError:
        return False
    return True


def open_hub(name: str, *, revision: str | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """The checkpoint that `name` (see `is_hub_name`) is at the branch, tag or commit `revision` (None: main).

    Raises ExportError for what is missing, private, gated, or neither in the cache nor reachable.
    """
    owner, repository, *path = name.split("/")
    if not path:
        return HubCheckpoint(name, revision=revision, tokenizer=tokenizer)
    repository = f"{owner}/{repository}"
    file = Path(_fetch(repository, revision, lambda: hf_hub_download(repository, "/".join(path), revision=revision)))
    return GgufCheckpoint(file, source=name, revision=_commit_of(file), tokenizer=tokenizer)


class HubCheckpoint(FolderCheckpoint):
    """A repository as a folder in the cache; the weights are downloaded when their names are asked for."""

    def __init__(self, name: str, *, revision: str | None = None, tokenizer: Path | None = None):
        folder = _snapshot(name, revision, _SMALL_FILES)
        commit = _commit_of(folder / "config.json")
        if not (folder / "config.json").is_file():
            refuse_others(folder, name)
            raise ExportError(f"{name} has no config.json{_gguf_advice(name, commit)}")
        super().__init__(folder, source=name, revision=commit, tokenizer=tokenizer)

    @cached_property
    def _files(self) -> dict[str, Path]:
        _snapshot(self.source, self.revision, _WEIGHTS)
        return self._read_headers()


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a commit in the cache, with all files of the repository's root that match."""

    def download() -> str:
        return snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_SUBFOLDERS, tqdm_class=_Bar
        )

    return Path(_fetch(name, revision, download))


def _commit_of(file: Path) -> str:
    """The commit that a file of the cache belongs to: .../snapshots/COMMIT/file."""
    for folder in file.parents:
        if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
            return folder.name
    raise ExportError(f"{file} is not in the hub's cache where a commit's files belong")


def _gguf_advice(name: str, commit: str) -> str:
    """What to name instead, where a repository holds GGUF files."""
    try:
        files = [file for file in HfApi().list_repo_files(name, revision=commit) if file.endswith(".gguf")]
    except Exception:  # advice only: without a network there is none
        return ""
    return f"; name one of its GGUF files: {', '.join(f'{name}/{file}' for file in files[:5])}" if files else ""


def _fetch(name: str, revision: str | None, download: Callable[[], Result]) -> Result:
    """Call `download`; what the library raises becomes one line that says what to do."""
    place = f"{constants.ENDPOINT}/{name}"
    try:
        return download()
    except GatedRepoError:
        raise ExportError(
            f"{name} is gated: accept its terms at {place}, then log in (hf auth login, or HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise ExportError(f"{name} on the hub has no revision {revision!r}") from None
    except RemoteEntryNotFoundError:
        raise ExportError(f"{name} on the hub has no such file at revision {revision or 'main'!r}") from None
    except RepositoryNotFoundError:
        raise ExportError(
            f"{name!r} is neither a folder or file on this machine nor a model at {place}; "
            "a private one needs a login (hf auth login, or HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ExportError(
            f"{name} is not complete in the cache of this machine, and the hub cannot be asked: {_reason(error)}"
        ) from None
    except HfHubHTTPError as error:
        raise ExportError(f"{name} cannot be downloaded: the hub answers {_reason(error)}") from None
    except OSError as error:
        raise ExportError(f"{name} cannot be downloaded to {constants.HF_HUB_CACHE}: {_reason(error)}") from None
    except Exception as error:  # whatever the library's HTTP client raises
        raise ExportError(f"{name} cannot be downloaded: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What went wrong first, on one line."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split())[:300] or type(cause).__name__
