"""The command that answers requests: serve."""

import ipaddress
import logging
import math
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ced.cli.console import reporting
from ced.cli.listener import address, listen
from ced.cli.options import Jobs, Model
from ced.errors import ConfigError, optional_packages
from ced.machine import allow_open_files, cores

_log = logging.getLogger(__name__)


def serve(
    model: Model = "ced_mini",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 or :: lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free.")] = 8000,
    jobs: Jobs = None,
    max_megabytes: Annotated[float, typer.Option(help="The most in the body of a request.")] = 50.0,
    max_seconds: Annotated[
        float, typer.Option(help="The most sound in a request, counted as often as windows hear it.")
    ] = 600.0,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones are told to come back.")] = 16,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of a proxy whose X-Forwarded-For is believed; may be repeated."),
    ] = None,
) -> None:
    """Serve a model over HTTP: POST a sound to /v1/audio/classification, see /docs for the rest.

    There are no passwords: put it behind a proxy that has them before other machines may reach it.
    """
    with optional_packages("ced serve"):
        from ced.serve.app import Application
        from ced.serve.body import Limits
        from ced.serve.server import Server
    from ced.model.runtime import open_model

    for option, value in (("--max-megabytes", max_megabytes), ("--max-seconds", max_seconds)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{option} is {value}; it must be a number above 0")
    limits = Limits(max_megabytes, max_seconds, queue)
    proxies = [_network(each) for each in proxy or ()]
    allow_open_files()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # forms that are broken are their clients' affair
    with listen(host, port) as listener:
        with reporting() as progress:
            graph = open_model(model, progress=progress)
        app = Application(graph, Path(model).name, jobs=jobs or cores(), limits=limits)
        where = address(listener)
        print(f"ced: serving {model} at {where}, described at {where}/docs", file=sys.stderr, flush=True)
        if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            _log.warning("%s may be reached from other machines, and asks nobody for a password", where)
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # which the server sends again, when it has ended
        Server(app, proxies).run([listener])
        signal.signal(signal.SIGTERM, before)


def _network(text: str) -> str:
    """Return the network of a proxy, which may be a single address."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as error:
        raise ConfigError(f"--proxy {text} is no address or network, as 10.0.0.2 or 10.0.0.0/24") from error
