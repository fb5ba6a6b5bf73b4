"""The connector the NPU launchers name, in the vLLM of the matrix."""

import ast
import inspect
import json
from types import SimpleNamespace

import pytest
from test_launchers import compose


@pytest.fixture(params=["remote", "p2p"])
def transfer(request):
    from vllm.config import KVTransferConfig

    config = compose(f"run_qwen_{request.param}_backend_npu.sh")
    return KVTransferConfig(**json.loads(config.actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config))


def test_it_exists_with_the_constructor_we_replace(transfer, lmcache_ascend):
    file = lmcache_ascend.parent.joinpath(*transfer.kv_connector_module_path.split(".")).with_suffix(".py")
    (cls,) = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    (init,) = cls.body
    assert (cls.name, [ast.unparse(base) for base in cls.bases]) == (
        transfer.kv_connector,
        ["LMCacheConnectorV1Dynamic"],
    )
    assert [arg.arg for arg in init.args.args] == ["self", "vllm_config", "role"]
    assert len(init.body) == 1  # nothing but super().__init__, which ours calls with all three


def test_vllm_takes_it(transfer, lmcache_ascend, monkeypatch):
    """vLLM 0.23 refuses its two arguments; with the plugin it is made with three, and answers reset_cache()."""
    from lmcache.integration.vllm import lmcache_connector_v1
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    engine = SimpleNamespace(_request_trackers={})
    monkeypatch.setattr(lmcache_connector_v1, "LMCacheConnectorV1Impl", lambda *args: engine)
    cls = KVConnectorFactory.get_connector_class(transfer)
    connector = cls(SimpleNamespace(kv_transfer_config=transfer), "role", "layout")
    assert (type(connector).__name__, connector._kv_cache_config) == (transfer.kv_connector, "layout")
    assert connector.reset_cache() is True


def test_why_not_vllm_ascends_own(lmcache_ascend):
    """LMCacheAscendConnector hands on what vLLM 0.23 tells it at each step: not ids of requests any longer."""
    from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorMetadata
    from lmcache_ascend.integration.vllm.vllm_v1_adapter import LMCacheAscendConnectorV1Impl
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    assert "kv_connector_metadata" in inspect.signature(KVConnectorBase_V1.handle_preemptions).parameters
    worker = SimpleNamespace(lmcache_engine=object())
    with pytest.raises(TypeError, match="not iterable"):
        LMCacheAscendConnectorV1Impl.handle_preemptions(worker, LMCacheConnectorMetadata())


def test_kvshares_plugin_comes_before_the_connector():
    """vLLM looks at the connector's class when it makes its config; it must have loaded plugins by then."""
    from vllm.engine.arg_utils import EngineArgs

    assert "load_general_plugins()" in inspect.getsource(EngineArgs.__post_init__)


def test_verl_composes_for_npu(transfer):
    assert transfer.kv_role == "kv_both"
    assert transfer.kv_load_failure_policy == "recompute"
    config = compose("run_qwen_p2p_backend_npu.sh", N_DEVICES="4")
    assert (config.trainer.device, config.trainer.n_gpus_per_node) == ("npu", 4)
    actor = config.actor_rollout_ref.actor
    assert not actor.use_torch_compile
    assert not actor.fsdp_config.use_torch_compile
