"""Free TCP ports on this machine."""

import socket

from cluster.errors import InputError


def free_ports(number: int) -> list[int]:
    """That many different ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def require_free(host: str, port: int, field: str) -> None:
    """Raise `InputError` where somebody listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = f"stop what listens there, or set `{field}` (0 takes a free port)"
            raise InputError(field, port, f"cannot be listened on at {host} ({error.strerror})", remedy) from None
