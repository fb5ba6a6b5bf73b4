"""Which policy the scheduler gives a request: vLLM's and LMCache's real classes, no process."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given as given_by
from hypothesis import strategies as st
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.token_database import ChunkedTokenDatabase
from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import Request

from kvshare import vllm_plugin
from kvshare.core import policy
from kvshare.hooks.lmcache import keys

RUN = policy.policy_id("0123456789abcdef", 1)


@pytest.fixture
def engine(monkeypatch):
    fresh = keys.EnginePolicy()
    monkeypatch.setattr(keys, "engine", fresh)
    return fresh


def request(stamp=None, **kwargs):
    """One that the scheduler has just got."""
    params = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": {policy.TAG: stamp}} if stamp else None)
    made = Request("r", [1, 2, 3], params, None, **kwargs)
    keys.engine.added(made)
    return made


def configs(asked):
    """The request configs under which it is looked up, and stored."""
    instance = SimpleNamespace(lookup_client=None)

    def extract(seen):
        return keys._with_policy(
            lambda params: (params.extra_args or {}).get("kv_transfer_params"), None, (seen.sampling_params,), {}
        )

    return keys._stamp(extract, instance, (asked,), {})


def given(asked):
    return configs(asked)[policy.TAG]


def test_stamp_is_kept(engine):
    assert given(request(RUN)) == RUN


def test_stamped_before_a_reset_and_scheduled_after_it(engine):
    waiting = request(RUN)
    engine.reset()
    assert policy.is_private(given(waiting))
    assert given(request(RUN)) == RUN


def test_looked_up_before_a_reset_and_scheduled_after_it(engine):
    waiting = [request(RUN), request()]
    before = [given(one) for one in waiting]
    engine.reset()
    assert not set(before) & {given(one) for one in waiting}


def test_request_that_no_scheduler_has_noted(engine):
    unknown = request(RUN)
    del unknown.kvshare_added
    assert policy.is_private(given(unknown))


def test_salt_of_the_request_is_in_the_key(engine):
    """Tenants, and users who put the version of the weights there (SkyRL, prime-rl, torchtitan)."""
    for stamp in (None, RUN):
        one, same, other, none = (request(stamp, cache_salt=salt) for salt in ("v1", "v1", "v2", None))
        assert key(configs(one)) == key(configs(same))
        assert len({key(configs(one)), key(configs(other)), key(configs(none))}) == 3


def test_pooling_requests_share_nothing(engine):
    """LMCache makes their keys without looking at adapter and salt."""
    found = [keys._with_policy(lambda params: None, None, (None,), {}) for _ in range(2)]
    assert key(found[0]) != key(found[1])
    assert all(one["lmcache.skip_save"] for one in found)
    pooled = Request("r", [1, 2, 3], None, PoolingParams(), None)
    engine.added(pooled)
    keys._stamp(lambda seen: None, SimpleNamespace(lookup_client=None), (pooled,), {})


@given_by(*[st.tuples(*[st.sampled_from("ab")] * 4, st.integers(0, 1))] * 2)
def test_keys_differ_as_policy_configuration_adapter_salt_and_rank(one, other):
    assert (key_of(*one) == key_of(*other)) == (one == other)


def key_of(stamp, config, adapter, salt, rank):
    state = keys.EnginePolicy()
    state.config = config
    lora = LoRARequest(adapter, 1, "/path")
    asked = Request("r", [1, 2, 3], SamplingParams(), None, cache_salt=salt, lora_request=lora)
    return key({policy.TAG: stamp, policy.SALT: state.salt_of(asked)}, rank)


def key(request_configs, rank=0):
    """LMCache's own key of a chunk, in a worker."""
    vllm_plugin.register()
    config = LMCacheEngineConfig.from_defaults(chunk_size=16)
    database = ChunkedTokenDatabase(config, LMCacheMetadata("qwen", 2, 2, rank, rank, torch.float32, (1, 2, 16, 1, 16)))
    ((_, _, made),) = database.process_tokens(tokens=torch.arange(16), request_configs=request_configs)
    return made.chunk_hash


def test_key_without_a_policy_is_found_by_nobody():
    assert len({key({}) for _ in range(3)}) == 3


def test_outputs_of_the_vision_encoder_belong_to_a_policy(engine):
    """vLLM finds them by the image alone: KV computed from those of old weights would be stored as new."""
    cache = EncoderCacheManager(cache_size=100)
    first = request(RUN, mm_features=[image()])
    assert cache.can_allocate(first, 0, 100, 0)
    cache.allocate(first, 0)
    assert cache.check_and_update_cache(request(RUN, mm_features=[image()]), 0)
    assert not cache.check_and_update_cache(request(policy.policy_id("run", 2), mm_features=[image()]), 0)


def image():
    return MultiModalFeatureSpec(data=None, modality="image", identifier="hash", mm_position=PlaceholderRange(0, 2))


def test_adapter_that_replaces_another_of_its_name(engine):
    adapters = [
        LoRARequest("tutor", 1, "/a"),
        LoRARequest("tutor", 2, "/b"),  # unloaded and loaded
        LoRARequest("tutor", 2, "/b", load_inplace=True),
    ]
    assert len({given(request(lora_request=adapter)) for adapter in adapters}) == 3
    assert given(request(lora_request=adapters[0])) == given(request(lora_request=adapters[0]))


def test_embeddings_have_no_tokens_to_find_them_by(engine):
    one, other = (request(prompt_embeds=torch.full((3, 8), fill)) for fill in (0.0, 1.0))
    assert list(one.all_token_ids) == list(other.all_token_ids)
    assert given(one) != given(other)
