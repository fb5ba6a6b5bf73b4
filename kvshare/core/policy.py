"""Makes policy ids and cache keys, so that KV of one version of the weights is never found under another.

A *policy* is one version of the weights. Its id travels with each request, as an LMCache request config (``TAG``) and
as vLLM's ``cache_salt``. It is folded into every LMCache chunk hash, with what else makes KV differ (``SALT``).
LMCache's own ``lmcache.tag.*`` key suffix is not enough: the P2P controller compares only chunk hashes, and an
``lm://`` key may have at most 150 characters.

Pure functions, no I/O.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from uuid import uuid4

TAG = "lmcache.tag.policy"
"""Request config that carries the policy id; LMCache forwards ``lmcache.*`` from
``SamplingParams.extra_args["kv_transfer_params"]``."""

SALT = "lmcache.tag.salt"
"""Request config that carries a ``key_salt``. The scheduler process sets it, also for requests with a ``TAG``."""

KEPT = "lmcache.kept"
"""Request config of a request that loads KV of an earlier policy, which its conversation has used before: the
``cache_salt`` of that time. What the request computes is not stored. See hooks/verl/trajectory.py."""

STORE = "lmcache.store_generated"
"""Request config: whether to store the KV of what a request has generated when it ends, ALWAYS or IF_ABORTED."""

ALWAYS, IF_ABORTED = "always", "if aborted"

PRIVATE = "private-"

MAX_MODEL_NAME = 64
"""Longest model name that is put into a key unchanged. It keeps every lm:// key well below 150 characters."""


def touches_weights(method: str | Callable) -> bool:
    """Whether a method of a worker changes its weights, judged by its name; an unnamed one may.

    verl 0.9.1 calls update_weights_from_ipc, start_weight_update, update_verl_delta_weights and finish_weight_update.
    """
    return "weight" in (method if isinstance(method, str) else getattr(method, "__name__", "weight"))


def new_run() -> str:
    """Id of a training run: 16 random hex digits. The process that starts the replicas draws one for all of them."""
    return uuid4().hex[:16]


def policy_id(run: str, step: int) -> str:
    """Id of the weights of training step ``step`` in run ``run``."""
    return f"{run}-{step}"


def private_policy() -> str:
    """A unique policy id. KV stored under it cannot be found by other requests or processes."""
    return f"{PRIVATE}{uuid4().hex}"


def is_private(policy: str) -> bool:
    """Whether a policy id was made by ``private_policy``."""
    return policy.startswith(PRIVATE)


def key_salt(config: str, adapter: str, cache_salt: str) -> str:
    """What else than policy and rank makes the KV of given tokens differ: 16 hex digits.

    Args:
        config: id of the engine's configuration.
        adapter: LoRA adapter; an empty string if none.
        cache_salt: vLLM's ``cache_salt`` of the request; an empty string if none. Users put a tenant or a version of
            the weights there.
    """
    return hashlib.sha256(repr((config, adapter, cache_salt)).encode()).hexdigest()[:16]


def fold(chunk_hash: int, policy: str, salt: str = "", rank: int = 0) -> int:
    """LMCache's chunk hash under a policy: an unsigned 64-bit integer.

    Args:
        chunk_hash: LMCache's prefix hash of the chunk (any integer).
        policy: policy id.
        salt: ``key_salt`` of the request.
        rank: of the worker that stores the chunk.

    Raises:
        ValueError: if the policy is empty: the key would be the same for all weights.
    """
    if not policy:
        raise ValueError("a key without a policy: KV of other weights would be found under it")
    digest = hashlib.blake2b(repr((chunk_hash, policy, salt, rank)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def salt(policy: str, cache_salt: str) -> str:
    """vLLM's ``cache_salt`` under a policy. LMCache's multi-process server allows 128 characters, without ``@/\\``.

    Args:
        policy: policy id.
        cache_salt: salt that the request came with; an empty string if none.
    """
    digest = hashlib.sha256(repr((policy, cache_salt)).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', policy)[:64]}-{digest}"


def key_model_name(name: str) -> str:
    """The model name to put into a cache key: ``name``, or the end of it with a digest of the whole.

    A name with ``@`` would break lmcache_server's key parser. A long path would exceed lm://'s 150 characters.
    """
    if len(name) <= MAX_MODEL_NAME and "@" not in name:
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-40:]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
