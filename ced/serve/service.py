"""The work of the server: uploads are decoded and scored in a pool of threads, window by window and in turns."""

import asyncio
import base64
import json
import math
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

import ced
from ced.errors import AudioError, CheckpointError, ClosedError, TooLongError, install_command
from ced.serve.body import Bodies, Limits, RefusedError, Upload, busy
from ced.serve.overview import Overview
from ced.serve.schema import RequestOptions, StreamOptions
from ced.sound.audio import SAMPLE_RATE, Sound, Window, cut_windows, open_sound
from ced.sound.labels import ClassTable
from ced.tag.events import Merging, OrderedEvents
from ced.tag.options import TagOptions
from ced.tag.records import Kind, Record, Scored, Tags, json_head, json_tail
from ced.tag.tagger import Scorer, WindowScorer

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # environment variable that makes prometheus_client share its values
LEAST_COST = 1.0  # seconds that a window counts at least
_BLOCK = 1.0  # seconds decoded at a time, so that a header with a false rate costs little
_VALUES = 384_000  # samples x channels for each second of the limit: two channels at 192 kHz
_LONGEST_ANSWER = 8_000_000  # bytes of JSON
_PROGRESS_SECONDS = 0.5  # between two lines of progress
DOWN = "the server is shutting down; try again soon"

T = TypeVar("T")


class Meters:
    """Metrics for Prometheus, in a registry of the server's own; several processes share their values in files."""

    def __init__(self, model: str) -> None:
        self._shared = METRICS_FOLDER in os.environ
        self._registry = registry = CollectorRegistry()
        if not self._shared:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        info = Gauge(
            "ced_info", "Version and model.", ["version", "model"], registry=registry, multiprocess_mode="livemax"
        )
        info.labels(ced.__version__, model).set(1)
        self.pending = Gauge(
            "ced_pending_requests",
            "Uploads that wait or are worked on.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.live = Gauge("ced_live_connections", "Live connections.", registry=registry, multiprocess_mode="livesum")
        self._answers = Counter("ced_requests", "Requests to tag, by status.", ["status"], registry=registry)
        self._took = Histogram(
            "ced_request_seconds", "Time from a request to its answer, for status 200.", registry=registry
        )
        self.sound = Counter("ced_sound_seconds", "Seconds of sound that were tagged.", registry=registry)
        sizes = (1, 2, 4, 8, 16)
        self.together = Histogram("ced_call_windows", "Windows scored in one call.", buckets=sizes, registry=registry)

    def report(self) -> bytes:
        """Return the values in Prometheus' text format, of all processes together."""
        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def count(self, status: int, seconds: float) -> None:
        """Count the answer to a request."""
        self._answers.labels(status).inc()
        if status == 200:
            self._took.observe(seconds)


@dataclass(frozen=True, eq=False)
class Plan:
    """How a request is worked on, checked before its body is read."""

    request: RequestOptions
    options: TagOptions
    labels: ClassTable

    def events(self) -> OrderedEvents | None:
        """Return a new merger of windows into events, if events are asked for."""
        if not self.options.events:
            return None
        return OrderedEvents(Merging.of(self.options, self.labels))


@dataclass(frozen=True, eq=False)
class Taken:
    """One window of an upload."""

    number: int  # from 0
    window: Window
    is_last: bool
    overview: dict[str, Any] | None  # new columns of it


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in one window."""

    taken: Taken
    scored: list[Scored]  # one, or one for each column
    pieces: list[Tags]  # empty with events
    vector: NDArray[np.float32] | None  # (d,)

    @property
    def start(self) -> float:
        """Where the window starts, in seconds."""
        return self.taken.window.start

    @property
    def end(self) -> float:
        """Where the window ends, in seconds."""
        return self.taken.window.end


class Service:
    """Tags uploads within limits.

    A sound is decoded and scored step by step, a window each, and steps are served in order of arrival: requests take
    turns, and a long sound does not delay a short one by more than a window.

    Args:
        model: scores waves.
        name: its name in records.
        jobs: steps that run at the same time, each in a thread.
        limits: what is refused.
        addresses: whether sounds may be fetched from addresses.

    Raises:
        CheckpointError: the model does not answer.
    """

    def __init__(self, model: Scorer, name: str, jobs: int, limits: Limits, *, addresses: bool = False) -> None:
        self.name, self.limits, self.model = name, limits, model
        self.meters = Meters(name)
        self.places = jobs + limits.waiting
        self.bodies = Bodies(limits, self.places, addresses=addresses)
        self.scorer = WindowScorer(model, name)
        self.stopping = False
        self._jobs = jobs
        self._taken = 0
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(jobs, "ced-worker")
        self._steps = _Steps(self.scorer, self._pool, jobs, self.meters)
        self._first_steps: set[Future[Any]] = set()  # of sounds that nothing was done with yet
        self.has_columns, self.has_embeddings = _warm_up(self.scorer)

    @property
    def full(self) -> bool:
        """Whether another request would be refused."""
        return self._taken >= self.places or self.stopping

    def stop(self) -> None:
        """Refuse new sounds, and those whose work has not begun."""
        self.stopping = True
        for step in list(self._first_steps):
            step.cancel()

    def close(self) -> None:
        """End all work after the steps that are running."""
        self.stop()
        self.bodies.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def plan(self, request: RequestOptions) -> Plan:
        """Check the options of a request.

        Raises:
            ConfigError: they contradict each other or do not fit the model.
            RefusedError: the model cannot do what they ask for.
        """
        if request.embeddings != "none" and not self.has_embeddings:
            raise RefusedError(422, f"the model {self.name} has no embeddings")
        options = request.tag_options()
        if options.columns and not self.has_columns:
            raise RefusedError(422, f"the model {self.name} cannot score columns")
        self.scorer.check(options)
        return Plan(request, options, self.scorer.labels)

    def run_step(self, work: Callable[..., T], *given: Any) -> "asyncio.Future[T]":
        """Run a step in the pool, in order of arrival."""
        return asyncio.wrap_future(self._pool.submit(work, *given))

    async def answer(self, upload: Upload, plan: Plan) -> bytes:
        """Return the record of an upload as JSON; the upload is closed.

        Raises:
            RefusedError, CedError: the upload cannot be tagged.
            ClosedError: the server was stopped before the work began.
        """
        decoding, events, size = self._decoding(upload, plan), plan.events(), 0
        pieces: list[bytes] = []
        embeddings: list[bytes] = []
        mean = _Mean()

        def add(found: Iterable[dict[str, Any]], to: list[bytes]) -> None:
            nonlocal size
            for each in found:
                to.append(_json(each))
                size += len(to[-1])
            if size > _LONGEST_ANSWER:
                raise RefusedError(
                    413,
                    f"the answer is longer than {_LONGEST_ANSWER / 1e6:g} MB; give a threshold, a lower top_k or a"
                    " longer hop, or use /v1/audio/stream",
                )

        async with aclosing(self._work(decoding, plan)) as results:
            async for found in results:
                if found.vector is not None and plan.request.embeddings == "clip":
                    mean.add(found.start, found.end, found.vector)
                elif found.vector is not None:
                    add([_embedding(found.start, found.end, found.vector)], embeddings)
                add(map(asdict, found.pieces if events is None else _merged(events, found)), pieces)
        if events is not None:
            add(map(asdict, events.finish()), pieces)
        if mean.vector is not None:
            add([_embedding(0.0, mean.end, mean.vector)], embeddings)
        record = decoding.record(self.name)
        head = _json(json_head(record)).removesuffix(b"}")
        tail = _json({**json_tail(record), "warnings": decoding.warnings})
        parts = [head, b', "pieces": [', b", ".join(pieces), b"], ", tail.removeprefix(b"{")]
        if embeddings:
            parts[-1] = parts[-1].removesuffix(b"}")
            parts += [b', "embeddings": [', b", ".join(embeddings), b"]}"]
        return b"".join(parts)

    async def stream(self, upload: Upload, plan: Plan) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a stream, each as soon as it is known; the upload is closed.

        Raises:
            RefusedError, CedError: the upload cannot be tagged.
            ClosedError: the server was stopped before the work began.
        """
        request, events = plan.request, plan.events()
        assert isinstance(request, StreamOptions)
        overview = None if request.overview is None else Overview(request.overview)
        decoding = self._decoding(upload, plan, overview)
        begun, told = False, time.monotonic()
        mean = _Mean()
        async with aclosing(self._work(decoding, plan)) as results:
            async for found in results:
                if not begun:
                    begun = True
                    yield self._begin(decoding, plan)
                if found.vector is not None and request.embeddings == "clip":
                    mean.add(found.start, found.end, found.vector)
                if events is None or request.scores != "none" or request.embeddings == "windows":
                    yield encode_line(**_window(found, request))
                for piece in [] if events is None else _merged(events, found):
                    yield encode_line(type="event", **asdict(piece))
                if found.taken.overview is not None:
                    yield encode_line(type="overview", **found.taken.overview)
                if time.monotonic() - told >= _PROGRESS_SECONDS:
                    told = time.monotonic()
                    yield encode_line(type="progress", seconds=found.end)
        for piece in [] if events is None else events.finish():
            yield encode_line(type="event", **asdict(piece))
        if (columns := decoding.rest_of_overview()) is not None:
            yield encode_line(type="overview", **columns)
        record = decoding.record(self.name)
        embedding = {} if mean.vector is None else {"embedding": mean.vector.tolist()}
        last = {**json_head(record), **json_tail(record), "warnings": decoding.warnings, **embedding}
        yield encode_line(type="end", **last)

    def _begin(self, decoding: "_Decoding", plan: Plan) -> bytes:
        """Return the first line of a stream."""
        request, options = plan.request, plan.options
        assert isinstance(request, StreamOptions)
        record = decoding.record(self.name)
        return encode_line(
            type="begin",
            **json_head(record),
            seconds=record.expected_seconds,
            classes=len(plan.labels),
            window=options.window,
            hop=options.step,
            scores=request.scores,
            encoding=request.encoding,
        )

    def _decoding(self, upload: Upload, plan: Plan, overview: Overview | None = None) -> "_Decoding":
        """Take a place for an upload.

        Raises:
            RefusedError: there is none.
            ClosedError: the server was stopped.
        """
        with self._lock:
            full = self.full
            self._taken += not full
        if full:
            upload.close()
            raise ClosedError(DOWN) if self.stopping else busy()
        self.meters.pending.inc()
        return _Decoding(upload, plan.options, self.limits, overview)

    async def _work(self, decoding: "_Decoding", plan: Plan) -> AsyncGenerator[Found, None]:
        """Decode and score an upload window by window, in order; at the end it is closed and its place is free.

        While the pool has threads to spare, several windows of one sound are scored at the same time.
        """
        steps: set[Future[Any]] = set()  # that have not ended
        pending: deque[asyncio.Future[Found | None]] = deque()
        ready: dict[int, Found] = {}  # by number of their window
        number, begun, ended = 0, False, False
        fault: Exception | None = None

        def run_step() -> "asyncio.Future[Found | None]":
            nonlocal begun
            step = self._steps.submit(decoding, plan)
            if not begun:
                begun = True
                self._first_steps.add(step)
                step.add_done_callback(self._first_steps.discard)
            steps.add(step)
            step.add_done_callback(steps.discard)
            return asyncio.wrap_future(step)

        def release() -> None:
            decoding.close()
            with self._lock:
                self._taken -= 1
            self.meters.pending.dec()

        try:
            while pending or not ended:
                at_once = self._jobs // self._taken if number else 1  # most sounds have one window only
                while not ended and len(pending) < max(1, at_once):
                    pending.append(run_step())
                try:
                    found = await pending.popleft()
                except Exception as error:  # raised behind the windows before it
                    fault, ended = fault or error, True
                    continue
                if found is None or found.taken.is_last:
                    ended = True
                if found is not None:
                    ready[found.taken.number] = found
                while number in ready:  # threads may take windows in another order than steps
                    yield ready.pop(number)
                    number += 1
            if fault is not None:
                raise fault
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.stopping and task is not None and not task.cancelling():  # a step was cancelled, not the request
                raise ClosedError(DOWN) from None
            raise
        finally:
            decoding.cancelled = True
            for result in pending:
                if not result.cancel() and not result.cancelled():
                    result.exception()  # which is of no interest any more
            _when_done([step for step in list(steps) if not step.cancel()], release)


@dataclass(frozen=True, eq=False)
class _Step:
    """The next window of an upload, which waits to be decoded and scored."""

    decoding: "_Decoding"
    plan: Plan
    result: "Future[Found | None]"


class _Steps:
    """Works on steps in order of arrival; short windows that wait are scored together.

    Nobody waits for that: only windows of one length whose steps wait already go together, as far as the model gains by
    it (`OnnxModel.at_once`), and as many as leave work for the other threads.
    """

    def __init__(self, scorer: WindowScorer, pool: ThreadPoolExecutor, jobs: int, meters: Meters) -> None:
        self._scorer, self._pool, self._jobs, self._meters = scorer, pool, jobs, meters
        self._at_once: int = getattr(scorer.model, "at_once", 0)  # samples
        self._waiting: deque[_Step] = deque()

    def submit(self, decoding: "_Decoding", plan: Plan) -> "Future[Found | None]":
        """Add a step; its result is None if the upload has no further window."""
        step = _Step(decoding, plan, Future())
        self._waiting.append(step)
        self._pool.submit(self._work)
        return step.result

    def _work(self) -> None:
        """Work on the oldest step and those that can go with it; there is one such task for each step."""
        group: list[tuple[_Step, Taken]] = []
        room, share = 1, -(-len(self._waiting) // self._jobs)
        while len(group) < room and (found := self._decode_next()) is not None:
            group.append(found)
            step, taken = group[0]
            samples = len(taken.window.wave)
            room = min(share, self._at_once // samples)
            if found[0].plan.options != step.plan.options or len(found[1].window.wave) != samples:
                group.pop()
                self._finish([found])
        if group:
            self._finish(group)

    def _decode_next(self) -> "tuple[_Step, Taken] | None":
        """Return the oldest step that has a window, and its window; None: no step waits."""
        while True:
            try:
                step = self._waiting.popleft()
            except IndexError:
                return None
            if not step.result.set_running_or_notify_cancel():
                continue
            try:
                taken = step.decoding.take()
            except BaseException as error:
                step.result.set_exception(error)
                continue
            if taken is not None:
                return step, taken
            step.result.set_result(None)

    def _finish(self, group: "list[tuple[_Step, Taken]]") -> None:
        """Score windows that go together, and set the results of their steps."""
        windows = [taken.window for _, taken in group]
        try:
            scores = self._scorer.score_together(windows, group[0][0].plan.options)
            results = [
                self._found(step.plan, taken, scored) for (step, taken), scored in zip(group, scores, strict=True)
            ]
        except BaseException as error:
            for step, _ in group:
                step.result.set_exception(error)
            return
        self._meters.together.observe(len(group))
        for (step, _), result in zip(group, results, strict=True):
            step.result.set_result(result)

    def _found(self, plan: Plan, taken: Taken, scored: list[Scored]) -> Found:
        options, window = plan.options, taken.window
        vector = None if plan.request.embeddings == "none" else self._scorer.embed(window)
        selection = options.selection(plan.labels)
        pieces = [] if options.events or options.columns else [selection.tags(each) for each in scored]
        self._meters.sound.inc(window.end - window.start)
        return Found(taken, scored, pieces, vector)


class _Decoding:
    """An upload while it is decoded and cut into windows; any thread may take the next one.

    Attributes:
        upload: what is decoded.
        cancelled: set to True, from any thread, it ends the decoding at the next block.
    """

    def __init__(self, upload: Upload, options: TagOptions, limits: Limits, overview: Overview | None) -> None:
        self.upload, self.cancelled = upload, False
        self._options, self._limits, self._overview = options, limits, overview
        self._sound: Sound | None = None
        self._lock = Lock()
        self._windows = self._cut()
        self._next: Window | None = None
        self._fault: Exception | None = None  # behind the next window
        self._end = 0.0  # seconds taken
        self._number = -1  # of the next window; below 0: it has not been decoded yet

    def close(self) -> None:
        """Close the upload; no other thread may be using it."""
        self._windows.close()
        self.upload.close()

    def take(self) -> Taken | None:
        """Return the next window; None: there is none.

        One window is decoded ahead, to know whether there is another.

        Raises:
            RefusedError: the sound is too long, or too much work (413), or cannot be decoded (422).
            ClosedError: it was cancelled.
        """
        with self._lock:
            if self._number < 0:
                self._number, self._next = 0, next(self._windows, None)
            if self._next is None:
                if self._fault is not None:
                    raise self._fault
                return None
            number, window = self._number, self._next
            self._number, self._next, self._end = number + 1, None, window.end
            try:
                self._next = next(self._windows, None)
            except Exception as error:
                self._fault = error
            columns = None if self._overview is None else self._overview.take()
            return Taken(number, window, self._next is None and self._fault is None, columns)

    def rest_of_overview(self) -> dict[str, Any] | None:
        """Return the last columns of the overview, once the sound has been decoded to its end."""
        return None if self._overview is None else self._overview.take(finish=True)

    @property
    def warnings(self) -> list[str]:
        """What is odd about the sound, as far as it has been decoded."""
        return [] if self._sound is None else list(self._sound.warnings)

    def record(self, model: str) -> Record:
        """Return the record of what was taken so far, without its pieces."""
        options, sound = self._options, self._sound
        assert sound is not None
        kind: Kind = "events" if options.events else "windows"
        return Record(
            self.upload.name,
            model,
            self._end,
            (),
            kind,
            options.channel,
            sound.complete,
            sound.expected_seconds,
            sound.rate,
        )

    def _cut(self) -> Generator[Window, None, None]:
        """Decode; errors are those of `take`."""
        options, limits = self._options, self._limits
        cost = 0.0
        try:
            with open_sound(
                self.upload.source,
                channel=options.channel,
                strict=options.strict,
                budget=round(limits.seconds * _VALUES),
                cancelled=lambda: self.cancelled,
                block_seconds=_BLOCK,
            ) as self._sound:
                self._check_length(self._sound.expected_seconds or 0.0)
                for window in cut_windows(self._blocks(self._sound), options.window, options.step, tail=options.tail):
                    cost += max(LEAST_COST, window.end - window.start)
                    self._check_cost(cost)
                    yield window
        except TooLongError as error:
            limit = f"{limits.seconds:g} s at {_VALUES // 1000} kHz, all channels together"
            raise RefusedError(413, f"{self.upload.name} is too much to decode; the limit is {limit}") from error
        except AudioError as error:  # clients cannot install anything, and arrays have no name
            reason = error.reason.partition(f"; {install_command('media')}")[0]
            raise RefusedError(422, f"{self.upload.name}: {reason}") from error

    def _blocks(self, sound: Sound) -> Iterator[NDArray[np.float32]]:
        held = 0
        for block in sound.blocks():
            held += len(block)
            self._check_length(held / SAMPLE_RATE)
            if self._overview is not None:
                self._overview.add(block)
            yield block

    def _check_length(self, seconds: float) -> None:
        limit = self._limits.seconds
        if seconds > limit:
            raise RefusedError(413, f"{self.upload.name} is longer than {limit:g} s, the limit of this server")
        options = self._options
        count = 1 + max(0, math.ceil((seconds - options.window) / options.step))
        self._check_cost(count * max(LEAST_COST, min(options.window, seconds)))

    def _check_cost(self, cost: float) -> None:
        limit, options = self._limits.seconds, self._options
        if cost > limit + options.window:  # of windows that lie end to end, the last may reach past the limit
            raise RefusedError(
                413,
                f"windows of {options.window:g} s every {options.step:g} s are more than {limit:g} s to score in all"
                f" (a window counts for {LEAST_COST:g} s at least), the limit of this server; use a longer hop or"
                " window, or less of the sound",
            )


def encode_scores(scored: list[Scored], encoding: str = "uint8") -> str:
    """Return the probabilities of windows or columns, (n, c), as base64 of their bytes, row by row."""
    probs = np.stack([each.probs for each in scored])
    encoded = np.rint(probs * 255).astype(np.uint8) if encoding == "uint8" else probs.astype("<f4")
    return base64.b64encode(encoded.tobytes()).decode()


def _window(found: Found, options: StreamOptions) -> dict[str, Any]:
    """Return the line of one window."""
    line: dict[str, Any] = {"type": "window", "start": found.start, "end": found.end}
    line["silent"] = found.scored[0].silent
    if found.pieces:
        line["tags"] = [asdict(tag) for tag in found.pieces[0].tags]
    if options.scores == "columns":
        line["edges"] = [*(each.start for each in found.scored), found.end]
    if options.scores != "none":
        line["scores"] = encode_scores(found.scored, options.encoding)
    if found.vector is not None and options.embeddings == "windows":
        line["embedding"] = found.vector.tolist()
    return line


def _merged(events: OrderedEvents, found: Found) -> list[Tags]:
    return [piece for each in found.scored for piece in events.add(each)]


class _Mean:
    """The mean of the embeddings of windows, weighted by their length, as `Embedding.clip`; only a sum is kept.

    Attributes:
        end: where the last window ends, in seconds.
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
        """The mean, (d,); None if there is no window."""
        return None if self._sum is None else (self._sum / self._weight).astype(np.float32)


def _embedding(start: float, end: float, vector: NDArray[np.float32]) -> dict[str, Any]:
    return {"start": start, "end": end, "vector": vector.tolist()}


def _when_done(steps: list[Future[Any]], action: Callable[[], None]) -> None:
    """Call `action` when all steps have ended, in the thread of the last one."""
    left, lock = len(steps), Lock()

    def done(_: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            is_last = not left
        if is_last:
            action()

    if not steps:
        action()
    for step in steps:
        step.add_done_callback(done)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def encode_line(**values: Any) -> bytes:
    """Return a line of a stream."""
    return _json(values) + b"\n"


def _warm_up(scorer: WindowScorer) -> tuple[bool, bool]:
    """Run a model once, so that the first request does not wait for it; return whether it has columns and embeddings.

    Raises:
        CheckpointError: the model does not answer.
    """
    window = Window(0.0, 1.0, np.zeros(SAMPLE_RATE, np.float32))
    scorer.score(window, TagOptions())
    able = []
    for attempt in (lambda: scorer.score(window, TagOptions(columns=True)), lambda: scorer.embed(window)):
        try:
            attempt()
            able.append(True)
        except CheckpointError:
            able.append(False)
    return able[0], able[1]
