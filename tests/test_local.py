"""What is not asked of LMCache, and when it is after all: vLLM's real requests, and a connector that notes who asks."""

from types import ModuleType

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from kvshare import policy, vllm_plugin

ADAPTER = "lmcache.integration.vllm.vllm_v1_adapter"
CHUNK, BLOCK = 256, 16
PROMPT = list(range(4 * CHUNK + 50))


@pytest.fixture
def connector():
    """As kvshare's plugin mends it: all its hooks of this module, in their order."""

    class LMCacheConnectorV1Impl:
        lookup_client, found = object(), None
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

    module = ModuleType(ADAPTER)
    module.LMCacheConnectorV1Impl = LMCacheConnectorV1Impl
    module.extract_request_configs = lambda sampling_params: {}
    mended = object.__new__(LMCacheConnectorV1Impl)
    mended.load_specs, mended.asked = {}, []
    for name, hook in vllm_plugin._HOOKS:
        if name == ADAPTER:
            path, function = hook.split(":")
            getattr(__import__(path, fromlist=[function]), function)(module)
    return mended


def request(name, tokens=PROMPT, **kwargs):
    made = Request(name, tokens, SamplingParams(max_tokens=1), None, **kwargs)
    made.block_hashes = [hash(tuple(made._all_token_ids[: end + BLOCK])) for end in range(0, len(tokens), BLOCK)]
    return made


def test_what_vllm_has_is_not_looked_up(connector):
    assert connector.get_num_new_matched_tokens(request("a"), 4 * CHUNK) == 0
    assert connector.asked == []
    spec = connector.load_specs["a"]
    assert (spec.vllm_cached_tokens, spec.lmcache_cached_tokens, spec.can_load) == (4 * CHUNK, 4 * CHUNK, False)


def test_a_chunk_more_is(connector):
    connector.found = 7
    assert connector.get_num_new_matched_tokens(request("a"), 3 * CHUNK) == 7
    assert connector.asked == ["a"]


def test_the_part_of_a_chunk_that_is_computed_is_stored(connector):
    connector.get_num_new_matched_tokens(request("a", PROMPT[: 4 * CHUNK]), 4 * CHUNK - BLOCK)
    assert connector.load_specs["a"].lmcache_cached_tokens == 3 * CHUNK


def test_what_is_not_looked_up_has_its_policy(connector):
    """Of embeddings LMCache's keys know nothing: what is stored of them must be found by nobody."""
    embedded = request("a", prompt_embeds=torch.zeros(len(PROMPT), 8))
    assert connector.get_num_new_matched_tokens(embedded, 4 * CHUNK) == 0
    assert policy.is_private(embedded.sampling_params.extra_args["kv_transfer_params"][policy.TAG])


@pytest.mark.parametrize("status", [RequestStatus.RUNNING, RequestStatus.FINISHED_ABORTED, RequestStatus.PREEMPTED])
def test_samples_wait_for_the_first_ones_lookup(connector, status):
    first, second = request("first"), request("second")
    ask = connector.get_num_new_matched_tokens
    assert ask(first, 0) is ask(second, 0) is None
    assert connector.asked == ["first"]
    first.status = status
    connector.found = 4 * CHUNK
    assert ask(second, 0) == 4 * CHUNK
    assert connector.asked == ["first", "second"]


def test_another_prompt_does_not_wait(connector):
    connector.get_num_new_matched_tokens(request("first"), 0)
    connector.get_num_new_matched_tokens(request("second", PROMPT[::-1]), 0)
    assert connector.asked == ["first", "second"]


def test_a_sample_does_not_wait_for_one_that_is_gone(connector):
    connector.get_num_new_matched_tokens(request("first"), 0)  # nobody refers to it
    connector.get_num_new_matched_tokens(request("second"), 0)
    assert connector.asked == ["first", "second"]
