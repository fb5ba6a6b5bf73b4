"""The main job: verl trains on Ray, two vLLM replicas share KV through the real service of a backend."""

import json

import pytest
from conftest import PATIENCE

from kvshare.tools.demo import Demo, failures


@pytest.mark.parametrize("estimator", ["grpo", pytest.param("gae", marks=pytest.mark.slow)])
def test_two_steps(tmp_path, monkeypatch, pytestconfig, estimator):
    monkeypatch.setenv("ADV_ESTIMATOR", estimator)
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)
    backend = pytestconfig.getoption("backend")
    result = Demo(tmp_path / estimator, ["trainer.total_training_steps=2"], backend).run()
    assert failures(result) == []
    assert result["adv_estimator"] == estimator
    assert (result["steps"], result["replicas"]) == (2, 2)
    assert result["prefill_amplification"] < 1.5
    assert result["tokens"]["unknown_hit"] == 0
    assert len({p["policy"] for p in result["policy"]}) == 2
    assert json.loads((tmp_path / estimator / "report.json").read_text()) == result
