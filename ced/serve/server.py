"""Server processes: sockets, HTTP connections, workers that share a port, and graceful shutdown.

Uvicorn and h11 do the work; this module adds time limits for connections, and the order of a shutdown.
"""

import asyncio
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import h11
import uvicorn
from filelock import FileLock, Timeout
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.protocols.http.h11_impl import H11Protocol

from ced.errors import ConfigError, ProcessError
from ced.model.graph import Precision
from ced.model.runtime import open_model
from ced.progress import Progress, silent
from ced.serve.app import Access, Application
from ced.serve.body import Limits
from ced.serve.live import LARGEST_FRAME
from ced.serve.metrics import METRICS_FOLDER
from ced.tag.options import BATCH

_BACKLOG = 1024  # connections that wait to be accepted
_HEAD_SECONDS = 10.0  # for a request's headers to arrive
_REST_SECONDS = 2.0  # for the rest of an unread body, so that its client receives the answer
_STALLED_SECONDS = 30  # that sent data may stay unacknowledged
_LIVE_SECONDS = 2.0  # for live sessions to end when the server is stopped
_RESTART_SECONDS = 5.0  # least time between the start of a worker and of its replacement
_METRICS = "ced-metrics-"  # prefix of folders with the metrics of several workers
_LOCK = ".lock"  # in such a folder, held while its server runs
_UNLOCKED_SECONDS = 60.0  # age at which such a folder without a lock counts as abandoned

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started; passed on to its workers."""

    model: str
    name: str  # of the model in records
    jobs: int = 1  # windows scored at the same time in each worker
    device: str | None = None  # where the model runs
    batch: int = BATCH  # windows that share a call on an accelerator
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    precision: Precision = "float32"
    proxies: tuple[str, ...] = ()  # networks whose X-Forwarded-For is trusted
    grace: int = 30  # seconds that running requests have to finish at shutdown


def listen(host: str, port: int) -> socket.socket:
    """Bind a TCP socket.

    Raises:
        ConfigError: the port is in use, or the host does not exist.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(place[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while ")[0]  # the address is in the message already
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}") from error
    # Connections inherit these options. Without the first one, the body of an answer waits 40 ms for the client to
    # acknowledge the headers (Nagle's algorithm); the second one closes connections of clients that no longer read.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_SECONDS * 1000)
    return listener


def listen_unix(path: Path) -> socket.socket:
    """Bind a Unix socket that user and group may connect to; the socket of a killed server is replaced.

    Raises:
        ConfigError: another server listens there, or the path is another kind of file or cannot be created.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise ConfigError(f"{path} exists and is not a socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(os.fspath(path)) == 0:
                    raise ConfigError(f"another server listens at {path}")
            path.unlink()
        before = os.umask(0o117)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a TCP socket, or `unix:` and the path of a Unix socket."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """Uvicorn's HTTP connection, with a time limit for headers and unread bodies, and protocol errors in JSON."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self._wait(_HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Process data; the timer stops while a request is answered."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the end of an unread body."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._wait(_REST_SECONDS if self.conn.their_state is h11.SEND_BODY else _HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Pass the connection to the WebSocket protocol, which has its own time limits."""
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP."""
        body = json.dumps({"error": "the request is not valid HTTP"}).encode()
        length = str(len(body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
        try:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer has begun
            pass
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection after the answer that is being sent, if any."""
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # the connection is in an error state
            self.transport.close()

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """Uvicorn, which stops the application in order at shutdown.

    Args:
        app: answers the requests.
        proxies: networks whose X-Forwarded-For is trusted.
        grace: seconds that running requests have to finish at shutdown.
    """

    def __init__(self, app: Application, proxies: Sequence[str] = (), grace: int = 30) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # errors go to standard error, as everywhere
            log_level="critical",  # the application logs its errors, the access log those of clients
            access_log=False,
            http=Connection,  # h11 limits the size of headers; another parser may be installed
            ws="websockets-sansio",
            ws_max_size=LARGEST_FRAME,
            ws_per_message_deflate=False,  # samples hardly compress
            server_header=False,
            backlog=_BACKLOG,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse waiting requests, end live sessions, and stop when the running requests are answered."""
        closing = asyncio.create_task(self._close_connections())
        try:
            await self._app.stop(_LIVE_SECONDS)
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    async def _close_connections(self) -> None:
        """Close idle connections, including those that are accepted during shutdown."""
        ended: dict[Connection, float] = {}
        while True:
            for connection in list(self.server_state.connections):
                if not isinstance(connection, Connection):
                    continue
                if not connection.transport.is_closing():
                    connection.shutdown()
                elif time.monotonic() - ended.setdefault(connection, time.monotonic()) > _LIVE_SECONDS:
                    connection.transport.abort()  # the client does not read the rest of the answer
            await asyncio.sleep(0.05)


def open_application(settings: ServerSettings, progress: Progress = silent) -> Application:
    """Open the model of a server, and return its application.

    Raises:
        CheckpointError, DownloadError: the model cannot be opened.
        ConfigError: it cannot run on the device.
    """
    graph = open_model(settings.model, precision=settings.precision, device=settings.device, progress=progress)
    return Application(
        graph,
        settings.name,
        jobs=settings.jobs,
        batch=settings.batch,
        limits=settings.limits,
        access=settings.access,
    )


def _ignore() -> None:
    """Do nothing."""


def serve(
    app: Application, settings: ServerSettings, listener: socket.socket, ready: Callable[[], None] = _ignore
) -> None:
    """Serve until SIGTERM or SIGINT; after SIGINT, KeyboardInterrupt is raised at the end.

    Args:
        app: answers the requests.
        settings: those of the application.
        listener: the socket.
        ready: called once SIGTERM leads to a graceful shutdown and clients can connect.
    """
    server = Server(app, settings.proxies, settings.grace)

    def stop(*_: object) -> None:  # until uvicorn installs its own handler; at the end it raises the signal again
        server.should_exit = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        ready()
        server.run([listener])
    finally:
        signal.signal(signal.SIGTERM, before)


def serve_workers(
    settings: ServerSettings, listener: socket.socket, count: int, set_up: Callable[[], None], ready: Callable[[], None]
) -> None:
    """Serve with several workers that accept from one socket; a worker that ends is replaced.

    Args:
        settings: those of each worker.
        listener: the socket.
        count: number of workers.
        set_up: called first in each worker; it must be picklable.
        ready: as for `serve`.

    Raises:
        ProcessError: a worker ended before any of them was ready.
    """
    with _metrics_folder() as folder:
        os.environ[METRICS_FOLDER] = folder
        try:
            _Workers(settings, listener, set_up, folder).run(count, ready)
        finally:
            del os.environ[METRICS_FOLDER]


@contextmanager
def _metrics_folder() -> Iterator[str]:
    """Make a folder for the metrics of the workers, and remove the folders of killed servers of this user."""
    for path in Path(tempfile.gettempdir()).glob(f"{_METRICS}*"):
        with suppress(OSError, Timeout):
            if _is_unused(path):
                with FileLock(path / _LOCK, timeout=0):
                    shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_METRICS) as folder:
        lock = FileLock(Path(folder) / _LOCK)
        with lock:
            yield folder


def _is_unused(folder: Path) -> bool:
    """Return whether a folder is of this user and no server is just being started in it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        return False
    return (folder / _LOCK).exists() or time.time() - found.st_mtime > _UNLOCKED_SECONDS


class _Workers:
    """Worker processes; SIGTERM and SIGINT are passed on to them."""

    def __init__(
        self, settings: ServerSettings, listener: socket.socket, set_up: Callable[[], None], folder: str
    ) -> None:
        self._given = settings, listener, set_up
        self._folder = folder
        self._workers: dict[
            SpawnProcess, tuple[float, Pipe]
        ] = {}  # start time, and the pipe on which it reports that it is ready
        self._due: list[float] = []  # when further workers are to be started
        self._ready = False  # whether any worker has been
        self._signal = 0

    def run(self, count: int, ready: Callable[[], None]) -> None:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            ready()
            self._due = [time.monotonic()] * count
            while not self._signal:
                now = time.monotonic()
                late = [due for due in self._due if due <= now]
                self._due = [due for due in self._due if due > now]
                for _ in late:
                    self._start()
                multiprocessing.connection.wait([worker.sentinel for worker in self._workers], timeout=0.2)
                self._ready = self._ready or any(
                    pipe.poll() and _has_reported(pipe) for _, pipe in self._workers.values()
                )
                for worker in [each for each in self._workers if not each.is_alive()]:
                    self._replace(worker)
        finally:
            self._end()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt

    def _stop(self, number: int, _: object) -> None:
        self._signal = number

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_run_worker, args=(*self._given, sender))
        worker.start()
        sender.close()
        self._workers[worker] = time.monotonic(), receiver

    def _replace(self, worker: SpawnProcess) -> None:
        began, pipe = self._workers.pop(worker)
        pipe.close()
        mark_process_dead(worker.pid, self._folder)  # type: ignore[no-untyped-call]
        if self._signal:
            return
        if not self._ready:
            raise ProcessError(f"a server process ended before it was ready, with exit code {worker.exitcode}")
        logger.warning("a server process ended, with exit code %s; another one is started", worker.exitcode)
        self._due.append(began + _RESTART_SECONDS)

    def _end(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()


def _has_reported(pipe: Pipe) -> bool:
    """Return whether a worker has reported that it is ready, and not just ended."""
    try:
        return bool(pipe.recv())
    except (EOFError, OSError):
        return False


def _report_ready(pipe: Pipe) -> None:
    with suppress(OSError):  # the main process has ended, so this one ends as well
        pipe.send(True)


def _run_worker(settings: ServerSettings, listener: socket.socket, set_up: Callable[[], None], ready: Pipe) -> None:
    """Serve as one of several workers, until SIGTERM or the end of the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the main process sends SIGTERM
    set_up()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    serve(open_application(settings), settings, listener, partial(_report_ready, ready))


def _stop_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
