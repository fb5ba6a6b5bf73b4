"""Load nothing for requests that opt out of cached KV.

vLLM does not read its own prefix cache for such requests (``Request.skip_reading_prefix_cache``):
``prompt_logprobs`` and some pooling tasks need every prompt token computed. But vLLM still calls the connector, and
LMCache 0.5.6 reports a hit. The engine then dies because log-probabilities are missing. The wraps run in the scheduler
process. They do not change what LMCache stores of such a request.
"""

from __future__ import annotations

from typing import Any

from kvshare.hooks.patch import wrap


def patch_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.get_num_new_matched_tokens", _in_process, "request")


def patch_mp_connector(module: Any) -> None:
    wrap(module, "LMCacheMPConnector.get_num_new_matched_tokens", _mp, "request")


def _in_process(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> int | None:
    return 0 if _opts_out(*args, **kwargs) else wrapped(*args, **kwargs)


def _mp(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> tuple[int | None, bool]:
    if _opts_out(*args, **kwargs):
        tracker = connector._get_or_create_request_tracker(args[0] if args else kwargs["request"])
        tracker.state = type(tracker.state).BYPASS_LMCACHE  # as after a failed load: vLLM computes, LMCache stores
    return wrapped(*args, **kwargs)


def _opts_out(request: Any, num_computed_tokens: int = 0) -> bool:
    return bool(getattr(request, "skip_reading_prefix_cache", False))
