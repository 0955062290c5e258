"""Take a port before anything slow is opened."""

from __future__ import annotations

import errno
import socket

from potstill.errors import ConfigError


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet. Raises: ConfigError."""
    bound = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        reason = f"cannot be served ({getattr(error, 'strerror', None) or error})"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            reason = "is taken"
        raise ConfigError(
            f"port {port} of {host} {reason}; give another --port, or another --host"
        ) from error
    return bound
