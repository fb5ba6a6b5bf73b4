"""What makes KV of one set of weights unfindable under another: policy ids and the keys they make.

A *policy* is one version of the weights. Its id travels with each request as an LMCache request
config (``TAG``) and as vLLM's ``cache_salt``, and is folded into every LMCache chunk hash. Folding,
rather than LMCache's own ``lmcache.tag.*`` suffix, because the P2P controller matches on the bare
chunk hash and ``lm://`` allows 150 characters for the whole key.

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
"""Beside it: when that was, Unix time. A request may be on its way into the engine while the weights change."""

PRIVATE = "private-"

MAX_MODEL_NAME = 64
"""Characters of a model name left as they are in a key; with it every lm:// key is far below 150."""


def new_run() -> str:
    """Id of a training run: 16 random hex digits. Whoever starts the replicas draws it, once, for all of them."""
    return uuid4().hex[:16]


def policy_id(run: str, step: int) -> str:
    """Id of the weights of training step ``step`` in run ``run``."""
    return f"{run}-{step}"


def private_policy() -> str:
    """A policy nobody else has: KV stored under it is found by no other request or process."""
    return f"{PRIVATE}{uuid4().hex}"


def is_private(policy: str) -> bool:
    """Whether ``private_policy`` made it."""
    return policy.startswith(PRIVATE)


def fold(chunk_hash: int, policy: str) -> int:
    """LMCache's chunk hash under a policy: an unsigned 64-bit integer.

    Args:
        chunk_hash: LMCache's prefix hash of the chunk (any integer).
        policy: policy id; the empty string leaves the hash as it is.
    """
    if not policy:
        return chunk_hash
    digest = hashlib.blake2b(f"{chunk_hash}:{policy}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def salt(policy: str, cache_salt: str) -> str:
    """vLLM's ``cache_salt`` under a policy, in what LMCache's multi-process server allows: 128 characters, no ``@/\\``.

    Args:
        policy: policy id.
        cache_salt: the request's own; the empty string is none.
    """
    digest = hashlib.sha256(repr((policy, cache_salt)).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', policy)[:64]}-{digest}"


def key_model_name(name: str) -> str:
    """The model name to put into a cache key: ``name`` itself, or a short stand-in for it.

    A name with ``@`` breaks lmcache_server's key parser, and a long path overruns lm://'s 150
    characters; both become the end of the path and a digest of the whole.
    """
    if len(name) <= MAX_MODEL_NAME and "@" not in name:
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-40:]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
