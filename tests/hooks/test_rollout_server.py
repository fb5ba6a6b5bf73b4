"""What each request carries to the engine: real verl and vLLM classes, no process."""

import asyncio
from types import SimpleNamespace

import pytest
from verl.workers.rollout.replica import CONTROL_METHOD_CONCURRENCY
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest

from kvshare.core import freshness, policy
from kvshare.hooks.verl import rollout_server
from kvshare.hooks.verl.replica_policy import ReplicaPolicy
from kvshare.hooks.verl.replica_record import ReplicaRecord
from kvshare.hooks.verl.rollout_server import KVShareReplica, KVShareServer, _server_class
from kvshare.hooks.verl.trajectory import Stamp
from kvshare.record import worker_events


@pytest.fixture
def server():
    """A server before its engine starts; the policy needs no more."""
    made = _server_class("0123456789abcdef").__new__(_server_class("0123456789abcdef"))
    made.node_rank = made.replica_rank = 0
    made._policy, made._stamps, made._warned, made._paused = ReplicaPolicy(made.run), {}, False, False
    made._record, made._policy_changed = ReplicaRecord(0, 0, range(1)), asyncio.Event()
    made._placeholders = []
    return made


@pytest.fixture
def calls(server, monkeypatch):
    """verl's calls, with an engine that only notes its resets; ``calls.fail`` makes an update fail."""

    async def collective_rpc(self, method):
        if calls.fail:
            raise RuntimeError(method)

    calls = server.engine = _Engine()
    monkeypatch.setattr(KVShareServer.__mro__[1], "collective_rpc", collective_rpc)
    return calls


def test_policy_through_an_update(server, calls):
    heard = []

    async def scenario():
        router = asyncio.create_task(follow())
        await asyncio.sleep(0)
        await server.set_global_steps(3)
        await asyncio.sleep(0)
        assert server._policy.name == "0123456789abcdef-3"
        await server.collective_rpc("update_weights_from_ipc")
        assert server._policy.name != server._policy.name  # unknown: one for each request
        await server.collective_rpc("finish_weight_update")
        await asyncio.sleep(0)
        assert calls.resets == 1  # at the start, so that requests under way store nothing more as policy 3
        await server.set_global_steps(4)
        await asyncio.sleep(0)
        router.cancel()

    async def follow():
        known = ""
        while True:
            known, _ = await server.wait_policy_change(known)
            heard.append(known)

    before = server._policy.name
    assert before == server._policy.name  # its own until the first update
    asyncio.run(scenario())
    assert heard == [before, "0123456789abcdef-3", None, "0123456789abcdef-4"]


def test_router_hears_that_the_replica_is_paused(server, monkeypatch):
    """verl aborts all requests before an update; colocate_async long before it."""
    verl = KVShareServer.__mro__[1]

    async def abort(self, *args):
        assert await server.wait_policy_change("0123456789abcdef-3") == (None, pace)  # before the engine has paused
        return {"aborted_count": 2}

    async def scenario():
        server._rejecting, server._submission_paused, server._resume_event = False, True, asyncio.Event()
        await server.set_global_steps(3)
        waits = asyncio.create_task(server.wait_prefix_stored("0123456789abcdef-3", "a", 60))
        await asyncio.sleep(0)
        assert await server.abort_all_requests(reject_request=True) == {"aborted_count": 2}
        assert (await waits)[0] is False
        assert await server.wait_prefix_stored("0123456789abcdef-3", "a", 60) == (False, pace)
        await server.open_submission_gate()
        assert not server._submission_paused
        assert await server.wait_policy_change(None) == ("0123456789abcdef-3", pace)

    pace = server._record.rates.pace()
    monkeypatch.setattr(verl, "abort_all_requests", abort)
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_update_without_global_steps(server, calls):
    """verl's default trainer validates with a colocated reward model, and then updates without steps."""

    async def scenario():
        await server.set_global_steps(3)
        await server.collective_rpc("update_weights_from_ipc")
        await server.clear_kv_cache()
        own = server._policy.name
        assert policy.is_private(own)
        assert own == server._policy.known == server._policy.name  # the weights stay: the replica shares with itself
        await server.collective_rpc("update_weights_from_ipc")
        await server.clear_kv_cache()
        assert server._policy.name != own
        await server.set_global_steps(3)
        assert server._policy.name == "0123456789abcdef-3"

    asyncio.run(scenario())


def test_caches_that_are_reset_within_an_update_do_not_end_it(server, calls):
    """verl resets them when it aborts a request, too."""

    async def scenario():
        await server.set_global_steps(3)
        assert server._policy.call_began()
        await server.clear_kv_cache()
        assert server._policy.known is None

    asyncio.run(scenario())


def test_update_that_fails_is_not_silent(server, calls, monkeypatch):
    errors = []
    monkeypatch.setattr(rollout_server.logger, "error", lambda text, *args: errors.append(text % args))
    calls.fail = True

    async def scenario():
        with pytest.raises(RuntimeError, match="reload_weights"):
            await server.collective_rpc("reload_weights")
        await server.clear_kv_cache()
        assert server._policy.known is None
        for _ in range(3):
            server._warn_if_updating()
        await server.set_global_steps(4)
        assert server._policy.name == "0123456789abcdef-4"

    asyncio.run(scenario())
    assert len(errors) == 1
    assert "share no KV until verl has updated the weights" in errors[0]


@pytest.mark.parametrize(
    ("mode", "reject", "resets"), [("strict", False, 1), ("strict", True, 0), ("trajectory", False, 0)]
)
def test_aborted_requests_are_stored_unless_nobody_may_read_them(server, calls, monkeypatch, mode, reject, resets):
    """After a reset running requests store nothing. verl rejects late requests when a replica leaves the rotation."""

    async def pause():
        paused.append(calls.resets)

    async def abort_all_requests(self, reset_prefix_cache, reject_request):
        assert calls.resets == 0  # verl waits here for those that have no token yet
        await server._forgetting(pause)()

    paused = []
    monkeypatch.setattr(KVShareServer.__mro__[1], "abort_all_requests", abort_all_requests)
    monkeypatch.setenv(freshness.MODE, mode)
    asyncio.run(server.abort_all_requests(reject_request=reject))
    assert paused == [resets]


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


class _Engine:
    resets = 0
    fail = False

    async def reset_prefix_cache(self, reset_connector):
        self.resets += reset_connector

    async def reset_mm_cache(self): ...

    async def reset_encoder_cache(self): ...


def sent(server, lora=None, salt=None, extra=None):
    """A request as it is sent to the engine."""

    async def add(request): ...

    server._chunk_size = 256
    params = SamplingParams(extra_args=extra)
    server._stamps["r"] = Stamp("")
    request = EngineCoreRequest("r-1", [1, 2], None, params, None, 0.0, lora, salt, None, external_req_id="r")
    asyncio.run(server._stamped(add)(request))
    return request


def test_request_is_stamped_as_it_is_sent(server):
    extra = {"other": 1, "kv_transfer_params": {"a": 2}}
    request, own = sent(server, extra=extra), server._policy.name
    assert request.cache_salt == own == server._stamps["r"].policy
    params = {"a": 2, policy.TAG: own, worker_events.REQUEST: "r", policy.STORE: policy.IF_ABORTED}
    assert request.sampling_params.extra_args == {"other": 1, "kv_transfer_params": params}
    assert "kv_transfer_params" in extra
    assert extra["kv_transfer_params"] == {"a": 2}  # others may use it too


def test_users_own_salt_stays_apart(server):
    assert sent(server, salt="mine").cache_salt == f"{server._policy.name}.mine"


def test_adapter_is_part_of_the_policy(server):
    assert sent(server, LoRARequest("adapter", 1, "/path")).cache_salt == f"{server._policy.name}+adapter"


def test_server_takes_a_wait_beside_each_request():
    """Else requests that vLLM has room for stand behind the router's waiting for those that run."""
    replica = KVShareReplica.__new__(KVShareReplica)
    replica.config = SimpleNamespace(max_num_seqs=1024)
    assert replica.max_concurrency >= 2 * 1024 + CONTROL_METHOD_CONCURRENCY
