"""What is not asked of LMCache, and when it is after all: vLLM's real requests, and a connector that notes who asks."""

import threading
import time
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lmcache.v1.lookup_client.lmcache_async_lookup_client import LMCacheAsyncLookupClient
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from kvshare import vllm_plugin
from kvshare.core import policy
from kvshare.hooks.lmcache import async_loading, keys, skip_local_hits

ADAPTER = "lmcache.integration.vllm.vllm_v1_adapter"
CHUNK, BLOCK = 256, 16
PROMPT = list(range(4 * CHUNK + 50))


@pytest.fixture
def connector():
    """As kvshare's plugin mends it: all its hooks of this module, in their order."""

    class LMCacheConnectorV1Impl:
        lookup_client, found = object(), None
        config = SimpleNamespace(lookup_timeout_ms=1e9)
        _lmcache_chunk_size, _block_size = CHUNK, BLOCK

        def __init__(self, vllm_config, role, parent):
            pass

        def get_num_new_matched_tokens(self, request, num_computed_tokens):
            self.asked.append(request.request_id)
            return self.found

        def build_connector_meta(self, scheduler_output):
            pass

        def start_load_kv(self, forward_context):
            pass

        def wait_for_save(self):
            pass

        def request_finished(self, request, block_ids):
            return False, None

        def get_finished(self, finished_req_ids):
            return None, None

    module = ModuleType(ADAPTER)
    module.LMCacheConnectorV1Impl = LMCacheConnectorV1Impl
    module.extract_request_configs = lambda sampling_params: {}
    patched = object.__new__(LMCacheConnectorV1Impl)
    patched.load_specs, patched._requests_priority, patched.asked = {}, {}, []
    patched._request_trackers = {}
    for name, hook in vllm_plugin._HOOKS:
        if name == ADAPTER:
            path, function = hook.split(":")
            getattr(__import__(f"kvshare.hooks.{path}", fromlist=[function]), function)(module)
    return patched


def request(name, tokens=PROMPT, stamp="run-1", **kwargs):
    params = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": {policy.TAG: stamp}})
    made = Request(name, tokens, params, None, **kwargs)
    keys.engine.added(made)
    made.block_hashes = [hash(tuple(tokens[: end + BLOCK])) for end in range(0, len(tokens) - BLOCK + 1, BLOCK)]
    return made


def ask(connector, name, in_vllm, **kwargs):
    return connector.get_num_new_matched_tokens(request(name, **kwargs), in_vllm)


def test_what_vllm_has_is_looked_up_once(connector):
    connector.found = 0
    for name in ("a", "b", "c"):
        assert ask(connector, name, 0 if name == "a" else 4 * CHUNK) == 0
    assert connector.asked == ["a"]
    spec = connector.load_specs["c"]
    assert (spec.vllm_cached_tokens, spec.lmcache_cached_tokens, spec.can_load) == (4 * CHUNK, 4 * CHUNK, False)


def test_the_part_of_a_chunk_that_is_computed_is_stored(connector):
    ask(connector, "a", 0, tokens=PROMPT[: 4 * CHUNK])
    ask(connector, "b", 4 * CHUNK - BLOCK, tokens=PROMPT[: 4 * CHUNK])
    assert connector.load_specs["b"].lmcache_cached_tokens == 3 * CHUNK


@pytest.mark.parametrize("other", [{"tokens": PROMPT + PROMPT[:CHUNK]}, {"stamp": "run-2"}, {"tokens": PROMPT[::-1]}])
def test_another_prompt_is_looked_up(connector, other):
    """One that has grown: vLLM has the answer's KV, LMCache has not; or under another policy."""
    connector.found = 0
    ask(connector, "a", 0)
    ask(connector, "b", 5 * CHUNK, **other)
    assert connector.asked == ["a", "b"]


def test_what_lmcache_may_have_lost_is_looked_up_again(connector, monkeypatch):
    connector.found = 0
    monkeypatch.setattr(skip_local_hits, "SECONDS", 0)
    ask(connector, "a", 0)
    ask(connector, "b", 4 * CHUNK)
    assert connector.asked == ["a", "b"]


def test_embeddings_are_never_taken_for_another_prompt(connector):
    """LMCache's keys know nothing of them: each has a policy of its own."""
    for name in ("a", "b"):
        ask(connector, name, 4 * CHUNK, prompt_embeds=torch.zeros(len(PROMPT), 8))
    assert connector.asked == ["a", "b"]


def test_stamps_that_a_reset_has_overtaken_are_looked_up(connector, monkeypatch):
    engine = keys.EnginePolicy()
    monkeypatch.setattr(keys, "engine", engine)
    connector.found = 0
    overtaken = [request("a"), request("b")]
    engine.reset()
    for one in overtaken:
        connector.get_num_new_matched_tokens(one, 4 * CHUNK)
        assert policy.is_private(one.sampling_params.extra_args["kv_transfer_params"][policy.TAG])
    assert connector.asked == ["a", "b"]


@pytest.mark.parametrize("status", [RequestStatus.RUNNING, RequestStatus.FINISHED_ABORTED, RequestStatus.PREEMPTED])
def test_samples_wait_for_the_first_ones_lookup(connector, status):
    first, second, third = (request(name) for name in ("first", "second", "third"))
    asks = connector.get_num_new_matched_tokens
    assert [asks(sample, 0) for sample in (first, second, third)] == [None] * 3
    assert connector.asked == ["first"]
    first.status = status
    assert asks(second, 0) is asks(third, 0) is None  # vLLM has it not after all: nobody waits for the second
    assert connector.asked == ["first", "second", "third"]


def test_samples_do_not_wait_longer_than_a_lookup(connector):
    connector.config = SimpleNamespace(lookup_timeout_ms=0)
    first, second = request("first"), request("second")
    connector.get_num_new_matched_tokens(first, 0)
    connector.get_num_new_matched_tokens(second, 0)
    assert connector.asked == ["first", "second"]


def test_samples_do_not_wait_for_one_that_is_gone(connector):
    ask(connector, "first", 0)  # nobody refers to it
    ask(connector, "second", 0)
    assert connector.asked == ["first", "second"]


def test_a_lookup_that_has_timed_out_is_over(monkeypatch):
    """LMCache's own client, which has no answer for "r" and asks itself again."""
    client = object.__new__(LMCacheAsyncLookupClient)
    client.reqs_status, client.first_lookup_time, client.aborted_lookups = {}, {}, set()
    client.lock, client.lookup_backoff_time = threading.Lock(), 0.0
    client.config = SimpleNamespace(lookup_timeout_ms=0)
    patched = partial(async_loading._lookup_cache, client.lookup_cache, client)
    answers = []
    for _ in range(4):
        answers.append(patched(("r",), {}))
        time.sleep(0.01)
    assert answers == [-1, 0, 0, 0]


def test_a_request_that_was_never_scheduled_leaves_nothing_behind(connector):
    connector.found, connector.async_loading = 0, False
    forgotten = []
    connector.lookup_client = SimpleNamespace(clear_lookup_status=forgotten.append)
    for name in ("a", "b"):
        ask(connector, name, 0 if name == "a" else 4 * CHUNK)
    assert list(connector.load_specs) == ["b"]
    connector.request_finished(request("b"), [])
    assert (connector.load_specs, connector._requests_priority, forgotten) == ({}, {}, ["b"])


# -- multi-process connector ------------------------------------------------------------------


@pytest.fixture
def mp():
    connector = SimpleNamespace(asked=[])
    connector.scheduler_adapter = SimpleNamespace(lmcache_tokens_per_chunk=CHUNK, _mq_timeout=1e9)
    connector._vllm_config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=True))

    def answer(request, num_computed_tokens):
        connector.asked.append(request.request_id)
        return 4 * CHUNK - num_computed_tokens, True

    connector.ask = lambda request, in_vllm=0: skip_local_hits._mp_matched(answer, connector, (request, in_vllm), {})
    return connector


def test_samples_wait_while_the_first_one_loads(mp):
    first, *others = (request(str(i)) for i in range(4))
    assert mp.ask(first) == (4 * CHUNK, True)
    for first.status in (RequestStatus.WAITING, RequestStatus.WAITING_FOR_REMOTE_KVS):
        assert [mp.ask(other) for other in others] == [(None, True)] * 3
    first.status = RequestStatus.RUNNING
    assert [mp.ask(other, 4 * CHUNK) for other in others] == [(0, True)] * 3
    assert mp.asked == ["0", "1", "2", "3"]


def test_samples_do_not_wait_for_each_other(mp):
    """If vLLM has less than all of it when the first runs, e.g. because it is computed in several steps."""
    samples = [request(str(i)) for i in range(4)]
    mp.ask(samples[0])
    samples[0].status = RequestStatus.RUNNING
    assert all(mp.ask(sample, CHUNK)[0] is not None for sample in samples[1:])


def test_nobody_waits_for_what_vllm_will_not_have(mp):
    short = [request(name, PROMPT[: CHUNK - 1]) for name in ("a", "b")]
    assert all(mp.ask(sample)[0] is not None for sample in short)
    mp._vllm_config.cache_config.enable_prefix_caching = False
    samples = [request(name) for name in ("c", "d")]
    assert all(mp.ask(sample)[0] is not None for sample in samples)
