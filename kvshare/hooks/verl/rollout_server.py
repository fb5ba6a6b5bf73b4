"""Extend verl's vLLM rollout server: stamp each request with the policy and write the event log.

The router calls this server to learn its policy, and to wait until a prefix is stored.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import ray
from verl.workers.rollout.utils import get_vision_placeholder_token_ids
from verl.workers.rollout.vllm_rollout import vllm_async_server
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.v1.engine import async_llm, core_client

from kvshare.core import freshness, lmcache_settings, p2p_replica, policy, ports
from kvshare.hooks import check
from kvshare.hooks.verl import watch
from kvshare.hooks.verl.cpu_platform import is_cpu
from kvshare.hooks.verl.replica_policy import ReplicaPolicy
from kvshare.hooks.verl.replica_record import ReplicaRecord, generated
from kvshare.hooks.verl.trajectory import Stamp
from kvshare.record import worker_events
from kvshare.routing.cost_model import Pace
from kvshare.routing.digests import before_images, chunk_digests
from kvshare.routing.prefixes import Prefill

logger = logging.getLogger(__name__)

# Methods that the classes below override, and those of vLLM that the server wraps.
check.parameters(vllm_async_server, "vLLMHttpServer.__init__", "replica_rank", "node_rank", "gpus_per_node")
check.parameters(vllm_async_server, "vLLMHttpServer.run_server", "args")
check.parameters(vllm_async_server, "vLLMHttpServer.run_headless", "args")
check.parameters(vllm_async_server, "vLLMHttpServer.collective_rpc", "method")
check.parameters(vllm_async_server, "vLLMHttpServer.clear_kv_cache", "self")
check.parameters(vllm_async_server, "vLLMHttpServer.open_submission_gate", "self")
check.parameters(vllm_async_server, "vLLMHttpServer.set_global_steps", "global_steps")
check.parameters(vllm_async_server, "vLLMHttpServer.abort_all_requests", "reset_prefix_cache", "reject_request")
check.parameters(vllm_async_server, "vLLMHttpServer._get_worker_extension_cls", "self")
check.parameters(vllm_async_server, "vLLMReplica.__init__", "replica_rank")
check.parameters(vllm_async_server, "vLLMReplica.launch_servers", "self")
check.parameters(async_llm, "AsyncLLM.generate", "prompt", "sampling_params", "request_id")
check.parameters(async_llm, "AsyncLLM.pause_generation", "self")
check.parameters(core_client, "AsyncMPClient.add_request_async", "request")

SINGLE_TURN = "single_turn_agent"
"""verl's agent loop that asks once."""

RUN = policy.new_run()
"""Run id, drawn once in the process that starts the replicas. Each server gets it with its class."""


class KVShareServer(vLLMHttpServer):
    run: str  # set by _server_class

    def __init__(self, *, replica_rank: int, node_rank: int, gpus_per_node: int, **kwargs: Any) -> None:
        workers = range(node_rank * gpus_per_node, (node_rank + 1) * gpus_per_node)
        self._record = ReplicaRecord(replica_rank, node_rank, workers)
        self._policy_changed = asyncio.Event()
        self._policy = ReplicaPolicy(self.run, freshness.of(os.environ).versions)
        self._stamps: dict[str, Stamp] = {}  # by request id, of the requests that generate
        self._warned = self._paused = False
        self._keeps_aborted = True  # what aborted requests have generated is stored
        os.environ[worker_events.ADDRESS] = self._record.address  # the engine's processes inherit it
        super().__init__(replica_rank=replica_rank, node_rank=node_rank, gpus_per_node=gpus_per_node, **kwargs)
        if self.config.multi_turn.enable or self.config.agent.default_agent_loop != SINGLE_TURN:
            self._policy.store = policy.ALWAYS
        self._chunk_size = self._configure_lmcache()
        self._placeholders = get_vision_placeholder_token_ids(self.model_config.processor)

    def _configure_lmcache(self) -> int:
        """Set this replica's P2P identity in the environment. Returns LMCache's chunk size in tokens."""
        settings = lmcache_settings.effective(os.environ.get("LMCACHE_CONFIG_FILE"))
        if settings.enable_p2p:
            nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
            address = ray.util.get_node_ip_address() if len(nodes) > 1 else "127.0.0.1"
            identity = p2p_replica.identity(
                settings.to_dict(), self.replica_rank, self.replica_world_size, address, ports.free_port
            )
            os.environ.update(identity)
        return settings.chunk_size

    async def run_server(self, args: argparse.Namespace) -> None:
        await super().run_server(args)
        self._record.rates.stall = self._stall()
        self._watching = asyncio.create_task(self._watch_engine())
        self.engine.generate = self._recorded(self.engine.generate)  # type: ignore[method-assign, assignment]
        self.engine.pause_generation = self._forgetting(  # type: ignore[method-assign, assignment]
            self.engine.pause_generation
        )
        core = self.engine.engine_core
        core.add_request_async = self._stamped(core.add_request_async)
        self._follow_workers(args)

    async def run_headless(self, args: argparse.Namespace) -> None:
        """Run the workers of another node than the replica's first."""
        await super().run_headless(args)
        self._follow_workers(args)

    def _follow_workers(self, args: argparse.Namespace) -> None:
        self._recording = asyncio.create_task(self._record.follow())
        self._has_connector = args.kv_transfer_config is not None

    async def expect_ready(self) -> None:
        """For the replica: the engines on all its nodes have started, so LMCache should have."""
        if self._has_connector:
            self._checking = asyncio.create_task(self._record.check_ready())

    async def _watch_engine(self) -> None:
        """Report the end of the engine: the actor outlives it, and verl may not ask anything of it."""
        while not self.engine.errored:
            await asyncio.sleep(1)
        await asyncio.sleep(1)  # a process that says that it will end may not have ended yet
        manager = self.engine.engine_core.resources.engine_manager
        ended: dict[str, int] = getattr(manager, "finished_procs", dict)()  # absent where Ray manages vLLM's processes
        watch.report_engine(f"vLLM's engine of replica {self.replica_rank}", ended)

    def _stall(self) -> float:
        """1 if the engine has a connector: it does nothing else while that loads. 0 if it has none."""
        return float(self.engine.vllm_config.kv_transfer_config is not None)

    # -- the policy ---------------------------------------------------------------------------

    async def collective_rpc(self, method: str | Callable, *args: Any, **kwargs: Any) -> None:
        if not policy.touches_weights(method):
            return await super().collective_rpc(method, *args, **kwargs)
        failed = True
        try:
            if self._policy.call_began():
                self._warned = False
                self._announce_policy()
                # Running requests must not store KV of the new weights under the old policy.
                await self.engine.reset_prefix_cache(reset_connector=True)
            await super().collective_rpc(method, *args, **kwargs)
            failed = False
        finally:
            self._policy.call_ended(failed)

    async def clear_kv_cache(self) -> None:
        await super().clear_kv_cache()
        if self._policy.caches_reset():
            self._announce_policy()

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, Any]:
        """Abort all requests; what they have generated is stored (hooks/lmcache/generated.py) only if that may pay.

        verl rejects late requests when the replica leaves the rotation: others go on with what was aborted, under the
        same policy. Otherwise it aborts before an update, after which KV counts only if conversations may keep it.
        """
        self._paused = True  # requests that come are not sent until verl resumes the replica
        self._announce_policy()
        self._keeps_aborted = reject_request or freshness.of(os.environ).mode != freshness.STRICT
        return await super().abort_all_requests(reset_prefix_cache, reject_request)

    def _forgetting(self, pause: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        """Wrap ``AsyncLLM.pause_generation``, which aborts: after a reset running requests store nothing.

        verl first waits for the first token of each request that it has sent, up to a minute. Reset before that, those
        that still wait would compute their prompts apart.
        """

        async def forgetting(*args: Any, **kwargs: Any) -> None:
            if not self._keeps_aborted:
                await self.engine.reset_prefix_cache(reset_connector=True)
            await pause(*args, **kwargs)

        return forgetting

    async def set_global_steps(self, global_steps: int) -> None:
        await super().set_global_steps(global_steps)
        self._policy.steps_set(global_steps)
        self._announce_policy()

    async def open_submission_gate(self) -> None:
        await super().open_submission_gate()
        self._paused = False
        self._announce_policy()

    @property
    def _known_policy(self) -> str | None:
        return None if self._paused else self._policy.known

    def _announce_policy(self) -> None:
        self._record.prefixes.give_up()
        changed, self._policy_changed = self._policy_changed, asyncio.Event()
        changed.set()

    async def wait_policy_change(self, known: str | None) -> tuple[str | None, Pace]:
        """For the router: wait until the policy is not ``known``. Returns it and the pace.

        It is None during an update, and while the replica is paused.
        """
        while self._known_policy == known:
            await self._policy_changed.wait()
        return self._known_policy, self._record.rates.pace()

    async def image_placeholders(self) -> list[int]:
        """For the router: token ids that stand for an image or a video in a prompt."""
        return self._placeholders

    def _warn_if_updating(self) -> None:
        if self._policy.known is None and not self._warned:
            self._warned = True
            logger.error(
                "replica %d generates during a weight update, or after one that failed: its requests share no KV "
                "until verl has updated the weights",
                self.replica_rank,
            )

    # -- requests -----------------------------------------------------------------------------

    def _stamped(self, add: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
        """Wrap the engine client's ``add_request_async`` to stamp each request as it is sent to the engine.

        The engine receives requests and resets in the order in which they are sent. So it can tell which stamps are
        older than a reset, on every host. verl's and vLLM's ``generate()`` would be too early: they may wait for an
        update to end, or for a prompt to be tokenized.
        """

        async def stamped(request: Any) -> None:
            caller = request.external_req_id or request.request_id
            self._warn_if_updating()
            stamp = self._policy.stamp(request, caller)
            if caller in self._stamps:  # not a pooling request
                self._stamps[caller] = stamp
                self._record.prefixes.started(caller, self._prefill(stamp.policy, request.prompt_token_ids or []))
            await add(request)

        return stamped

    def _recorded(self, generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        """Wrap ``AsyncLLM.generate`` to record each request, including those of the server's HTTP API."""

        async def recorded(prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
            output, asked, answered, read, prefill = None, time.monotonic(), 0.0, 0.0, None
            self._stamps[request_id] = Stamp("")
            self._record.started(request_id)
            try:
                async for output in generate(
                    prompt=prompt, sampling_params=sampling_params, request_id=request_id, **kwargs
                ):
                    if not answered:
                        answered = time.monotonic()
                        prefill = self._record.first_token(request_id, output, asked, answered)
                        read = self._record.rates.decoding(len(output.prompt_token_ids or ()), answered)
                    yield output
            finally:
                self._record.ended(request_id, self._stamps.pop(request_id), output, prefill)
                if output is not None:
                    ended = time.monotonic()
                    read = self._record.rates.decoding(-len(output.prompt_token_ids or ()), ended) - read
                    self._record.rates.answered(generated(output), ended - answered, read)

        return recorded

    def _prefill(self, stamp: str, ids: list[int]) -> Prefill:
        chunks = chunk_digests(before_images(ids, self._placeholders), self._chunk_size)
        return Prefill(stamp, chunks[-1] if chunks else "", len(chunks) * self._chunk_size)

    async def wait_prefix_stored(self, policy: str, prefix: str, seconds: float) -> tuple[bool, Pace]:
        """For the router: wait until other replicas can find ``prefix``, the last of its ``chunk_digests``.

        False if the prefix will not be stored, if the policy has changed, or after ``seconds``.
        """
        stored = policy == self._known_policy and await self._record.prefixes.wait((policy, prefix), seconds)
        return stored, self._record.rates.pace()

    def _get_worker_extension_cls(self) -> str:
        return (
            "kvshare.hooks.verl.cpu_weight_sync.CPUWorkerExtension" if is_cpu() else super()._get_worker_extension_cls()
        )


def _server_class(run: str) -> type:
    """Create a class for one run: Ray pickles it by value, and ``run`` with it."""
    return type("KVShareServer", (KVShareServer,), {"run": run})


class KVShareReplica(vLLMReplica):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):  # their weights do not change with global_steps
            self.server_class = ray.remote(_server_class(RUN))

    async def launch_servers(self) -> None:
        await super().launch_servers()
        if not (self.is_reward_model or self.is_teacher_model):
            await asyncio.gather(*(server.expect_ready.remote() for server in self.servers))

    @property
    def max_concurrency(self) -> int:
        """Concurrent calls: one for each request, and one for the router's wait for its prefix."""
        return 2 * super().max_concurrency
