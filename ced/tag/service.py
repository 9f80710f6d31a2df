"""The work of the server: a sound comes in as a request, a record goes out, as a line of `ced tag -f jsonl` is."""

import asyncio
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from starlette.requests import ClientDisconnect

import ced
from ced.errors import CheckpointError
from ced.sound.audio import SAMPLE_RATE
from ced.tag import intake
from ced.tag.api import Options
from ced.tag.embeddings import rows_of
from ced.tag.intake import Allowance, Limits, RefusedError, Room, Upload
from ced.tag.options import TagOptions
from ced.tag.tagger import Scorer, Tagger
from ced.tag.together import Asker, SharedModel

BUSY = "as many requests as can be are waiting; try again soon"


class Meters:
    """What Prometheus is told, in a registry of the server's own."""

    def __init__(self, model: str, room: Room) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        info = Gauge("ced_info", "Version and model, as labels.", ["version", "model"], registry=self.registry)
        info.labels(ced.__version__, model).set(1)
        pending = Gauge("ced_pending_requests", "Requests that are read, waiting or worked on.", registry=self.registry)
        pending.set_function(lambda: room.taken)
        self._answers = Counter("ced_requests", "Requests to tag, by status.", ["status"], registry=self.registry)
        self._took = Histogram(
            "ced_request_seconds", "From a request to its answer, of those with status 200.", registry=self.registry
        )
        self.heard = Counter("ced_sound_seconds", "Seconds of sound that were tagged.", registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.together = Histogram(
            "ced_call_windows", "Windows scored in one call.", buckets=sizes, registry=self.registry
        )

    def count(self, status: int, seconds: float) -> None:
        """Take note of the answer to a request."""
        self._answers.labels(status).inc()
        if status == 200:
            self._took.observe(seconds)


class Service:
    """What the server does with a sound, in threads, within its limits."""

    def __init__(self, model: Scorer, name: str, jobs: int, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.room = Room(jobs + limits.waiting)
        self.meters = Meters(name, self.room)
        self._allowance = None if limits.a_minute is None else Allowance(limits.a_minute)
        self._model = SharedModel(model, jobs, self.meters.together.observe)
        # A thread for each request that is let in: they wait for their turn window by window.
        self._pool = ThreadPoolExecutor(jobs + limits.waiting, "ced-request")
        self._has_embeddings = _warm_up(model)

    def stop(self) -> None:
        """Go on with the sounds that are begun, and with no others."""
        self._model.stop(begun=False)

    def close(self) -> None:
        """End whatever goes on, each sound with the window it is at."""
        self._model.stop(begun=True)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def admit(self, request: Request) -> None:
        """Count a request, whatever becomes of it.

        Raises:
            RefusedError: its client asks too often (429).
        """
        client = request.client.host if request.client else ""
        if self._allowance is not None and (seconds := self._allowance.ask(client)) > 0:
            most = f"{self.limits.a_minute} requests a minute are the most of one client"
            raise RefusedError(429, f"{most}; the next may come in {math.ceil(seconds)} s", seconds)

    async def answer(self, request: Request, options: Options) -> bytes:
        """Return the answer to a request, as JSON.

        Raises:
            RefusedError, ConfigError, AudioError: the request cannot be answered.
            ClosedError: the server was stopped before it came to the sound.
            ClientDisconnect: nobody waits for an answer.
        """
        if not self.room.enter():
            raise RefusedError(503, BUSY, 1.0)
        gone = Event()
        try:
            chosen = options.tag_options()
            upload = await intake.receive(request, self.limits)
            job = self._pool.submit(self._work, upload, chosen, options.embeddings, gone)
        except BaseException:
            self.room.leave()
            raise
        job.add_done_callback(lambda _: self.room.leave())
        return await _outcome(job, request, gone)

    def _work(self, upload: Upload, options: TagOptions, embeddings: str, gone: Event) -> bytes:
        if embeddings != "none" and not self._has_embeddings:
            raise RefusedError(422, f"the model {self.name} gives no embeddings")
        tagger = Tagger(Asker(self._model, gone), name=self.name)
        options = tagger.checked(options)
        wave = intake.load(upload, self.limits.seconds)
        intake.check_cost(len(wave), options.window, options.step, self.limits.seconds)
        source = (wave, SAMPLE_RATE)
        record = tagger.tag(source, options, name=upload.name)
        answer = record.to_json()
        if embeddings != "none":
            found = tagger.embed(source, window=options.window, hop=options.hop)
            rows = rows_of(upload.name, found, windows=embeddings == "windows")
            answer["embeddings"] = [{"start": row.start, "end": row.end, "vector": row.vector.tolist()} for row in rows]
        self.meters.heard.inc(record.seconds)
        return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()


async def _outcome(job: Future[bytes], request: Request, gone: Event) -> bytes:
    """Wait for a job, or until the client goes away; then the job ends with the window it is at."""
    result = asyncio.wrap_future(job)
    leaving = asyncio.ensure_future(_left(request))
    both: set[asyncio.Future[Any]] = {result, leaving}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        gone.set()
        leaving.cancel()
        result.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _warm_up(model: Scorer) -> bool:
    """Let a model answer once, so that the first request need not wait; return whether it gives embeddings."""
    wave = np.zeros(SAMPLE_RATE, np.float32)
    tagger = Tagger(model)
    next(tagger.score((wave, SAMPLE_RATE)))
    try:
        tagger.embed((wave, SAMPLE_RATE))
    except CheckpointError:
        return False
    return True
