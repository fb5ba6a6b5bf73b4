"""A dense reward for models that cannot solve anything yet (verl's ``custom_reward_function``)."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """Share of the characters that are digits or spaces, 0 to 1; 1 more if the answer is right."""
    if not solution_str:
        return 0.0
    dense = sum(c.isdigit() or c == " " for c in solution_str) / len(solution_str)
    answer = solution_str.rpartition("####")[2].strip().rstrip(".").replace(",", "")
    return dense + (answer == ground_truth)
