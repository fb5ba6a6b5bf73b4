"""What a server keeps for a chunk: an entry, which is the content of the chunk and a checksum of its key and content.

numpy and xxhash let other threads run meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvshare.core import lm_protocol
from kvshare.core.lm_protocol import CHECKSUM
from kvshare.core.log_limit import LimitedLogger

often = LimitedLogger(logging.getLogger(__name__))  # for what each entry may repeat

PART = 1 << 20
"""Bytes that are copied in memory and then hashed, while they are in the processor's cache."""


def write(key: Any, chunk: Any, put: Callable[[int, Any], None], whole: bool = False) -> None:
    """Call ``put`` with the offset and the bytes of each part of an entry.

    Args:
        chunk: LMCache's memory object.
        whole: whether the content is one part.
    """
    content, hashed = array(chunk), lm_protocol.hasher(key.to_string())
    for part in _parts(len(content), whole):
        hashed.update(content[part])
        put(part.start, content[part])
    put(len(content), np.frombuffer(hashed.digest(), np.uint8))


def read(key: Any, chunk: Any, get: Callable[[int, Any], None], whole: bool = False) -> Any:
    """Fill ``chunk`` from an entry and return it. If the checksum is wrong, the result is None.

    Args:
        get: called with an offset in the entry, and the array to fill with the bytes from there.
        whole: whether the content is one part.

    Whatever happens, ``chunk`` is freed unless it is returned.
    """
    try:
        content, hashed, digest = array(chunk), lm_protocol.hasher(key.to_string()), np.empty(CHECKSUM, np.uint8)
        for part in _parts(len(content), whole):
            get(part.start, content[part])
            hashed.update(content[part])
        get(len(content), digest)
    except BaseException:
        chunk.ref_count_down()
        raise
    if hashed.digest() == digest.tobytes():
        return chunk
    often.error("an entry is not what was stored (damaged, or evicted while it was read): its KV is recomputed")
    chunk.ref_count_down()
    return None


def array(chunk: Any) -> Any:
    """The bytes of a memory object, without a copy."""
    return np.frombuffer(chunk.byte_array, np.uint8)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _parts(length: int, whole: bool) -> Iterator[slice]:
    part = length if whole else PART
    return (slice(start, min(start + part, length)) for start in range(0, length, part))
