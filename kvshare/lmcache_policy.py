"""Puts the policy into LMCache's keys and makes ``reset_cache()`` of its vLLM connector real.

What is mended (LMCache 0.5.6, in-process connector; measured in docs/how-it-works.md):

* keys hold no trace of the weights, so KV of the old policy is served after every weight update;
* ``LMCacheConnectorV1`` has no ``reset_cache``: vLLM's ``reset_prefix_cache(reset_connector=True)``,
  which verl calls after each update, does nothing and reports success.

Scheduler process: each request gets a policy (the one it was stamped with, or this engine's own).
Worker process: the policy is folded into the chunk hash wherever LMCache makes a key.
"""

from __future__ import annotations

import time
from typing import Any

from kvshare import policy
from kvshare.upstream import wrap


class EnginePolicy:
    """What the scheduler process of one engine knows about its own weights."""

    def __init__(self) -> None:
        # Requests that carry no policy share with every engine of the same model until the first
        # reset. After it nobody can tell whose weights these are: they share with this engine only.
        self.unstamped = ""
        self.reset_at = 0.0

    def reset(self) -> None:
        self.unstamped = policy.private_policy()
        self.reset_at = time.time()


engine = EnginePolicy()


def mend_token_database(module: Any) -> None:
    """Keys: fold the policy into the chunk hash, and keep the model name short and free of ``@``."""
    wrap(module, "TokenDatabase._make_key_by_hash", _make_key, "chunk_hash", "request_configs")


def _make_key(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    def make(chunk_hash: int, request_configs: dict | None = None) -> Any:
        configs = dict(request_configs or {})
        folded = policy.fold(chunk_hash, configs.pop(policy.TAG, ""))
        key = wrapped(folded, configs or None)
        key.model_name = policy.key_model_name(key.model_name)
        return key

    return make(*args, **kwargs)


def mend_adapter(module: Any) -> None:
    """Requests: give each one a policy, and keep those in flight across a reset to themselves."""
    wrap(module, "extract_request_configs", _with_policy, "sampling_params")
    wrap(module, "LMCacheConnectorV1Impl.get_num_new_matched_tokens", _keep_late_private, "request")


def _with_policy(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> dict | None:
    configs = dict(wrapped(*args, **kwargs) or {})
    if engine.unstamped:
        configs.setdefault(policy.TAG, engine.unstamped)
    return configs or None


def _keep_late_private(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """A request that arrived before the last reset was stamped for weights that are gone."""
    request = args[0] if args else kwargs["request"]
    late = request.arrival_time < engine.reset_at and request.sampling_params is not None
    if late and _restamp(request.sampling_params) and instance.lookup_client is not None:
        instance.lookup_client.clear_lookup_status(request.request_id)
    return wrapped(*args, **kwargs)


def _restamp(sampling_params: Any) -> bool:
    """Give a request a policy of its own; False if it has one already."""
    extra = dict(sampling_params.extra_args or {})
    params = dict(extra.get("kv_transfer_params") or {})
    if str(params.get(policy.TAG, "")).startswith("private-"):
        return False
    params[policy.TAG] = policy.private_policy()
    sampling_params.extra_args = {**extra, "kv_transfer_params": params}
    return True


def mend_connector(module: Any) -> None:
    """vLLM's ``LMCacheConnectorV1``: answer ``reset_cache()``."""
    wrap(module, "LMCacheConnectorV1.reset_cache", _reset_cache)


def mend_dynamic_connector(module: Any) -> None:
    """LMCache's own connector class, which LMCache-Ascend's derives from: the same."""
    wrap(module, "LMCacheConnectorV1Dynamic.reset_cache", _reset_cache)


def _reset_cache(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> bool:
    """Start a new policy for this engine.

    Everything cached so far can no longer be found by an unstamped request; a stamped one is told
    apart by its stamp. Requests being computed go on, and what they store from here is theirs alone.
    """
    engine.reset()
    for tracker in connector._lmcache_engine._request_trackers.values():
        tracker.request_configs = {**(tracker.request_configs or {}), policy.TAG: policy.private_policy()}
    return True
