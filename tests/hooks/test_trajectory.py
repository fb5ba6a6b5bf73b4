"""Freshness mode trajectory: what a conversation keeps across weight updates. verl's, vLLM's and LMCache's classes."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verl.workers.rollout import llm_server
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from kvshare import vllm_plugin
from kvshare.core import conversation, freshness, policy
from kvshare.core.errors import UserError
from kvshare.hooks.lmcache import keys, mp_connector
from kvshare.hooks.verl import conversation_ids, trajectory
from kvshare.hooks.verl.replica_policy import ReplicaPolicy

RUN = "0123456789abcdef"


def test_mode_is_strict_unless_chosen():
    assert freshness.of({}) == freshness.of({freshness.MAX_VERSIONS: "5"}) == ("strict", 1)
    assert freshness.of({freshness.MODE: "trajectory"}) == ("trajectory", 2)
    assert freshness.of({freshness.MODE: "trajectory", freshness.MAX_VERSIONS: "5"}).versions == 5


@pytest.mark.parametrize(
    "wrong", [{freshness.MODE: "fresh"}, {freshness.MAX_VERSIONS: "1"}, {freshness.MAX_VERSIONS: "x"}]
)
def test_a_wrong_mode_is_one_line(wrong):
    with pytest.raises(UserError, match=rf"^{next(iter(wrong))} is '\w+': set it to"):
        freshness.of(wrong)


STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2)), max_size=30)  # (conversation, updates before it)


@given(STEPS, st.integers(1, 4))
def test_kept_kv_is_the_conversations_own_and_not_too_old(turns, versions):
    trajectories, step, began = trajectory.Trajectories(RUN, versions), 0, {}
    for talk, updates in turns:
        step += updates
        stamp = trajectories.stamp(f"{talk}@{step}", step)
        if stamp.kept_by:
            assert stamp.kept_by == talk
            assert stamp.policy == policy.policy_id(RUN, began[talk])
            assert 1 < stamp.versions == step - began[talk] + 1 <= versions
        else:
            assert stamp == (policy.policy_id(RUN, step), "", 1)
            began[talk] = step


def test_without_a_conversation_all_is_strict():
    trajectories = trajectory.Trajectories(RUN, 9)
    assert [trajectories.stamp("uuid", step).versions for step in (1, 2)] == [1, 1]


def sent(replica, caller):
    request = EngineCoreRequest("r", [1, 2], None, SamplingParams(), None, 0.0, None, "mine", None)
    replica.stamp(request, caller)
    return request


@pytest.fixture
def turns(monkeypatch):
    """Requests as the scheduler gets them: a conversation's before and after an update, and another's after it."""
    monkeypatch.setattr(keys, "engine", keys.EnginePolicy())
    monkeypatch.setattr(mp_connector, "engine", keys.engine)
    replica = ReplicaPolicy(RUN, versions=2)
    replica.steps_set(1)
    first = sent(replica, "talk@1")
    replica.steps_set(2)
    return [arrived(request) for request in (first, sent(replica, "talk@2"), sent(replica, "other@1"))]


def arrived(sent):
    made = Request("r", list(range(600)), sent.sampling_params, None, cache_salt=sent.cache_salt)
    keys.engine.added(made)
    return made


def test_a_conversation_finds_its_kv_and_stores_none(turns):
    for turn in turns:
        keys._stamp(lambda request: None, SimpleNamespace(lookup_client=None), (turn,), {})
    before, after, other = (turn.sampling_params.extra_args["kv_transfer_params"] for turn in turns)
    in_key = policy.TAG, policy.SALT
    assert [before[name] for name in in_key] == [after[name] for name in in_key] != [other[name] for name in in_key]
    assert (after.get(keys.SKIP_SAVE), before.get(keys.SKIP_SAVE), other.get(keys.SKIP_SAVE)) == (True, None, None)
    assert len({turn.cache_salt for turn in turns}) == 3  # in vLLM's own prefix cache nobody else finds it


def test_the_same_with_the_multi_process_server(turns):
    vllm_plugin.register()
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestTracker

    before, after, other = (LMCacheMPRequestTracker(turn) for turn in turns)
    assert before.cache_salt == after.cache_salt != other.cache_salt
    assert (before.max_offload_tokens, after.max_offload_tokens, other.max_offload_tokens) == (None, 0, None)


def test_verls_client_names_the_conversation():
    module = SimpleNamespace(__name__=llm_server.__name__, LLMServerClient=type("C", (llm_server.LLMServerClient,), {}))
    conversation_ids.patch_client(module)
    client = module.LLMServerClient(SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace())))
    ids = [client._vllm_request_id("talk") for _ in range(2)]
    assert ids[0] != ids[1]
    assert {conversation.of(made) for made in ids} == {"talk"}
    client.config.actor_rollout_ref.rollout.full_determinism = True
    assert client._vllm_request_id("det-0") == "det-0"
