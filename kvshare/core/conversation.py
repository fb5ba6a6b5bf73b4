"""Request ids that say to which conversation a request belongs.

verl gives vLLM a new request id for each turn, and for each part of a partial rollout. Its own id, which its router
gets, stays the same. hooks/verl/conversation_ids.py puts that before vLLM's.
"""

from __future__ import annotations

MARK = "@"


def join(conversation: str, request: str) -> str:
    return f"{conversation}{MARK}{request}"


def of(request: str) -> str:
    """Id of the conversation of a request; empty if it does not say."""
    return request.rpartition(MARK)[0]
