"""Addresses: what is read from where, and all that they must not lead to. The servers are real, the network is not."""

import io
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ced.errors import AudioError
from ced.sound import web
from ced.sound.audio import SAMPLE_RATE, load
from ced.sound.web import TrustedAddress, Web, is_public

DATA = bytes(range(256)) * 4096  # 1 MiB
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers a path with the bytes or by the function that the server has for it, and keeps the requests."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(404)
        elif callable(page):
            page(self)
        else:
            self.send(page, ranges=self.path != "/whole")

    def send(self, data: bytes, ranges: bool = True, lost: int = 0) -> None:
        first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if ranges else 0
        self.send_response(206 if ranges else 200)
        if ranges:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first : len(data) - lost])

    def redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, pages: Mapping[str, bytes | Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.asked = dict(pages), list[tuple[str, dict[str, str]]]()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(pages: Mapping[str, bytes | Answer]) -> Server:
        servers.append(Server(pages))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def read(file: io.RawIOBase, count: int) -> bytes:
    data = b""
    while len(data) < count and (block := file.read(count - len(data))):
        data += block
    return data


def test_a_file_is_read_from_any_place_if_the_server_allows_it(serve: Callable[..., Server]) -> None:
    server = serve({"/a": DATA, "/whole": DATA})
    with Web(f"{server.url}/a").open() as file:
        assert file.seekable()
        assert file.seek(0, os.SEEK_END) == len(DATA)
        assert file.read(10) == b""
        for place in (0, 700_001, 700_200, 5, len(DATA) - 3):
            assert file.seek(place) == place
            assert read(file, 100) == DATA[place : place + 100]
    assert [headers["Range"] for _, headers in server.asked] == [
        *("bytes=0-", "bytes=0-", "bytes=700001-", "bytes=5-", f"bytes={len(DATA) - 3}-")
    ]
    with Web(f"{server.url}/whole").open() as file:
        assert not file.seekable()
        with pytest.raises(io.UnsupportedOperation):
            file.seek(1)
        assert file.read() == DATA


def test_redirects_are_limited(serve: Callable[..., Server]) -> None:
    hops: dict[str, bytes | Answer] = {"/0": b"found"}
    for number in range(1, 8):
        hops[f"/{number}"] = lambda handler, to=f"/{number - 1}": handler.redirect(to)  # type: ignore[misc]
    hops["/round"] = lambda handler: handler.redirect("/round")
    server = serve(hops)
    with Web(f"{server.url}/5").open() as file:
        assert (file.name, file.read()) == (f"{server.url}/0", b"found")
    for path in ("/6", "/round"):
        server.asked.clear()
        with pytest.raises(AudioError, match="more than 5 redirects"):
            Web(server.url + path).open()
        assert len(server.asked) == 6


@pytest.mark.parametrize("private", ["named", "any", "none"])
def test_private_hosts(serve: Callable[..., Server], private: Any) -> None:
    other = serve({"/a": b"secret"})
    server = serve({"/a": b"own", "/away": lambda handler: handler.redirect(f"{other.url}/a")})
    if private == "none":
        with pytest.raises(AudioError, match=r"127\.0\.0\.1 is not a public address"):
            Web(f"{server.url}/a", private=private).open()
    else:
        assert Web(f"{server.url}/a", private=private).open().read() == b"own"
    if private == "any":
        assert Web(f"{server.url}/away", private=private).open().read() == b"secret"
    else:
        with pytest.raises(AudioError, match="is not a public address"):
            Web(f"{server.url}/away", private=private).open()
        assert other.asked == []


@pytest.mark.parametrize(
    "target",
    [
        *("http://localhost/", "http://LOCALHOST./", "http://0/", "http://2130706433/", "http://0x7f.1/"),
        *("http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[fe80::1%25lo]/", "http://192.0.0.192/opc/v2/"),
        *(
            "http://169.254.169.254/",
            "http://8.8.8.8:22/",
            "http://8.8.8.8:25/",
            "file:///etc/passwd",
            "ftp://8.8.8.8/",
        ),
        *("gopher://8.8.8.8/", "data:audio/wav;base64,AAAA", "http://", "http://[", "http://a:b/", "http://a:0/", "//"),
    ],
)
def test_private_hosts_are_never_requested(
    serve: Callable[..., Server], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[object] = []
    server = serve({"/": lambda handler: handler.redirect(target)})
    connect = socket.socket.connect

    def watched(self: socket.socket, place: Any) -> None:
        connected.append(place[1])
        connect(self, place)

    monkeypatch.setattr(socket.socket, "connect", watched)
    with pytest.raises(AudioError) as raised:
        Web(f"{server.url}/").open()
    assert set(connected) == {server.server_port}
    assert "\n" not in str(raised.value)


def test_a_host_name_is_resolved_once(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: a name that stands for a public address when it is checked, and for this machine afterwards."""
    server = serve({"/": b"secret"})
    answers = iter(["93.184.216.34", "127.0.0.1"])
    looked_up: list[str] = []
    connected: list[str] = []
    lookup = socket.getaddrinfo

    def rebinding(host: str, port: int, *words: Any, **options: Any) -> Any:
        looked_up.append(host)
        return lookup(next(answers), port, *words, **options)

    def connect(self: socket.socket, place: Any) -> None:
        connected.append(place[0])
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(AudioError, match="no answer within"):
        Web(f"http://rebinding.test:{server.server_port}/", private="none").open()
    assert (looked_up, connected) == (["rebinding.test"], ["93.184.216.34"])


def test_one_private_address_of_a_name_refuses_all(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, 80)) for place in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    with pytest.raises(AudioError, match="is not a public address"):
        Web("http://two.test/", private="none").open()


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A certificate of 127.0.0.1, with its key, that this process trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path / "own.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path, "-out", tmp_path / "c.pem"]
    subprocess.run([*map(str, command), *subject], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + (tmp_path / "c.pem").read_bytes())
    monkeypatch.setattr(web, "_tls", lambda: ssl.create_default_context(cafile=path))
    return path


def secured(server: Server, certificate: Path) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return f"https://127.0.0.1:{server.server_port}"


def test_https_is_never_followed_to_http(serve: Callable[..., Server], certificate: Path) -> None:
    plain = serve({"/a": b"plain"})
    server = Server({"/a": b"secured", "/down": lambda handler: handler.redirect(f"{plain.url}/a")})
    url = secured(server, certificate)
    assert Web(f"{url}/a").open().read() == b"secured"
    with pytest.raises(AudioError, match="from https to http"):
        Web(f"{url}/down", private="any").open()
    site = Web(f"{url}/a", private="any")
    assert site.open_part(f"{plain.url}/a", 1, {}).read() == b""
    assert "from https to http" in str(site.fault)
    assert plain.asked == []
    server.shutdown()
    server.server_close()


def test_a_certificate_that_is_not_trusted(
    serve: Callable[..., Server], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server({"/a": b"secured"})
    url = secured(server, certificate)
    monkeypatch.setattr(web, "_tls", ssl.create_default_context)
    with pytest.raises(AudioError, match="its certificate is not valid"):
        Web(f"{url}/a").open()
    server.shutdown()
    server.server_close()


def test_names_and_passwords_go_to_their_host_only(serve: Callable[..., Server]) -> None:
    other = serve({"/a": b"found"})
    server = serve({"/": lambda handler: handler.redirect(f"{other.url}/a")})
    address = f"http://me:p%40ss@127.0.0.1:{server.server_port}/"
    assert Web(address, private="any").open().read() == b"found"
    assert server.asked[0][1]["Authorization"] == "Basic bWU6cEBzcw=="
    assert "Authorization" not in other.asked[0][1]


def test_the_proxy_of_the_user(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve({"http://example.org/a": b"through the proxy"})
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.server_port}")
    assert Web("http://example.org/a").open().read() == b"through the proxy"
    assert proxy.asked[0][1]["Host"] == "example.org"
    assert proxy.asked[0][1]["Proxy-Authorization"] == "Basic bWU6c2VjcmV0"
    site = Web("http://example.org/a")
    assert site.open_part("http://10.0.0.1/a", 1, {}).read() == b""
    assert "10.0.0.1 is not a public address" in str(site.fault)
    own = serve({"/a": b"own"})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert Web(f"{own.url}/a").open().read() == b"own"


def test_https_through_a_proxy(
    serve: Callable[..., Server], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server({"/a": b"tunnelled"})
    url = secured(server, certificate)
    tunnels: list[str] = []

    def tunnel() -> None:
        client, _ = proxy.accept()
        tunnels.append(client.recv(1 << 16).decode().partition("\r\n")[0])
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", server.server_port)) as other:
            threads = [
                threading.Thread(target=pump, args=pair, daemon=True) for pair in ((client, other), (other, client))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)

    def pump(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as proxy:
        threading.Thread(target=tunnel, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert Web(f"{url}/a").open().read() == b"tunnelled"
    assert [line.rpartition(" ")[0] for line in tunnels] == [f"CONNECT 127.0.0.1:{server.server_port}"]
    server.shutdown()
    server.server_close()


def test_old_radio_stations(serve: Callable[..., Server]) -> None:
    def icy(handler: Handler) -> None:
        handler.wfile.write(b"ICY 200 OK\r\nicy-name: old\r\nContent-Type: audio/mpeg\r\n\r\nsound")

    assert Web(f"{serve({'/': icy}).url}/").open().read() == b"sound"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda handler: handler.send_error(503), "the server answers 503"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"), "SSH-2.0"),
        (lambda handler: handler.wfile.write(b""), "closed"),
        (lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), None),
        (lambda handler: handler.send(b"abc" * 100, lost=200), "200 bytes before the end"),
        (lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000), "more than"),
        (
            lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
            ": [a-zA-Z]",
        ),
        (
            lambda handler: handler.wfile.write(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 7-8/9\r\n\r\nab"),
            "from byte 7",
        ),
    ],
)
def test_invalid_answers(serve: Callable[..., Server], answer: Answer, said: str | None) -> None:
    server = serve({"/a": answer})
    if said is None:
        assert Web(f"{server.url}/a").open().read() == b""
        return
    with pytest.raises(AudioError, match=said) as raised:
        Web(f"{server.url}/a").open().read()
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{server.url}/a: ")


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(AudioError, match="refused"):
        Web(f"http://127.0.0.1:{port}/").open()

    def unknown(*words: Any, **options: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(AudioError, match=r"the host no\.test cannot be found"):
        Web("http://no.test/").open()


@pytest.mark.parametrize("drip", [b"", b"x"])
def test_a_very_slow_server_times_out(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, drip: bytes
) -> None:
    def slow(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"sound, at first")
        for _ in range(100):
            time.sleep(0.1)
            handler.wfile.write(drip)

    monkeypatch.setattr(web, "PATIENCE", 0.5)
    file = Web(f"{serve({'/': slow}).url}/").open()
    began = time.monotonic()
    with pytest.raises(AudioError, match=r"no sound arrived for 0\.5 s|only \d+ bytes arrived in 0\.5 s"):
        file.read()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808")),
        *((address, True) for address in ("2002:808:808::", "192.0.1.1", "192.88.98.1", "172.32.0.1", "2a00::1")),
        *((address, False) for address in ("10.1.2.3", "127.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254")),
        *((address, False) for address in ("100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "0.0.0.0")),
        *((address, False) for address in ("192.0.0.192", "192.0.0.8", "192.0.2.1", "192.88.99.1", "198.18.0.1")),
        *((address, False) for address in ("198.51.100.1", "203.0.113.1", "168.63.129.16", "0.1.2.3")),
        *((address, False) for address in ("::", "::1", "fe80::1", "fec0::1", "fd00::1", "fd00:ec2::254", "ff02::1")),
        *((address, False) for address in ("::ffff:192.168.0.1", "::127.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1")),
        *((address, False) for address in ("64:ff9b:1::1", "100::1", "2001::1", "2001:2::1", "2001:db8::1", "3fff::1")),
        *((address, False) for address in ("5f00::1", "4000::1", "2001:0:7f00:1::", "2002:a00:1::")),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


# Playlists


def playlist(*parts: str, end: bool = True, seconds: float = 1.0) -> bytes:
    lines = ["#EXTM3U", f"#EXT-X-TARGETDURATION:{max(1, round(seconds))}", "#EXT-X-MEDIA-SEQUENCE:0"]
    lines += [line for part in parts for line in (f"#EXTINF:{seconds},", part)]
    return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if end else []), ""]).encode()


def master(*parts: str) -> bytes:
    return "\n".join(["#EXTM3U", *(f"#EXT-X-STREAM-INF:BANDWIDTH=64000\n{part}" for part in parts), ""]).encode()


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    """Three seconds of a tone, as MPEG transport streams of a second each."""
    av: Any = pytest.importorskip("av")
    found = []
    for number in range(3):
        file = io.BytesIO()
        with av.open(file, "w", format="mpegts") as out:
            track = out.add_stream("mp2", rate=48_000)
            track.layout = "mono"
            time_axis = np.arange(48_000) / 48_000
            wave = (8000 * np.sin(2 * np.pi * 440 * time_axis)).astype(np.int16)
            for start in range(0, 48_000 - 1152, 1152):
                frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1152], "s16", "mono")
                frame.rate, frame.pts = 48_000, number * 48_000 + start
                out.mux(track.encode(frame))
            out.mux(track.encode(None))
        found.append(file.getvalue())
    return found


def site(parts: list[bytes], **pages: bytes | Answer) -> dict[str, bytes | Answer]:
    return {f"/{number}.ts": part for number, part in enumerate(parts)} | {
        f"/{name}": page for name, page in pages.items()
    }


def test_a_playlist_is_read_to_its_end(serve: Callable[..., Server], parts: list[bytes]) -> None:
    server = serve(site(parts, list=playlist("0.ts", "1.ts", "2.ts"), master=master("list")))
    for path in ("/list", "/master"):
        assert len(load(server.url + path)) / SAMPLE_RATE == pytest.approx(3.0, abs=0.2)


def test_parts_of_one_file(serve: Callable[..., Server], parts: list[bytes]) -> None:
    lines = ["#EXTM3U", "#EXT-X-VERSION:4", "#EXT-X-TARGETDURATION:1"]
    first = 0
    for part in parts:
        lines += ["#EXTINF:1.0,", f"#EXT-X-BYTERANGE:{len(part)}@{first}", "all.ts"]
        first += len(part)
    data = "\n".join([*lines, "#EXT-X-ENDLIST", ""]).encode()
    server = serve({"/list": data, "/all.ts": b"".join(parts)})
    assert len(load(f"{server.url}/list")) / SAMPLE_RATE == pytest.approx(3.0, abs=0.2)
    asked = [headers["Range"] for path, headers in server.asked if path == "/all.ts"]
    assert f"bytes={len(parts[0])}-" in asked


def test_missing_parts_are_reported(
    serve: Callable[..., Server], parts: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(site(parts, list=playlist("0.ts", "none.ts", "2.ts")))
    assert len(load(f"{server.url}/list")) / SAMPLE_RATE == pytest.approx(2.0, abs=0.2)
    assert "1 parts of its playlist cannot be read" in caplog.text


@pytest.mark.parametrize("target", ["{other}/0.ts", "file:///etc/passwd", "crypto+http://127.0.0.1/x", "{other}/list"])
def test_a_playlist_cannot_reach_private_hosts(
    serve: Callable[..., Server], parts: list[bytes], target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    other = serve(site(parts, list=playlist("0.ts")))
    target = target.format(other=other.url)
    for page in (playlist(target), playlist("0.ts", target, "2.ts"), master(target)):
        server = serve(site(parts, list=page))
        with pytest.raises(AudioError) as raised:
            load(f"{server.url}/list")
        assert "\n" not in str(raised.value)
        assert other.asked == []
    assert capfd.readouterr().err == ""  # PyAV prints what its callbacks raise
    if target.startswith("http:"):
        server = serve(site(parts, list=playlist(target) if target.endswith("ts") else master(target)))
        assert len(load(TrustedAddress(f"{server.url}/list"))) > SAMPLE_RATE / 2


def test_a_redirect_of_a_part_cannot_reach_private_hosts(serve: Callable[..., Server], parts: list[bytes]) -> None:
    other = serve(site(parts))
    server = serve(site(parts, list=playlist("away"), away=lambda handler: handler.redirect(f"{other.url}/0.ts")))
    with pytest.raises(AudioError, match="not a public address"):
        load(f"{server.url}/list")
    assert other.asked == []


def test_nested_playlists_are_limited(serve: Callable[..., Server]) -> None:
    server = serve({})

    class Endless(dict[str, bytes | Answer]):
        def get(self, path: str, default: Any = None) -> Any:
            return master(f"/{int(path[1:]) + 1}", f"/{int(path[1:]) + 1001}")

    server.pages = Endless()
    with pytest.raises(AudioError):
        load(f"{server.url}/0")
    assert len(server.asked) < web.MOST_PLAYLISTS + web.MOST_RELOADS + 3


@pytest.mark.parametrize("names", [[], ["0.ts"]])
def test_an_endless_playlist_is_refused(
    serve: Callable[..., Server], parts: list[bytes], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MOST_RELOADS", 2)
    server = serve(site(parts, list=playlist(*names, end=False, seconds=0.1)))
    with pytest.raises(AudioError):
        load(f"{server.url}/list")
    assert len(server.asked) < 10


def test_many_missing_parts_are_an_error(serve: Callable[..., Server], parts: list[bytes]) -> None:
    server = serve(site(parts, list=playlist("0.ts", *(f"none{number}.ts" for number in range(1000)))))
    with pytest.raises(AudioError, match="404"):
        load(f"{server.url}/list")
    assert len(server.asked) < 30


def test_a_file_whose_index_is_at_its_end(serve: Callable[..., Server], tmp_path: Path) -> None:
    """MP4 files of recorders; FFmpeg reads the end first."""
    av: Any = pytest.importorskip("av")
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="ipod") as out:
        track = out.add_stream("aac", rate=48_000)
        track.layout = "mono"
        noise = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 480_000)).astype(np.float32)
        for start in range(0, 480_000 - 1024, 1024):
            frame = av.AudioFrame.from_ndarray(noise[:, start : start + 1024], "fltp", "mono")
            frame.rate, frame.pts = 48_000, start
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    data = path.read_bytes()
    assert data.index(b"moov") > data.index(b"mdat")
    server = serve({"/a.m4a": data})
    np.testing.assert_array_equal(load(f"{server.url}/a.m4a"), load(path))


def test_a_web_page_is_not_sound(serve: Callable[..., Server]) -> None:
    server = serve({"/": b"<html>not here</html>" * 100, "/empty": b""})
    for path in ("/", "/empty"):
        with pytest.raises(AudioError, match=r"http://127\.0\.0\.1:\d+/\w*: ") as raised:
            load(server.url + path)
        assert "\n" not in str(raised.value)


def test_sound_that_libsndfile_reads(serve: Callable[..., Server]) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE)
    soundfile.write(file, noise, SAMPLE_RATE, format="WAV")
    server = serve({"/a.wav": file.getvalue()})
    assert len(load(f"{server.url}/a.wav")) == SAMPLE_RATE
