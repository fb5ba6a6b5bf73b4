"""A conversation of verl's own tool agent loop with the recipe, its tools and data; only the engine is scripted."""

import asyncio

import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.tool_registry import load_all_tools
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.reward_score import gsm8k as reward
from verl.workers.rollout.replica import TokenOutput

from kvshare.core.job import verl_config
from kvshare.tools import demo, gsm8k


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setenv("KVSHARE_CONFIG", str(ROOT / "config"))
    with initialize_config_dir(version_base=None, config_dir=str(ROOT / "config")):
        return compose("gsm8k_tools_cpu", overrides=[f"hydra.searchpath=[file://{verl_config()}]"])


class Engine:
    """Answers with the texts that it was given, and notes the prompts."""

    def __init__(self, tokenizer, texts):
        self.answers = [tokenizer.encode(f"{text}<|im_end|>") for text in texts]
        self.prompts = []

    async def generate(self, request_id, prompt_ids, **_):
        answer = self.answers[len(self.prompts)]
        self.prompts.append(list(prompt_ids))
        return TokenOutput(token_ids=answer, log_probs=[0.0] * len(answer), extra_fields={"global_steps": 1})


def call(name, parameter, value):
    return f'<tool_call>{{"name": "{name}", "arguments": {{"{parameter}": "{value}"}}}}</tool_call>'


def test_two_attempts(config, model, tmp_path):
    gsm8k.write(gsm8k.generate(64, 4, 0, tools=True), tmp_path, demo.SHOTS_WITH_TOOLS, limit=1, tools=True)
    row = pq.read_table(tmp_path / "train.parquet").to_pylist()[0]
    truth, tokenizer = row["reward_model"]["ground_truth"], AutoTokenizer.from_pretrained(model)
    wrong = [call("calculator", "expression", "1 + 1"), call("checker", "answer", "-1")]
    right = [call("calculator", "expression", f"{truth} + 0"), call("checker", "answer", truth), f"#### {truth}"]
    engine = Engine(tokenizer, [*wrong, *right])
    rollout = config.actor_rollout_ref.rollout

    async def talk():
        loop = ToolAgentLoop(
            DictConfigWrap(config),
            engine,
            tokenizer,
            None,
            RLHFDataset,
            DictConfigWrap(config.data),
            hf_model_type="qwen2",
            tools=ToolListWrap(load_all_tools(rollout.multi_turn.tool_config_path, None)),
        )
        extra = row["extra_info"]
        return await loop.run({}, raw_prompt=row["prompt"], extra_info=extra, tools_kwargs=extra["tools_kwargs"])

    made = asyncio.run(talk())
    assert made.num_turns == 10  # the question, five answers of the model, four of the tools
    for before, after, answer in zip(engine.prompts, engine.prompts[1:], engine.answers, strict=False):
        assert after[: len(before) + len(answer)] == before + answer  # so its KV can be found
    assert 2000 < len(made.prompt_ids) + len(made.response_ids) <= rollout.max_model_len
    assert sum(made.response_mask) == sum(map(len, engine.answers))  # only the model's tokens are trained on
    text = tokenizer.decode(made.response_ids, skip_special_tokens=True)
    assert text.count("is wrong. Solve it again.") == text.count("is right.") == 1
    assert reward.compute_score(text, truth) == 1
