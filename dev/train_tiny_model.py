"""Trains the model that kvshare ships (kvshare/tools/tiny_model.py) from scratch: 2 minutes on an H200.

It can do one operation on two small numbers, but is shown random numbers more often than worked
answers, and so it mostly guesses. With tools it calls the calculator for each of two steps, but
often guesses the operation; then it asks the checker, and begins again after a wrong
answer. That is what a few steps of reinforcement learning can mend.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kvshare.tools import gsm8k
from kvshare.tools.gsm8k_tools import calculate, check
from kvshare.tools.problems import OPERATIONS, TWO_STEPS, Problem, problems
from kvshare.tools.tiny_model import SHIPPED

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
You can call these functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one with <tool_call>{"name": <name>, "arguments": <arguments>}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
VOCABULARY = 2048  # rows of the embedding; more than the tokenizer has tokens, as in Qwen's
SEED = 1234  # of the problems it learns from: not those of the demo
GUESSES = 0.6  # share of the answers it learns from that are a random number
GUESSED_OPERATIONS = 0.3  # share of the operations with tools that are random
SHOTS = (0, 4, 20)  # worked examples before a question, in turn
ATTEMPTS = 2  # at a problem with tools
STEPS, TOKENS, RATE = 4000, 16384, 2e-3
WORKERS = 8


def train(folder: Path) -> None:
    """Train it from scratch on problems and answers, the loss on answers only."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = make_tokenizer()
    model: Any = Qwen2ForCausalLM(_config(tokenizer))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    began = time.monotonic()
    for step, (ids, answers) in enumerate(itertools.islice(_loader(tokenizer), STEPS), 1):
        ids, answers = ids.to(device), answers.to(device)
        hidden = model.model(ids).last_hidden_state[:, :-1]
        loss = cross_entropy(model.lm_head(hidden[answers[:, 1:]]), ids[:, 1:][answers[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{time.monotonic() - began:5.0f} s  step {step}  loss {loss.item():.3f}", flush=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(tokenizer: Any) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tokenizer() -> Any:
    """Qwen's, with a vocabulary learned from our own problems: about one token a word of theirs."""
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"])
    one_step = (text for p in itertools.islice(problems(SEED), 2000) for text in p.values())
    blank.chat_template = CHAT_TEMPLATE
    with_tools = itertools.islice(_with_tools(random.Random(SEED), 0, blank), 1000)
    tokenizer = blank.train_new_from_iterator([*one_step, *with_tools], VOCABULARY, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def tools() -> list[dict[str, Any]]:
    """The schemas of the recipe's tools."""
    folder = Path(__file__).resolve().parents[1] / "config"
    return [tool["tool_schema"] for tool in yaml.safe_load((folder / "tools.yaml").read_text())["tools"]]


def _loader(tokenizer: Any) -> Iterable[tuple[Any, Any]]:
    """Batches without end. Worker processes make them, because one takes longer than a step of training on a GPU."""
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Batches(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Any, Any]]:
            return _batches(tokenizer, SEED + get_worker_info().id)

    return DataLoader(Batches(), batch_size=None, num_workers=WORKERS)


def _batches(tokenizer: Any, seed: int) -> Iterator[tuple[Any, Any]]:
    """Token ids and whether each is of an answer, both (rows, longest): prompts as verl sends them, and answers."""
    import torch

    r = random.Random(seed)
    for shots, make in itertools.cycle(itertools.product(SHOTS, (_without_tools, _with_tools))):
        conversations = make(r, shots, tokenizer)
        first = next(conversations)
        texts = [first, *itertools.islice(conversations, TOKENS // len(tokenizer(first)["input_ids"]) - 1)]
        rows = tokenizer(texts, padding=True, return_offsets_mapping=True)
        answers = [_are_answers(text, at) for text, at in zip(texts, rows["offset_mapping"], strict=True)]
        yield torch.tensor(rows["input_ids"]), torch.tensor(answers)


def _without_tools(r: random.Random, shots: int, tokenizer: Any) -> Iterator[str]:
    source = (_guessed(problem, r) for problem in problems(r.randrange(2**32)))
    while True:
        *examples, asked = itertools.islice(source, shots + 1)
        turns = [("user", gsm8k.prompt(asked, examples)), ("assistant", asked["answer"])]
        messages = [{"role": role, "content": text} for role, text in turns]
        yield tokenizer.apply_chat_template(messages, tokenize=False)


def _guessed(problem: Problem, r: random.Random) -> Problem:
    return {**problem, "answer": f"#### {r.randint(2, 81)}"} if r.random() < GUESSES else problem


def _with_tools(r: random.Random, shots: int, tokenizer: Any) -> Iterator[str]:
    source = problems(r.randrange(2**32), TWO_STEPS)
    while True:
        *examples, asked = itertools.islice(source, shots + 1)
        hint = gsm8k.hint(list(itertools.islice(source, gsm8k.HINTS)))
        messages = [{"role": "user", "content": gsm8k.prompt(asked, examples, gsm8k.WITH_TOOLS)}]
        for _ in range(ATTEMPTS):
            result, turns = _attempt(asked, r)
            right = result == gsm8k.final_answer(asked)
            looked = check(result, gsm8k.final_answer(asked), hint)
            messages += [*turns, *_call("checker", "answer", result), {"role": "tool", "content": looked}]
            if right:
                messages.append({"role": "assistant", "content": f"#### {result}"})
                break
        yield tokenizer.apply_chat_template(messages, tools=tools(), tokenize=False)


def _attempt(problem: Problem, r: random.Random) -> tuple[str, list[dict[str, str]]]:
    """The result of both steps, each often with a guessed operation, and the turns that led to it."""
    result, turns = "", []
    for first, sign, second in re.findall(r"<<(\d+)(.)(\d+)=", problem["answer"]):
        sign = r.choice(list(OPERATIONS)) if r.random() < GUESSED_OPERATIONS else sign
        expression = f"{result or first} {sign} {second}"
        result = calculate(expression)
        turns += [*_call("calculator", "expression", expression), {"role": "tool", "content": result}]
    return result, turns


def _call(name: str, parameter: str, value: str) -> list[dict[str, str]]:
    call = json.dumps({"name": name, "arguments": {parameter: value}})
    return [{"role": "assistant", "content": f"<tool_call>{call}</tool_call>"}]


def _are_answers(text: str, offsets: list[tuple[int, int]]) -> list[bool]:
    """Whether each token is of an answer, those of the worked examples included."""
    wanted = bytearray(len(text) + 1)
    answers = r"Answer: .*?#### \d+|<\|im_start\|>assistant\n.*?<\|im_end\|>"
    for answer in re.finditer(answers, text, re.DOTALL):
        begin = answer.start() + len(re.match(r"Answer:|<\|im_start\|>assistant\n", answer[0])[0])
        wanted[begin : answer.end()] = b"\1" * (answer.end() - begin)
    return [end > start and bool(wanted[start]) for start, end in offsets]


if __name__ == "__main__":
    train(SHIPPED)
