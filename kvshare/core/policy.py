"""Makes policy ids and cache keys, so that KV of one version of the weights is never found under another.

A *policy* is one version of the weights. Its id travels with each request, as an LMCache request config (``TAG``) and
as vLLM's ``cache_salt``. It is folded into every LMCache chunk hash. LMCache's own ``lmcache.tag.*`` key suffix is not
enough: the P2P controller compares only chunk hashes, and an ``lm://`` key may have at most 150 characters.

Pure functions, no I/O.
"""

from __future__ import annotations

import hashlib
import re
from uuid import uuid4

TAG = "lmcache.tag.policy"
"""Request config that carries the policy id; LMCache forwards ``lmcache.*`` from
``SamplingParams.extra_args["kv_transfer_params"]``."""

STAMPED_AT = "kvshare.stamped_at"
"""Request config with the Unix time at which the policy id was set. The weights may change before it arrives."""

PRIVATE = "private-"

MAX_MODEL_NAME = 64
"""Longest model name that is put into a key unchanged. It keeps every lm:// key well below 150 characters."""


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


def fold(chunk_hash: int, policy: str) -> int:
    """LMCache's chunk hash under a policy: an unsigned 64-bit integer.

    Args:
        chunk_hash: LMCache's prefix hash of the chunk (any integer).
        policy: policy id; an empty string leaves the hash unchanged.
    """
    if not policy:
        return chunk_hash
    digest = hashlib.blake2b(f"{chunk_hash}:{policy}".encode(), digest_size=8).digest()
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
