"""Servers, sounds and clients for the tests of the server."""

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import soundfile
from numpy.typing import NDArray

from ced.serve.app import Application
from ced.serve.schema import CLASSIFY, STREAM
from ced.serve.server import Server, listen
from ced.sound.labels import ClassTable

RATE = 16_000
WAV = {"content-type": "audio/wav"}
DOWN = "the server is shutting down; try again soon"


class Mean:
    """Scores a wave by its mean and half of it, after `go` is set."""

    labels = ClassTable(("loud", "half"))

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.lengths: list[int] = []  # of the waves it was given

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        assert len(waves) == 1
        self.lengths.append(waves.shape[1])
        assert self.go.wait(60)
        mean = np.abs(waves.mean(1))
        return np.stack([mean, mean / 2], axis=1)


@contextmanager
def running(app: Application, grace: int = 60) -> Iterator[str]:
    """Run a server in a thread, and yield its address."""
    with listen("127.0.0.1", 0) as listener:
        server = Server(app, grace=grace)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    """Open a plain connection to a server."""
    place = httpx.URL(url)
    with socket.create_connection((place.host, place.port or 80), timeout=30) as connection:
        yield connection


def exchange(url: str, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes to a server; return status, headers and body of the answer, after which the server must close."""
    with connected(url) as connection:
        connection.sendall(request)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def noise(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def encode(samples: NDArray[np.float32], kind: str = "WAV", subtype: str = "FLOAT", rate: int = RATE) -> bytes:
    """Return samples as the bytes of a file."""
    held = io.BytesIO()
    soundfile.write(held, samples, rate, format=kind, subtype=subtype)
    return held.getvalue()


def constant(value: float, seconds: float = 1.0) -> bytes:
    """Return a WAV file of one value."""
    return encode(np.full(round(seconds * RATE), value, np.float32))


def error(answer: httpx.Response, status: int) -> str:
    """Return the one line of an error of this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    line = answer.json()["error"]
    assert isinstance(line, str)
    assert line
    assert "\n" not in line
    return line


def stream(client: httpx.Client, body: bytes, **options: Any) -> list[dict[str, Any]]:
    """Return the lines of a stream."""
    answer = client.post(STREAM, content=body, headers=WAV, params=options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def until(true: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def full(*_: Any, **__: Any) -> Any:
    """Open a file to which each write fails as on a full disk, in place of a temporary file."""
    return open("/dev/full", "w+b")


class Senders:
    """Requests to tag that are sent in the background, each in a thread; `answers` waits for them."""

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        self._answers: list[httpx.Response | None] = [None] * len(bodies)
        self._threads = [
            threading.Thread(target=self._send, args=(url, place, body)) for place, body in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, url: str, place: int, body: bytes) -> None:
        self._answers[place] = httpx.post(url + CLASSIFY, content=body, headers=WAV, timeout=60)

    def answers(self) -> list[httpx.Response]:
        for thread in self._threads:
            thread.join()
        return [answer for answer in self._answers if answer is not None]
