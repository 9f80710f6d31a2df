"""Live connections: the events of `ced live` over a WebSocket, and clients that break the protocol."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import numpy as np
import pytest
import websockets
from numpy.typing import NDArray
from websockets.sync.client import ClientConnection, connect

from ced.serve.app import Application
from ced.serve.body import Limits
from ced.serve.schema import LIVE_PATH, LIVE_PROTOCOL
from ced.sound import live_sources as sources
from ced.tag.live import Listener
from ced.tag.options import TagOptions
from ced.tag.tagger import Tagger
from tests.serve.served import RATE, Mean, connected, noise, running, until


def pcm(wave: NDArray[np.float32]) -> bytes:
    return np.round(wave * 32_767).astype("<i2").tobytes()


def loud_then_quiet() -> bytes:
    """Return four seconds, of which the second one and half of the third are loud."""
    wave = np.full(4 * RATE, 0.01, np.float32)
    wave[RATE : RATE * 5 // 2] = 0.88
    return pcm(wave)


def messages(connection: ClientConnection) -> list[dict[str, Any]]:
    """Return all messages until the server closes the connection."""
    found: list[dict[str, Any]] = []
    read_into(found, connection)
    return found


def read_into(found: list[dict[str, Any]], connection: ClientConnection) -> None:
    with suppress(websockets.ConnectionClosed):
        while True:
            found.append(json.loads(connection.recv()))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(Application(Mean(), "mean", limits=Limits(live=2))) as url:
        yield f"ws{url.removeprefix('http')}{LIVE_PATH}"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let windows wait for a minute, so that a busy machine drops none of them."""
    for module in ("ced.serve.live", "ced.sound.live"):
        monkeypatch.setattr(f"{module}._WAITING", 60.0)


@pytest.mark.usefixtures("patient")
def test_events_are_those_of_ced_live(url: str) -> None:
    options = TagOptions(window=0.5, hop=0.25, threshold=0.5, events=True, gap=0.25)
    samples = np.frombuffer(loud_then_quiet(), "<i2").reshape(-1, 1)
    blocks = [samples[start : start + RATE // 4] for start in range(0, len(samples), RATE // 4)]
    with Tagger(Mean(), name="mean") as tagger:
        expected = [report.to_json("live", "mean") for report in Listener(tagger, paced(blocks), options).reports()]
    assert [each["state"] for each in expected] == ["begin", "end"]
    with connect(f"{url}?window=0.5&hop=0.25&gap=0.25") as connection:
        began = time.time()
        for block in blocks:
            connection.send(block.tobytes())
            time.sleep(0.02)
        connection.send("stop")
        first, *rest = messages(connection)
    assert connection.protocol.close_code == 1000
    assert (first["type"], first["model"], first["classes"], first["rate"]) == ("begin", "mean", 2, RATE)
    found = [message for message in rest if message["type"] == "event"]
    for event, like in zip(found, expected, strict=True):
        assert {**event, "time": 0, "type": 0} == {"type": 0, **json.loads(json.dumps(like)), "time": 0}
        assert abs(np.datetime64(event["time"][:23]).astype("datetime64[ms]").astype(int) / 1000 - began) < 86_400
    windows = [message for message in rest if message["type"] == "window"]
    assert [(each["start"], each["end"]) for each in windows] == [(n / 4, n / 4 + 0.5) for n in range(15)]
    scores = [tuple(base64.b64decode(each["scores"])) for each in windows]
    assert scores[0] == (3, 1)  # 0.01
    assert scores[4] == (224, 112)
    assert windows[0]["level"] == pytest.approx(-40, abs=0.2)
    assert windows[3]["level"] == pytest.approx(-1.1, abs=0.2)  # of the newest hop
    assert rest[-1] == {"type": "end", "seconds": 4.0}


def paced(blocks: list[NDArray[Any]]) -> sources.LiveSource:
    """Return a source of these blocks, with a short pause before each."""

    def slowly() -> Iterator[NDArray[Any]]:
        for block in blocks:
            time.sleep(0.02)
            yield block

    return sources.blocks(slowly(), RATE, "live")


@pytest.mark.usefixtures("patient")
def test_frames_of_any_size_give_the_same_windows(url: str) -> None:
    body = loud_then_quiet()
    found = []
    for size in (6_400, 2_222):
        with connect(f"{url}?hop=0.5") as connection:
            for start in range(0, len(body), size):
                connection.send(body[start : start + size])
                time.sleep(0.002)
            connection.send("stop")
            found.append([each["scores"] for each in messages(connection) if each["type"] == "window"])
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_scores_can_be_left_out(url: str) -> None:
    with connect(f"{url}?scores=false", subprotocols=[LIVE_PROTOCOL]) as connection:  # type: ignore[list-item]
        assert connection.subprotocol == LIVE_PROTOCOL
        connection.send(pcm(noise(2)))
        connection.send("stop")
        assert not any("scores" in message for message in messages(connection))


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("threshold=2", "threshold: "),
        ("hop=0.01", "hop: "),
        ("window=1&hop=2", "longer hop"),
        ("labels=barks", "no label 'barks'"),
        ("topk=3", "no option topk"),
        ("hop=1&hop=2", "hop is given 2 times"),
    ],
)
def test_invalid_options_are_refused(url: str, query: str, words: str) -> None:
    with connect(f"{url}?{query}") as connection:
        (message,) = messages(connection)
    assert message["type"] == "error"
    assert words in message["error"]
    assert connection.protocol.close_code == 1008


@pytest.mark.parametrize(
    ("sent", "code", "words"), [(b"abc", 1007, "even number"), ("go", 1007, "text"), (bytes(70_000), 1009, "")]
)
def test_messages_that_are_not_samples_end_the_connection(url: str, sent: bytes | str, code: int, words: str) -> None:
    with connect(url) as connection:
        connection.send(sent)
        found = messages(connection)
    assert connection.protocol.close_code == code
    if words:
        assert found[-1]["type"] == "error"
        assert words in found[-1]["error"]


def test_the_number_of_live_connections_is_limited(url: str) -> None:
    with connect(url) as one, connect(url) as two:
        for each in (one, two):
            assert json.loads(each.recv())["type"] == "begin"
        with pytest.raises(websockets.InvalidStatus) as refused:
            connect(url)
        assert refused.value.response.status_code == 503
        assert "too many live connections" in json.loads(refused.value.response.body)["error"]
    until(lambda: is_accepted(url))


def is_accepted(url: str) -> bool:
    try:
        with connect(url):
            return True
    except websockets.InvalidStatus:
        return False


def test_windows_that_arrive_too_fast_are_dropped_and_counted() -> None:
    model = Mean()
    with (
        running(Application(model, "mean")) as url,
        connect(f"ws{url.removeprefix('http')}{LIVE_PATH}") as connection,
    ):
        model.go.clear()
        for _ in range(20):
            connection.send(pcm(noise(0.5)))
        time.sleep(0.5)
        model.go.set()
        connection.send("stop")
        found = messages(connection)
    windows = [message for message in found if message["type"] == "window"]
    dropped = [message["windows"] for message in found if message["type"] == "dropped"][-1]
    assert len(windows) + dropped == 1 + (10 * 4 - 6)  # all that fit into ten seconds
    assert windows[-1]["end"] == 10.0  # the newest are kept
    assert len(windows) <= 6


def test_a_client_that_sends_faster_than_real_time_is_disconnected(url: str) -> None:
    with connect(url) as connection:
        with suppress(websockets.ConnectionClosed):
            for _ in range(1000):
                connection.send(bytes(65_536))
        found = messages(connection)
    assert connection.protocol.close_code == 1008
    assert "times as fast" in found[-1]["error"]


def test_a_client_that_reads_nothing_is_disconnected_and_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ced.serve.live._SEND_SECONDS", 0.5)
    app = Application(Wide(), "wide", limits=Limits(live=1))
    with running(app) as url:
        key = base64.b64encode(bytes(16)).decode()
        request = (
            f"GET {LIVE_PATH}?window=0.16&hop=0.1 HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        )
        body = pcm(noise(0.5))
        frame = b"\x82" + bytes([0x80 | 126]) + len(body).to_bytes(2, "big") + bytes(4) + body  # a mask of zeros
        with connected(url) as silent:
            silent.sendall(request.encode())
            until(lambda: len(app.sessions) == 1)

            def send_on() -> None:
                with suppress(OSError):
                    while True:
                        silent.sendall(frame)
                        time.sleep(0.01)

            sender = threading.Thread(target=send_on)
            sender.start()
            assert httpx.get(f"{url}/healthz/ready").status_code == 200
            until(lambda: not app.sessions)
        sender.join()


class Wide(Mean):
    """Scores a hundred thousand classes, so that messages are large."""

    def __init__(self) -> None:
        super().__init__()
        from ced.sound.labels import numbered

        self.labels = numbered(100_000)

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        return np.full((1, 100_000), 0.25, np.float32)


def test_without_sound_events_end_and_then_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_TICK", 0.05), ("LULL", 0.3), ("_IDLE", 1.0)):
        monkeypatch.setattr(f"ced.serve.live.{name}", value)
    with (
        running(Application(Mean(), "mean")) as url,
        connect(f"ws{url.removeprefix('http')}{LIVE_PATH}?window=0.5&gap=0") as connection,
    ):
        connection.send(pcm(np.full(RATE, 0.9, np.float32)))
        found = messages(connection)
    assert [message["state"] for message in found if message["type"] == "event"] == ["begin", "end"]
    assert found[-1]["type"] == "error"
    assert "no sound arrived" in found[-1]["error"]


def test_shutdown_ends_events_before_connections() -> None:
    app = Application(Mean(), "mean")
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        with running(app) as url:
            connection = stack.enter_context(connect(f"ws{url.removeprefix('http')}{LIVE_PATH}?window=0.5"))
            connection.send(pcm(np.full(RATE, 0.9, np.float32)))
            reader = threading.Thread(target=read_into, args=(found, connection))
            reader.start()
            until(lambda: any(message["type"] == "event" for message in found))
            began = time.monotonic()
        assert time.monotonic() - began < 10
        reader.join()
    assert [message["state"] for message in found if message["type"] == "event"] == ["begin", "end"]
    assert found[-1] == {"type": "end", "seconds": 1.0}
    assert connection.protocol.close_code == 1001
