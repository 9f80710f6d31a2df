"""The server as clients meet it: a real one on a loopback port, with a small graph or a model made for the purpose."""

import io
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client import generate_latest
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ced.model.config import ModelConfig
from ced.model.graph.export import export
from ced.model.loading import weights_of
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.sound.labels import ClassTable
from ced.tag.api import PATH
from ced.tag.events import events
from ced.tag.intake import Limits
from ced.tag.records import Record
from ced.tag.select import Selection
from ced.tag.server import Application, Server
from ced.tag.tagger import Tagger

RATE = 16_000
EXAMPLES = int(os.environ.get("CED_FUZZ_EXAMPLES", "25"))  # that are tried of each kind of request
WAV = {"content-type": "audio/wav"}
FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
ODD_FORM = b'--x\r\nContent-Disposition: form-data; name="\xff.."\r\n\r\n\r\n--x--'


class Mean:
    """Scores a wave by its mean and half of it; it can be held up, and then has so many waves in it at once."""

    labels = ClassTable(("loud", "half"))
    at_once = 10 * RATE

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.calls: list[int] = []

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        self.calls.append(len(waves))
        assert self.go.wait(60)
        mean = waves.mean(1)
        return np.stack([mean, mean / 2], axis=1)


@contextmanager
def running(app: Application, grace: int = 60) -> Iterator[str]:
    """Run a server in a thread, and give its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app, grace=grace)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of three classes, as a graph."""
    torch.manual_seed(0)
    network = CED(
        ModelConfig(embed_dim=32, num_heads=2, depth=1, outputdim=3, target_length=112),
        ClassTable(("bark", "bell", "rain")),
    ).eval()
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    export(weights_of(network), path)
    return path


@pytest.fixture(scope="module")
def address(graph: Path) -> Iterator[str]:
    """A server of the small graph that lets in a megabyte and a minute."""
    with running(Application(OnnxModel(graph), "small", limits=Limits(megabytes=1, seconds=60))) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def wave(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def file(samples: NDArray[np.float32], kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    held = io.BytesIO()
    soundfile.write(held, samples, RATE, format=kind, subtype=subtype)
    return held.getvalue()


def level(value: float, seconds: float = 1.0) -> bytes:
    return file(np.full(round(seconds * RATE), value, np.float32))


def error(answer: httpx.Response, status: int) -> str:
    """Return the one line of an error of this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    line = answer.json()["error"]
    assert line
    assert "\n" not in line
    assert isinstance(line, str)
    return line


def test_a_file_has_the_record_that_the_tagger_gives(client: httpx.Client, graph: Path) -> None:
    sound = wave(2.5)
    answer = client.post(PATH, files={"file": ("a.wav", file(sound))}, params={"top_k": 2, "window": 1, "hop": 0.5})
    assert answer.status_code == 200
    expected = tuple(Tagger(graph).tag((sound, RATE), top_k=2, window=1.0, hop=0.5))
    assert Record.from_json(answer.json()) == Record("a.wav", "small", 2.5, expected, expected_seconds=2.5, rate=RATE)


def test_a_raw_body_and_samples_are_heard_as_a_form_is(client: httpx.Client) -> None:
    stereo = np.round(np.stack([wave(1.2), wave(1.2, 1)], axis=1) * 32_767).astype(np.int16)
    scaled = (stereo / 32_768).astype(np.float32)
    wav = file(scaled)
    expected = client.post(PATH, files={"file": ("x", wav)}).json()["pieces"]
    for kind, body in (
        ("audio/wav", wav),
        ("application/octet-stream", wav),
        ("audio/L16; rate=16000; channels=2", stereo.astype(">i2").tobytes()),
        ("audio/pcm; rate=16000; channels=2", stereo.astype("<i2").tobytes()),
        ('audio/pcm;format=f32le; rate="16000";channels=2', scaled.astype("<f4").tobytes()),
    ):
        answer = client.post(PATH, content=body, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        assert answer.json()["file"] == "body"
        assert answer.json()["pieces"] == expected
    nameless = client.build_request("POST", PATH, content=wav)  # no type at all
    assert client.send(nameless).json()["pieces"] == expected


def test_thresholds_labels_events_and_embeddings(client: httpx.Client, graph: Path) -> None:
    sound, tagger = wave(3), Tagger(graph)
    body = file(sound)

    def ask(**options: object) -> dict[str, object]:
        answer = client.post(PATH, content=body, headers=WAV, params=options)  # type: ignore[arg-type]
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    scores = list(tagger.score((sound, RATE), window=1.0))
    middle = float(np.median([scored.probs for scored in scores]))
    kept = Selection(tagger.labels, top_k=None, thresholds=middle, exclude=["bell"])
    found = Record.from_json(ask(threshold=middle, window=1, exclude="bell"))
    assert found.pieces == tuple(map(kept.tags, scores))
    only = Selection(tagger.labels, thresholds=middle, only=["rain", "bark"])
    merged = ask(threshold=middle, window=1, labels=["rain", "bark"], events=True, gap=0.5)
    assert Record.from_json(merged).pieces == tuple(events(scores, only, gap=0.5))
    embedding = tagger.embed((sound, RATE), window=2.0)
    assert "embeddings" not in merged
    assert ask(embeddings="clip", window=2)["embeddings"] == [
        {"start": 0.0, "end": 3.0, "vector": embedding.clip.tolist()}
    ]
    assert ask(embeddings="windows", window=2)["embeddings"] == [
        {"start": start, "end": end, "vector": vector.tolist()}
        for start, end, vector in zip(embedding.starts, embedding.ends, embedding.vectors, strict=True)
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k: "),
        ({"threshold": "nan"}, "threshold: "),
        ({"threshold": 1.1}, "threshold: "),
        ({"window": "x"}, "window: "),
        ({"hop": 0.001}, "hop: "),
        ({"embeddings": "all"}, "embeddings: "),
        ({"topk": 3}, "there is no option topk"),
        ({f"o{number}": 1 for number in range(30)}, "there is no option o9; and 20 more faults"),
        ({"top_k": [1, 2]}, "top_k is given 2 times; it has one value"),
        ({"window": 1, "hop": 2}, "hop is 2.0 s, window 1.0 s"),
        ({"events": True, "top_k": 3}, "top_k 3 does not apply to events"),
        ({"release": 0.4}, "release, gap and shortest are options of events"),
        ({"labels": "barks"}, "did you mean 'bark'"),
        ({"rollup": True}, "roll-up needs classes with AudioSet's mids"),
    ],
)
def test_options_that_cannot_be(client: httpx.Client, options: dict[str, Any], said: str) -> None:
    assert said in error(client.post(PATH, content=level(0.5), headers=WAV, params=options), 422)


def wav_header(rate: int, channels: int, size: int) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, min(rate * channels * 2, 2**32 - 1), channels * 2 % 65_536, 16)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data"


@pytest.mark.parametrize(
    ("kind", "body", "status", "said"),
    [
        ("audio/wav", b"", 422, "the body is empty"),
        ("audio/wav", b"no sound at all", 422, "body: cannot be decoded"),
        ("audio/wav", level(0.5)[:-100], 422, "body: cut short"),
        ("audio/wav", file(np.array([0.5, np.nan], np.float32)), 422, "not finite"),
        ("audio/wav", wav_header(2**31, 1, 8) + struct.pack("<I", 8) + bytes(8), 422, "body"),
        ("audio/wav", wav_header(1, 1, 200) + struct.pack("<I", 200) + bytes(200), 422, "1 Hz"),
        ("text/plain", b"abc", 415, "a body of type text/plain is no sound"),
        ("application/json", b"{}", 415, "application/json"),
        ("", b"abc", 422, "body: cannot be decoded"),
        ("nonsense", b"abc", 415, "no sound"),
        ("audio/L16", bytes(4), 422, "audio/l16 needs rate="),
        ("audio/L16; rate=0", bytes(4), 422, "rate=1000 to 768000"),
        ("audio/L16; rate=16000; channels=65", bytes(130), 422, "channels=1 to 64"),
        ("audio/L16; rate*=utf-8''x", bytes(4), 422, "rate="),
        ("audio/L16; rate*=x; rate*0=y", bytes(4), 422, "the parameters of audio/l16 cannot be read"),
        ("audio/L16; rate*" + "9" * 5000 + "=x", bytes(4), 422, "the parameters of audio/l16 cannot be read"),
        ("audio/pcm; rate=16000; format*=utf-8''u8", bytes(4), 422, "no format u8; there is"),
        ("audio/pcm; rate=16000; format=u8", bytes(4), 422, "no format u8; there is s16le and f32le"),
        ("audio/pcm; rate=16000", bytes(3), 422, "no multiple of the 2 of a frame"),
        (
            "audio/pcm; rate=16000; format=f32le",
            np.float32(np.inf).tobytes(),
            422,
            "body: samples that are not finite",
        ),
        ("audio/pcm; rate=16000; format=f32le", np.float32(1e20).tobytes(), 422, "a sample of 1e+20 at 0.000 s"),
        ("audio/pcm; rate=768000", bytes(2), 422, "body: too short"),
        ("multipart/form-data", b"abc", 422, "boundary"),
        ("multipart/form-data; boundary=x", b"abc", 422, "a form has one field, 'file'"),
        ("multipart/form-data; boundary=x", FORM + level(0.5), 422, "the form is cut short; a form has one field"),
        ("multipart/form-data; boundary=x", FORM + b"\r\n--x--", 422, "a.wav is empty (0 bytes)"),
        ("multipart/form-data; boundary=x; charset=idna", ODD_FORM, 422, "a form"),
        ("audio/wav", bytes(1_000_001), 413, "the body is larger than 1 MB"),
        ("multipart/form-data; boundary=x", bytes(1_000_001), 413, "the body is larger than 1 MB"),
    ],
    ids=lambda value: "body" if isinstance(value, bytes) else None,  # libsndfile writes the time into some files
)
def test_bodies_that_are_no_sound(client: httpx.Client, kind: str, body: bytes, status: int, said: str) -> None:
    assert said in error(client.post(PATH, content=body, headers={"content-type": kind} if kind else {}), status)


def test_forms_have_one_file(client: httpx.Client) -> None:
    for files, fields in (
        ({"sound": level(0.5)}, {}),
        ({"file": level(0.5), "other": level(0.5)}, {}),
        ({"file": level(0.5)}, {"top_k": "3"}),
        ({"x": level(0.5)}, {"file": "a plain field"}),
    ):
        assert error(client.post(PATH, files=files, data=fields), 422).startswith("a form has one field, 'file'")


def test_names_are_fit_for_logs(client: httpx.Client) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a\x1b[1m\tb.wav"\r\n\r\n'
    form = head + level(0.5) + b"\r\n--x--"
    answer = client.post(PATH, content=form, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.json()["file"] == "a[1mb.wav"


def test_uploads_are_never_written_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # where a form of more than a megabyte would go
    with running(Application(Mean(), "mean")) as url:
        answer = httpx.post(url + PATH, files={"file": level(0.5, 60)}, timeout=60)
    assert answer.json()["seconds"] == 60


def test_a_body_without_a_length_is_bounded_too(client: httpx.Client) -> None:
    parts = (bytes(100_000) for _ in range(50))
    assert "larger than 1 MB" in error(client.post(PATH, content=parts, headers=WAV), 413)
    sound = level(0.5)
    whole = (sound[place : place + 1000] for place in range(0, len(sound), 1000))
    assert client.post(PATH, content=whole, headers=WAV).status_code == 200


def test_what_is_too_long_to_hear_is_refused_before_it_is_scored(client: httpx.Client) -> None:
    sound = file(wave(59), "FLAC", "PCM_16")[:]
    small = file(np.zeros(61 * RATE, np.float32), "FLAC", "PCM_16")
    assert client.post(PATH, content=file(np.zeros(59 * RATE, np.float32), "FLAC", "PCM_16")).status_code == 200
    assert len(sound) > 1_000_000
    assert "longer than 60 s" in error(client.post(PATH, content=small), 413)
    half = file(np.zeros(30 * RATE, np.float32), "FLAC", "PCM_16")
    assert "291 windows of 1 s are 291 s to listen to" in error(
        client.post(PATH, content=half, params={"window": 1, "hop": 0.1}), 413
    )


def test_paths_methods_and_pages(client: httpx.Client) -> None:
    error(client.get("/v1/audio"), 404)
    wrong = client.get(PATH)
    error(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    assert client.get("/healthz/live").json() == client.get("/healthz/ready").json() == {"status": "ok"}
    assert [client.head(f"/healthz/{name}").status_code for name in ("live", "ready")] == [200, 200]
    page = client.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "://" not in page.text  # nothing from elsewhere
    assert "Least probability; none, or 0.5 for events." in page.text
    assert client.get("/openapi.json").json()["paths"].keys() == {PATH, "/healthz/live", "/healthz/ready"}


def metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def until(true: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


class Senders:
    """Requests that go on beside the test, each in a thread; their answers in order."""

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        self._answers: list[httpx.Response | None] = [None] * len(bodies)
        self._threads = [
            threading.Thread(target=self._send, args=(url, place, body)) for place, body in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, url: str, place: int, body: bytes) -> None:
        self._answers[place] = httpx.post(url + PATH, content=body, headers=WAV, timeout=60)

    def answers(self) -> list[httpx.Response]:
        for thread in self._threads:
            thread.join()
        return [answer for answer in self._answers if answer is not None]


def test_waves_that_wait_are_scored_together_and_each_gets_its_own() -> None:
    model = Mean()
    app = Application(model, "mean")
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert metrics(client)["ced_call_windows_count"] == 0  # the one that warms up is nobody's
        model.calls.clear()
        model.go.clear()
        first = Senders(url, [level(0.9)])
        until(lambda: model.calls == [1])
        rest = Senders(url, [level(0.1), level(0.2), level(0.3), level(0.4, 0.5)])
        until(lambda: len(app._service._model._waiting) == 4)
        model.go.set()
        answers = first.answers() + rest.answers()
        said = [[tag["prob"] for tag in answer.json()["pieces"][0]["tags"]] for answer in answers]
        for probs, mean in zip(said, (0.9, 0.1, 0.2, 0.3, 0.4), strict=True):
            assert probs == pytest.approx([mean, mean / 2], abs=1e-6)
        assert sorted(model.calls) == [1, 1, 3]
        found = metrics(client)
        assert (found["ced_call_windows_count"], found["ced_call_windows_sum"]) == (3, 5)
        assert found['ced_requests_total{status="200"}'] == found["ced_request_seconds_count"] == 5
        assert found["ced_sound_seconds_total"] == 4.5


def test_a_full_queue_says_when_to_come_back() -> None:
    model = Mean()
    with (
        running(Application(model, "mean", limits=Limits(waiting=1))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        model.go.clear()
        senders = Senders(url, [level(0.5), level(0.5)])
        until(lambda: metrics(client)["ced_pending_requests"] == 2)
        refused = client.post(PATH, content=level(0.5), headers=WAV)
        assert "try again" in error(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        assert error(client.get("/healthz/ready"), 503)
        assert client.get("/healthz/live").status_code == 200
        model.go.set()
        assert [answer.status_code for answer in senders.answers()] == [200, 200]
        assert client.get("/healthz/ready").status_code == 200
        assert client.post(PATH, content=level(0.5), headers=WAV).status_code == 200


def test_a_client_that_asks_too_often_is_told_when_to_come_back() -> None:
    limits = Limits(a_minute=2)
    with running(Application(Mean(), "mean", limits=limits)) as url, httpx.Client(base_url=url, timeout=60) as client:
        options: list[dict[str, int]] = [{}, {"topk": 1}, {}]  # those that cannot be are counted, too
        answers = [client.post(PATH, content=level(0.5), headers=WAV, params=each) for each in options]
        assert [answer.status_code for answer in answers] == [200, 422, 429]
        assert "2 requests a minute" in error(answers[2], 429)
        assert 25 <= int(answers[2].headers["retry-after"]) <= 30
        assert client.get("/healthz/ready").status_code == 200


def test_a_body_that_does_not_come_gives_its_place_back() -> None:
    limits = Limits(waiting=0, patience=0.3, slowest=1_000)
    with running(Application(Mean(), "mean", limits=limits)) as url:
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nRIFF".encode())
            said = slow.makefile("rb").read()
        assert said.startswith(b"HTTP/1.1 408")
        assert b"the body came too slowly; it may take 0.3 s, and a second more for every 1 kB" in said
        assert httpx.post(url + PATH, content=level(0.5), headers=WAV).status_code == 200
        sound = level(0.5, 0.5)

        def slowly() -> Iterator[bytes]:
            for place in range(0, len(sound), 4_000):
                time.sleep(0.1)
                yield sound[place : place + 4_000]

        assert httpx.post(url + PATH, content=slowly(), headers=WAV).status_code == 200  # in 0.9 s


def test_a_connection_ends_with_what_is_refused_unread(client: httpx.Client) -> None:
    for headers, options, status in (
        (WAV | {"content-length": "1000001"}, "", 413),
        (WAV | {"content-length": "9"}, "?topk=3", 422),
        ({"content-type": "text/plain", "content-length": "9"}, "", 415),
        (WAV | {"transfer-encoding": "chunked"}, "?topk=3", 422),
    ):
        address = (client.base_url.host, client.base_url.port or 80)
        with socket.create_connection(address, timeout=20) as sender:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            sender.sendall(f"POST {PATH}{options} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())
            said = sender.makefile("rb").read()  # to the end of the connection
        assert said.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"connection: close\r\n" in said.lower()
    with socket.create_connection(address, timeout=20) as sender:
        sender.sendall(f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n".encode())
        end = time.monotonic() + 20

        def send_on() -> None:
            while time.monotonic() < end:
                sender.sendall(bytes(100_000))

        with pytest.raises(ConnectionError):
            send_on()  # which is not read without end
    kept = client.post(PATH, content=b"abc", headers=WAV)
    assert kept.status_code == 422
    assert "connection" not in kept.headers


def test_only_requests_to_tag_are_counted() -> None:
    model = Mean()
    limits = Limits(waiting=0)
    with running(Application(model, "mean", limits=limits)) as url, httpx.Client(base_url=url, timeout=60) as client:
        model.go.clear()
        sender = Senders(url, [level(0.5)])
        until(lambda: metrics(client)["ced_pending_requests"] == 1)
        assert [client.get(path).status_code for path in ("/healthz/ready", "/nothing", PATH)] == [503, 404, 405]
        assert client.post(PATH, content=level(0.5), headers=WAV, params={"topk": 1}).status_code == 422
        model.go.set()
        assert sender.answers()[0].status_code == 200
        counted = {name: value for name, value in metrics(client).items() if name.startswith("ced_requests_total")}
    assert counted == {'ced_requests_total{status="200"}': 1, 'ced_requests_total{status="422"}': 1}


def test_what_nobody_waits_for_is_not_scored() -> None:
    model = Mean()
    with running(Application(model, "mean")) as url, httpx.Client(base_url=url, timeout=60) as client:
        model.calls.clear()
        model.go.clear()
        with pytest.raises(httpx.ReadTimeout):
            client.post(PATH, content=level(0.5, 20), headers=WAV, params={"window": 1}, timeout=0.5)
        until(lambda: metrics(client).get('ced_requests_total{status="499"}') == 1)
        model.go.set()
        until(lambda: metrics(client)["ced_pending_requests"] == 0)
        assert model.calls == [1]  # of 20 windows


def test_a_model_that_fails_is_the_servers_fault(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Mean):
        def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            if self.calls:
                raise RuntimeError("a secret of the server")
            return super().__call__(waves)

    with running(Application(Broken(), "broken")) as url:
        answer = httpx.post(url + PATH, content=level(0.5), headers=WAV)
        assert error(answer, 500) == "the server failed; its log says why"
        assert "a secret of the server" in caplog.text
        answer = httpx.post(url + PATH, content=level(0.5), headers=WAV, params={"embeddings": "clip"})
        assert error(answer, 422) == "the model broken gives no embeddings"


def test_stopping_ends_what_was_begun() -> None:
    model = Mean()
    with running(Application(model, "mean")) as url:
        model.go.clear()
        senders = Senders(url, [level(0.25)])
        until(lambda: len(model.calls) == 2)
        threading.Timer(0.5, model.go.set).start()
    (answer,) = senders.answers()
    assert answer.json()["pieces"][0]["tags"][0] == {"label": "loud", "index": 0, "mid": None, "prob": 0.25}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz/live")


DOWN = "the server is going down; try again soon"


def test_stopping_refuses_at_once_what_only_waits() -> None:
    model = Mean()
    app = Application(model, "mean")
    with running(app) as url:
        model.go.clear()
        begun = Senders(url, [level(0.25)])
        until(lambda: len(model.calls) == 2)
        waiting = Senders(url, [level(0.5), level(0.75)])
        until(lambda: len(app._service._model._waiting) == 2)

        def go_on() -> None:
            waiting.answers()  # which come while the model is held up
            model.go.set()

        threading.Thread(target=go_on).start()
    assert [error(each, 503) for each in waiting.answers()] == [DOWN, DOWN]
    assert waiting.answers()[0].headers["retry-after"] == "1"
    assert begun.answers()[0].status_code == 200


def test_what_is_not_answered_when_the_server_ends_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    model = Mean()
    app = Application(model, "mean")
    with running(app, grace=1) as url:
        model.go.clear()
        begun = Senders(url, [level(0.25)])
        until(lambda: len(model.calls) == 2)
    assert [error(each, 503) for each in begun.answers()] == [DOWN]
    assert 'ced_requests_total{status="503"} 1.0' in generate_latest(app.meters.registry).decode()
    assert "Traceback" not in caplog.text
    model.go.set()


schemathesis.openapi.media_type("audio/*", st.sampled_from([level(0.5), file(wave(1.5), "OGG", "VORBIS"), b"RIFF"]))


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (PATH, GenerationMode.POSITIVE),
        (PATH, GenerationMode.NEGATIVE),
        ("/healthz/live", GenerationMode.POSITIVE),
        ("/healthz/ready", GenerationMode.POSITIVE),
    ],
)
def test_the_server_keeps_to_its_own_description(address: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operation = schema[path]["get" if path != PATH else "post"]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case[Any]) -> None:
        # What the schema allows may be refused: it cannot say which bytes are a sound, or which options go together.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
