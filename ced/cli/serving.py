"""The commands serve and app: the HTTP server, and the same with the page opened in a browser."""

import ipaddress
import logging
import math
import os
import queue
import socket
import threading
from contextlib import suppress
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ced.cli.console import reporting, set_up_logging, set_up_streams, show_data, show_note
from ced.cli.options import CORES, BatchOption, DeviceOption, Jobs, ModelOption, PrecisionOption
from ced.environment import allow_open_files
from ced.errors import ConfigError, optional_packages
from ced.model.zoo import DEFAULT_MODEL
from ced.tag.options import BATCH

if TYPE_CHECKING:
    from ced.serve.body import Limits
    from ced.serve.server import ServerSettings

KEY_VARIABLE = "CED_API_KEY"
_SHORTEST_KEY = 16  # characters
_LOG_LINES = 10_000  # queue of the access log

logger = logging.getLogger(__name__)

_MaxMegabytes = Annotated[float, typer.Option(help="Largest body of a request, in megabytes.")]
_MaxSeconds = Annotated[
    float, typer.Option(help="Most seconds of sound in a request; overlapping windows count in full.")
]
_Queue = Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with status 503.")]
_AllowAddresses = Annotated[
    bool, typer.Option("--allow-addresses", help="Allow requests for sounds at http(s) addresses of public hosts.")
]
_MaxLive = Annotated[int, typer.Option(min=0, help="Most live connections at the same time.")]


def serve(
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "float32",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 or :: for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: any free one.")] = 8000,
    unix_socket: Annotated[
        Path | None, typer.Option(help="Listen on a Unix socket at this path instead of a port.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            show_default="all cores, divided by --workers",
            help="Windows scored at the same time, one thread each.",
        ),
    ] = None,
    device: DeviceOption = None,
    batch: BatchOption = BATCH,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that share the port, each with a model of its own.")
    ] = 1,
    max_megabytes: _MaxMegabytes = 50.0,
    max_seconds: _MaxSeconds = 600.0,
    queue: _Queue = 16,
    max_live: _MaxLive = 4,
    api_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"File with an API key on each line; each request needs one of them. Or set ${KEY_VARIABLE}.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that requests may use, besides those of this machine; may be repeated."),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of a proxy whose X-Forwarded-For is trusted; may be repeated."),
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path prefix under which a proxy publishes the server.")] = "",
    allow_addresses: _AllowAddresses = False,
    access_log: Annotated[bool, typer.Option(help="Print a line of JSON for each request.")] = True,
) -> None:
    """Serve a model over HTTP, with a web page at / and the documentation of the interface at /docs.

    TLS and rate limits are a proxy's task: see docs/serve.md.
    """
    with optional_packages("ced serve"):
        from ced.serve import server
        from ced.serve.app import Access
    keys = _keys(api_key)
    listener = server.listen(host, port) if unix_socket is None else server.listen_unix(unix_socket)
    try:
        is_local = _is_local(listener)
        settings = server.ServerSettings(
            model,
            Path(model).name,
            jobs=jobs or max(1, CORES // workers),
            device=device,
            batch=batch,
            limits=_limits(max_megabytes, max_seconds, queue, max_live),
            access=Access(keys, _hosts(listener, host, allowed_host), _prefix(root_path), allow_addresses),
            precision=precision,
            proxies=("*",) if unix_socket is not None else tuple(map(_network, proxy or ())),
        )
        if not is_local and not keys:
            logger.warning("%s accepts requests from other machines without an API key", server.url_of(listener))
        _run(settings, listener, workers, access_log)
    finally:
        listener.close()
        if unix_socket is not None:
            unix_socket.unlink(missing_ok=True)


def open_app(
    model: ModelOption = DEFAULT_MODEL,
    precision: PrecisionOption = "float32",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on; 0: any free one.")] = 0,
    jobs: Jobs = CORES,
    device: DeviceOption = None,
    batch: BatchOption = BATCH,
    max_megabytes: _MaxMegabytes = 2000.0,
    max_seconds: _MaxSeconds = 86_400.0,
    allow_addresses: _AllowAddresses = False,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Open the web page: upload or record sounds and see their timelines of tags, or tag the microphone live.

    It is the page of `ced serve`, for this machine only.
    """
    with optional_packages("ced app"):
        from ced.serve import server
        from ced.serve.app import Access
    with server.listen("127.0.0.1", port) as listener:
        limits = _limits(max_megabytes, max_seconds, queue=16, live=4)
        access = Access(hosts=_hosts(listener, "127.0.0.1", None), addresses=allow_addresses)
        settings = server.ServerSettings(
            model,
            Path(model).name,
            jobs=jobs,
            device=device,
            batch=batch,
            limits=limits,
            access=access,
            precision=precision,
            grace=1,
        )
        _run(settings, listener, 1, False, browser)


def _run(
    settings: "ServerSettings", listener: socket.socket, workers: int, access_log: bool, browser: bool = False
) -> None:
    """Open the model, print the address, and serve it."""
    from ced.serve import server

    allow_open_files()
    with reporting() as progress:
        app = server.open_application(settings, progress)
    where = server.url_of(listener)

    def ready() -> None:
        docs = f", described at {where}/docs" if where.startswith("http") else ""
        show_note(f"ced: serving {settings.model} at {where}{docs}")
        if browser:  # in a thread, because some browsers return only when they are closed
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(where,), daemon=True).start()

    if workers > 1:
        app.close()
        server.serve_workers(settings, listener, workers, partial(_set_up_worker, access_log), ready)
    else:
        _set_up_logs(access_log)
        server.serve(app, settings, listener, ready)


def _set_up_worker(access_log: bool) -> None:
    """Set up one of several processes as `ced.cli.main` sets up the first."""
    set_up_streams()
    set_up_logging()
    _set_up_logs(access_log)


def _set_up_logs(access_log: bool) -> None:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # malformed forms are errors of clients
    requests = logging.getLogger("ced.access")
    requests.propagate = False
    requests.setLevel(logging.INFO if access_log else logging.CRITICAL)
    if access_log:
        requests.addHandler(_AccessLog())


class _AccessLog(logging.Handler):
    """Prints the access log in a thread of its own, so that a blocked pipe delays no request.

    Lines are dropped while the queue is full. Once standard output is closed or cannot be written to, that is reported
    and the log ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(_LOG_LINES)
        self._thread = threading.Thread(target=self._print, name="access-log", daemon=True)
        self._thread.start()
        Finalize(None, self.close, exitpriority=0)  # at the end of this process, also of a worker

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self._lines.put_nowait(record.getMessage())

    def close(self) -> None:
        """Print the waiting lines, unless standard output is blocked."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(1)
        super().close()

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                show_data(f"{line}\n")
            except (OSError, ValueError) as error:  # a pipe without a reader, a full disk, a closed stream
                logging.getLogger("ced.access").setLevel(logging.CRITICAL)
                reason = getattr(error, "strerror", None) or error
                logger.warning("the access log ends, because standard output cannot be written to: %s", reason)
                return


def _keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file and of the environment."""
    keys: dict[str, str] = {}  # key -> its source
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API keys in {file}: {getattr(error, 'strerror', error)}") from error
        keys |= {line.strip(): str(file) for line in lines if line.strip()}
        if not keys:
            raise ConfigError(f"{file} has no API key; write one on each line")
    if KEY_VARIABLE in os.environ:
        keys.setdefault(os.environ[KEY_VARIABLE].strip(), f"${KEY_VARIABLE}")
    for key, where in keys.items():
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"an API key in {where} has {len(key)} characters; it must have {_SHORTEST_KEY} or more, of ASCII and"
                " without spaces (openssl rand -hex 32 makes one)"
            )
    return tuple(keys)


def _limits(megabytes: float, seconds: float, queue: int, live: int) -> "Limits":
    from ced.serve.body import Limits

    for option, value in (("--max-megabytes", megabytes), ("--max-seconds", seconds)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{option} is {value}; it must be a number above 0")
    return Limits(megabytes, seconds, queue, live)


def _is_local(listener: socket.socket) -> bool:
    return listener.family == socket.AF_UNIX or ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _hosts(listener: socket.socket, host: str, allowed: list[str] | None) -> tuple[str, ...]:
    """Return the host names that requests may be addressed to; none: any.

    A local server accepts only the names of this machine, so that no web site can make a browser send requests to it
    under a name of its own (DNS rebinding).
    """
    if allowed is None and (listener.family == socket.AF_UNIX or not _is_local(listener)):
        return ()
    own = f"[{host}]" if ":" in host else host
    return tuple(dict.fromkeys((*(allowed or ()), "localhost", "127.0.0.1", "[::1]", own)))


def _prefix(path: str) -> str:
    if path and (not path.startswith("/") or path.endswith("/")):
        raise ConfigError(f"--root-path is {path}; it must begin with a slash and not end with one, as /tagger")
    return path


def _network(text: str) -> str:
    """Return the network of a proxy, which may be a single address."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as error:
        raise ConfigError(f"--proxy {text} is not an address or network, as 10.0.0.2 or 10.0.0.0/24") from error
