"""One replica of two workers (tensor parallelism): both report that they are up, and what only one loads is no hit."""

import random

import pytest
from conftest import CHUNK
from engines import Engine
from waiting import until

from kvshare.core import policy
from kvshare.hooks.verl.loads import Loads

HITS = 4 * CHUNK


@pytest.fixture(scope="module")
def engine(processes, backend, weights, tmp_path_factory):
    log = tmp_path_factory.mktemp("tensor-parallel") / "log"
    environment = backend.environment | {"LMCACHE_LOCAL_CPU": "False"}
    options = ("--tensor-parallel-size", "2")
    return Engine(processes, 0, weights.make(0), log, environment, connector=backend.connector, options=options).wait()


def test_both_ranks_are_up(engine):
    until(lambda: engine.ready(ranks=2))


def load(engine, weights):
    """The events of a load from the server."""
    stamp, text = policy.private_policy(), [random.randrange(300, 1500) for _ in range(HITS + 50)]
    weights.check(0, text, engine.ask(text, stamp, stores=1))
    assert engine.reset(connector=False)
    start = len(engine.events)
    weights.check(0, text, engine.ask(text, stamp))
    until(lambda: any(event["op"] == "load" for event in engine.events[start:]))
    return [event for event in engine.events[start:] if event["op"] in ("load", "partial")]


def recorded(events):
    loads = Loads()
    loads.started(events[0]["request"])
    for event in events:
        (loads.loaded if event["op"] == "load" else loads.partial)(event)
    return sum(sum(event["tokens"]) for event in loads.ended(events[0]["request"]))


def test_both_load(engine, weights):
    events = load(engine, weights)
    assert [event["op"] for event in events] == ["load"]
    assert recorded(events) == HITS


def test_only_rank_0_loads(engine, weights, backend):
    """vLLM computes on both what rank 1 lacks."""
    before = engine.metric("kvshare:loaded_tokens_total")
    backend.of, backend.does = b"@2@1@", "vanish"
    try:
        events = load(engine, weights)
    finally:
        backend.of, backend.does = b"", "serve"
    by_op = {event["op"]: event for event in events}
    assert (sum(by_op["load"]["tokens"]), by_op["partial"]["tokens"]) == (HITS, 0)
    assert recorded(events) == 0
    assert engine.metric("kvshare:loaded_tokens_total") == before
