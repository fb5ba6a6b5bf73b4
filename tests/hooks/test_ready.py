"""``ready`` means that LMCache shares: its real manager, engine and remote backend, without vLLM."""

import itertools

import pytest
import torch
from lmcache.v1.cache_engine import LMCacheEngine
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.manager import LMCacheManager
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import remote_backend
from lmcache.v1.token_database import ChunkedTokenDatabase

from kvshare.hooks.lmcache import events

numbers = itertools.count()


class Services:
    """LMCache's service factory, with a health monitor that may fail, and only what an engine without vLLM needs."""

    def __init__(self, url, fails):
        self.fails = fails
        config = LMCacheEngineConfig.from_defaults(max_local_cpu_size=0.01, remote_url=url, remote_serde="naive")
        metadata = LMCacheMetadata(
            "tiny", 1, 1, 0, 0, torch.float32, (1, 2, 256, 1, 64), role="worker", engine_id=f"engine-{next(numbers)}"
        )
        self.config, self.metadata = config, metadata
        self.engine = LMCacheEngine(config, metadata, ChunkedTokenDatabase(config, metadata), None, None, None)

    def get_or_create_metadata(self):
        return self.metadata

    def get_or_create_lmcache_engine(self):
        return self.engine

    def maybe_create_lookup_client(self):
        return None

    def maybe_create_lookup_server(self):
        if self.fails == "a service":
            raise RuntimeError("the address is taken")

    maybe_create_offload_server = maybe_create_runtime_plugin_launcher = maybe_create_lookup_client

    def maybe_create_internal_api_server(self, lmcache_manager):
        return None

    def maybe_create_health_monitor(self, lmcache_manager):
        if self.fails == "the health monitor":
            raise RuntimeError("no thread")


@pytest.fixture
def said(monkeypatch):
    sent = []
    monkeypatch.setattr(events, "_send", lambda op, **fields: sent.append((op, fields.get("rank"))))
    return sent


@pytest.fixture
def start():
    engines = []

    def start(url, fails=""):
        services = Services(url, fails)
        engines.append(services.engine)
        manager = LMCacheManager(services.config, services)
        events._post_init(manager.post_init, manager, (), {})
        return manager

    yield start
    for engine in engines:
        if engine.storage_manager is not None:
            engine.storage_manager.close()


def test_engine_with_its_server(start, said, lmcache_server):
    manager = start(f"lm://{lmcache_server}")
    assert manager.lmcache_engine.is_healthy()
    assert said == [("ready", 0)]


@pytest.mark.parametrize(
    ("url", "fails"),
    [("127.0.0.1:65477", ""), ("lm://", ""), (None, "a service"), (None, "the health monitor")],
)
def test_degraded_engine_is_never_ready(start, said, url, fails):
    manager = start(url, fails)
    engine = manager.lmcache_engine
    events._report_store(engine, lambda: None, (), {})
    assert said == []


def test_storage_that_connects_late(start, said, monkeypatch, tmp_path):
    create = remote_backend.CreateConnector
    monkeypatch.setattr(remote_backend, "CreateConnector", lambda *args, **kwargs: 1 / 0)
    engine = start(f"fs://localhost:1{tmp_path}/kv").lmcache_engine
    (backend,) = (b for b in engine.storage_manager.storage_backends.values() if hasattr(b, "connection"))
    assert (backend.connection, said) == (None, [])
    monkeypatch.setattr(remote_backend, "CreateConnector", create)
    backend.failure_time = 0  # LMCache tries again after ten seconds
    backend.init_connection()
    for _ in range(2):
        events._report_store(engine, lambda: None, (), {})
    assert said == [("ready", 0)]
