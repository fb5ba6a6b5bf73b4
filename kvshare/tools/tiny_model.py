"""A Qwen2 of a million parameters that solves some of our own problems; made by dev/train_tiny_model.py."""

from __future__ import annotations

import shutil
from pathlib import Path

SHIPPED = Path(__file__).parent / "tiny_qwen2"


def make(folder: Path) -> None:
    """Write the model (bf16 safetensors) and its tokenizer to ``folder``."""
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
