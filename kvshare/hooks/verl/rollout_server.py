"""verl's vLLM rollout server, with the policy on every request and a record of what was shared."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout import vllm_async_server
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.v1.engine import async_llm

from kvshare.core import lmcache_settings, p2p_identity, policy, ports
from kvshare.hooks import check
from kvshare.hooks.verl.cpu_platform import is_cpu
from kvshare.record import worker_events
from kvshare.record.event_log import RUN_DIR, EventLog
from kvshare.routing.cost_model import Pace, Rates
from kvshare.routing.prefixes import Prefill, StoredPrefixes, chunk_digests

logger = logging.getLogger(__name__)

# What is overridden below, and what stamps.
check.parameters(vllm_async_server, "vLLMHttpServer.__init__", "replica_rank")
check.parameters(vllm_async_server, "vLLMHttpServer.run_server", "args")
check.parameters(vllm_async_server, "vLLMHttpServer.collective_rpc", "method")
check.parameters(vllm_async_server, "vLLMHttpServer.set_global_steps", "global_steps")
check.parameters(vllm_async_server, "vLLMHttpServer._get_worker_extension_cls", "self")
check.parameters(vllm_async_server, "vLLMReplica.__init__", "replica_rank")
check.parameters(async_llm, "AsyncLLM.generate", "prompt", "sampling_params", "request_id", "lora_request")

RUN = policy.new_run()
"""Drawn in the process that starts the replicas; each server gets it with its class."""

READY_SECONDS = 10
"""How long to wait, after the engine is up, for LMCache to say that it is."""


class KVShareServer(vLLMHttpServer):
    run: str  # set by _server_class

    def __init__(self, *, replica_rank: int, **kwargs: Any) -> None:
        self._events = worker_events.Receiver()
        self._prefixes = StoredPrefixes()
        self._rates = Rates()
        self._policy_changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._updating = self._warned = False
        self._before_first_update = policy.private_policy()
        self._event_log = EventLog(replica_rank, os.environ.get(RUN_DIR))
        os.environ[worker_events.ADDRESS] = self._events.address  # inherited by the engine's processes
        super().__init__(replica_rank=replica_rank, **kwargs)
        self._chunk_size = self._own_lmcache_config()

    def _own_lmcache_config(self) -> int:
        """Give this replica its P2P identity; returns LMCache's chunk size in tokens."""
        settings = lmcache_settings.effective(os.environ.get("LMCACHE_CONFIG_FILE"))
        if settings.enable_p2p:
            nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
            address = ray.util.get_node_ip_address() if len(nodes) > 1 else "127.0.0.1"
            identity = p2p_identity.identity(
                settings.to_dict(), self.replica_rank, self.replica_world_size, address, ports.free_port
            )
            os.environ.update(identity)
        return settings.chunk_size

    async def run_server(self, args: argparse.Namespace) -> None:
        await super().run_server(args)
        self._recording = asyncio.create_task(self._record_events())
        self.engine.generate = self._stamping(self.engine.generate)  # type: ignore[method-assign, assignment]
        if args.kv_transfer_config is not None:
            self._checking = asyncio.create_task(self._check_ready())

    async def _check_ready(self) -> None:
        try:
            await asyncio.wait_for(self._ready.wait(), READY_SECONDS)
        except TimeoutError:
            self._event_log.write("degraded")
            logger.error(
                "replica %d shares NO KV: LMCache did not start in it, or its server does not answer (search its log "
                "for 'degraded mode' and 'does not answer'); training goes on without sharing",
                self.replica_rank,
            )
            await self._ready.wait()
            logger.error("LMCache is up in replica %d: it shares KV from here on", self.replica_rank)

    # -- the policy ---------------------------------------------------------------------------

    @property
    def policy(self) -> str:
        """The policy of the weights in this engine now.

        Until the first update nobody else has it. From the start of an update to its end, also when
        it fails half-way, the weights are unknown and each request gets a policy of its own.
        """
        if self._updating:
            return policy.private_policy()
        if self.global_steps is None:
            return self._before_first_update
        return policy.policy_id(self.run, self.global_steps)

    async def collective_rpc(self, method: str | Callable, *args: Any, **kwargs: Any) -> None:
        if _touches_weights(method) and not self._updating:
            self._updating, self._warned = True, False
            self._tell_policy()
            # Requests that run on must store nothing more under the policy that ends here.
            await self.engine.reset_prefix_cache(reset_connector=True)
        await super().collective_rpc(method, *args, **kwargs)

    async def set_global_steps(self, global_steps: int) -> None:
        await super().set_global_steps(global_steps)
        self._updating = False
        self._tell_policy()

    def _tell_policy(self) -> None:
        self._prefixes.give_up()
        changed, self._policy_changed = self._policy_changed, asyncio.Event()
        changed.set()

    async def wait_policy_change(self, known: str | None) -> tuple[str | None, Pace]:
        """For the router: the policy others can share, None during an update; returns when it is not ``known``."""
        while (now := None if self._updating else self.policy) == known:
            await self._policy_changed.wait()
        return now, self._rates.pace()

    def _warn_if_updating(self) -> None:
        if self._updating and not self._warned:
            self._warned = True
            logger.error(
                "replica %d generates while its weights are being updated, or after an update that set no "
                "global_steps: these requests share no KV until verl calls set_global_steps",
                self.replica_rank,
            )

    def _stamping(self, generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        """``AsyncLLM.generate`` that stamps each request, also those of the server's HTTP API.

        Here and not in verl's ``generate()``: that one may wait for a weight update to end before it
        submits, and must then carry the new policy.
        """

        async def stamped(prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
            lora = kwargs.get("lora_request")
            stamp = f"{self.policy}+{lora.lora_name}" if lora else self.policy
            self._warn_if_updating()
            prompt = _salted(prompt, stamp)
            _tag(sampling_params, stamp, request_id)
            self._prefixes.started(request_id, self._prefill(stamp, list(prompt.get("prompt_token_ids") or ())))
            output, asked, answered, prefill = None, time.monotonic(), 0.0, None
            try:
                async for output in generate(
                    prompt=prompt, sampling_params=sampling_params, request_id=request_id, **kwargs
                ):
                    if not answered:
                        answered = time.monotonic()
                        prefill = self._answers(request_id, output, asked, answered)
                    yield output
            finally:
                self._prefixes.ended(request_id)
                if output is not None:
                    prompt_tokens = len(output.prompt_token_ids or ())
                    cached = output.num_cached_tokens or 0
                    tokens = sum(len(o.token_ids) for o in output.outputs)
                    self._rates.answered(tokens, time.monotonic() - answered)
                    self._event_log.write("request", policy=stamp, prompt=prompt_tokens, cached=cached, prefill=prefill)

        return stamped

    def _prefill(self, stamp: str, ids: list[int]) -> Prefill:
        chunks = chunk_digests(ids, self._chunk_size)
        return Prefill(stamp, chunks[-1] if chunks else "", len(chunks) * self._chunk_size)

    def _answers(self, request_id: str, output: Any, asked: float, answered: float) -> float:
        """The first token is there; returns the tokens a second that were computed since it was asked."""
        cached = output.num_cached_tokens or 0
        # Without LMCache nothing is ever stored, and nobody need wait for it.
        self._prefixes.first_token(request_id, cached if self._ready.is_set() else sys.maxsize)
        return self._rates.prefilled(len(output.prompt_token_ids or ()) - cached, asked, answered)

    # -- what was shared ----------------------------------------------------------------------

    async def _record_events(self) -> None:
        while True:
            self._record(await self._events.receive())

    def _record(self, event: dict[str, Any]) -> None:
        op, request = event.pop("op"), event.get("request") or ""
        if op == "ready":
            self._ready.set()
        elif op == "store":
            self._prefixes.storing(request)
        elif op == "stored":
            self._rates.stored(event["seconds"])
            self._prefixes.stored(request, event["end"])
            return
        elif event["tokens"]:
            self._rates.loaded(sum(event["tokens"]), event["seconds"])
        self._event_log.write(op, **event)

    async def wait_prefix_stored(self, policy: str, prefix: str, seconds: float) -> tuple[bool, Pace]:
        """For the router: whether others can find the prefix (the last of ``chunk_digests``), once that is clear.

        False if it will not be stored, if the policy has ended, or after ``seconds``.
        """
        stored = policy == self.policy and await self._prefixes.wait((policy, prefix), seconds)
        return stored, self._rates.pace()

    def _get_worker_extension_cls(self) -> str:
        return (
            "kvshare.hooks.verl.cpu_weight_sync.CPUWorkerExtension" if is_cpu() else super()._get_worker_extension_cls()
        )


def _touches_weights(method: str | Callable) -> bool:
    """verl 0.9.1 has update_weights_from_ipc, start_weight_update, …: what comes next will be named alike."""
    return "weight" in (method if isinstance(method, str) else getattr(method, "__name__", "weight"))


def _salted(prompt: Any, stamp: str) -> dict[str, Any]:
    """The prompt with the policy in its ``cache_salt``, which vLLM's own prefix cache keys on."""
    if isinstance(prompt, Mapping):
        fields = dict(prompt)
    else:  # vLLM also takes bare text and bare token ids
        fields = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    salt = fields.get("cache_salt")
    return {**fields, "cache_salt": f"{stamp}.{salt}" if salt else stamp}


def _tag(sampling_params: Any, stamp: str, request_id: str) -> None:
    extra = dict(sampling_params.extra_args or {})
    params = dict(extra.get("kv_transfer_params") or {})
    params |= {policy.TAG: stamp, policy.STAMPED_AT: time.time(), worker_events.REQUEST: request_id}
    sampling_params.extra_args = {**extra, "kv_transfer_params": params}


def _server_class(run: str) -> type:
    """A class of its own for each run, so that Ray ships it by value and with it the run."""
    return type("KVShareServer", (KVShareServer,), {"run": run})


class KVShareReplica(vLLMReplica):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):  # their weights do not follow global_steps
            self.server_class = ray.remote(_server_class(RUN))

    @property
    def max_concurrency(self) -> int:
        """Calls at once: beside each request the router may wait for its prefix."""
        return 2 * super().max_concurrency
