"""Requests and answers, against a real server on a loopback port."""

import struct
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ced.serve.app import Application
from ced.serve.schema import CLASSIFY, MODEL, STREAM
from ced.tag.events import events
from ced.tag.records import Record
from ced.tag.select import Selection
from ced.tag.tagger import Tagger
from tests.serve.served import RATE, WAV, Mean, constant, encode, error, noise, running, stream

FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
ODD_FORM = b'--x\r\nContent-Disposition: form-data; name="\xff.."\r\n\r\n\r\n--x--'


def test_the_answer_is_the_record_of_the_tagger(client: httpx.Client, graph: Path) -> None:
    sound = noise(2.5)
    answer = client.post(
        CLASSIFY, files={"file": ("a.wav", encode(sound))}, params={"top_k": 2, "window": 1, "hop": 0.5}
    )
    assert answer.status_code == 200
    expected = Tagger(graph, name="small").tag((sound, RATE), top_k=2, window=1.0, hop=0.5, name="a.wav")
    values = answer.json()
    assert values.pop("warnings") == []
    assert Record.from_json(values) == expected
    assert list(values) == list(expected.to_json())


def test_forms_raw_bodies_and_samples_give_the_same_tags(client: httpx.Client) -> None:
    stereo = np.round(np.stack([noise(1.2), noise(1.2, 1)], axis=1) * 32_767).astype(np.int16)
    scaled = (stereo / 32_768).astype(np.float32)
    wav = encode(scaled)
    expected = client.post(CLASSIFY, files={"file": ("x", wav)}).json()["pieces"]
    for kind, body in (
        ("audio/wav", wav),
        ("application/octet-stream", wav),
        ("audio/L16; rate=16000; channels=2", stereo.astype(">i2").tobytes()),
        ("audio/pcm; rate=16000; channels=2", stereo.astype("<i2").tobytes()),
        ('audio/pcm;format=f32le; rate="16000";channels=2', scaled.astype("<f4").tobytes()),
    ):
        answer = client.post(CLASSIFY, content=body, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        assert answer.json()["file"] == "body"
        assert answer.json()["pieces"] == expected
    nameless = client.build_request("POST", CLASSIFY, content=wav)  # no type at all
    assert client.send(nameless).json()["pieces"] == expected


def test_thresholds_labels_events_channels_and_embeddings(client: httpx.Client, graph: Path) -> None:
    sound, tagger = noise(3), Tagger(graph)
    body = encode(sound)

    def ask(body: bytes = body, **options: object) -> dict[str, Any]:
        answer = client.post(CLASSIFY, content=body, headers=WAV, params=options)  # type: ignore[arg-type]
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
    assert merged["kind"] == "events"
    assert "embeddings" not in merged
    left = ask(encode(np.stack([sound, noise(3, 1)], axis=1)), channel="left", window=1, threshold=middle)
    assert left["pieces"] == ask(threshold=middle, window=1)["pieces"]
    embedding = tagger.embed((sound, RATE), window=2.0)
    (clip,) = ask(embeddings="clip", window=2)["embeddings"]
    assert (clip["start"], clip["end"]) == (0.0, 3.0)
    assert clip["vector"] == embedding.clip.tolist()
    assert ask(embeddings="windows", window=2)["embeddings"] == [
        {"start": start, "end": end, "vector": vector.tolist()}
        for start, end, vector in zip(embedding.starts, embedding.ends, embedding.vectors, strict=True)
    ]


@pytest.mark.parametrize("path", [CLASSIFY, STREAM])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k: "),
        ({"threshold": "nan"}, "threshold: "),
        ({"threshold": 1.1}, "threshold: "),
        ({"window": "x"}, "window: "),
        ({"hop": 0.001}, "hop: "),
        ({"embeddings": "all"}, "embeddings: "),
        ({"channel": "0"}, "channel: "),
        ({"topk": 3}, "no option topk"),
        ({"query": 3}, "no option query"),
        ({f"o{number}": 1 for number in range(30)}, "and 20 more faults"),
        ({"top_k": [1, 2]}, "top_k is given 2 times"),
        ({"window": 1, "hop": 2}, "longer hop"),
        ({"events": True, "top_k": 3}, "does not apply to events"),
        ({"release": 0.4}, "options of events"),
        ({"labels": "barks"}, "did you mean 'bark'"),
        ({"rollup": True}, "AudioSet's mids"),
    ],
)
def test_invalid_options_are_refused(client: httpx.Client, path: str, options: dict[str, Any], words: str) -> None:
    assert words in error(client.post(path, content=constant(0.5), headers=WAV, params=options), 422)


def wav_header(rate: int, channels: int, size: int) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, min(rate * channels * 2, 2**32 - 1), channels * 2 % 65_536, 16)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data"


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("audio/wav", b"", 422, "empty"),
        ("audio/wav", b"no sound at all", 422, "body: cannot be decoded"),
        ("audio/wav", encode(np.array([0.5, np.nan], np.float32)), 422, "not finite"),
        ("audio/wav", wav_header(2**31, 1, 8) + struct.pack("<I", 8) + bytes(8), 422, "body"),
        ("audio/wav", wav_header(1, 1, 200) + struct.pack("<I", 200) + bytes(200), 422, "1 Hz"),
        ("text/plain", b"abc", 415, "a body of type text/plain is not a sound"),
        ("application/json", b"{}", 415, "application/json"),
        ("", b"abc", 422, "body: cannot be decoded"),
        ("nonsense", b"abc", 415, "not a sound"),
        ("audio/L16", bytes(4), 422, "audio/l16 needs rate="),
        ("audio/L16; rate=0", bytes(4), 422, "rate=1000 to 768000"),
        ("audio/L16; rate=16000; channels=65", bytes(130), 422, "channels=1 to 64"),
        ("audio/L16; rate*=utf-8''x", bytes(4), 422, "rate="),
        ("audio/L16; rate*=x; rate*0=y", bytes(4), 422, "the parameters of audio/l16 cannot be read"),
        ("audio/L16; rate*" + "9" * 5000 + "=x", bytes(4), 422, "the parameters of audio/l16 cannot be read"),
        ("audio/pcm; rate=16000; format*=utf-8''u8", bytes(4), 422, "no format u8"),
        ("audio/pcm; rate=16000; format=u8", bytes(4), 422, "known formats: s16le, f32le"),
        ("audio/pcm; rate=16000", bytes(3), 422, "not a multiple of the 2 bytes of a frame"),
        ("audio/pcm; rate=16000; format=f32le", np.float32(np.inf).tobytes(), 422, "not finite"),
        ("audio/pcm; rate=16000; format=f32le", np.float32(1e20).tobytes(), 422, "1e+20"),
        ("audio/pcm; rate=768000", bytes(2), 422, "body: too short"),
        ("multipart/form-data", b"abc", 422, "boundary"),
        ("multipart/form-data; boundary=x", b"abc", 422, "a form has one field, 'file'"),
        ("multipart/form-data; boundary=x", FORM + constant(0.5), 422, "a form has one field, 'file'"),
        ("multipart/form-data; boundary=x", FORM + b"\r\n--x--", 422, "a.wav is empty (0 bytes)"),
        ("multipart/form-data; boundary=x; charset=idna", ODD_FORM, 422, "a form"),
        ("audio/wav", bytes(1_000_001), 413, "the body is larger than 1 MB"),
        ("multipart/form-data; boundary=x", bytes(1_000_001), 413, "the body is larger than 1 MB"),
    ],
    ids=lambda value: "body" if isinstance(value, bytes) else None,  # libsndfile writes the time into some files
)
def test_bodies_that_are_not_sounds_are_refused(
    client: httpx.Client, kind: str, body: bytes, status: int, words: str
) -> None:
    for path in (CLASSIFY, STREAM):
        assert words in error(client.post(path, content=body, headers={"content-type": kind} if kind else {}), status)


def test_a_file_that_is_cut_short_is_tagged_as_far_as_it_goes(client: httpx.Client) -> None:
    whole = constant(0.5, 3)
    cut = whole[: len(whole) - 2 * 4 * RATE]
    answer = client.post(CLASSIFY, content=cut, headers=WAV, params={"window": 1}).json()
    assert (answer["seconds"], len(answer["pieces"]), answer["complete"]) == (1.0, 1, False)
    assert any("cut short" in each for each in answer["warnings"])
    last = stream(client, cut, window=1)[-1]
    assert (last["type"], last["seconds"], last["complete"]) == ("end", 1.0, False)
    assert last["warnings"] == answer["warnings"]
    assert "cut short" in error(client.post(CLASSIFY, content=cut, headers=WAV, params={"strict": True}), 422)


def test_forms_have_one_file(client: httpx.Client) -> None:
    for files, fields in (
        ({"sound": constant(0.5)}, {}),
        ({"file": constant(0.5), "other": constant(0.5)}, {}),
        ({"file": constant(0.5)}, {"top_k": "3"}),
        ({"x": constant(0.5)}, {"file": "a plain field"}),
    ):
        assert "a form has one field, 'file'" in error(client.post(CLASSIFY, files=files, data=fields), 422)


def test_file_names_have_no_control_characters_and_never_become_paths(client: httpx.Client) -> None:
    for name, expected in (
        (b"a\x1b[1m\tb.wav", "a[1mb.wav"),
        (b"../../../etc/passwd", "../../../etc/passwd"),
        (b"x" * 1000, "x" * 255),
        (b"", "file"),
    ):
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n'
        form = head + constant(0.5) + b"\r\n--x--"
        answer = client.post(CLASSIFY, content=form, headers={"content-type": "multipart/form-data; boundary=x"})
        assert answer.json()["file"] == expected


def test_too_long_sounds_are_refused_before_they_are_scored(client: httpx.Client) -> None:
    def flac(seconds: int) -> bytes:
        return encode(np.zeros(seconds * RATE, np.float32), "FLAC", "PCM_16")

    assert client.post(CLASSIFY, content=flac(59)).status_code == 200
    assert "longer than 60 s" in error(client.post(CLASSIFY, content=flac(61)), 413)
    overlapping = {"window": 1, "hop": 0.1}  # 291 windows of a second
    assert "more than 60 s to score" in error(client.post(CLASSIFY, content=flac(30), params=overlapping), 413)
    assert "more than 60 s to score" in error(client.post(CLASSIFY, content=flac(30), params={"window": 0.3}), 413)


def test_the_limit_of_decoding_counts_samples_of_all_channels(client: httpx.Client) -> None:
    wide = encode(np.zeros((60_000, 8), np.float32), "FLAC", "PCM_16", rate=1_000)  # 60 s of 8 channels
    assert client.post(CLASSIFY, content=wide).status_code == 200
    costly = encode(np.zeros((35 * 655_350, 2), np.float32), "FLAC", "PCM_16", rate=655_350)
    assert len(costly) < 1_000_000
    assert "too much to decode" in error(client.post(CLASSIFY, content=costly), 413)


def test_paths_methods_and_pages(client: httpx.Client) -> None:
    error(client.get("/v1/audio"), 404)
    wrong = client.get(CLASSIFY)
    error(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    assert client.get("/healthz/live").json() == client.get("/healthz/ready").json() == {"status": "ok"}
    assert [client.head(f"/healthz/{name}").status_code for name in ("live", "ready")] == [200, 200]
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/docs").headers["content-type"].startswith("text/html")
    described = client.get("/openapi.json").json()["paths"]
    assert described.keys() == {CLASSIFY, STREAM, MODEL, "/healthz/live", "/healthz/ready"}
    for path in ("/../app.py", "/vendor/../../app.py", "/%2e%2e/app.py", "//etc/passwd"):
        assert client.get(httpx.URL(client.base_url, raw_path=path.encode())).status_code == 404


def test_the_model_is_described(client: httpx.Client) -> None:
    found = client.get(MODEL).json()
    assert [label["name"] for label in found["labels"]] == ["bark", "bell", "rain"]
    assert (found["model"], found["columns"], found["embeddings"]) == ("small", True, True)
    assert found["limits"] == {"megabytes": 1, "seconds": 60, "waiting": 16, "live": 4}
    assert (found["live"]["rate"], found["live"]["window"]) == (16_000, 1.5)


def test_answers_that_are_too_long_are_refused(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ced.serve.answers._LONGEST_ANSWER", 2_500)
    body = encode(noise(12))
    assert client.post(CLASSIFY, content=body, params={"window": 2}).status_code == 200
    assert "/v1/audio/stream" in error(client.post(CLASSIFY, content=body, params={"window": 1}), 413)
    vectors: dict[str, str | int] = {"window": 2, "embeddings": "windows"}
    assert "/v1/audio/stream" in error(client.post(CLASSIFY, content=body, params=vectors), 413)
    assert len(stream(client, body, window=1)) > 12


def test_an_exception_of_the_model_is_status_500(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Mean):
        def __call__(self, waves: Any, /) -> Any:
            if self.lengths:
                raise RuntimeError("a secret of the server")
            return super().__call__(waves)

    with running(Application(Broken(), "broken")) as url, httpx.Client(base_url=url) as client:
        message = error(client.post(CLASSIFY, content=constant(0.5)), 500)
        assert "secret" not in message
        assert "a secret of the server" in caplog.text
        for options, words in (({"embeddings": "clip"}, "no embeddings"), ({"scores": "columns"}, "columns")):
            assert words in error(client.post(STREAM, content=constant(0.5), params=options), 422)


def test_invalid_scores_are_status_500() -> None:
    class Wrong(Mean):
        def __call__(self, waves: Any, /) -> Any:
            scores = super().__call__(waves)
            return scores * (np.nan if self.lengths[1:] else 1)

    with running(Application(Wrong(), "wrong")) as url:
        error(httpx.post(url + CLASSIFY, content=constant(0.5)), 500)
