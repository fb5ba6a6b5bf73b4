"""Jobs of somebody's own: argument lists as in verl's examples, with nothing of ours but the pasted lines."""

import json

import pytest

from kvshare.launch import environment as environments
from kvshare.launch import paste, preflight
from kvshare.record import report

ROLLOUT = "actor_rollout_ref.rollout"
VLLM = f"{ROLLOUT}.engine_kwargs.vllm"
ENVIRONMENT = "ray_kwargs.ray_init.runtime_env.env_vars"


def grpo(data, model) -> list[str]:
    """GSM8K with GRPO and FSDP, in a checkout of verl: no --config-dir, no --config-name."""
    return [
        *("algorithm.adv_estimator=grpo", f"data.train_files={data}/train.parquet"),
        *(f"data.val_files={data}/test.parquet", "data.train_batch_size=4", "data.max_prompt_length=1536"),
        *("data.max_response_length=64", "data.filter_overlong_prompts=True", "data.truncation=error"),
        *(f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.actor.optim.lr=1e-6"),
        *("actor_rollout_ref.model.use_remove_padding=True", "actor_rollout_ref.actor.ppo_mini_batch_size=4"),
        *("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "actor_rollout_ref.actor.use_kl_loss=True"),
        *("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2", f"{ROLLOUT}.n=4", f"{ROLLOUT}.name=vllm"),
        *(f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=2", f"{ROLLOUT}.tensor_model_parallel_size=2"),
        *(f"{ROLLOUT}.gpu_memory_utilization=0.6", 'trainer.logger=["console","wandb"]'),
        *("trainer.n_gpus_per_node=8", "trainer.nnodes=1", "trainer.save_freq=20", "trainer.total_epochs=15"),
    ]


def multi_turn(data, model) -> list[str]:
    tools = data / "tools.yaml"
    function = {"name": "score", "description": "d", "parameters": {"type": "object", "properties": {}, "required": []}}
    schema = {"type": "function", "function": function}
    name = "verl.tools.base_tool.BaseTool"
    tools.write_text(json.dumps({"tools": [{"class_name": name, "config": {"type": "native"}, "tool_schema": schema}]}))
    return [
        *(*grpo(data, model), "data.return_raw_chat=True", f"{ROLLOUT}.multi_turn.enable=True"),
        *(f"{ROLLOUT}.multi_turn.tool_config_path={tools}", f"{ROLLOUT}.multi_turn.max_assistant_turns=3"),
        *(f"{ROLLOUT}.agent.default_agent_loop=tool_agent", "--config-name=ppo_trainer"),
    ]


def separate(data, model) -> list[str]:
    return [
        *(*grpo(data, model), "trainer.n_gpus_per_node=2", "trainer.v1.trainer_mode=separate_async"),
        *(f"{ROLLOUT}.nnodes=1", f"{ROLLOUT}.n_gpus_per_node=6", "trainer.v1.separate_async.parameter_sync_step=1"),
        f"{ROLLOUT}.checkpoint_engine.backend=zmq",
        f"{ROLLOUT}.checkpoint_engine.custom_backend_module=kvshare.hooks.verl.cpu_checkpoint_engine",
    ]


def with_keys_of_their_own(data, model) -> list[str]:
    """The same keys as in the pasted lines, nested and not."""
    return [
        *(*grpo(data, model), f"+{VLLM}.kv_transfer_config.kv_connector=NixlConnector"),
        *(f"+{VLLM}.kv_transfer_config.kv_role=kv_consumer", f"+{ENVIRONMENT}.PYTHONHASHSEED=7"),
        *(f"+{ENVIRONMENT}.LMCACHE_CONFIG_FILE=/theirs.yaml", f"{ROLLOUT}.router_config_path=/theirs.yaml"),
    ]


def with_configs_of_their_own(data, model) -> list[str]:
    """Their config is elsewhere, and names another folder for its parts."""
    for name, text in {
        "mine.yaml": f"hydra: {{searchpath: ['file://{data}/parts']}}\ndefaults: [ppo_trainer, lengths: short]\n",
        "parts/lengths/short.yaml": "# @package _global_\ndata: {filter_overlong_prompts_workers: 3}\n",
    }.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text)
    return ["--config-dir", str(data), "--config-name", "mine", *grpo(data, model)]


JOBS = {
    grpo: "4 replicas of 2 cpu",
    multi_turn: "4 replicas of 2 cpu",
    separate: "4 replicas of 2 cpu (1 hybrid for validation only, 3 standalone)",
    with_keys_of_their_own: "4 replicas of 2 cpu",
    with_configs_of_their_own: "4 replicas of 2 cpu",
}


@pytest.fixture
def pasted(environment, tmp_path):
    """Export what `kvshare overrides` prints, and return its overrides."""
    environment.setenv("KVSHARE_RUN_DIR", str(tmp_path / "run"))
    exports, overrides = paste.overrides("remote", "cpu")
    for name, value in exports.items():
        environment.setenv(name, value)
    return overrides


@pytest.mark.parametrize("own", JOBS, ids=lambda own: own.__name__)
def test_lines_paste_into_any_job(own, pasted, data, model, tmp_path):
    job = preflight.Job("remote", "cpu", [*own(data, model), f"+{VLLM}.kv_cache_memory_bytes=1000000000", *pasted])
    findings = preflight.run(job)
    assert preflight.errors(findings) == []
    assert job.facts["replicas"] == JOBS[own]
    assert job.connectors[0].kv_role == "kv_both"
    assert job.config.ray_kwargs.ray_init.runtime_env.env_vars.PYTHONHASHSEED == "0"
    preflight.record(job, tmp_path / "run")
    assert report.write(tmp_path / "run")["replicas"] == 4


def test_passwords_are_not_passed_on(environment):
    """verl prints its overrides, and Hydra keeps them in a file."""
    environment.setenv("LMCACHE_REMOTE_URL", "redis://me:hidden@host:1")
    environment.setenv("LMCACHE_RESP_PASSWORD", "hidden")
    exports, overrides = paste.overrides("remote", "cpu")
    assert exports["LMCACHE_REMOTE_URL"] == "redis://me:hidden@host:1"
    assert "hidden" not in "".join(overrides)
    lines = environments.as_bash(exports)
    assert "hidden" not in "".join(lines)
    assert "# LMCACHE_REMOTE_URL has a password: export it yourself" in lines
