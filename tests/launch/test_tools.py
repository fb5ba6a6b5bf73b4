"""Preflight and forecast of a job with tools, on verl's own classes."""

import json

import pytest
from jobs import ROOT

from kvshare.launch import preflight
from kvshare.tools import gsm8k

TOOLS = "actor_rollout_ref.rollout.multi_turn.tool_config_path"


@pytest.fixture
def make(job, tmp_path, monkeypatch):
    """The recipe with tools on its own data."""
    monkeypatch.setenv("KVSHARE_CONFIG", str(ROOT / "config"))
    gsm8k.write(gsm8k.generate(64, 4, 1, tools=True), tmp_path, shots=20, limit=8, tools=True)
    files = [f"data.{key}_files={tmp_path}/{name}.parquet" for key, name in (("train", "train"), ("val", "test"))]
    return lambda *more: job("--config-name", "gsm8k_tools_cpu", *files, *more)


def test_the_recipe_passes_and_its_working_set_is_forecast(make):
    made = make()
    assert preflight.errors(preflight.run(made)) == []
    assert made.facts["tools"] == "calculator, checker"
    found = made.forecast.working_set
    assert (found.prompts, found.samples, found.turns) == (4, 4, 7)
    assert found.pool_bytes == 2 * 28 * 128 * found.token_bytes
    assert found.evicted == 1 - 1 / found.r > 0
    assert json.loads(json.dumps(made.forecast.record()))["pool_bytes"] == found.pool_bytes


def test_a_pool_that_holds_all_gains_nothing(make):
    made = make("actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=4096")
    assert "offloading brings nothing" in preflight.forecast(made).facts()["R"]


def test_data_without_anything_for_the_checker(make, data):
    (line,) = preflight.errors(preflight.run(make(f"data.train_files={data}/train.parquet")))
    assert line.endswith("train.parquet has nothing for the checker: make it with kvshare prepare --tools")


def test_tools_that_cannot_be_loaded(make, tmp_path):
    (line,) = preflight.errors(preflight.run(make(f"{TOOLS}={tmp_path}/none.yaml")))
    assert line.startswith("verl cannot load the tools of rollout.multi_turn (")


def test_a_model_that_cannot_see_tools(make, model, tmp_path):
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (line,) = preflight.errors(
        preflight.run(make(f"actor_rollout_ref.model.custom_chat_template='{plain.read_text()}'"))
    )
    assert line.startswith("the model's chat template does not show tools")
