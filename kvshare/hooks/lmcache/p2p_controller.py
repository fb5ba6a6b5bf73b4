"""Replace how an LMCache worker talks to lmcache_controller (P2P), so that lookups do not stall and restarts recover.

LMCache 0.5.6 awaits one zmq socket on two event loops: the worker's and the one of the lookups. An answer may wake the
wrong loop, and the lookup then stalls until ``lookup_timeout_ms``. A worker registers once, at start, and not at all if
the controller is not up yet. After a restart of the controller, the worker stops sharing for seconds ("full sync"), or
for good if there is no heartbeat port.

Here each event loop has its own socket. A heartbeat goes to the reply port every HEARTBEAT seconds. The controller
registers an unknown worker on its heartbeat and says so in the answer; the worker then reports all its keys. The worker
sends no lookups while the controller does not answer heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.patch import optional, replace

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each entry or request may repeat

HEARTBEAT = 2.0  # seconds

LISTED_WITHIN = 10.0
"""Seconds within which the controller lists a stored key, if no message to it was lost. LMCache sends every 10 ms."""


@optional("P2P lookups may stall, and a restarted controller does not learn what its workers hold")
def patch_worker(module: Any) -> None:
    known = "0.4.4, 0.5.3, 0.5.6"
    replace(module, "LMCacheWorker.register", _register, {"7d6bf2d87f2e": known})
    replace(module, "LMCacheWorker.heartbeat", _heartbeat, {"236370406922": known})
    replace(module, "LMCacheWorker.async_put_and_wait_msg", _ask, {"be80d53aa885": known})


class Link:
    """One worker's requests to the controller: at most one at a time on each event loop."""

    def __init__(self, worker: Any) -> None:
        self.up = False  # False until a heartbeat is answered
        self._worker = worker
        self._locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
        self._sockets: dict[asyncio.AbstractEventLoop, Any] = {}

    async def ask(self, message: Any) -> Any:
        """Send a message and return the controller's answer.

        Raises:
            zmq.ZMQError: no answer; zmq.Again after ``lookup_timeout_ms``.
        """
        import msgspec
        from lmcache.v1.cache_controller.message import Msg

        loop = asyncio.get_running_loop()
        async with self._locks.setdefault(loop, asyncio.Lock()):
            socket = self._sockets.pop(loop, None) or self._connect()
            try:
                await socket.send_multipart([b"", msgspec.msgpack.encode(message)])
                answer = (await socket.recv_multipart())[-1]
            except BaseException:
                socket.close(linger=0)  # a late answer must not be read as the next one
                raise
            self._sockets[loop] = socket
        return msgspec.msgpack.decode(answer, type=Msg)

    def _connect(self) -> Any:
        from lmcache.v1.rpc_utils import get_zmq_socket_with_timeout

        worker, timeout_ms = self._worker, self._worker.config.lookup_timeout_ms  # later, the scheduler recomputes
        return get_zmq_socket_with_timeout(
            worker.context, worker.controller_rep_url, "tcp", zmq.DEALER, "connect", timeout_ms, timeout_ms
        )


def link(worker: Any) -> Link:
    if not hasattr(worker, "_kvshare_link"):
        worker._kvshare_link = Link(worker)
    return worker._kvshare_link


async def _register(worker: Any) -> None:
    """Only wait until the worker is complete: LMCache calls this too early, and the first heartbeat registers."""
    while not hasattr(worker, "msg_queue"):
        await asyncio.sleep(0.01)


async def _heartbeat(worker: Any) -> None:
    from lmcache.v1.cache_controller.message import HeartbeatMsg

    connection, error_logged = link(worker), False
    message = HeartbeatMsg(
        instance_id=worker.lmcache_instance_id,
        worker_id=worker.worker_id,
        ip=worker.lmcache_worker_ip,
        port=worker.lmcache_worker_port,
        peer_init_url=worker.p2p_init_url,
    )
    while True:
        try:
            answer = await connection.ask(message)
            if any(command.reason == "worker_re_registered" for command in answer.commands):
                _report_all_keys(worker)
            if error_logged:
                logger.error("lmcache_controller is back: KV is shared again")
            connection.up, error_logged = True, False
        except Exception as error:
            connection.up = False
            if not error_logged:
                logger.error(
                    "lmcache_controller at %s does not answer (%s): KV is recomputed until it does",
                    worker.controller_rep_url,
                    error,
                )
            error_logged = True
        await asyncio.sleep(HEARTBEAT)


def _report_all_keys(worker: Any) -> None:
    """Report the keys of the local CPU tier to a controller that has lost them."""
    from lmcache.v1.cache_controller.message import OpType

    manager = getattr(worker.lmcache_engine, "storage_manager", None)  # missing while the engine starts
    backend = manager and manager.local_cpu_backend
    if backend and backend.batched_msg_sender:
        for key in backend.get_keys():
            backend.batched_msg_sender.add_kv_op(OpType.ADMIT, key.chunk_hash)


async def _ask(worker: Any, msg: Any) -> Any:
    if not link(worker).up:
        return worker._on_request_failure(msg)
    try:
        return await link(worker).ask(msg)
    except zmq.ZMQError as error:
        often.error("lmcache_controller did not answer: %s", error)
        link(worker).up = False  # until a heartbeat is answered
        return worker._on_request_failure(msg)


def when_findable(engine: Any, key: Any, then: Callable[[bool], None]) -> None:
    """Call ``then`` with True once other replicas can find a stored key, or with False if they cannot.

    Args:
        engine: LMCacheEngine that stored the key. Without P2P, ``then`` is called at once.
        key: the last key of a store. The controller learns the keys of a store in order.
    """
    if engine.lmcache_worker is None or not engine.config.enable_p2p:
        then(True)
        return
    asyncio.run_coroutine_threadsafe(_when_findable(engine, key, then), engine.lmcache_worker.loop)


async def _when_findable(engine: Any, key: Any, then: Callable[[bool], None]) -> None:
    findable = False
    try:
        findable = await asyncio.wait_for(_listed(engine, key), LISTED_WITHIN)
    finally:
        then(findable)


async def _listed(engine: Any, key: Any) -> bool:
    """Wait until the controller lists the key. False if the controller is away, or if the key has been evicted."""
    from lmcache.v1.cache_controller.message import BatchedP2PLookupMsg

    worker, local = engine.lmcache_worker, engine.storage_manager.local_cpu_backend
    # With an empty instance_id, because the controller leaves the sender out of its answer.
    lookup = BatchedP2PLookupMsg(hashes=[key.chunk_hash], instance_id="", worker_id=worker.worker_id)
    while link(worker).up and local.contains(key):
        answer = await worker.async_put_and_wait_msg(lookup)
        if answer.layout_info[0][2]:
            return True
        await asyncio.sleep(0.01)
    return False
