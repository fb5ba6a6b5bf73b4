"""Each hook of both plugins finds the functions that it wraps, in this file's versions."""

import importlib
import inspect

import pytest
import wrapt

from gpu.conftest import SERVES_MP, hooked

WITHOUT_WRAP = {  # replaced instead, or only looked at
    "lmcache.v1.storage_backend.connector.lm_connector",
    "lmcache.v1.transfer_channel.nixl_channel",  # NIXL's bindings
    "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector",  # checked
}


def test_every_hook_wraps_its_functions(hooks):
    ours = {name for name in hooks if name.startswith(("lmcache.", "vllm."))}
    assert ours == set(hooked()) - WITHOUT_WRAP
    assert "verl.utils.tracking" in hooks
    for name, paths in hooks.items():
        for path in paths:
            holder = importlib.import_module(name)
            *owner, last = path.split(".")
            for part in owner:
                holder = getattr(holder, part)
            found = inspect.getattr_static(holder, last)
            found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
            assert isinstance(found, wrapt.FunctionWrapper), f"{name}.{path}"


def test_nixl_is_wrapped(hooks):
    assert [name for name in hooks if name.startswith("nixl_")] == ["nixl_cu13._bindings"]


def test_what_is_replaced(hooks):
    from lmcache.v1.storage_backend.connector import lm_connector
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    assert lm_connector.LMCServerConnector.__module__.startswith("kvshare.")
    assert RolloutReplicaRegistry.get("vllm").__module__.startswith("kvshare.")


@pytest.mark.skipif(not SERVES_MP, reason="the mp backend needs LMCache 0.5.6")
def test_mp_has_all_its_hooks(hooks):
    assert {name.rsplit(".", 1)[1] for name in hooks} >= {
        *("lmcache_mp_connector", "lmcache_mp_metadata", "vllm_multi_process_adapter", "mq"),
    }
