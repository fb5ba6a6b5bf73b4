"""Give LMCache-Ascend's connector the constructor that vLLM 0.23 and later require.

vLLM passes the KV cache layout to a connector as the third argument. Since 0.23 it refuses a connector class without
that parameter. LMCache-Ascend 0.4.4's class takes two arguments; its base class in LMCache takes all three.
"""

from __future__ import annotations

import inspect
from typing import Any

from kvshare.core.ascend import CONNECTOR
from kvshare.hooks import check
from kvshare.hooks.patch import replace


def patch_connector(module: Any) -> None:
    check.parameters(module, CONNECTOR, "vllm_config", "role")
    connector = getattr(module, CONNECTOR)
    if "kv_cache_config" in inspect.signature(connector).parameters:
        return

    def init(self: Any, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super(connector, self).__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)

    replace(module, f"{CONNECTOR}.__init__", init, {"38c9e3c6f3f1": "0.4.4"})
