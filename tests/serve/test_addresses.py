"""Fetching sounds from addresses: off by default, public hosts only, limits of size, time and number."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from ced.serve.app import Access, Application
from ced.serve.body import Limits
from ced.serve.schema import CLASSIFY, MODEL, STREAM
from tests.serve.served import Mean, constant, error, full, metrics, running, until

SOUND = constant(0.5)
LIMITS = Limits(megabytes=0.1, patience=10.0, slowest=100_000)


class Site(BaseHTTPRequestHandler):
    """A web server with a sound, and with answers that are too slow or too large."""

    hold = threading.Event()

    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        match self.path:
            case "/a%20b.wav?x=1":
                self.wfile.write(SOUND)
            case "/large":
                self.wfile.write(bytes(200_000))
            case "/slow":
                self.wfile.write(SOUND[:1000])
                self.wfile.flush()
                self.hold.wait(30)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Site.hold.set()
        server.shutdown()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A client of a server that accepts every host as public, and has short time limits."""
    monkeypatch.setattr("ced.sound.web.is_public", lambda address: True)
    monkeypatch.setattr("ced.sound.web.PATIENCE", 2.5)
    app = Application(Mean(), "mean", limits=LIMITS, access=Access(addresses=True))
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_addresses_are_off_by_default(address: str) -> None:
    assert "not a sound" in error(httpx.post(address + CLASSIFY, json={"address": "http://example.org/a.wav"}), 415)
    assert httpx.get(address + MODEL).json()["addresses"] is False


def test_a_sound_is_fetched_and_tagged(client: httpx.Client, site: str) -> None:
    for path in (CLASSIFY, STREAM):
        answer = client.post(path, json={"address": f" {site}/a%20b.wav?x=1 "})
        assert answer.status_code == 200, answer.text
        assert '"file": "a b.wav"' in answer.text
    assert answer.text.count('"prob": 0.5') == 1
    assert client.get(MODEL).json()["addresses"] is True
    body = client.get("/openapi.json").json()["paths"][CLASSIFY]["post"]["requestBody"]["content"]
    assert "application/json" in body


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [("/none", 422, "404"), ("/large", 413, "larger than 0.1 MB"), ("/slow", 422, "no sound arrived"), ("/", 422, "")],
)
def test_addresses_that_cannot_be_fetched_are_refused(
    client: httpx.Client, site: str, path: str, status: int, words: str
) -> None:
    assert words in error(client.post(CLASSIFY, json={"address": site + path}), status)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 4000, b"[1]", b'{"address": 1}', b'{"address": "http://a/", "x": 1}', b'"http://a/"', b"\xff"],
)
def test_bodies_without_an_address_are_refused(client: httpx.Client, body: bytes) -> None:
    error(client.post(CLASSIFY, content=body, headers={"content-type": "application/json"}), 422)


def test_only_public_hosts_are_connected_to() -> None:
    app = Application(Mean(), "mean", access=Access(addresses=True))
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]", "0.0.0.0"):
            for port in ("", ":22", f":{httpx.URL(url).port}"):
                message = error(client.post(CLASSIFY, json={"address": f"http://{host}{port}/"}), 422)
                assert "not a public address" in message or "port" in message
        elsewhere = ("s3://bucket/a.wav", "memory://a.wav", "hf://datasets/a/b/c.wav", "a.tar!b.wav")
        for address in ("file:///etc/passwd", "ftp://example.org/a", "concat:a|b", "", "http://", *elsewhere):
            error(client.post(CLASSIFY, json={"address": address}), 422)


def test_slow_hosts_do_not_delay_other_requests(client: httpx.Client, site: str) -> None:
    def ask() -> None:
        client.post(CLASSIFY, json={"address": f"{site}/slow"})

    slow = [threading.Thread(target=ask) for _ in range(4)]
    for each in slow:
        each.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert client.post(CLASSIFY, json={"address": f"{site}/a%20b.wav?x=1"}).status_code == 503
    assert client.post(CLASSIFY, content=SOUND).status_code == 200
    assert client.get("/healthz/ready").status_code == 200
    assert metrics(client)["ced_pending_requests"] == 0
    assert time.monotonic() - began < 10
    for each in slow:
        each.join()
    assert client.post(CLASSIFY, json={"address": f"{site}/a%20b.wav?x=1"}).status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_temporary_folder_is_reported(client: httpx.Client, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ced.serve.body._IN_MEMORY", 1000)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert "no room" in error(client.post(CLASSIFY, json={"address": f"{site}/a%20b.wav?x=1"}), 507)


def test_a_fetched_sound_is_deleted_if_its_client_disconnects(client: httpx.Client, site: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(CLASSIFY, json={"address": f"{site}/slow"}, timeout=0.3)
    until(lambda: metrics(client).get('ced_requests_total{status="499"}') == 1)
