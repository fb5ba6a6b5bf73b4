"""Let the request ids that verl gives vLLM say to which conversation a request belongs (core/conversation.py)."""

from __future__ import annotations

from typing import Any

from kvshare.core import conversation
from kvshare.hooks.patch import optional, wrap


@optional("Turns of a conversation cannot be told: they keep no KV across weight updates, and the report lacks them")
def patch_client(module: Any) -> None:
    wrap(module, "LLMServerClient._vllm_request_id", _request_id, "request_id")


def _request_id(wrapped: Any, client: Any, args: tuple, kwargs: dict) -> str:
    request_id = args[0] if args else kwargs["request_id"]
    made = wrapped(*args, **kwargs)
    # With full_determinism, verl uses the same ids again for other conversations.
    return made if made == request_id else conversation.join(request_id, made)
