"""The launchers' LMCache settings, taken by the real config classes of LMCache and LMCache-Ascend."""

import ast
import sys

import pytest
from lmcache.v1 import config
from test_launchers import dry_run

from kvshare.core import lmcache_settings, p2p_replica, ports


@pytest.fixture
def ascend_settings(lmcache_ascend, monkeypatch):
    """LMCache's settings with LMCache-Ascend's added, by its own function."""
    monkeypatch.setattr(config, "_CONFIG_DEFINITIONS", dict(config._CONFIG_DEFINITIONS))
    monkeypatch.setattr(config, "LMCacheEngineConfig", config.LMCacheEngineConfig)
    tree = ast.parse((lmcache_ascend / "__init__.py").read_text())
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "_patch_config"]
    namespace = {"sys": sys}
    exec(compile(ast.Module([function], []), "lmcache_ascend", "exec"), namespace)
    namespace["_patch_config"]()


def launched(monkeypatch, backend, **more):
    """LMCache's config as a process of the launcher's job sees it."""
    environment, _ = dry_run(f"run_qwen_{backend}_backend_npu.sh")
    for name, value in (environment | more).items():
        monkeypatch.setenv(name, value)
    definitions = lmcache_settings.definitions()
    path = environment["LMCACHE_CONFIG_FILE"]
    assert lmcache_settings.mistakes(lmcache_settings.read(path), definitions, path) == []
    assert lmcache_settings.environment_mistakes(environment | more, definitions) == []
    return lmcache_settings.effective(path)


def test_lmcache_takes_them(monkeypatch):
    assert launched(monkeypatch, "remote").remote_url == "lm://localhost:65432"
    settings = launched(monkeypatch, "p2p")
    assert (settings.enable_p2p, settings.transfer_channel) == (True, "hccl")
    assert settings.enable_async_loading is False
    assert settings.chunk_size == 256


def test_lmcache_ascends_own(monkeypatch, ascend_settings):
    settings = launched(monkeypatch, "p2p")
    assert (settings.p2p_use_npu, settings.p2p_pull_mode, settings.store_async) == (False, False, False)
    more = {"LMCACHE_P2P_USE_NPU": "true", "LMCACHE_P2P_NPU_BUFFER_SIZE": "134217728"}
    settings = launched(monkeypatch, "p2p", **more)
    assert (settings.p2p_use_npu, settings.p2p_npu_buffer_size) == (True, 134217728)
    wrong = {"LMCACHE_P2P_NPU_BUFFER_SIZE": "128M"}
    assert lmcache_settings.environment_mistakes(wrong, lmcache_settings.definitions())


def test_identity_of_replicas(monkeypatch):
    own = []
    for replica in range(4):
        settings = launched(monkeypatch, "p2p").to_dict()
        own.append(
            launched(monkeypatch, "p2p", **p2p_replica.identity(settings, replica, 2, "127.0.0.1", ports.free_port))
        )
        for key in ("lmcache_instance_id", "p2p_host", *p2p_replica.PORT_LISTS):
            monkeypatch.delenv(f"LMCACHE_{key.upper()}")
    assert len({c.lmcache_instance_id for c in own}) == 4
    for name in p2p_replica.PORT_LISTS:
        assert all(len(getattr(c, name)) == 2 for c in own)
        assert len({port for c in own for port in getattr(c, name)}) == 8
