"""What a request may make the server read: itself, and what was allowed by whoever started the server."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siglance.engine.errors import InputError
from siglance.engine.limits import Limits
from siglance.engine.server.access import Access
from siglance.engine.server.failures import Failure
from siglance.engine.server.files import FileReader
from siglance.engine.server.hosts import HostReader
from siglance.engine.server.settings import Settings

LIMIT = 1000
CERTIFICATE = Path(__file__).parent / "good_example.pem"


def access(**settings: object) -> Access:
    return Access(Settings(limits=Limits(max_bytes=LIMIT), **settings))  # pyright: ignore[reportArgumentType]


def refused(take, *arguments: object) -> Failure:
    with pytest.raises(Failure) as caught:
        take(*arguments)
    assert caught.value.field == "part"
    return caught.value


def read(reader: Access, uri: str) -> bytes:
    return asyncio.run(reader.read(uri, "part"))


# --- data


@given(st.binary(min_size=1, max_size=400), st.booleans(), st.booleans(), st.sampled_from(["", "\n", "\r\n", " "]))
def test_base64_of_either_alphabet_with_and_without_padding_and_lines(data, url_safe, padded, end):
    """Case 52."""
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    lines = [text[start : start + 76] for start in range(0, len(text), 76)]
    assert access().base64(end.join([*lines, ""]), "part") == data


@pytest.mark.parametrize("text", ["A", "A===", "AB=C", "AAAA=", "AAA===", "A \n", "AAA*", "AAAÄ", "AAAA====", "=AAA"])
def test_what_is_no_base64(text):
    assert refused(access().base64, text, "part").message == "part is not base64"


def test_large_files_are_decoded_in_pieces_and_are_the_same():
    data = os.urandom(3 * 2**18 + 5)
    reader = Access(Settings())
    assert reader.base64(base64.b64encode(data).decode(), "part") == data


def test_empty_and_too_large_data():
    assert refused(access().base64, "", "part").message == "part is empty"
    assert access().base64(base64.b64encode(bytes(LIMIT)).decode(), "part") == bytes(LIMIT)
    for size in (LIMIT + 1, 10 * LIMIT):
        text = base64.b64encode(bytes(size)).decode()
        assert refused(access().base64, text, "part").message == "part is over the limit of 1000 bytes"


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64,aGk=",
        "DATA:image/png;BASE64,aGk",
        "data:;base64,aGk=",
        "data:audio/pcm;rate=16000;base64,aGk=",
        "data:image/png;base64, aG\nk=\r\n",
        "data:image/png;base64,aGk%3D",
        "data:image/png;base64,aGk%3d%0D%0A",
    ],
)
def test_data_uris(uri):
    assert access().data_uri(uri, "part") == b"hi"
    assert read(access(), uri) == b"hi"
    assert read(access(), f" {uri}") == b"hi"


@pytest.mark.parametrize(
    "uri", ["", "data:", "data:image/png,hi", "data:image/png;base64", "image/png;base64,aGk=", "data:" + "x" * 9000]
)
def test_what_is_no_data_uri(uri):
    failure = refused(access().data_uri, uri, "part")
    assert (failure.status, failure.message[:13]) == (400, "part is not a")


# --- by default


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd"])
def test_no_file_is_read_by_default(uri):
    failure = refused(read, access(), uri)
    assert (failure.status, failure.kind) == (403, "forbidden")
    assert "--allow-dir" in failure.message


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/x", "https://example.org/cat.png", "HTTP://example.org"])
def test_no_host_is_asked_by_default(uri):
    failure = refused(read, access(), uri)
    assert (failure.status, failure.kind) == (403, "forbidden")
    assert "--allow-host" in failure.message


@pytest.mark.parametrize(
    "uri", ["gs://bucket/cat.png", "ftp://example.org/x", "cat.png", "/etc/passwd", "", "jar:file:///x", "gopher://x"]
)
def test_other_uris_are_not_read(uri):
    failure = refused(read, access(allow_dirs=(Path("/"),)), uri)
    assert failure.status == 400
    assert "are not read, only data:, file:, http:, https:" in failure.message


@pytest.mark.parametrize(
    "uri", ["http://[::1", "http://a b/", "file:///\n", "http://x:99999/", "http://x:y/", "x" * 9000]
)
def test_what_is_no_uri(uri):
    assert refused(read, access(allow_hosts=("x",)), uri).message == "part is not a URI"


# --- files


@pytest.fixture
def folder(tmp_path) -> Path:
    """An allowed folder beside one that is not."""
    allowed = tmp_path / "allowed"
    (allowed / "inner").mkdir(parents=True)
    (allowed / "cat.png").write_bytes(b"cat")
    (allowed / "inner" / "ä b%.png").write_bytes(b"inner")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"secret")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "key").write_bytes(b"secret")
    return allowed


def test_files_in_an_allowed_folder(folder):
    reader = access(allow_dirs=(folder,))
    assert read(reader, (folder / "cat.png").as_uri()) == b"cat"
    assert read(reader, (folder / "inner" / "ä b%.png").as_uri()) == b"inner"
    assert read(reader, f"file://localhost{folder}/inner/../cat.png") == b"cat"
    assert read(reader, f"file:{folder}/cat.png") == b"cat"


def test_several_folders_and_a_link_to_one(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    reader = access(allow_dirs=(tmp_path / "secret", link))
    assert read(reader, (folder / "cat.png").as_uri()) == b"cat"
    assert read(reader, (link / "cat.png").as_uri()) == b"cat"
    assert read(reader, (tmp_path / "secret" / "key").as_uri()) == b"secret"


def test_links_are_followed_inside_only(folder, tmp_path):
    (folder / "to-cat").symlink_to("cat.png")
    (folder / "to-secret").symlink_to(tmp_path / "secret" / "key")
    (folder / "to-folder").symlink_to(tmp_path / "secret")
    (folder / "around").symlink_to("around")
    reader = access(allow_dirs=(folder,))
    assert read(reader, (folder / "to-cat").as_uri()) == b"cat"
    for path in ("to-secret", "to-folder/key", "around"):
        assert refused(read, reader, (folder / path).as_uri()).status == 403


@pytest.mark.parametrize(
    "path",
    [
        "{allowed}/../secret/key",
        "{allowed}/%2e%2e/secret/key",
        "{allowed}/..%2Fsecret%2Fkey",
        "{allowed}-not/key",
        "{allowed}",
        "{allowed}/",
        "{allowed}/inner",
        "{allowed}/missing",
        "{allowed}/cat.png/",
        "{allowed}/cat.png%00",
        "{allowed}/%ff",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "relative",
        "",
    ],
)
def test_everything_else_is_refused_in_the_same_words(folder, path):
    reader = access(allow_dirs=(folder,))
    if path.endswith("cat.png/"):
        assert read(reader, "file://" + path.format(allowed=folder)) == b"cat"  # a path that means the same
        return
    failure = refused(read, reader, f"file:{path.format(allowed=folder)}")
    assert failure.status == 403
    assert failure.message == "part: no such file in the folders of --allow-dir"


@pytest.mark.parametrize("uri", ["file://other{path}", "file://{path}?x", "file://{path}#x"])
def test_file_uris_of_other_machines(folder, uri):
    assert refused(read, access(allow_dirs=(folder,)), uri.format(path=folder / "cat.png")).status == 400


def test_only_regular_files_are_read(folder):
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(folder)  # names of sockets are short
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
        for name in ("pipe", "socket"):
            assert refused(read, access(allow_dirs=(folder,)), (folder / name).as_uri()).status == 403


def test_size_of_files(folder):
    (folder / "large").write_bytes(bytes(LIMIT + 1))
    (folder / "full").write_bytes(bytes(LIMIT))
    reader = access(allow_dirs=(folder,))
    assert refused(read, reader, (folder / "large").as_uri()).message == "part is over the limit of 1000 bytes"
    assert len(read(reader, (folder / "full").as_uri())) == LIMIT


@pytest.mark.parametrize(("name", "target"), [("inner", "secret"), ("cat.png", "secret/key")])
def test_what_becomes_a_link_after_it_was_looked_at(folder, tmp_path, monkeypatch, name, target):
    """The path is checked and then opened step by step, without following links: what it is by then counts."""
    reader = FileReader((folder,), LIMIT)
    real = os.path.realpath

    def swapped(path, **options):
        found = real(path, **options)
        if not (folder / name).is_symlink():
            (folder / name).rename(tmp_path / "before")
            (folder / name).symlink_to(tmp_path / target)
        return found

    monkeypatch.setattr(os.path, "realpath", swapped)
    uri = urllib.parse.urlsplit(f"file://{folder}/{name}{'/key' if name == 'inner' else ''}")
    assert refused(reader.read, uri, "part").status == 403


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        access(allow_dirs=(tmp_path / "missing",))


# --- hosts


class Site(BaseHTTPRequestHandler):
    """Answers by path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host = self.headers["Host"]
        seen: list[str] = self.server.seen  # pyright: ignore[reportAttributeAccessIssue]
        seen.append(f"{host}{self.path}")
        step = self.path.partition("?")[0]
        if step.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", urllib.parse.unquote(step.removeprefix("/to/")))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif step == "/endless":
            self.send_response(200)
            self.end_headers()
            while True:
                try:
                    self.wfile.write(bytes(500))
                except OSError:
                    return
        elif step in ("/slow", "/slow-head"):
            self.send_response(200)
            if step == "/slow":
                self.end_headers()
            else:
                self.flush_headers()
            stop: threading.Event = self.server.stop  # pyright: ignore[reportAttributeAccessIssue]
            while not stop.wait(0.05):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
        elif step == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only")
            self.close_connection = True
        elif step == "/junk":
            self.wfile.write(b"\0\1\2 not HTTP\r\n\r\n")
            self.close_connection = True
        elif step == "/chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        else:
            body = bytes(LIMIT + 1) if step == "/large" else f"file of {host}{self.path}".encode()
            self.send_response(404 if step == "/missing" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Web:
    """Names with addresses, all of which are one server on this machine."""

    def __init__(self, port: int, seen: list[str]):
        self.port, self.seen = port, seen
        self.names = {"good.example": ["93.184.216.34"], "other.example": ["93.184.216.35"]}
        self.asked: list[str] = []
        self.connected: list[tuple[str, int]] = []

    def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append((address, port))
        if address.endswith(".99"):
            raise ConnectionRefusedError
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def reader(self, *hosts: str, seconds: float = 20.0) -> HostReader:
        return HostReader(hosts, LIMIT, resolve=self.resolve, connect=self.connect, seconds=seconds)


def fetch(reader: HostReader, uri: str) -> bytes:
    return reader.read(urllib.parse.urlsplit(uri), "part")


@contextmanager
def site(certificate: Path | None = None) -> Iterator[tuple[int, list[str]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # The handshake belongs to the thread of each request.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.handle_error = lambda *_: None  # clients that do not trust it  # pyright: ignore
    server.seen, server.stop = [], threading.Event()  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], server.seen  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        server.stop.set()  # pyright: ignore[reportAttributeAccessIssue]
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    with site() as (port, seen):
        yield Web(port, seen)


def test_a_file_of_an_allowed_host(web):
    reader = web.reader("good.example")
    assert fetch(reader, "http://good.example/a%20b/cat.png?size=1&x=%2F") == (
        b"file of good.example/a%20b/cat.png?size=1&x=%2F"
    )
    assert fetch(reader, "HTTP://GOOD.example.:80") == b"file of good.example/"
    assert fetch(reader, "http://good.example/chunks") == b"abcde"
    assert web.connected == [("93.184.216.34", 80)] * 3


def test_hosts_are_matched_whole(web):
    reader = web.reader("good.example", "93.184.216.34")
    for host in (
        "other.example",
        "sub.good.example",
        "good.example.evil",
        "evilgood.example",
        "example",
        "good.example:8080",
    ):
        failure = refused(fetch, reader, f"http://{host}/")
        assert (failure.status, failure.kind) == (403, "forbidden")
        assert f"--allow-host {host} " in failure.message
    assert not web.asked
    assert not web.connected


def test_ports_are_allowed_one_by_one(web):
    reader = web.reader("good.example:8080")
    assert fetch(reader, "http://good.example:8080/x") == b"file of good.example:8080/x"
    assert refused(fetch, reader, "http://good.example/x").status == 403
    assert refused(fetch, reader, "https://good.example/x").status == 403
    assert web.connected == [("93.184.216.34", 8080)]


@pytest.mark.parametrize("uri", ["http:///x", "http://name:word@good.example/", "http://good.example@other.example/"])
def test_uris_without_a_host_or_with_a_password(web, uri):
    assert refused(fetch, web.reader("good.example"), uri).status == 400
    assert not web.connected


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2001:0:5ef5:79fd:0:0:80ff:fffe"),
    ],
)
def test_names_with_addresses_that_are_not_public(web, address):
    web.names["good.example"] = ["93.184.216.34", address]  # one is enough
    failure = refused(fetch, web.reader("good.example"), "http://good.example/")
    assert (failure.status, failure.message[:41]) == (403, "part: good.example is not a public address"[:41])
    assert not web.connected


@pytest.mark.parametrize("address", ["2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_public_addresses_of_the_new_kind(web, address):
    web.names["good.example"] = [address]
    assert fetch(web.reader("good.example"), "http://good.example/") == b"file of good.example/"
    assert web.connected == [(address, 80)]


def test_an_address_that_was_allowed_as_one(web):
    port = web.port
    assert fetch(HostReader((f"127.0.0.1:{port}",), LIMIT), f"http://127.0.0.1:{port}/x") == (
        f"file of 127.0.0.1:{port}/x".encode()
    )
    assert access(allow_hosts=(f"127.0.0.1:{port}",))
    web.names["::1"] = ["::1"]
    assert fetch(web.reader("[::1]"), "http://[0:0::1]/x") == b"file of [::1]/x"
    assert fetch(web.reader("::1"), "http://[::1]/x") == b"file of [::1]/x"


def test_an_allowed_address_does_not_allow_names_of_it(web):
    web.names["good.example"] = ["127.0.0.1"]
    assert refused(fetch, web.reader("good.example", "127.0.0.1"), "http://good.example/").status == 403


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_other_spellings_of_an_address_are_names(web, host):
    web.names[host] = ["127.0.0.1"]
    assert refused(fetch, web.reader(host), f"http://{host}/").status == 403
    assert not web.connected


def test_a_name_that_changes_its_address_meanwhile(web):
    """The address that was looked at is connected to, and the name is asked for once."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    web.resolve = lambda host, port: answers.pop(0)
    assert fetch(web.reader("good.example"), "http://good.example/") == b"file of good.example/"
    assert web.connected == [("93.184.216.34", 80)]
    assert len(answers) == 1


def test_the_next_address_is_tried(web):
    web.names["good.example"] = ["93.184.216.99", "93.184.216.34"]
    assert fetch(web.reader("good.example"), "http://good.example/") == b"file of good.example/"


def test_redirects_are_looked_at_like_the_first_uri(web):
    reader = web.reader("good.example", "other.example", "inner.example")
    assert fetch(reader, "http://good.example/to/%2Fcat.png") == b"file of good.example/cat.png"
    assert fetch(reader, "http://good.example/to/http:%2F%2Fother.example%2Fx") == b"file of other.example/x"
    web.names["inner.example"] = ["10.0.0.1"]
    for target, status in {
        "http://evil.example/": 403,
        "http://127.0.0.1/": 403,
        "http://inner.example/": 403,
        "http://good.example:8080/": 403,
        "file:///etc/passwd": 403,
        "ftp://good.example/": 403,
        "http://name:word@good.example/": 400,
        "http://[::1": 400,
    }.items():
        uri = f"http://good.example/to/{urllib.parse.quote(target, safe='')}"
        assert refused(fetch, reader, uri).status == status, target
    assert "evil.example" not in web.asked


def test_redirects_in_a_circle(web):
    uri = "http://good.example/to/" + urllib.parse.quote("/to/" + "%252F" * 0 + "x", safe="")
    for _ in range(5):
        uri = "http://good.example/to/" + urllib.parse.quote(urllib.parse.urlsplit(uri).path, safe="")
    assert refused(fetch, web.reader("good.example"), uri).message == "part: more than 3 redirects"
    assert len(web.seen) == 4


def test_sizes(web):
    reader = web.reader("good.example")
    for path in ("large", "endless"):
        assert refused(fetch, reader, f"http://good.example/{path}").message == "part is over the limit of 1000 bytes"


@pytest.mark.parametrize("path", ["slow", "slow-head"])
def test_time(web, path):
    failure = refused(fetch, web.reader("good.example", seconds=0.3), f"http://good.example/{path}")
    assert failure.message == "part: good.example takes more than 0.3 seconds"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "good.example answers with status 404"),
        ("short", "good.example has sent a part of it only"),
        ("junk", "cannot be read from good.example (BadStatusLine)"),
    ],
)
def test_answers_that_are_none(web, path, message):
    failure = refused(fetch, web.reader("good.example"), f"http://good.example/{path}")
    assert (failure.status, failure.message) == (400, f"part: {message}")


def test_hosts_that_do_not_answer(web):
    web.names["good.example"] = ["93.184.216.99"]
    reader = web.reader("good.example", "nowhere.example")
    assert refused(fetch, reader, "http://good.example/").message.endswith("(ConnectionRefusedError)")
    assert refused(fetch, reader, "http://nowhere.example/").message.endswith("(OSError)")
    assert refused(fetch, HostReader(("x" * 70,), LIMIT), f"http://{'x' * 70}/").status == 400  # no name at all


def test_certificates_are_those_of_the_name(monkeypatch):
    """Of a name and its own authority: tests/server/good_example.pem."""
    with site(CERTIFICATE) as (port, seen):
        web = Web(port, seen)
        web.names["other.example"] = web.names["good.example"]
        assert (
            "(SSLCertVerificationError)" in refused(fetch, web.reader("good.example"), "https://good.example/x").message
        )
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert fetch(web.reader("good.example"), "https://good.example/x") == b"file of good.example/x"
        assert (
            "(SSLCertVerificationError)"
            in refused(fetch, web.reader("other.example"), "https://other.example/x").message
        )
        assert seen == ["good.example/x"]


def test_https_is_never_read_in_the_clear(web):
    assert "(SSLError)" in refused(fetch, web.reader("good.example"), "https://good.example/").message
    assert web.connected == [("93.184.216.34", 443)]
    assert not web.seen


def test_proxies_of_the_environment_are_not_asked(web, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    assert fetch(web.reader("good.example"), "http://good.example/x") == b"file of good.example/x"


@pytest.mark.parametrize(
    "host", ["", "http://good.example", "good.example/x", "a@b", "good.example:0x", "x:99999", "[::1", ":80"]
)
def test_hosts_that_are_none(host):
    with pytest.raises(InputError, match="--allow-host"):
        access(allow_hosts=(host,))
