"""The tools of gsm8k_tools.py for verl's tool agent loop, which makes them from config/tools.yaml.

The data has what the checker must know of its problem (``gsm8k.to_verl``); verl gives it to ``create``.
"""

from __future__ import annotations

from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

from kvshare.tools.gsm8k_tools import calculate, check

Response = tuple[ToolResponse, float, dict]
"""What the tool answers, its reward and its metrics."""


class Calculator(BaseTool):
    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Response:
        return ToolResponse(text=calculate(str(parameters.get("expression")))), 0.0, {}


class Checker(BaseTool):
    def __init__(self, config: dict, tool_schema: OpenAIFunctionToolSchema) -> None:
        super().__init__(config, tool_schema)
        self._problems: dict[str, dict[str, str]] = {}  # by instance id

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        instance, response = await super().create(instance_id)
        self._problems[instance] = kwargs["create_kwargs"]
        return instance, response

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Response:
        return ToolResponse(text=check(str(parameters.get("answer")), **self._problems[instance_id])), 0.0, {}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self._problems.pop(instance_id, None)
