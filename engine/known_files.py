"""Facts about encoded files that were read before, so that a file that comes again need not be decoded again.

A server is sent the whole conversation with every question, all pictures of it included. Files are told by a digest of
their bytes. Nothing of a picture is kept but its size and the content keys of its views.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import TypeVar

__all__ = ["NOTHING_KNOWN", "KnownFiles", "file_key"]

_Value = TypeVar("_Value")


def file_key(data: bytes, part: int = 0) -> bytes:
    """32 bytes that stand for an encoded file, or for one of its parts, such as a page."""
    digest = hashlib.blake2b(part.to_bytes(8, "little"), digest_size=32)
    digest.update(data)
    return digest.digest()


class KnownFiles:
    """Facts about files, the ones used last. Thread-safe."""

    def __init__(self, most: int = 4096):
        self._most = most
        self._lock = Lock()
        self._facts: OrderedDict[tuple[Hashable, ...], object] = OrderedDict()

    def __len__(self) -> int:
        return len(self._facts)

    def get(self, kind: type[_Value], *key: Hashable) -> _Value | None:
        """The fact under a key, if it is known."""
        with self._lock:
            value = self._facts.get((kind, *key))
            if not isinstance(value, kind):
                return None
            self._facts.move_to_end((kind, *key))
            return value

    def put(self, value: object, *key: Hashable) -> None:
        """Remember a fact."""
        with self._lock:
            self._facts[type(value), *key] = value
            self._facts.move_to_end((type(value), *key))
            while len(self._facts) > self._most:
                self._facts.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._facts.clear()


NOTHING_KNOWN = KnownFiles(0)
