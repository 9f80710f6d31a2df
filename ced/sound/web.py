"""Read http(s) addresses safely: limits on hosts, redirects, playlists and time.

An address, its redirects and its playlists may be hostile: they may point to services of this machine or of the local
network (SSRF), loop forever, or use a name that resolves to another host between check and use (DNS rebinding).
"""

import base64
import io
import ipaddress
import os
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Literal
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from ced.errors import AudioError

PATIENCE = 30.0  # seconds for a server to answer, and for each read
REDIRECTS = 5
MOST_PLAYLISTS = 32  # that the playlist of one sound may reference
MOST_RELOADS = 100  # of the playlists of one sound, unless it is live
_MOST_REQUESTS = 1000  # for one file that is read with many seeks
_MOST_FAILURES = 10  # parts of a playlist in a row that cannot be read
_RELOAD_SECONDS = 1.0  # the least time between two readings of a live playlist
_LEAST_BYTES = 256  # that must arrive within `PATIENCE`; the lowest bit rates give a hundred times as many
_LONGEST_PLAYLIST = 4 << 20  # bytes; a day in parts of 6 s has 14,400 lines
_SKIPPED = 1 << 18  # bytes: seeking forward up to this far reads and drops; farther, it makes a new request
_UNSAFE = "%/:=&?~#+!$,;'@()*[]"  # characters of an address that are not quoted, so that only non-ASCII ones are
_REDIRECTED = (301, 302, 303, 307, 308)
_PLAYLIST = b"#EXTM3U"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Special-purpose networks (IANA's registries) that `is_global` calls public, or did in versions of Python still in use;
# the last one is a cloud provider's own services.
_SPECIAL = tuple(
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "168.63.129.16/32")
)
_UNICAST = ipaddress.IPv6Network("2000::/3")  # contains all public IPv6 addresses
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class TrustedAddress(str):
    """An http(s) address whose redirects and playlists may also point to private hosts."""

    __slots__ = ()


def without_password(address: str) -> str:
    """Return an address with its password masked by ***, for messages and results."""
    try:
        parts = urlsplit(address)
    except ValueError:  # unclosed brackets, which opening the address reports
        return address
    if parts.password is None:
        return address
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username}:***@{host}").geturl()


def is_public(address: Address) -> bool:
    """Return whether an IP address, or the one that it embeds, is on the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None:
            return is_public(address.sixtofour)
        if address not in _UNICAST:
            return False
    if any(address in network for network in _SPECIAL if network.version == address.version):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class Web:
    """A client for the address of one sound, its redirects, and the playlists and parts that it references.

    Args:
        address: http or https.
        private: which private hosts (this machine, local networks) may be requested: "named", only the host of the
            address, on its port; "any"; or "none". The user's proxy is used except with "none".
        live: playlists may be reloaded without limit.

    Attributes:
        address, live: as given.
        name: the address without its password, for messages.
        fault: the error of a refused request that the sound depends on.
        broken: the error that ended the file at the address itself early.
        missing: parts of playlists that could not be read.

    Raises:
        AudioError: it is not an http(s) address.
    """

    def __init__(self, address: str, *, private: Literal["named", "any", "none"] = "named", live: bool = False) -> None:
        self.address, self.name, self.missing = str(address), without_password(str(address)), 0
        self.fault: AudioError | None = None
        self.broken: AudioError | None = None
        self._private, self.live = private, live
        self._named = _origin(self._split(self.address))
        self._playlists: dict[str, float] = {}  # when each was read last
        self._reloads = self._failures = 0

    def open(self) -> "WebFile":
        """Open the file at the address.

        Raises:
            AudioError: a host is forbidden, does not answer, or answers with an error.
        """
        return WebFile(self, self.address)

    def open_stream(self) -> "Stream":
        """Open the file at the address, for FFmpeg.

        Raises:
            AudioError: as for `open`.
        """
        file = self.open()
        if file.is_playlist:
            self._count_playlist(self.address)
        return Stream(self, file)

    def open_part(self, url: str, flags: int, options: Mapping[str, str]) -> "Stream":
        """Open a URL that a playlist references, for FFmpeg: the `io_open` of PyAV, which gives byte ranges as options.

        A part that cannot be read is empty, and counted: PyAV would print errors raised here, and FFmpeg continues
        without the part in any case.
        """
        file = None
        if self.fault is None:
            try:
                first, end = int(options.get("offset", 0)), int(options.get("end_offset", 0)) or None
                file = WebFile(self, url, max(first, 0), end)
                if file.is_playlist:
                    self._count_playlist(url)
            except AudioError as error:
                if file is not None:
                    file.close()
                    file = None
                self._note(error)
            else:
                self._failures = 0
        return Stream(self, file, is_part=True)

    def _note(self, error: AudioError) -> None:
        """Count a part of a playlist that cannot be read."""
        self.missing += 1
        self._failures += 1
        if isinstance(error, _RefusedError) or self._failures >= _MOST_FAILURES:
            self.fault = error

    def note(self, error: AudioError, is_part: bool) -> None:
        """Note an error while a file is read."""
        if is_part or isinstance(error, _RefusedError):
            self._note(error)
        else:
            self.broken = error

    def _count_playlist(self, url: str) -> None:
        if url in self._playlists:
            self._reloads += 1
            if not self.live and self._reloads > MOST_RELOADS:
                raise self.refused(url, f"an endless playlist, which was read {MOST_RELOADS} times")
            if self.live:
                time.sleep(max(0.0, self._playlists[url] + _RELOAD_SECONDS - time.monotonic()))
        elif len(self._playlists) > MOST_PLAYLISTS:
            raise self.refused(url, f"one of more than {MOST_PLAYLISTS} playlists")
        self._playlists[url] = time.monotonic()

    def refused(self, url: str, why: str) -> AudioError:
        """Return the error for a URL that is forbidden."""
        to = "" if url == self.address else f"it points to {without_password(url)[:200]}: "
        return _RefusedError(f"cannot be read: {to}{why}", self.name)

    def failed(self, url: str, why: str) -> AudioError:
        """Return the error for a URL that cannot be read."""
        return AudioError(
            f"cannot be read: {'' if url == self.address else f'{without_password(url)[:200]}: '}{why}", self.name
        )

    def broke_off(self, url: str, why: str) -> AudioError:
        """Return the error for a URL whose reading failed later."""
        return AudioError(f"{'' if url == self.address else f'{without_password(url)[:200]}: '}{why}", self.name)

    def request(self, url: str, first: int) -> tuple[str, HTTPResponse]:
        """Request a URL from byte `first` on, and follow redirects.

        Returns:
            the last URL, and its response, with status 200 or 206.

        Raises:
            AudioError: as for `open`.
        """
        here = url
        for _ in range(REDIRECTS + 1):
            parts = self._split(here)
            if parts.scheme == "http" and "https" in (urlsplit(url).scheme, urlsplit(self.address).scheme):
                raise self.refused(here, "from https to http, which is not encrypted")
            connection, target = self._connect(parts, here)
            try:
                response = _ask(connection, parts, target, first)
                if response.status in _REDIRECTED and (place := response.getheader("Location")):
                    response.close()
                    here = urljoin(here, place)
                    continue
            except (OSError, HTTPException, ValueError) as error:
                connection.close()
                raise self.failed(here, reason_of(error)) from error
            if response.status not in (200, 206):
                response.close()
                raise self.failed(here, f"the server answers {response.status} {response.reason}")
            return here, response
        raise self.refused(here, f"after more than {REDIRECTS} redirects")

    def _split(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # unclosed brackets, or a port that is not a number
            known = False
        if not known:
            raise self.refused(url, "an address starts with http:// or https:// and a host")
        return parts

    def _connect(self, parts: SplitResult, url: str) -> tuple[HTTPConnection, str]:
        """Connect to one of a host's checked IP addresses, or to the user's proxy.

        Returns:
            the connection, and the target of the request.
        """
        host, port = _origin(parts)
        path = quote(parts.path or "/", safe=_UNSAFE) + (f"?{quote(parts.query, safe=_UNSAFE)}" if parts.query else "")
        if self._private != "none" and (proxy := _proxy(parts.scheme, host)) is not None:
            self._check_host(parts, url, [])  # the proxy resolves the name
            return self._connect_to_proxy(proxy, parts, url, path)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise self.failed(url, f"the host {host[:100]} cannot be found") from error
        self._check_host(parts, url, [str(place[0]).partition("%")[0] for *_, place in found])
        fault: OSError | None = None
        for family, kind, protocol, _, place in found:
            try:
                return _connection(socket.socket(family, kind, protocol), place, parts), path
            except OSError as error:
                fault = error
        raise self.failed(url, reason_of(fault))

    def _check_host(self, parts: SplitResult, url: str, places: list[str]) -> None:
        """Refuse a forbidden host; `places` are the IP addresses of its name, where they are known."""
        host, port = _origin(parts)
        if self._private == "any" or (self._private == "named" and (host, port) == self._named):
            return
        if port < 1024 and port not in (80, 443):
            raise self.refused(url, f"port {port} is not a web server's")
        with suppress(ValueError):
            places = [*places, str(ipaddress.ip_address(host))]
        if host == "localhost" or not all(is_public(ipaddress.ip_address(place)) for place in places):
            raise self.refused(url, f"{host[:100]} is not a public address")

    def _connect_to_proxy(
        self, proxy: SplitResult, parts: SplitResult, url: str, path: str
    ) -> tuple[HTTPConnection, str]:
        host, port = _origin(parts)
        credentials = _credentials(proxy, "Proxy-Authorization")
        try:
            connection = HTTPConnection(proxy.hostname or "", proxy.port or 80, timeout=PATIENCE)
            if parts.scheme == "https":
                connection.set_tunnel(host, port, credentials)
            connection.connect()
            if parts.scheme == "https":
                connection.sock = _tls().wrap_socket(connection.sock, server_hostname=host)
                return connection, path
        except (OSError, HTTPException, ValueError) as error:
            raise self.failed(url, f"the proxy {proxy.hostname}: {reason_of(error)}") from error
        return connection, f"http://{parts.netloc.rpartition('@')[2]}{path}"


class _RefusedError(AudioError):
    """A request that is forbidden."""


class WebFile(io.RawIOBase):
    """A file on a web server, read as it arrives; seekable where the server allows it.

    Attributes:
        name: its URL, after redirects.
        is_playlist: whether it starts like one.

    Raises:
        AudioError: as for `Web.open`; also from reading.
    """

    def __init__(self, web: Web, url: str, first: int = 0, end: int | None = None) -> None:
        self._web, self._url, self._place, self._end = web, url, first, end
        self._requests = 0
        self._size: int | None = None
        self._response: HTTPResponse | None = None
        self._since, self._arrived = time.monotonic(), 0
        self._held = b""  # received, not read yet
        self.name = url
        self._ask_from(first)
        while len(self._held) < len(_PLAYLIST) and (data := self._receive(len(_PLAYLIST))):
            self._held += data
        self.is_playlist = self._held.startswith(_PLAYLIST)

    def _ask_from(self, first: int) -> None:
        self._drop()
        self._requests += 1
        if self._requests > _MOST_REQUESTS:
            raise self._web.refused(self._url, f"it takes more than {_MOST_REQUESTS} requests to read")
        self.name, self._response = self._web.request(self._url, first)
        begins, size = _range(self._response)
        if begins != first:
            self._drop()
            raise self._web.failed(self._url, f"the server sends it from byte {begins} on, not from {first}")
        if self._requests == 1:
            self._size = size

    def _drop(self) -> None:
        self._held = b""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _receive(self, most: int) -> bytes:
        """Return the next bytes that arrive, at most `most`; none at the end."""
        assert self._response is not None
        try:
            data = self._response.read1(most)
        except TimeoutError as error:
            raise self._web.broke_off(self._url, f"no sound arrived for {PATIENCE:g} s") from error
        except (OSError, HTTPException, ValueError) as error:
            raise self._web.broke_off(self._url, reason_of(error)) from error
        if not data and self._response.length:
            missing = f"the connection broke {self._response.length} bytes before the end"
            raise self._web.broke_off(self._url, missing)
        self._arrived += len(data)
        if time.monotonic() - self._since > PATIENCE:
            if self._arrived < _LEAST_BYTES and data:
                raise self._web.broke_off(self._url, f"only {self._arrived} bytes arrived in {PATIENCE:g} s")
            self._since, self._arrived = time.monotonic(), 0
        return data

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes that arrive, at most `size`, without waiting for all of them."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 16), b""))
        if self._end is not None:
            size = min(size, self._end - self._place)
        if size <= 0 or self._place == self._size:
            return b""
        if self._response is None:
            self._ask_from(self._place)
        data = self._held[:size] or self._receive(size)
        self._held = self._held[len(data) :]
        self._place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, as `read` does."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seekable(self) -> bool:
        """Return whether the server gives the size of the file, and sends ranges of it."""
        return self._size is not None and self._end is None

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._place

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset; it is requested when it is read."""
        if self._size is None or self._end is not None:
            raise io.UnsupportedOperation("the server sends the file only from its start")
        place += {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        place = min(max(place, 0), self._size)
        if self._response is not None and 0 < place - self._place <= _SKIPPED:
            while self._place < place and self.read(place - self._place):
                pass
        elif place != self._place:
            self._drop()
            self._place = place
        return place

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()


class Stream(io.RawIOBase):
    """A `WebFile` for FFmpeg: an error ends it, and is stored in its `Web`.

    Args:
        web: stores errors.
        file: the file; None: an empty one.
        is_part: whether a playlist references it.

    Attributes:
        name: the URL of the file, against which FFmpeg resolves relative addresses in playlists.
        is_playlist: whether it starts like one.
    """

    def __init__(self, web: Web, file: WebFile | None, is_part: bool = False) -> None:
        self._web, self._file, self._is_part = web, file, is_part
        self.name = web.address if file is None else file.name
        self.is_playlist = file is not None and file.is_playlist
        self._room = _LONGEST_PLAYLIST if self.is_playlist else -1
        self._broken = False  # at this offset

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes that arrive, at most `size`; none at the end and after an error."""
        if self._file is None or self._broken or self._room == 0 or self._web.fault is not None:
            return b""
        try:
            data = self._file.read(size if self._room < 0 else min(size, self._room))
        except AudioError as error:
            self._web.note(error, self._is_part)
            self._broken = True
            return b""
        self._room = max(self._room - len(data), 0) if self._room > 0 else self._room
        return data

    def seekable(self) -> bool:
        """Return whether it is seekable."""
        return self._file is not None and self._file.seekable()

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset."""
        if self._file is None:
            return 0
        before = self._file.tell()
        try:
            now = self._file.seek(place, whence)
        except AudioError as error:  # seeking a short way forward reads
            self._web.note(error, self._is_part)
            self._broken = True
            return self._file.tell()
        self._broken = self._broken and now == before
        return now

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return 0 if self._file is None else self._file.tell()

    def close(self) -> None:
        """Close the connection."""
        if self._file is not None:
            self._file.close()
        super().close()


class _Response(HTTPResponse):
    """A response that may start with "ICY 200 OK" instead of "HTTP/1.0 200 OK", as SHOUTcast's do."""

    def begin(self) -> None:
        source = self.fp
        if source.peek(4)[:4] == b"ICY ":
            source.read(4)
            self.fp = io.BufferedReader(_Joined(b"HTTP/1.0 ", source))
        super().begin()


class _Joined(io.RawIOBase):
    """Some bytes, followed by those of a file as they arrive."""

    def __init__(self, first: bytes, file: io.BufferedReader) -> None:
        self._first, self._file = first, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._first or self._file.read1(len(buffer))
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        self._first = self._first[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _origin(parts: SplitResult) -> tuple[str, int]:
    return (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def _connection(plain: socket.socket, place: Any, parts: SplitResult) -> HTTPConnection:
    host, port = _origin(parts)
    try:
        plain.settimeout(PATIENCE)
        plain.connect(place)
        secured = _tls().wrap_socket(plain, server_hostname=host) if parts.scheme == "https" else plain
    except BaseException:
        plain.close()
        raise
    connection = HTTPConnection(host, port, timeout=PATIENCE)
    connection.default_port = 443 if parts.scheme == "https" else 80  # the Host header omits it
    connection.sock = secured
    return connection


def _ask(connection: HTTPConnection, parts: SplitResult, target: str, first: int) -> HTTPResponse:
    connection.response_class = _Response
    headers = {"User-Agent": "ced", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
    headers |= {"Range": f"bytes={first}-"} | _credentials(parts, "Authorization")
    if "://" in target and (proxy := _proxy(parts.scheme, parts.hostname or "")) is not None:
        headers |= _credentials(proxy, "Proxy-Authorization")
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _credentials(parts: SplitResult, header: str) -> dict[str, str]:
    """Return the header with the user name and password of a URL, if it has any."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {header: f"Basic {base64.b64encode(pair).decode()}"}


def _proxy(scheme: str, host: str) -> SplitResult | None:
    """Return the user's proxy for a host, from http_proxy, https_proxy and no_proxy or the system's settings."""
    address = urllib.request.getproxies().get(scheme)
    if not address or urllib.request.proxy_bypass(host):
        return None
    return urlsplit(address if "://" in address else f"http://{address}")


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _range(response: HTTPResponse) -> tuple[int, int | None]:
    """Return the first byte of a response, and the size of the file if ranges of it can be requested."""
    if response.status == 200:
        length = response.getheader("Content-Length", "")
        ranges = response.getheader("Accept-Ranges", "").strip().lower() == "bytes"
        return 0, int(length) if ranges and length.isdecimal() else None
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.getheader("Content-Range", "").strip())
    if found is None:
        return 0, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def reason_of(error: BaseException | None) -> str:
    """Return the error of a connection in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
