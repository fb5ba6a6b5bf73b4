"""Whether others can find a stored key, with a controller that answers, is away, or has lost a message."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from kvshare.hooks.lmcache import p2p_controller


@pytest.fixture
def loop():
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()


def told(loop, up=True, lists_after=0, held=True):
    """What who stored a key is told."""
    answers = iter([0] * lists_after)
    worker = SimpleNamespace(worker_id=0, loop=loop)
    p2p_controller.link(worker).up = up

    async def ask(message):
        return SimpleNamespace(layout_info=[("", "", next(answers, 1), "")])

    worker.async_put_and_wait_msg = ask
    engine = SimpleNamespace(lmcache_worker=worker, config=SimpleNamespace(enable_p2p=True))
    engine.storage_manager = SimpleNamespace(local_cpu_backend=SimpleNamespace(contains=lambda key: held))
    outcome, ended = [], threading.Event()
    p2p_controller.when_findable(
        engine, SimpleNamespace(chunk_hash=7), lambda found: (outcome.append(found), ended.set())
    )
    assert ended.wait(60)
    return outcome


def test_found(loop):
    assert told(loop) == [True]
    assert told(loop, lists_after=3) == [True]


def test_not_found(loop, monkeypatch):
    monkeypatch.setattr(p2p_controller, "LISTED_WITHIN", 0.1)
    assert told(loop, up=False) == [False]
    assert told(loop, held=False) == [False]
    assert told(loop, lists_after=10**6) == [False]  # a message was lost


def test_without_p2p():
    outcome = []
    engine = SimpleNamespace(lmcache_worker=None)
    p2p_controller.when_findable(engine, None, outcome.append)
    assert outcome == [True]
