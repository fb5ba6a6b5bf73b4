"""What kvshare wraps, and what its wraps use, is there in the versions NPUs run, and nothing goes around it."""

import ast
import importlib
import inspect
import re

import pytest

from npu.conftest import VLLM_ASCEND, hooked


def test_every_hook_finds_its_functions(wraps):
    """None of the optional ones has given up, either."""
    patched = {module.__name__ for module, _ in wraps if not module.__name__.startswith("nixl_")}
    assert patched == set(hooked()) - {"lmcache.v1.transfer_channel.nixl_channel"}  # NIXL's bindings
    for module, path in wraps:
        *owner, name = path.split(".")
        holder = getattr(module, owner[0]) if owner else module
        ours = getattr(inspect.getattr_static(holder, name), "_self_wrapper", getattr(holder, name))
        assert ours.__module__.startswith("kvshare."), path


USED = {
    "vllm.v1.core.sched.scheduler:Scheduler": "kv_cache_manager requests connector",
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "enable_caching coordinator reset_prefix_cache",
    "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator": "single_type_managers",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": "block_pool",
    "vllm.v1.core.block_pool:BlockPool": "num_gpu_blocks evict_blocks",
    "vllm.v1.request:Request": (
        "block_hashes update_block_hashes cache_salt sampling_params arrival_time lora_request request_id"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector:LMCacheConnectorV1": "_lmcache_engine",
    "lmcache.integration.vllm.lmcache_connector_v1:LMCacheConnectorV1Dynamic": "_lmcache_engine",
    "lmcache.integration.vllm.vllm_v1_adapter:LMCacheConnectorV1Impl": (
        "_request_trackers lookup_client lmcache_engine _parent _vllm_config "
        "load_specs _requests_priority async_loading"
    ),
    "lmcache.integration.vllm.vllm_v1_adapter:RequestTracker": "request_configs",
    "lmcache.v1.lookup_client.lmcache_lookup_client:LMCacheLookupClient": "clear_lookup_status",
    "lmcache.v1.lookup_client.lmcache_async_lookup_client:LMCacheAsyncLookupClient": "clear_lookup_status",
    "lmcache.v1.cache_engine:LMCacheEngine": "storage_manager token_database metadata lmcache_worker config",
    "lmcache.v1.storage_backend.storage_manager:StorageManager": "storage_backends _bypassed_backends",
    "lmcache.v1.storage_backend.local_cpu_backend:LocalCPUBackend": "hot_cache cpu_lock remove allocate",
    "lmcache.v1.storage_backend.local_disk_backend:LocalDiskBackend": "dict disk_lock remove",
    "lmcache.v1.storage_backend.remote_backend:RemoteBackend": "connection loop exists_in_put_tasks put_callback",
    "lmcache.v1.storage_backend.connector.base_connector:RemoteConnector": "full_chunk_size_bytes",
    "lmcache.v1.memory_management:MemoryObj": (
        "byte_array get_memory_format get_dtype get_shape is_pinned ref_count_down"
    ),
    "lmcache.v1.metadata:LMCacheMetadata": "worker_id world_size engine_id",
}
"""Attributes that the wraps use, by class."""


@pytest.mark.parametrize("where", USED)
def test_attributes_our_wraps_use(where):
    module, name = where.split(":")
    cls = getattr(importlib.import_module(module), name)
    assert set(USED[where].split()) <= _attributes(cls)


def _attributes(cls: type) -> set[str]:
    """Members of a class, and what its methods set on self."""
    found = set(dir(cls))
    for base in cls.__mro__[:-1]:
        found |= set(vars(base).get("__annotations__", ()))
        found |= set(re.findall(r"self\.(\w+)\s*(?::[^=\n]+)?=[^=]", inspect.getsource(base)))
    return found


def test_lmcache_ascend_goes_around_none_of_them(wraps, lmcache_ascend):
    """Where its subclass overrides a method we wrap, the override calls ours, or is wrapped itself."""
    from lmcache_ascend.integration.vllm.vllm_v1_adapter import LMCacheAscendConnectorV1Impl
    from lmcache_ascend.v1.cache_engine import AscendLMCacheEngine
    from lmcache_ascend.v1.storage_backend.p2p_backend import AscendP2PBackend

    paths = {path for _, path in wraps}
    checked = []
    for cls in (LMCacheAscendConnectorV1Impl, AscendLMCacheEngine, AscendP2PBackend):
        own = {path.split(".")[1] for path in paths if path.startswith(f"{cls.__name__}.")}
        base = cls.__mro__[1].__name__
        for method in {path.split(".")[1] for path in paths if path.startswith(f"{base}.")} & vars(cls).keys():
            if (cls.__name__, method) == ("AscendP2PBackend", "_ensure_peer_connection"):
                continue  # has its own timeout (docs/npu.md)
            source = inspect.getsource(vars(cls)[method])
            calls = {f"super().{method}(", *(f"self.{name}(" for name in own)}
            assert method in own or any(call in source for call in calls), f"{cls.__name__}.{method}"
            checked.append(method)
    assert sorted(checked) == [
        "__init__",
        "__init__",
        "batched_get_non_blocking",
        "request_finished",
        "retrieve",
        "start_load_kv",
        "store",
    ]


def test_lmcache_ascend_replaces_none_of_them(wraps, lmcache_ascend):
    """It assigns functions of its own into LMCache when it is imported."""
    tree = ast.parse((lmcache_ascend / "__init__.py").read_text())
    targets = [ast.unparse(t) for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets]
    replaced = {path for _, path in wraps for target in targets if target.endswith(f".{path}")}
    assert replaced == {
        "CreateGPUConnector",  # what we wrap there is for CPU
        "LMCacheWorker.async_put_and_wait_msg",  # cures the same stall: two event loops, one socket
    }


def test_vllm_ascends_schedulers_reset_as_vllms():
    classes = [
        node
        for file in VLLM_ASCEND.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("Scheduler") for b in node.bases)
    ]
    assert classes
    for node in classes:
        for function in node.body:
            if isinstance(function, ast.FunctionDef) and function.name == "reset_prefix_cache":
                assert "super().reset_prefix_cache(" in ast.unparse(function), node.name
