"""Sounds behind addresses that strangers name: only by http(s), only from public places, never more than is wanted."""

import ipaddress
import socket
import ssl
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from ced.errors import AudioError

PATIENCE = 15.0  # seconds for a server to answer, and for each read
LONGEST = 300.0  # seconds for the whole of it
_REDIRECTS = 5
_BLOCK = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNSAFE = "%/:=&?~#+!$,;'@()*[]"  # what of an address is left as it is, so that only what is no ASCII is quoted

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(address: str, folder: Path, *, most: int, private: bool = False) -> Path:
    """Fetch what an address holds into a folder, under the last part of the address as its name.

    A host name is looked up once, and the connection goes to what was looked up: a name cannot lead to a public place
    when it is checked and to another when it is used. Redirects are checked likewise. Proxies are not used.

    Args:
        address: http or https.
        folder: where to put it.
        most: bytes that it may have.
        private: whether addresses that are not public (this machine, local networks) may be asked.

    Raises:
        AudioError: another kind of address, one that is not public, one that does not answer or answers with an error,
            or it holds more than `most`.
    """
    deadline = time.monotonic() + LONGEST
    here = address.strip()
    for _ in range(_REDIRECTS + 1):
        parts = _split(here)
        connection = _connected(parts, private)
        try:
            response = _asked(connection, parts)
            if response.status in (301, 302, 303, 307, 308) and (target := response.getheader("Location")):
                here = urljoin(here, target)
                continue
            if response.status != 200:
                raise AudioError(f"cannot fetch {here}: the server answers {response.status} {response.reason}")
            path = folder / _name(parts)
            _save(response, path, here, most, deadline)
            return path
        except (OSError, HTTPException) as error:
            raise AudioError(f"cannot fetch {here}: {_reason(error)}") from error
        finally:
            connection.close()
    raise AudioError(f"cannot fetch {address}: it is redirected more than {_REDIRECTS} times")


def is_public(address: Address) -> bool:
    """Return whether an IP address is of the public internet, also when another one is packed into it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(not is_public(packed) for packed in inner if packed is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are not closed, a port that is no number
        known = False
    if not known:
        raise AudioError(f"cannot fetch {address[:200]!r}: a sound's address begins with http:// or https://")
    return parts


def _connected(parts: SplitResult, private: bool) -> HTTPConnection:
    """Connect to what the host's name stands for, if all of it is allowed."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AudioError(f"cannot fetch {parts.geturl()}: there is no host {host}") from error
    for _, _, _, _, place in found:
        if not private and not is_public(ipaddress.ip_address(str(place[0]).partition("%")[0])):
            raise AudioError(
                f"cannot fetch {parts.geturl()}: {host} is not a public address, which is not allowed here"
            )
    fault: OSError | None = None
    for family, kind, protocol, _, place in found:
        plain = socket.socket(family, kind, protocol)
        plain.settimeout(PATIENCE)
        try:
            plain.connect(place)
            if parts.scheme == "http":
                connection = HTTPConnection(host, port, timeout=PATIENCE)
                connection.sock = plain
            else:
                connection = HTTPSConnection(host, port, timeout=PATIENCE)
                connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            return connection
        except OSError as error:
            fault = error
            plain.close()
    raise AudioError(f"cannot fetch {parts.geturl()}: {_reason(fault)}")


def _asked(connection: HTTPConnection, parts: SplitResult) -> HTTPResponse:
    path = quote(parts.path or "/", safe=_UNSAFE) + (f"?{quote(parts.query, safe=_UNSAFE)}" if parts.query else "")
    connection.request("GET", path, headers={"User-Agent": "ced", "Accept": "*/*", "Connection": "close"})
    return connection.getresponse()


def _save(response: HTTPResponse, path: Path, address: str, most: int, deadline: float) -> None:
    too_much = AudioError(f"{address} holds more than {most / 1e6:g} MB, which is all that is taken here")
    if response.length is not None and response.length > most:
        raise too_much
    done = 0
    with path.open("wb") as file:
        while block := response.read1(_BLOCK):
            done += len(block)
            if done > most:
                raise too_much
            if time.monotonic() > deadline:
                raise AudioError(f"cannot fetch {address}: it takes longer than {LONGEST:g} s")
            file.write(block)
    if response.length:
        raise AudioError(f"cannot fetch {address}: it breaks off after {done} bytes")


def _name(parts: SplitResult) -> str:
    name = PurePosixPath(unquote(parts.path)).name or parts.hostname or "sound"
    return "".join(letter for letter in name if letter.isprintable() and letter not in '/\\:*?"<>|')[-100:] or "sound"


def _reason(error: BaseException | None) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE:g} s"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
