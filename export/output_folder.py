"""Where a bundle is built, so that nothing but a whole bundle is ever found in its place."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..engine.errors import ExportError
from ..engine.manifest import MANIFEST_NAME

__all__ = ["check_output", "output_folder"]


def check_output(output: Path) -> None:
    """Raise ExportError unless `output` is free or an empty folder."""
    if not os.path.lexists(output):
        return
    try:
        empty = output.is_dir() and not any(output.iterdir())
    except OSError as error:
        raise ExportError(f"{output} cannot be looked into: {error.strerror or error}") from None
    if not empty:
        raise ExportError(f"{output} exists already and is no empty folder; choose another place")


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A temporary folder to build the bundle in, which becomes `output` at the end. On an error everything made is
    removed; a killed process leaves a folder without a manifest, with a name that begins with a dot.

    A new folder is built beside its place and renamed. An empty folder that is there already stays the folder it is,
    with its owner and rights (it may be a mounted disk): the bundle is built inside and its files moved up, the
    manifest last.
    """
    there = output.is_dir()
    home = output if there else output.parent
    with _new_folder(home), _temporary(home, output.resolve().name) as folder:
        yield folder
        if there:
            _move_up(folder, output)
        else:
            folder.rename(output)


def _move_up(folder: Path, output: Path) -> None:
    moved: list[Path] = []
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
            place = output / path.name
            if os.path.lexists(place):
                raise ExportError(f"somebody else has put {path.name} into {output} meanwhile; choose another place")
            moved.append(place)
            path.rename(place)
    except BaseException:
        for place in moved:
            place.unlink(missing_ok=True)
        raise


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and what is missing above it; all that is taken back when the export fails."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not made yet, or somebody else has put something there
                path.rmdir()
        raise


@contextmanager
def _temporary(home: Path, name: str) -> Iterator[Path]:
    """A folder called `name` in a temporary one in `home`, gone at the end if it has not been moved away."""
    with tempfile.TemporaryDirectory(dir=home, prefix=f".{name[:100]}.", suffix=".part") as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        yield folder
