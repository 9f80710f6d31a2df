"""Connections, sockets and shutdown of the server."""

import http.client
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.serve.app import Application
from ced.serve.body import Limits
from ced.serve.schema import CLASSIFY, STREAM
from ced.serve.server import Server, listen, listen_unix, url_of
from ced.sound.labels import numbered
from tests.serve.served import Mean, connected, constant, error, exchange, metrics, running, until

POST = f"POST {CLASSIFY} HTTP/1.1\r\nHost: localhost\r\n".encode()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0junk\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        POST + b"Content-Length: abc\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"X: " + bytes(100_000) + b"\r\n\r\n",
    ],
)
def test_invalid_http_is_refused_in_json(address: str, request_bytes: bytes) -> None:
    status, headers, body = exchange(address, request_bytes)
    assert status == 400 or (status == 501 and b"gzip" in request_bytes)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert body.startswith(b'{"error"')


def test_a_broken_chunk_is_refused(address: str) -> None:
    for start in (b"", b"4\r\nRIFF\r\n"):
        status, headers, _ = exchange(address, POST + b"Transfer-Encoding: chunked\r\n\r\n" + start + b"x\r\n")
        assert (status, headers["content-type"]) == (400, "application/json")


def test_the_body_of_a_refused_request_is_read_for_a_limited_time(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ced.serve.server._REST_SECONDS", 0.3)
    for lines, options, status in (
        (b"Content-Length: 1000001\r\n", b"", 413),
        (b"Content-Length: 9\r\n", b"?topk=3", 422),
        (b"Content-Type: text/plain\r\nContent-Length: 9\r\n", b"", 415),
        (b"Transfer-Encoding: chunked\r\n", b"?topk=3", 422),
    ):
        request = POST.replace(b" HTTP", options + b" HTTP", 1) + lines + b"\r\n"
        began = time.monotonic()
        assert exchange(address, request)[0] == status
        assert time.monotonic() - began < 8
    with connected(address) as sender:
        sender.sendall(POST + b"Content-Length: 1000000000000\r\n\r\n")
        end = time.monotonic() + 20

        def send_on() -> None:
            while time.monotonic() < end:
                sender.sendall(bytes(100_000))

        with pytest.raises(ConnectionError):
            send_on()
    with httpx.Client(base_url=address) as client:  # what was read to its end keeps its connection
        for _ in range(2):
            kept = client.post(CLASSIFY, content=b"abc", headers={"content-type": "text/plain"})
            assert (kept.status_code, kept.headers.get("connection")) == (415, None)


def test_connections_that_send_no_request_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ced.serve.server._HEAD_SECONDS", 0.5)
    with running(Application(Mean(), "mean")) as url:
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n"):
            with connected(url) as idle:
                idle.sendall(sent)
                began = time.monotonic()
                assert idle.recv(1) == b""
                assert time.monotonic() - began < 10
        with connected(url) as drip:

            def send_on() -> None:
                for _ in range(1000):
                    drip.sendall(b"G")
                    time.sleep(0.02)

            with pytest.raises(ConnectionError):
                send_on()
        with connected(url) as later:  # also after a first request
            later.sendall(b"GET /healthz/live HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal")
            assert later.makefile("rb").read().count(b"HTTP/1.1 200") == 1


class Wide:
    """Scores two thousand classes."""

    labels = numbered(2000)

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        return np.full((1, 2000), 0.5, np.float32)


def unread_stream(url: str) -> socket.socket:
    """Ask for a stream of several megabytes, and read nothing of it."""
    place = httpx.URL(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((place.host, place.port or 80))
    body = constant(0.5, 599)
    head = f"POST {STREAM}?window=1&scores=windows&encoding=float32 HTTP/1.1\r\nHost: localhost\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_a_client_that_does_not_read_its_answer_is_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(patience=0.5, slowest=50_000_000)
    with running(Application(Wide(), "wide", limits=limits)) as url, httpx.Client(base_url=url) as client:
        with unread_stream(url):
            until(lambda: metrics(client)["ced_pending_requests"] == 1)
            assert client.post(CLASSIFY, content=constant(0.5)).status_code == 200  # others are served meanwhile
            until(lambda: metrics(client)["ced_pending_requests"] == 0)
        assert metrics(client)["ced_call_windows_sum"] < 599
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ced.")] == []


def test_connections_that_acknowledge_nothing_time_out_in_the_kernel() -> None:
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


def test_idle_connections_do_not_delay_shutdown() -> None:
    """Idle and new connections, half a request and an unread answer do not delay it."""
    app = Application(Wide(), "wide")
    with listen("127.0.0.1", 0) as listener:
        server = Server(app, grace=60)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url) as client, connected(url), connected(url) as half, unread_stream(url) as unread:
            assert client.get("/healthz/ready").status_code == 200
            half.sendall(POST)
            until(lambda: metrics(client)["ced_pending_requests"] == 1)
            unread.close()
            began = time.monotonic()
            late = [socket.create_connection(listener.getsockname()) for _ in range(20)]
            server.should_exit = True
            thread.join()
            took = time.monotonic() - began
            for each in late:
                each.close()
    assert took < 10


def test_liveness_is_answered_under_load() -> None:
    body, stop = constant(0.5, 5), threading.Event()
    with running(Application(Mean(), "mean", jobs=2)) as url:
        place = httpx.URL(url)

        def flood() -> None:
            connection = http.client.HTTPConnection(place.host, place.port)
            while not stop.is_set():
                connection.request("POST", CLASSIFY, body)
                connection.getresponse().read()
            connection.close()

        threads = [threading.Thread(target=flood) for _ in range(100)]
        for thread in threads:
            thread.start()
        took = []
        for _ in range(20):
            began = time.monotonic()
            connection = http.client.HTTPConnection(place.host, place.port)
            connection.request("GET", "/healthz/live")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            took.append(time.monotonic() - began)
        stop.set()
        for thread in threads:
            thread.join()
    assert sorted(took)[-2] < 4  # what the container's check allows


def test_a_port_in_use_is_an_error() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert url_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use$"):
            listen("127.0.0.1", port)


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "ced.sock"
    with listen_unix(path) as listener:
        assert url_of(listener) == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(ConfigError, match="another server listens"):
            listen_unix(path)
    assert path.exists()  # as after a kill
    with listen_unix(path) as listener:
        server = Server(Application(Mean(), "mean"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any") as client:
            assert client.get("/healthz/ready").json() == {"status": "ok"}
            error(client.post(CLASSIFY, content=b"abc"), 422)
        server.should_exit = True
        thread.join()
    (tmp_path / "file").write_text("a")
    for place, words in (("file", "not a socket"), ("no/where", "No such file"), ("x" * 200, "cannot listen")):
        with pytest.raises(ConfigError, match=words):
            listen_unix(tmp_path / place)
