"""For ``checkpoint_engine.custom_backend_module``: verl updates one replica after the other.

verl 0.9.1 pauses all replicas until the last one has its weights. Here one replica at a time is paused, for LOADING
seconds. Between two updates are LATER seconds, in which replicas generate with different weights.
"""

import asyncio
import copy
import time

from verl.checkpoint_engine import CheckpointEngineManager
from verl.utils.ray_utils import auto_await

from kvshare.hooks.verl.cpu_checkpoint_engine import ZmqCheckpointEngine

LATER, LOADING = 4, 2

update_all = CheckpointEngineManager.update_weights.__wrapped__  # without auto_await
receive_weights = ZmqCheckpointEngine.receive_weights


@auto_await
async def update_one_by_one(manager, global_steps=None):
    if manager.backend == "naive":
        return await update_all(manager, global_steps)
    for number, replica in enumerate(manager.replicas):
        if number:
            await asyncio.sleep(LATER)
        one = copy.copy(manager)
        one.replicas = [replica]
        await update_all(one, global_steps)
    return {}


async def receive_slowly(engine, global_steps=None):
    async for received in receive_weights(engine, global_steps):
        yield received
    time.sleep(LOADING)


CheckpointEngineManager.update_weights = update_one_by_one
ZmqCheckpointEngine.receive_weights = receive_slowly
