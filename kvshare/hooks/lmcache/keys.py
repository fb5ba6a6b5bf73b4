"""Put the policy into LMCache's keys.

LMCache's keys do not depend on the weights. So after a weight update its in-process connector serves KV of the old
policy (LMCache 0.5.6; measured in docs/freshness.md).

Scheduler process: each request gets a policy, either its stamp or the engine's own policy.
Worker process: every key that LMCache makes gets the policy folded into its chunk hash.
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
    """The policies of one engine's weights, kept in its scheduler process."""

    def __init__(self) -> None:
        self.own = policy.private_policy()
        # The policy of unstamped requests. Until the first reset it identifies the model files, so engines with the
        # same files share KV. After a reset the weights are unknown, so only this engine's requests share.
        self.unstamped = self.own
        self.reset_at = 0.0

    def loaded(self, model_config: Any) -> None:
        """Derive the unstamped policy from the model files. Call it once the engine has loaded its first weights."""
        started = psutil.Process().create_time()
        self.unstamped = model_files.fingerprint(model_config.model, model_config.revision, started) or self.own

    def policy_of(self, request: Any) -> str:
        """The policy for a request that waits to be scheduled: its stamp, or this engine's policy."""
        stamp, stamped_at = _stamp_of(request)
        if stamped_at < self.reset_at:
            return policy.private_policy()  # stamped for weights that the reset has replaced
        if request.prompt_embeds is not None:
            return policy.private_policy()  # LMCache's keys cover token ids only
        if not stamp and request.lora_request is not None:
            return _adapter_policy(self.own, request.lora_request)
        return stamp or self.unstamped

    def reset(self) -> None:
        self.own = self.unstamped = policy.private_policy()
        self.reset_at = time.time()


engine = EnginePolicy()


def patch_token_database(module: Any) -> None:
    """Fold the policy into the chunk hash of each key. Shorten the model name and remove ``@`` from it."""
    wrap(module, "TokenDatabase._make_key_by_hash", _make_key, "chunk_hash", "request_configs")


def _make_key(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    def make(chunk_hash: int, request_configs: dict | None = None) -> Any:
        configs = dict(request_configs or {})
        # Fold in the rank too: lmcache_controller matches only the hash, so all ranks would get rank 0 (LMCache 0.5.6).
        rank = f"@{instance.metadata.worker_id}" if instance.metadata.worker_id else ""
        folded = policy.fold(chunk_hash, configs.pop(policy.TAG, "") + rank)
        key = wrapped(folded, configs or None)
        key.model_name = policy.key_model_name(key.model_name)
        return key

    return make(*args, **kwargs)


def patch_adapter(module: Any) -> None:
    """Give each request a policy. Give a request a private policy if the engine was reset after its stamp."""
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
    """Stamp the request once, and again after each reset. vLLM repeats this call while the request waits."""
    request = args[0] if args else kwargs["request"]
    seen = getattr(request, "kvshare_reset", None)
    if request.sampling_params is not None and seen != engine.reset_at:
        request.kvshare_reset = engine.reset_at
        _set_policy(request.sampling_params, engine.policy_of(request))
        if seen is not None and instance.lookup_client is not None:
            instance.lookup_client.clear_lookup_status(request.request_id)
    return wrapped(*args, **kwargs)


def _stamp_of(request: Any) -> tuple[str, float]:
    """A request's policy and the Unix time of its stamp. Without a stamp: an empty policy and the arrival time."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}  # a pooling request has no sampling_params
    params = extra.get("kv_transfer_params") or {}
    at = params.get(policy.STAMPED_AT)
    return str(params.get(policy.TAG, "")), at if isinstance(at, float) else request.arrival_time


def _adapter_policy(own: str, adapter: Any) -> str:
    """Policy of an unstamped LoRA request. An adapter loaded in place keeps its id, so its policy must be private."""
    return policy.private_policy() if adapter.load_inplace else f"{own}+{adapter.lora_name}.{adapter.lora_int_id}"


def _set_policy(sampling_params: Any, name: str) -> None:
    extra = dict(sampling_params.extra_args or {})
    params = {**(extra.get("kv_transfer_params") or {}), policy.TAG: name}
    sampling_params.extra_args = {**extra, "kv_transfer_params": params}
