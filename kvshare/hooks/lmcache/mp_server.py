"""In LMCache's multi-process server: forget what a worker has not finished storing.

A worker that stores gets places in the server's shared memory, copies there, and then tells the server. If it never
does, because it ended or stayed silent, LMCache 0.5.6 shows those places as if they were complete
(``EngineDrivenTransferModule._release_entry``). They may hold KV of other tokens or older weights. With this wrap
nobody finds them.
"""

from __future__ import annotations

from typing import Any

from kvshare.hooks.patch import wrap


def patch_module(module: Any) -> None:
    wrap(module, "EngineDrivenTransferModule._release_entry", _release_entry, "instance_id")


def _release_entry(wrapped: Any, module: Any, args: tuple, kwargs: dict) -> None:
    instance_id = args[0] if args else kwargs["instance_id"]
    pending = module._pending_shm_writes
    with module._pending_shm_lock:
        unfinished = [transfer for transfer in pending if transfer[0] == instance_id]
        keys = [key for transfer in unfinished for key in pending.pop(transfer)]
    if keys:
        from lmcache.v1.distributed.storage_manager import _L1_WRITE_TAG

        module.context.storage_manager._l1_manager.finish_write_and_delete(keys, tag=_L1_WRITE_TAG)
    wrapped(*args, **kwargs)
