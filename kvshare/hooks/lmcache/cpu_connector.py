"""Copy KV between vLLM's CPU KV cache and LMCache's memory, for LMCache's in-process connector.

LMCache 0.5.6 has no such copy for CPU ("No supported cpu connector found"). It then continues in degraded mode: it
shares nothing and logs one line.
"""

from __future__ import annotations

from typing import Any

import torch

from kvshare.hooks.patch import optional, wrap


@optional("LMCache shares nothing on CPU")
def patch_gpu_connector(module: Any) -> None:
    wrap(module, "CreateGPUConnector", _create, "config", "metadata", "engine")


def _create(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    from lmcache import torch_device_type
    from lmcache.utils import EngineType

    config, metadata, engine = args
    if engine != EngineType.VLLM or torch_device_type != "cpu":
        return wrapped(*args, **kwargs)
    for option in ("use_layerwise", "enable_blending", "save_unfull_chunk"):
        if getattr(config, option):
            raise ValueError(f"{option}: true does not work on CPU: set it to false in the LMCache config")
    return cpu_connector(metadata)


def cpu_connector(metadata: Any) -> Any:
    """Connector that copies whole blocks between vLLM's CPU KV cache and LMCache's memory objects.

    vLLM's CPU attention keeps one tensor per layer, ``(blocks, kv_heads, block_size, 2 * head_size)``. It packs each
    block for the CPU's instruction set. The connector copies blocks as they are. So a chunk must consist of whole
    blocks, and replicas that share KV must use the same instruction set and dtype.

    Args:
        metadata: LMCacheMetadata; ``kv_shape`` is (layers, 2, chunk_size, kv_heads, head_size).
    """
    from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface

    class CPUBlockConnector(GPUConnectorInterface):
        def __init__(self) -> None:
            self.layers, self.kv, self.chunk, heads, head_size = metadata.kv_shape
            self.hidden = heads * head_size
            self.caches: list[torch.Tensor] = []
            self.block = 0

        def get_shape(self, num_tokens: int) -> torch.Size:
            return torch.Size([self.kv, self.layers, num_tokens, self.hidden])

        def initialize_kvcaches_ptr(self, **kwargs: Any) -> None:
            if self.caches or "kvcaches" not in kwargs:
                return
            caches = kwargs["kvcaches"]
            shapes = {tuple(cache.shape) for cache in caches}
            if len(caches) != self.layers or len(shapes) != 1 or caches[0].dim() != 4:
                raise RuntimeError(f"unknown layout of vLLM's CPU KV cache: {len(caches)} tensors of {shapes}")
            self.block = caches[0].shape[2]
            if self.chunk % self.block:
                raise RuntimeError(f"chunk_size {self.chunk} is not a multiple of vLLM's CPU block size {self.block}")
            self.caches = [cache.view(cache.shape[0], -1) for cache in caches]

        def _blocks(self, start: int, end: int, slot_mapping: torch.Tensor) -> torch.Tensor:
            if start % self.block or end % self.block:
                raise RuntimeError(f"tokens {start} to {end} are not whole blocks of {self.block}")
            return slot_mapping[start : end : self.block] // self.block

        def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
            self.initialize_kvcaches_ptr(**kwargs)
            blocks = self._blocks(start, end, kwargs["slot_mapping"])
            target = memory_obj.tensor.view(-1).view(self.layers, len(blocks), -1)
            for layer, cache in enumerate(self.caches):
                torch.index_select(cache, 0, blocks, out=target[layer])

        def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
            self.initialize_kvcaches_ptr(**kwargs)
            blocks = self._blocks(start, end, kwargs["slot_mapping"])
            source = memory_obj.tensor.view(-1).view(self.layers, len(blocks), -1)
            # Other requests may be reading the blocks of vLLM's own hit, so those are not written.
            skip = max(0, kwargs.get("vllm_cached_tokens", 0) - start) // self.block
            for layer, cache in enumerate(self.caches):
                cache.index_copy_(0, blocks[skip:], source[layer, skip:])

        def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
            for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
                self.from_gpu(memory_obj, start, end, **kwargs)

        def batched_to_gpu(self, memory_objs: Any = None, starts: Any = None, ends: Any = None, **kwargs: Any) -> None:
            for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
                self.to_gpu(memory_obj, start, end, **kwargs)

    return CPUBlockConnector()
