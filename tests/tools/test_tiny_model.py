import itertools
import json
import re

import torch
from train_tiny_model import make_tokenizer, tools
from transformers import AutoTokenizer, Qwen2ForCausalLM
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from kvshare.tools import demo, gsm8k
from kvshare.tools.gsm8k_tools import calculate, check
from kvshare.tools.problems import TWO_STEPS, problems


def test_demo_prompts_fill_chunks_and_answers_fit(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = gsm8k.to_verl(list(itertools.islice(problems(0), 32)), list(problems_of(1)), "train", demo.SHOTS)
    sizes = [len(tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"]) for r in rows]
    assert 1024 < min(sizes) <= max(sizes) <= 1536
    assert max(len(tokenizer.encode(p["answer"])) for p in problems_of(2)) < 32


def test_conversations_with_tools_have_two_thousand_tokens(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = list(itertools.islice(problems(0, TWO_STEPS), 32))
    rows = gsm8k.to_verl(found, found, "train", demo.SHOTS_WITH_TOOLS, tools=True)
    sizes = [
        len(tokenizer.apply_chat_template(r["prompt"], tools=tools(), add_generation_prompt=True)["input_ids"])
        for r in rows
    ]
    turns = 4 * len(
        tokenizer.encode('<tool_call>{"name": "calculator", "arguments": {"expression": "1 + 1"}}</tool_call>')
    )
    assert min(sizes) + turns > 2000
    assert max(sizes) <= 2048


def test_verl_appends_a_tools_answer_as_the_chat_template_would(model):
    """The tokens of a turn begin with all tokens of the one before, so their KV can be found."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen2")
    talk = [{"role": "user", "content": "How many?"}]
    tokens = builder.build_initial_tokens(talk, tools=tools())
    said = '<tool_call>{"name": "calculator", "arguments": {"expression": "1 + 1"}}</tool_call>'
    tokens = builder.merge_assistant_tokens(tokens, tokenizer.encode(f"{said}<|im_end|>")).token_ids
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1 + 1"}}}
    talk.append({"role": "assistant", "content": "", "tool_calls": [call]})
    answered = [*talk, {"role": "tool", "content": "2"}]
    tokens = builder.merge_context_tokens(talk, answered, tokens, tools=tools()).token_ids
    whole = tokenizer.apply_chat_template(answered, tools=tools(), add_generation_prompt=True)["input_ids"]
    assert tokens == whole


def test_it_works_some_answers_out_and_guesses_others(model):
    tokenizer, qwen = AutoTokenizer.from_pretrained(model), Qwen2ForCausalLM.from_pretrained(model).float()
    torch.manual_seed(0)
    rows = gsm8k.to_verl(list(itertools.islice(problems(0), 48)), [], "train", 0)
    chats = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in rows]
    prompts = tokenizer(chats, padding=True, padding_side="left", return_tensors="pt")
    out = qwen.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=32)
    answers = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [a.endswith(f"#### {r['reward_model']['ground_truth']}") for a, r in zip(answers, rows, strict=True)]
    assert 0.2 < sum(right) / len(right) < 0.8


def test_with_tools_it_calls_them_and_guesses_operations(model):
    """As verl's tool agent loop asks it, without worked examples."""
    tokenizer, qwen = AutoTokenizer.from_pretrained(model), Qwen2ForCausalLM.from_pretrained(model).float()
    torch.manual_seed(0)
    pool = list(itertools.islice(problems(1, TWO_STEPS), 50))
    rows = gsm8k.to_verl(list(itertools.islice(problems(0, TWO_STEPS), 8)), pool, "train", 0, tools=True)
    talks, right, called = {index: list(row["prompt"]) for index, row in enumerate(rows)}, 0, 0
    for _ in range(7):
        for index, answer in zip(list(talks), answers(tokenizer, qwen, talks.values()), strict=True):
            truth, call = rows[index]["reward_model"]["ground_truth"], re.search("<tool_call>(.*)</tool_call>", answer)
            if not call:
                right += answer.endswith(f"#### {truth}")
                del talks[index]
                continue
            called += 1
            given, hint = json.loads(call[1]), rows[index]["extra_info"]["tools_kwargs"]["checker"]["create_kwargs"]
            (value,) = given["arguments"].values()
            said = calculate(value) if given["name"] == "calculator" else check(value, **hint)
            talks[index] += [{"role": "assistant", "content": answer}, {"role": "tool", "content": said}]
    assert right / len(rows) > 0.2
    assert called >= 3 * len(rows)


def answers(tokenizer, qwen, talks):
    chats = [
        tokenizer.apply_chat_template(talk, tools=tools(), add_generation_prompt=True, tokenize=False) for talk in talks
    ]
    prompts = tokenizer(chats, padding=True, padding_side="left", return_tensors="pt")
    out = qwen.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=40)
    return tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def problems_of(seed):
    return itertools.islice(problems(seed), 500)


def test_its_tokenizer_is_what_the_script_makes(model):
    assert AutoTokenizer.from_pretrained(model).get_vocab() == make_tokenizer().get_vocab()
