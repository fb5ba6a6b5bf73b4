"""The process of ``kvshare server``: it serves lm:// to everybody, and its memory to clients of this host and user."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from kvshare.core.ports import in_url
from kvshare.services.lm_server import listen
from kvshare.services.local_clients import SharedServer
from kvshare.services.store import Store

logger = logging.getLogger(__name__)


def serve(host: str, port: int, limit: int, status: Path | None) -> NoReturn:
    """Serve until SIGINT or SIGTERM, then exit with code 0.

    Raises:
        UserError: cannot listen on the address, or cannot write ``status``.
    """
    logging.basicConfig(format="kvshare server: %(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    server = listen(host, port, Store(limit), status)
    address, port = server.socket.getsockname()[:2]
    _share(address, port, server.store)
    logger.info("listening on %s:%s, keeps at most %.2f GiB", in_url(address), port, limit / 2**30)
    if not ipaddress.ip_address(address).is_loopback:
        logger.warning("warning: other hosts can reach %s, and lm:// has no authentication", address)
    with contextlib.suppress(SystemExit):
        server.serve_forever()
    with contextlib.suppress(OSError):
        server.write_status()
    logger.info("ended, %s", ", ".join(f"{name} {count}" for name, count in server.store.status().items()))
    sys.stderr.flush()
    os._exit(0)  # a normal exit could wait forever for locks that client threads hold


def _share(address: str, port: int, store: Store) -> None:
    try:
        shared = SharedServer(address, port, store)
    except OSError as error:
        logger.warning("warning: cannot share memory (%s): clients of this host use TCP, too", error.strerror)
    else:
        threading.Thread(target=shared.serve_forever, daemon=True).start()


def _end(*_: Any) -> NoReturn:
    raise SystemExit
