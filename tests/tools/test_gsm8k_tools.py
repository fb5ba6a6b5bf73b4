"""The calculator and the checker, by themselves and as verl makes and calls them."""

import asyncio
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from verl.tools.tool_registry import initialize_tools_from_config
from verl.utils.reward_score import gsm8k as reward

from kvshare.tools import gsm8k
from kvshare.tools.gsm8k_tools import calculate, check

CONFIG = Path(__file__).resolve().parents[2] / "config" / "tools.yaml"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3 * 7", "21"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("1000000 * 1234567", "1234567000000"),
        ("2 / 3", "0.6667"),
        ("1 / (2 - 2)", "This divides by 0."),
        ("9 ** 9", "This is no expression of numbers, + - * / and brackets."),
        ("__import__('os')", "This is no expression of numbers, + - * / and brackets."),
        ("True + 1", "This is no expression of numbers, + - * / and brackets."),
        ("", "This is no expression of numbers, + - * / and brackets."),
        ("(" * 150, "This is no expression of numbers, + - * / and brackets."),
        ("1e308 * 10", "inf"),
        ("9" * 201, "This has more than 200 characters."),
    ],
)
def test_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(("answer", "right"), [("1,000", True), ("1000.0", True), ("$1000", True), ("999", False)])
def test_checker(answer, right):
    assert check(answer, "1000", "hint") == (f"{answer} is right." if right else f"{answer} is wrong. hint")


def test_no_number_is_wrong():
    assert check("twelve", "12", "hint") == "twelve is wrong. hint"


def test_verl_calls_them_with_what_the_data_has(tmp_path):
    gsm8k.write(gsm8k.generate(train=8, test=2, seed=0, tools=True), tmp_path, shots=2, limit=2, tools=True)
    row = pq.read_table(tmp_path / "train.parquet").to_pylist()[0]
    tools = {tool.name: tool for tool in initialize_tools_from_config(str(CONFIG))}
    truth = row["reward_model"]["ground_truth"]

    async def call(name, **parameters):
        given = row["extra_info"]["tools_kwargs"].get(name, {})
        instance, _ = await tools[name].create(create_kwargs=given.get("create_kwargs", {}))
        response, score, _ = await tools[name].execute(instance, parameters)
        await tools[name].release(instance)
        return response.text, score

    assert asyncio.run(call("calculator", expression="6 * 7")) == ("42", 0.0)
    assert asyncio.run(call("checker", answer=truth)) == (f"{truth} is right.", 0.0)
    wrong, _ = asyncio.run(call("checker", answer="-1"))
    assert wrong.count("Question: ") == gsm8k.HINTS
    assert reward.compute_score(wrong, truth) == 0  # the hint is no final answer
    assert tools["checker"]._problems == {}


def test_the_schemas_are_rendered_as_verl_renders_them():
    """The tiny model learns from config/tools.yaml as it is written."""
    made = [
        tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True)
        for tool in initialize_tools_from_config(str(CONFIG))
    ]
    written = [tool["tool_schema"] for tool in yaml.safe_load(CONFIG.read_text())["tools"]]
    assert json.dumps(made) == json.dumps(written)


def test_generated_problems_take_two_steps():
    for problem in gsm8k.generate(train=300, test=1, seed=3, tools=True)["train"]:
        steps = [step.partition(">>")[0] for step in problem["answer"].split("<<")[1:]]
        assert len(steps) == 2
        for step in steps:
            left, _, right = step.partition("=")
            assert calculate(left) == right
        assert problem["answer"].endswith(f"#### {right}")
        assert int(right) >= 0
