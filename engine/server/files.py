"""Files of this machine that a request may name: those in folders that were allowed."""

from __future__ import annotations

import os
import stat
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .failures import Failure

__all__ = ["FileReader"]


class FileReader:
    """Reads "file:" URIs. Symbolic links are followed only as long as they stay in an allowed folder."""

    def __init__(self, folders: Sequence[Path], most: int):
        """`most` bytes of a file. Raises InputError for a folder that is none."""
        self._most = most
        self._folders: list[str] = []
        for folder in folders:
            if not os.path.isdir(folder):
                raise InputError(f"--allow-dir {folder}: there is no such folder")
            self._folders.append(os.path.realpath(folder))

    def read(self, uri: urllib.parse.SplitResult, place: str) -> bytes:
        """The content of a file. Raises Failure; whether a file outside of the folders exists is not told."""
        if not self._folders:
            raise Failure(
                403, f"{place}: files are not read (siglance serve --allow-dir DIR allows it)", kind="forbidden",
                field=place,
            )  # fmt: skip
        if uri.netloc not in ("", "localhost") or uri.query or uri.fragment:
            raise Failure(400, f"{place} is not file:///PATH", field=place)
        path = urllib.parse.unquote(uri.path, errors="surrogateescape")
        forbidden = Failure(403, f"{place}: no such file in the folders of --allow-dir", kind="forbidden", field=place)
        if "\0" in path or not os.path.isabs(path):
            raise forbidden
        real = os.path.realpath(path)
        folder = next((folder for folder in self._folders if os.path.commonpath((folder, real)) == folder), None)
        if folder is None:
            raise forbidden
        try:
            descriptor = _open_below(folder, os.path.relpath(real, folder))
        except OSError:
            raise forbidden from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise forbidden
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(self._most + 1)
        if len(data) > self._most:
            raise Failure(400, f"{place} is over the limit of {self._most} bytes", field=place)
        return data


def _open_below(folder: str, path: str) -> int:
    """Open a file below a folder, step by step, so that nothing on the way can become a link meanwhile."""
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *folders, name = Path(path).parts or (".",)
        for step in folders:
            below = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        # Opening a pipe would wait for its writer.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=at)
    finally:
        os.close(at)
