"""A worker's copies to and from a real multi-process server, in background threads as on GPUs."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch
import zmq
from backend import MP
from conftest import CHUNK
from waiting import STUCK, until

from kvshare import vllm_plugin

vllm_plugin.register()

from lmcache.integration.vllm.vllm_multi_process_adapter import (  # noqa: E402
    LMCacheMPSchedulerAdapter,
    LMCacheMPWorkerAdapter,
    LoadStoreOp,
    ParallelStrategy,
)
from lmcache.v1.multiprocess.transfer_context import shm, worker_transfer  # noqa: E402

from kvshare.hooks.lmcache import mp_copies  # noqa: E402

BLOCK, LAYERS = 128, 2
TOKENS = list(range(2 * CHUNK))
USED = list(range(len(TOKENS) // BLOCK))  # blocks
SECONDS = 10.0  # LMCache's timeout
ONE = ParallelStrategy(False, 1, 0, 1, 1, 1)


@pytest.fixture(scope="module")
def server(processes, tmp_path_factory):
    return MP(processes, tmp_path_factory.mktemp("mp") / "log")


@pytest.fixture
def background(monkeypatch):
    monkeypatch.setattr(worker_transfer, "_supports_async_primitives", lambda: True)


@pytest.fixture
def start(server, monkeypatch):
    """Starts a worker. It ends with the test."""
    monkeypatch.setattr(mp_copies, "_adapters", set())
    started = []

    def start():
        started.append(Worker(server))
        return started[-1]

    yield start
    for worker in started:
        worker.adapter.shutdown()


@pytest.fixture
def held(monkeypatch):
    """A store waits for its place in the server's memory until this is set."""
    released, prepare = threading.Event(), shm.EngineDrivenContextShm.prepare_store
    released.waiting = threading.Event()

    def wait_first(places, *args):
        released.waiting.set()
        assert released.wait(STUCK)
        return prepare(places, *args)

    monkeypatch.setattr(shm.EngineDrivenContextShm, "prepare_store", wait_first)
    yield released
    released.set()


class Worker:
    """vLLM's worker, as far as LMCache sees it: its ``sleep`` destroys the KV cache."""

    def __init__(self, server):
        settings = {"lmcache.mp.mq_timeout": SECONDS, "lmcache.mp.heartbeat_interval": 3.0}
        common = {"context": zmq.Context(), "model_name": "m", "vllm_block_size": BLOCK, "parallel_strategy": ONE}
        common["extra_config"] = settings
        self.adapter = LMCacheMPWorkerAdapter(server_url=server._url, **common)
        self.adapter.kvshare_engine_id = "test"
        self.lookups = LMCacheMPSchedulerAdapter(server_urls=[server._url], **common)
        self.layers = [torch.zeros(len(USED), 2, BLOCK, 2, 8) for _ in range(LAYERS)]
        kv = {f"layer.{i}": layer for i, layer in enumerate(self.layers)}
        self.adapter.register_kv_caches(kv, layout_hints={"kv_layout": "NHD"})
        mp_copies._init_device(lambda: None, SimpleNamespace(worker=self), (), {})

    def sleep(self, level=1):
        self.fill(-1)

    def fill(self, value):
        for layer in self.layers:
            layer.fill_(value)

    def holds(self, value):
        return all(bool((layer == value).all()) for layer in self.layers)

    def store(self, salt):
        request = uuid4().hex
        self.adapter.submit_store_request(request, *self._call(), salt)
        return self.adapter.store_futures[request]

    def load(self, salt):
        """Whether it has found anything."""
        request, results = uuid4().hex, []
        self.lookups.maybe_submit_lookup_request(request, TOKENS, cache_salt=salt)

        def answered():
            results.append(self.lookups.check_lookup_result(request))
            return results[-1] is not None

        until(answered)
        if not results[-1]:
            return False
        self.adapter.submit_retrieve_request(request, *self._call(), salt)
        return self.adapter.retrieve_futures[request][0].result(timeout=STUCK)

    def _call(self):
        return LoadStoreOp(TOKENS, [USED], 0, len(TOKENS)), self.adapter.create_recorded_event()


def runs(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def mapped():
    return set(re.findall(r"/dev/shm/lmcache_l1_pool_\S+(?: \(deleted\))?", Path("/proc/self/maps").read_text()))


def test_a_store_under_way_ends_before_sleep(start, background, held):
    worker = start()
    worker.fill(1)
    stored = worker.store("sleep")
    assert held.waiting.wait(STUCK)
    asleep = runs(worker.sleep)
    asleep.join(0.5)
    assert asleep.is_alive()
    assert worker.holds(1)
    held.set()
    asleep.join(STUCK)
    assert worker.holds(-1)
    assert stored.result(timeout=STUCK)
    assert worker.load("sleep")  # after waking
    assert worker.holds(1)


def test_a_store_given_up_ends_before_vllm_frees_its_blocks(start, background, held):
    worker = start()
    worker.fill(2)
    worker.store("given up")
    assert held.waiting.wait(STUCK)

    def give_up():
        while worker.adapter.store_futures:
            worker.adapter._health_event.clear()  # a heartbeat sets it again
            worker.adapter.get_finished({"given up"})

    polled = runs(give_up)
    until(lambda: not worker.adapter.store_futures)
    polled.join(0.5)
    assert polled.is_alive()
    worker.adapter._health_event.set()  # the server was only slow
    held.set()
    polled.join(STUCK)
    worker.fill(3)  # of another request
    assert worker.load("given up")
    assert worker.holds(2)


def test_the_memory_of_a_restarted_server_is_given_back(start, background, server):
    worker = start()
    assert len(mapped()) == 1
    server.restart()
    until(lambda: not worker.adapter.is_healthy)
    worker.adapter._ensure_heartbeat_started()
    until(lambda: worker.adapter.is_healthy)
    assert len(mapped()) == 2
    worker.adapter.get_finished(set())
    assert len(mapped()) == 1
    worker.fill(4)
    assert worker.store("new").result(timeout=STUCK)


def test_places_of_a_restarted_server_are_refused(start, server, monkeypatch):
    """The answer came from the new server, and the worker still has the old one's memory."""
    worker = start()
    places = worker.adapter.transfer_ctx.engine_driven_context
    key = worker.adapter._create_key(TOKENS, 0, len(TOKENS), "restarted")
    monkeypatch.setattr(places.req_client, "prepare_store", lambda *args: _after_restart(places))
    with pytest.raises(ConnectionError, match="started again"):
        places.prepare_store(key, worker.adapter.instance_id)
    places.req_client._message_queue_client.kvshare_health.set()
    monkeypatch.setattr(places.req_client, "prepare_retrieve", lambda *args: _after_restart(places))
    assert places.prepare_retrieve(key, worker.adapter.instance_id) is None


def _after_restart(places):
    places.req_client._message_queue_client.kvshare_closed += 1
    response = type("Response", (), {"success": True, "context": {"slots": [], "chunk_indices": []}})
    return type("Future", (), {"wait": lambda *a, **k: True, "result": lambda *a, **k: response})()


def test_what_a_dead_worker_did_not_finish_is_not_found(start):
    dead, other = start(), start()
    key = dead.adapter._create_key(TOKENS, 0, len(TOKENS), "unfinished", cache_salt="unfinished")
    slots, _ = dead.adapter.transfer_ctx.engine_driven_context.prepare_store(key, dead.adapter.instance_id)
    assert slots
    dead.adapter.transfer_ctx.unregister().result(timeout=STUCK)
    assert not other.load("unfinished")
    other.fill(5)
    assert other.store("unfinished").result(timeout=STUCK)
    assert other.load("unfinished")


def test_a_hung_server_fails_a_store_in_the_forward_pass(start, server):
    worker = start()
    worker.adapter.transfer_ctx.engine_driven_context.mq_timeout = 1.0
    with server.stopped():
        assert worker.store("hung").result(timeout=0) is False


def test_it_says_that_it_shares_no_memory_with_the_server(start, monkeypatch, caplog):
    def fails(*args):
        raise FileNotFoundError("another /dev/shm")

    monkeypatch.setattr(shm.EngineDrivenContextShm, "__init__", fails)
    worker = start()
    assert "so KV goes by TCP, which is slow" in caplog.text
    assert worker.store("by TCP").result(timeout=STUCK)
