"""The server: paths, answers and refusals over HTTP; what is done with a sound is in `service`."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

import ced
from ced.errors import AudioError, CedError, ClosedError, ConfigError
from ced.tag.api import BODY, PATH, REFUSALS, Answer, Health, Options, check_once, page
from ced.tag.intake import Limits, RefusedError
from ced.tag.service import BUSY, Meters, Service
from ced.tag.tagger import Scorer

_BACKLOG = 128  # connections that wait to be accepted
_TOLD = 10  # faults of a request that an answer names
_LINGER = 1.0  # seconds in which a client may notice that the rest of its body is not wanted

_log = logging.getLogger(__name__)


class Application:
    """The server as an ASGI application.

    It is the outermost layer, which sees each request from its beginning to the answer, whoever gives it: it counts,
    it ends connections whose body is not read to its end, and it answers what is still open when the server ends.

    Args:
        model: what scores.
        name: what records call it.
        jobs: windows, or groups of short ones, that are scored at a time, a thread each.
        limits: what is refused.

    Raises:
        CheckpointError: the model does not answer.
    """

    def __init__(self, model: Scorer, name: str, *, jobs: int = 1, limits: Limits | None = None) -> None:
        self._service = Service(model, name, jobs, limits or Limits())
        self._app = _routes(self._service, f"Tags sounds with {name}: {len(model.labels)} classes.")

    @property
    def meters(self) -> Meters:
        """What is measured."""
        return self._service.meters

    def stop(self) -> None:
        """Refuse requests whose sound has not been begun."""
        self._service.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or begin or end with the server."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, began = Headers(scope=scope), time.perf_counter()
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        counted = (scope["method"], scope["path"]) == ("POST", PATH)
        started = False

        async def received() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                unread = False
            return message

        async def sent(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if unread:
                    MutableHeaders(scope=message)["Connection"] = "close"
                if counted:
                    self.meters.count(message["status"], time.perf_counter() - began)
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _linger(received)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, received, sent)
        except asyncio.CancelledError:  # the server ends
            if not started:
                await _refusal(ClosedError())(scope, received, sent)


class Server(uvicorn.Server):
    """Uvicorn with an application that is told when the server is asked to stop.

    Args:
        app: what answers.
        proxies: networks whose X-Forwarded-For is believed.
        grace: seconds in which sounds that are begun may end when the server is stopped.
    """

    def __init__(self, app: Application, proxies: Sequence[str] = (), grace: int = 30) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # its errors go where all of them go, on standard error
            log_level="error",  # what clients do wrong is theirs
            access_log=False,
            http="h11",  # which bounds the size of headers; another parser may be installed
            ws="none",
            server_header=False,
            backlog=_BACKLOG,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what only waits, and end with the rest."""
        self._app.stop()
        await super().shutdown(sockets)


def _routes(service: Service, description: str) -> FastAPI:
    """Return what answers, path by path."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="ced serve",
        version=ced.__version__,
        description=description,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    for kind in (CedError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _refused)

    admitted = [Depends(service.admit)]  # before the options are looked at

    @app.post(PATH, response_model=Answer, responses=REFUSALS, openapi_extra=BODY, dependencies=admitted)
    async def classify(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Tag a sound: the most probable classes of each window, or events."""
        check_once([name for name, _ in request.query_params.multi_items()])
        return Response(await service.answer(request, options), media_type="application/json")

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

    return app


async def _linger(receive: Receive) -> None:
    """Read what a client still sends, for a while: were the connection closed at once, it might not see the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while (await receive()).get("more_body", False):
                pass


async def _refused(_: Request, error: Exception) -> Response:
    return _refusal(error)


def _refusal(error: Exception) -> Response:
    """Return what a client is told of whatever went wrong: one line of JSON."""
    headers: Mapping[str, str] | None = None
    match error:
        case RefusedError():
            status, message, headers = error.status, str(error), error.headers
        case ConfigError() | AudioError():
            status, message = 422, str(error)
        case RequestValidationError():
            status, message = 422, _faults(error)
        case HTTPException():
            status, message, headers = error.status_code, str(error.detail), error.headers
        case ClientDisconnect():
            status, message = 499, "the client has gone"
        case ClosedError():
            status, message, headers = 503, "the server is going down; try again soon", {"Retry-After": "1"}
        case _:
            _log.error("a request failed: %s: %s", type(error).__name__, error)
            status, message = 500, "the server failed; its log says why"
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


def _faults(error: RequestValidationError) -> str:
    """Return what is wrong with options, in one line."""
    faults = []
    for fault in error.errors():
        name = str(fault["loc"][1])[:100]  # behind the "query" that it is a part of
        if fault["type"] == "extra_forbidden":
            faults.append(f"there is no option {name}")
        elif fault["type"] != "none_required":  # the other half of an option that may be left out
            faults.append(f"{name}: {fault['msg']}")
    more = [f"and {len(faults) - _TOLD} more faults"] if len(faults) > _TOLD else []
    return "; ".join([*faults[:_TOLD], *more])
