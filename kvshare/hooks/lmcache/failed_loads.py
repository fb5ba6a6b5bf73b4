"""Store nothing of a step for requests whose prompt could not be loaded whole in it.

A connector that loads in the forward pass learns of a failed load when the rest of the prompt is about to be computed.
vLLM notices after the step, and computes all of it again. But LMCache 0.5.6 has stored by then what was computed upon
blocks that nothing was loaded into. Other replicas find that until the next step replaces it on the server, and the
replica itself finds it in its local tier for good, where an entry that exists is not replaced. With this wrap, in the
worker process, the first store is that of the next step.
"""

from __future__ import annotations

from typing import Any

from kvshare.hooks.patch import wrap


def patch_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.wait_for_save", _wait_for_save, "self")


def _wait_for_save(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> None:
    requests = connector._parent._get_connector_metadata().requests
    if any(request.load_spec is not None and request.load_spec.can_load for request in requests):
        failed = _of_all_ranks(connector._invalid_block_ids)
        for request in requests if failed else ():
            # A sample of the same prompt may use the blocks that another one loads.
            blocks = (request.slot_mapping // connector._block_size).unique().tolist()
            if request.save_spec is not None and not failed.isdisjoint(blocks):
                request.save_spec.can_save = False
    wrapped(*args, **kwargs)


def _of_all_ranks(blocks: set[int]) -> set[int]:
    """What one rank has not loaded makes the activations of all ranks wrong. Their block ids are the same."""
    from torch.distributed import all_gather_object
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return blocks
    found: list[Any] = [None] * group.world_size
    all_gather_object(found, blocks, group=group.cpu_group)
    return set().union(*found)
