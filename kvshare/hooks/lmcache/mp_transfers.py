"""Report a worker's stores to and loads from LMCache's multi-process server, and detect at once that it is gone.

The events are those of ``events``. Their keys are made of the tokens and the ``cache_salt`` of the transfer.

LMCache 0.5.6 notices a dead server only with the next heartbeat. It never notices a restart between two heartbeats. On
CPU it waits for a hung server with each transfer. With these wraps, a closed connection or a transfer that timed out
marks the server as unhealthy at once. LMCache then continues without the server, and registers again after the first
answered heartbeat.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from kvshare.core import lmcache_settings, policy
from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.lmcache.ranks import rank_in_replica
from kvshare.hooks.patch import optional, wrap
from kvshare.hooks.vllm.weights import weights
from kvshare.record import worker_events
from kvshare.routing.digests import chunk_digests

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each entry or request may repeat

WORKER, SCHEDULER = "LMCacheMPWorkerAdapter", "LMCacheMPSchedulerAdapter"
SUBMIT = ("request_id", "op", "event", "cache_salt", "request_configs")


@optional("Transfers to LMCache's server are not recorded, and requests wait for a server that is gone")
def patch_adapter(module: Any) -> None:
    wrap(module, "get_lmcache_chunk_size", _chunk_size, "req_client", "timeout")
    wrap(module, f"{WORKER}.__init__", _watch_worker, "server_url")
    wrap(module, f"{SCHEDULER}.__init__", _watch_scheduler, "server_urls")
    wrap(module, f"{WORKER}.register_kv_caches", _first_register, "kv_caches")
    wrap(module, f"{WORKER}._send_register_kv_caches_request", _register, "kv_caches")
    wrap(module, f"{WORKER}.submit_store_request", _store, *SUBMIT)
    wrap(module, f"{WORKER}.submit_retrieve_request", _retrieve, *SUBMIT)
    wrap(module, f"{WORKER}.get_finished", _poll, "finished_req_ids_from_engine")
    wrap(module, f"{WORKER}.get_finished_with_lazy_offload", _poll, "self")


@optional("LMCache notices only with the next heartbeat that its server is gone")
def patch_queue(module: Any) -> None:
    """Wrap a method that LMCache calls when a connection closes, to cancel its event streams."""
    wrap(module, "MessageQueueClient.cancel_streams", _disconnected, "self")


# -- detecting a dead server ------------------------------------------------------------------


def _watch_worker(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    adapter.kvshare_transfers = []
    _watch(adapter.req_client, adapter._health_event)


def _watch_scheduler(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    for url, client in adapter.req_clients.items():
        _watch(client, adapter._health_events[url])


def _watch(client: Any, health: Any) -> None:
    if queue := getattr(client, "_message_queue_client", None):  # not with gRPC
        queue.kvshare_health, queue.kvshare_closed = health, 0


def _disconnected(wrapped: Any, queue: Any, args: tuple, kwargs: dict) -> None:
    if (health := getattr(queue, "kvshare_health", None)) is not None:
        queue.kvshare_closed += 1
        if health.is_set():
            logger.error("the connection to LMCache's server has closed: KV is recomputed until the server is back")
            health.clear()
    wrapped(*args, **kwargs)


def _chunk_size(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> int:
    """Use the config's chunk size if the server does not answer, so that the engine starts without it."""
    try:
        return wrapped(*args, **kwargs)
    except TimeoutError:
        logger.error("LMCache's server does not answer: KV is recomputed until it does")
        return lmcache_settings.effective(os.environ.get("LMCACHE_CONFIG_FILE")).chunk_size


def _first_register(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    try:
        wrapped(*args, **kwargs)
    except (ConnectionError, TimeoutError) as error:  # LMCache registers again when a heartbeat is answered
        logger.error("LMCache's server: %s: KV is recomputed until this is fixed", error)
        adapter._health_event.clear()
        adapter._ensure_heartbeat_started()


def _register(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    size = adapter.req_client.get_chunk_size().result(timeout=adapter._mq_timeout)
    if size != adapter.lmcache_tokens_per_chunk:  # wrong config, or a restart with another size
        raise ConnectionError(f"its chunks have {size} tokens, this engine's {adapter.lmcache_tokens_per_chunk}")
    strategy = adapter.parallel_strategy
    rank = rank_in_replica(adapter.kvshare_engine_id, strategy.vllm_world_size, strategy.vllm_worker_id)
    _send("ready", rank=rank)


# -- reporting transfers ----------------------------------------------------------------------


class Transfer:
    """A store or load. It calls ``done(arrived)`` once, when it has ended.

    Args:
        future: LMCache's future; None if LMCache did not submit the transfer.
    """

    def __init__(self, future: Any, done: Callable[[bool], None]) -> None:
        self._future, self._done = future, done

    def settle(self, healthy: bool) -> bool:
        """Call ``done`` and return True if the transfer has ended. With an unhealthy server it counts as failed."""
        ended = self._future is None or self._future.query()
        if not ended and healthy:
            return False
        self._done(bool(ended and self._future and self._future.result(timeout=0)))
        return True


def _store(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    future = _submit(adapter, "store_futures", lambda: wrapped(*args, **kwargs), _call(args, kwargs))
    if not _is_first(adapter) or worker_events.sender() is None:
        return
    call = _call(args, kwargs)
    request, end = _request(call), call["op"].end
    submitted = time.monotonic()

    def done(arrived: bool) -> None:
        seconds = time.monotonic() - submitted
        _send("stored", **request, end=end if arrived else 0, seconds=seconds)

    _send("store", **request, keys=[key for _, _, key in _chunks(adapter, call)], **weights.now())
    _settle_or_keep(adapter, Transfer(future, done))


def _retrieve(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    began = time.monotonic()
    future = _submit(adapter, "retrieve_futures", lambda: wrapped(*args, **kwargs), _call(args, kwargs))
    if worker_events.sender() is None:
        return
    call = _call(args, kwargs)
    first, used_by = call["op"].start + call["op"].skip_first_n_tokens, weights.now()

    def done(arrived: bool) -> None:
        if not _is_first(adapter):
            if not arrived:
                _send("partial", **_request(call), tokens=0)
            return
        chunks = list(_chunks(adapter, call)) if arrived else []
        _send(
            "load",
            **_request(call),
            keys=[key for _, _, key in chunks],
            tokens=[end - max(start, first) for start, end, _ in chunks],
            expected=call["op"].end - first,
            seconds=time.monotonic() - began,
            **used_by,
        )

    _settle_or_keep(adapter, Transfer(future, done))


def _submit(adapter: Any, name: str, submit: Callable[[], None], call: dict[str, Any]) -> Any:
    """Submit a transfer. Returns its future, or None if LMCache did not submit it. Marks a hung server as unhealthy."""
    futures, request_id = getattr(adapter, name), call["request_id"]
    before, began = futures.get(request_id), time.monotonic()
    submit()
    entry = futures.get(request_id)
    if entry is before:
        return None
    future = entry[0] if isinstance(entry, tuple) else entry
    timed_out = time.monotonic() - began >= adapter._mq_timeout
    if timed_out and future.query() and not future.result(timeout=0):
        often.error("LMCache's server does not answer: KV is recomputed until it does")
        adapter._health_event.clear()
    return future


def _poll(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> Any:
    result = wrapped(*args, **kwargs)
    pending, adapter.kvshare_transfers = adapter.kvshare_transfers, []
    for transfer in pending:
        _settle_or_keep(adapter, transfer)
    return result


def _settle_or_keep(adapter: Any, transfer: Transfer) -> None:
    """Settle the transfer, or keep it for the next get_finished(). vLLM calls that each step while one is pending."""
    try:
        if not transfer.settle(adapter.is_healthy):
            adapter.kvshare_transfers.append(transfer)
    except Exception:
        often.exception("kvshare could not report a transfer; the transfer itself is unaffected")


def _call(args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(SUBMIT, args, strict=False)), **kwargs}


def _chunks(adapter: Any, call: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(start, end, key) of each chunk of a transfer; start and end in tokens."""
    op, size = call["op"], adapter.lmcache_tokens_per_chunk
    digests = chunk_digests(op.token_ids[: op.end], size)
    for start in range(op.start, op.end, size):
        yield start, start + size, policy.fold(int(digests[start // size], 16), call["cache_salt"])


def _request(call: dict[str, Any]) -> dict[str, Any]:
    configs = call.get("request_configs") or {}
    named = {"request": configs.get(worker_events.REQUEST), "policy": configs.get(policy.TAG, "")}
    return named | ({"kept": True} if policy.KEPT in configs else {})


def _is_first(adapter: Any) -> bool:
    """Whether this is rank 0, which reports for its engine: every rank holds a slice of the same tokens."""
    return adapter.parallel_strategy.vllm_worker_id == 0


def _send(op: str, **fields: Any) -> None:
    if (sender := worker_events.sender()) is not None:
        sender.send({"op": op, **fields})
