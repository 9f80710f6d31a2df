"""Addresses that strangers name: what is fetched, and what never is."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ced.errors import AudioError
from ced.tag.fetch import fetch


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        to = {"/away": "/a.wav", "/round": "/round", "/file": "file:///etc/passwd", "/inside": "http://10.0.0.1/"}
        if self.path in to:
            self.send_response(302)
            self.send_header("Location", to[self.path])
            self.end_headers()
            return
        self.send_response(200 if self.path.startswith("/a.wav") else 404)
        if self.path == "/a.wav":
            self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(1000))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/a.wav", "/a.wav?without-a-length", "/away"])
def test_an_address_is_fetched_under_its_name(site: str, path: str, tmp_path: Path) -> None:
    found = fetch(site + path, tmp_path, most=1000, private=True)
    assert found == tmp_path / "a.wav"
    assert found.read_bytes() == bytes(1000)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/a.wav", "holds more than 999 bytes"),
        ("/a.wav?without-a-length", "holds more than 999 bytes"),
        ("/none", "answers 404"),
        ("/round", "more than 5 redirects"),
        ("/file", "begins with http:// or https:// and a host"),
    ],
)
def test_what_cannot_be_had_is_said(site: str, path: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=said):
        fetch(site + path, tmp_path, most=999, private=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_this_machine_is_not_asked(host: str, site: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"is not a public address|cannot be found|is not one of web servers"):
        fetch(f"http://{host}:{site.rpartition(':')[2]}/a.wav", tmp_path, most=1000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["file:///etc/passwd", "/etc/passwd", "http://", "http://[", ""])
def test_only_http_is_spoken(address: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="begins with http:// or https:// and a host"):
        fetch(address, tmp_path, most=1000)
