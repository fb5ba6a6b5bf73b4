"""What a user asks `kvshare bench` to measure."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]
"""Tokens of a prompt, and different prompts at once. One more token is asked: whole chunks can then be found."""


@dataclass
class Asked:
    shapes: list[Shape]
    n: int  # samples of a prompt in GRPO's pattern; 0: leave it out
    answer: int  # tokens
    repeat: int
    settle: float  # seconds a prompt has to be stored, and one more a GB
