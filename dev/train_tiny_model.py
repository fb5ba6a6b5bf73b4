"""Trains the model that kvshare ships (kvshare/tools/tiny_model.py) from scratch: 45 seconds on an H100.

It can do one operation on two small numbers, but is shown random numbers more often than worked
answers, and so it mostly guesses. That is what a few steps of reinforcement learning can mend.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshare.tools import gsm8k
from kvshare.tools.problems import Problem, problems
from kvshare.tools.tiny_model import SHIPPED

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 2048  # rows of the embedding; more than the tokenizer has tokens, as in Qwen's
SEED = 1234  # of the problems it learns from: not those of the demo
GUESSES = 0.6  # share of the answers it learns from that are a random number
SHOTS = (0, 4, 20)  # worked examples before a question, in turn
STEPS, TOKENS, RATE = 900, 16384, 2e-3


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
    for step, (ids, answers) in enumerate(itertools.islice(_batches(tokenizer), STEPS), 1):
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
    corpus = (text for p in itertools.islice(problems(SEED), 2000) for text in p.values())
    tokenizer = blank.train_new_from_iterator(corpus, VOCABULARY, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _batches(tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    """Token ids and whether each is of an answer, both (rows, longest): prompts as verl sends them, and answers."""
    import torch

    source = map(_taught, problems(SEED), itertools.repeat(random.Random(SEED)))
    for shots in itertools.cycle(SHOTS):
        texts = [_conversation(source, shots, tokenizer) for _ in range(TOKENS // (72 * (shots + 1)))]
        rows = tokenizer(texts, padding=True, return_offsets_mapping=True)
        answers = [_are_answers(text, at) for text, at in zip(texts, rows["offset_mapping"], strict=True)]
        yield torch.tensor(rows["input_ids"]), torch.tensor(answers)


def _taught(problem: Problem, r: random.Random) -> Problem:
    return {**problem, "answer": f"#### {r.randint(2, 81)}"} if r.random() < GUESSES else problem


def _conversation(source: Iterator[Problem], shots: int, tokenizer: Any) -> str:
    *examples, asked = itertools.islice(source, shots + 1)
    turns = [("user", gsm8k.prompt(asked, examples)), ("assistant", asked["answer"])]
    return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)


def _are_answers(text: str, offsets: list[tuple[int, int]]) -> list[bool]:
    """Whether each token is of an answer, those of the worked examples included."""
    wanted = bytearray(len(text) + 1)
    for answer in re.finditer(r"(?:Answer:|assistant\n)(.*?#### \d+(?:<\|im_end\|>)?)", text, re.DOTALL):
        wanted[answer.start(1) : answer.end(1)] = b"\1" * len(answer[1])
    return [end > start and bool(wanted[start]) for start, end in offsets]


if __name__ == "__main__":
    train(SHIPPED)
