"""Answers to requests that tag a sound: one JSON record, or a stream of JSON lines."""

import base64
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ced.serve.body import RefusedError
from ced.serve.scheduler import CheckedRequest, Decoding, ScoredWindow
from ced.serve.schema import StreamOptions
from ced.tag.events import OrderedEvents
from ced.tag.records import Scored, Tags, json_head, json_tail

_LONGEST_ANSWER = 8_000_000  # bytes of JSON
_PROGRESS_SECONDS = 0.5  # between two lines of progress


class JsonAnswer:
    """The record of an upload as one JSON object, with the requested embeddings.

    Args:
        request: how the upload is tagged.
        decoding: the upload.
        model: name of the model in the record.
    """

    def __init__(self, request: CheckedRequest, decoding: Decoding, model: str) -> None:
        self._decoding, self._model = decoding, model
        self._events = request.events()
        self._embeddings_of = request.request.embeddings
        self._mean = _MeanEmbedding()
        self._pieces: list[bytes] = []
        self._embeddings: list[bytes] = []
        self._size = 0  # bytes of both

    def add(self, window: ScoredWindow) -> None:
        """Add the next window.

        Raises:
            RefusedError: the answer is too long (413).
        """
        if window.embedding is not None and self._embeddings_of == "clip":
            self._mean.add(window.start, window.end, window.embedding)
        elif window.embedding is not None:
            self._append([_embedding(window.start, window.end, window.embedding)], self._embeddings)
        pieces = window.pieces if self._events is None else _merge(self._events, window)
        self._append(map(asdict, pieces), self._pieces)

    def finish(self) -> bytes:
        """Return the record, after the last window.

        Raises:
            RefusedError: the answer is too long (413).
        """
        if self._events is not None:
            self._append(map(asdict, self._events.finish()), self._pieces)
        if (mean := self._mean.vector) is not None:
            self._append([_embedding(0.0, self._mean.end, mean)], self._embeddings)
        record = self._decoding.record(self._model)
        head = _json(json_head(record)).removesuffix(b"}")
        tail = _json({**json_tail(record), "warnings": self._decoding.warnings})
        parts = [head, b', "pieces": [', b", ".join(self._pieces), b"], ", tail.removeprefix(b"{")]
        if self._embeddings:
            parts[-1] = parts[-1].removesuffix(b"}")
            parts += [b', "embeddings": [', b", ".join(self._embeddings), b"]}"]
        return b"".join(parts)

    def _append(self, values: Iterable[dict[str, Any]], to: list[bytes]) -> None:
        for value in values:
            to.append(_json(value))
            self._size += len(to[-1])
        if self._size > _LONGEST_ANSWER:
            raise RefusedError(
                413,
                f"the answer is longer than {_LONGEST_ANSWER / 1e6:g} MB; give a threshold, a lower top_k or a"
                " longer hop, or use /v1/audio/stream",
            )


class JsonLines:
    """The lines of a stream: begin, then windows, events, overview and progress as they are known, then end.

    Args:
        request: how the upload is tagged; its options are those of a stream.
        decoding: the upload.
        model: name of the model in the record.
    """

    def __init__(self, request: CheckedRequest, decoding: Decoding, model: str) -> None:
        assert isinstance(request.request, StreamOptions)
        self._request, self._options = request, request.request
        self._decoding, self._model = decoding, model
        self._events = request.events()
        self._mean = _MeanEmbedding()
        self._has_begun = False
        self._last_progress = time.monotonic()

    def add(self, window: ScoredWindow) -> Iterator[bytes]:
        """Yield the lines that the next window adds."""
        options, events = self._options, self._events
        if not self._has_begun:
            self._has_begun = True
            yield self._begin()
        if window.embedding is not None and options.embeddings == "clip":
            self._mean.add(window.start, window.end, window.embedding)
        if events is None or options.scores != "none" or options.embeddings == "windows":
            yield encode_line(**_window(window, options))
        for event in [] if events is None else _merge(events, window):
            yield encode_line(type="event", **asdict(event))
        if window.decoded.overview is not None:
            yield encode_line(type="overview", **window.decoded.overview)
        if time.monotonic() - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = time.monotonic()
            yield encode_line(type="progress", seconds=window.end)

    def finish(self) -> Iterator[bytes]:
        """Yield the last lines, after the last window."""
        for event in [] if self._events is None else self._events.finish():
            yield encode_line(type="event", **asdict(event))
        if (columns := self._decoding.rest_of_overview()) is not None:
            yield encode_line(type="overview", **columns)
        record = self._decoding.record(self._model)
        last = {**json_head(record), **json_tail(record), "warnings": self._decoding.warnings}
        if (mean := self._mean.vector) is not None:
            last["embedding"] = mean.tolist()
        yield encode_line(type="end", **last)

    def _begin(self) -> bytes:
        options, record = self._request.options, self._decoding.record(self._model)
        return encode_line(
            type="begin",
            **json_head(record),
            seconds=record.expected_seconds,
            classes=len(self._request.labels),
            window=options.window,
            hop=options.step,
            scores=self._options.scores,
            encoding=self._options.encoding,
        )


class _MeanEmbedding:
    """The mean of the embeddings of windows, weighted by their lengths, as `Embedding.clip`; only a sum is kept.

    Attributes:
        end: end of the last window in seconds.
    """

    def __init__(self) -> None:
        self.end = 0.0
        self._sum: NDArray[np.float64] | None = None  # (d,)
        self._weight = 0.0

    def add(self, start: float, end: float, vector: NDArray[np.float32]) -> None:
        """Add the embedding (d,) of the next window."""
        weighted = vector * np.float64(end - start)
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._weight += end - start
        self.end = end

    @property
    def vector(self) -> NDArray[np.float32] | None:
        """The mean, (d,); None without a window."""
        return None if self._sum is None else (self._sum / self._weight).astype(np.float32)


def encode_scores(scores: list[Scored], encoding: str = "uint8") -> str:
    """Return the probabilities of windows or columns, (n, c), as base64 of their bytes, row by row."""
    probs = np.stack([each.probs for each in scores])
    encoded = np.rint(probs * 255).astype(np.uint8) if encoding == "uint8" else probs.astype("<f4")
    return base64.b64encode(encoded.tobytes()).decode()


def encode_line(**values: Any) -> bytes:
    """Return one line of a stream."""
    return _json(values) + b"\n"


def _window(window: ScoredWindow, options: StreamOptions) -> dict[str, Any]:
    """Return the fields of a window's line."""
    line: dict[str, Any] = {"type": "window", "start": window.start, "end": window.end}
    line["silent"] = window.scores[0].silent
    if window.pieces:
        line["tags"] = [asdict(tag) for tag in window.pieces[0].tags]
    if options.scores == "columns":
        line["edges"] = [*(each.start for each in window.scores), window.end]
    if options.scores != "none":
        line["scores"] = encode_scores(window.scores, options.encoding)
    if window.embedding is not None and options.embeddings == "windows":
        line["embedding"] = window.embedding.tolist()
    return line


def _embedding(start: float, end: float, vector: NDArray[np.float32]) -> dict[str, Any]:
    return {"start": start, "end": end, "vector": vector.tolist()}


def _merge(events: OrderedEvents, window: ScoredWindow) -> list[Tags]:
    """Add a window to the events, and return the events that are complete."""
    return [event for scored in window.scores for event in events.add(scored)]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
