import itertools

import torch
from train_tiny_model import make_tokenizer
from transformers import AutoTokenizer, Qwen2ForCausalLM

from kvshare.tools import demo, gsm8k
from kvshare.tools.problems import problems


def test_demo_prompts_fill_chunks_and_answers_fit(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = gsm8k.to_verl(list(itertools.islice(problems(0), 32)), list(problems_of(1)), "train", demo.SHOTS)
    sizes = [len(tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"]) for r in rows]
    assert 1024 < min(sizes) <= max(sizes) <= 1536
    assert max(len(tokenizer.encode(p["answer"])) for p in problems_of(2)) < 32


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


def problems_of(seed):
    return itertools.islice(problems(seed), 500)


def test_its_tokenizer_is_what_the_script_makes(model):
    assert AutoTokenizer.from_pretrained(model).get_vocab() == make_tokenizer().get_vocab()
