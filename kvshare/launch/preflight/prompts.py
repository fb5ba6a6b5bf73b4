"""Tokenizes the prompts of a run exactly as verl will: same data set, order and chat template."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

from kvshare.core.errors import UserError
from kvshare.core.job import Job, one_line

ENOUGH = 1_000_000
"""Tokens after which no further step is read. Tokenizing so many takes seconds."""


def steps(job: Job) -> tuple[list[list[list[int]]], int]:
    """Prompts of the first steps as token ids, and the number of prompts in the data.

    Raises:
        UserError: verl cannot read the data, or there are too few prompts for one step, with which it would fail with
            a ZeroDivisionError.
    """
    from datasets import disable_progress_bars
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import create_rl_dataset

    model = job.model
    # Filtering would tokenize the whole data set.
    data: Any = OmegaConf.merge(job.config.data, {"filter_overlong_prompts": False})
    disable_progress_bars()
    most = data.get("train_max_samples", -1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # verl prints while reading
            dataset = create_rl_dataset(data.train_files, data, model.tokenizer, model.processor, max_samples=most)
    except Exception as error:  # e.g. files whose columns differ in type
        raise UserError(f"verl cannot read data.train_files ({one_line(error)}): correct them") from None
    size = batch_size(job)
    found: list[list[list[int]]] = []
    left = 0
    prompts = (ids for ids in _tokenized(dataset, model, data) if len(ids) <= data.max_prompt_length)
    while sum(len(ids) for step in found for ids in step) < ENOUGH and (step := list(islice(prompts, size))):
        found.append(step)
    if found and len(found[-1]) < size and not (len(found) == 1 and _in_all_epochs(job, len(found[0])) >= size):
        left = len(found.pop())  # verl also drops an incomplete step
    if not found:
        raise UserError(
            f"{left} of {len(dataset)} prompts have at most data.max_prompt_length {data.max_prompt_length} tokens, "
            f"a step needs {size}: raise data.max_prompt_length, lower data.train_batch_size, or give more data"
        )
    return found, len(dataset)


def batch_size(job: Job) -> int:
    """Prompts between two weight updates.

    In verl's fully async trainer train_batch_size is 0, and the number is required_samples *
    trigger_parameter_sync_step (FullyAsyncRollouter).
    """
    if size := job.config.data.train_batch_size:
        return size
    asynchronous = job.config.async_training
    mini = job.config.actor_rollout_ref.actor.ppo_mini_batch_size
    return mini * asynchronous.require_batches * asynchronous.trigger_parameter_sync_step


def _in_all_epochs(job: Job, prompts: int) -> int:
    """Prompts that may make up a step: verl's fully async trainer goes on with the next epoch."""
    if job.config.data.train_batch_size:
        return prompts
    of_run = prompts * job.config.trainer.total_epochs
    return min(of_run, job.config.rollout.total_rollout_steps or of_run)


def _tokenized(dataset: Any, model: Any, data: Any) -> Iterator[list[int]]:
    """Token ids of each prompt, built like the first prompt of a conversation in verl 0.9.1's agent loop."""
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    if model.custom_chat_template is not None:
        model.tokenizer.chat_template = model.custom_chat_template
    builder = create_continuous_token_builder(
        model.tokenizer,
        hf_model_type=model.hf_config.model_type,
        chat_template_kwargs=data.get("apply_chat_template_kwargs", {}),
        mm_processor_kwargs=data.get("mm_processor_kwargs", {}),
        processor=model.processor,
    )
    for index in create_rl_sampler(data, dataset):
        messages = list(dataset[index]["raw_prompt"])
        yield list(builder.build_initial_tokens(messages, tools=dataset.tool_schemas))
