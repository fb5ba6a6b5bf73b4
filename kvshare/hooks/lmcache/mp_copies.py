"""Let no copy between vLLM's blocks and the memory of LMCache's multi-process server outlive either of them.

The worker copies KV itself, by shared memory (``mp_connector``). It loads inside the forward pass and stores in
background threads. A thread asks the server for a place, copies from the blocks, then tells the server. LMCache 0.5.6
lets it go on when vLLM gives the blocks to another request, or their memory to the trainer:

* The server became unhealthy. LMCache reports all stores as ended, so vLLM frees their blocks.
* vLLM sleeps. It waits for stores that were not reported yet, but not if its worker is called directly.
* The worker ends. LMCache gives the places back to the server before the threads have ended.

With these wraps LMCache's own ``flush_inflight_stores()``, which it calls when a request is preempted, runs then, too.

After a restart the server's memory is another. LMCache maps it, and keeps the old one mapped and pinned for ever. It
also believes the new server's answer to a question that was asked with the old memory. With these wraps it does not.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.patch import wrap

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each store may repeat

ADAPTER, PLACES = "LMCacheMPWorkerAdapter", "EngineDrivenContextShm"
FREES = ("sleep", "discard")
"""Methods of vLLM's worker that free the memory of the KV cache. Not every version or device has both."""

_adapters: weakref.WeakSet[Any] = weakref.WeakSet()


def patch_adapter(module: Any) -> None:
    wrap(module, f"{ADAPTER}.__init__", _remember, "self")
    wrap(module, f"{ADAPTER}._send_register_kv_caches_request", _replace, "kv_caches")
    wrap(module, f"{ADAPTER}.get_finished", _end_given_up, "self")
    wrap(module, f"{ADAPTER}.get_finished_with_lazy_offload", _end_given_up, "self")
    wrap(module, f"{ADAPTER}.shutdown", _end_first, "self")


def patch_places(module: Any) -> None:
    wrap(module, f"{PLACES}.prepare_store", _places_to_write, "key")
    wrap(module, f"{PLACES}.prepare_retrieve", _places_to_read, "key")


def patch_context(module: Any) -> None:
    wrap(module, "EngineDrivenTransferContext.submit_store", _store, "key")


def patch_worker(module: Any) -> None:
    """Wrap the first call after ``init_worker``, which loads this plugin."""
    wrap(module, "WorkerWrapperBase.init_device", _init_device, "self")


def end_copies() -> None:
    """Return when no thread of this process reads vLLM's blocks any more."""
    for adapter in _adapters:
        for context in (*adapter.kvshare_replaced, adapter.transfer_ctx):
            if hasattr(type(context), "engine_driven_context"):  # with CUDA IPC the server copies
                context.flush_inflight_stores()


def _remember(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    adapter.kvshare_replaced = []  # transfer contexts of earlier servers
    wrapped(*args, **kwargs)
    _adapters.add(adapter)


def _replace(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    """LMCache calls this in the heartbeat's thread. A load may be under way, so the next get_finished() closes."""
    from lmcache.v1.multiprocess.transfer_context import EngineDrivenContextPickle

    if adapter.transfer_ctx is not None:
        adapter.kvshare_replaced.append(adapter.transfer_ctx)
    wrapped(*args, **kwargs)
    if isinstance(getattr(adapter.transfer_ctx, "_engine_driven_context", None), EngineDrivenContextPickle):
        logger.error(
            "LMCache's server shares no memory with this process, so KV goes by TCP, which is slow: start it with "
            "kvshare services, or with --shm-name and --no-l1-use-lazy, and give both the same /dev/shm"
        )


def _end_given_up(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> Any:
    """If LMCache reports a store as ended that has not, end it before vLLM hears of it."""
    before = list(adapter.store_futures.values())
    result = wrapped(*args, **kwargs)
    if not adapter.store_futures and not all(future.query() for future in before):
        end_copies()
    while adapter.kvshare_replaced:
        _close(adapter.kvshare_replaced.pop())
    return result


def _close(context: Any) -> None:
    try:
        context.close()
    except Exception:
        logger.exception("the memory of LMCache's server before its restart stays mapped")


def _end_first(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    end_copies()
    wrapped(*args, **kwargs)


def _places_to_write(wrapped: Any, places: Any, args: tuple, kwargs: dict) -> Any:
    """Ask only a healthy server. Many waiting stores would each wait for the timeout of one that is gone."""
    health = getattr(_queue(places), "kvshare_health", None)  # set by mp_transfers
    if health is not None and not health.is_set():
        raise ConnectionError("LMCache's server is not healthy")
    closed = _closed(places)
    answer = wrapped(*args, **kwargs)
    if closed != _closed(places):
        raise ConnectionError("LMCache's server was started again")
    return answer


def _places_to_read(wrapped: Any, places: Any, args: tuple, kwargs: dict) -> Any:
    closed = _closed(places)
    answer = wrapped(*args, **kwargs)
    return answer if closed == _closed(places) else None  # as for a miss


def _queue(places: Any) -> Any:
    return getattr(places.req_client, "_message_queue_client", None)  # not with gRPC


def _closed(places: Any) -> int:
    """How often the connection to the server has closed."""
    return getattr(_queue(places), "kvshare_closed", 0)


def _store(wrapped: Any, context: Any, args: tuple, kwargs: dict) -> Any:
    """On CPU the forward pass stores, and vLLM's engine would die of the error."""
    try:
        return wrapped(*args, **kwargs)
    except (ConnectionError, TimeoutError) as error:
        often.error("a store has failed: %s", error)
        from lmcache.v1.multiprocess.futures import MessagingFuture

        failed: Any = MessagingFuture()
        failed.set_result(False)
        return failed


def _init_device(wrapped: Any, wrapper: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    for name in FREES:
        if method := getattr(wrapper.worker, name, None):
            setattr(wrapper.worker, name, _after_copies(method))


def _after_copies(method: Any) -> Any:
    @functools.wraps(method)
    def after_copies(*args: Any, **kwargs: Any) -> Any:
        end_copies()
        return method(*args, **kwargs)

    return after_copies
