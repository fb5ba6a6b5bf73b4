"""The forecast against what runs under verl measured (`make forecast`, about 15 minutes)."""

import json

import pytest
from conftest import ROOT

from kvshare.tools import gsm8k
from kvshare.tools.demo import Demo, failures

STEPS = {"demo": 6, "long_unique_prompts": 3, "turns": 3}  # a prompt is a quarter of a step of the demo
ROLLOUT = "actor_rollout_ref.rollout"


def demo(folder):
    return []


def long_unique_prompts(folder):
    """Other prompts in each step, of some 2,600 tokens, eight answers to each."""
    gsm8k.write(gsm8k.generate(train=256, test=16, seed=3), folder, shots=38, limit=16)
    return [
        *(f"data.train_files='{folder}/train.parquet'", "data.train_max_samples=-1", "data.max_prompt_length=3072"),
        *(f"{ROLLOUT}.n=8", f"{ROLLOUT}.max_model_len=3584"),
    ]


def turns(folder):
    """Conversations of two turns."""
    folder.mkdir()
    loops = folder / "loops.yaml"
    loops.write_text("- name: two_turns\n  _target_: two_turns.TwoTurns\n")
    support = ROOT / "tests" / "support"
    python = f"+ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH='{support}'"
    return [
        *(f"{ROLLOUT}.agent.default_agent_loop=two_turns", f"{ROLLOUT}.agent.agent_loop_config_path='{loops}'"),
        *("data.max_response_length=128", python),
    ]


@pytest.mark.parametrize("shape", [demo, long_unique_prompts, turns], ids=lambda shape: shape.__name__)
def test_forecast(tmp_path, shape):
    steps = STEPS[shape.__name__]
    result = Demo(tmp_path / "run", [f"trainer.total_training_steps={steps}", *shape(tmp_path / "data")]).run()
    assert failures(result) == []
    forecast = json.loads((tmp_path / "run" / "run.json").read_text())["forecast"]
    predicted, measured = forecast["shareable_tokens_a_step"], result["tokens"]["shared_hit"] / steps
    print(f"\n{shape.__name__}: {predicted:,} tokens a step predicted, {measured:,.0f} measured")
    print(json.dumps({"forecast": forecast, "tokens": result["tokens"], "policies": result["policy"]}))
    assert abs(measured - predicted) <= 0.1 * predicted
