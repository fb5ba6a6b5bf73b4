"""Hits of vLLM's own prefix cache across a weight update are seen: vLLM's real caches, in this process."""

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from kvshare import vllm_plugin
from kvshare.core import policy
from kvshare.hooks.vllm import prefix_hits

BLOCK = 16


@pytest.fixture
def caches():
    vllm_plugin.register()
    kv_cache_utils.init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    return KVCacheManager(KVCacheConfig(32, [], [KVCacheGroupSpec(["layer"], spec)]), 1024, BLOCK, BLOCK)


@pytest.fixture
def events(monkeypatch):
    seen = []
    monkeypatch.setattr(prefix_hits.worker_events, "sender", lambda: SimpleNamespace(send=seen.append))
    return seen


def request(tokens):
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(extra_args={"kv_transfer_params": {policy.TAG: "p"}})
    return Request("r", list(range(tokens)), params, None, block_hasher=hasher)


def ask(caches, tokens):
    """Returns the tokens that vLLM has of a prompt, and computes the rest."""
    asked = request(tokens)
    for _ in range(2):  # vLLM asks again while the request waits
        blocks, found, *_ = caches.get_computed_blocks(asked)
    caches.allocate_slots(asked, tokens - found, found, blocks)
    caches.free(asked)
    return found


def call(method):
    core = object.__new__(EngineCore)
    core.model_executor = SimpleNamespace(collective_rpc=lambda *args: [])
    core.collective_rpc(method)


def test_a_hit_on_blocks_of_old_weights_is_reported_once(caches, events):
    ask(caches, 2 * BLOCK + 1)
    call("monkey_patch_model")
    assert (ask(caches, 2 * BLOCK + 1), events) == (2 * BLOCK, [])
    call("update_weights_from_ipc")
    assert ask(caches, 4 * BLOCK + 1) == 2 * BLOCK
    stale = {"op": "staleprefix", "request": None, "policy": "p", "tokens": 2 * BLOCK}
    assert events == [stale]
    assert ask(caches, 4 * BLOCK + 1) == 4 * BLOCK
    assert events == [stale, stale]  # two of the four blocks are old


def test_what_is_computed_again_is_not_old(caches, events):
    ask(caches, 2 * BLOCK + 1)
    call(lambda worker: None)  # may do anything
    caches.reset_prefix_cache()
    assert [ask(caches, 2 * BLOCK + 1) for _ in range(2)] == [0, 2 * BLOCK]
    assert events == []
