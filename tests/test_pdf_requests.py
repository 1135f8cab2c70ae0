"""Documents in requests: pages are pictures in order, drawn one at a time, counted as "document"."""

import base64
import io
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from siglance.engine import Engine, Image, Limits, Pdf, Sampling, Text, cli
from siglance.engine import pdf as pdf_module
from siglance.engine.errors import ContextFull, DocumentError, ImageError, InputError, PromptError

from .pdf_files import PdfPage, numbered_pages, pdf, quadrants
from .scripted import picture, scripted, with_manifest

GREEDY = Sampling(temperature=0)
QUESTION = Text("what?")
SQUARE = b"1 0 0 rg 100 500 200 200 re f"  # on a page of 612 x 792 points: 92 to 292 from the top


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A tiny model with text and pictures."""
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        yield engine


def silent(engine: Engine):
    """`scripted` with a model that ends its turn at once."""
    return scripted(engine, [engine.manifest.stop_ids[0]])


@pytest.fixture
def drawn(monkeypatch):
    """The indices of the pages that have been drawn so far."""
    indices = []
    ask = pdf_module._ask

    def listen(question, *arguments):
        if "page" in question:
            indices.append(question["page"])
        return ask(question, *arguments)

    monkeypatch.setattr(pdf_module, "_ask", listen)
    return indices


# --- pages are pictures


def test_pages_take_the_place_of_pictures_in_order(engine, drawn):
    """The prompt is that of pictures of the same proportions, text between them included."""
    double, runtime = silent(engine)
    square = np.zeros((96, 96, 3), np.uint8)
    as_pictures = double.generate(["a", square, square, "b", picture(), QUESTION], image_tokens=70)
    means = [soft.values[0, 0] for soft in runtime.soft]
    reply = double.generate(["a", Pdf(numbered_pages(9), "7,2"), "b", picture(), QUESTION], image_tokens=70)
    assert reply.prompt_token_ids == as_pictures.prompt_token_ids
    assert drawn == [6, 1]
    assert [soft.start for soft in runtime.soft] == sorted(soft.start for soft in runtime.soft)
    found = [soft.values[0, 0] for soft in runtime.soft]
    assert found[:2] == [70, 20]
    assert found[2] == means[2]


def test_soft_tokens_of_pages_count_as_document(engine):
    parts = [picture(), Pdf(numbered_pages(2), tokens=70), QUESTION]
    double, _ = silent(engine)
    usage = double.generate(parts, image_tokens=140).usage
    counts = engine.count_tokens(parts, image_tokens=140)
    assert usage.by_modality == {name: count for name, count in counts.items() if name != "total"}
    assert usage.by_modality["document"] == 2 * engine.count_tokens([np.zeros((96, 96))], image_tokens=70)["image"]
    assert sum(usage.by_modality.values()) == counts["total"] == usage.prompt_tokens
    assert "document" not in engine.count_tokens([picture(), QUESTION])


def test_a_page_gives_what_its_drawing_gives(engine):
    """One path for pixels: the page drawn at twice the size that the model sees, then resized like any picture."""
    page = PdfPage(SQUARE, "0 0 600 400")
    seen = engine.encode(Pdf(pdf(page)), image_tokens=70)
    [source] = pdf_module.open_pages(pdf(page), None, Limits(), "x")
    layout = engine.encode(np.zeros((400, 600, 3), np.uint8), image_tokens=70)
    assert len(seen) == len(layout)
    facts = engine.manifest.image
    side = facts.patch_size * facts.pool_size
    rows = next(rows for rows in range(1, 70) if len(seen) % rows == 0 and 1 < len(seen) / rows / rows < 2)
    pixels = source.draw(2 * rows * side, 2 * len(seen) // rows * side)
    np.testing.assert_array_equal(seen.soft_tokens, engine.encode(pixels, image_tokens=70).soft_tokens)
    assert (seen.size, seen.modality) == ((400, 600), "document")


def test_an_encoded_page_still_counts_as_document(engine):
    seen = engine.encode(Pdf(numbered_pages(3), 2), image_tokens=70)
    assert engine.count_tokens([seen, QUESTION])["document"] == len(seen)
    with pytest.raises(InputError, match="one picture, not a document of 3 pages"):
        engine.encode(numbered_pages(3))


class OneWay(io.RawIOBase):
    """A stream that can neither seek nor tell, like a pipe or a download."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def read(self, size=-1):
        return self._data.read(min(size, 1000))

    def readable(self):
        return True

    def seek(self, *arguments):
        raise io.UnsupportedOperation("seek")

    tell = seek


def test_every_form_of_a_document_is_the_same_document(engine, tmp_path):
    data = numbered_pages(2)
    named, unnamed = tmp_path / "a b ü.PDF", tmp_path / "scan.png"
    named.write_bytes(data)
    unnamed.write_bytes(data)
    uri = base64.b64encode(data).decode()
    forms = [
        *(data, bytearray(data), memoryview(data), named, str(named), unnamed, str(unnamed), io.BytesIO(data)),
        *(OneWay(data), f"data:application/pdf;name=a.pdf;base64,{uri}", Image(data), Pdf(data), Pdf(named)),
    ]
    expected = engine.count_tokens([Pdf(data), QUESTION])
    assert expected["document"] > 0
    for form in forms:
        assert engine.count_tokens([form, QUESTION]) == expected


def test_budgets_of_a_page(engine):
    document = numbered_pages(1)

    def count(part, **options):
        return engine.count_tokens([part, QUESTION], **options)["document"]

    small, large = count(Pdf(document), image_tokens=70), count(Pdf(document), image_tokens=280)
    assert small < large
    assert count(Pdf(document, tokens=70), image_tokens=280) == small
    assert count(Image(document, 70), image_tokens=280) == small
    with pytest.raises(ImageError, match=r"^document 1, page 1: an image budget of 71"):
        count(Pdf(document, tokens=71))


# --- when pages are drawn, and what happens to errors


def test_pages_are_drawn_one_at_a_time(engine, monkeypatch):
    """When a page is drawn, the drawing of the page before has gone: all that is left of it is what the tower sees."""
    alive, drawings = [], []
    draw = pdf_module.Page.draw

    def watched(page, height, width):
        alive.append(sum(drawing() is not None for drawing in drawings))
        pixels = draw(page, height, width)
        drawings.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(pdf_module.Page, "draw", watched)
    double, runtime = silent(engine)
    double.generate([numbered_pages(4), QUESTION], image_tokens=70)
    assert alive == [0, 0, 0, 0]
    assert runtime.encodes == 4


def test_counting_draws_nothing(engine, drawn):
    engine.count_tokens([numbered_pages(3), QUESTION])
    assert not drawn


def test_nothing_is_drawn_for_a_prompt_that_does_not_fit(engine, drawn):
    with with_manifest(engine, context=100) as small, pytest.raises(ContextFull):
        small.generate([numbered_pages(3), QUESTION], image_tokens=70)
    assert not drawn


def test_nothing_happens_before_the_first_next_nor_after_closing(engine, drawn):
    stream = engine.stream([numbered_pages(2), QUESTION], image_tokens=70)
    assert not drawn
    next(stream)
    stream.close()
    assert drawn == [0, 1]
    unused = engine.stream([numbered_pages(2), QUESTION], image_tokens=70)
    unused.close()
    assert drawn == [0, 1]


def test_a_page_that_cannot_be_drawn_fails_the_request_and_nothing_else(engine, drawn):
    """The worker dies at the second page; the engine answers the next request as it would have."""
    ask = pdf_module._ask

    def failing(question, document, limits, name):
        if question.get("page") == 1:
            raise DocumentError(f"{name}: broken")
        return ask(question, document, limits, name)

    document = numbered_pages(2)
    before = engine.generate([document, QUESTION], image_tokens=70, max_tokens=4, sampling=GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pdf_module, "_ask", failing)
        with pytest.raises(DocumentError, match=r"^document 1, page 2: broken$"):
            engine.generate([document, QUESTION], image_tokens=70, cache=False)
    after = engine.generate([document, QUESTION], image_tokens=70, max_tokens=4, sampling=GREEDY)
    assert after.token_ids == before.token_ids


def test_errors_name_the_attachment(engine, tmp_path):
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"%PDF-1.7")
    for parts, said in (
        ([numbered_pages(2), picture(), broken], r"document 3 \(broken\.pdf\): Failed"),
        ([picture(), "missing.pdf"], r"image 2 \(missing\.pdf\): cannot read"),
        ([Pdf("missing.pdf")], r"document 1 \(missing\.pdf\): cannot read"),
        ([numbered_pages(3), Pdf(numbered_pages(3), "4")], "document 2: page 4 does not exist, the document has 3"),
        ([Pdf(b"GIF89a")], "document 1: not a PDF"),
        ([Pdf(3)], "document 1: cannot be read from int"),
    ):
        with pytest.raises(InputError, match=rf"^{said}"):
            engine.count_tokens([*parts, QUESTION])


def test_limits_are_those_of_the_engine(engine):
    with Engine(engine.bundle, threads=1, limits=Limits(max_pages=2, max_bytes=5000, max_pixels=100)) as small:
        with pytest.raises(DocumentError, match="3 pages, the limit is 2"):
            small.count_tokens([numbered_pages(3)])
        with pytest.raises(DocumentError, match="over the limit of 5000 bytes"):
            small.count_tokens([Pdf(numbered_pages(2) + bytes(5000))])
        with pytest.raises(ImageError, match="the limit is 100"):
            small.count_tokens([picture()])
        assert small.count_tokens([numbered_pages(2)])["document"] > 0


def test_a_model_without_vision_refuses_a_document(tiny_model):
    refusal = pytest.raises(PromptError, match="document 1: this bundle has no vision input")
    with Engine(tiny_model("gemma3").bundle, threads=1) as reader, refusal:
        reader.generate([Pdf(numbered_pages(1)), "x"])


def test_the_library_is_never_in_the_process_of_the_engine():
    code = (
        "import sys; from siglance.engine import Engine; demo = Engine.open(); "
        "print(demo.count_tokens([sys.stdin.buffer.read()])['document'], 'pypdfium2' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=numbered_pages(1), capture_output=True, check=True, cwd="/"
    )
    assert done.stdout.split() == [b"36", b"False"]


# --- the demo looks at a page, and the command line


def test_boxes_are_in_points_of_the_page():
    """A red square of 200 points, 100 from the left and 92 from the top, whatever the budget."""
    with Engine.open("demo") as demo:
        for tokens in (25, 36):
            reply = demo.generate([Pdf(pdf(PdfPage(SQUARE, "0 0 612 792")), tokens=tokens), "detect all"])
            [box] = reply.boxes
            assert box.label == "red square"
            assert box.box == pytest.approx((100, 92, 300, 292), abs=25)


@pytest.fixture
def siglance(monkeypatch, capsys):
    """siglance(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["siglance", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def report(tmp_path) -> Path:
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf(quadrants(), PdfPage(SQUARE, "0 0 612 792"), quadrants()))
    return path


def test_pages_on_the_command_line(siglance, report, tmp_path):
    drawing = tmp_path / "out.png"
    arguments = ("run", "-i", f"{report}@25", "--pages", "2", "-p", "detect all", "--json", "--draw", drawing)
    code, out, err = siglance(*arguments)
    assert (code, err) == (0, "")
    reply = json.loads(out)
    assert reply["usage"]["by_modality"]["document"] <= 25
    assert reply["usage"]["by_modality"]["image"] == 0
    assert [box["label"] for box in reply["boxes"]] == ["red square"]
    with PillowImage.open(drawing) as drawn_on:
        assert drawn_on.size == (2 * 612, 2 * 792)  # two pixels a point
        assert drawn_on.getpixel((400, 400)) == (255, 0, 0)


def test_counting_on_the_command_line(siglance, report):
    one, three = (siglance("count-tokens", "-i", report, *pages) for pages in (("--pages", "1"), ()))
    counts = [dict(line.split() for line in out.splitlines()) for _, out, _ in (one, three)]
    assert int(counts[1]["document"]) > 2 * int(counts[0]["document"]) - 5
    assert counts[0]["image"] == "0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pages", "4"), "document 1 (report.pdf): page 4 does not exist, the document has 3"),
        (("--pages", "x"), "pages 'x'"),
        (("--limit", "pages=2"), "3 pages, the limit is 2"),
        (("--limit", "bytes=100"), "over the limit of 100 bytes"),
        (("--limit", "pages=0"), "max_pages is 0"),
        (("--limit", "pages=two"), "the limit pages is 'two'"),
        (
            ("--limit", "rows=2"),
            "no limit 'rows'; the limits are bytes, pixels, pages, page_seconds, page_memory, video_bytes",
        ),
        (("--draw", "out.png"), "exactly one picture, the document has 3 pages"),
    ],
    ids=str,
)
def test_what_the_command_line_refuses(siglance, report, arguments, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = siglance("run", "-i", report, "-p", "describe", *arguments)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


def test_pages_without_a_document_are_refused(siglance, tmp_path):
    PillowImage.fromarray(picture()).save(tmp_path / "a.png")
    code, _, err = siglance("run", "-i", tmp_path / "a.png", "--pages", "1-2", "-p", "x")
    assert code == 1
    assert "--pages 1-2: none of the files is a PDF" in err
