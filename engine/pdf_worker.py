"""The process that opens a PDF: one question on standard input, one answer on standard output, then it ends.

PDFium is large, not thread-safe, and PDFs are untrusted: a few hundred bytes of them can ask for hours of work or all
memory. So it never runs inside the engine's process, where it could take the host program down with it or meet another
user of PDFium in another thread. This file runs as a script and imports nothing of siglance.

Question: one line of JSON, then the bytes of the document.
    {"path": [...], "memory": bytes, "seconds": s, "pages": [index, ...]}                     sizes of pages
    {"path": [...], "memory": bytes, "seconds": s, "page": index, "height": h, "width": w}    one page drawn
Answer: one line of JSON, then pixels where a page was asked for.
    {"count": pages of the document, "sizes": [[height, width] or null if the page is damaged, ...]}
        in points; an index past the end has no entry
    {"height": h, "width": w, "stride": bytes a row}                      then RGB rows from the top
    {"error": "..."}
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from typing import Any, BinaryIO

__all__ = ["answer", "limit_resources", "main"]

_PASSWORD = 4  # FPDF_ERR_PASSWORD


def main() -> None:
    """Answer the question on standard input."""
    question = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = question["path"]
    import pypdfium2  # before the limits: its library is mapped here

    data = sys.stdin.buffer.read()
    limit_resources(question["memory"] + len(data), question["seconds"])
    answer(pypdfium2, question, data, sys.stdout.buffer)  # a MemoryError ends the process, as PDFium's own does


def limit_resources(memory: int, seconds: float) -> None:
    """Give this process at most `memory` bytes of address space, `seconds` of processor time, and no file to write.

    The process that asked watches the time too; this holds when it has gone. Windows has no such limits.
    """
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # Systems refuse some of these (macOS that on address space); the time that the asking process watches holds.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))


def answer(pypdfium2: Any, question: dict[str, Any], data: bytes, out: BinaryIO) -> None:
    """Write the answer to `question` about the document `data`."""
    pixels = b""
    try:
        with pypdfium2.PdfDocument(data) as document:
            document.init_forms()  # before any page is loaded, or the fields of forms are not drawn
            if "page" in question:
                reply, pixels = _draw(document, question["page"], question["height"], question["width"])
            else:
                reply = _measure(document, question["pages"], pypdfium2.PdfiumError)
    except pypdfium2.PdfiumError as error:
        encrypted = getattr(error, "err_code", None) == _PASSWORD
        reply = {"error": "encrypted, and cannot be read without its password" if encrypted else _sentence(error)}
    out.write(json.dumps(reply).encode() + b"\n")
    out.write(pixels)
    out.flush()


def _measure(document: Any, pages: list[int], damaged: type[Exception]) -> dict[str, Any]:
    count = len(document)
    sizes: list[list[float] | None] = []
    for index in pages:
        if index >= count:
            continue
        try:
            width, height = document.get_page_size(index)  # of the crop box, turned by the page's rotation
        except damaged:
            sizes.append(None)
        else:
            sizes.append([height, width])
    return {"count": count, "sizes": sizes}


def _draw(document: Any, index: int, height: int, width: int) -> tuple[dict[str, Any], bytes]:
    """Draw a page into at most height x width pixels, its proportions kept, on white."""
    page = document[index]
    try:
        page_width, page_height = page.get_size()
        scale = min(height / page_height, width / page_width)
        # PDFium rounds sizes up; this keeps a whole number of pixels from becoming one more.
        bitmap = page.render(scale=scale * (1 - 1e-6), rev_byteorder=True, draw_annots=True)
        try:
            reply = {"height": bitmap.height, "width": bitmap.width, "stride": bitmap.stride}
            return reply, bytes(bitmap.buffer)
        finally:
            bitmap.close()
    finally:
        page.close()


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    main()
