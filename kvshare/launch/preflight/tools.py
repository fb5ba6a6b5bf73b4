"""Checks the tools of a job whose conversations have several turns."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from kvshare.core.job import Job, one_line


def tools(job: Job) -> Iterator[str]:
    """Load the tools as verl's agent loop does, and check that model and data go with them."""
    turns = job.rollout.multi_turn
    if not turns.enable:
        job.facts["tools"] = "none, conversations have one turn"
        return
    from verl.experimental.agent_loop.tool_parser import ToolParser
    from verl.tools.tool_registry import load_all_tools
    from verl.utils.import_utils import resolve_config_path

    paths = [path and resolve_config_path(str(path)) for path in (turns.tool_config_path, turns.function_tool_path)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # verl prints each schema
            found = load_all_tools(*paths)
            ToolParser.get_tool_parser(turns.format, job.model.tokenizer)
    except Exception as error:
        yield f"verl cannot load the tools of rollout.multi_turn ({one_line(error)}): correct it"
        return
    job.facts["tools"] = ", ".join(tool.name for tool in found) or "none"
    schemas = [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in found]
    if schemas and not _shows(job.model.tokenizer, schemas):
        yield "the model's chat template does not show tools, so the model cannot call them: set another MODEL_PATH"
    if any(type(tool).__module__ == "kvshare.tools.verl_tools" for tool in found):
        yield from _for_the_checker(job)


def _shows(tokenizer: Any, schemas: list[dict[str, Any]]) -> bool:
    messages = [{"role": "user", "content": "?"}]
    with_tools, without = (tokenizer.apply_chat_template(messages, tools=t, tokenize=False) for t in (schemas, None))
    return with_tools != without


def _for_the_checker(job: Job) -> Iterator[str]:
    from datasets import load_dataset

    for key in ("train_files", "val_files"):
        files = job.config.data[key]
        for file in [files] if isinstance(files, str) else files or ():
            if file.endswith(".parquet") and "://" not in file:
                row: dict = next(iter(load_dataset("parquet", data_files=file, split="train", streaming=True)), {})
                if "checker" not in ((row.get("extra_info") or {}).get("tools_kwargs") or {}):
                    yield f"data.{key}: {file} has nothing for the checker: make it with kvshare prepare --tools"
