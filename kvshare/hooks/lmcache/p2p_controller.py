"""How a worker of LMCache talks to lmcache_controller (P2P): nothing waits for long, and what is lost is told again.

LMCache 0.5.6 awaits one zmq socket on two event loops, the worker's own and the one lookups run on: an answer may wake
the wrong one, and the lookup stalls until ``lookup_timeout_ms``. It registers once, at start, and not at all if the
controller is not up by then; after a controller's restart it stops sharing for seconds ("full sync") or, without a
heartbeat port, for good.

Here each loop has a socket, and a heartbeat through the reply port, every HEARTBEAT seconds, registers: the controller
registers a worker it does not know, says so, and is told again what there is. While it does not answer it is not asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from kvshare.hooks.patch import optional, replace

logger = logging.getLogger(__name__)

HEARTBEAT = 2.0  # seconds


@optional("P2P lookups may stall, and a controller that was restarted is not told what there is")
def patch_worker(module: Any) -> None:
    known = "0.4.4, 0.5.3, 0.5.6"
    replace(module, "LMCacheWorker.register", _register, {"7d6bf2d87f2e": known})
    replace(module, "LMCacheWorker.heartbeat", _heartbeat, {"236370406922": known})
    replace(module, "LMCacheWorker.async_put_and_wait_msg", _ask, {"be80d53aa885": known})


class Link:
    """One worker's questions to the controller: one at a time on each event loop."""

    def __init__(self, worker: Any) -> None:
        self.up = False  # until the first heartbeat is answered
        self._worker = worker
        self._locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}
        self._sockets: dict[asyncio.AbstractEventLoop, Any] = {}

    async def ask(self, message: Any) -> Any:
        """The controller's answer.

        Raises:
            zmq.ZMQError: there is none (zmq.Again: in time).
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
                socket.close(linger=0)  # an answer that comes late must not be taken for the next one's
                raise
            self._sockets[loop] = socket
        return msgspec.msgpack.decode(answer, type=Msg)

    def _connect(self) -> Any:
        from lmcache.v1.rpc_utils import get_zmq_socket_with_timeout

        worker, patience = self._worker, self._worker.config.lookup_timeout_ms  # then the scheduler recomputes
        return get_zmq_socket_with_timeout(
            worker.context, worker.controller_rep_url, "tcp", zmq.DEALER, "connect", patience, patience
        )


def link(worker: Any) -> Link:
    if not hasattr(worker, "_kvshare_link"):
        worker._kvshare_link = Link(worker)
    return worker._kvshare_link


async def _register(worker: Any) -> None:
    """The first heartbeat does it. LMCache starts this coroutine before its worker is whole."""
    while not hasattr(worker, "msg_queue"):
        await asyncio.sleep(0.01)


async def _heartbeat(worker: Any) -> None:
    from lmcache.v1.cache_controller.message import HeartbeatMsg

    connection, said = link(worker), False
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
                _tell_all(worker)
            if said:
                logger.error("lmcache_controller is back: KV is shared again")
            connection.up, said = True, False
        except Exception as error:
            connection.up = False
            if not said:
                logger.error(
                    "lmcache_controller at %s does not answer (%s): KV is recomputed until it does",
                    worker.controller_rep_url,
                    error,
                )
            said = True
        await asyncio.sleep(HEARTBEAT)


def _tell_all(worker: Any) -> None:
    """Tell a controller that knows nothing of us what is in the local tier."""
    from lmcache.v1.cache_controller.message import OpType

    manager = getattr(worker.lmcache_engine, "storage_manager", None)  # not yet, when the engine is starting
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
        logger.error("lmcache_controller did not answer: %s", error)
        link(worker).up = False  # until the next heartbeat that is answered
        return worker._on_request_failure(msg)


def when_known(engine: Any, key: Any, then: Callable[[], None]) -> None:
    """Call ``then`` once other replicas can find the key, which ``engine`` has stored, or will not.

    Args:
        engine: LMCacheEngine; without P2P nobody need wait.
        key: the last one of a store: they are told to the controller in order.
    """
    if engine.lmcache_worker is None or not engine.config.enable_p2p:
        then()
        return
    asyncio.run_coroutine_threadsafe(_when_known(engine, key, then), engine.lmcache_worker.loop)


async def _when_known(engine: Any, key: Any, then: Callable[[], None]) -> None:
    from lmcache.v1.cache_controller.message import BatchedP2PLookupMsg

    worker, local = engine.lmcache_worker, engine.storage_manager.local_cpu_backend
    # As nobody: the controller never names the one who asks.
    question = BatchedP2PLookupMsg(hashes=[key.chunk_hash], instance_id="", worker_id=worker.worker_id)
    while link(worker).up and local.contains(key):
        answer = await worker.async_put_and_wait_msg(question)
        if answer.layout_info[0][2]:
            break
        await asyncio.sleep(0.01)
    then()
