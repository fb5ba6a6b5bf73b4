"""The released packages of the NPU stack, without an NPU: ``make test-npu`` installs them and runs this folder.

LMCache and vLLM are imported. LMCache-Ascend imports torch_npu and CANN's libraries when its package is
imported, so its package is a stand-in here, and so is ``torch.npu``; the modules below them are its own.
vllm-ascend is only read: it cannot be imported without torch_npu.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from kvshare import vllm_plugin
from kvshare.hooks.patch import PATCHES

VLLM_ASCEND = Path(sys.prefix) / "vllm-ascend"
NOT_ON_ASCEND = ("lmcache_mp_", "multi_process", "multiprocess")  # the multi-process server: docs/backends.md
os.environ["PYTHONHASHSEED"] = "0"


@pytest.fixture(scope="session")
def lmcache_ascend(tmp_path_factory) -> Path:
    """Source of LMCache-Ascend's package."""
    checkout = os.environ.get("LMCACHE_ASCEND")
    if not checkout:
        pytest.skip("LMCACHE_ASCEND is not set: git clone -b v0.4.4 https://github.com/LMCache/LMCache-Ascend")
    source = Path(checkout).resolve() / "lmcache_ascend"
    package = types.ModuleType("lmcache_ascend")
    package.__path__ = [str(source)]
    metadata = tmp_path_factory.mktemp("metadata") / "lmcache_ascend-0.4.4.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: lmcache-ascend\nVersion: 0.4.4\n")
    sys.path.append(str(metadata.parent.parent))
    build = types.ModuleType("lmcache_ascend._build_info")
    build.__framework_name__ = "pytorch"
    package._build_info = build
    sys.modules |= {package.__name__: package, build.__name__: build}
    torch.npu = mock.MagicMock(name="torch.npu")
    return source


@pytest.fixture(scope="session", autouse=True)
def wraps(request) -> list[tuple[types.ModuleType, str]]:
    """Every (module, path) that kvshare wraps or replaces in the real modules, through its vLLM plugin."""
    if os.environ.get("LMCACHE_ASCEND"):
        request.getfixturevalue("lmcache_ascend")
    vllm_plugin.register()
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")  # LMCache-Ascend's P2P backend imports it
    for name in hooked():
        importlib.import_module(name)
    del sys.modules["torch_npu"]  # others take it for an NPU
    return [(patch.module, patch.path) for patch in PATCHES]


def hooked() -> list[str]:
    """Modules that the plugin has hooks for, of those that can be here."""
    names = [module for module, _ in vllm_plugin._HOOKS if not any(part in module for part in NOT_ON_ASCEND)]
    return [name for name in names if os.environ.get("LMCACHE_ASCEND") or not name.startswith("lmcache_ascend")]
