"""A replica without vLLM: LMCache's engine, P2P and NIXL over a KV cache of its own; asked over zmq (peers.py).

``store N`` stores the KV of prompt N; ``load N`` finds, loads and checks it. The answer is the number of tokens, or -1
when what was loaded is other KV.
"""

import queue
import random
import sys

import torch
import zmq
from lmcache.v1.cache_engine import LMCacheEngine
from lmcache.v1.config import load_engine_config_with_overrides
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.token_database import ChunkedTokenDatabase

from kvshare import vllm_plugin
from kvshare.core import policy
from kvshare.hooks.lmcache import cpu_connector

vllm_plugin.register()
LAYERS, HEADS, HEAD, BLOCK, TOKENS = 2, 2, 64, 128, 512
CONFIGS = {policy.TAG: "run-1"}


class Scheduler:
    def __init__(self):
        self.found = queue.Queue()

    def send_response_to_scheduler(self, lookup, tokens):
        self.found.put(tokens)


class Peer:
    def __init__(self):
        config = load_engine_config_with_overrides()
        shape = (LAYERS, 2, config.chunk_size, HEADS, HEAD)
        metadata = LMCacheMetadata("tiny", 1, 1, 0, 0, torch.float32, shape, role="worker", engine_id="peer")
        self.cache = [torch.zeros(TOKENS // BLOCK, HEADS, BLOCK, 2 * HEAD) for _ in range(LAYERS)]
        self.scheduler, self.lookups = Scheduler(), 0
        self.database = ChunkedTokenDatabase(config, metadata)
        connector = cpu_connector.cpu_connector(metadata)
        self.engine = LMCacheEngine(config, metadata, self.database, connector, None, None)
        self.engine.post_init(async_lookup_server=self.scheduler)
        self.call = {
            "mask": torch.ones(TOKENS, dtype=torch.bool),
            "kvcaches": self.cache,
            "slot_mapping": torch.arange(TOKENS),
            "request_configs": CONFIGS,
        }

    def store(self, number):
        for layer, kv in zip(self.cache, self._kv(number), strict=True):
            layer.copy_(kv)
        self.engine.store(tokens=self._tokens(number), **self.call)
        return TOKENS

    def load(self, number):
        tokens, lookup = self._tokens(number), f"lookup-{self.lookups}"
        self.lookups += 1
        chunks = list(self.database.process_tokens(tokens, make_key=False))
        self.engine.async_lookup_and_prefetch(
            lookup,
            hashes=[key for _, _, key in chunks],
            offsets=[end - start for start, end, _ in chunks],
            pin=True,
            request_configs=CONFIGS,
        )
        found = self.scheduler.found.get()
        if found:
            for layer in self.cache:
                layer.zero_()
            self.engine.retrieve(tokens=tokens, **self.call, req_id=lookup)
        self.engine.lookup_unpin(lookup)
        blocks = found // BLOCK
        same = all(torch.equal(a[:blocks], b[:blocks]) for a, b in zip(self.cache, self._kv(number), strict=True))
        return found if same else -1

    def used(self, _):
        """With LMCache's tier emptied first: what is left is held by loads."""
        local = self.engine.storage_manager.local_cpu_backend
        local.clear()
        return local.memory_allocator.cpu_allocator.total_allocated_size

    def _tokens(self, number):
        rng = random.Random(number)
        return torch.tensor([rng.randrange(1000) for _ in range(TOKENS)])

    def _kv(self, number):
        random_numbers = torch.Generator().manual_seed(number)
        return [torch.rand(layer.shape, generator=random_numbers) for layer in self.cache]


if __name__ == "__main__":
    peer = Peer()
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(sys.argv[1])
        while True:
            command, number = socket.recv_json()
            socket.send_json(getattr(peer, command)(number))
