"""The queue: order of requests, refusals, clients that disconnect, and shutdown."""

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from ced.serve.app import Application
from ced.serve.body import Limits
from ced.serve.schema import CLASSIFY, STREAM
from tests.serve.served import (
    DOWN,
    RATE,
    WAV,
    Mean,
    Senders,
    connected,
    constant,
    encode,
    error,
    exchange,
    full,
    metrics,
    running,
    until,
)


def test_requests_take_turns_window_by_window() -> None:
    model = Mean()
    with running(Application(model, "mean")) as url, httpx.Client(base_url=url, timeout=60) as client:
        model.go.clear()
        long = Senders(url, [constant(0.5, 10)])  # at once
        until(lambda: len(model.lengths) == 2)
        short = Senders(url, [constant(0.1, 0.5), constant(0.2, 0.25)])
        until(lambda: metrics(client)["ced_pending_requests"] == 3)
        model.go.set()
        probs = [answer.json()["pieces"][0]["tags"][0]["prob"] for answer in short.answers() + long.answers()]
        assert probs == pytest.approx([0.1, 0.2, 0.5], abs=1e-6)
        assert metrics(client)["ced_sound_seconds_total"] == 10.75
        assert metrics(client)["ced_call_windows_sum"] == 3


def test_a_short_sound_does_not_wait_for_a_long_one() -> None:
    model = Mean()
    with running(Application(model, "mean")) as url, httpx.Client(base_url=url, timeout=60) as client:
        model.go.clear()
        done = threading.Thread(
            target=lambda: httpx.post(url + STREAM, content=constant(0.5, 300), params={"window": 1}, timeout=60)
        )
        done.start()
        until(lambda: len(model.lengths) >= 2)
        short = Senders(url, [constant(0.5, 0.5)])
        until(lambda: metrics(client)["ced_pending_requests"] == 2)
        model.go.set()
        short.answers()
        assert model.lengths.index(RATE // 2) < 20  # of 300 windows
        done.join()


def test_several_windows_of_one_sound_are_scored_at_the_same_time_if_nothing_else_waits() -> None:
    class Counting(Mean):
        most = running = 0

        def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            self.running += 1
            self.most = max(self.most, self.running)
            time.sleep(0.02)
            self.running -= 1
            return super().__call__(waves)

    model = Counting()
    values = np.repeat(np.linspace(0.0, 1.0, 40, dtype=np.float32), RATE)
    with running(Application(model, "mean", jobs=2)) as url:
        answer = httpx.post(url + CLASSIFY, content=encode(values), params={"window": 1}, timeout=60)
    assert model.most == 2
    probs = [piece["tags"][0]["prob"] for piece in answer.json()["pieces"]]
    assert probs == pytest.approx(np.linspace(0.0, 1.0, 40), abs=1e-6)


def test_a_full_queue_is_status_503_with_retry_after() -> None:
    model = Mean()
    with (
        running(Application(model, "mean", limits=Limits(waiting=1))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        model.go.clear()
        senders = Senders(url, [constant(0.5), constant(0.5)])
        until(lambda: metrics(client)["ced_pending_requests"] == 2)
        refused = client.post(CLASSIFY, content=constant(0.5), headers=WAV)
        assert "try again" in error(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        error(client.get("/healthz/ready"), 503)
        assert client.get("/healthz/live").status_code == 200
        model.go.set()
        assert [answer.status_code for answer in senders.answers()] == [200, 200]
        assert client.get("/healthz/ready").status_code == 200
        assert client.post(CLASSIFY, content=constant(0.5), headers=WAV).status_code == 200


def test_slow_uploads_take_no_place_in_the_queue() -> None:
    limits = Limits(waiting=0, patience=1.0, slowest=1_000)
    head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nRIFF".encode()
    with running(Application(Mean(), "mean", limits=limits)) as url, httpx.Client(base_url=url) as client:
        with connected(url) as one, connected(url) as two:
            for slow in (one, two):
                slow.sendall(head)
            time.sleep(0.2)
            assert client.post(CLASSIFY, content=constant(0.5), headers=WAV).status_code == 200
            assert metrics(client)["ced_pending_requests"] == 0
        status, _, body = exchange(url, head.replace(b"localhost\r\n", b"localhost\r\nConnection: close\r\n"))
        assert status == 408
        assert b"too slowly" in body
        sound = constant(0.5, 0.5)

        def slowly() -> Iterator[bytes]:
            for place in range(0, len(sound), 4_000):
                time.sleep(0.2)
                yield sound[place : place + 4_000]

        assert client.post(CLASSIFY, content=slowly(), headers=WAV).status_code == 200  # in 1.6 s


def test_a_body_has_a_deadline_whatever_its_rate() -> None:
    limits = Limits(patience=0.2, slowest=1, deadline=0.5)

    def forever() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield bytes(100)

    with running(Application(Mean(), "mean", limits=limits)) as url:
        began = time.monotonic()
        assert "too slowly" in error(httpx.post(url + CLASSIFY, content=forever(), headers=WAV, timeout=20), 408)
        assert time.monotonic() - began < 10


def test_the_bytes_of_all_uploads_are_limited() -> None:
    limits = Limits(megabytes=0.1, waiting=0)
    head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n".encode()
    app = Application(Mean(), "mean", limits=limits)
    with running(app) as url:
        with connected(url) as one:
            one.sendall(head + bytes(90_000))
            until(lambda: app.service.bodies._held == 90_000)
            assert "try again" in error(httpx.post(url + CLASSIFY, content=bytes(50_000), headers=WAV), 503)
        until(lambda: app.service.bodies._held == 0)
        error(httpx.post(url + CLASSIFY, content=bytes(50_000), headers=WAV), 422)
        assert app.service.bodies._held == 0


def test_uploads_of_one_name_at_the_same_time_are_kept_apart() -> None:
    """As large as those that go to a file."""
    with running(Application(Mean(), "mean", jobs=2)) as url:
        answers: dict[float, httpx.Response] = {}

        def send(value: float) -> None:
            form = {"file": ("same name.wav", constant(value, 60))}
            answers[value] = httpx.post(url + CLASSIFY, files=form, params={"window": 60}, timeout=60)

        threads = [threading.Thread(target=send, args=(number / 10,)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 8
    for value, answer in answers.items():
        assert answer.json()["pieces"][0]["tags"][0]["prob"] == pytest.approx(value, abs=1e-5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_temporary_folder_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    large = constant(0.5, 30)  # more than stays in memory
    app = Application(Mean(), "mean")
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        with monkeypatch.context() as patch:
            patch.setattr("tempfile.TemporaryFile", full)
            for given in ({"content": large, "headers": WAV}, {"files": {"file": ("a.wav", large)}}) * 2:
                assert "no room" in error(client.post(CLASSIFY, **given), 507)
            assert client.post(CLASSIFY, content=constant(0.5), headers=WAV).status_code == 200
        assert client.post(CLASSIFY, content=large, headers=WAV).status_code == 200
        assert metrics(client)["ced_pending_requests"] == 0
    assert app.service.bodies.hold(0)
    assert app.service.bodies._held == 0
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("ced.")]
    assert "temporary folder" in line
    assert "No space left" in line


def test_only_requests_to_tag_are_counted() -> None:
    model = Mean()
    limits = Limits(waiting=0)
    with running(Application(model, "mean", limits=limits)) as url, httpx.Client(base_url=url, timeout=60) as client:
        model.go.clear()
        sender = Senders(url, [constant(0.5)])
        until(lambda: metrics(client)["ced_pending_requests"] == 1)
        assert [client.get(path).status_code for path in ("/healthz/ready", "/nothing", CLASSIFY)] == [503, 404, 405]
        assert client.post(CLASSIFY, content=constant(0.5), headers=WAV, params={"topk": 1}).status_code == 422
        model.go.set()
        assert sender.answers()[0].status_code == 200
        counted = {name: value for name, value in metrics(client).items() if name.startswith("ced_requests_total")}
    assert counted == {'ced_requests_total{status="200"}': 1, 'ced_requests_total{status="422"}': 1}


def test_windows_of_disconnected_clients_are_not_scored() -> None:
    model = Mean()
    with running(Application(model, "mean")) as url, httpx.Client(base_url=url, timeout=60) as client:
        model.lengths.clear()
        model.go.clear()
        with pytest.raises(httpx.ReadTimeout):
            client.post(CLASSIFY, content=constant(0.5, 20), headers=WAV, params={"window": 1}, timeout=0.5)
        until(lambda: metrics(client).get('ced_requests_total{status="499"}') == 1)
        model.go.set()
        until(lambda: metrics(client)["ced_pending_requests"] == 0)
        assert len(model.lengths) == 1  # of 20 windows


def test_uploads_of_disconnected_clients_are_not_decoded() -> None:
    """Decoding the file would take minutes, and every client disconnects early."""
    costly = encode(np.zeros((60 * 700_000, 1), np.float32), "FLAC", "PCM_16", rate=655_350)
    app = Application(Mean(), "mean")
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                client.post(CLASSIFY, content=costly, params={"window": 60}, timeout=0.1)
        began = time.monotonic()
        until(lambda: metrics(client)["ced_pending_requests"] == 0)
        assert time.monotonic() - began < 2


def test_running_requests_are_answered_at_shutdown() -> None:
    model = Mean()
    with running(Application(model, "mean")) as url:
        model.go.clear()
        senders = Senders(url, [constant(0.25)])
        until(lambda: len(model.lengths) == 2)
        threading.Timer(0.5, model.go.set).start()
    (answer,) = senders.answers()
    assert answer.json()["pieces"][0]["tags"][0] == {"label": "loud", "index": 0, "mid": None, "prob": 0.25}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz/live")


def test_waiting_requests_are_refused_at_shutdown() -> None:
    model = Mean()
    app = Application(model, "mean")
    with running(app) as url, httpx.Client(base_url=url) as client:
        model.go.clear()
        begun = Senders(url, [constant(0.25)])
        until(lambda: len(model.lengths) == 2)
        waiting = Senders(url, [constant(0.5), constant(0.75)])
        until(lambda: metrics(client)["ced_pending_requests"] == 3)

        def release() -> None:
            waiting.answers()  # which arrive while the model waits
            model.go.set()

        threading.Thread(target=release).start()
    assert [error(each, 503) for each in waiting.answers()] == [DOWN, DOWN]
    assert waiting.answers()[0].headers["retry-after"] == "1"
    assert begun.answers()[0].status_code == 200


def test_requests_longer_than_the_grace_period_are_status_503(caplog: pytest.LogCaptureFixture) -> None:
    model = Mean()
    app = Application(model, "mean")
    with running(app, grace=1) as url:
        model.go.clear()
        begun = Senders(url, [constant(0.25)])
        until(lambda: len(model.lengths) == 2)
    assert [error(each, 503) for each in begun.answers()] == [DOWN]
    assert 'ced_requests_total{status="503"} 1.0' in app.service.metrics.report().decode()
    assert "Traceback" not in caplog.text
    model.go.set()


class Embedding(Mean):
    """Returns a long embedding of each wave, and counts the waves that are still in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.waves: list[weakref.ref[Any]] = []
        self.most = 0

    def embed(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        self.waves.append(weakref.ref(waves if waves.base is None else waves.base))
        self.most = max(self.most, sum(wave() is not None for wave in self.waves))
        return np.full((1, 1000), np.abs(waves).mean(), np.float32)


@pytest.mark.parametrize("kind", ["clip", "windows"])
@pytest.mark.parametrize("path", [CLASSIFY, STREAM])
def test_embeddings_keep_no_samples(kind: str, path: str) -> None:
    model = Embedding()
    with running(Application(model, "mean")) as url:
        options = {"embeddings": kind, "window": "1"}
        answer = httpx.post(url + path, content=constant(0.5, 60), params=options, headers=WAV, timeout=60)
        assert answer.status_code == 200
    assert len(model.waves) > 60
    assert model.most < 10


def test_embeddings_count_for_the_length_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ced.serve.answers._LONGEST_ANSWER", 200_000)
    with running(Application(Embedding(), "mean")) as url:
        options = {"embeddings": "windows", "window": "1"}  # of 21 kB each
        answer = httpx.post(url + CLASSIFY, content=constant(0.123, 15), params=options, headers=WAV, timeout=60)
        assert "/v1/audio/stream" in error(answer, 413)
        answer = httpx.post(url + CLASSIFY, content=constant(0.123, 8), params=options, headers=WAV, timeout=60)
        assert len(answer.json()["embeddings"]) == 8


def test_on_an_accelerator_windows_of_all_requests_share_calls() -> None:
    class Accelerated(Mean):
        accelerated = True
        calls: list[int]

        def __init__(self) -> None:
            super().__init__()
            self.calls, self.threads = [], set[str]()

        def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            self.calls.append(len(waves))
            self.threads.add(threading.current_thread().name)
            return np.concatenate([super(Accelerated, self).__call__(wave[None]) for wave in waves])

    model = Accelerated()
    app = Application(model, "mean", batch=4)
    calls = app.service.scorer._calls
    assert calls is not None
    with running(app) as url:
        model.calls.clear()
        model.go.clear()
        first = Senders(url, [constant(0.75, 1)])
        until(lambda: len(model.calls) == 1)
        rest = Senders(url, [constant(level, 1) for level in (0.1, 0.2, 0.3, 0.4, 0.5)])
        until(lambda: len(calls._waiting) == 5)
        model.go.set()
        probs = [answer.json()["pieces"][0]["tags"][0]["prob"] for answer in first.answers() + rest.answers()]
    assert probs == pytest.approx([0.75, 0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-4)
    assert model.calls == [1, 4, 1]
    assert model.threads == {"accelerator"}
