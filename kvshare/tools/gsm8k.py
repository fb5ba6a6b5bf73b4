"""Writes GSM8K as the parquet files that verl trains on, optionally with worked examples before each question."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

from kvshare.core.errors import UserError
from kvshare.tools.problems import ONE_STEP, TWO_STEPS, Problem, problems

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
WITH_TOOLS = (
    "Use the calculator for each step and let the checker look at the result. "
    'When it is right, output the final answer after "####".'
)
HINTS = 3  # solved problems that the checker shows with a wrong answer
SPLITS = ("train", "test")


def read_folder(folder: Path) -> dict[str, list[Problem]]:
    """Read train.jsonl and test.jsonl of a folder. Each line is an object with "question" and "answer"."""
    return {split: _read_jsonl(folder / f"{split}.jsonl") for split in SPLITS}


def read_hub() -> dict[str, list[Problem]]:
    """Read openai/gsm8k from the Hugging Face hub.

    Raises:
        OSError: the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        data = load_dataset("openai/gsm8k", "main")
    except Exception as error:  # its HTTP stack raises many types
        raise OSError(f"openai/gsm8k cannot be read from the hub: {error}") from error
    return {split: [dict(row) for row in data[split]] for split in SPLITS}


def generate(train: int, test: int, seed: int, tools: bool = False) -> dict[str, list[Problem]]:
    """Generate word problems in GSM8K's format, ``train`` and ``test`` of them; with ``tools`` they take two steps."""
    kinds = TWO_STEPS if tools else ONE_STEP
    return {
        "train": list(itertools.islice(problems(seed, kinds), train)),
        "test": list(itertools.islice(problems(seed + 1, kinds), test)),
    }


def to_verl(rows: list[Problem], pool: list[Problem], split: str, shots: int, tools: bool = False) -> list[dict]:
    """Convert problems to rows as in verl's GSM8K recipe.

    Args:
        rows: problems to ask.
        pool: problems to draw worked examples from. The draw differs between questions, not between calls.
        split: "train" or "test", for ``extra_info``.
        shots: number of worked examples before each question.
        tools: ask to use tools (gsm8k_tools.py), and add what the checker needs.
    """
    out = []
    for index, row in enumerate(rows):
        r = random.Random(f"{split}-{index}")
        others = [p for p in pool if p["question"] != row["question"]]
        examples = r.sample(others, shots) if shots else []
        extra = {"split": split, "index": index, "question": row["question"], "answer": row["answer"]}
        if tools:
            create = {"ground_truth": final_answer(row), "hint": hint(r.sample(others, min(HINTS, len(others))))}
            extra |= {"need_tools_kwargs": True, "tools_kwargs": {"checker": {"create_kwargs": create}}}
        out.append(
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": prompt(row, examples, WITH_TOOLS if tools else INSTRUCTION)}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": final_answer(row)},
                "extra_info": extra,
            }
        )
    return out


def hint(solved: list[Problem]) -> str:
    """What the checker shows with a wrong answer. No "####": verl's reward would take it for the final answer."""
    texts = [f"Question: {p['question']}\nSolution: {p['answer'].partition('####')[0].strip()}" for p in solved]
    return "\n\n".join(["Solve it again. These problems are like it:", *texts])


def prompt(row: Problem, examples: list[Problem], instruction: str = INSTRUCTION) -> str:
    """The text of a prompt: worked examples, then the question."""
    question = f"{row['question']} {instruction}"
    texts = [f"Question: {p['question']}\nAnswer: {p['answer']}" for p in examples]
    return "\n\n".join([*texts, f"Question: {question}"]) if examples else question


def final_answer(row: Problem) -> str:
    """The number after "####", without thousands separators."""
    match = re.search(r"#### (-?[0-9.,]+)", row["answer"])
    if not match:
        raise UserError(f'no "#### <number>" in the answer to: {row["question"][:60]}…')
    return match.group(1).replace(",", "")


def write(data: dict[str, list[Problem]], folder: Path, shots: int, limit: int | None, tools: bool = False) -> None:
    """Write train.parquet and test.parquet to ``folder``, at most ``limit`` rows each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if shots >= len(data["train"]):
        raise UserError(f"--shots {shots} needs more than {shots} training problems, there are {len(data['train'])}")
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        pool = data["train"][: max(1000, shots + 1)]
        pq.write_table(
            pa.Table.from_pylist(to_verl(data[split][:limit], pool, split, shots, tools)), folder / f"{split}.parquet"
        )


def _read_jsonl(path: Path) -> list[Problem]:
    if not path.is_file():
        raise UserError(f"{path} is missing: --source takes a folder with train.jsonl and test.jsonl")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"question": row["question"], "answer": row["answer"]})
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: not a JSON object with "question" and "answer"') from None
    if not rows:
        raise UserError(f"{path} is empty")
    return rows
