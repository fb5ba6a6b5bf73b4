"""Register the platform ``cpu`` with verl, so that verl runs on a machine without an accelerator.

Set ``VERL_PLATFORM=cpu`` and ``VERL_ENGINE_DEVICE=cuda``: verl 0.9.1 registers its FSDP engines for cuda and npu only.
The platform is for trying things out. It is slow, and exact in fp32.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvshare.hooks import check
from kvshare.hooks.patch import optional, wrap


def is_cpu() -> bool:
    return os.environ.get("VERL_PLATFORM", "").lower() == "cpu"


@optional("verl does not know the platform cpu")
def register_platform(module: Any) -> None:
    check.parameters(module, "PlatformRegistry.register", "platform")
    module.PlatformRegistry.register(platform="cpu")(_platform_class(module.PlatformBase))


@optional("verl may fail to create its process group on CPU")
def patch_process_group(module: Any) -> None:
    """Ask for "cpu:gloo". verl asks for "cpu:gloo,cpu:gloo", which torch rejects as a duplicate."""
    if is_cpu():
        wrap(module, "initialize_global_process_group_ray", _one_backend, "timeout_second", "backend")


def _one_backend(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    def call(timeout_second: int | None = None, backend: str | None = None) -> Any:
        return wrapped(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    return call(*args, **kwargs)


def _device_module() -> types.ModuleType:
    """``torch.cpu`` plus the members that verl expects of ``torch.<accelerator>``."""
    import torch

    class CPUModule(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cpu, name)

    module = CPUModule("kvshare.torch_cpu")
    for name in ("empty_cache", "ipc_collect", "synchronize", "set_device"):
        setattr(module, name, lambda *args, **kwargs: None)
    for name in ("reset_peak_memory_stats", "reset_accumulated_memory_stats"):
        setattr(module, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *args, **kwargs: 0)
    vars(module).update(
        is_available=lambda: False,
        device_count=lambda: 1,
        mem_get_info=lambda *args, **kwargs: (0, 0),
        get_device_name=lambda *args, **kwargs: "CPU",
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    return module


def _platform_class(base: type) -> type:
    class PlatformCPU(base):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = _device_module()

        def is_available(self) -> bool:
            return True

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            return False  # verl never detects this platform: only VERL_PLATFORM selects it

        def current_device(self) -> Any:
            import torch

            return torch.device("cpu")  # for tensor.to(...), where a number means an accelerator

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None: ...

        def synchronize(self, device_index: int | None = None) -> None: ...

        def manual_seed(self, seed: int) -> None:
            import torch

            torch.manual_seed(seed)

        manual_seed_all = manual_seed

        def set_allocator_settings(self, settings: str) -> None: ...

        def empty_cache(self) -> None: ...

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        def ray_resource_name(self) -> str:
            return "GPU"  # verl knows only GPU and NPU; ray.init(num_gpus=N) declares N of them

        def ray_noset_envvars(self) -> list[str]:
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self) -> bool:
            return False  # so verl sends weights through POSIX shared memory

        @contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None: ...

        def profiler_stop(self) -> None: ...

        def cudart(self) -> None: ...

    return PlatformCPU
