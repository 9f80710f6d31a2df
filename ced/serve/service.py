"""The service behind the routes: admits requests within limits, and tags their sounds."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from threading import Lock

import numpy as np

from ced.errors import CheckpointError, ClosedError
from ced.serve.answers import JsonAnswer, JsonLines
from ced.serve.body import Bodies, Limits, RefusedError, Upload, busy
from ced.serve.metrics import Metrics
from ced.serve.overview import Overview
from ced.serve.scheduler import CheckedRequest, Decoding, Scheduler, ScoredWindow, UploadWork
from ced.serve.schema import RequestOptions, StreamOptions
from ced.sound.audio import SAMPLE_RATE, Window
from ced.tag.options import BATCH, TagOptions
from ced.tag.tagger import Scorer, WindowScorer

DOWN = "the server is shutting down; try again soon"


class Service:
    """Tags uploads within limits.

    At most `jobs` + `limits.waiting` uploads are held. Their windows are scored in turns, so a long sound does not
    delay a short one by more than a window.

    Args:
        model: scores waves.
        name: its name in records.
        jobs: windows that are decoded and scored at the same time, each in a thread; on an accelerator more threads
            decode and wait for a call that they share.
        batch: windows that share a call on an accelerator.
        limits: which requests are refused.
        addresses: whether sounds may be fetched from addresses.

    Attributes:
        stopping: whether the server is shutting down.

    Raises:
        CheckpointError: the model cannot score a wave.
    """

    def __init__(
        self, model: Scorer, name: str, jobs: int, limits: Limits, *, batch: int = BATCH, addresses: bool = False
    ) -> None:
        self.name, self.limits, self.model = name, limits, model
        self.metrics = Metrics(name)
        self.bodies = Bodies(limits, jobs + limits.waiting, addresses=addresses)
        self.scorer = WindowScorer(model, name, batch)
        self._threads = self.scorer.threads(jobs)
        self.scheduler = Scheduler(self.scorer, self._threads, self.metrics)
        self.stopping = False
        self._places = jobs + limits.waiting
        self._taken = 0  # places
        self._lock = Lock()
        self.has_columns, self.has_embeddings = _warm_up(self.scorer)

    @property
    def full(self) -> bool:
        """Whether another request would be refused."""
        return self._taken >= self._places or self.stopping

    def stop(self) -> None:
        """Refuse new sounds, and those whose work has not begun."""
        self.stopping = True
        self.scheduler.cancel_waiting()

    def close(self) -> None:
        """End all work after the steps that are running."""
        self.stop()
        self.bodies.close()
        self.scheduler.close()
        self.scorer.close()

    def check(self, request: RequestOptions) -> CheckedRequest:
        """Check the options of a request.

        Raises:
            ConfigError: they contradict each other or do not fit the model.
            RefusedError: the model has no columns or embeddings (422).
        """
        if request.embeddings != "none" and not self.has_embeddings:
            raise RefusedError(422, f"the model {self.name} has no embeddings")
        options = request.tag_options()
        if options.columns and not self.has_columns:
            raise RefusedError(422, f"the model {self.name} cannot score columns")
        self.scorer.check(options)
        return CheckedRequest(request, options, self.scorer.labels)

    async def answer(self, upload: Upload, request: CheckedRequest) -> bytes:
        """Return the record of an upload as JSON; the upload is closed.

        Raises:
            RefusedError, CedError: the upload cannot be tagged.
            ClosedError: the server was stopped before the work began.
        """
        decoding = self._admit(upload, request)
        answer = JsonAnswer(request, decoding, self.name)
        async with aclosing(self._scored(decoding, request)) as windows:
            async for window in windows:
                answer.add(window)
        return answer.finish()

    async def stream(self, upload: Upload, request: CheckedRequest) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a stream, each as soon as it is known; the upload is closed.

        Raises:
            RefusedError, CedError: the upload cannot be tagged.
            ClosedError: the server was stopped before the work began.
        """
        options = request.request
        assert isinstance(options, StreamOptions)
        decoding = self._admit(upload, request, None if options.overview is None else Overview(options.overview))
        lines = JsonLines(request, decoding, self.name)
        async with aclosing(self._scored(decoding, request)) as windows:
            async for window in windows:
                for line in lines.add(window):
                    yield line
        for line in lines.finish():
            yield line

    def _admit(self, upload: Upload, request: CheckedRequest, overview: Overview | None = None) -> Decoding:
        """Take a place for an upload.

        Raises:
            RefusedError: no place is free (503).
            ClosedError: the server was stopped.
        """
        with self._lock:
            full = self.full
            self._taken += not full
        if full:
            upload.close()
            raise ClosedError(DOWN) if self.stopping else busy()
        self.metrics.pending.inc()
        return Decoding(upload, request.options, self.limits, overview)

    def _release(self, decoding: Decoding) -> None:
        """Close an upload, and free its place."""
        decoding.close()
        with self._lock:
            self._taken -= 1
        self.metrics.pending.dec()

    def _share(self) -> int:
        """Return the number of threads for each upload."""
        return self._threads // self._taken

    async def _scored(self, decoding: Decoding, request: CheckedRequest) -> AsyncGenerator[ScoredWindow, None]:
        """Yield the scored windows of an upload in order; at the end it is closed and its place is free."""
        work = UploadWork(self.scheduler, decoding, request)
        try:
            async with aclosing(work.windows(self._share)) as windows:
                async for window in windows:
                    yield window
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.stopping and task is not None and not task.cancelling():  # a step was cancelled, not the request
                raise ClosedError(DOWN) from None
            raise
        finally:
            work.cancel(then=lambda: self._release(decoding))


def _warm_up(scorer: WindowScorer) -> tuple[bool, bool]:
    """Run a model once, so that the first request does not wait for it; return whether it has columns and embeddings.

    Raises:
        CheckpointError: the model cannot score a wave.
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
