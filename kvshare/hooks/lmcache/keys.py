"""Puts the policy into LMCache's keys.

LMCache's keys hold no trace of the weights, so its in-process connector serves KV of the old policy
after every weight update (LMCache 0.5.6; measured in docs/freshness.md).

Scheduler process: each request gets a policy (the one it was stamped with, or this engine's own).
Worker process: the policy is folded into the chunk hash wherever LMCache makes a key.
"""

from __future__ import annotations

import time
from typing import Any

import psutil

from kvshare.core import policy
from kvshare.hooks import check
from kvshare.hooks.lmcache import model_files
from kvshare.hooks.patch import wrap


class EnginePolicy:
    """What the scheduler process of one engine knows about its own weights."""

    def __init__(self) -> None:
        self.own = policy.private_policy()
        # Requests that carry no policy share with every engine that loaded the same files, until the
        # first reset. After it nobody can tell whose weights these are: they share with this engine only.
        self.unstamped = self.own
        self.reset_at = 0.0

    def loaded(self, model_config: Any) -> None:
        """The engine has loaded its first weights."""
        started = psutil.Process().create_time()
        self.unstamped = model_files.fingerprint(model_config.model, model_config.revision, started) or self.own

    def policy_of(self, request: Any) -> str:
        """The policy of a request that is to be scheduled: what it was stamped with, or this engine's."""
        stamp, stamped_at = _stamped(request)
        if stamped_at < self.reset_at:
            return policy.private_policy()  # Whatever its stamp says, it was for weights that are gone.
        if request.prompt_embeds is not None:
            return policy.private_policy()  # LMCache keys on token ids, and embeddings have none.
        if not stamp and request.lora_request is not None:
            return _with_adapter(self.own, request.lora_request)
        return stamp or self.unstamped

    def reset(self) -> None:
        self.own = self.unstamped = policy.private_policy()
        self.reset_at = time.time()


engine = EnginePolicy()


def patch_token_database(module: Any) -> None:
    """Keys: fold the policy into the chunk hash, and keep the model name short and free of ``@``."""
    wrap(module, "TokenDatabase._make_key_by_hash", _make_key, "chunk_hash", "request_configs")


def _make_key(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    def make(chunk_hash: int, request_configs: dict | None = None) -> Any:
        configs = dict(request_configs or {})
        # And the rank: lmcache_controller looks for a hash only, and would name rank 0 to all (LMCache 0.5.6).
        rank = f"@{instance.metadata.worker_id}" if instance.metadata.worker_id else ""
        folded = policy.fold(chunk_hash, configs.pop(policy.TAG, "") + rank)
        key = wrapped(folded, configs or None)
        key.model_name = policy.key_model_name(key.model_name)
        return key

    return make(*args, **kwargs)


def patch_adapter(module: Any) -> None:
    """Requests: give each one a policy, and keep those in flight across a reset to themselves."""
    check.version("vllm")
    wrap(module, "extract_request_configs", _with_policy, "sampling_params")
    wrap(module, "LMCacheConnectorV1Impl.__init__", _init, "vllm_config", "role", "parent")
    wrap(module, "LMCacheConnectorV1Impl.get_num_new_matched_tokens", _stamp, "request")


def _with_policy(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> dict:
    configs = dict(wrapped(*args, **kwargs) or {})
    configs.setdefault(policy.TAG, engine.unstamped)
    return configs


def _init(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    if not engine.reset_at:
        engine.loaded(instance._vllm_config.model_config)


def _stamp(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """Called again for as long as the request waits: stamp it once, and once more after each reset."""
    request = args[0] if args else kwargs["request"]
    seen = getattr(request, "kvshare_reset", None)
    if request.sampling_params is not None and seen != engine.reset_at:
        request.kvshare_reset = engine.reset_at
        _set_policy(request.sampling_params, engine.policy_of(request))
        if seen is not None and instance.lookup_client is not None:
            instance.lookup_client.clear_lookup_status(request.request_id)
    return wrapped(*args, **kwargs)


def _stamped(request: Any) -> tuple[str, float]:
    """The policy a request carries, and since when; the time of its arrival if nobody stamped it."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}  # pooling requests have no sampling parameters
    params = extra.get("kv_transfer_params") or {}
    at = params.get(policy.STAMPED_AT)
    return str(params.get(policy.TAG, "")), at if isinstance(at, float) else request.arrival_time


def _with_adapter(own: str, adapter: Any) -> str:
    """Only the engine knows what it loaded under an adapter's name: a new id, or, in place, the same."""
    return policy.private_policy() if adapter.load_inplace else f"{own}+{adapter.lora_name}.{adapter.lora_int_id}"


def _set_policy(sampling_params: Any, name: str) -> None:
    extra = dict(sampling_params.extra_args or {})
    params = {**(extra.get("kv_transfer_params") or {}), policy.TAG: name}
    sampling_params.extra_args = {**extra, "kv_transfer_params": params}
