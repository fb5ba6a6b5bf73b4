"""Which policy the scheduler gives a request: vLLM's and LMCache's real classes, no process."""

import time
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from kvshare.core import policy
from kvshare.hooks.lmcache import keys
from kvshare.hooks.verl.rollout_server import _tag

RUN = policy.policy_id("0123456789abcdef", 1)


@pytest.fixture
def engine(monkeypatch):
    fresh = keys.EnginePolicy()
    monkeypatch.setattr(keys, "engine", fresh)
    return fresh


def request(params=None, **kwargs):
    params = params or SamplingParams(max_tokens=1)
    params.max_tokens = 1
    return Request("r", [1, 2, 3], params, None, **kwargs)


def given(asked):
    """The policy under which it is looked up, and stored."""
    instance = SimpleNamespace(lookup_client=None)
    return keys._stamp(
        lambda seen: keys._with_policy(
            lambda params: (params.extra_args or {}).get("kv_transfer_params"), None, (seen.sampling_params,), {}
        )[policy.TAG],
        instance,
        (asked,),
        {},
    )


def stamped():
    params = SamplingParams()
    _tag(params, RUN, "r")
    return params


def test_stamp_is_kept(engine):
    assert given(request(stamped())) == RUN


def test_stamped_before_a_reset_and_arrived_after_it(engine):
    """vLLM preprocesses a prompt on a thread of its own, and notes the time of arrival when that begins."""
    params = stamped()
    engine.reset()
    assert policy.is_private(given(request(params, arrival_time=engine.reset_at + 1)))


def test_arrived_before_a_reset_and_stamped_after_it(engine):
    """Of the HTTP API a prompt is preprocessed first."""
    arrived = time.time()
    engine.reset()
    assert given(request(stamped(), arrival_time=arrived)) == RUN


def test_time_of_stamping_that_is_none(engine):
    """Anybody can send one to a server of vLLM's own."""
    params = SamplingParams(extra_args={"kv_transfer_params": {policy.TAG: RUN, policy.STAMPED_AT: "today"}})
    assert given(request(params)) == RUN


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
