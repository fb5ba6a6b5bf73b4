"""A checkpoint engine for machines without an accelerator: sends the actor's weights to standalone rollout replicas.

verl's own engines need CUDA or Ascend. Set ``checkpoint_engine.backend=zmq`` and ``custom_backend_module`` to this
module, which verl imports in every process that sends or receives weights. All of them must be on one host.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any
from uuid import uuid4

import zmq
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

ALL_SENT = None


@CheckpointEngineRegistry.register("zmq")
class ZmqCheckpointEngine(CheckpointEngine):
    """Rank 0 of the actor pushes each weight to a Unix socket of every rollout worker.

    Args:
        bucket_size: not used, weights are sent one by one.
        is_master: whether this is rank 0 of the actor.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._context: zmq.Context = zmq.Context.instance()
        self._listening: zmq.Socket | None = None
        self._receivers: list[zmq.Socket] = []

    def prepare(self) -> str:  # type: ignore[override]
        """Listen. Returns the address."""
        self._listening = self._context.socket(zmq.PULL)
        address = f"ipc://@kvshare-weights-{uuid4().hex}"  # not a file
        self._listening.bind(address)
        return address

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """``metadata`` are the addresses of all actor workers, then of all rollout workers."""
        receivers = metadata[actor_wg_world_size:]
        nobody: list[str] = []
        return {"receivers": [receivers, *[nobody] * (actor_wg_world_size - 1)]}, {
            "receivers": [nobody] * rollout_world_size
        }

    def init_process_group(self, receivers: list[str]) -> None:  # type: ignore[override]
        for address in receivers:
            socket = self._context.socket(zmq.PUSH)
            socket.connect(address)
            self._receivers.append(socket)

    def finalize(self) -> None:
        """Close all sockets. verl calls it when every worker has all weights."""
        for socket in filter(None, (*self._receivers, self._listening)):
            socket.close(linger=0)
        self._receivers, self._listening = [], None

    async def send_weights(self, weights: Iterable[tuple[str, Any]], global_steps: int | None = None) -> None:
        for name, weight in weights:  # on all ranks: each weight is gathered from them
            for receiver in self._receivers:
                receiver.send_pyobj((name, weight))
        for receiver in self._receivers:
            receiver.send_pyobj(ALL_SENT)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Any]]:  # type: ignore[override]
        assert self._listening is not None
        while (received := self._listening.recv_pyobj()) is not ALL_SENT:
            yield received
