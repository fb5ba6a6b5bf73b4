"""A training job that passes preflight, to change one thing of."""

import json
import os
from pathlib import Path

import pytest

from kvshare.launch import preflight

ROOT = Path(__file__).resolve().parents[2]
REMOTE = ROOT / "config" / "remote_backend_config.yaml"
MP = ROOT / "config" / "mp_backend_config.yaml"
P2P = ROOT / "config" / "p2p_backend_config.yaml"
CONNECTOR = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}


@pytest.fixture
def environment(monkeypatch, lmcache_server):
    """What a launcher exports before preflight."""
    for name in [n for n in os.environ if n.lower().startswith("lmcache_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(REMOTE))
    monkeypatch.setenv("LMCACHE_REMOTE_URL", f"lm://{lmcache_server}")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setattr("ray._private.utils.get_system_memory", lambda: 64 * 2**30)
    monkeypatch.setattr("ray._private.utils.get_used_memory", lambda: 0)
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "kvshare.verl_plugin")
    return monkeypatch


@pytest.fixture
def job(environment, data, model):
    def make(*overrides: str, backend: str = "remote", device: str = "cpu") -> preflight.Job:
        return preflight.Job(
            backend,
            device,
            [
                *("--config-dir", str(ROOT / "config"), "--config-name", "gsm8k_cpu"),
                "trainer.nnodes=1",
                "trainer.n_gpus_per_node=2",
                "algorithm.adv_estimator=grpo",
                f"actor_rollout_ref.model.path='{model}'",
                f"data.train_files='{data}/train.parquet'",
                f"data.val_files='{data}/test.parquet'",
                f"+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config='{json.dumps(CONNECTOR)}'",
                f"actor_rollout_ref.rollout.router_config_path='{ROOT / 'config' / 'router.yaml'}'",
                "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=1_000_000_000",
                *overrides,
            ],
        )

    return make
