"""Freshness mode ``trajectory``: a conversation keeps the KV of the policy under which it began.

After an update, a request of such a conversation (core/conversation.py) looks for KV under the policy of its first
turn. What it computes from then on is stored nowhere, so no other conversation finds it. In vLLM's prefix cache it has
a salt of its own.
"""

from __future__ import annotations

from typing import NamedTuple

from cachetools import LRUCache

from kvshare.core import conversation, policy

REMEMBERED = 100_000  # conversations whose first policy a replica remembers


class Stamp(NamedTuple):
    """What a request is stamped with.

    Args:
        policy: policy id.
        kept_by: id of the conversation, if it keeps KV of a policy that is not the current one; else empty.
        versions: number of versions of the weights that its KV may come from.
    """

    policy: str
    kept_by: str = ""
    versions: int = 1


class Trajectories:
    """The step at which each conversation of a replica began.

    Args:
        run: id of the run.
        versions: the largest number of versions, 1 or more.
    """

    def __init__(self, run: str, versions: int) -> None:
        self._run, self._versions = run, versions
        self._began: LRUCache = LRUCache(REMEMBERED)

    def stamp(self, request_id: str, steps: int) -> Stamp:
        """The stamp of a request that is sent while the engine has the weights of ``steps``."""
        trajectory = conversation.of(request_id)
        began = self._began.setdefault(trajectory, steps) if trajectory else steps
        versions = steps - began + 1
        if versions == 1:
            return Stamp(policy.policy_id(self._run, steps))
        if 1 < versions <= self._versions:
            return Stamp(policy.policy_id(self._run, began), trajectory, versions)
        self._began[trajectory] = steps  # it begins anew, with all its tokens computed by the current weights
        return Stamp(policy.policy_id(self._run, steps))
