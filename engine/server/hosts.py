"""Files of other machines that a request may name: those on hosts that were allowed.

The address that was looked at is the one that is connected to, so a name that changes its address meanwhile gains
nothing. Proxies in the environment are not asked.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence

from ..errors import InputError
from .failures import Failure

__all__ = ["HostReader"]

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_SECONDS = 20.0  # for all of it
_STEP = 5.0  # for one address to answer
_KEPT = "/%:@!$&'()*+,;=~-._?"  # in paths and queries, which are encoded already

Resolve = Callable[[str, int], Sequence[str]]
Connect = Callable[[str, int, float], socket.socket]


class HostReader:
    """Reads "http:" and "https:" URIs of hosts that were allowed.

    NAME allows the ports 80 and 443, NAME:PORT that port. Addresses that are not public (this machine, the local
    network, those of cloud services' metadata) are connected to only if they were allowed as addresses.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        most: int,
        *,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
        seconds: float = _SECONDS,
    ):
        """`most` bytes of a file within `seconds`; `resolve` and `connect` stand in for those of the system.

        Raises InputError for a host that is none.
        """
        self._allowed = {allowed for host in hosts for allowed in _allowed(host)}
        self._most, self._seconds = most, seconds
        self._resolve, self._connect = resolve or _addresses, connect or _connection

    def read(self, uri: urllib.parse.SplitResult, place: str) -> bytes:
        """The content of a file. Raises Failure."""
        deadline = time.monotonic() + self._seconds
        for _ in range(_MOST_REDIRECTS + 1):
            target = _Target.of(uri, place)
            if (target.host, target.port) not in self._allowed:
                shown = target.host if target.port == _PORTS[target.scheme] else f"{target.host}:{target.port}"
                raise Failure(
                    403,
                    f"{place}: nothing is fetched from {shown} (siglance serve --allow-host {shown} allows it)",
                    kind="forbidden",
                    field=place,
                )
            data, location = self._fetch(target, place, deadline)
            if location is None:
                return data
            try:
                uri = urllib.parse.urlsplit(urllib.parse.urljoin(uri.geturl(), location))
                _ = uri.port
            except ValueError:
                raise Failure(400, f"{place}: {target.host} redirects to no URI", field=place) from None
            if uri.scheme not in _PORTS:
                raise Failure(
                    403, f"{place}: {target.host} redirects to what is not http or https", kind="forbidden", field=place
                )
        raise Failure(400, f"{place}: more than {_MOST_REDIRECTS} redirects", field=place)

    def _fetch(self, target: _Target, place: str, deadline: float) -> tuple[bytes, str | None]:
        """The answer of one host: the content, or where it says that the content is."""
        try:
            with _Connection(target, self._open(target, place, deadline), deadline) as connection:
                connection.handshake()
                connection.request(
                    "GET", target.path, headers={"Accept-Encoding": "identity", "User-Agent": "siglance"}
                )
                with connection.getresponse() as answer:
                    if answer.status in _REDIRECTS and answer.headers["Location"]:
                        return b"", answer.headers["Location"]
                    if answer.status != 200:
                        raise Failure(400, f"{place}: {target.host} answers with status {answer.status}", field=place)
                    content = answer.read(self._most + 1)
                    if len(content) > self._most:
                        raise Failure(400, f"{place} is over the limit of {self._most} bytes", field=place)
                    complete = not answer.length
            self._left(target, place, deadline)
        except (OSError, http.client.HTTPException) as error:
            self._left(target, place, deadline)
            # Of the error only its kind is told: its text may say what else is in the network.
            reason = type(error).__name__
            raise Failure(400, f"{place}: cannot be read from {target.host} ({reason})", field=place) from None
        if not complete:
            raise Failure(400, f"{place}: {target.host} has sent a part of it only", field=place)
        return content, None

    def _open(self, target: _Target, place: str, deadline: float) -> socket.socket:
        """A connection to the first address that answers, if all of them may be connected to."""
        addresses = self._resolve(target.host, target.port)
        for address in addresses:
            if not _is_public(address) and address != target.host:
                raise Failure(
                    403,
                    f"{place}: {target.host} is not a public address (siglance serve --allow-host ADDRESS allows one)",
                    kind="forbidden",
                    field=place,
                )
        error: OSError = OSError("no address")
        for address in addresses:
            try:
                return self._connect(address, target.port, min(_STEP, self._left(target, place, deadline)))
            except OSError as failed:
                error = failed
        raise error

    def _left(self, target: _Target, place: str, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Failure(400, f"{place}: {target.host} takes more than {self._seconds:g} seconds", field=place)
        return left


class _Target:
    """What a URI says, taken apart: `host` in lower case or as a plain address."""

    def __init__(self, scheme: str, host: str, port: int, path: str):
        self.scheme, self.host, self.port, self.path = scheme, host, port, path

    @classmethod
    def of(cls, uri: urllib.parse.SplitResult, place: str) -> _Target:
        """Raises Failure for a URI that has no host, or a name and a password."""
        if not uri.hostname or "@" in uri.netloc:
            raise Failure(400, f"{place} is not {uri.scheme}://HOST/PATH", field=place)
        path = urllib.parse.quote(uri.path or "/", safe=_KEPT)
        query = f"?{urllib.parse.quote(uri.query, safe=_KEPT)}" if uri.query else ""
        return cls(uri.scheme, _plain(uri.hostname), uri.port or _PORTS[uri.scheme], path + query)


class _Connection(http.client.HTTPConnection):
    """A connection through a socket that is there already, which is cut off at the deadline."""

    def __init__(self, target: _Target, opened: socket.socket, deadline: float):
        super().__init__(target.host, target.port)
        self.default_port = _PORTS[target.scheme]  # which the Host header leaves out
        # `HTTPConnection` forgets its socket when the answer is the last one.
        self._open = self.sock = opened
        if target.scheme == "https":
            # The certificate must be that of the name, whatever address it has.
            context = ssl.create_default_context()
            self._open = self.sock = context.wrap_socket(
                opened, server_hostname=target.host, do_handshake_on_connect=False
            )
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._cut)
        self._timer.daemon = True

    def handshake(self) -> None:
        if isinstance(self._open, ssl.SSLSocket):
            self._open.do_handshake()

    def __enter__(self) -> _Connection:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        self.close()
        self._open.close()

    def _cut(self) -> None:
        """Whoever waits for the other side is told that it has ended."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._open, socket.SHUT_RDWR)


def _allowed(host: str) -> list[tuple[str, int]]:
    """(host, port) of a HOST, HOST:PORT, [ADDRESS] or [ADDRESS]:PORT."""
    bare = host.count(":") > 1 and not host.startswith("[")
    try:
        parts = urllib.parse.urlsplit(f"//[{host}]" if bare else f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        parts, name, port = None, None, None
    if parts is None or not name or parts.path or parts.query or parts.fragment or "@" in host:
        raise InputError(f"--allow-host {host}: expected NAME or NAME:PORT, such as example.org")
    return [(_plain(name), port)] if port else [(_plain(name), each) for each in _PORTS.values()]


def _plain(host: str) -> str:
    """A host in its plainest spelling."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")


def _is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, also where it stands for an address of the older kind."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


def _addresses(host: str, port: int) -> list[str]:
    """The addresses of a name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a name that cannot be one
        raise OSError(str(error)) from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _connection(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=seconds)
