"""Where the commands that serve take their address."""

import socket

from ced.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before anything is loaded for it.

    Raises:
        ConfigError: another program has it, or there is no such host.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(place[:2], family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while ")[0]  # the address is said already
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}") from error
    # Connections inherit it. Without, the body of an answer waits 40 ms until the client has acknowledged its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def address(listener: socket.socket) -> str:
    """Return the address that a listener was given, for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
