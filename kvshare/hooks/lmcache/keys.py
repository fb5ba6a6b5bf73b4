"""Put the policy, and what else makes KV differ, into LMCache's keys.

LMCache's keys do not depend on the weights. So after a weight update its in-process connector serves KV of the old
policy (LMCache 0.5.6; measured in docs/freshness.md). They do not depend on vLLM's ``cache_salt`` or configuration
either.

Scheduler process: each request gets a policy, either its stamp or the engine's own policy, and a salt.
Worker process: every key that LMCache makes gets both folded into its chunk hash.
"""

from __future__ import annotations

from typing import Any

import psutil

from kvshare.core import policy
from kvshare.hooks import check
from kvshare.hooks.lmcache import engine_config, model_files
from kvshare.hooks.patch import wrap


class EnginePolicy:
    """The policies of one engine's weights, kept in its scheduler process."""

    def __init__(self) -> None:
        self.own = policy.private_policy()
        # The policy of unstamped requests. Until the first reset it identifies the model files, so engines with the
        # same files share KV. After a reset the weights are unknown, so only this engine's requests share.
        self.unstamped = self.own
        self.config = self.own
        self.resets = 0

    def loaded(self, vllm_config: Any) -> None:
        """Derive unstamped policy and configuration id. Call it once the engine has loaded its first weights."""
        model, started = vllm_config.model_config, psutil.Process().create_time()
        self.unstamped = model_files.fingerprint(model.model, model.revision, started) or self.own
        self.config = engine_config.config_id(vllm_config, started) or self.own

    def added(self, request: Any) -> None:
        """Note that the scheduler got the request after the resets so far. Name its images after its policy.

        Stamps and resets come in the order in which the API process sent them. So a stamp that came before a reset
        names weights that the reset has replaced.

        vLLM keeps the outputs of its vision encoder, and finds them by an image's identifier alone. It resets them only
        if asked to, and not while requests run. KV computed from outputs of old weights would be stale.
        """
        request.kvshare_added = self.resets
        for image in request.mm_features or ():
            image.identifier = f"{image.identifier}-{self.policy_of(request)}"

    def policy_of(self, request: Any) -> str:
        """The policy for a request that waits to be scheduled: its stamp, or this engine's policy."""
        if request.prompt_embeds is not None:
            return policy.private_policy()  # LMCache's keys cover token ids only
        if stamp := config_of(request, policy.TAG):
            current = getattr(request, "kvshare_added", None) == self.resets
            return stamp if current else policy.private_policy()
        return _adapter_policy(self.own, request.lora_request) if request.lora_request else self.unstamped

    def salt_of(self, request: Any) -> str:
        """The ``policy.key_salt`` of a request."""
        adapter = request.lora_request
        name = f"{adapter.lora_name}.{adapter.lora_int_id}" if adapter else ""
        return policy.key_salt(self.config, name, config_of(request, policy.KEPT) or request.cache_salt or "")

    def reset(self) -> None:
        self.own = self.unstamped = policy.private_policy()
        self.resets += 1


engine = EnginePolicy()

SKIP_SAVE = "lmcache.skip_save"
"""LMCache's request config for: store nothing of this request."""


def patch_token_database(module: Any) -> None:
    """Fold policy and salt into the chunk hash of each key. Shorten the model name and remove ``@`` from it."""
    wrap(module, "TokenDatabase._make_key_by_hash", _make_key, "chunk_hash", "request_configs")


def _make_key(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    def make(chunk_hash: int, request_configs: dict | None = None) -> Any:
        configs = dict(request_configs or {})
        name = configs.pop(policy.TAG, "") or policy.private_policy()  # without a policy, no one may find the key
        # Fold in the rank too: lmcache_controller matches only the hash, so all ranks would get rank 0 (LMCache 0.5.6).
        folded = policy.fold(chunk_hash, name, configs.pop(policy.SALT, ""), instance.metadata.worker_id)
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


def patch_scheduler(module: Any) -> None:
    wrap(module, "Scheduler.add_request", _add, "request")


def _add(wrapped: Any, scheduler: Any, args: tuple, kwargs: dict) -> None:
    engine.added(args[0] if args else kwargs["request"])
    wrapped(*args, **kwargs)


def _with_policy(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> dict:
    """A request that ``_stamp`` has not seen has no sampling parameters: LMCache's keys could not tell its salt."""
    configs = dict(wrapped(*args, **kwargs) or {})
    return configs if policy.SALT in configs else configs | {policy.TAG: policy.private_policy(), SKIP_SAVE: True}


def _init(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    if not engine.resets:
        engine.loaded(instance._vllm_config)


def _stamp(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """Stamp the request once, and again after each reset. vLLM repeats this call while the request waits."""
    request = args[0] if args else kwargs["request"]
    seen = getattr(request, "kvshare_reset", None)
    if request.sampling_params is not None and seen != engine.resets:
        request.kvshare_reset = engine.resets
        configs = {policy.TAG: engine.policy_of(request), policy.SALT: engine.salt_of(request)}
        _set_configs(request.sampling_params, configs | ({SKIP_SAVE: True} if config_of(request, policy.KEPT) else {}))
        if seen is not None and instance.lookup_client is not None:
            instance.lookup_client.clear_lookup_status(request.request_id)
    return wrapped(*args, **kwargs)


def config_of(request: Any, name: str) -> str:
    """A request config that came with the request; an empty string if it did not."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}  # a pooling request has no sampling_params
    return str((extra.get("kv_transfer_params") or {}).get(name, ""))


def _adapter_policy(own: str, adapter: Any) -> str:
    """Policy of an unstamped LoRA request. An adapter loaded in place keeps its id, so its policy must be private."""
    return policy.private_policy() if adapter.load_inplace else f"{own}+{adapter.lora_name}.{adapter.lora_int_id}"


def _set_configs(sampling_params: Any, configs: dict[str, Any]) -> None:
    extra = dict(sampling_params.extra_args or {})
    params = {**(extra.get("kv_transfer_params") or {}), **configs}
    sampling_params.extra_args = {**extra, "kv_transfer_params": params}
