"""The released packages of the GPU stack, without a GPU: ``make test-gpu-install`` installs each file and runs this.

GPU_FILE says which file the environment was made from.
"""

from __future__ import annotations

import importlib
import os
import re
from importlib.metadata import version
from unittest import mock

import pytest
import wrapt
from conftest import ROOT

from kvshare.hooks.patch import PATCHES, Patch

os.environ["PYTHONHASHSEED"] = "0"
FILE = os.environ.get("GPU_FILE", "gpu")
LOCK = (ROOT / "requirements" / f"{FILE}.txt").read_text()
PINS = dict(re.findall(r"^([^#\s;]+)==([^\s;]+)", LOCK, re.MULTILINE))
SERVES_MP = PINS["lmcache"] == "0.5.6"
"""All names that the mp backend needs are in that LMCache only."""

NOT_HERE = ("lmcache_ascend",)
MP_ONLY = (
    "lmcache.integration.vllm.lmcache_mp",
    "lmcache.integration.vllm.vllm_multi_process",
    "lmcache.v1.multiprocess",
    "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector",
)


@pytest.fixture(scope="session")
def hooks() -> list[Patch]:
    """All patches: both plugins are registered, and each module that they hook is imported."""
    from kvshare import vllm_plugin

    verls: list[str] = []
    really_register = wrapt.register_post_import_hook

    def register(hook, name):
        verls.append(name)
        return really_register(hook, name)

    with mock.patch.object(wrapt, "register_post_import_hook", register):
        importlib.import_module("kvshare.verl_plugin")
    vllm_plugin.register()
    for name in [*hooked(), *verls]:
        importlib.import_module(name)
    modules = {patch.module.__name__ for patch in PATCHES}
    print(f"\n{len(PATCHES)} functions patched in {len(modules)} modules; {len(verls)} hooks of verl")
    return PATCHES


def hooked() -> list[str]:
    """Modules that the vLLM plugin has hooks for, of those that this file's backends use."""
    from kvshare import vllm_plugin

    names = dict.fromkeys(module for module, _ in vllm_plugin._HOOKS)
    return [n for n in names if not n.startswith(NOT_HERE) and (SERVES_MP or not n.startswith(MP_ONLY))]


def pytest_report_header():
    main = ("torch", "vllm", "lmcache", "verl", "transformers", "ray", "nixl")
    return f"requirements/{FILE}.txt: " + ", ".join(f"{name} {version(name)}" for name in main)
