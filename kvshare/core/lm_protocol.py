"""Packs and unpacks the two messages of LMCache's ``lm://`` protocol (lmcache/v1/protocol.py), and checks entries.

The formats are repeated here because importing LMCache takes ten seconds, and 300 MB of memory for torch.
"""

from __future__ import annotations

import struct
from typing import Any

import xxhash

REQUEST = struct.Struct("9i150s")  # command, length, format, dtype, location, shape (4), key
REPLY = struct.Struct("9i")  # code, length, format, dtype, shape (4), location
PUT, GET, EXIST, HEALTH = 1, 2, 3, 5
SUCCESS, FAIL = 200, 400
NO_DATA = (0, 1, 2, 0, 0, 0, 0, 0)  # fields after the code in a reply without data, as LMCache's server sends it

HEALTH_REQUEST = REQUEST.pack(HEALTH, 0, 1, 2, 0, 0, 0, 0, 0, b"kvshare@1@0@0@half".ljust(150))
"""Health request to an ``lm://`` server, the same bytes that LMCache's client sends."""

CHECKSUM = 8
"""Bytes that kvshare's client puts after the content of each entry."""


def hasher(key: str) -> xxhash.xxh3_64:
    """Its digest, after the content, is the checksum. The key counts: the content of another entry is wrong, too."""
    return xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(key.encode()))


def checksum(key: str, content: Any) -> bytes:
    hashed = hasher(key)
    hashed.update(content)
    return bytes(hashed.digest())
