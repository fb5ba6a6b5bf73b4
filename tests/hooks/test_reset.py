"""What a reset leaves to be found, and what it gives back: vLLM's real caches, real LMCache tiers, in this process."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from vllm import SamplingParams
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
from vllm.distributed.kv_transfer.kv_connector.v1 import lmcache_connector
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.hisparse.block_pool import SharedEventQueueBlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.worker import kv_connector_model_runner_mixin as mixin

from kvshare import vllm_plugin
from kvshare.hooks.lmcache import reset

ENTRIES = 5000
SHAPE = torch.Size([2, 1, 16, 16])


def key(number):
    return CacheEngineKey("qwen", 1, 0, number, torch.float32)


@pytest.fixture
def tier():
    config = LMCacheEngineConfig.from_defaults(chunk_size=16, local_cpu=True, max_local_cpu_size=0.05)
    return LocalCPUBackend(config, LMCacheMetadata("qwen", 1, 1, 0, 0, torch.float32, (1, 2, 16, 1, 16)), "cpu")


@pytest.fixture
def hurried():
    """Threads change places as often as they do by chance in a long run."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def test_reset_while_others_store(tier, hurried):
    """The engine only lists what is there; another thread that stores meanwhile must not make that fail."""
    chunk = tier.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD)
    for number in range(ENTRIES):
        tier.submit_put_task(key(number), chunk)
    ended = threading.Event()

    def store():
        number = ENTRIES
        while not ended.is_set():
            tier.submit_put_task(key(number), chunk)
            number += 1

    storing = threading.Thread(target=store)
    storing.start()
    try:
        for _ in range(20):
            reset._free_local_tiers({"LocalCPUBackend": tier})
    finally:
        ended.set()
        storing.join()
    for thread in threading.enumerate():
        if thread.name == "kvshare-free-local-tiers":
            thread.join()
    assert not any(tier.contains(key(number)) for number in range(ENTRIES))


@pytest.mark.parametrize("loads", [True, False])
def test_worker_hears_of_a_reset_before_it_stores(monkeypatch, loads):
    """With start_load_kv, which vLLM calls after the forward pass if nothing is to be loaded: what this step computed
    must not be given back."""
    calls = []
    connector = object.__new__(lmcache_connector.LMCacheConnectorV1)
    connector._lmcache_engine = SimpleNamespace(
        start_load_kv=lambda context: calls.append("hear"),
        wait_for_save=lambda: calls.append("store"),
        get_finished=lambda finished: (None, None),
        get_kv_events=lambda: [],
    )
    monkeypatch.setattr(mixin, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(mixin, "get_forward_context", lambda: None)
    step = SimpleNamespace(kv_connector_metadata=KVConnectorMetadata(), finished_req_ids=set(), has_sync_kv_loads=loads)
    with mixin.KVConnectorModelRunnerMixin._get_kv_connector_output(step):
        calls.append("forward")
    assert calls == (["hear", "forward", "store"] if loads else ["forward", "hear", "store"])


BLOCK = 16
PROMPT = list(range(4 * BLOCK + 1))
BLOCKS = 32


@pytest.fixture
def scheduler():
    """The part of vLLM's scheduler that a reset touches, and one request that has computed its prompt."""
    vllm_plugin.register()
    kv_cache_utils.init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    scheduler = object.__new__(Scheduler)
    scheduler.kv_cache_manager = KVCacheManager(config, 1024, BLOCK, BLOCK)
    scheduler.connector = Connector()
    scheduler.requests, scheduler.running, scheduler.log_stats = {}, [], False
    scheduler.aux_output_connector = None
    run(scheduler, request("running"))
    return scheduler


class Connector:
    resets = 0

    def reset_cache(self):
        self.resets += 1


def request(name):
    return Request(name, PROMPT, SamplingParams(max_tokens=9), None, None, block_hasher=hasher())


def hasher():
    return kv_cache_utils.get_request_block_hasher(BLOCK, sha256)


def run(scheduler, one):
    scheduler.requests[one.request_id] = one
    assert scheduler.kv_cache_manager.allocate_slots(one, len(PROMPT))


def end(scheduler):
    for one in scheduler.requests.values():
        scheduler.kv_cache_manager.free(one)
    scheduler.requests.clear()


def found(scheduler):
    """Tokens that vLLM has of the prompt of a request to come."""
    return scheduler.kv_cache_manager.get_computed_blocks(request("next"))[1]


def test_nothing_is_found_after_a_reset_under_way(scheduler):
    assert found(scheduler) == 4 * BLOCK
    assert not scheduler.reset_prefix_cache()
    assert found(scheduler) == 4 * BLOCK  # without the connector a reset is as vLLM's
    assert scheduler.reset_prefix_cache(reset_connector=True)
    assert found(scheduler) == 0
    assert scheduler.connector.resets == 1
    for one in scheduler.requests.values():  # goes on, and is not found by others
        one.append_output_token_ids(list(range(2 * BLOCK)))
        assert scheduler.kv_cache_manager.allocate_slots(one, 2 * BLOCK)
    assert found(scheduler) == 0
    end(scheduler)
    assert found(scheduler) == 0
    run(scheduler, request("new"))
    assert found(scheduler) == 4 * BLOCK


def test_without_a_prefix_cache_the_connector_is_reset(scheduler):
    scheduler.kv_cache_manager.enable_caching = False
    assert scheduler.reset_prefix_cache(reset_connector=True)
    assert scheduler.connector.resets == 1


def test_routed_experts_are_reset_as_vllm_does(scheduler):
    """Its worker dies of a reset while requests are under way: then vLLM keeps them, and the reset says so."""
    kept = scheduler.aux_output_connector = AuxOutputSchedulerConnector()
    assert not scheduler.reset_prefix_cache(reset_connector=True)
    assert found(scheduler) == 0
    assert (kept._generation, scheduler.connector.resets) == (0, 1)
    end(scheduler)
    assert scheduler.reset_prefix_cache(reset_connector=True)
    assert (kept._generation, scheduler.connector.resets) == (1, 2)


def test_other_block_pools_are_evicted_too(scheduler):
    """HiSparse's, in the host's memory; what else it keeps of them only vLLM can reset, and the reset says so."""
    caches = scheduler.kv_cache_manager
    end(scheduler)
    manager = caches.coordinator.single_type_managers[0]
    manager.block_pool = SharedEventQueueBlockPool(BLOCKS, True, BLOCK, event_owner=caches.block_pool)
    assert caches.reset_prefix_cache()
    run(scheduler, request("running"))
    assert found(scheduler) == 4 * BLOCK
    caches.coordinator.single_type_managers += (SimpleNamespace(block_pool=caches.block_pool),)
    assert not scheduler.reset_prefix_cache(reset_connector=True)
    caches.coordinator.single_type_managers = (manager,)
    assert found(scheduler) == 0
