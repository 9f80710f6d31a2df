"""The outermost middleware: liveness, checks of keys, hosts and origin, headers, time limits and the access log."""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ced.errors import ClosedError
from ced.serve.body import Limits, RefusedError

LIVENESS = "/healthz/live"
KEY_PROTOCOL = "ced.key."  # WebSocket subprotocol: this, then the API key in base64url without padding
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:;"
    " connect-src 'self'; font-src 'self'; worker-src 'self' blob:; manifest-src 'self'; frame-ancestors 'none';"
    " form-action 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cache-Control": "no-store",
}
FAILED = "the server failed; its log has the reason"
_CLOSE = {"Connection": "close"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

access_log = logging.getLogger("ced.access")
access_log.propagate = False
logger = logging.getLogger(__name__)


class Gate:
    """Wraps the application: each request passes here first, and each answer last.

    Args:
        app: answers the requests.
        limits: time limits, which apply to answers as well.
        keys: API keys; if there are none, requests need no key.
        root_path: prefix of all paths, if a proxy adds one.
        observe: called with method, path, status and seconds of each HTTP request.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        keys: Sequence[str] = (),
        root_path: str = "",
        observe: Callable[[str, str, int, float], None] = lambda method, path, status, seconds: None,
    ) -> None:
        self._app, self._limits, self._root_path, self._observe = app, limits, root_path, observe
        self._keys = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, pass it on, and send its answer."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path  # the proxy may or may not remove it from paths
        path = scope["path"].removeprefix(self._root_path) or "/"
        if path == LIVENESS and scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            await _ALIVE(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._limits)
        try:
            self._check(scope, path)
            await self._app(scope, receive, exchange.send)
        except RefusedError as error:
            await problem(error.status, str(error), error.headers)(scope, receive, exchange.send)
        except (asyncio.CancelledError, ClosedError):  # the server is shutting down
            if not exchange.status:
                message = "the server is shutting down; try again soon"
                await problem(503, message, {"Retry-After": "1"})(scope, receive, exchange.send)
        except SlowClientError as error:
            exchange.fault = str(error)  # uvicorn closes the connection of an incomplete answer
        except Exception as error:
            if not exchange.complete:  # otherwise the application has answered and logged the error
                logger.error("request %s failed: %s: %s", exchange.id, type(error).__name__, error)
            if not exchange.status:
                await problem(500, FAILED)(scope, receive, exchange.send)
        finally:
            if scope["type"] == "http":
                self._observe(scope["method"], path, exchange.status, time.perf_counter() - exchange.began)
            exchange.log()

    def _check(self, scope: Scope, path: str) -> None:
        """Check what can be checked without the body.

        Raises:
            RefusedError: the request is ambiguous, comes from another site, or has no valid API key.
        """
        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            raise RefusedError(400, "Transfer-Encoding and Content-Length exclude each other", _CLOSE)
        origin = headers.get("origin")
        is_safe = scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS")
        if not is_safe and origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
            raise RefusedError(403, f"requests from pages of another site ({origin[:100]}) are refused")
        if self._keys and (path.startswith("/v1/") or path == "/metrics") and not self._has_key(scope, headers):
            raise RefusedError(401, "an API key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})

    def _has_key(self, scope: Scope, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        for protocol in scope.get("subprotocols", ()):
            if protocol.startswith(KEY_PROTOCOL):
                text = protocol.removeprefix(KEY_PROTOCOL)
                try:
                    key = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
                except (ValueError, binascii.Error):
                    return False
        digest = sha256(key).digest()
        return sum(hmac.compare_digest(digest, each) for each in self._keys) > 0  # compares all, in constant time


class SlowClientError(Exception):
    """A client that reads its answer more slowly than the lowest rate."""


class _Exchange:
    """One request and its answer: adds headers, limits the time for sending, and writes the access log."""

    def __init__(self, scope: Scope, send: Send, limits: Limits) -> None:
        self._scope, self._send, self._limits = scope, send, limits
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = self.id
        self.began = time.perf_counter()
        self.status = 0
        self.complete = False
        self.fault: str | None = None
        self._sent = 0  # bytes
        self._blocked = 0.0  # seconds that sending took
        self._start: Message | None = None  # of a plain-text error, which becomes JSON

    async def send(self, message: Message) -> None:
        """Send a part of the answer.

        Raises:
            SlowClientError: the client reads the answer too slowly.
        """
        kind = message["type"].removeprefix("websocket.")
        if kind == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self.id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if self.status >= 400 and headers.get("content-type", "").startswith("text/plain"):
                self._start = message
                return
        elif kind == "accept":
            self.status = 101
        elif kind == "http.response.body":
            if self._start is not None:  # TrustedHostMiddleware answers in plain text
                start, self._start = self._start, None
                body = json.dumps({"error": message.get("body", b"").decode()}).encode()
                headers = MutableHeaders(scope=start)
                headers["Content-Type"], headers["Content-Length"] = "application/json", str(len(body))
                await self._send(start)
                message = {**message, "body": body}
            self._sent += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        if kind.startswith("http."):
            await self._send_in_time(message)
        else:
            await self._send(message)

    async def _send_in_time(self, message: Message) -> None:
        limits = self._limits
        left = limits.patience + self._sent / limits.slowest - self._blocked
        began = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                await self._send(message)
        except TimeoutError as error:
            raise SlowClientError("the client does not read its answer") from error
        self._blocked += time.monotonic() - began

    def log(self) -> None:
        """Write a line of the access log, if it is enabled."""
        if not access_log.isEnabledFor(logging.INFO):
            return
        client = self._scope.get("client")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "client": client[0] if client else None,
            "method": self._scope.get("method", "WEBSOCKET"),
            "path": self._scope["path"],
            "query": self._scope["query_string"].decode("latin-1"),
            "status": self.status,
            "received": self._headers.get("content-length"),
            "sent": self._sent,
            "seconds": round(time.perf_counter() - self.began, 4),
        }
        if self.fault is not None:
            line["fault"] = self.fault
        access_log.info("%s", json.dumps(line))


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error answer: one line, as JSON."""
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


_ALIVE = JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})
