"""Mutated input at length: typed errors only, no crash, no hang. `make fuzz`; SIGLANCE_FUZZ_INPUTS sets the number."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siglance.engine.boxes import parse_boxes
from siglance.engine.errors import BundleError, DocumentError, ImageError
from siglance.engine.image import load_image
from siglance.engine.limits import Limits
from siglance.engine.manifest import read_manifest, write_manifest
from siglance.engine.pdf import open_pages
from siglance.engine.self_test import formula_picture

from .pdf_files import PdfPage, encrypted, laughing, numbered_pages, packed, pdf, quadrants
from .picture_files import encoded
from .rare_pictures import rare_pictures

pytestmark = pytest.mark.fuzz

INPUTS = int(os.environ.get("SIGLANCE_FUZZ_INPUTS", "5000"))
SEED = 20_261_125
SLOWEST = 5.0  # seconds for one input
MOST_MEMORY = 600_000  # kilobytes for one input: 50 megapixels are decoded at most
MOST_KEPT = 60_000  # kilobytes for all of them: what allocators do not give back


def originals() -> list[bytes]:
    """Small pictures in every format that is read: grey, with transparency, with a palette, animated too."""
    picture = Image.fromarray(formula_picture(37, 53))
    files = []
    for kind, modes in {
        "PNG": ("RGB", "RGBA", "P", "L", "I;16"),
        "JPEG": ("RGB", "L", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P",),
        "BMP": ("RGB", "P"),
        "TIFF": ("RGB", "L", "CMYK"),
        "PPM": ("RGB",),
        "AVIF": ("RGB",),
        "JPEG2000": ("RGB", "LA"),
        **dict.fromkeys(("ICO", "ICNS", "TGA", "PCX", "SGI", "QOI", "DDS", "DIB"), ("RGB",)),
        **dict.fromkeys(("XBM", "MSP"), ("1",)),
    }.items():
        for mode in modes:
            image = (picture.convert("L") if mode == "I;16" else picture).convert(mode)
            files.append(encoded(image, kind))
    frames = {"save_all": True, "append_images": [picture.rotate(90)]}
    files += [encoded(picture, kind, **frames) for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF")]
    files.append(encoded(picture, "JPEG", progressive=True))
    files += [encoded(picture, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    return files + [data for data, _ in rare_pictures(24, 16, (200, 30, 40)).values()]


def documents() -> list[bytes]:
    """Small PDFs: drawings, text, pictures, forms, transparency, compressed objects, encryption."""
    text = PdfPage(b"BT /F 24 Tf 20 40 Td (Hello) Tj ET", resources="/Font << /F << /Type /Font /Subtype /Type1 "
                   "/BaseFont /Helvetica >> >>")  # fmt: skip
    shading = PdfPage(
        b"/S sh",
        resources="/Shading << /S << /ShadingType 2 /ColorSpace /DeviceRGB /Coords [0 0 200 100] /Function << "
        "/FunctionType 2 /Domain [0 1] /C0 [1 0 0] /C1 [0 0 1] /N 1 >> >> >>",
    )
    half = PdfPage(b"/Half gs 1 0 0 rg 0 0 100 100 re f", resources="/ExtGState << /Half << /ca 0.5 >> >>")
    curves = PdfPage(b"5 w [9 4] 2 d 10 10 m 60 90 120 -40 190 90 c S q 0 0 50 50 re W n 9 Tr Q", entries="/Rotate 90")
    picture = Image.fromarray(formula_picture(37, 53))
    return [
        pdf(quadrants(), text, shading, half, curves),
        pdf(quadrants(entries="/CropBox [50 25 150 75] /Rotate 270")),
        packed(quadrants(), text),
        numbered_pages(3),
        laughing(2),
        encrypted(b"", text),
        encrypted(b"secret", text),
        *(encoded(picture.convert(mode), "PDF") for mode in ("RGB", "L", "CMYK", "1")),
    ]


NUMBERS = (b"0", b"-1", b"1", b"65536", b"2147483648", b"-2147483649", b"99999999999999999999", b"1e30", b"0.00001")


def mutated(rng: np.random.Generator, files: list[bytes], kinds: int = 4) -> bytes:
    """Flip bits, overwrite a run, cut, join the halves of two files, or (of 5 kinds) write other numbers."""
    data = bytearray(files[rng.integers(len(files))])
    kind = rng.integers(kinds)
    if kind == 0:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == 1:
        # Headers hold the sizes, so half of the runs begin there.
        start = int(rng.integers(64 if rng.random() < 0.5 else len(data)))
        run = rng.bytes(int(rng.integers(1, 9)))
        data[start : start + len(run)] = run
    elif kind == 2:
        del data[int(rng.integers(len(data))) :]
    elif kind == 3:
        other = files[rng.integers(len(files))]
        data = data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]
    else:
        places = list(re.finditer(rb"[0-9]+", data))
        for place in sorted(rng.choice(len(places), min(4, len(places)), replace=False), reverse=True):
            data[places[place].start() : places[place].end()] = NUMBERS[rng.integers(len(NUMBERS))]
    return bytes(data)


class Watch:
    """Time and memory of single inputs: the slowest, and the greatest peak above what was resident before it."""

    def __init__(self):
        self.slowest = 0.0
        self.greatest = 0
        self.first = memory("VmRSS")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begin = memory("VmRSS"), time.perf_counter()
        try:
            yield
        finally:
            self.slowest = max(self.slowest, time.perf_counter() - begin)
            self.greatest = max(self.greatest, memory("VmHWM") - before)

    def report(self) -> str:
        return (
            f"slowest {self.slowest:.2f} s, greatest peak of one +{self.greatest / 1e3:.0f} MB, resident after all "
            f"{(memory('VmRSS') - self.first) / 1e3:+.0f} MB"
        )


def memory(name: str) -> int:
    """A line of /proc/self/status, in kilobytes."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def largest_child() -> int:
    """Most bytes that one of the processes that have ended held, 0 if that is no more than this one has held.

    Linux starts the record of a process with that of the process that starts it, so smaller ones cannot be seen.
    """
    most = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return most if most > 1.02 * 1024 * memory("VmHWM") else 0


@pytest.mark.filterwarnings("ignore")  # Pillow reports damaged metadata as warnings
def test_mutated_images():
    rng, files = np.random.default_rng(SEED), originals()
    read = 0
    refused: list[str] = []
    watch = Watch()
    for _ in range(INPUTS):
        data = mutated(rng, files)
        with watch():
            try:
                pixels = load_image(data)
            except ImageError as error:
                refused.append(str(error))
            else:
                assert pixels.dtype == np.uint8
                assert pixels.shape[2] == 3
                read += 1
            pixels = None
    print(f"{INPUTS} images (seed {SEED}): {read} read, {len(refused)} refused, {watch.report()}")
    assert not any("\n" in message for message in refused)
    assert watch.slowest < SLOWEST
    assert watch.greatest < MOST_MEMORY
    assert memory("VmRSS") - watch.first < MOST_KEPT


def test_mutated_documents():
    """Every document is opened, and its first pages are drawn, by processes of their own: a crash is seen as one.

    PDFium ends its process with SIGABRT when it gets no more memory. That, and work that takes longer than it may, is
    what the limits are for; any other signal is a crash.
    """
    rng, files = np.random.default_rng(SEED), documents()
    limits = Limits(max_page_seconds=SLOWEST - 0.5)
    count = INPUTS // 5
    opened = drawn = 0
    refused: list[str] = []
    watch = Watch()
    for _ in range(count):
        data = mutated(rng, files, kinds=5)
        try:
            with watch():
                pages = open_pages(data, None, limits, "document 1")
            opened += 1
            for page in pages[:3]:
                with watch():
                    assert page.draw(600, 800).shape[2] == 3
                drawn += 1
        except DocumentError as error:
            refused.append(str(error))
    ended = [message for message in refused if "ended with" in message]
    over = [message for message in ended if "SIGABRT" in message]
    late = [message for message in refused if "not done after" in message]
    peak = largest_child()
    print(
        f"{count} documents (seed {SEED}): {opened} opened, {drawn} pages drawn, {len(refused)} refused, of these "
        f"{len(over)} at the limit on memory and {len(late)} at the limit on time; {len(ended) - len(over)} crashed, "
        f"largest process of a document {peak / 1e6:.0f} MB, {watch.report()}"
    )
    assert not any("\n" in message for message in refused)
    assert ended == over
    assert not over or peak == 0 or peak > 0.9 * limits.max_page_memory  # an abort for another reason would be a crash
    assert watch.slowest < SLOWEST
    assert peak < limits.max_page_memory + 100_000_000
    assert memory("VmRSS") - watch.first < MOST_KEPT


def test_mutated_manifests(tiny_model):
    rng = np.random.default_rng(SEED)
    text = write_manifest(tiny_model("gemma4").bundle.manifest)
    pieces = ["{", "}", "[", "]", '"', ",", ":", "null", "-1", "1e999", "true", "\\", "\x00", "Ω", " " * 50]
    refused: list[str] = []
    for _ in range(INPUTS // 10):
        where = int(rng.integers(len(text)))
        damaged = text[:where] + pieces[rng.integers(len(pieces))] + text[where + int(rng.integers(4)) :]
        try:
            read_manifest(damaged)
        except BundleError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)
    print(f"{INPUTS // 10} manifests: {len(refused)} refused")


def test_mutated_replies():
    rng = np.random.default_rng(SEED)
    text = "```json\n" + json.dumps([{"box_2d": [1, 2, 300, 400], "label": "a ] b"}] * 3) + "\n```"
    pieces = ["{", "}", "[", "]", '"', ",", "box_2d", "NaN", "1e400", "\\u", "```", "\ud800", "0" * 400]
    for _ in range(INPUTS // 10):
        damaged = text
        for _ in range(rng.integers(1, 6)):
            where = int(rng.integers(len(damaged)))
            damaged = damaged[:where] + pieces[rng.integers(len(pieces))] + damaged[where + int(rng.integers(4)) :]
        for box in parse_boxes(damaged, "box_2d", [(480, 640)]).boxes:
            x_min, y_min, x_max, y_max = box.box
            assert 0 <= x_min <= x_max <= 640
            assert 0 <= y_min <= y_max <= 480
