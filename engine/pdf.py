"""PDF documents: pages chosen and measured at once, drawn later, one at a time.

The document is opened by a process of its own (`pdf_worker`, which says why), once to measure and once for each page,
so that nothing stays open in between and no limit, fault or thread of the document reaches this process. Starting it
takes about 50 ms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DocumentError
from .limits import Limits
from .worker import Worker

__all__ = ["Page", "is_pdf", "open_pages", "page_numbers"]

_WORKER = Worker(script="pdf_worker.py", package="pypdfium2", extra="pdf", work="reading PDFs", task="reads PDFs")
_RANGE = re.compile(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?")
# Layouts are computed in whole pixels. Pages come in points, so small ones are measured in a finer unit.
_LONG_SIDE = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A page of a document, seen as a viewer shows it: turned by its rotation, cut to its crop box.

    `height` and `width` are in points (1/72 inch, if the page does not define a unit of its own). `name` is how error
    messages call it.
    """

    document: bytes
    index: int
    height: float
    width: float
    name: str
    limits: Limits

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in whole points, at least 1."""
        return max(1, round(self.height)), max(1, round(self.width))

    @property
    def proportions(self) -> tuple[int, int]:
        """(height, width) in a unit in which the long side is 10,000."""
        scale = _LONG_SIDE / max(self.height, self.width)
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def draw(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """The page with annotations and form fields on white: uint8 [H, W, 3], RGB.

        As large as fits into height x width, both sides at least 1; its proportions are kept.
        Raises DocumentError: the page is damaged, too much work, or too large for `limits`.
        """
        if height * width > self.limits.max_pixels:
            factor = math.sqrt(self.limits.max_pixels / (height * width))
            height, width = max(1, int(height * factor)), max(1, int(width * factor))
        question = {"page": self.index, "height": height, "width": width}
        reply, pixels = _ask(question, self.document, self.limits, self.name)
        rows = np.frombuffer(pixels, np.uint8).reshape(reply["height"], reply["stride"])
        return np.ascontiguousarray(rows[:, : 3 * reply["width"]].reshape(reply["height"], reply["width"], 3))


def is_pdf(data: bytes) -> bool:
    """Whether an encoded file says that it is a PDF."""
    return data[:1024].lstrip(b"\xef\xbb\xbf\0 \t\r\n").startswith(b"%PDF-")


def open_pages(document: bytes, pages: str | int | Sequence[int] | None, limits: Limits, name: str) -> list[Page]:
    """The chosen pages of a PDF, measured and not drawn.

    Args:
        document: the encoded file.
        pages: which pages, see `page_numbers`; None is all of them.
        limits: `max_pages`, `max_page_seconds`, `max_page_memory`, and for drawing `max_pixels`.
        name: how error messages call the document, for example "document 2 (report.pdf)".

    Raises:
        DocumentError: not a PDF, damaged, encrypted, without the pages that were asked for, a page without area, over
            a limit, or the extra `pdf` is not installed.
    """
    if not document:
        raise DocumentError(f"{name}: empty, 0 bytes")
    if b"%PDF-" not in document[:1024]:
        raise DocumentError(f"{name}: not a PDF")
    chosen = None if pages is None else page_numbers(pages, limits.max_pages, name)
    wanted = range(1, limits.max_pages + 1) if chosen is None else chosen
    reply, _ = _ask({"pages": _index_ranges(wanted)}, document, limits, name)
    count = reply["count"]
    if chosen is None and count > limits.max_pages:
        raise DocumentError(
            f"{name}: {count} pages, the limit is {limits.max_pages}; choose some, for example 1-{limits.max_pages}"
        )
    for number in chosen or ():
        if number > count:
            raise DocumentError(f"{name}: page {number} does not exist, the document has {count}")
    if not count:
        raise DocumentError(f"{name}: no pages")
    opened = []
    for number, size in zip(wanted, reply["sizes"], strict=False):  # all pages may be fewer than are allowed
        page = f"{name}, page {number}"
        if size is None:
            raise DocumentError(f"{page}: damaged")
        height, width = size
        if not (height > 0 and width > 0 and math.isfinite(height) and math.isfinite(width)):
            raise DocumentError(f"{page}: a size of {width:g}x{height:g} points has no area")
        opened.append(Page(document, number - 1, height, width, page, limits))
    return opened


def _index_ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Page numbers in their order as ranges of indices, ends excluded: a command line does not hold many numbers."""
    if isinstance(numbers, range):
        return [(numbers.start - 1, numbers.stop - 1)]
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number - 1, number))
    return ranges


def page_numbers(pages: str | int | Sequence[int], most: int, name: str) -> list[int]:
    """Page numbers, counted from 1, in the order given.

    Args:
        pages: "3", "1-3", or several of these with commas between, "1-3, 7"; a number; or numbers, such as range(1, 4).
        most: greatest number of pages.
        name: how error messages call the document.

    Raises DocumentError for anything else, an empty choice, a number below 1, or more than `most` pages.
    """
    runs = _runs(pages, name)
    count = sum(len(run) for run in runs)
    if not count:
        raise DocumentError(f"{name}: the choice of pages is empty")
    if count > most:
        raise DocumentError(f"{name}: {count} pages are asked for, the limit is {most}")
    numbers = [number for run in runs for number in run]
    for number in numbers:
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or number < 1:
            raise DocumentError(f"{name}: page {number!r} is not possible, pages are counted from 1")
    return [int(number) for number in numbers]


def _runs(pages: str | int | Sequence[int], name: str) -> list[Sequence[int]]:
    if isinstance(pages, str):
        runs: list[Sequence[int]] = []
        for text in pages.split(",")[:10_000]:
            match = _RANGE.fullmatch(text)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last:
                raise DocumentError(
                    f"{name}: pages {text.strip()[:40]!r} are not a choice such as '3', '1-3' or '1-3, 7'"
                )
            runs.append(range(first, last + 1))
        return runs
    if isinstance(pages, int | np.integer):
        return [[int(pages)]] if not isinstance(pages, bool) else [[pages]]
    if isinstance(pages, Sequence) and not isinstance(pages, bytes | bytearray | memoryview):
        return [pages]
    raise DocumentError(f"{name}: pages are {type(pages).__name__}, expected text such as '1-3', a number or numbers")


def _ask(question: dict[str, Any], document: bytes, limits: Limits, name: str) -> tuple[dict[str, Any], memoryview]:
    """Put one question to a new worker process: its answer, and the bytes behind it."""
    _WORKER.require(DocumentError)
    return _WORKER.ask(
        question,
        document,
        lambda message: DocumentError(f"{name}: {message}"),
        memory=limits.max_page_memory,
        seconds=limits.max_page_seconds,
        late="the limit for a page",
        limits=f"the limit of {limits.max_page_memory} bytes of memory",
    )
