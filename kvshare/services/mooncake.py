"""A Mooncake Store on this host: ``mooncake_master``, and this process, which gives the store its memory.

python -m kvshare.services.mooncake serve mooncakestore://HOST:PORT METRICS_PORT [--memory GIB]
python -m kvshare.services.mooncake check mooncakestore://HOST:PORT
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from kvshare.core.engines import mooncake

LEASE_MS = 2000
ANSWERS_IN = 30  # seconds until the master answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=("serve", "check"))
    parser.add_argument("url")
    parser.add_argument("metrics_port", nargs="?", type=int)
    parser.add_argument("--memory", type=float, default=8, metavar="GIB")
    given = parser.parse_args()
    if given.do == "serve":
        problem = serve(given.url, given.metrics_port, int(given.memory * 2**30))
    else:
        problem = check(given.url)
    print(problem, flush=True)
    os._exit(1 if problem else 0)  # Mooncake's own end waits for a server that hangs


def serve(url: str, metrics_port: int, memory: int) -> str:
    """Serve until the master ends; return why."""
    address = urlsplit(url)
    master = subprocess.Popen(
        [
            *(sys.executable, "-m", "mooncake.cli"),  # which is mooncake_master
            f"--rpc_address={address.hostname}",
            f"--rpc_port={address.port}",
            f"--metrics_host={address.hostname}",
            f"--metrics_port={metrics_port}",
            # It never evicts what was read or looked up so recently. In ten seconds, its default, that is everything.
            f"--default_kv_lease_ttl={LEASE_MS}",
        ]
    )
    deadline = time.monotonic() + ANSWERS_IN
    while True:
        store, problem = _connect(url, memory)  # the memory is there as long as the store is
        if not problem:
            return f"mooncake_master ended with exit code {master.wait()}, {store.get_hostname()} with it"
        if master.poll() is not None or time.monotonic() > deadline:
            master.kill()
            return problem
        time.sleep(0.2)


def check(url: str) -> str:
    """Put an entry, read it, and remove it; return what is wrong, if anything."""
    store, problem = _connect(url, 0)
    if problem:
        return problem
    key = f"kvshare check {os.getpid()}"
    done = store.put(key, b"kvshare")
    if done:
        return f"it has no memory for an entry (error {done})"
    found = store.get(key)
    store.remove(key, force=True)  # else its lease, of the read, would keep it
    return "" if found == b"kvshare" else "an entry cannot be read"


def _connect(url: str, memory: int) -> tuple[Any, str]:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    error = store.setup(mooncake(url, memory))
    return store, f"its master does not answer (error {error})" if error else ""


if __name__ == "__main__":
    main()
