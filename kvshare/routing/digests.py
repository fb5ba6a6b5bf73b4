"""Splits prompts into whole chunks and names each prefix of them by a digest."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from cachetools import LRUCache


def chunk_digests(prompt_ids: Sequence[int], chunk_size: int) -> list[str]:
    """One digest per whole chunk of a prompt. Each digest covers all tokens from the start to the end of its chunk."""
    return _extend(hashlib.blake2b(digest_size=16), prompt_ids, chunk_size)


def _extend(digest: hashlib.blake2b, ids: Sequence[int], chunk_size: int) -> list[str]:
    """Digests of the whole chunks of ``ids``, which follow what ``digest`` has seen. Adds them to it."""
    whole, digests = memoryview(array("i", ids[: len(ids) // chunk_size * chunk_size])), []
    for start in range(0, len(whole), chunk_size):
        digest.update(whole[start : start + chunk_size])
        digests.append(digest.hexdigest())
    return digests


def token_ids(prompt_ids: Any) -> list[int]:
    """Token ids as a list. They mostly are one already; checking the first id avoids a pass over all of them."""
    if prompt_ids is None or (isinstance(prompt_ids, list) and isinstance(next(iter(prompt_ids), 0), int)):
        return prompt_ids or []
    from verl.utils.tokenizer import normalize_token_ids  # verl is not in a vLLM worker

    return normalize_token_ids(prompt_ids)


def before_images(ids: list[int], placeholders: Iterable[int]) -> list[int]:
    """The tokens before the first placeholder of an image or a video.

    Placeholders say nothing about the image, and verl removes repeated ones between the router and the engine
    (``qwen2_5_vl_dedup_image_tokens``). So equal token ids are no equal prompts from there on.
    """
    found = [ids.index(token) for token in placeholders if token in ids]
    return ids[: min(found)] if found else ids


SAMPLED = 32  # tokens; of the earlier turns' tokens, each 32nd is compared


class Conversations:
    """Computes ``chunk_digests`` and hashes only what a conversation's next turn adds.

    Args:
        chunk_size: tokens.
        remember: chunks, of all conversations together.
    """

    def __init__(self, chunk_size: int, remember: int = 100_000) -> None:
        self._chunk_size = chunk_size
        self._known: LRUCache = LRUCache(remember, getsizeof=lambda known: 1 + len(known[1]))

    def digests(self, request_id: str, ids: list[int]) -> list[str]:
        digest, digests, sampled = self._known.pop(request_id, (None, [], []))
        seen = len(digests) * self._chunk_size
        if digest is None or len(ids) < seen or ids[:seen:SAMPLED] != sampled:  # an agent loop may edit earlier turns
            digest, digests, seen = hashlib.blake2b(digest_size=16), [], 0
        digests = digests + _extend(digest, ids[seen:], self._chunk_size)
        self._known[request_id] = digest, digests, ids[: len(digests) * self._chunk_size : SAMPLED]
        return digests
