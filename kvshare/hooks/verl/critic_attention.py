"""Load verl's critic with PyTorch's attention where flash-attn is not installed.

verl 0.9.1 loads the critic with flash_attention_2 and ignores the attention that its config sets.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from kvshare.hooks.patch import optional, replace


@optional("The critic is loaded with flash_attention_2, which is not installed")
def patch_critic(module: Any) -> None:
    """Replace verl's loader, unless flash-attn is installed. On Ascend, transformers has its own flash_attention_2."""
    if not any(map(find_spec, ("flash_attn", "torch_npu"))):
        replace(module, "load_valuehead_model", _load, {"3652731d7129": "0.9.1"})


def _load(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        torch_dtype=torch_dtype,
        config=model_config,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )
