"""What it costs an engine to store the KV of an answer: each chunk when it is full, or all at the end.

LMCache's own engine and request tracker, without vLLM, on CPU, with Qwen2.5-0.5B's shape in bf16. Times are processor
time of the scheduler (the request's metadata) and of the worker (the store): median of the turns, lowest and highest.

    python benchmarks/generated.py [--turns 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from kvshare import vllm_plugin
from kvshare.core import policy

LAYERS, HEADS, HEAD, BLOCK, CHUNK = 24, 2, 64, 128, 256
GENERATED = 4 * CHUNK
CONTEXTS = (1024, 4096, 16384)


class Engine:
    def __init__(self) -> None:
        from lmcache.v1.cache_engine import LMCacheEngine
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.token_database import ChunkedTokenDatabase

        from kvshare.hooks.lmcache import cpu_connector

        config = LMCacheEngineConfig.from_defaults(chunk_size=CHUNK, max_local_cpu_size=0.1, save_unfull_chunk=False)
        shape = (LAYERS, 2, CHUNK, HEADS, HEAD)
        metadata = LMCacheMetadata("model", 1, 1, 0, 0, torch.bfloat16, shape, role="worker", engine_id="one")
        tokens = max(CONTEXTS) + GENERATED
        self.caches = [
            torch.zeros(tokens // BLOCK, HEADS, BLOCK, 2 * HEAD, dtype=torch.bfloat16) for _ in range(LAYERS)
        ]
        database = ChunkedTokenDatabase(config, metadata)
        self.engine = LMCacheEngine(config, metadata, database, cpu_connector.cpu_connector(metadata), None, None)
        self.engine.post_init()

    def answer(self, request: str, context: int, ends: list[int]) -> float:
        """Milliseconds to store an answer after ``context`` tokens, in stores that end at ``ends``."""
        from lmcache.integration.vllm.vllm_v1_adapter import ReqMeta, RequestTracker

        tokens = [(hash(request) + n) % 50_000 for n in range(context + GENERATED)]
        configs = {policy.TAG: request}
        blocks = list(range(len(tokens) // BLOCK))
        tracker = RequestTracker(request, context, [], blocks, num_saved_tokens=context, request_configs=configs)
        began = time.thread_time()
        for end in ends:
            tracker.token_ids = tokens[:end]
            meta: Any = ReqMeta.from_request_tracker(tracker, BLOCK, CHUNK, save_decode_cache=True)
            skip = meta.save_spec.skip_leading_tokens
            mask = torch.ones(end, dtype=torch.bool)
            mask[:skip] = False
            given = {"kvcaches": self.caches, "slot_mapping": meta.slot_mapping, "offset": skip, "req_id": request}
            self.engine.store(meta.token_ids, mask=mask, request_configs=configs, **given)
        return (time.thread_time() - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=9)
    turns = parser.parse_args().turns
    vllm_plugin.register()
    engine = Engine()
    print("| tokens before the answer | each chunk when it is full: 4 stores | at the end: 1 store |\n|---|---|---|")
    for context in CONTEXTS:
        each, once = range(context + CHUNK, context + GENERATED + 1, CHUNK), [context + GENERATED]
        found: dict[str, list[float]] = {"each": [], "once": []}
        for turn in range(turns + 1):
            for name, ends in (("each", list(each)), ("once", once)):
                took = engine.answer(f"{name}-{context}-{turn}", context, ends)
                found[name] += [took] if turn else []  # the first is slow
        cells = [f"{statistics.median(ms):.1f} ms ({min(ms):.1f} to {max(ms):.1f})" for ms in found.values()]
        print(f"| {context:,} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
