"""One engine for long (`make soak`): weight updates, a fault after each fiftieth of the requests, and nothing grows.

SOAK_REQUESTS (20,000): requests in all. There are a hundredth as many weight updates.
"""

import contextlib
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
from conftest import CHUNK
from peers import Controller, Peer
from recorder import Disk, Recorder
from test_live_peers import loads, numbers, wait_until_shared
from waiting import until

from kvshare.hooks.lmcache.remote_client import THREADS
from kvshare.record import event_log, events

REQUESTS = int(os.environ.get("SOAK_REQUESTS", 20_000))
ROUNDS = min(50, REQUESTS // 30)
EACH = REQUESTS // ROUNDS  # requests of a round
UPDATES = REQUESTS // 100
PROMPTS = 30
TOGETHER = 4  # requests at a time
MIB = 2**20
POOL = 2 * THREADS + 2  # connections: one for each thread of gets and of puts, a lookup and the probe
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"  # scheduler and worker, as by default on a GPU


def own_memory(process):
    """Bytes of a process. The pages of files do not count, because the kernel may take them back at any time."""
    info = process.memory_info()
    return info.rss - info.shared


def resources(pid, port=None):
    """What an engine uses: its process ``pid``, that process's children, and this process, which keeps its record.

    Connections to ``port``, the server's, are counted apart from files.
    """
    here, root = psutil.Process(), psutil.Process(pid)
    tree = [root, *root.children(recursive=True)]
    pooled = [
        link for process in tree for link in process.net_connections("tcp") if link.raddr and link.raddr[1] == port
    ]
    return {
        "files": sum(process.num_fds() for process in tree) - len(pooled) + len(here.open_files()),
        "connections": len(pooled),
        "threads": sum(process.num_threads() for process in tree),
        "MiB": sum(map(own_memory, [here, *tree])) // MIB,
        "processes": len(tree),
    }


def assert_nothing_grows(seen):
    """After the first tenth of what was seen. Memory may grow by 64 MiB, connections to the size of their pool."""
    first, last, allowed = seen[len(seen) // 10 :][:5], seen[-5:], {"MiB": 64, "connections": POOL}
    print(f"after a tenth: {first[0]}\nat the end:    {last[-1]}")
    assert len({now["processes"] for now in seen}) == 1
    assert max(now["connections"] for now in seen) <= POOL
    for name in last[-1]:
        before, after = max(now[name] for now in first), min(now[name] for now in last)
        assert after <= before + allowed.get(name, 0), (name, [now[name] for now in seen])


@pytest.fixture(scope="module")
def engine(start_engine):
    made = start_engine(0, "soak", "--distributed-executor-backend", ONE_PROCESS).wait()
    until(made.ready)
    return made


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """With a queue that a stalled disk fills."""
    monkeypatch.setattr(event_log, "PART_BYTES", 50 * EACH)
    monkeypatch.setattr(event_log, "QUEUED", 100)
    return Disk(tmp_path)


def faults_of(backend, disk):
    """Functions that begin a fault, and return what ends it."""

    def killed():
        backend.kill()
        return backend.start

    def stopped():
        fault = contextlib.ExitStack()
        fault.enter_context(backend.stopped())
        return fault.close

    def misbehave(does):
        backend.does = does
        return lambda: setattr(backend, "does", "serve")

    return [killed, disk.stall, stopped, disk.fill, *(partial(misbehave, does) for does in backend.faults)]


def test_soak(engine, start_engine, backend, weights, disk):
    rng = random.Random(0)
    prompts = [[rng.randrange(300, 1500) for _ in range(2 * CHUNK + 20)] for _ in range(PROMPTS)]
    folders = [start_engine.model, weights.make(1)]
    updates, faults = itertools.count(1), itertools.cycle(faults_of(backend, disk))
    recorder = Recorder(engine, disk)
    version, stamp, seen, loaded = 0, "soak-0", [], 0
    port = int(backend.address.rpartition(":")[2])

    def ask(number):
        text = prompts[number]
        weights.check(version, text, recorder.ask(text, stamp, tokens=2))

    with ThreadPoolExecutor(TOGETHER) as pool:
        for at in range(ROUNDS):
            asked = [rng.randrange(PROMPTS) for _ in range(EACH)]
            third = EACH // 3
            list(pool.map(ask, asked[:third]))
            end = next(faults)()
            list(pool.map(ask, asked[third : 2 * third]))
            end()
            for _ in range(UPDATES * (at + 1) // ROUNDS - UPDATES * at // ROUNDS):
                update = next(updates)
                version, stamp = update % 2, f"soak-{update}"
                engine.load(folders[version])
                assert engine.reset()
            list(pool.map(ask, asked[2 * third :]))
            assert engine.reset(connector=False)  # what is asked again comes from the server
            until(lambda: not recorder.queued())
            loaded += engine.hits(0)
            engine.events.clear()
            kept = {"queued": recorder.queued(), "remembered": recorder.remembered(), **engine.kept()}
            seen.append(resources(engine.process.pid, port) | kept)
    written = recorder.close()
    lost = sum(event.events for event in written if isinstance(event, events.Lost))
    written = [event for event in written if not isinstance(event, events.Lost)]
    print(f"\n{ROUNDS * EACH} requests, {next(updates) - 1} updates, {ROUNDS} faults; {loaded} tokens loaded")
    print(f"{len(written)} events written, {lost} lost")
    assert loaded > 0
    assert lost > 0
    assert len(written) + lost == recorder.given
    assert_nothing_grows(seen)
    assert "500 Internal Server Error" not in engine.log.read_text()


def test_a_replica_is_gone_again_and_again(processes, tmp_path):
    """P2P: the other replica hangs, or is killed and comes back elsewhere, while it is asked for KV."""
    controller = Controller(processes, tmp_path)
    one, two = (Peer(processes, controller, rank, tmp_path / f"{rank}.log") for rank in range(2))
    seen = []
    for at in range(ROUNDS):
        wait_until_shared(two, one)
        for _ in range(EACH // 20):
            assert loads(two, one) == 512
        known = next(numbers)
        two.store(known)
        wait_until_shared(two, one)  # the controller has heard of both
        if at % 2:
            two.kill()
            assert one.load(known) == 0
            two = Peer(processes, controller, 1, tmp_path / f"{at}.log")
        else:
            with two.stopped():
                assert one.load(known) == 0
        until(lambda: one.used() == 0)
        seen.append(resources(one.process.pid))
    print(f"\n{ROUNDS} times gone")
    assert_nothing_grows(seen)
