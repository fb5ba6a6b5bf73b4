"""Skip LMCache lookups, loads and stores for tokens that vLLM's own prefix cache has, or is about to have.

LMCache 0.5.6 looks up the whole prompt of every request. With ``enable_async_loading`` (P2P), it also loads the tokens
that vLLM's prefix cache has. If several samples of a prompt arrive together, each of them loads or stores the prompt.
On an H100 each spent 300 ms on 16,384 tokens that the first had loaded (docs/benchmarks/h100.md). With these wraps,
only the first sample loads and stores, and the others use vLLM's prefix cache. A prompt that continues an earlier
answer is a new prompt: vLLM has the KV of the answer, and LMCache has not.
"""

from __future__ import annotations

import time
import weakref
from typing import Any, NamedTuple

from cachetools import TTLCache

from kvshare.core import policy
from kvshare.hooks.patch import optional, wrap

MAX_PROMPTS = 4096
SECONDS = 60.0
"""How long a prompt is assumed to be in LMCache after its lookup. LMCache may evict it earlier."""


class FirstRequest(NamedTuple):
    """The first request for a prompt."""

    request: weakref.ref
    until: float  # time.monotonic() until which other requests wait for its lookup and load

    def is_pending(self) -> bool:
        """Whether it has not run yet. With ``mp`` it is WAITING_FOR_REMOTE_KVS while the worker loads."""
        request = self.request()
        waiting = request is not None and request.status.name in ("WAITING", "WAITING_FOR_REMOTE_KVS")
        return waiting and time.monotonic() < self.until


@optional("LMCache loads and stores again what vLLM's prefix cache has")
def patch_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.get_num_new_matched_tokens", _matched, "request", "num_computed_tokens")
    wrap(module, "LMCacheConnectorV1Impl.request_finished", _finished, "request")


@optional("Samples of a prompt that arrive together each load it")
def patch_mp_connector(module: Any) -> None:
    """This connector loads nothing that vLLM has, and its server stores nothing twice."""
    wrap(module, "LMCacheMPConnector.get_num_new_matched_tokens", _mp_matched, "request", "num_computed_tokens")


def _matched(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> int | None:
    def matched(request: Any, num_computed_tokens: int) -> int | None:
        if connector.lookup_client is None or getattr(request, "kvshare_looked_up", False):
            return wrapped(request, num_computed_tokens)
        chunk = connector._lmcache_chunk_size
        whole = request.num_tokens // chunk * chunk
        prompts, prompt = _prompts(connector), _prompt_key(request, whole // connector._block_size)
        first = prompts.get(prompt)
        if first and whole - num_computed_tokens < chunk:
            _record_local_hit(connector, request, num_computed_tokens)
            return 0
        if first and first.is_pending():
            return None  # vLLM asks again later, and then has the first request's blocks
        request.kvshare_looked_up = True
        found = wrapped(request, num_computed_tokens)
        if prompt and not first:
            timeout = connector.config.lookup_timeout_ms / 1000
            prompts[prompt] = FirstRequest(weakref.ref(request), time.monotonic() + timeout)
        return found

    return matched(*args, **kwargs)


def _mp_matched(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> tuple[int | None, bool]:
    def matched(request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        chunk = connector.scheduler_adapter.lmcache_tokens_per_chunk
        missing = request.num_tokens // chunk * chunk - num_computed_tokens
        if missing >= chunk and not getattr(request, "kvshare_looked_up", False):
            prompts, prompt = _prompts(connector), _prompt_key(request, len(request.block_hashes))
            first = prompts.get(prompt)
            if first and first.is_pending() and connector._vllm_config.cache_config.enable_prefix_caching:
                return None, True
            request.kvshare_looked_up = True
            if prompt and (first is None or first.request() is None):  # else the others would wait one after the other
                timeout = connector.scheduler_adapter._mq_timeout
                prompts[prompt] = FirstRequest(weakref.ref(request), time.monotonic() + timeout)
        return wrapped(request, num_computed_tokens)

    return matched(*args, **kwargs)


def _prompts(connector: Any) -> TTLCache:
    if not hasattr(connector, "kvshare_prompts"):
        connector.kvshare_prompts = TTLCache(MAX_PROMPTS, SECONDS)
    return connector.kvshare_prompts


def _prompt_key(request: Any, blocks: int) -> tuple[str, bytes] | None:
    """The policy and vLLM's hash of the whole chunks. None without a whole chunk, or without vLLM's block hashes."""
    if not 0 < blocks <= len(request.block_hashes) or request.sampling_params is None:
        return None
    params = (request.sampling_params.extra_args or {}).get("kv_transfer_params") or {}
    return params.get(policy.TAG, ""), request.block_hashes[blocks - 1]


def _record_local_hit(connector: Any, request: Any, in_vllm: int) -> None:
    """Record a lookup result equal to vLLM's own hit, so that nothing is loaded or stored again."""
    from lmcache.integration.vllm.vllm_v1_adapter import LoadSpec

    in_lmcache = in_vllm // connector._lmcache_chunk_size * connector._lmcache_chunk_size
    connector.load_specs[request.request_id] = LoadSpec(in_vllm, in_lmcache, can_load=False)
    connector._requests_priority[request.request_id] = request.priority


def _finished(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> Any:
    """Forget the lookup result of a request that was aborted before vLLM scheduled it. LMCache keeps it forever."""
    request = args[0] if args else kwargs["request"]
    connector.load_specs.pop(request.request_id, None)
    connector._requests_priority.pop(request.request_id, None)
    if connector.lookup_client is not None and not connector.async_loading:  # the async client forgets it itself
        connector.lookup_client.clear_lookup_status(request.request_id)
    return wrapped(*args, **kwargs)
