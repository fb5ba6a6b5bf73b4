"""Implement ``reset_cache()`` for LMCache's in-process vLLM connector.

``LMCacheConnectorV1`` inherits a ``reset_cache()`` that does nothing. So vLLM's
``reset_prefix_cache(reset_connector=True)``, which verl calls after each weight update, reports success and resets
nothing in LMCache (vLLM 0.31.0, LMCache 0.5.6).

Scheduler process: a reset starts a new policy (``keys``), so no request finds the old KV.
Worker process: a background thread frees the old KV in the local tiers, unless conversations may keep it
(``core.freshness``).
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from kvshare.core import freshness, policy
from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.lmcache.keys import engine
from kvshare.hooks.patch import replace, wrap

logger = LimitedLogger(logging.getLogger(__name__))

LOCAL_TIERS = {"LocalCPUBackend": ("hot_cache", "cpu_lock"), "LocalDiskBackend": ("dict", "disk_lock")}
"""LMCache's local storage backends: the attribute that maps keys to entries, and the attribute with its lock."""


NO_RESET = {"cf4157c55357": "0.23.0, 0.24.0, 0.31.0"}
"""vLLM's KVConnectorBase_V1.reset_cache, which only logs that it does nothing."""


def patch_connector(module: Any) -> None:
    """Patch vLLM's ``LMCacheConnectorV1``."""
    replace(module, "LMCacheConnectorV1.reset_cache", _reset_cache, NO_RESET)


def patch_dynamic_connector(module: Any) -> None:
    """Patch LMCache's own connector class, from which LMCache-Ascend's derives."""
    replace(module, "LMCacheConnectorV1Dynamic.reset_cache", _reset_cache, NO_RESET)


def patch_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.build_connector_meta", _send_reset, "scheduler_output")
    wrap(module, "LMCacheConnectorV1Impl.start_load_kv", _receive_reset, "forward_context")


def _reset_cache(connector: Any) -> bool:
    """Start a new policy for this engine.

    Unstamped requests no longer find earlier KV. Stamped requests find only KV of their own policy anyway. Running
    requests continue, and store under private policies from now on.
    """
    engine.reset()
    for tracker in connector._lmcache_engine._request_trackers.values():
        tracker.request_configs = {**(tracker.request_configs or {}), policy.TAG: policy.private_policy()}
    return True


def _send_reset(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    meta = wrapped(*args, **kwargs)
    meta.kvshare_resets = engine.resets
    return meta


def _receive_reset(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> None:
    resets = getattr(instance._parent._get_connector_metadata(), "kvshare_resets", 0)
    if resets > getattr(instance, "_kvshare_resets", 0) and freshness.of(os.environ).mode == freshness.STRICT:
        instance._kvshare_resets = resets
        # A rank that stores nothing (save_only_first_rank, MLA) has no storage manager.
        if instance.lmcache_engine is not None and instance.lmcache_engine.storage_manager is not None:
            _free_local_tiers(instance.lmcache_engine.storage_manager.storage_backends)
    wrapped(*args, **kwargs)


def _free_local_tiers(backends: dict[str, Any]) -> None:
    """Free all current entries of the local tiers. The engine waits only while the entries are listed."""
    held = []
    for tier, (entries, lock) in LOCAL_TIERS.items():
        if backend := backends.get(tier):
            with getattr(backend, lock):  # other threads store and evict
                held.append((backend, list(getattr(backend, entries).items())))

    def free() -> None:
        for backend, entries in held:
            for key, entry in entries:
                if entry.is_pinned:  # a lookup has pinned it for a load; LMCache evicts it later
                    continue
                try:
                    backend.remove(key)
                except Exception:
                    logger.exception("kvshare could not free %s: it stays until LMCache evicts it", key)

    threading.Thread(target=free, name="kvshare-free-local-tiers", daemon=True).start()
