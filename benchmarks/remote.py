"""How fast the `remote` backend moves KV on this machine, beside what the machine can do, in one run.

LMCache's own RemoteBackend is used as an engine uses it, with kvshare's client or LMCache's. The entries are those of
Qwen2.5-7B in bf16: 14.7 MB for 256 tokens. Valkey and Mooncake Store are measured if they are installed.

    python benchmarks/remote.py [--chunks 8] [--turns 15]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvshare.core import ports
from kvshare.core.errors import UserError
from kvshare.services.backends import BACKENDS, ENGINES, interface

LAYERS, TOKENS, HEADS, HEAD = 28, 256, 4, 128
SHAPE = torch.Size([2, LAYERS, TOKENS, HEADS * HEAD])
CHUNK = SHAPE.numel() * 2  # bytes
TIMEOUT = 60


class Backend:
    """LMCache's local tier and RemoteBackend on a server.

    Args:
        room: chunks that the local tier has memory for.
    """

    def __init__(self, url: str, room: int) -> None:
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.remote_backend import RemoteBackend

        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=TOKENS,
            local_cpu=False,
            max_local_cpu_size=(room + 1) * CHUNK / 2**30,
            remote_url=url,
            remote_serde="naive",
            blocking_timeout_secs=TIMEOUT,
        )
        metadata = LMCacheMetadata("qwen", 1, 1, 0, 0, torch.bfloat16, (LAYERS, 2, TOKENS, HEADS, HEAD))
        self._local = LocalCPUBackend(config, metadata, "cpu")
        self._remote = RemoteBackend(config, metadata, self._loop, self._local, "cpu")
        self._chunks = [self._allocate() for _ in range(room // 2)]
        for number, chunk in enumerate(self._chunks):
            chunk.raw_data.fill_(number)

    def _allocate(self) -> Any:
        from lmcache.v1.memory_management import MemoryFormat

        return self._local.allocate(SHAPE, torch.bfloat16, MemoryFormat.KV_2LTD, busy_loop=False)

    def put(self, keys: list[Any]) -> None:
        done = threading.Semaphore(0)
        self._remote.batched_submit_put_task(keys, self._chunks, on_complete_callback=lambda _: done.release())
        for _ in keys:
            assert done.acquire(timeout=TIMEOUT)

    def get(self, keys: list[Any]) -> None:
        for mine, chunk in zip(self._chunks, self._remote.batched_get_blocking(keys), strict=True):
            assert chunk.raw_data[-1] == mine.raw_data[-1]
            chunk.ref_count_down()

    def look_up(self, keys: list[Any]) -> None:
        assert self._remote.batched_contains(keys) == len(keys)

    def close(self) -> None:
        self._remote.close()
        self._loop.call_soon_threadsafe(self._loop.stop)


def keys(turn: int, count: int) -> list[Any]:
    from lmcache.utils import CacheEngineKey

    return [CacheEngineKey("qwen", 1, 0, turn * 10_000 + number, torch.bfloat16) for number in range(count)]


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


@contextmanager
def server(backend: interface.Backend, *arguments: str) -> Iterator[str]:
    """Start the service of a backend; its URL."""
    found = {name: ports.free_port() for name in backend.ports}
    with TemporaryDirectory() as folder:
        exports = backend.exports("127.0.0.1", found, Path(folder))
        command = [*backend.command("127.0.0.1", found, Path(folder)), *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while True:
                assert process.poll() is None, command
                try:
                    backend.check(exports)
                    break
                except UserError:
                    time.sleep(0.2)
            yield exports["LMCACHE_REMOTE_URL"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lmcache_server(listen: str, found: dict[str, int], folder: Path) -> list[str]:
    return [sys.executable, "-m", "lmcache.v1.server", listen, str(found["server"])]


class Memory:
    """Copies in memory by one thread."""

    def __init__(self, count: int) -> None:
        self._source, self._target = (np.ones((count, CHUNK), np.uint8) for _ in range(2))

    def move(self) -> None:
        np.copyto(self._target, self._source)


class Loopback:
    """One TCP connection to another process, which sends."""

    def __init__(self, count: int) -> None:
        self._into = np.zeros((count, CHUNK), np.uint8)
        listener = socket.create_server(("127.0.0.1", 0))
        if not os.fork():
            data, sender = np.ones((count, CHUNK), np.uint8), socket.create_connection(listener.getsockname())
            while sender.recv(1):
                for chunk in data:
                    sender.sendall(chunk)
            os._exit(0)
        self._receiver = listener.accept()[0]

    def move(self) -> None:
        self._receiver.sendall(b"x")
        for chunk in self._into:
            view = memoryview(chunk)
            while view:
                view = view[self._receiver.recv_into(view) :]


class Rates:
    """GB/s of the first put, of later ones and of gets, beside the machine's own in the same turn; ms of a lookup."""

    def __init__(self, url: str, count: int, turns: int, beside: Memory | Loopback) -> None:
        backend, size = Backend(url, 2 * count), count * CHUNK / 1e9
        self.first = size / seconds(backend.put, keys(0, count))
        self.own, self.puts, self.gets = [], [], []
        for turn in range(1, turns + 1):
            self.own.append(size / seconds(beside.move))
            self.puts.append(size / seconds(backend.put, keys(turn, count)))
            self.gets.append(size / seconds(backend.get, keys(turn, count)))
        many = keys(turns, count) * (64 // count + 1)
        self.lookup = 1000 * min(seconds(backend.look_up, many[:64]) for _ in range(5 * turns))
        backend.close()

    def cells(self) -> Iterator[str]:
        yield f"{max(self.own):.2f}"
        yield f"{self.first:.2f}"
        for rates in (self.puts, self.gets):
            ratio = statistics.median(rate / own for rate, own in zip(rates, self.own, strict=True))
            yield f"{max(rates):.2f} ({ratio:.0%})"
        yield f"{self.lookup:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    count, turns = arguments.chunks, arguments.turns
    memory, loopback = Memory(count), Loopback(count)
    table = Table(
        "GB/s, best (median of the share of the machine's own)", "own", "first put", "put", "get", "lookup, ms"
    )

    def row(name: str, backend: interface.Backend, *arguments: str, beside: Memory | Loopback = loopback) -> None:
        with server(backend, *arguments) as url:
            table.add_row(name, *Rates(url, count, turns, beside).cells())

    theirs = replace(BACKENDS["remote"], command=lmcache_server)
    ours = BACKENDS["remote"], "--memory", f"{1.3 * count * CHUNK / 2**30}"
    row("LMCache's client and server", theirs)
    from kvshare import vllm_plugin

    vllm_plugin.register()
    from kvshare.hooks.lmcache import remote_client, remote_lm

    row("kvshare's client, LMCache's server", theirs)
    for remote_client.THREADS in (1, 2, 4):
        row(f"shared memory, {remote_client.THREADS} threads", *ours, beside=memory)
    remote_lm.SharedConnection.open = lambda *_: None
    for remote_client.THREADS in (1, 2, 4):
        row(f"kvshare's client and server by TCP, {remote_client.THREADS} connections", *ours)
    room = 3 * count * CHUNK
    all_turns = 1.2 * (turns + 1) * count * CHUNK / 2**30  # GiB: Mooncake refuses entries while full of recent ones
    for engine, *memory_option in (("valkey", "--maxmemory", str(room)), ("mooncake", "--memory", str(all_turns))):
        try:
            row(f"{engine}, {remote_client.THREADS} threads", ENGINES[engine], *memory_option)
        except UserError as missing:
            print(missing)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
