"""One engine for long (`make soak`): weight updates, a fault after each fiftieth of the requests, and nothing grows.

SOAK_REQUESTS (20,000): requests in all. There are a hundredth as many weight updates.
"""

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
from conftest import CHUNK
from waiting import until

REQUESTS = int(os.environ.get("SOAK_REQUESTS", 20_000))
ROUNDS = 50
EACH = REQUESTS // ROUNDS  # requests of a round
UPDATES = REQUESTS // 100
PROMPTS = 30
TOGETHER = 4  # requests at a time

FAULTS = ("killed", "stopped", "refuse", "hang", "slow", "truncate", "flip", "vanish")


@dataclass
class Resources:
    """Of the engine's processes together."""

    fds: int
    threads: int
    rss: int
    processes: int

    @classmethod
    def of(cls, process):
        tree = [process, *process.children(recursive=True)]
        fds, threads = sum(p.num_fds() for p in tree), sum(p.num_threads() for p in tree)
        return cls(fds, threads, sum(p.memory_info().rss for p in tree), len(tree))


@pytest.fixture(scope="module")
def engine(start_engine):
    made = start_engine(0, "soak").wait()
    until(made.ready)
    return made


def begin(backend, fault):
    if fault == "killed":
        backend.kill()
    elif fault == "stopped":
        backend.stop()
    else:
        backend.does = fault


def end(backend, fault):
    if fault == "killed":
        backend.start()
    elif fault == "stopped":
        backend.resume()
    else:
        backend.does = "serve"


def test_soak(engine, start_engine, backend, weights):
    rng = random.Random(0)
    prompts = [[rng.randrange(300, 1500) for _ in range(2 * CHUNK + 20)] for _ in range(PROMPTS)]
    folders = [start_engine.model, weights.make(1)]
    updates, faults = itertools.count(1), itertools.cycle(FAULTS)
    process, version, stamp, seen = psutil.Process(engine.process.pid), 0, "soak-0", []

    def ask(number):
        text = prompts[number % PROMPTS]
        weights.check(version, text, engine.ask(text, stamp, tokens=2))

    with ThreadPoolExecutor(TOGETHER) as pool:
        for at in range(ROUNDS):
            fault = next(faults)
            numbers = [rng.randrange(PROMPTS) for _ in range(EACH)]
            third = EACH // 3
            list(pool.map(ask, numbers[:third]))
            begin(backend, fault)
            list(pool.map(ask, numbers[third : 2 * third]))
            end(backend, fault)
            for _ in range(UPDATES * (at + 1) // ROUNDS - UPDATES * at // ROUNDS):
                update = next(updates)
                version, stamp = update % 2, f"soak-{update}"
                engine.load(folders[version])
                assert engine.reset()
            list(pool.map(ask, numbers[2 * third :]))
            assert engine.reset(connector=False)  # what is asked again comes from the server
            seen.append(Resources.of(process))
    first, last = seen[ROUNDS // 10 :][:5], seen[-5:]
    print(f"\n{REQUESTS} requests, {next(updates) - 1} updates, {ROUNDS} faults; {engine.hits(0)} tokens loaded")
    print(f"after a tenth: {first[0]}\nat the end:    {last[-1]}")
    assert engine.hits(0) > 0
    assert {resources.processes for resources in seen} == {seen[0].processes}
    for name in ("fds", "threads"):
        usual = max(getattr(resources, name) for resources in first)
        assert min(getattr(resources, name) for resources in last) <= usual, name
    assert min(resources.rss for resources in last) <= 1.1 * max(resources.rss for resources in first)
    assert "500 Internal Server Error" not in engine.log.read_text()
