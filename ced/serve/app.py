"""The server as an ASGI application: routes, errors as JSON, and the page."""

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response, Security, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import ced
from ced.errors import AudioError, CedError, ClosedError, ConfigError
from ced.serve import schema
from ced.serve.answers import encode_line
from ced.serve.body import Limits, RefusedError, Upload, busy
from ced.serve.live import LiveSession
from ced.serve.middleware import FAILED, LIVENESS, POLICY, Gate, SlowClientError, problem
from ced.serve.scheduler import CheckedRequest
from ced.serve.schema import CLASSIFY, LIVE_PATH, STREAM, RequestOptions, StreamOptions
from ced.serve.service import DOWN, Service
from ced.sound.audio import SAMPLE_RATE
from ced.sound.features import HOP_SECONDS, PATCH
from ced.tag.options import BATCH
from ced.tag.tagger import Scorer

STATIC = Path(__file__).with_name("static")
_SWAGGER = "vendor/swagger-ui"  # below STATIC

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """Who may use the server, and under which host names.

    Attributes:
        keys: API keys; none: no key is needed.
        hosts: host names that requests may be addressed to; none: any.
        root_path: prefix of all paths that a proxy adds.
        addresses: whether a request may name the http(s) address of a sound, which is fetched from public hosts only.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    root_path: str = ""
    addresses: bool = False


class Application:
    """The server as an ASGI application: the routes, behind the checks of `middleware.Gate`.

    Args:
        model: scores waves.
        name: its name in records.
        jobs: windows that are scored at the same time, each in a thread.
        batch: windows that share a call on an accelerator.
        limits: which requests are refused.
        access: who may use the server.

    Attributes:
        service: tags the sounds.
        sessions: the live connections.

    Raises:
        CheckpointError: the model cannot score a wave.
    """

    def __init__(
        self,
        model: Scorer,
        name: str,
        *,
        jobs: int = 1,
        batch: int = BATCH,
        limits: Limits | None = None,
        access: Access | None = None,
    ) -> None:
        limits, access = limits or Limits(), access or Access()
        self.service = Service(model, name, jobs, limits, batch=batch, addresses=access.addresses)
        self.sessions: set[LiveSession] = set()
        self._addresses = access.addresses
        self._gate = Gate(self._build(access), limits, access.keys, access.root_path, self._observe)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self._gate(scope, receive, send)

    async def stop(self, patience: float) -> None:
        """Refuse requests whose work has not begun, and end live sessions, waiting for them for some seconds."""
        self.service.stop()
        end = time.monotonic() + patience
        while self.sessions and time.monotonic() < end:
            for session in list(self.sessions):
                session.stop()
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End all work after the steps that are running."""
        self.service.close()

    def _observe(self, method: str, path: str, status: int, seconds: float) -> None:
        if method == "POST" and path in (CLASSIFY, STREAM):
            self.service.metrics.count_request(status, seconds)

    def _build(self, access: Access) -> FastAPI:
        """Return the FastAPI application with all routes."""
        app = FastAPI(
            title="ced serve",
            version=ced.__version__,
            description=f"Tags sounds with {self.service.name}: {len(self.service.model.labels)} classes.",
            docs_url=None,
            redoc_url=None,
            lifespan=self._lifespan,
        )
        if access.hosts:
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=access.hosts, www_redirect=False)
        for kind in (CedError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(kind, _answer_error)
        # The gate checks the key before a route is chosen; this only describes it in the OpenAPI document.
        secured = [Security(HTTPBearer(auto_error=False))] if access.keys else []
        self._add_tagging(app, secured)
        self._add_operation(app)
        app.add_api_route("/docs", _docs, include_in_schema=False)
        app.openapi = partial(_with_stream_lines, app.openapi)  # type: ignore[method-assign]
        app.router.default = _Page(directory=STATIC, html=True)  # for paths without a route, so a wrong method is 405
        return app

    def _add_tagging(self, app: FastAPI, secured: Sequence[Any]) -> None:
        """Add the routes that tag sounds or describe the model."""
        body = schema.body(self._addresses)
        app.add_api_route(
            CLASSIFY,
            self._classify,
            name="classify",
            methods=["POST"],
            response_model=schema.Answer,
            responses=schema.REFUSALS,
            openapi_extra=body,
            dependencies=secured,
        )
        app.add_api_route(
            STREAM,
            self._stream,
            name="stream",
            methods=["POST"],
            response_class=Response,
            responses={200: schema.STREAM_ANSWER, **schema.REFUSALS},
            openapi_extra=body,
            dependencies=secured,
        )
        app.add_api_route(
            schema.MODEL, self._model, name="model", dependencies=secured, responses={401: schema.REFUSALS[401]}
        )
        app.add_api_websocket_route(LIVE_PATH, self._live)

    def _add_operation(self, app: FastAPI) -> None:
        """Add the routes for those who operate the server: health and metrics."""
        app.add_api_route(LIVENESS, self._alive, name="alive")
        app.add_api_route("/healthz/ready", self._ready, name="ready", responses={503: schema.REFUSALS[503]})
        app.add_api_route("/healthz/ready", self._ready, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/metrics", self._metrics, include_in_schema=False)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self.close()

    # The docstrings of the following methods are descriptions in the OpenAPI document.

    async def _classify(self, request: Request, options: Annotated[RequestOptions, Query()]) -> Response:
        """Tag a sound: the most probable classes of each window, or events."""
        checked = self._check(request, options)
        upload = await self._receive(request)
        answer = await _unless_gone(request, self.service.answer(upload, checked))
        return Response(answer, media_type="application/json")

    async def _stream(self, request: Request, options: Annotated[StreamOptions, Query()]) -> Response:
        """Tag a sound, and send the results of each window while later ones are scored: one JSON object a line."""
        checked = self._check(request, options)
        upload = await self._receive(request)
        lines = self.service.stream(upload, checked)
        try:  # a sound that cannot be decoded at all has an HTTP status of its own
            first = await _unless_gone(request, anext(lines))
        except BaseException:
            await lines.aclose()
            raise
        return _Lines(_rest(first, lines))

    async def _model(self) -> schema.ModelInfo:
        """Describe the model, its classes, and the limits of this server."""
        return self._info()

    async def _alive(self) -> schema.Health:
        """Report that the server runs."""
        return schema.Health(status="ok")  # the gate answers first, so that work does not delay it

    async def _ready(self) -> schema.Health:
        """Report whether another request would be accepted."""
        self._check_room()
        return schema.Health(status="ok")

    async def _metrics(self) -> Response:
        return Response(self.service.metrics.report(), media_type=CONTENT_TYPE_LATEST)

    async def _live(self, socket: WebSocket) -> None:
        if self.service.stopping or len(self.sessions) >= self.service.limits.live:
            message = DOWN if self.service.stopping else "too many live connections; try again later"
            await socket.send_denial_response(problem(503, message, {"Retry-After": "10"}))
            return
        session = LiveSession(socket, self.service)
        self.sessions.add(session)
        self.service.metrics.live.inc()
        try:
            await session.run()
        finally:
            self.sessions.discard(session)
            self.service.metrics.live.dec()

    def _check(self, request: Request, options: RequestOptions) -> CheckedRequest:
        """Check a request before its body is read."""
        schema.check_repeated(name for name, _ in request.query_params.multi_items())
        checked = self.service.check(options)
        self._check_room()
        return checked

    def _check_room(self) -> None:
        if self.service.stopping:
            raise ClosedError(DOWN)
        if self.service.full:
            raise busy()

    async def _receive(self, request: Request) -> Upload:
        """Read the body, or fetch the address that it holds."""
        bodies = self.service.bodies
        if (address := await bodies.address(request)) is None:
            return await bodies.receive(request)
        return await _unless_gone(request, bodies.fetch(address))

    def _info(self) -> schema.ModelInfo:
        service, live = self.service, schema.LiveOptions()
        labels, limits = service.model.labels, service.limits
        mids = labels.mids or [None] * len(labels)
        named = enumerate(zip(labels.names, mids, strict=True))
        window = RequestOptions.model_fields["window"].default
        return schema.ModelInfo(
            version=ced.__version__,
            model=service.name,
            labels=[schema.Label(index=index, mid=mid, name=name) for index, (name, mid) in named],
            columns=service.has_columns,
            embeddings=service.has_embeddings,
            addresses=self._addresses,
            defaults=schema.WindowDefaults(window=window, hop=None, column=PATCH * HOP_SECONDS),
            live=schema.LiveDefaults(
                rate=SAMPLE_RATE, window=live.window, hop=live.hop, gap=live.gap, threshold=live.threshold
            ),
            limits=schema.RequestLimits(
                megabytes=limits.megabytes, seconds=limits.seconds, waiting=limits.waiting, live=limits.live
            ),
        )


class _Lines(StreamingResponse):
    """A stream of JSON lines, which ends when its client disconnects."""

    media_type = schema.STREAM_TYPE

    async def stream_response(self, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


class _Page(StaticFiles):
    """The static files of the page; browsers revalidate them each time."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


async def _rest(first: bytes, lines: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield the lines of a stream; an error on the way becomes the last line."""
    async with aclosing(lines):
        yield first
        try:
            async for line in lines:
                yield line
        except Exception as error:
            yield encode_line(type="error", error=_status_of(error)[1])


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the client closes the connection.

    Raises:
        ClientDisconnect: the client closed the connection.
    """
    result, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    both: set[asyncio.Future[Any]] = {result, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        for each in both:
            each.cancel()
        await asyncio.gather(*both, return_exceptions=True)  # wait for the end of what was cancelled


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_error(_: Request, error: Exception) -> Response:
    status, message, headers = _status_of(error)
    return problem(status, message, headers)


def _status_of(error: Exception) -> tuple[int, str, Any]:
    """Return the HTTP status, message and headers of the answer for an error."""
    match error:
        case RefusedError():
            return error.status, str(error), error.headers
        case ConfigError() | AudioError():
            return 422, str(error), None
        case RequestValidationError():
            return 422, schema.describe_errors(error.errors()), None
        case HTTPException():
            return error.status_code, str(error.detail), error.headers
        case ClientDisconnect():
            return 499, "the client closed the connection", None
        case SlowClientError():
            return 499, str(error), None
        case ClosedError():
            return 503, DOWN, {"Retry-After": "1"}
    logger.error("a request failed: %s: %s", type(error).__name__, error)
    return 500, FAILED, None


def _with_stream_lines(openapi: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the OpenAPI document with the schema of stream lines, which no route refers to."""
    document = openapi()
    line = schema.StreamLine.model_json_schema(ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= {**line.pop("$defs"), "StreamLine": line}
    return document


async def _docs(request: Request) -> HTMLResponse:
    """Show FastAPI's Swagger UI page, with the files of Swagger UI in the package."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{request.app.title} {request.app.version}",
        swagger_js_url=f"{_SWAGGER}/swagger-ui-bundle.js",
        swagger_css_url=f"{_SWAGGER}/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )
    (script,) = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    page.headers["Content-Security-Policy"] = POLICY.replace(
        "script-src 'self'", f"script-src 'self' 'sha256-{digest}'"
    )
    return page
