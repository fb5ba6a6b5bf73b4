"""The checkpoint engine for CPUs, called as verl's CheckpointEngineManager calls one."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch
from waiting import STUCK

from kvshare.hooks.verl.cpu_checkpoint_engine import ZmqCheckpointEngine

WEIGHTS = {"half": torch.rand(3, 4).bfloat16(), "a view": torch.rand(8, 8)[2:4], "one": torch.tensor(2.0)}


async def _received(engine):
    return {name: weight async for name, weight in engine.receive_weights(global_steps=1)}


def test_every_rollout_worker_gets_all_weights():
    """From two actor workers, both of which must gather each weight, to three rollout workers; twice."""
    actor = [ZmqCheckpointEngine(1, is_master=rank == 0) for rank in range(2)]
    rollout = [ZmqCheckpointEngine(1) for _ in range(3)]
    for step in range(2):
        weights = {name: weight + step for name, weight in WEIGHTS.items()}
        addresses = [engine.prepare() for engine in (*actor, *rollout)]
        for engines, kwargs in zip((actor, rollout), ZmqCheckpointEngine.build_topology(2, 3, addresses), strict=True):
            for rank, engine in enumerate(engines):
                engine.init_process_group(**{name: values[rank] for name, values in kwargs.items()})
        gathered = [iter(weights.items()) for _ in actor]
        with ThreadPoolExecutor(5) as threads:
            received = [threads.submit(asyncio.run, _received(engine)) for engine in rollout]
            sent = [
                threads.submit(asyncio.run, engine.send_weights(weights, global_steps=1))
                for engine, weights in zip(actor, gathered, strict=True)
            ]
            for future in (*sent, *received):
                future.result(STUCK)
        assert [next(left, None) for left in gathered] == [None, None]
        for future in received:
            assert future.result().keys() == weights.keys()
            for name, weight in future.result().items():
                assert weight.dtype == weights[name].dtype
                assert torch.equal(weight, weights[name])
        for engine in (*actor, *rollout):
            engine.finalize()
