"""Number the workers of a replica."""

from __future__ import annotations

import re


def rank_in_replica(engine_id: str | None, world_size: int, rank: int) -> int:
    """The rank of a worker among all workers of its replica, as verl counts them: data parallel rank first.

    Args:
        engine_id: vLLM's ``kv_transfer_config.engine_id``. With data parallelism it ends in ``_dp<rank>``, also for a
            dense model, where each engine believes to be the only one.
        world_size: workers of one engine (tensor times pipeline parallel size).
        rank: of the worker in its engine.
    """
    data_parallel = re.search(r"_dp(\d+)$", engine_id or "")
    return (int(data_parallel[1]) if data_parallel else 0) * world_size + rank
