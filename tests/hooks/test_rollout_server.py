"""What each request carries to the engine: real verl and vLLM classes, no process."""

import asyncio
from types import SimpleNamespace

import pytest
from verl.workers.rollout.replica import CONTROL_METHOD_CONCURRENCY
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from waiting import STUCK

from kvshare.core import policy
from kvshare.hooks.verl import rollout_server
from kvshare.hooks.verl.loads import Loads
from kvshare.hooks.verl.rollout_server import KVShareReplica, KVShareServer, _salted, _server_class, _tag
from kvshare.record import worker_events
from kvshare.record.event_log import EventLog
from kvshare.record.event_reader import Reader
from kvshare.routing.cost_model import Rates
from kvshare.routing.prefixes import StoredPrefixes


@pytest.fixture
def server():
    """A server before its engine starts; the policy needs no more."""
    made = _server_class("0123456789abcdef").__new__(_server_class("0123456789abcdef"))
    made.global_steps, made._updating, made._warned = None, False, False
    made._before_first_update, made.replica_rank = policy.private_policy(), 0
    made._prefixes, made._rates, made._policy_changed = StoredPrefixes(), Rates(), asyncio.Event()
    return made


def test_policy_through_an_update(server, monkeypatch):
    async def nothing(*args, **kwargs): ...

    monkeypatch.setattr(KVShareServer.__mro__[1], "collective_rpc", nothing)
    server.engine = _Engine()
    heard = []

    async def scenario():
        router = asyncio.create_task(follow())
        await asyncio.sleep(0)
        await server.set_global_steps(3)
        await asyncio.sleep(0)
        assert server.policy == "0123456789abcdef-3"
        await server.collective_rpc("update_weights_from_ipc")
        assert server.policy != server.policy  # unknown: one for each request
        await server.collective_rpc("finish_weight_update")
        await asyncio.sleep(0)
        assert server.engine.resets == 1  # at the start, so that requests under way store nothing more as policy 3
        await server.set_global_steps(4)
        await asyncio.sleep(0)
        router.cancel()

    async def follow():
        known = ""
        while True:
            known, _ = await server.wait_policy_change(known)
            heard.append(known)

    before = server.policy
    assert before == server.policy  # its own until the first update
    asyncio.run(scenario())
    assert heard == [before, "0123456789abcdef-3", None, "0123456789abcdef-4"]


def test_update_without_global_steps_is_not_silent(server, monkeypatch):
    async def nothing(*args, **kwargs): ...

    monkeypatch.setattr(KVShareServer.__mro__[1], "collective_rpc", nothing)
    errors = []
    monkeypatch.setattr(rollout_server.logger, "error", lambda text, *args: errors.append(text % args))
    server.engine = _Engine()
    asyncio.run(server.collective_rpc("reload_weights"))
    for _ in range(3):
        server._warn_if_updating()
    assert len(errors) == 1
    assert "share no KV until verl calls set_global_steps" in errors[0]


def test_engine_that_has_died_is_reported(server, monkeypatch):
    """With the exit codes of its processes; Ray's own process manager of vLLM has none."""
    reported = []
    monkeypatch.setattr(rollout_server.watch, "report_engine", lambda *report: reported.append(report))
    for manager in (SimpleNamespace(finished_procs=lambda: {"EngineCore": -9}), object()):
        core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        server.engine = SimpleNamespace(errored=True, engine_core=core)
        asyncio.run(server._watch_engine())
    name = "vLLM's engine of replica 0"
    assert reported == [(name, {"EngineCore": -9}), (name, {})]


def test_lmcache_that_is_not_up_is_not_silent_and_may_come_late(server, monkeypatch, tmp_path):
    errors = []
    monkeypatch.setattr(rollout_server, "READY_SECONDS", 0.01)
    monkeypatch.setattr(rollout_server.logger, "error", lambda text, *args: errors.append(text % args))
    server._ready, server._event_log = asyncio.Event(), EventLog(0, str(tmp_path))
    server._not_ready = {0, 1, 2}

    async def scenario():
        server._record({"op": "ready", "rank": 0})
        checking = asyncio.create_task(server._check_ready())
        while not errors:
            await asyncio.sleep(0.01)
        assert "replica 0 shares NO KV: LMCache did not start on rank 1, 2" in errors[0]
        server._record({"op": "ready", "rank": 2})
        await asyncio.sleep(0)
        assert len(errors) == 1
        server._record({"op": "ready", "rank": 1})
        await checking

    asyncio.run(asyncio.wait_for(scenario(), STUCK))
    assert len(errors) == 2
    assert "it shares KV from here on" in errors[1]
    server._event_log.close()
    assert [type(event).__name__ for event in Reader(tmp_path).read()] == ["Degraded", "Ready"]


def test_events_that_a_worker_dropped_are_in_the_record(server, tmp_path):
    server._event_log, server._ready, server._not_ready = EventLog(0, str(tmp_path)), asyncio.Event(), {0}
    server._record({"op": "ready", "rank": 0, "dropped": 3})
    server._event_log.close()
    lost, ready = Reader(tmp_path).read()
    assert (lost.events, type(ready).__name__) == (3, "Ready")


class _Engine:
    resets = 0

    async def reset_prefix_cache(self, reset_connector):
        self.resets += reset_connector


@pytest.mark.parametrize("prompt", ["text", [1, 2], {"prompt_token_ids": [1, 2]}])
def test_every_kind_of_prompt_is_salted(prompt):
    assert _salted(prompt, "p")["cache_salt"] == "p"


def test_users_own_salt_stays_apart():
    assert _salted({"prompt": "x", "cache_salt": "mine"}, "p")["cache_salt"] == "p.mine"


def test_tag_keeps_what_was_there():
    params = SamplingParams(extra_args={"other": 1, "kv_transfer_params": {"a": 2}})
    _tag(params, "p", "r")
    del params.extra_args["kv_transfer_params"][policy.STAMPED_AT]
    assert params.extra_args == {
        "other": 1,
        "kv_transfer_params": {"a": 2, policy.TAG: "p", worker_events.REQUEST: "r"},
    }


def test_adapter_is_part_of_the_policy(server):
    """The stamp of a request with a LoRA adapter differs from one without."""
    server._prefixes = server._event_log = server._ready = _Anything()
    server._loads = Loads()
    server._chunk_size = 256
    stamps = []

    async def generate(prompt, sampling_params, request_id, **kwargs):
        stamps.append(prompt["cache_salt"])
        return
        yield

    async def ask(**kwargs):
        async for _ in server._stamping(generate)([1], SamplingParams(), "r", **kwargs):
            pass

    asyncio.run(ask())
    asyncio.run(ask(lora_request=LoRARequest("adapter", 1, "/path")))
    assert stamps[1] == stamps[0] + "+adapter"


class _Anything:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_server_takes_a_wait_beside_each_request():
    """Else requests that vLLM has room for stand behind the router's waiting for those that run."""
    replica = KVShareReplica.__new__(KVShareReplica)
    replica.config = SimpleNamespace(max_num_seqs=1024)
    assert replica.max_concurrency >= 2 * 1024 + CONTROL_METHOD_CONCURRENCY
