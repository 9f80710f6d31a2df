"""The server: sounds come in as requests, records go out, as the lines of `ced tag -f jsonl` are."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import ced
from ced.errors import AudioError, CedError, CheckpointError, ConfigError
from ced.sound.audio import SAMPLE_RATE
from ced.tag import intake
from ced.tag.api import BODY, PATH, REFUSALS, Answer, Health, Options, page
from ced.tag.embeddings import rows_of
from ced.tag.inputs import Input
from ced.tag.intake import Allowance, Limits, RefusedError, Room, Upload
from ced.tag.recipe import Recipe, recording
from ced.tag.tagger import Scorer, Tagger
from ced.tag.together import Asker, SharedModel

BUSY = "as many requests as can be are waiting; try again soon"
STOPPING = "the server is going down; try again soon"

_log = logging.getLogger(__name__)


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
        self.answers = Counter("ced_requests", "Sounds handed in, by status.", ["status"], registry=self.registry)
        self.took = Histogram(
            "ced_request_seconds", "From a request to its answer, of those with status 200.", registry=self.registry
        )
        self.heard = Counter("ced_sound_seconds", "Seconds of sound that were tagged.", registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.together = Histogram(
            "ced_call_windows", "Windows scored in one call.", buckets=sizes, registry=self.registry
        )


class Service:
    """What the server does with a sound, in threads, within its limits."""

    def __init__(self, model: Scorer, name: str, jobs: int, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.room = Room(jobs + limits.waiting)
        self.meters = Meters(name, self.room)
        self.allowance = None if limits.a_minute is None else Allowance(limits.a_minute)
        self._model = SharedModel(model, jobs, self.meters.together.observe)
        # A thread for each request that is let in: they wait for their turn window by window.
        self._pool = ThreadPoolExecutor(jobs + limits.waiting, "ced-request")
        self._has_embeddings = _warm_up(model)

    def close(self) -> None:
        """Take on nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: Request, options: Options) -> bytes:
        """Return the answer to a request, as JSON.

        Raises:
            RefusedError, ConfigError, AudioError: the request cannot be answered.
            ClientDisconnect: nobody waits for an answer.
        """
        try:
            return await self._answer(request, options)
        except asyncio.CancelledError as error:  # the server stops, and has waited long enough
            raise RefusedError(503, STOPPING, 1.0) from error

    async def _answer(self, request: Request, options: Options) -> bytes:
        client = request.client.host if request.client else ""
        if self.allowance is not None and (seconds := self.allowance.ask(client)) > 0:
            most = f"{self.limits.a_minute} requests a minute are the most of one client"
            raise RefusedError(429, f"{most}; the next may come in {seconds:.0f} s", seconds)
        if not self.room.enter():
            raise RefusedError(503, BUSY, 1.0)
        gone = Event()
        try:
            recipe = options.recipe()
            upload = await intake.receive(request, self.limits)
            job = self._pool.submit(self._work, upload, recipe, options.embeddings, gone)
        except BaseException:
            self.room.leave()
            raise
        job.add_done_callback(lambda _: self.room.leave())
        return await _outcome(job, request, gone)

    def _work(self, upload: Upload, recipe: Recipe, embeddings: str, gone: Event) -> bytes:
        if embeddings != "none" and not self._has_embeddings:
            raise RefusedError(422, f"the model {self.name} gives no embeddings")
        tagger = Tagger(Asker(self._model, gone))
        process = recording(tagger, recipe, self.name)
        wave = intake.load(upload, self.limits.seconds)
        intake.check_cost(len(wave), recipe.window, recipe.hop, self.limits.seconds)
        source = (wave, SAMPLE_RATE)
        record = process(Input(upload.name, source, Path(upload.name)))
        answer = record.to_json()
        if embeddings != "none":
            found = tagger.embed(source, window=recipe.window, hop=recipe.hop)
            rows = rows_of(upload.name, found, windows=embeddings == "windows")
            answer["embeddings"] = [{"start": row.start, "end": row.end, "vector": row.vector.tolist()} for row in rows]
        self.meters.heard.inc(record.seconds)
        return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()


def application(model: Scorer, name: str, *, jobs: int = 1, limits: Limits | None = None) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        model: what scores.
        name: what records call it.
        jobs: windows, or groups of short ones, that are scored at a time, a thread each.
        limits: what is refused.

    Raises:
        CheckpointError: the model does not answer.
    """
    service = Service(model, name, jobs, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="ced serve",
        version=ced.__version__,
        description=f"Tags sounds with {name}: {len(model.labels)} classes.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_refusals(app, service.meters)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post(PATH, response_model=Answer, responses=REFUSALS, openapi_extra=BODY)
    async def classify(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Tag a sound: the most probable classes of each window, or events."""
        began = time.perf_counter()
        intake.refuse_repeated(request, ("labels", "exclude"))
        answer = await service.answer(request, options)
        service.meters.took.observe(time.perf_counter() - began)
        service.meters.answers.labels(200).inc()
        return Response(answer, media_type="application/json")

    @app.head("/healthz/live", include_in_schema=False)
    @app.get("/healthz/live")
    async def live() -> Health:
        """Say that the server runs."""
        return Health(status="ok")

    @app.head("/healthz/ready", include_in_schema=False)
    @app.get("/healthz/ready", responses={503: REFUSALS[503]})
    async def ready() -> Health:
        """Say whether another request would be let in."""
        if service.room.full:
            raise RefusedError(503, BUSY, 1.0)
        return Health(status="ok")

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        return HTMLResponse(page(app.openapi()), headers={"Content-Security-Policy": policy})


def _add_refusals(app: FastAPI, meters: Meters) -> None:
    """Answer whatever goes wrong with one line of JSON."""

    async def refused(request: Request, error: Exception) -> Response:
        status, message, headers = _refusal(error)
        if (request.method, request.url.path) == ("POST", PATH):
            meters.answers.labels(status).inc()
        return JSONResponse({"error": " ".join(message.split())}, status, headers)

    for kind in (CedError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refused)


def _refusal(error: Exception) -> tuple[int, str, Mapping[str, str] | None]:
    """Return the status, the message and the headers of an error."""
    match error:
        case RefusedError():
            return error.status, str(error), error.headers
        case ConfigError() | AudioError():
            return 422, str(error), None
        case RequestValidationError():
            return 422, _faults(error), None
        case HTTPException():
            return error.status_code, str(error.detail), error.headers
        case ClientDisconnect():
            return 499, "the client has gone", None
    _log.error("a request failed: %s: %s", type(error).__name__, error)
    return 500, "the server failed; its log says why", None


def _faults(error: RequestValidationError) -> str:
    """Return what is wrong with options, in one line."""
    faults = []
    for fault in error.errors():
        name = str(fault["loc"][1])[:100]  # behind the "query" that it is a part of
        if fault["type"] == "extra_forbidden":
            faults.append(f"there is no option {name}")
        elif fault["type"] != "none_required":  # the other half of an option that may be left out
            faults.append(f"{name}: {fault['msg']}")
    return "; ".join(faults)


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
