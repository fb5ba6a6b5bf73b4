"""What is given back on a reset: real LMCache tiers, in this process."""

import sys
import threading

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

from kvshare.hooks.lmcache import reset

ENTRIES = 5000
SHAPE = torch.Size([2, 1, 16, 16])


def key(number):
    return CacheEngineKey("qwen", 1, 0, number, torch.float32)


@pytest.fixture
def tier():
    config = LMCacheEngineConfig.from_defaults(chunk_size=16, local_cpu=True, max_local_cpu_size=0.05)
    return LocalCPUBackend(config, LMCacheMetadata("qwen", 1, 1, 0, 0, torch.float32, (1, 2, 16, 1, 16)), "cpu")


@pytest.fixture
def hurried():
    """Threads change places as often as they do by chance in a long run."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def test_reset_while_others_store(tier, hurried):
    """The engine only lists what is there; another thread that stores meanwhile must not make that fail."""
    chunk = tier.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD)
    for number in range(ENTRIES):
        tier.submit_put_task(key(number), chunk)
    ended = threading.Event()

    def store():
        number = ENTRIES
        while not ended.is_set():
            tier.submit_put_task(key(number), chunk)
            number += 1

    storing = threading.Thread(target=store)
    storing.start()
    try:
        for _ in range(20):
            reset._give_back({"LocalCPUBackend": tier})
    finally:
        ended.set()
        storing.join()
    for thread in threading.enumerate():
        if thread.name == "kvshare-give-back":
            thread.join()
    assert not any(tier.contains(key(number)) for number in range(ENTRIES))
