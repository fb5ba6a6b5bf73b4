"""How clients on the host of ``kvshare server``, of the same user, read and write entries in the server's memory.

The server also listens on a Unix socket named after its ``lm://`` address. The first byte that it sends there brings
the file descriptor of its memory. The socket then speaks ``lm://`` with three more commands. They say where an entry
is, instead of sending it:

* FIND is like GET. The reply is a PLACE.
* RESERVE is like PUT, without the data. The reply is a PLACE, where the client then writes the data.
* COMMIT makes an entry visible that this connection has reserved. Until then nobody can find it.

An entry may be evicted, and its memory be written for another, while a client reads it. So a client compares what it
has copied with the checksum at the end of the entry.
"""

from __future__ import annotations

import os
import socket
import struct

FIND, RESERVE, COMMIT = 101, 102, 103
PLACE = struct.Struct("9iq?")  # the fields of REPLY, offset in the memory in bytes, whether its pages are allocated


def address(host: str, port: int) -> str:
    """Of the Unix socket of the server that listens on ``host:port``. Abstract: no file is left of it."""
    return f"\0kvshare server {host}:{port}"


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket is one of this user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid == os.geteuid()
