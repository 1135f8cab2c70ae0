"""Files of a request: in the request itself, or where the person who started the server allows it.

Without `--allow-dir` and `--allow-host` a request can make the server read nothing and connect to nowhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from .beside import beside
from .failures import Failure
from .files import FileReader
from .hosts import HostReader
from .settings import Settings

__all__ = ["Access"]

_PIECE = 2**18  # characters, of which base64 makes whole bytes
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = " \n\r\t"  # base64 of mail and of shells comes in lines
# What of base64 a URI may have escaped: not unquoted as a whole, which takes 60 bytes of memory for each escape.
_ESCAPES = {"%2B": "+", "%2b": "+", "%2F": "/", "%2f": "/", "%3D": "=", "%3d": "=", "%0A": "", "%0D": "", "%20": ""}
_HEADER = re.compile(r"data:([^,;]*)((?:;[^,;]*)*?);base64,", re.IGNORECASE)
_HEADER_LENGTH = 1024
_AT_ONCE = 4  # files and hosts


class Access:
    """Reads what requests name. Every `place` is where that stands in the body, for messages."""

    def __init__(self, settings: Settings):
        self._most = settings.limits.max_bytes
        # Hosts may be slow. Nobody else's work should wait for them.
        self._threads = ThreadPoolExecutor(_AT_ONCE, "siglance-files")
        files, hosts = FileReader(settings.allow_dirs, self._most), HostReader(settings.allow_hosts, self._most)
        self._readers: dict[str, Callable[[urllib.parse.SplitResult, str], bytes]] = {
            "file": files.read,
            "http": hosts.read,
            "https": hosts.read,
        }

    def base64(self, text: str, place: str) -> bytes:
        """The bytes of base64 text, in the standard or the URL-safe alphabet, in lines or not. Raises Failure."""
        for white in _WHITE_SPACE:
            if white in text:
                text = "".join(text[start : start + _PIECE].replace(white, "") for start in range(0, len(text), _PIECE))
        if len(text) * 3 // 4 > self._most + 2:
            raise Failure(400, f"{place} is over the limit of {self._most} bytes", field=place)
        try:
            data = b"".join(_decoded(text))
        except ValueError:  # of which UnicodeEncodeError and binascii.Error are kinds
            raise Failure(400, f"{place} is not base64", field=place) from None
        if not data:
            raise Failure(400, f"{place} is empty", field=place)
        if len(data) > self._most:
            raise Failure(400, f"{place} is over the limit of {self._most} bytes", field=place)
        return data

    def data_uri(self, text: str, place: str) -> bytes:
        """The bytes of "data:TYPE;base64,...". Raises Failure."""
        header = _HEADER.match(text, 0, _HEADER_LENGTH)
        if header is None:
            raise Failure(400, f"{place} is not a data URI in base64 (data:image/png;base64,...)", field=place)
        payload = text[header.end() :]
        for escape, character in _ESCAPES.items() if "%" in payload else ():
            if escape in payload:
                payload = payload.replace(escape, character)
        return self.base64(payload, place)

    async def read(self, uri: str, place: str) -> bytes:
        """The bytes of a file that a "file:", "http:" or "https:" URI names. Raises Failure, mostly 403."""
        if uri[:20].lstrip(_WHITE_SPACE)[:5].lower() == "data:":
            return await beside(partial(self.data_uri, uri.lstrip(_WHITE_SPACE), place))
        if len(uri) > 8192 or not uri.isascii() or not uri.isprintable() or " " in uri:
            raise Failure(400, f"{place} is not a URI", field=place)
        try:
            parts = urllib.parse.urlsplit(uri)
            _ = parts.port  # looks at it for the first time
        except ValueError:
            raise Failure(400, f"{place} is not a URI", field=place) from None
        reader = self._readers.get(parts.scheme)
        if reader is None:
            known = ", ".join(f"{scheme}:" for scheme in ("data", *self._readers))
            raise Failure(
                400, f"{place}: URIs of the kind {parts.scheme[:20]!r} are not read, only {known}", field=place
            )
        return await asyncio.get_running_loop().run_in_executor(self._threads, reader, parts, place)


def _decoded(text: str) -> Iterator[bytes]:
    """The bytes of base64 text in pieces, because all other threads wait meanwhile."""
    end = len(text.rstrip("="))
    padding = len(text) - end
    if padding > 2 or (padding and len(text) % 4):
        raise binascii.Error("padding")
    for start in range(0, end, _PIECE):
        piece = text[start : min(end, start + _PIECE)].encode("ascii").translate(_URL_SAFE)
        yield base64.b64decode(piece + b"=" * (-len(piece) % 4), validate=True)
