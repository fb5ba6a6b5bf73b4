"""Each hook of both plugins finds the functions that it wraps, in this file's versions."""

import functools
import inspect

import pytest
import wrapt

from gpu.conftest import SERVES_MP, hooked

ONLY_CHECKED = {"vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector"}


def test_every_hook_patches_its_functions(hooks):
    modules = {patch.module.__name__ for patch in hooks}
    assert modules >= set(hooked()) - ONLY_CHECKED - {"lmcache.v1.transfer_channel.nixl_channel"}  # it patches NIXL
    assert any(name.startswith("nixl_cu13.") for name in modules)
    assert "verl.utils.tracking" in modules
    for patch in hooks:
        owner = functools.reduce(getattr, patch.path.split(".")[:-1], patch.module)
        found = inspect.getattr_static(owner, patch.path.split(".")[-1])
        if isinstance(patch.known_by, tuple):  # parameters: it is wrapped, not replaced
            assert isinstance(found, wrapt.FunctionWrapper), f"{patch.module.__name__}.{patch.path}"


def test_what_is_replaced(hooks):
    from lmcache.v1.storage_backend.connector import lm_connector
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    assert lm_connector.LMCServerConnector.__module__.startswith("kvshare.")
    assert RolloutReplicaRegistry.get("vllm").__module__.startswith("kvshare.")


@pytest.mark.skipif(not SERVES_MP, reason="the mp backend needs LMCache 0.5.6")
def test_mp_has_all_its_hooks(hooks):
    assert {patch.module.__name__.rsplit(".", 1)[1] for patch in hooks} >= {
        *("lmcache_mp_connector", "lmcache_mp_metadata", "vllm_multi_process_adapter", "mq", "shm", "worker_transfer"),
    }
