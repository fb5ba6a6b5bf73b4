"""Forecasts how many prompt tokens of a run can be shared, before it starts. Pure arithmetic, no I/O.

One replica computes each chunk that the requests of a step have in common. Every other replica that gets such a request
loads the chunk once, and serves later requests from its own prefix cache. m requests go to min(R, m) of R replicas at
most, so the chunk is loaded min(R, m) - 1 times. The router's placement "spread" does that, if there are more answers
per prompt than replicas. The other placements move a request only where that pays (docs/routing.md), so for them, and
with fewer answers, this is an upper bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median, quantiles
from typing import Any

from kvshare.launch.working_set import WorkingSet
from kvshare.routing.digests import chunk_digests

Step = Sequence[list[int]]
"""The prompts of one training step, as token ids."""

CHUNK_SIZES = (512, 256, 128, 64, 32, 16)
"""Chunk sizes that a verdict may propose."""


@dataclass(frozen=True)
class Recipe:
    """The facts about a run that the forecast needs.

    Args:
        replicas: rollout replicas.
        samples: answers per prompt (``rollout.n``).
        chunk_size: tokens per LMCache chunk.
        block_size: tokens per block of vLLM's prefix cache.
        token_bytes: bytes of KV per token, over all ranks of a replica.
        routed: whether kvshare's router is used. With verl's own router nothing is shared, because replicas compute the
            same prompt at the same time.
        spread: whether the router sends the samples of a prompt to all replicas (``placement: spread``), not only where
            that pays.
    """

    replicas: int
    samples: int
    chunk_size: int
    block_size: int
    token_bytes: int
    routed: bool = True
    spread: bool = True


@dataclass(frozen=True)
class Lengths:
    """Statistics of the prompt lengths, in tokens."""

    mean: float
    median: float
    p95: float
    longest: int
    fill_a_chunk: int  # prompts of at least chunk_size tokens

    @classmethod
    def of(cls, prompts: Sequence[list[int]], chunk_size: int) -> Lengths:
        lengths = [len(prompt) for prompt in prompts]
        p95 = quantiles(lengths, n=20, method="inclusive")[-1] if len(lengths) > 1 else lengths[0]
        return cls(mean(lengths), median(lengths), p95, max(lengths), sum(n >= chunk_size for n in lengths))


@dataclass(frozen=True)
class Forecast:
    """What a step shares and stores: means over some steps. Prompt tokens count once per sample.

    ``shareable_tokens_a_step`` are loaded from another replica. ``local_tokens_a_step`` are local hits. The others are
    computed. Of a conversation with several turns only the first prompt counts. What later turns repeat is a matter of
    the ``working_set``.
    """

    prompts: int  # prompts that the forecast is based on
    of: int  # prompts in the data
    steps: int  # steps that the forecast is based on
    lengths: Lengths
    recipe: Recipe
    prompt_tokens_a_step: int
    shareable_tokens_a_step: int
    local_tokens_a_step: int
    stored_bytes_a_step: int
    elsewhere: dict[int, float]  # other chunk size -> fraction of prompt tokens that are shareable
    working_set: WorkingSet | None = None  # of a job whose conversations have several turns

    @property
    def share(self) -> float:
        return self.shareable_tokens_a_step / self.prompt_tokens_a_step

    @property
    def at_most(self) -> bool:
        """Whether it is an upper bound: some replicas may get no answer of a prompt, or compute it themselves."""
        exact = self.recipe.spread and self.recipe.samples > self.recipe.replicas
        return self.share >= 0.0005 and not exact

    @property
    def _at_most(self) -> str:
        return "at most " if self.at_most else ""

    @property
    def verdict(self) -> str:
        """The result in one sentence, with a proposal if little can be shared."""
        recipe = self.recipe
        head = f"{self._at_most}{self.share:.1%} of prompt tokens can be shared with chunk_size {recipe.chunk_size}"
        if recipe.replicas == 1:
            return f"{head}: one replica has no other to share with; try more devices"
        if not recipe.routed:
            return f"{head}: verl's own router has all replicas compute a prompt at once; try ROUTER=config/router.yaml"
        better = self._better_chunk_size()
        smaller = f"chunk_size {better} ({self.elsewhere[better]:.1%}), or " if better else ""
        if self.share < 0.01 and recipe.samples == 1 and not smaller:
            return f"{head}: each prompt is answered once, and prompts have no chunk in common; try rollout.n above 1"
        if self.share < 0.01 or smaller:
            lengths = self.lengths
            return (
                f"{head}: {lengths.fill_a_chunk:,} of {self.prompts:,} prompts fill a chunk, their mean is "
                f"{lengths.mean:.0f} tokens; try {smaller}longer prompts (kvshare prepare --shots 8)"
            )
        return (
            f"{head}: {self.shareable_tokens_a_step:,} of {self.prompt_tokens_a_step:,} in a step, "
            f"{self.local_tokens_a_step:,} more within a replica"
        )

    def _better_chunk_size(self) -> int | None:
        """Largest chunk size that shares at least half as much as the best one; None if the current one does."""
        best = max(self.elsewhere.values(), default=0.0)
        if self.share >= best / 2:
            return None
        return max(size for size, share in self.elsewhere.items() if share >= best / 2)

    def facts(self) -> dict[str, str]:
        """Rows of the forecast's table: label -> text."""
        lengths, total = self.lengths, self.prompt_tokens_a_step
        computed = total - self.shareable_tokens_a_step - self.local_tokens_a_step
        elsewhere = ", ".join(f"{size}: {share:.1%}" for size, share in self.elsewhere.items())
        looked = f"{self.prompts:,} of {self.of:,}, {self.steps:,} steps"
        return {
            "prompts looked at": looked if self.prompts < self.of else f"all {self.of:,}",
            "tokens of a prompt": f"mean {lengths.mean:.0f}, median {lengths.median:.0f}, 95% have at most "
            f"{lengths.p95:.0f}, longest {lengths.longest:,}",
            "fill a chunk": f"{lengths.fill_a_chunk:,} of {self.prompts:,} (chunk_size {self.recipe.chunk_size})",
            "prompt tokens a step": f"{total:,}",
            "  from another replica": f"{self._at_most}{self.shareable_tokens_a_step:,} ({self.share:.1%})",
            "  within a replica": f"{self.local_tokens_a_step:,} ({self.local_tokens_a_step / total:.1%})",
            "  computed": f"{computed:,} ({computed / total:.1%})",
            "stored a step": f"{self.stored_bytes_a_step / 2**30:.2f} GiB ({self.recipe.token_bytes:,} bytes a token)",
            **({"with another chunk_size": elsewhere} if elsewhere else {}),
            **(self.working_set.facts() if self.working_set else {}),
        }

    def record(self) -> dict[str, Any]:
        """The part that goes into ``run.json``."""
        names = ("shareable_tokens_a_step", "local_tokens_a_step", "stored_bytes_a_step")
        found = {**{name: getattr(self, name) for name in names}, "at_most": self.at_most, "verdict": self.verdict}
        return found | (self.working_set.record() if self.working_set else {})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def forecast(steps: Sequence[Step], recipe: Recipe, of: int) -> Forecast:
    """Forecast what a step of a run shares and stores.

    Args:
        steps: prompts of some steps.
        of: number of prompts in the data.
    """
    prompts = [prompt for step in steps for prompt in step]
    shared, stored, local = zip(*(_count(step, recipe) for step in steps), strict=True)
    sizes = [size for size in CHUNK_SIZES if size != recipe.chunk_size and not size % recipe.block_size]
    tokens = recipe.samples * sum(map(len, prompts))
    return Forecast(
        prompts=len(prompts),
        of=of,
        steps=len(steps),
        lengths=Lengths.of(prompts, recipe.chunk_size),
        recipe=recipe,
        prompt_tokens_a_step=round(tokens / len(steps)),
        shareable_tokens_a_step=round(mean(shared)),
        local_tokens_a_step=round(mean(local)),
        stored_bytes_a_step=round(mean(stored)) * recipe.token_bytes,
        elsewhere={size: sum(_shared(step, recipe, size) for step in steps) / tokens for size in sizes},
    )


def _count(step: Step, recipe: Recipe) -> tuple[int, int, int]:
    """Tokens of a step loaded from another replica, tokens stored, and tokens of local hits."""
    stored = len(_requests(step, recipe, recipe.chunk_size)) * recipe.chunk_size
    # vLLM always computes the last token of a prompt.
    blocks = _requests([prompt[:-1] for prompt in step], recipe, recipe.block_size)
    local = sum(requests - min(recipe.replicas, requests) for requests in blocks.values()) * recipe.block_size
    shared = _shared(step, recipe, recipe.chunk_size)
    # Blocks are shorter than chunks, so the two counts can overlap: count no token twice.
    return shared, stored, min(local, recipe.samples * sum(map(len, step)) - shared)


def _shared(step: Step, recipe: Recipe, chunk_size: int) -> int:
    if not recipe.routed:
        return 0
    chunks = _requests(step, recipe, chunk_size).values()
    return sum(min(recipe.replicas, requests) - 1 for requests in chunks) * chunk_size


def _requests(prompts: Iterable[list[int]], recipe: Recipe, size: int) -> Counter[str]:
    """Number of requests of a step for each prefix that ends with a chunk of ``size`` tokens, by digest."""
    return Counter(
        {
            digest: count * recipe.samples
            for digest, count in Counter(d for prompt in prompts for d in chunk_digests(prompt, size)).items()
        }
    )


def kv_bytes(model: dict[str, Any], dtype_bytes: int = 2) -> int:
    """Bytes of KV per token over all layers, given a Hugging Face ``config.json``."""
    if "kv_lora_rank" in model:  # multi-head latent attention: one latent vector for K and V
        return model["num_hidden_layers"] * (model["kv_lora_rank"] + model["qk_rope_head_dim"]) * dtype_bytes
    heads = model["num_attention_heads"]
    head_size = model.get("head_dim") or model["hidden_size"] // heads
    return 2 * model["num_hidden_layers"] * model.get("num_key_value_heads", heads) * head_size * dtype_bytes
