"""Soft tokens of pictures seen before, by content: in memory, and on disk if a folder is given.

The content key is made from what the vision graph is given, patches and positions, so it is the same for one picture
from any file and another one for every other picture, size or token budget.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np

from ..kernels.patches import Patches
from .errors import InputError

__all__ = ["FeatureCache", "FeatureFolder", "content_key"]

_log = logging.getLogger("siglance")
_DIGEST = 32  # bytes
_SUFFIX, _UNFINISHED = ".features", ".part"
_WRITES_BETWEEN_LOOKS = 64  # other processes write too
_ABANDONED = 3600.0  # seconds after which an unfinished file is taken for the rest of a killed process


def content_key(patches: Patches) -> bytes:
    """32 bytes that stand for everything the vision graph is given for one view."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for array in (patches.values, patches.positions):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class FeatureCache:
    """The soft tokens used last, in at most `max_bytes` of memory; 0 keeps none. Thread-safe.

    `hits` and `misses` count what was asked for.
    """

    def __init__(self, max_bytes: int, folder: FeatureFolder | None = None):
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._folder = folder
        self._lock = Lock()
        self._values: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self._nbytes

    def get(self, content: bytes, shape: tuple[int, int]) -> np.ndarray | None:
        """Soft tokens float32 of this shape, which are not to be written to, or None."""
        with self._lock:
            values = self._values.get(content)
            if values is not None:
                self._values.move_to_end(content)
                self.hits += 1
                return values
        values = None if self._folder is None else self._folder.read(content, shape)
        with self._lock:
            self.hits += values is not None
            self.misses += values is None
        if values is not None:
            self._remember(content, values)
        return values

    def put(self, content: bytes, values: np.ndarray) -> None:
        """Keep soft tokens, float32 [n, D]. They must not change any more."""
        self._remember(content, values)
        if self._folder is not None:
            self._folder.write(content, values)

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        with self._lock:
            self._values.clear()
            self._nbytes = 0

    def _remember(self, content: bytes, values: np.ndarray) -> None:
        values.flags.writeable = False
        with self._lock:
            if content in self._values or values.nbytes > self.max_bytes:
                return
            self._values[content] = values
            self._nbytes += values.nbytes
            while self._nbytes > self.max_bytes:
                self._nbytes -= self._values.popitem(last=False)[1].nbytes


class FeatureFolder:
    """Soft tokens in a folder: one file for each picture and bundle, in at most `max_bytes`.

    A file is a digest of its name and content followed by the values, float32 little-endian. One that is not whole is
    as good as none, and is replaced. The files used last stay. Several processes may share a folder; it should be
    writable by its owner only, because whoever writes to it decides what the model sees.
    """

    def __init__(self, folder: str | os.PathLike[str], bundle: str, max_bytes: int):
        """`bundle` tells bundles apart whose soft tokens differ. Raises InputError for a folder that cannot be made."""
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._bundle = bundle.encode()
        self._lock = Lock()
        self._failed = False
        self._writes = 0
        self._total = 0  # bytes in the folder as far as is known
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(f"feature_cache_dir {str(self.folder)!r} cannot be used: {error}") from None

    def read(self, content: bytes, shape: tuple[int, int]) -> np.ndarray | None:
        """The soft tokens of a picture, or None if there is no whole file of them."""
        name = self._name(content)
        size = _DIGEST + 4 * shape[0] * shape[1]
        try:
            with open(self.folder / name, "rb") as file:
                data = file.read(size + 1)
        except OSError:
            return None
        payload = data[_DIGEST:]
        if len(data) != size or data[:_DIGEST] != _digest(name, payload):
            return None
        values = np.frombuffer(payload, "<f4").astype(np.float32).reshape(shape)
        with contextlib.suppress(OSError):
            os.utime(self.folder / name)  # used now
        return values if np.isfinite(values).all() else None

    def write(self, content: bytes, values: np.ndarray) -> None:
        """Write the file of a picture whole or not at all, and remove the oldest files beyond the bound.

        A disk that is full or gone costs the file, not the request: it is logged once.
        """
        name = self._name(content)
        payload = values.astype("<f4").tobytes()
        if _DIGEST + len(payload) > self.max_bytes:
            return
        unfinished = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=_UNFINISHED, delete=False) as file:
                unfinished = file.name
                file.write(_digest(name, payload) + payload)
            os.replace(unfinished, self.folder / name)
            self._count(_DIGEST + len(payload))
        except OSError as error:
            if unfinished is not None:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)
            if not self._failed:
                _log.warning("soft tokens are not kept on disk: %s", error)
            self._failed = True

    def _name(self, content: bytes) -> str:
        return hashlib.blake2b(self._bundle + b"\0" + content, digest_size=_DIGEST).hexdigest() + _SUFFIX

    def _count(self, size: int) -> None:
        """A file of this size is new. Looks through the folder now and then, and when it seems to be full."""
        with self._lock:
            self._total += size
            if self._total > self.max_bytes or self._writes % _WRITES_BETWEEN_LOOKS == 0:
                self._total = self._trim()
            self._writes += 1

    def _trim(self) -> int:
        """Remove what killed processes left and, if the folder is full, the files used longest ago; its bytes then.

        An eighth of the bound is freed at once, so that a full folder is not looked through for every file.
        """
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process removes files too
                    facts = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(_UNFINISHED) and time.time() - facts.st_mtime > _ABANDONED:
                        os.unlink(entry.path)
                    elif entry.name.endswith(_SUFFIX):
                        files.append((facts.st_mtime_ns, entry.path, facts.st_size))
        files.sort()
        total = sum(size for _, _, size in files)
        if total <= self.max_bytes:
            return total
        for _, path, size in files[:-1]:
            if total <= self.max_bytes * 7 // 8:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total


def _digest(name: str, payload: bytes) -> bytes:
    return hashlib.blake2b(name.encode() + b"\0" + payload, digest_size=_DIGEST).digest()
