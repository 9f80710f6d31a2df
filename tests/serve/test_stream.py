"""Streams: the same results as in one answer, line by line while later windows are scored."""

import base64
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from ced.serve.app import Application
from ced.serve.schema import STREAM, StreamLine
from ced.tag.records import Record
from ced.tag.tagger import Tagger
from tests.serve.served import RATE, WAV, Mean, constant, encode, metrics, noise, running, stream, until


def rows(line: dict[str, Any], classes: int, kind: str = "<f4") -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(line["scores"]), kind).reshape(-1, classes)


def test_the_lines_of_a_stream_equal_the_single_answer(client: httpx.Client, graph: Path) -> None:
    sound = noise(3.5)
    begin, *windows, end = stream(client, encode(sound), window=1, top_k=2)
    assert begin["type"] == "begin"
    assert (begin["file"], begin["model"], begin["classes"]) == ("body", "small", 3)
    assert (begin["window"], begin["hop"], begin["seconds"]) == (1, 1, 3.5)
    expected = Tagger(graph, name="small").tag((sound, RATE), window=1.0, top_k=2, name="body").to_json()
    pieces = [{name: line[name] for name in ("start", "end", "tags")} for line in windows if line["type"] == "window"]
    assert pieces == json.loads(json.dumps(expected.pop("pieces")))
    assert end == {"type": "end", **expected, "complete": True, "warnings": []}


def test_events_come_with_scores_of_all_classes(client: httpx.Client, graph: Path) -> None:
    sound, tagger = noise(4), Tagger(graph)
    scores = list(tagger.score((sound, RATE), window=1.0, hop=0.5))
    threshold = float(np.median([scored.probs for scored in scores]))
    options = {"window": 1, "hop": 0.5, "threshold": threshold, "events": True}
    expected = tagger.tag((sound, RATE), window=1.0, hop=0.5, threshold=threshold, events=True)
    for encoding, kind in (("uint8", "u1"), ("float32", "<f4")):
        lines = stream(client, encode(sound), scores="windows", encoding=encoding, **options)
        found = [line for line in lines if line["type"] == "event"]
        record = Record("", "", 4.0, expected.pieces, "events").to_json()
        assert [{**event, "type": 0} for event in found] == [
            {"type": 0, **event} for event in json.loads(json.dumps(record["pieces"]))
        ]
        windows = [line for line in lines if line["type"] == "window"]
        assert all("tags" not in line for line in windows)
        probs = np.concatenate([rows(line, 3, kind) for line in windows])
        exact = np.stack([scored.probs for scored in scores])
        np.testing.assert_array_equal(probs, np.rint(exact * 255) if kind == "u1" else exact)
    only_events = stream(client, encode(sound), **options)
    assert {line["type"] for line in only_events} <= {"begin", "event", "progress", "end"}


def test_columns(client: httpx.Client, graph: Path) -> None:
    sound = noise(2.5)
    expected = list(Tagger(graph).score((sound, RATE), window=1.0, columns=True))
    lines = stream(client, encode(sound), window=1, scores="columns", encoding="float32")
    windows = [line for line in lines if line["type"] == "window"]
    np.testing.assert_array_equal(
        np.concatenate([rows(line, 3) for line in windows]), np.stack([scored.probs for scored in expected])
    )
    starts = [edge for line in windows for edge in line["edges"][:-1]]
    assert starts == pytest.approx([scored.start for scored in expected], abs=6e-4)
    assert [line["edges"][-1] for line in windows] == [1.0, 2.0, 2.5]
    assert all("tags" not in line for line in windows)
    with pytest.raises(AssertionError, match="overlapping windows would score columns twice"):
        stream(client, encode(sound), window=1, hop=0.5, scores="columns")


def test_embeddings(client: httpx.Client, graph: Path) -> None:
    sound = noise(2.5)
    embedding = Tagger(graph).embed((sound, RATE), window=1.0)
    lines = stream(client, encode(sound), window=1, embeddings="windows")
    assert [line["embedding"] for line in lines if line["type"] == "window"] == embedding.vectors.tolist()
    assert stream(client, encode(sound), window=1, embeddings="clip")[-1]["embedding"] == embedding.clip.tolist()


def test_lines_conform_to_the_openapi_document(client: httpx.Client) -> None:
    for options in ({}, {"scores": "columns"}, {"events": True, "scores": "windows"}, {"overview": 10}):
        for line in stream(client, encode(noise(2.5)), window=1, **options):
            described = StreamLine.model_validate(line).root
            assert line.keys() <= type(described).model_fields.keys()


class Slow(Mean):
    """Scores the first windows at once, and the others after `go` is set."""

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self.at_once = at_once

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        if len(self.lengths) >= self.at_once:
            assert self.go.wait(60)
        self.lengths.append(waves.shape[1])
        return np.stack([waves.mean(1), waves.mean(1) / 2], axis=1)


def test_lines_are_sent_while_later_windows_wait() -> None:
    model = Slow(2)  # one of them warms up
    with running(Application(model, "mean")) as url:
        model.go.clear()
        with httpx.stream("POST", url + STREAM, content=constant(0.5, 3), headers=WAV, params={"window": 1}) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines))["type"] == "begin"
            assert json.loads(next(lines))["tags"][0] == {"label": "loud", "index": 0, "mid": None, "prob": 0.5}
            assert len(model.lengths) == 2
            model.go.set()
            assert [json.loads(line)["type"] for line in lines] == ["window", "window", "end"]


def test_a_sound_that_cannot_be_decoded_to_its_end_ends_with_an_error_line(client: httpx.Client) -> None:
    samples = noise(3)
    samples[2 * RATE + 100] = np.nan
    lines = stream(client, encode(samples), window=1)
    assert [line["type"] for line in lines] == ["begin", "window", "window", "error"]
    assert "not finite" in lines[-1]["error"]


@pytest.mark.parametrize("windows", [0, 1])
def test_a_client_that_disconnects_frees_its_place(windows: int) -> None:
    model = Slow(1 + windows)
    app = Application(model, "mean")
    with running(app) as url, httpx.Client(base_url=url) as client:
        model.go.clear()
        with (
            suppress(httpx.ReadTimeout),
            client.stream(
                "POST", STREAM, content=constant(0.5, 60), headers=WAV, params={"window": 1}, timeout=0.5
            ) as answer,
        ):
            lines = answer.iter_lines()
            assert json.loads(next(lines))["type"] == "begin"
            with httpx.Client(base_url=url) as other:
                assert metrics(other)["ced_pending_requests"] == 1
        until(lambda: any(name.startswith("ced_requests_total") for name in metrics(client)))  # the server noticed
        model.go.set()
        until(lambda: metrics(client)["ced_pending_requests"] == 0)
        assert len(model.lengths) <= 2 + windows
