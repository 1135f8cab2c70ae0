"""Pages of PDFs: chosen, measured and drawn within limits; everything hostile or broken is a typed error."""

import dataclasses
import importlib.util
import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from siglance.engine import pdf as pdf_module
from siglance.engine.errors import DocumentError, InputError
from siglance.engine.limits import DEFAULT_LIMITS, Limits
from siglance.engine.pdf import is_pdf, open_pages, page_numbers

from .pdf_files import PdfPage, encrypted, laughing, numbered_pages, packed, pdf, quadrants, stream
from .picture_files import encoded

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def pages_of(document, pages=None, limits=DEFAULT_LIMITS):
    return open_pages(document, pages, limits, "document 1 (a.pdf)")


def drawn(page, size=(200, 200)):
    [one] = pages_of(pdf(page) if isinstance(page, PdfPage) else page)
    return one.draw(*size)


def corners(pixels):
    """Colours in the middle of the quarters: upper left, upper right, lower left, lower right."""
    height, width = pixels.shape[:2]
    return [pixels[y * height // 4, x * width // 4].tolist() for y in (1, 3) for x in (1, 3)]


# ------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("entries", "size", "expected"),
    [
        ("", (100, 200), [RED, GREEN, BLUE, WHITE]),
        ("/Rotate 90", (200, 100), [BLUE, RED, WHITE, GREEN]),
        ("/Rotate 180", (100, 200), [WHITE, BLUE, GREEN, RED]),
        ("/Rotate 270", (200, 100), [GREEN, WHITE, RED, BLUE]),
        ("/CropBox [50 25 150 75]", (50, 100), [RED, GREEN, BLUE, WHITE]),
        ("/CropBox [0 50 100 100]", (50, 100), [RED] * 4),
        ("/CropBox [0 0 100 50] /Rotate 90", (100, 50), [BLUE] * 4),
        ("/UserUnit 10", (100, 200), [RED, GREEN, BLUE, WHITE]),
    ],
)
def test_a_page_is_seen_as_a_viewer_shows_it(entries, size, expected):
    [page] = pages_of(pdf(quadrants(entries=entries)))
    assert page.size == size
    pixels = page.draw(200, 200)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.shape == (200 * size[0] // max(size), 200 * size[1] // max(size), 3)
    assert corners(pixels) == expected


def test_a_box_that_does_not_begin_at_zero():
    [page] = pages_of(pdf(PdfPage(b"1 0 0 rg -100 -50 100 50 re f", "-100 -50 100 50")))
    assert corners(page.draw(100, 100)) == [WHITE, WHITE, RED, WHITE]


@pytest.mark.parametrize(
    ("box", "asked", "shape"),
    [
        ("0 0 612 792", (1824, 1344), (1740, 1344)),
        ("0 0 14400 14400", (300, 300), (300, 300)),  # the largest page there is, 5 m a side
        ("0 0 14400 3", (200, 200), (1, 200)),
        ("0 0 0.5 0.25", (200, 200), (100, 200)),
        ("0 0 61.2 79.2", (7, 1000), (7, 6)),
    ],
)
def test_the_drawing_has_the_size_that_is_asked_for_and_not_that_of_the_page(box, asked, shape):
    height, width, _ = drawn(PdfPage(b"", box), asked).shape
    assert (height, width) == shape


def test_proportions_are_those_of_the_page_to_the_last_point():
    [page] = pages_of(pdf(PdfPage(b"", "0 0 595.276 841.89")))
    height, width = page.proportions
    assert abs(height / width - 841.89 / 595.276) < 1e-4
    assert page.size == (842, 595)
    [tiny] = pages_of(pdf(PdfPage(b"", "0 0 0.3 0.2")))
    assert (tiny.size, tiny.proportions) == ((1, 1), (6667, 10_000))


def test_what_is_transparent_is_blended_with_white():
    content = b"/Half gs 1 0 0 rg 0 0 100 100 re f"
    pixels = drawn(PdfPage(content, resources="/ExtGState << /Half << /ca 0.5 >> >>"))
    assert np.abs(pixels[50, 50].astype(int) - (255, 127, 127)).max() <= 1
    assert pixels[50, 150].tolist() == WHITE


def test_annotations_and_form_fields_are_drawn():
    annotation = (
        b"<< /Type /Annot /Subtype /Square /Rect [0 50 100 100] /IC [1 0 0] /C [1 0 0] /F 4 /AP << /N 8 0 R >> >>"
    )
    field = (
        b"<< /Type /Annot /Subtype /Widget /FT /Btn /T (a) /F 4 /Rect [100 0 200 50] /AS /On "
        b"/AP << /N << /On 9 0 R >> >> /MK << /BG [0 0 1] >> >>"
    )
    form = "/Type /XObject /Subtype /Form /BBox [0 0 100 50]"
    objects = [
        b"null",
        annotation,
        field,
        stream(form, b"1 0 0 rg 0 0 100 50 re f"),
        stream(form, b"0 0 1 rg 0 0 100 50 re f"),
    ]
    document = pdf(PdfPage(entries="/Annots [6 0 R 7 0 R]"), objects=objects, catalog="/AcroForm << /Fields [7 0 R] >>")
    assert corners(drawn(document)) == [RED, WHITE, WHITE, BLUE]


def image_page(data, colour_space, **entries):
    """A page that shows one JPEG all over."""
    more = " ".join(f"/{key} {value}" for key, value in entries.items())
    body = stream(
        f"/Type /XObject /Subtype /Image /Width 16 /Height 16 /BitsPerComponent 8 /ColorSpace /{colour_space} "
        f"/Filter /DCTDecode {more}",
        data,
    )
    page = PdfPage(b"q 200 0 0 100 0 0 cm /I Do Q", resources="/XObject << /I 5 0 R >>")
    return pdf(page, objects=[body])


def test_pictures_in_a_page_have_their_colours():
    """Red as JPEG: RGB, and CMYK as print shops save it, with the inks inverted and a Decode array that says so."""
    red = Image.new("RGB", (16, 16), "red")
    cmyk = encoded(red.convert("CMYK"), "JPEG", quality=95)
    for document in (
        image_page(encoded(red, "JPEG", quality=95), "DeviceRGB"),
        image_page(cmyk, "DeviceCMYK", Decode="[1 0 1 0 1 0 1 0]"),
    ):
        pixels = drawn(document)[50, 100].astype(int)
        assert pixels[0] >= 235
        assert pixels[1:].max() <= 40


def test_a_document_of_compressed_objects_is_read():
    opened = pages_of(packed(quadrants(), quadrants(entries="/Rotate 180")))
    assert [corners(page.draw(40, 40)) for page in opened] == [[RED, GREEN, BLUE, WHITE], [WHITE, BLUE, GREEN, RED]]


def test_a_document_with_an_empty_password_is_read():
    assert corners(drawn(encrypted(b"", quadrants()))) == [RED, GREEN, BLUE, WHITE]


def test_data_in_front_of_the_document_is_skipped():
    document = b"HTTP/1.1 200 OK\r\n\r\n" + pdf(quadrants())
    assert not is_pdf(document)
    assert corners(drawn(document)) == [RED, GREEN, BLUE, WHITE]
    assert is_pdf(b"\xef\xbb\xbf\n" + pdf(quadrants()))


# ---------------------------------------------------------------------------------------------------- choice of pages


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        (None, [1, 2, 3, 4, 5]),
        ("2", [2]),
        ("2-4", [2, 3, 4]),
        (" 1 - 2 , 5 ", [1, 2, 5]),
        ("5,1,1", [5, 1, 1]),
        (3, [3]),
        (range(2, 4), [2, 3]),
        ([4, 2], [4, 2]),
        (np.array([1, 3]).tolist(), [1, 3]),
        ((np.int64(2),), [2]),
    ],
    ids=str,
)
def test_the_chosen_pages_in_the_order_given(pages, expected):
    opened = pages_of(numbered_pages(5), pages)
    assert [page.index + 1 for page in opened] == expected
    assert [page.name for page in opened] == [f"document 1 (a.pdf), page {number}" for number in expected]
    assert opened[-1].draw(10, 10)[5, 5, 0] == 10 * expected[-1]


@pytest.mark.parametrize(
    ("pages", "said"),
    [
        ("6", "page 6 does not exist, the document has 5"),
        ("4-6", "page 6 does not exist, the document has 5"),
        ([1, 70], "page 70 does not exist"),
        ("0", "pages '0'"),
        ("3-1", "pages '3-1'"),
        ("1-", "pages '1-'"),
        ("-2", "pages '-2'"),
        ("", "pages ''"),
        ("1,,2", "pages ''"),
        ("one", "pages 'one'"),
        ("١", "pages"),
        ("1-999999999", "999999999 pages are asked for, the limit is 100"),
        (range(1, 10**12), "pages are asked for, the limit is 100"),
        ("1," * 200 + "1", "201 pages are asked for, the limit is 100"),
        ([], "empty"),
        (range(3, 3), "empty"),
        (0, "page 0"),
        ([-1], "page -1"),
        ([True], "page True"),
        (True, "page True"),
        ([1.0], "page 1.0"),
        (["1"], "page '1'"),
        (2.5, "float"),
        (b"1", "bytes"),
        ({1: 2}, "dict"),
    ],
    ids=str,
)
def test_an_impossible_choice_says_why(pages, said):
    with pytest.raises(DocumentError, match=rf"^document 1 \(a\.pdf\): .*{said}"):
        pages_of(numbered_pages(5), pages)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=8))
def test_a_list_of_runs_is_the_runs_one_after_the_other(runs):
    text = ", ".join(f"{first}-{first + more}" if more else str(first) for first, more in runs)
    expected = [number for first, more in runs for number in range(first, first + more + 1)]
    assert page_numbers(text, 1000, "x") == expected
    assert page_numbers(expected, 1000, "x") == expected


def test_the_limit_on_pages():
    document = numbered_pages(5)
    assert len(pages_of(document, limits=Limits(max_pages=5))) == 5
    with pytest.raises(DocumentError, match=r"5 pages, the limit is 4; choose some, for example 1-4"):
        pages_of(document, limits=Limits(max_pages=4))
    assert len(pages_of(document, "2-5", limits=Limits(max_pages=4))) == 4
    many = Limits(max_pages=10**6)  # their numbers would not fit on the command line of the worker
    assert len(pages_of(document, limits=many)) == 5
    assert [page.index for page in pages_of(document, "4-5, 1, 2, 2-3", limits=many)] == [3, 4, 0, 1, 1, 2]
    with pytest.raises(DocumentError, match="page 6 does not exist, the document has 5"):
        pages_of(document, "1-100000", limits=many)
    with pytest.raises(DocumentError, match="5 pages are asked for, the limit is 4"):
        pages_of(document, "1-5", limits=Limits(max_pages=4))


# ---------------------------------------------------------------------------------------------------- broken, hostile


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "empty, 0 bytes"),
        (b"hello", "not a PDF"),
        (encoded(Image.new("RGB", (4, 4)), "PNG"), "not a PDF"),
        (b"%PDF-1.7", "Failed to load document"),
        (pdf(quadrants())[:150], "Failed to load document"),
        (pdf(), "Failed to load document"),
        (encrypted(b"secret", quadrants()), "encrypted.*password"),
        (pdf(quadrants(entries="/CropBox [300 300 400 400]")), r"page 1: a size of 0x0 points has no area"),
        (pdf(quadrants()).replace(b"/Type /Page ", b"/Type /Cage "), "page 1: damaged"),
        (pdf(quadrants()).replace(b"[3 0 R]", b"[9 0 R]"), "page 1: damaged"),
        (numbered_pages(2).replace(b"/Count 2", b"/Count 9"), "page 3: damaged"),
    ],
)
def test_what_cannot_be_read_says_why(document, said):
    with pytest.raises(DocumentError, match=rf"^document 1 \(a\.pdf\)(: |, )[^\n]*({said})[^\n]*$"):
        pages_of(document)


def slow_page():
    [page] = pages_of(pdf(PdfPage(b"0 0 200 100 re f\n" * 300_000)))
    return dataclasses.replace(page, limits=Limits(max_page_seconds=0.3))


def test_a_page_that_asks_for_too_much_time_is_stopped():
    """300,000 rectangles over a large page: seconds of work in a few kilobytes of packed data."""
    with pytest.raises(DocumentError, match=r"page 1: not done after 0\.3 seconds, the limit for a page"):
        slow_page().draw(2000, 2000)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the memory of a process")
def test_a_page_that_asks_for_too_much_memory_is_stopped():
    """A kilobyte that would draw ten million forms."""
    [page] = pages_of(laughing(7), limits=Limits(max_page_memory=200 * 2**20))
    with pytest.raises(DocumentError, match=r"page 1: .*limit of 209715200 bytes of memory"):
        page.draw(200, 200)


def test_a_drawing_is_never_larger_than_the_limit_on_pixels():
    [page] = pages_of(pdf(quadrants()), limits=Limits(max_pixels=5000))
    pixels = page.draw(2000, 2000)
    assert pixels.shape[0] * pixels.shape[1] <= 5000
    assert corners(pixels) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "ended with SIGSEGV"),
        ("raise SystemExit(7)", "ended with exit code 7"),
        ("raise MemoryError", "ended with exit code 1"),
    ],
)
def test_a_fault_in_the_library_is_an_error_of_the_document(script, said, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(pdf_module, "_WORKER", dataclasses.replace(pdf_module._WORKER, script=str(worker)))
    with pytest.raises(DocumentError, match=rf"^document 1 \(a\.pdf\): .*{said}"):
        pages_of(pdf(quadrants()))


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DocumentError, match=r"pip install 'siglance\[pdf\]'"):
        pages_of(pdf(quadrants()))


def test_a_program_without_an_interpreter_says_so(monkeypatch):
    monkeypatch.setattr("sys.frozen", True, raising=False)
    with pytest.raises(DocumentError, match="does not have"):
        pages_of(pdf(quadrants()))


@pytest.mark.parametrize(
    "values",
    [{"max_pages": 0}, {"max_pixels": -1}, {"max_bytes": 1.5}, {"max_pages": True}, {"max_page_seconds": float("nan")},
     {"max_page_seconds": "3"}, {"max_page_memory": None}],
    ids=str,
)  # fmt: skip
def test_limits_are_positive_numbers(values):
    [(name, value)] = values.items()
    with pytest.raises(InputError, match=f"{name} is {value!r}"):
        Limits(**values)


# -------------------------------------------------------------------------------------------------------- cleanliness


def test_documents_in_many_threads_at_once():
    documents = [numbered_pages(2), pdf(quadrants())]
    alone = [[page.draw(40, 40) for page in pages_of(document)] for document in documents]
    wrong = []

    def read(index):
        together = [page.draw(40, 40) for page in pages_of(documents[index])]
        if any((one != other).any() for one, other in zip(together, alone[index], strict=True)):
            wrong.append(index)

    threads = [threading.Thread(target=read, args=(index % 2,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files by /proc")
def test_nothing_stays_open():
    def state():
        with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
            return len(os.listdir("/proc/self/fd")), file.read().split()

    before = state()
    for document in (pdf(quadrants()), pdf(quadrants())[:150], encrypted(b"x", quadrants())):
        try:
            pages_of(document)[0].draw(20, 20)
        except DocumentError:
            continue
    with pytest.raises(DocumentError):
        slow_page().draw(2000, 2000)
    assert state() == before
