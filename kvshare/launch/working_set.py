"""Forecasts whether the conversations of a step fit into the engines' KV pool. Pure arithmetic, no I/O.

All conversations of a step are under way at the same time. R is the KV that they need, their *working set*, over the
KV pool of all replicas. Below 1 nothing is evicted between turns, so offloading brings nothing. Above 1 vLLM evicts
what was used least recently. A conversation that comes back at a random time finds about 1 / R of its KV. The rest is
computed again, or with offloading loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkingSet:
    """The conversations of a step.

    Args:
        prompts: prompts of a step.
        samples: conversations for each prompt.
        copies: replicas that keep the KV of a prompt.
        prompt_tokens: mean tokens of a prompt.
        answer_tokens: the most tokens of all turns after the prompt (``data.max_response_length``).
        turns: the most turns of the model; None if there is no limit.
        token_bytes: bytes of KV a token, over all ranks of a replica.
        pool_bytes: KV pool of all replicas; None if it is not known here.
    """

    prompts: int
    samples: int
    copies: int
    prompt_tokens: float
    answer_tokens: int
    turns: int | None
    token_bytes: int
    pool_bytes: int | None

    @property
    def bytes(self) -> int:
        tokens = self.prompts * (self.copies * self.prompt_tokens + self.samples * self.answer_tokens)
        return round(tokens * self.token_bytes)

    @property
    def r(self) -> float | None:
        """The working set over the pool, at most; None if the pool is not known."""
        return self.bytes / self.pool_bytes if self.pool_bytes else None

    @property
    def evicted(self) -> float | None:
        """The share of a conversation's KV that is evicted between two turns, at most."""
        return None if self.r is None else max(0.0, 1 - 1 / self.r)

    @property
    def repeated_tokens(self) -> int | None:
        """Tokens that the turns of a step repeat, if each has the most turns and all are equally long."""
        if not self.turns or self.turns < 2:
            return None
        later = range(1, self.turns)
        grown = sum(turn / self.turns for turn in later) * self.answer_tokens
        return round(self.prompts * self.samples * (len(later) * self.prompt_tokens + grown))

    def facts(self) -> dict[str, str]:
        """Rows of the forecast's table: label -> text."""
        turns = f"up to {self.turns} turns" if self.turns else "any number of turns"
        longest = self.prompt_tokens + self.answer_tokens
        pool = "not known here: its device is not" if self.pool_bytes is None else f"{self.pool_bytes / 2**30:.2f} GiB"
        return {
            "conversations a step": f"{self.prompts * self.samples:,}, {turns}, up to {longest:,.0f} tokens",
            "working set": f"at most {self.bytes / 2**30:.2f} GiB",
            "KV pool of all replicas": pool,
            "R": self.verdict,
        }

    @property
    def verdict(self) -> str:
        """What R says about offloading, in one line."""
        if self.r is None or self.evicted is None:
            size = f"{self.bytes / 2**30:.2f} GiB"
            return f"at most 1 if the pool has {size}: then offloading brings nothing; above 1 if it is smaller"
        if self.r <= 1:
            return f"at most {self.r:.2f}: nothing is evicted between turns, so offloading brings nothing"
        repeated = self.repeated_tokens
        of = f", {repeated * self.evicted:,.0f} tokens in a step" if repeated else ""
        return (
            f"at most {self.r:.2f}: up to {self.evicted:.0%} of what turns repeat is evicted{of}; "
            "with offloading it is loaded, without it is computed again"
        )

    def record(self) -> dict[str, Any]:
        """The part that goes into ``run.json``."""
        return {"working_set_bytes": self.bytes, "pool_bytes": self.pool_bytes, "evicted_between_turns": self.evicted}
