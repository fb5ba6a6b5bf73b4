"""Never in the way: each fault while fp32 requests run; answers stay those of the weights, sharing resumes."""

import contextlib
import random
import time

import pytest
from backend import BACKENDS
from conftest import CHUNK
from waiting import until

from kvshare.core import policy

HITS = 4 * CHUNK
SERVER = ("killed", "stopped", "restarted")


def pytest_generate_tests(metafunc):
    if "fault" in metafunc.fixturenames:
        of_proxy = BACKENDS[metafunc.config.getoption("backend")].faults
        metafunc.parametrize("fault", [*of_proxy, *SERVER], indirect=True)


def prompt():
    return [random.randrange(300, 1500) for _ in range(HITS + 50)]


@pytest.fixture
def fault(request, backend):
    """Its name, and what starts and ends it. It ends, whatever the test did."""
    name, ends = request.param, contextlib.ExitStack()

    def begin():
        if name == "killed":
            backend.kill()
            ends.callback(backend.start)
        elif name == "stopped":
            ends.enter_context(backend.stopped())
        elif name == "restarted":
            backend.restart()
        else:
            backend.does = name
            ends.callback(setattr, backend, "does", "serve")

    with ends:
        yield name, begin, ends.close


def shares(engines):
    """Whether the second engine reads what the first one computes now."""
    stamp, text, start = policy.private_policy(), prompt(), len(engines[1].events)
    engines[0].ask(text, stamp)
    engines[1].ask(text, stamp)
    return engines[1].hits(start) == HITS


def test_fault(engines, weights, fault):
    name, begin, end = fault
    first, second = engines
    until(lambda: shares(engines))
    stamp, known, new = policy.private_policy(), [prompt() for _ in range(3)], [prompt() for _ in range(3)]
    usual = max(_seconds(first, text, stamp, weights) for text in known)
    start = len(second.events)
    begin()
    # What the other one stored, and what nobody knows.
    worst = max(_seconds(second, text, stamp, weights) for text in known + new)
    loaded = second.hits(start)
    end()
    healed = time.monotonic()
    until(lambda: shares(engines))
    resumed = time.monotonic() - healed
    print(f"\n{name}: slowest {worst - usual:+.2f} s, {loaded} tokens loaded, shares {resumed:.1f} s later")
    assert loaded == (3 * HITS if name == "slow" else 0)


def test_what_follows_a_failed_load_is_stored_right(engines, weights, backend):
    """vLLM computes the rest of a prompt in the step that fails to load its beginning, and then all of it again."""
    if "vanish" not in backend.faults:
        pytest.skip("no proxy before this server")
    first, second = engines
    until(lambda: shares(engines))
    stamp, text = policy.private_policy(), prompt()
    first.ask(text[: HITS // 2 + 1], stamp)
    start = len(second.events)
    backend.does = "vanish"
    try:
        second.ask(text, stamp)
    finally:
        backend.does = "serve"
    assert second.hits(start) == 0
    until(lambda: any(event["op"] == "stored" for event in second.events[start:]))
    stored = [len(event["keys"]) for event in second.events[start:] if event["op"] == "store"]
    assert stored == [HITS // CHUNK]  # once, after all of it was computed
    until(lambda: shares(engines))
    start = len(first.events)
    weights.check(0, text, first.ask(text, stamp, tokens=4))
    assert first.hits(start) == HITS // 2


def _seconds(engine, text, stamp, weights):
    began = time.monotonic()
    answer = engine.ask(text, stamp, tokens=4)
    seconds = time.monotonic() - began
    weights.check(0, text, answer)
    return seconds
