"""The scheduler: a pool of threads decodes and scores uploads window by window, in order of arrival.

One step decodes and scores the next window of one upload. All steps wait in one queue, so requests take turns.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, TooLongError
from ced.serve.body import Limits, RefusedError, Upload
from ced.serve.metrics import Metrics
from ced.serve.overview import Overview
from ced.serve.schema import RequestOptions
from ced.sound.audio import SAMPLE_RATE, Sound, Window, cut_windows, open_sound
from ced.sound.labels import ClassTable
from ced.tag.events import Merging, OrderedEvents
from ced.tag.options import TagOptions
from ced.tag.records import Kind, Record, Scored, Tags
from ced.tag.tagger import WindowScorer

LEAST_COST = 1.0  # seconds that a window counts at least towards the limit of a request
_BLOCK = 1.0  # seconds decoded at a time, so that a header with a false rate costs little
_VALUES = 384_000  # samples x channels that may be decoded per second of the limit: two channels at 192 kHz

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CheckedRequest:
    """The options of a request, checked against each other and against the model before the body is read."""

    request: RequestOptions
    options: TagOptions
    labels: ClassTable

    def events(self) -> OrderedEvents | None:
        """Return a new merger of windows into events; None if the request does not ask for events."""
        if not self.options.events:
            return None
        return OrderedEvents(Merging.of(self.options, self.labels))


@dataclass(frozen=True, eq=False)
class DecodedWindow:
    """One window of an upload."""

    number: int  # from 0
    window: Window
    is_last: bool
    overview: dict[str, Any] | None  # the columns of the overview that were completed since the previous window


@dataclass(frozen=True, eq=False)
class ScoredWindow:
    """One window of an upload with the results of the model."""

    decoded: DecodedWindow
    scores: list[Scored]  # one, or one for each column
    pieces: list[Tags]  # the selected tags; empty with events
    embedding: NDArray[np.float32] | None  # (d,)

    @property
    def start(self) -> float:
        """Start of the window in seconds."""
        return self.decoded.window.start

    @property
    def end(self) -> float:
        """End of the window in seconds."""
        return self.decoded.window.end


class Decoding:
    """Decodes an upload and cuts it into windows; any thread may take the next one.

    Args:
        upload: the sound.
        options: lengths of the windows, channel and so on.
        limits: the longest sound and the most work.
        overview: receives the samples as they are decoded, if given.

    Attributes:
        upload: the sound.
        cancelled: if set to True, from any thread, decoding ends at the next block.
    """

    def __init__(self, upload: Upload, options: TagOptions, limits: Limits, overview: Overview | None) -> None:
        self.upload, self.cancelled = upload, False
        self._options, self._limits, self._overview = options, limits, overview
        self._sound: Sound | None = None
        self._lock = Lock()
        self._windows = self._cut()
        self._next: Window | None = None
        self._error: Exception | None = None  # raised while the window after the next one was decoded
        self._end = 0.0  # seconds that were taken
        self._number = -1  # of the next window; below 0: the first one has not been decoded yet

    def close(self) -> None:
        """Close the upload; no other thread may be using it."""
        self._windows.close()
        self.upload.close()

    def take(self) -> DecodedWindow | None:
        """Return the next window; None at the end.

        One window is decoded ahead, to know which one is the last.

        Raises:
            RefusedError: the sound is too long or too much work (413), or cannot be decoded (422).
            ClosedError: decoding was cancelled.
        """
        with self._lock:
            if self._number < 0:
                self._number, self._next = 0, next(self._windows, None)
            if self._next is None:
                if self._error is not None:
                    raise self._error
                return None
            number, window = self._number, self._next
            self._number, self._next, self._end = number + 1, None, window.end
            try:
                self._next = next(self._windows, None)
            except Exception as error:
                self._error = error
            columns = None if self._overview is None else self._overview.take()
            return DecodedWindow(number, window, self._next is None and self._error is None, columns)

    def rest_of_overview(self) -> dict[str, Any] | None:
        """Return the last columns of the overview, after the sound has been decoded to its end."""
        return None if self._overview is None else self._overview.take(finish=True)

    @property
    def warnings(self) -> list[str]:
        """Warnings about the file, as far as it has been decoded."""
        return [] if self._sound is None else list(self._sound.warnings)

    def record(self, model: str) -> Record:
        """Return the record of the windows taken so far, without its pieces."""
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
        """Decode and cut; errors are those of `take`."""
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
        except AudioError as error:  # without its hint: clients cannot install anything
            raise RefusedError(422, f"{self.upload.name}: {error.reason}") from error

    def _blocks(self, sound: Sound) -> Iterator[NDArray[np.float32]]:
        samples = 0
        for block in sound.blocks():
            samples += len(block)
            self._check_length(samples / SAMPLE_RATE)
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
        if cost > limit + options.window:  # the last of windows laid end to end may reach past the limit
            raise RefusedError(
                413,
                f"windows of {options.window:g} s every {options.step:g} s are more than {limit:g} s to score in all"
                f" (a window counts for {LEAST_COST:g} s at least), the limit of this server; use a longer hop or"
                " window, or less of the sound",
            )


@dataclass(frozen=True, eq=False)
class _Step:
    """The next window of an upload, to be decoded and scored; the result is None if there is no further window."""

    decoding: Decoding
    request: CheckedRequest
    result: "Future[ScoredWindow | None]"


class Scheduler:
    """Executes steps in order of arrival, in a pool of threads; short windows that already wait are scored together.

    No step waits to be batched: only windows of the same length and options whose steps are already in the queue share
    a call, at most as many as the model scores faster together (`OnnxModel.at_once`) and as leave work for the other
    threads.

    Args:
        scorer: scores windows.
        jobs: threads.
        metrics: counts windows and seconds of sound.
    """

    def __init__(self, scorer: WindowScorer, jobs: int, metrics: Metrics) -> None:
        self._scorer, self._jobs, self._metrics = scorer, jobs, metrics
        self._pool = ThreadPoolExecutor(jobs, "ced-worker")
        self._at_once: int = getattr(scorer.model, "at_once", 0)  # samples
        self._waiting: deque[_Step] = deque()
        self._first_steps: set[Future[Any]] = set()  # of uploads whose work has not begun

    def run(self, work: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
        """Run a function in the pool, in order of arrival among all steps."""
        return asyncio.wrap_future(self._pool.submit(work, *arguments))

    def submit(self, decoding: Decoding, request: CheckedRequest, *, is_first: bool) -> "Future[ScoredWindow | None]":
        """Add a step to the queue.

        Args:
            decoding: the upload.
            request: how it is tagged.
            is_first: whether it is the first step of its upload.
        """
        step = _Step(decoding, request, Future())
        if is_first:
            self._first_steps.add(step.result)
            step.result.add_done_callback(self._first_steps.discard)
        self._waiting.append(step)
        self._pool.submit(self._work)
        return step.result

    def cancel_waiting(self) -> None:
        """Cancel the steps of uploads whose work has not begun."""
        for step in list(self._first_steps):
            step.cancel()

    def close(self) -> None:
        """End the threads after the steps that are running."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        """Execute the oldest step, and those that can share its call; there is one such task for each step."""
        group: list[tuple[_Step, DecodedWindow]] = []
        most, share = 1, -(-len(self._waiting) // self._jobs)
        while len(group) < most and (taken := self._take_step()) is not None:
            group.append(taken)
            step, decoded = group[0]
            samples = len(decoded.window.wave)
            most = min(share, self._at_once // samples)
            if taken[0].request.options != step.request.options or len(taken[1].window.wave) != samples:
                group.pop()
                self._finish([taken])
        if group:
            self._finish(group)

    def _take_step(self) -> tuple[_Step, DecodedWindow] | None:
        """Return the oldest step that has a window, and that window; None if no step waits."""
        while True:
            try:
                step = self._waiting.popleft()
            except IndexError:
                return None
            if not step.result.set_running_or_notify_cancel():
                continue
            try:
                decoded = step.decoding.take()
            except BaseException as error:
                step.result.set_exception(error)
                continue
            if decoded is not None:
                return step, decoded
            step.result.set_result(None)

    def _finish(self, group: list[tuple[_Step, DecodedWindow]]) -> None:
        """Score windows of one length in one call, and set the results of their steps."""
        windows = [decoded.window for _, decoded in group]
        try:
            scores = self._scorer.score_together(windows, group[0][0].request.options)
            results = [
                self._selected(step.request, decoded, scored)
                for (step, decoded), scored in zip(group, scores, strict=True)
            ]
        except BaseException as error:
            for step, _ in group:
                step.result.set_exception(error)
            return
        self._metrics.call_windows.observe(len(group))
        for (step, _), result in zip(group, results, strict=True):
            step.result.set_result(result)

    def _selected(self, request: CheckedRequest, decoded: DecodedWindow, scores: list[Scored]) -> ScoredWindow:
        """Select the tags of a scored window, and compute its embedding if the request asks for it."""
        options, window = request.options, decoded.window
        embedding = None if request.request.embeddings == "none" else self._scorer.embed(window)
        selection = options.selection(request.labels)
        pieces = [] if options.events or options.columns else [selection.tags(each) for each in scores]
        self._metrics.sound.inc(window.end - window.start)
        return ScoredWindow(decoded, scores, pieces, embedding)


class UploadWork:
    """The steps of one upload, of which several are in the queue while there are threads to spare.

    Args:
        scheduler: executes the steps.
        decoding: the upload.
        request: how it is tagged.
    """

    def __init__(self, scheduler: Scheduler, decoding: Decoding, request: CheckedRequest) -> None:
        self._scheduler, self._decoding, self._request = scheduler, decoding, request
        self._unfinished: set[Future[ScoredWindow | None]] = set()
        self._pending: deque[asyncio.Future[ScoredWindow | None]] = deque()
        self._has_begun = False

    async def windows(self, share: Callable[[], int]) -> AsyncGenerator[ScoredWindow, None]:
        """Yield the scored windows in order of time.

        Args:
            share: returns how many steps of this upload may be in the queue.

        Raises:
            RefusedError, CedError: the upload cannot be tagged; raised after the windows before the fault.
        """
        ready: dict[int, ScoredWindow] = {}  # by number; threads may finish in another order than steps began
        number, is_complete = 0, False
        fault: Exception | None = None
        while self._pending or not is_complete:
            most = max(1, share()) if number else 1  # most sounds have one window only
            while not is_complete and len(self._pending) < most:
                self._submit()
            try:
                window = await self._pending.popleft()
            except Exception as error:
                fault, is_complete = fault or error, True
                continue
            if window is None or window.decoded.is_last:
                is_complete = True
            if window is not None:
                ready[window.decoded.number] = window
            while number in ready:
                yield ready.pop(number)
                number += 1
        if fault is not None:
            raise fault

    def cancel(self, then: Callable[[], None]) -> None:
        """Cancel the steps that have not begun, and call `then` when the others have ended, in a thread of the pool."""
        self._decoding.cancelled = True
        for result in self._pending:
            if not result.cancel() and not result.cancelled():
                result.exception()  # marks it as retrieved, so that asyncio does not log it
        _call_after([step for step in list(self._unfinished) if not step.cancel()], then)

    def _submit(self) -> None:
        step = self._scheduler.submit(self._decoding, self._request, is_first=not self._has_begun)
        self._has_begun = True
        self._unfinished.add(step)
        step.add_done_callback(self._unfinished.discard)
        self._pending.append(asyncio.wrap_future(step))


def _call_after(steps: list[Future[Any]], action: Callable[[], None]) -> None:
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
