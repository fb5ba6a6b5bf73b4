"""Makes ``reset_cache()`` of LMCache's in-process vLLM connector real.

``LMCacheConnectorV1`` has none: vLLM's ``reset_prefix_cache(reset_connector=True)``, which verl calls
after each weight update, does nothing and reports success (vLLM 0.31.0, LMCache 0.5.6).

Scheduler process: a reset starts a new policy (``keys``). Worker process: what the local
tiers hold cannot be found any longer and is given back, behind the engine's back.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from kvshare.core import policy
from kvshare.hooks.lmcache.keys import engine
from kvshare.hooks.patch import replace, wrap

logger = logging.getLogger(__name__)

LOCAL_TIERS = {"LocalCPUBackend": ("hot_cache", "cpu_lock"), "LocalDiskBackend": ("dict", "disk_lock")}
"""LMCache's own storage backends: the attribute that maps keys to entries, and the lock on it."""


NO_RESET = {"cf4157c55357": "0.23.0, 0.24.0, 0.31.0"}
"""KVConnectorBase_V1.reset_cache of vLLM, which does nothing but say so."""


def patch_connector(module: Any) -> None:
    """vLLM's ``LMCacheConnectorV1``: answer ``reset_cache()``."""
    replace(module, "LMCacheConnectorV1.reset_cache", _reset_cache, NO_RESET)


def patch_dynamic_connector(module: Any) -> None:
    """LMCache's own connector class, which LMCache-Ascend's derives from: the same."""
    replace(module, "LMCacheConnectorV1Dynamic.reset_cache", _reset_cache, NO_RESET)


def patch_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.build_connector_meta", _tell_worker, "scheduler_output")
    wrap(module, "LMCacheConnectorV1Impl.start_load_kv", _hear_scheduler, "forward_context")


def _reset_cache(connector: Any) -> bool:
    """Start a new policy for this engine.

    Everything cached so far can no longer be found by an unstamped request; a stamped one is told
    apart by its stamp. Requests being computed go on, and what they store from here is theirs alone.
    """
    engine.reset()
    for tracker in connector._lmcache_engine._request_trackers.values():
        tracker.request_configs = {**(tracker.request_configs or {}), policy.TAG: policy.private_policy()}
    return True


def _tell_worker(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    meta = wrapped(*args, **kwargs)
    meta.kvshare_reset = engine.reset_at
    return meta


def _hear_scheduler(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> None:
    reset_at = getattr(instance._parent._get_connector_metadata(), "kvshare_reset", 0.0)
    if reset_at > getattr(instance, "_kvshare_given_back", 0.0):
        instance._kvshare_given_back = reset_at
        # Without a storage manager: a rank that LMCache has store nothing (save_only_first_rank, MLA).
        if instance.lmcache_engine is not None and instance.lmcache_engine.storage_manager is not None:
            _give_back(instance.lmcache_engine.storage_manager.storage_backends)
    wrapped(*args, **kwargs)


def _give_back(backends: dict[str, Any]) -> None:
    """Free what is in the local tiers now; only the list of it is made while the engine waits."""
    held = []
    for tier, (entries, lock) in LOCAL_TIERS.items():
        if backend := backends.get(tier):
            with getattr(backend, lock):  # other threads store and evict meanwhile
                held.append((backend, list(getattr(backend, entries).items())))

    def free() -> None:
        for backend, entries in held:
            for key, entry in entries:
                if entry.is_pinned:  # a lookup has promised it to a request: LMCache evicts it in its time
                    continue
                try:
                    backend.remove(key)
                except Exception:
                    logger.exception("kvshare could not free %s: it stays until LMCache evicts it", key)

    threading.Thread(target=free, name="kvshare-give-back", daemon=True).start()
