"""What vLLM's own prefix cache has, or is about to have, is neither looked up, nor loaded, nor stored again.

LMCache 0.5.6 looks up the whole prompt of every request and, with ``enable_async_loading`` (P2P), loads what it finds,
also what the engine has. Of n samples that come together each loads the prompt if another replica has it, and each
stores it if none has: on an H100 each spent 300 ms on 16,384 tokens that the first had loaded (docs/benchmarks.md).
Here only the first of them is LMCache's business. A prompt that has grown by an answer is another prompt: vLLM has the
answer's KV, LMCache has not.
"""

from __future__ import annotations

import time
import weakref
from typing import Any, NamedTuple

from cachetools import TTLCache

from kvshare.core import policy
from kvshare.hooks.patch import optional, wrap

PROMPTS = 4096
SECONDS = 60.0
"""How long a prompt that was looked up is taken to be in LMCache, which may lose it."""


class First(NamedTuple):
    """The first request for a prompt."""

    request: weakref.ref
    until: float  # the others wait for its lookup, and its load into LMCache's memory, time.monotonic()

    def is_waited_for(self) -> bool:
        request = self.request()
        return request is not None and request.status.name == "WAITING" and time.monotonic() < self.until


@optional("What vLLM has is loaded and stored again")
def patch_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.get_num_new_matched_tokens", _matched, "request", "num_computed_tokens")


def _matched(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> int | None:
    def matched(request: Any, num_computed_tokens: int) -> int | None:
        if connector.lookup_client is None or getattr(request, "kvshare_looked_up", False):
            return wrapped(request, num_computed_tokens)
        chunk = connector._lmcache_chunk_size
        whole = request.num_tokens // chunk * chunk
        prompts, prompt = _prompts(connector), _prompt(request, whole // connector._block_size)
        first = prompts.get(prompt)
        if first and whole - num_computed_tokens < chunk:
            _found_no_more(connector, request, num_computed_tokens)
            return 0
        if first and first.is_waited_for():
            return None  # vLLM asks again, and has it then
        request.kvshare_looked_up = True
        found = wrapped(request, num_computed_tokens)
        if prompt and not first:
            patience = connector.config.lookup_timeout_ms / 1000
            prompts[prompt] = First(weakref.ref(request), time.monotonic() + patience)
        return found

    return matched(*args, **kwargs)


def _prompts(connector: Any) -> TTLCache:
    if not hasattr(connector, "kvshare_prompts"):
        connector.kvshare_prompts = TTLCache(PROMPTS, SECONDS)
    return connector.kvshare_prompts


def _prompt(request: Any, blocks: int) -> tuple[str, bytes] | None:
    """Policy, and vLLM's hash of the whole chunks; None if there are none, or vLLM hashes nothing."""
    if not 0 < blocks <= len(request.block_hashes) or request.sampling_params is None:
        return None
    params = (request.sampling_params.extra_args or {}).get("kv_transfer_params") or {}
    return params.get(policy.TAG, ""), request.block_hashes[blocks - 1]


def _found_no_more(connector: Any, request: Any, in_vllm: int) -> None:
    """As after a lookup that found no more than vLLM has, and all whole chunks of that."""
    from lmcache.integration.vllm.vllm_v1_adapter import LoadSpec

    in_lmcache = in_vllm // connector._lmcache_chunk_size * connector._lmcache_chunk_size
    connector.load_specs[request.request_id] = LoadSpec(in_vllm, in_lmcache, can_load=False)
    connector._requests_priority[request.request_id] = request.priority
