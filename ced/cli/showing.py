"""The command that opens a page in the browser: app."""

import ipaddress
import signal
import sys
from typing import Annotated

import typer

from ced.cli.console import reporting
from ced.cli.listener import address, listen
from ced.cli.options import Jobs, Model
from ced.errors import optional_packages
from ced.machine import cores


def show(
    model: Model = "ced_mini",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0: any that is free.")] = 7860,
    megabytes: Annotated[float, typer.Option("--max-mb", min=0.001, help="The largest sound, in MB.")] = 200.0,
    minutes: Annotated[float, typer.Option("--max-minutes", min=0.001, help="The longest sound.")] = 60.0,
    addresses: Annotated[bool, typer.Option(help="Fetch sounds from addresses that are pasted.")] = True,
    private: Annotated[
        bool, typer.Option("--private-addresses", help="Fetch from this machine and its networks, too.")
    ] = False,
    jobs: Jobs = None,
) -> None:
    """Open a page in the browser: drop, record or name a sound, and see what is heard when.

    Only this machine's users reach it, unless --host says otherwise.
    """
    listening = listen(host, port)
    with optional_packages("ced app"):
        import uvicorn

        from ced.tag.app import Server, serving
        from ced.tag.desk import Access
    from ced.tag.hearing import Hearing, Limits
    from ced.tag.tagger import Tagger

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # not without deleting what was uploaded
    loopback = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
    with listening, reporting() as progress, Tagger(model, jobs=jobs or cores(), progress=progress) as tagger:
        hearing = Hearing(tagger, model, Limits(megabytes, minutes))
        with serving(hearing, Access(addresses=addresses, private=private, loopback=loopback)) as application:
            config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
            print(address(listening), flush=True)
            Server(config).run(sockets=[listening])
