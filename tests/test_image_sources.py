"""Any form in which a picture can be handed over gives the same pixels."""

import base64
import io
import os
import urllib.parse
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siglance.engine.errors import ImageError
from siglance.engine.image import load_image
from siglance.engine.limits import Limits
from siglance.engine.sources import head_of

from .picture_files import encoded, gradient, sources


def test_every_form_of_a_file_gives_the_same_pixels(tmp_path):
    pixels = gradient()
    for form, source in sources(encoded(Image.fromarray(pixels), "PNG"), tmp_path).items():
        result = load_image(source)
        np.testing.assert_array_equal(result, pixels, err_msg=form)
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert result.flags.writeable


def test_a_file_object_is_read_from_its_position_and_left_open(tmp_path):
    data = encoded(Image.fromarray(gradient()), "PNG")
    path = tmp_path / "two.bin"
    path.write_bytes(b"prefix" + data)
    with path.open("rb", buffering=0) as file:
        file.seek(6)
        np.testing.assert_array_equal(load_image(file), gradient())
        assert not file.closed


def test_a_raw_stream_that_returns_little_at_a_time_is_read_to_its_end():
    data = encoded(Image.fromarray(gradient()), "PNG")

    class Dribble(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    np.testing.assert_array_equal(load_image(Dribble(data)), gradient())


class OneWay(io.RawIOBase):
    """A stream that can neither seek nor tell, like a pipe or a download."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def read(self, size=-1):
        return self._data.read(size)

    def seek(self, *arguments):
        raise io.UnsupportedOperation("seek")

    tell = seek


def test_a_stream_need_not_seek(tmp_path):
    data = encoded(Image.fromarray(gradient()), "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", data)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("a.png") as member:
        np.testing.assert_array_equal(load_image(member), gradient())
    np.testing.assert_array_equal(load_image(OneWay(data)), gradient())


def test_a_stream_without_data_yet_says_so():
    class Waiting(io.RawIOBase):
        def read(self, size=-1):
            return None

    with pytest.raises(ImageError, match="no data yet"):
        load_image(Waiting())


def test_files_we_open_are_closed(tmp_path):
    """pytest turns the ResourceWarning of an unclosed file into an error."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    bad.write_bytes(good.read_bytes()[:60])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    load_image(good)
    with pytest.raises(ImageError):
        load_image(bad)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


@pytest.mark.parametrize("source", [None, 3, 2.5, ["a.png"], {"url": "a.png"}, object()])
def test_other_types_are_refused_by_name(source):
    with pytest.raises(ImageError, match=rf"image 2 \(x\): .*{type(source).__name__}"):
        load_image(source, name="image 2 (x)")


def data_uris(data):
    plain = base64.b64encode(data).decode()
    return {
        "plain": f"data:image/png;base64,{plain}",
        "URL-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}",
        "no padding": f"data:image/png;base64,{plain.rstrip('=')}",
        "white space": "data:image/png;base64, "
        + "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
        + "\n",
        "space around": f" \n data:image/png;base64,{plain} ",
        "upper case": f"DATA:IMAGE/PNG;BASE64,{plain}",
        "percent-encoded base64": f"data:image/png;base64,{urllib.parse.quote(plain, safe='')}",
        "percent-encoded bytes": f"data:image/png,{urllib.parse.quote(data, safe='')}",
        "no media type": f"data:;base64,{plain}",
        "wrong media type": f"data:text/html;base64,{plain}",
        "more parameters": f"data:image/png;charset=utf-8;base64,{plain}",
        "a name with a comma": f'data:image/png;name="a, b; c.png";base64,{plain}',
        "a name with an escaped quote": f'data:image/png;name="a \\", b.png";base64,{plain}',
        "base64 not at the end": f"data:image/png;base64;name=a.png,{plain}",
        "spaces between parameters": f"data: image/png ; charset = utf-8 ; base64 ,{plain}",
        "an unclosed quote": f'data:image/png;name="a;base64,{plain}',
        "white space everywhere": f"data:image/png;base64,\t{' '.join(plain)}\f\v\n",
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_data_uris_are_read_tolerantly(size):
    """Three sizes, so that all three lengths of padding occur; noise, so that + and / occur."""
    pixels = np.random.default_rng(size).integers(0, 256, (9, 9, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG") + bytes(size)
    for form, uri in data_uris(data).items():
        np.testing.assert_array_equal(load_image(uri), pixels, err_msg=form)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64,", "empty payload"),
        ("data:,", "empty payload"),
        ("data:image/png;base64,====", "empty payload"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,AAAAA", "not base64"),
        ("data:image/png;base64,secret!!", "not base64"),
        ("data:image/png;base64,sécret", "not ASCII"),
        ("data:image/png;base64,c2VjcmV0", "supported format"),
        ("data:image/png;base64," + "A" * 5000, "limit of 1000 bytes"),
        ("data:image/png;base64," + "A" * 1600, "limit of 1000 bytes"),
    ],
)
def test_broken_data_uris_are_refused_without_repeating_them(uri, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(uri, limits=Limits(max_bytes=1000))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "https://example.org/x.png", "file:///etc/hostname"])
def test_urls_are_never_fetched(url):
    with pytest.raises(ImageError, match="not fetched"):
        load_image(url)


def test_files_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    cases = {
        str(tmp_path / "missing.png"): "missing.png.*No such file",
        str(tmp_path): "directory",
        "nul\0.png": "null",
        "x" * 5000: "too long",
        "": "No such file",
    }
    for path, reason in cases.items():
        with pytest.raises(ImageError, match=rf"^image: cannot read [^\n]*{reason}[^\n]*$") as caught:
            load_image(path)
        assert len(str(caught.value)) < 250

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageError, match="Permission denied"):
        load_image("secret.png")


def test_unusable_file_objects_say_why():
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageError, match="closed file"):
        load_image(closed)
    with pytest.raises(ImageError, match="binary mode"):
        load_image(io.StringIO("text"))


@pytest.mark.parametrize("kind", ["buffered", "memory"])
def test_a_file_object_at_its_end_says_where_it_stands(tmp_path, kind):
    """Whoever has just written or checked a file hands it over like this; an empty file is another mistake."""
    data = encoded(Image.fromarray(gradient()), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with path.open("rb") if kind == "buffered" else io.BytesIO(data) as file:
        file.seek(0, os.SEEK_END)
        with pytest.raises(ImageError, match=rf"stands at its end, behind {len(data)} bytes: seek\(0\)"):
            load_image(file)
    with pytest.raises(ImageError, match="empty, 0 bytes"):
        load_image(io.BytesIO())


def test_a_buffer_in_pieces_is_the_same_picture():
    data = encoded(Image.fromarray(gradient()), "PNG")
    pieces = memoryview(b"".join(bytes([byte, 0]) for byte in data))[::2]
    np.testing.assert_array_equal(load_image(pieces), gradient())
    assert head_of(pieces, 100) == data[:100]


@settings(max_examples=100)
@given(
    size=st.integers(0, 40),
    step=st.sampled_from([-3, -2, -1, 1, 2, 3]),
    kind=st.sampled_from(["u1", "<u2", "<f8"]),
    head=st.integers(0, 400),
)
def test_law_the_head_of_a_buffer_is_the_beginning_of_its_bytes(size, step, kind, head):
    view = memoryview(np.arange(size).astype(kind))[::step]
    assert head_of(view, head) == bytes(view)[:head]


def test_one_pil_image_in_several_threads():
    """Pillow decodes it when it is first used, and not twice at once."""
    data = encoded(Image.effect_noise((400, 300), 80).convert("RGB"), "PNG")
    expected = load_image(data)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            image = Image.open(io.BytesIO(data))
            for pixels in pool.map(load_image, [image] * 4):
                np.testing.assert_array_equal(pixels, expected)
