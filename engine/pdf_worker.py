"""The process that opens a PDF: one question as its argument, one answer on standard output, then it ends.

PDFium is large, not thread-safe, and PDFs are untrusted: a few hundred bytes of them can ask for hours of work or all
memory. So it never runs inside the engine's process, where it could take the host program down with it or meet another
user of PDFium in another thread. This file runs as a script and imports nothing of siglance.

Question: JSON in the first argument; the document is on standard input.
    {"path": [...], "memory": bytes, "seconds": s, "pages": [[first index, end], ...]}         sizes of pages
    {"path": [...], "memory": bytes, "seconds": s, "page": index, "height": h, "width": w}    one page drawn
Answer: one line of JSON, then pixels where a page was asked for.
    {"count": pages of the document, "sizes": [[height, width] or null if the page is damaged, ...]}
        in points; an index past the end has no entry
    {"height": h, "width": w, "stride": bytes a row}                      then RGB rows from the top
    {"error": "..."}
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["answer", "main"]

_PASSWORD = 4  # FPDF_ERR_PASSWORD


def main() -> None:
    """Answer the question in the first argument."""
    question = json.loads(sys.argv[1])
    sys.path[:] = question["path"]
    import pypdfium2  # before the limits: its library is mapped here

    data = sys.stdin.buffer.read()
    runpy.run_path(str(Path(__file__).with_name("worker_limits.py")))["limit_resources"](
        question["memory"] + len(data), question["seconds"]
    )
    answer(pypdfium2, question, data, sys.stdout.buffer)  # a MemoryError ends the process, as PDFium's own does


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


def _measure(document: Any, pages: list[list[int]], damaged: type[Exception]) -> dict[str, Any]:
    count = len(document)
    sizes: list[list[float] | None] = []
    for index in (index for first, end in pages for index in range(first, min(end, count))):
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
