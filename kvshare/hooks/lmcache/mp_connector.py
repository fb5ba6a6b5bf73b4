"""Put the policy into the keys of LMCache's multi-process connector, and let it read LMCache's config file.

The keys of ``LMCacheMPConnector`` contain vLLM's ``cache_salt``. Several jobs may share its server.

* Scheduler process: the salt of each request is derived from its policy (``keys``). ``reset_cache()`` starts a new
  policy for this engine and sends nothing to the server. LMCache 0.5.6 would clear the server's L1 for every job, wait
  up to ``lmcache.mp.mq_timeout`` and leave locked KV in place. No request finds KV of the old policy, so the server
  evicts that KV first.
* Scheduler and worker process: address and timeouts come from LMCache's config file, as for the in-process connectors.
  Values in ``kv_connector_extra_config`` override them.
* Worker process: the engine copies KV itself, to and from the server's shared memory. On GPUs LMCache's default is that
  the server maps the engine's KV by CUDA IPC. That loads a prompt no faster (docs/benchmarks/h100.md), takes 0.7 GiB
  of the GPU, and excludes vLLM's sleep mode, whose memory has no CUDA IPC handle.
"""

from __future__ import annotations

import os
from typing import Any

from kvshare.core import lmcache_settings, policy, versions
from kvshare.hooks import check
from kvshare.hooks.lmcache.keys import config_of, engine
from kvshare.hooks.patch import UpstreamChanged, replace, wrap

EXTRA = "lmcache.mp."
MODE = f"{EXTRA}mp_transfer_mode"
ADDRESS = (f"{EXTRA}server_urls", f"{EXTRA}host", f"{EXTRA}port")


def patch_connector(module: Any) -> None:
    check.version("vllm")
    wrap(module, "LMCacheMPConnector.__init__", _init, "vllm_config", "role")
    replace(module, "LMCacheMPConnector.reset_cache", _reset_cache, {"3badf0b5db38": "0.5.6"})


def check_vllm_connector(module: Any) -> None:
    """Raise UpstreamChanged if vLLM uses its own copy of ``LMCacheMPConnector``, as older versions do."""
    if not module.LMCacheMPConnector.__module__.startswith("lmcache."):
        raise UpstreamChanged(
            f"vllm {versions.installed('vllm')} has its own LMCacheMPConnector, which kvshare does not know: add "
            '"kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector" to kv_transfer_config'
        )


def patch_adapter(module: Any) -> None:
    """Remove ``@`` from the model name: the server does not answer requests with an ``@`` there."""
    for adapter in ("LMCacheMPSchedulerAdapter", "LMCacheMPWorkerAdapter"):
        wrap(module, f"{adapter}.__init__", _name_model, "model_name")


def patch_metadata(module: Any) -> None:
    wrap(module, "LMCacheMPRequestTracker.__init__", _init_tracker, "request")


def from_file() -> dict[str, Any]:
    """The ``kv_connector_extra_config`` for the settings in LMCache's config file and ``LMCACHE_*``."""
    config = lmcache_settings.effective(os.environ.get("LMCACHE_CONFIG_FILE"))
    seconds = float(config.blocking_timeout_secs)
    extra: dict[str, Any] = {f"{EXTRA}mq_timeout": seconds, f"{EXTRA}heartbeat_interval": seconds}
    extra[MODE] = os.environ.get("LMCACHE_MP_TRANSFER_MODE", "engine_driven")
    return extra | ({f"{EXTRA}server_urls": config.remote_url} if config.remote_url else {})


def _init(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> None:
    vllm_config = args[0] if args else kwargs["vllm_config"]
    given = vllm_config.kv_transfer_config.kv_connector_extra_config
    for name, value in from_file().items():
        if name not in ADDRESS or not given.keys() & set(ADDRESS):
            given.setdefault(name, value)
    wrapped(*args, **kwargs)
    if adapter := getattr(connector, "worker_adapter", None):  # in a worker process
        adapter.kvshare_engine_id = vllm_config.kv_transfer_config.engine_id
    if not engine.resets:
        engine.loaded(vllm_config)


def _name_model(wrapped: Any, adapter: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **{**kwargs, "model_name": policy.key_model_name(kwargs["model_name"])})


def _init_tracker(wrapped: Any, tracker: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    request = args[0] if args else kwargs["request"]
    tracker.cache_salt = engine.salt_of(request)
    _stamp(tracker, engine.policy_of(request))
    if config_of(request, policy.KEPT):
        tracker.max_offload_tokens = 0  # stores nothing


def _stamp(tracker: Any, name: str) -> None:
    tracker.request_configs = {**(tracker.request_configs or {}), policy.TAG: name}
    tracker.cache_salt = policy.salt(name, tracker.cache_salt)


def _reset_cache(connector: Any) -> bool:
    """Start a new policy for this engine. Running requests continue, and store under private policies from now on."""
    engine.reset()
    for tracker in getattr(connector, "request_trackers", {}).values():
        _cancel_lookup(connector.scheduler_adapter, tracker)
        _stamp(tracker, policy.private_policy())
    return True


def _cancel_lookup(adapter: Any, tracker: Any) -> None:
    """Cancel the lookup of a waiting request, so that it does not load KV of the old weights."""
    states = type(tracker.state)
    if tracker.state is not states.PREFETCHING:
        return
    chunk = adapter.lmcache_tokens_per_chunk
    tokens = tracker.get_token_ids()
    adapter.free_lookup_locks(
        tokens,
        0,
        len(tokens) // chunk * chunk,
        tracker.request_id,
        cache_salt=tracker.cache_salt,
        request_configs=tracker.request_configs,
    )
    adapter.cleanup_lookup_result(tracker.request_id)
    tracker.num_vllm_hit_tokens = tracker.num_lmcache_hit_tokens = tracker.num_stored_tokens = 0
    tracker.state = states.BYPASS_LMCACHE
