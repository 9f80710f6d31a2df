"""The server as a process: sockets, connections, and an orderly end. Uvicorn does the work."""

import socket
from collections.abc import Sequence

import uvicorn

from ced.serve.app import Application

_BACKLOG = 1024  # connections that wait to be accepted


class Server(uvicorn.Server):
    """Uvicorn with an application that is told when the server is asked to stop.

    Args:
        app: what answers.
        proxies: networks whose X-Forwarded-For is believed.
        grace: seconds in which requests whose work has begun may end when the server is stopped.
    """

    def __init__(self, app: Application, proxies: Sequence[str] = (), grace: int = 30) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # errors go to standard error like all others
            log_level="error",  # faults of clients are in the access log
            access_log=False,
            http="h11",
            ws="websockets-sansio",
            server_header=False,
            backlog=_BACKLOG,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what only waits, and end after the rest."""
        self._app.stop()
        await super().shutdown(sockets)
