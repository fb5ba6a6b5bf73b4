"""Two replicas and a weight update, with the token database, keys and connector of LMCache 0.4.4."""

import asyncio
import contextlib
import threading
import time
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lmcache.integration.vllm import vllm_v1_adapter as adapter
from lmcache.integration.vllm.lmcache_connector_v1 import LMCacheConnectorV1Dynamic
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import AdHocMemoryAllocator
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.p2p_backend import P2PBackend
from lmcache.v1.storage_backend.storage_manager import StorageManager
from lmcache.v1.token_database import ChunkedTokenDatabase, TokenDatabase
from vllm import SamplingParams

from kvshare.core import policy
from kvshare.hooks.lmcache import keys, p2p_memory, p2p_peers, remote_puts
from kvshare.record import worker_events
from kvshare.services import lm_server
from kvshare.services.store import Store

CHUNK = 256
TOKENS = list(range(3 * CHUNK + 7))
RUN = "0123456789abcdef"


def database(worker: int = 0) -> ChunkedTokenDatabase:
    """One replica's: the model's path is as long as a checkpoint's can be."""
    metadata = LMCacheMetadata(
        f"/models/{'long-' * 30}qwen@7b", 1, 1, worker, worker, torch.bfloat16, (2, 2, 256, 2, 64)
    )
    return ChunkedTokenDatabase(LMCacheEngineConfig.from_defaults(chunk_size=CHUNK, save_unfull_chunk=False), metadata)


def keys_of(replica: ChunkedTokenDatabase, step: int | None, tokens=TOKENS) -> list[str]:
    configs = {} if step is None else {policy.TAG: policy.policy_id(RUN, step)}
    return [key.to_string() for _, _, key in replica.process_tokens(tokens, request_configs=configs)]


@pytest.fixture(params=["LMCache's hash", "LMCache-Ascend's hash"])
def hashing(request, monkeypatch):
    if "Ascend" in request.param:
        request.getfixturevalue("lmcache_ascend")
        from lmcache_ascend.v1.tokens_hash import _hash_tokens

        monkeypatch.setattr(TokenDatabase, "_hash_tokens", _hash_tokens)


def test_this_is_the_version():
    assert version("lmcache") == "0.4.4"


def test_replicas_share_within_a_policy_and_not_across(hashing):
    one, other = database(), database()
    assert len(keys_of(one, 1)) == 3
    assert keys_of(one, 1) == keys_of(other, 1)
    assert not set(keys_of(one, 1)) & set(keys_of(other, 2))
    assert not set(keys_of(one, 1)) & set(keys_of(other, None))
    assert keys_of(one, 1, TOKENS[:CHUNK]) == keys_of(one, 1)[:1]  # a prefix is found


def test_keys_fit_into_lm(hashing):
    for key in keys_of(database(), 10**6):
        assert len(key) <= 150
        assert key.count("@") == 4


def test_async_lookup_makes_the_same_keys(hashing):
    """It sends bare hashes to the worker, which makes the keys."""
    hashes = [h for _, _, h in database().process_tokens(TOKENS, make_key=False)]
    configs = {policy.TAG: policy.policy_id(RUN, 1)}
    made = database().process_tokens(hashes=hashes, offsets=[CHUNK] * 3, request_configs=configs)
    assert [key.to_string() for _, _, key in made] == keys_of(database(), 1)


@pytest.fixture
def engine(monkeypatch):
    fresh = keys.EnginePolicy()
    monkeypatch.setattr("kvshare.hooks.lmcache.keys.engine", fresh)
    monkeypatch.setattr("kvshare.hooks.lmcache.reset.engine", fresh)
    return fresh


def connector() -> LMCacheConnectorV1Dynamic:
    """The scheduler's side, with one request being computed."""
    made = LMCacheConnectorV1Dynamic.__new__(LMCacheConnectorV1Dynamic)
    tracker = adapter.RequestTracker("r", 1, TOKENS, [], request_configs={policy.TAG: policy.policy_id(RUN, 1)})
    made._lmcache_engine = SimpleNamespace(_request_trackers={"r": tracker})
    return made


def test_reset(engine):
    before = adapter.extract_request_configs(SamplingParams())[policy.TAG]
    scheduler = connector()
    assert scheduler.reset_cache() is True
    after = adapter.extract_request_configs(SamplingParams())[policy.TAG]
    running = scheduler._lmcache_engine._request_trackers["r"].request_configs[policy.TAG]
    assert len({before, after, running, policy.policy_id(RUN, 1)}) == 4
    assert policy.is_private(running)


def waiting(step):
    """A request that the scheduler has just got."""
    params = SamplingParams(extra_args={"kv_transfer_params": {policy.TAG: policy.policy_id(RUN, step)}})
    absent = dict.fromkeys(("lora_request", "prompt_embeds", "cache_salt", "mm_features"))
    request = SimpleNamespace(request_id="r", sampling_params=params, **absent)
    keys.engine.added(request)
    return request


def stamp(request, looked_up):
    impl = SimpleNamespace(lookup_client=SimpleNamespace(clear_lookup_status=looked_up.append))
    keys._stamp(lambda *args: None, impl, (request, 0), {})
    return adapter.extract_request_configs(request.sampling_params)[policy.TAG]


def test_a_stamp_is_kept(engine):
    assert stamp(waiting(2), []) == policy.policy_id(RUN, 2)


def test_a_request_from_before_the_reset_is_kept_to_itself(engine):
    request, looked_up = waiting(1), []
    stamp(request, looked_up)
    engine.reset()
    assert policy.is_private(stamp(request, looked_up))
    assert looked_up == ["r"]  # is forgotten


@pytest.mark.parametrize("passive", [False, True])
def test_worker_gives_back_its_local_tier(monkeypatch, passive):
    """Through LMCache's start_load_kv, which LMCache-Ascend's calls; a passive rank has no storage manager."""
    removed = []
    entries = {key: SimpleNamespace(is_pinned=key == "promised") for key in ("a", "promised", "b")}
    tier = SimpleNamespace(hot_cache=entries, cpu_lock=threading.Lock(), remove=removed.append)
    manager = None if passive else SimpleNamespace(storage_backends={"LocalCPUBackend": tier})
    impl = adapter.LMCacheConnectorV1Impl.__new__(adapter.LMCacheConnectorV1Impl)
    monkeypatch.setattr(type(impl), "lmcache_engine", SimpleNamespace(storage_manager=manager), raising=False)
    impl.kv_caches = {"layer": None}
    metadata = adapter.LMCacheConnectorMetadata()
    metadata.kvshare_reset = time.time()
    impl._parent = SimpleNamespace(_get_connector_metadata=lambda: metadata)
    impl.start_load_kv(SimpleNamespace(attn_metadata=None))
    for thread in threading.enumerate():
        if thread.name == "kvshare-free-local-tiers":
            thread.join()
    assert removed == ([] if passive else ["a", "b"])


def test_ascends_engine_reports_its_stores(lmcache_ascend, monkeypatch):
    from lmcache_ascend.v1.cache_engine import AscendLMCacheEngine

    sent = []
    monkeypatch.setattr(worker_events, "sender", lambda: SimpleNamespace(send=sent.append))
    engine = AscendLMCacheEngine.__new__(AscendLMCacheEngine)
    engine.token_database = database()
    engine.metadata, engine.lmcache_worker = engine.token_database.metadata, None
    manager = engine.storage_manager = StorageManager.__new__(StorageManager)
    manager.storage_backends, manager.allocator_backend = {}, object()
    manager.allocate = lambda *args, **kwargs: mock.MagicMock(get_size=lambda: 1)
    stats = mock.Mock(time_to_store=lambda: 1.0, process_tokens_time=0.0, from_gpu_time=0.0, put_time=0.0)
    stats.profile_process_tokens = stats.profile_put = contextlib.nullcontext
    engine.stats_monitor = mock.Mock(on_store_request=lambda tokens: stats)
    engine.gpu_connector = SimpleNamespace(batched_from_gpu=lambda *args, **kwargs: None)
    engine.config, engine.kv_events_enabled, engine.store_location = engine.token_database.config, False, None
    engine._engine_state_lock, engine.fmt, engine.is_frozen = threading.Lock(), None, lambda: False
    engine._log_kvcache_for_check = lambda **kwargs: None
    configs = {policy.TAG: policy.policy_id(RUN, 1), worker_events.REQUEST: "r"}
    mask = torch.ones(len(TOKENS), dtype=torch.bool)
    mask[:CHUNK] = False
    engine._run_store_pipeline("r", TOKENS, None, None, mask, 519, {"request_configs": configs})
    store, stored = sent
    expected = [k.chunk_hash for _, _, k in database().process_tokens(TOKENS, request_configs=configs)]
    assert (store["op"], store["keys"], store["request"]) == ("store", expected[1:], "r")
    assert (stored["op"], stored["end"]) == ("stored", 3 * CHUNK)
    assert store["policy"] == policy.policy_id(RUN, 1)
    assert remote_puts.Puts.current.value is None


class Memory:
    def __init__(self, size):
        self.size, self.freed = size, 0

    def get_size(self):
        return self.size

    def ref_count_down(self):
        self.freed += 1


def test_ascends_p2p_backend_holds_the_memory_of_failed_loads(lmcache_ascend):
    """Its peer may still write there. Its constructor does not call that of LMCache's backend."""
    from lmcache_ascend.v1.storage_backend.p2p_backend import AscendP2PBackend

    backend, asked = AscendP2PBackend.__new__(AscendP2PBackend), []
    backend.config = SimpleNamespace(max_local_cpu_size=1, save_unfull_chunk=False)
    backend.local_cpu_backend = SimpleNamespace(allocate=lambda *args, busy_loop: Memory(2**27))
    p2p_peers._init_ascend(lambda *args, **kwargs: None, backend, (), {})
    backend.pull_mode = backend.use_npu = False
    backend.full_size_shapes = backend.dtypes = backend.fmt = None
    backend.transfer_channel = SimpleNamespace(get_local_buffer_refs=lambda memory: ([], []))
    backend.peer_init_url, backend.loop = "own", asyncio.new_event_loop()

    async def no_answer(*args):
        asked.append(args)

    backend._send_lookup_request_with_retry = no_answer
    (_, _, key), *_ = database().process_tokens(TOKENS)
    spec = {"target_peer_url": "other", "cum_chunk_lengths": [0, CHUNK]}
    for _ in range(5):
        assert backend.loop.run_until_complete(backend.batched_get_non_blocking("lookup", [key], spec)) == []
    held = backend._kvshare_held
    assert held.bytes() == len(asked) * 2**27 == (p2p_memory.SHARE + 1 / 8) * 2**30
    assert not any(memory.freed for memory in held._memory["unknown"])


def test_a_p2p_backend_that_is_not_known_frees_memory_as_lmcache_does():
    class Other(P2PBackend):
        def __init__(self):
            pass

    memory = Memory(1)
    Other()._cleanup_memory_objects([memory])
    assert memory.freed == 1


def test_lm_client():
    """The one that takes the place of this LMCache's, with a real server."""
    from lmcache.v1.storage_backend.connector import lm_connector

    memory, loop = AdHocMemoryAllocator(), asyncio.new_event_loop()
    replica = database()
    local = SimpleNamespace(config=replica.config, metadata=replica.metadata)
    local.allocate = lambda *what, busy_loop: memory.allocate(*what)
    local.config.blocking_timeout_secs = 5
    (_, _, key), (_, _, other), _ = replica.process_tokens(TOKENS, request_configs={policy.TAG: "p"})
    with lm_server.listen("127.0.0.1", 0, Store(1 << 28), None) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        client = lm_connector.LMCServerConnector("127.0.0.1", listening.server_address[1], loop, local)
        chunk = memory.allocate(local.metadata.get_shapes(), local.metadata.get_dtypes())
        chunk.raw_data.random_()
        loop.run_until_complete(client.put(key, chunk))
        assert loop.run_until_complete(client.exists(key))
        assert not loop.run_until_complete(client.exists(other))
        assert loop.run_until_complete(client.get(other)) is None
        assert torch.equal(loop.run_until_complete(client.get(key)).raw_data, chunk.raw_data)
        loop.run_until_complete(client.close())
        listening.shutdown()
