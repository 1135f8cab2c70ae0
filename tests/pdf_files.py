"""Small PDFs for tests, written by hand: what is in them is what the test says, and nothing else."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PdfPage", "encrypted", "laughing", "numbered_pages", "packed", "pdf", "quadrants", "stream"]

_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


@dataclass(frozen=True)
class PdfPage:
    """One page: its drawing operators, its media box, and raw text for its dictionary and resources."""

    content: bytes = b""
    box: str = "0 0 200 100"
    entries: str = ""
    resources: str = ""


def pdf(*pages: PdfPage, objects: Sequence[bytes] = (), catalog: str = "", trailer: str = "", cipher=None) -> bytes:
    """A PDF file. `objects` are numbered from 3 + 2 * len(pages); `cipher(number, data)` encrypts streams."""
    numbers = [3 + 2 * index for index in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in numbers)
    bodies = [
        f"<< /Type /Catalog /Pages 2 0 R {catalog} >>".encode(),
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
    ]
    for number, page in zip(numbers, pages, strict=True):
        content = page.content if cipher is None else cipher(number + 1, page.content)
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [{page.box}] /Contents {number + 1} 0 R "
            f"/Resources << {page.resources} >> {page.entries} >>".encode()
        )
        bodies.append(stream("", content))
    bodies += objects
    out = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    offsets = []
    for number, body in enumerate(bodies, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += f"trailer\n<< /Size {len(bodies) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode()
    return bytes(out)


def stream(entries: str, data: bytes) -> bytes:
    """The body of a stream object."""
    return b"<< %b /Length %d >>\nstream\n%b\nendstream" % (entries.encode(), len(data), data)


def packed(*pages: PdfPage) -> bytes:
    """The same as `pdf`, as programs of today write it: objects in a compressed stream, cross-references in another."""
    first = 5  # 3 holds the objects, 4 the cross-references
    kids = " ".join(f"{first + 2 * index} 0 R" for index in range(len(pages)))
    held = {
        1: b"<< /Type /Catalog /Pages 2 0 R >>",
        2: f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
    }
    contents = {}
    for index, page in enumerate(pages):
        number = first + 2 * index
        held[number] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [{page.box}] /Contents {number + 1} 0 R "
            f"/Resources << {page.resources} >> {page.entries} >>"
        ).encode()
        contents[number + 1] = stream("/Filter /FlateDecode", zlib.compress(page.content))
    places, bodies = [], b""
    for number, body in held.items():
        places.append(f"{number} {len(bodies)}")
        bodies += body + b" "
    head = " ".join(places).encode() + b" "
    objects = stream(
        f"/Type /ObjStm /N {len(held)} /First {len(head)} /Filter /FlateDecode", zlib.compress(head + bodies)
    )
    out = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    rows = {0: (0, 0, 65535)} | {number: (2, 3, index) for index, number in enumerate(held)}
    for number, body in ({3: objects} | contents).items():
        rows[number] = (1, len(out), 0)
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    start = len(out)
    rows[4] = (1, start, 0)
    table = b"".join(
        kind.to_bytes(1, "big") + place.to_bytes(4, "big") + index.to_bytes(2, "big")
        for _, (kind, place, index) in sorted(rows.items())
    )
    body = stream(f"/Type /XRef /Size {len(rows)} /W [1 4 2] /Root 1 0 R /Filter /FlateDecode", zlib.compress(table))
    return bytes(out) + b"4 0 obj\n%b\nendobj\nstartxref\n%d\n%%%%EOF\n" % (body, start)


def quadrants(box: str = "0 0 200 100", entries: str = "") -> PdfPage:
    """200 x 100 points: red upper left, green upper right, blue lower left; the lower right is left bare."""
    content = b"1 0 0 rg 0 50 100 50 re f  0 1 0 rg 100 50 100 50 re f  0 0 1 rg 0 0 100 50 re f"
    return PdfPage(content, box, entries)


def numbered_pages(count: int) -> bytes:
    """`count` pages of 100 x 100 points; page n is grey of level 10 * n."""
    return pdf(*(PdfPage(b"%.4f g 0 0 100 100 re f" % (n / 25.5), "0 0 100 100") for n in range(1, count + 1)))


def laughing(levels: int, times: int = 10) -> bytes:
    """Forms that draw a form `times` times that draws a form ...: times ** levels rectangles out of a kilobyte."""
    forms = []
    for level in range(levels):
        last = level == levels - 1
        resources = "" if last else f"/Resources << /XObject << /X {5 + level + 1} 0 R >> >>"
        content = b"0 0 10 10 re f" if last else b"/X Do " * times
        forms.append(stream(f"/Type /XObject /Subtype /Form /BBox [0 0 200 100] {resources}", content))
    return pdf(PdfPage(b"/X Do " * times, resources="/XObject << /X 5 0 R >>"), objects=forms)


def encrypted(user_password: bytes, page: PdfPage) -> bytes:
    """One page under RC4 of 40 bits (PDF 1.7, 7.6.3, revision 2); with an empty password anybody may read it."""

    def padded(password: bytes) -> bytes:
        return (password + _PADDING)[:32]

    identity, permissions = b"siglance", b"\xfc\xff\xff\xff"
    owner = _rc4(hashlib.md5(padded(b"owner")).digest()[:5], padded(user_password))
    key = hashlib.md5(padded(user_password) + owner + permissions + identity).digest()[:5]
    user = _rc4(key, _PADDING)

    def cipher(number: int, data: bytes) -> bytes:
        salted = hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10]
        return _rc4(salted, data)

    trailer = (
        f"/ID [<{identity.hex()}> <{identity.hex()}>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 "
        f"/O <{owner.hex()}> /U <{user.hex()}> >>"
    )
    return pdf(page, trailer=trailer, cipher=cipher)


def _rc4(key: bytes, data: bytes) -> bytes:
    state = list(range(256))
    j = 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out = bytearray()
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
