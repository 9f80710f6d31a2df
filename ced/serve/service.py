"""The work of the server: uploads are decoded and scored in a pool of threads, window by window and in turns."""

import asyncio
import base64
import json
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, dataclass
from threading import Event, Lock
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
from ced.errors import AudioError, CedError, CheckpointError, ClosedError, ConfigError, install_command
from ced.serve.body import Bodies, Limits, RefusedError, Upload, busy
from ced.serve.overview import Overview
from ced.serve.schema import Options, StreamOptions
from ced.sound import audio
from ced.sound.audio import SAMPLE_RATE, Window
from ced.tag.embeddings import rows_of
from ced.tag.events import Merging, OrderedEvents
from ced.tag.recipe import Recipe
from ced.tag.records import FORMAT_VERSION, Record, Scored, Tags
from ced.tag.select import Selection
from ced.tag.tagger import Embedding, Scorer, Tagger

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # environment variable that makes prometheus_client share its values
LEAST_COST = 1.0  # seconds that a window counts at least
_BLOCK = 1.0  # seconds decoded at a time, so that a header with a false rate costs little
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
        self.windows = Counter("ced_windows", "Windows that were scored.", registry=registry)

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

    options: Options
    recipe: Recipe
    selection: Selection
    score: Callable[[Window], list[Scored]]

    def events(self) -> OrderedEvents | None:
        """Return a new merger of windows into events, if events are asked for."""
        if not self.recipe.events:
            return None
        merging = Merging(
            self.selection, release=self.recipe.release, gap=self.recipe.gap, shortest=self.recipe.shortest
        )
        return OrderedEvents(self.selection, merging)


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in one window."""

    start: float  # seconds
    end: float
    scored: list[Scored]  # one, or one for each column
    pieces: list[Tags]  # empty with events
    vector: NDArray[np.float32] | None  # (d,)


class Service:
    """Tags uploads within limits.

    A sound is decoded and scored step by step, and each step is a task of one pool: since the tasks of a pool are
    served in order of arrival, requests take turns, and a long sound does not delay a short one by more than a window.

    Args:
        model: scores waves.
        name: its name in records.
        jobs: steps that run at the same time, each in a thread.
        limits: what is refused.

    Raises:
        CheckpointError: the model does not answer.
    """

    def __init__(self, model: Scorer, name: str, jobs: int, limits: Limits) -> None:
        self.name, self.limits, self.model = name, limits, model
        self.meters = Meters(name)
        self.places = jobs + limits.waiting
        self.bodies = Bodies(limits, self.places)
        self.tagger = Tagger(model)
        self.stopping = False
        self._jobs = jobs
        self._taken = 0
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(jobs, "ced-worker")
        self._first_steps: set[Future[Any]] = set()  # of sounds that nothing was done with yet
        self.has_columns, self.has_embeddings = _warm_up(model)

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
        self._pool.shutdown(wait=False, cancel_futures=True)

    def plan(self, options: Options) -> Plan:
        """Check the options of a request.

        Raises:
            ConfigError: they contradict each other or do not fit the model's classes.
            RefusedError: the model cannot do what they ask for.
        """
        recipe = options.recipe()
        merging = (recipe.release, recipe.gap, recipe.shortest)
        if not recipe.events and merging != (Recipe.release, Recipe.gap, Recipe.shortest):
            raise ConfigError("release, gap and shortest apply to events only; add events=true")
        if recipe.hop is not None and recipe.hop > recipe.window:
            raise ConfigError(f"hop={recipe.hop:g} is longer than window={recipe.window:g}; sound would be left out")
        if options.embeddings != "none" and not self.has_embeddings:
            raise RefusedError(422, f"the model {self.name} has no embeddings")
        if recipe.columns and not self.has_columns:
            raise RefusedError(422, f"the model {self.name} cannot score columns")
        score = self.tagger.scoring(columns=recipe.columns, silence=recipe.silence)
        plan = Plan(options, recipe, recipe.selection(self.tagger.labels), score)
        plan.events()
        return plan

    def run_step(self, work: Callable[..., T], *given: Any) -> "asyncio.Future[T]":
        """Run a step in the pool, in order of arrival."""
        return asyncio.wrap_future(self._pool.submit(work, *given))

    async def answer(self, upload: Upload, plan: Plan) -> bytes:
        """Return the record of an upload as JSON; the upload is closed.

        Raises:
            RefusedError, CedError: the upload cannot be tagged.
            ClosedError: the server was stopped before the work began.
        """
        events, size, end = plan.events(), 0, 0.0
        pieces: list[bytes] = []
        vectors: list[Found] = []

        def add(found: list[Tags]) -> None:
            nonlocal size
            for piece in found:
                pieces.append(_json(asdict(piece)))
                size += len(pieces[-1])
            if size > _LONGEST_ANSWER:
                raise RefusedError(
                    413,
                    f"the answer is longer than {_LONGEST_ANSWER / 1e6:g} MB; give a threshold, a lower top_k or a"
                    " longer hop, or use /v1/audio/stream",
                )

        async with aclosing(self._work(upload, plan)) as results:
            async for found in results:
                end = found.end
                if found.vector is not None:
                    vectors.append(found)
                    size += 12 * len(found.vector)
                add(found.pieces if events is None else _merged(events, found))
        if events is not None:
            add(events.finish())
        head = _json(Record(upload.name, self.name, end, ()).to_json())
        embeddings = b""
        if vectors:
            embeddings = b', "embeddings": ' + _json(_embeddings(vectors, plan.options.embeddings))
        return head.removesuffix(b"[]}") + b"[" + b", ".join(pieces) + b"]" + embeddings + b"}"

    async def stream(self, upload: Upload, plan: Plan) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a stream, each as soon as it is known; the upload is closed.

        Raises:
            RefusedError, CedError: the upload cannot be tagged.
            ClosedError: the server was stopped before the work began.
        """
        options, recipe, events = plan.options, plan.recipe, plan.events()
        assert isinstance(options, StreamOptions)
        end, told, vectors = 0.0, time.monotonic(), []
        begun = False
        overview = None if options.overview is None else Overview(options.overview)
        async with aclosing(self._work(upload, plan, overview)) as results:
            async for found in results:
                if not begun:
                    begun = True
                    yield encode_line(
                        type="begin",
                        format=FORMAT_VERSION,
                        file=upload.name,
                        model=self.name,
                        classes=len(self.tagger.labels),
                        window=recipe.window,
                        hop=recipe.window if recipe.hop is None else recipe.hop,
                        scores=options.scores,
                        encoding=options.encoding,
                    )
                end = found.end
                if found.vector is not None and options.embeddings == "clip":
                    vectors.append(found)
                if events is None or options.scores != "none" or options.embeddings == "windows":
                    yield encode_line(**_window(found, options))
                for piece in [] if events is None else _merged(events, found):
                    yield encode_line(type="event", **asdict(piece))
                if overview is not None and (columns := overview.take()):
                    yield encode_line(type="overview", **columns)
                if time.monotonic() - told >= _PROGRESS_SECONDS:
                    told = time.monotonic()
                    yield encode_line(type="progress", seconds=end)
        for piece in [] if events is None else events.finish():
            yield encode_line(type="event", **asdict(piece))
        if overview is not None and (columns := overview.take(finish=True)):
            yield encode_line(type="overview", **columns)
        last: dict[str, Any] = {"format": FORMAT_VERSION, "file": upload.name, "model": self.name, "seconds": end}
        if vectors:
            last["embedding"] = _embeddings(vectors, "clip")[0]["vector"]
        yield encode_line(type="end", **last)

    async def _work(self, upload: Upload, plan: Plan, overview: Overview | None = None) -> AsyncGenerator[Found, None]:
        """Decode and score an upload window by window, in order; at the end it is closed and its place is free.

        What is decoded is added to the overview, if there is one.

        While the pool has threads to spare, several windows of one sound are scored at the same time.
        """
        if not self._enter():
            upload.close()
            raise ClosedError(DOWN) if self.stopping else busy()
        cancelled = Event()
        windows = _windows(upload, plan.recipe, self.limits.seconds, cancelled, overview)
        steps: set[Future[Any]] = set()  # that have not ended
        pending: deque[asyncio.Future[Found]] = deque()
        begun, cost = False, 0.0

        def run(work: Callable[..., T], *given: Any) -> "asyncio.Future[T]":
            nonlocal begun
            step = self._pool.submit(work, *given)
            if not begun:
                begun = True
                self._first_steps.add(step)
                step.add_done_callback(self._first_steps.discard)
            steps.add(step)
            step.add_done_callback(steps.discard)
            return asyncio.wrap_future(step)

        def release() -> None:
            windows.close()
            upload.close()
            self._leave()

        try:
            while (window := await run(next, windows, None)) is not None:
                cost += max(LEAST_COST, window.end - window.start)
                self._check_cost(cost, plan.recipe)
                pending.append(run(self._find, plan, window))
                while pending and (len(pending) >= self._jobs // self._taken or pending[0].done()):
                    yield await pending.popleft()
            while pending:
                yield await pending.popleft()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.stopping and task is not None and not task.cancelling():  # a step was cancelled, not the request
                raise ClosedError(DOWN) from None
            raise
        finally:
            cancelled.set()
            for result in pending:
                if not result.cancel() and not result.cancelled():
                    result.exception()  # which is of no interest any more
            _when_done([step for step in list(steps) if not step.cancel()], release)

    def _find(self, plan: Plan, window: Window) -> Found:
        scored = plan.score(window)
        vector = None
        if plan.options.embeddings != "none":
            vector = self.model.embed(window.wave[None])[0]  # type: ignore[attr-defined]  # as `plan` has checked
        tagged = [] if plan.recipe.events or plan.recipe.columns else [plan.selection.tags(each) for each in scored]
        self.meters.windows.inc()
        self.meters.sound.inc(window.end - window.start)
        return Found(window.start, window.end, scored, tagged, vector)

    def _check_cost(self, cost: float, recipe: Recipe) -> None:
        if cost > self.limits.seconds + recipe.window:  # the last of several windows may reach past the limit
            raise RefusedError(
                413,
                f"windows of {recipe.window:g} s every {recipe.hop or recipe.window:g} s are more than"
                f" {self.limits.seconds:g} s to score in all (a window counts for {LEAST_COST:g} s at least), the limit"
                " of this server; use a longer hop or window, or less of the sound",
            )

    def _enter(self) -> bool:
        with self._lock:
            if self.full:
                return False
            self._taken += 1
        self.meters.pending.inc()
        return True

    def _leave(self) -> None:
        with self._lock:
            self._taken -= 1
        self.meters.pending.dec()


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
        line["edges"] = [*(round(each.start, 3) for each in found.scored), round(found.end, 3)]
    if options.scores != "none":
        line["scores"] = encode_scores(found.scored, options.encoding)
    if found.vector is not None and options.embeddings == "windows":
        line["embedding"] = found.vector.tolist()
    return line


def _merged(events: OrderedEvents, found: Found) -> list[Tags]:
    return [piece for each in found.scored for piece in events.add(each)]


def _embeddings(vectors: list[Found], kind: str) -> list[dict[str, Any]]:
    starts, ends = (np.array([getattr(each, name) for each in vectors]) for name in ("start", "end"))
    found = Embedding(starts, ends, np.stack([each.vector for each in vectors if each.vector is not None]))
    rows = rows_of("", found, windows=kind == "windows")
    return [{"start": row.start, "end": row.end, "vector": row.vector.tolist()} for row in rows]


def _windows(
    upload: Upload, recipe: Recipe, seconds: float, cancelled: Event, overview: Overview | None = None
) -> Generator[Window, None, None]:
    """Decode an upload and cut it into windows, until `cancelled` is set.

    Raises:
        RefusedError: it is longer than `seconds` (413), or cannot be decoded (422).
    """

    def blocks() -> Iterator[NDArray[np.float32]]:
        held = 0
        for block in audio.stream(upload.source, _BLOCK):
            if cancelled.is_set():
                raise ClosedError("the request was cancelled")
            held += len(block)
            if held > seconds * SAMPLE_RATE:
                raise RefusedError(413, f"{upload.name} is longer than {seconds:g} s, the limit of this server")
            if overview is not None:
                overview.add(block)
            yield block

    try:
        yield from audio.cut(blocks(), recipe.window, recipe.hop)
    except AudioError as error:
        # Arrays have no name of their own, and clients cannot install anything.
        message = str(error).replace(audio.name_of(upload.source), upload.name)
        message = message.partition(f"; {install_command('media')}")[0]
        raise RefusedError(422, message) from error
    except CedError:
        raise
    except Exception as error:  # decoders may fail in any way
        raise RefusedError(422, f"cannot decode {upload.name}: {type(error).__name__}: {error}") from error


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


def _warm_up(model: Scorer) -> tuple[bool, bool]:
    """Run a model once, so that the first request does not wait for it; return whether it has columns and embeddings.

    Raises:
        CheckpointError: the model does not answer.
    """
    wave = (np.zeros(SAMPLE_RATE, np.float32), SAMPLE_RATE)
    tagger = Tagger(model)
    next(tagger.score(wave))
    able = []
    for attempt in (lambda: next(tagger.score(wave, columns=True)), lambda: tagger.embed(wave)):
        try:
            attempt()
            able.append(True)
        except CheckpointError:
            able.append(False)
    return able[0], able[1]
