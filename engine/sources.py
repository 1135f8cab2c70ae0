"""Any form in which a file can be handed over -> its bytes."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import string
import urllib.parse
from typing import BinaryIO, cast

from .errors import InputError

__all__ = [
    "FileSource",
    "can_go_back",
    "data_uri_type",
    "file_name",
    "head_of",
    "is_data_uri",
    "is_regular",
    "one_line",
    "read_source",
]

FileSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""A path or a data URI (str), a path (os.PathLike), the file itself, or an open binary file (it need not seek)."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URI = re.compile(r"\s*data:", re.IGNORECASE)
_HEADER = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")*,', re.DOTALL)
_URL_SAFE_BASE64 = bytes.maketrans(b"-_", b"+/")


def read_source(source: object, max_bytes: int) -> bytes:
    """The encoded file that `source` stands for (see `FileSource`), at most `max_bytes` long.

    A file object is read from its current position to its end and left open. Raises InputError, which says why but not
    of which part: over the limit, cannot be read, not a form that is understood.
    """
    if isinstance(source, str) and is_data_uri(source):
        return _from_data_uri(source, max_bytes)
    if isinstance(source, str) and _URL.match(source):
        raise InputError("URLs are not fetched, pass a path, the bytes or a data URI")
    if isinstance(source, str | os.PathLike):
        return _from_path(source, max_bytes)
    if isinstance(source, bytes | bytearray | memoryview):
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        _check_bytes(size, max_bytes)
        return bytes(source)
    if callable(getattr(source, "read", None)):
        return _from_stream(cast(BinaryIO, source), max_bytes)
    raise InputError(
        f"cannot be read from {type(source).__name__}: pass a path, bytes, a binary file object or a data URI; "
        "pictures also as a PIL image or a numpy array"
    )


def can_go_back(source: object) -> bool:
    """Whether a source is a file object that can be looked into and put back where it was; a closed one cannot."""
    try:
        return callable(getattr(source, "seekable", None)) and bool(cast(BinaryIO, source).seekable())
    except (OSError, ValueError):  # `read_source` says why
        return False


def head_of(buffer: bytes | bytearray | memoryview, size: int) -> bytes:
    """The first `size` bytes of a buffer, also of one that lies in pieces (a view with a step)."""
    view = memoryview(buffer)
    if view.c_contiguous:
        return bytes(view.cast("B")[:size])
    return bytes(view[: -(-size // view.itemsize)])[:size] if view.ndim == 1 else b""


def is_data_uri(source: str) -> bool:
    """Whether a string is a data URI and not a path."""
    return _DATA_URI.match(source) is not None


def data_uri_type(uri: str) -> str:
    """Media type and parameters of a data URI, in lower case: "audio/pcm;rate=24000". Raises InputError."""
    return _split_data_uri(uri)[0].partition(":")[2].strip().lower()


def is_regular(source: object, max_bytes: int) -> bool:
    """Whether a source is the path of a regular file that can be opened again. Raises InputError for a larger one."""
    if not isinstance(source, str | os.PathLike) or (isinstance(source, str) and is_data_uri(source)):
        return False
    try:
        status = os.stat(source)
    except (OSError, ValueError):
        return False  # `read_source` says why
    if stat.S_ISREG(status.st_mode):
        _check_bytes(status.st_size, max_bytes)
        return True
    return False


def file_name(source: object) -> str:
    """What to call `source` in messages: the name of its file, "" if it is not known to have one."""
    if not isinstance(source, str | os.PathLike) or (isinstance(source, str) and is_data_uri(source)):
        return ""
    return os.path.basename(os.fsdecode(source))[-100:]


def one_line(error: object, most: int = 200) -> str:
    """The text of a foreign error as one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InputError(f"{size} bytes, over the limit of {max_bytes} bytes of encoded data")


def _from_path(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):
                _check_bytes(status.st_size, max_bytes)
            return _from_stream(file, max_bytes)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {os.fspath(path)[-100:]!r}: {one_line(reason)}") from error


def _from_stream(stream: BinaryIO, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    room = max_bytes + 1
    while room > 0:
        try:
            part = stream.read(min(room, 2**20))  # a raw stream may return less than it was asked for
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read from the file object: {one_line(error)}") from error
        if part is None:
            raise InputError("the file object has no data yet, open it in blocking mode")
        if not isinstance(part, bytes | bytearray | memoryview):
            raise InputError(f"the file object gave {type(part).__name__}, open it in binary mode")
        if not part:
            if not parts:
                _check_place(stream)
            return b"".join(parts)
        parts.append(bytes(part))
        room -= len(part)
    raise InputError(f"over the limit of {max_bytes} bytes of encoded data")


def _check_place(stream: BinaryIO) -> None:
    """Raise InputError for a stream that gave nothing because it stands behind everything it has."""
    try:
        place = stream.tell() if can_go_back(stream) else 0
    except (OSError, ValueError, AttributeError):
        return
    if place:
        raise InputError(f"the file object stands at its end, behind {place} bytes: seek(0) takes it to the beginning")


def _from_data_uri(uri: str, max_bytes: int) -> bytes:
    """The payload of a data URI (RFC 2397), read tolerantly.

    Accepted: any case, no media type, any parameters, line breaks and spaces, percent-encoding, the URL-safe alphabet
    of base64, missing padding. Error messages never repeat the payload.
    """
    too_long = InputError(f"a data URI of {len(uri)} characters, over the limit of {max_bytes} bytes of encoded data")
    # Percent-encoding triples a byte and base64 adds a third. Twice the limit is refused before any copy is made.
    if len(uri) > 2 * max_bytes + 1024:
        raise too_long
    header, payload = _split_data_uri(uri)
    parameters = header.partition(":")[2].lower().split(";")
    encoded = "base64" in (parameter.strip() for parameter in parameters)
    # Counted before more copies are made. White space is left out; percent-encoded characters may be some.
    least = len(payload) - sum(map(payload.count, string.whitespace)) - 3 * payload.count("%")
    if (least * 3 // 4 - 3 if encoded else least) > max_bytes:
        raise too_long
    try:
        raw = payload.encode("ascii")
    except UnicodeEncodeError:
        raise InputError("the payload of the data URI is not ASCII") from None
    del payload
    if b"%" in raw:
        raw = urllib.parse.unquote_to_bytes(raw)
    if encoded:
        raw = raw.translate(_URL_SAFE_BASE64, delete=string.whitespace.encode()).rstrip(b"=")
        if len(raw) * 3 // 4 <= max_bytes:  # else the test below refuses it undecoded
            try:
                raw = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
            except binascii.Error as error:
                raise InputError(f"the data URI is not base64: {error}") from None
    if not raw:
        raise InputError("the data URI has an empty payload")
    if len(raw) > max_bytes:
        raise InputError(f"over the limit of {max_bytes} bytes of encoded data")
    return raw


def _split_data_uri(uri: str) -> tuple[str, str]:
    """Header and payload: they part at the first comma that is not inside a quoted parameter."""
    match = _HEADER.match(uri, 0, 4096)
    header, comma, payload = (uri[: match.end() - 1], ",", uri[match.end() :]) if match else uri.partition(",")
    if not comma:
        raise InputError("a data URI needs a comma before its payload")
    return header, payload
