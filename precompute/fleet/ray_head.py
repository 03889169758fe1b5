"""Whether the head of a Ray cluster is there."""

import socket

ANSWER_S = 5.0
"""A head that takes longer to accept a connection is not there; Ray itself would try for minutes."""


def answers(address: str) -> bool:
    """Whether something accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True
