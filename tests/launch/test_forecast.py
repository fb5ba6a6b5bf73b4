"""The forecast's arithmetic, and that it agrees with the simulated router and with verl's own token ids."""

import json
import sys

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from kvshare.launch.forecast import Recipe, forecast, kv_bytes
from kvshare.routing.router import PrefillOnceRouter

sys.path.insert(0, str(ROOT / "benchmarks"))
import routing

CHUNK, BLOCK = 256, 16


def prompt(length: int, seed: int, common: int = 0) -> list[int]:
    """Token ids: the first ``common`` of them the same for every seed."""
    return [*range(common), *(seed * 100_000 + i for i in range(length - common))]


def recipe(replicas: int = 2, samples: int = 4, **more) -> Recipe:
    return Recipe(replicas, samples, **{"chunk_size": CHUNK, "block_size": BLOCK, "token_bytes": 10, **more})


def test_each_other_replica_loads_a_chunk_once():
    step = [prompt(1000, 1), prompt(600, 2)]
    found = forecast([step], recipe(), of=2)
    assert found.prompt_tokens_a_step == 4 * 1600
    assert found.shareable_tokens_a_step == (3 + 2) * CHUNK
    assert found.stored_bytes_a_step == (3 + 2) * CHUNK * 10
    # Two of four samples find every block that 999 and 599 tokens fill.
    assert found.local_tokens_a_step == 2 * (62 + 37) * BLOCK
    assert forecast([step], recipe(replicas=3), of=2).shareable_tokens_a_step == 2 * (3 + 2) * CHUNK
    assert forecast([step], recipe(replicas=64), of=2).shareable_tokens_a_step == 3 * (3 + 2) * CHUNK


def test_common_beginning_is_stored_once_and_shared_between_prompts():
    step = [prompt(600, seed, common=512) for seed in range(1, 9)]
    found = forecast([step], recipe(samples=1), of=8)
    assert found.shareable_tokens_a_step == 2 * CHUNK
    assert found.stored_bytes_a_step == 2 * CHUNK * 10
    assert found.local_tokens_a_step == 6 * 512


def moved(placement, replicas, samples) -> tuple[int, int]:
    """Tokens of a step on another replica than their leader's: in benchmarks/routing.py's simulation, and as predicted.

    The simulated engines may load them twice, as with `mp`: for two samples that come while they are not there yet.
    """
    prompts = 2 * replicas
    step = routing.batch(prompts, samples, 2048, [256] * prompts * samples)

    def router(handles):
        return PrefillOnceRouter(handles, {"chunk_size": CHUNK, "placement": placement})

    moves = routing.simulate(router, [step], replicas).counts["moved"]
    prompt_ids = [prompt(2048, seed) for seed in range(1, prompts + 1)]
    return moves * 2048, forecast([prompt_ids], recipe(replicas, samples), of=prompts).shareable_tokens_a_step


@pytest.mark.parametrize(("replicas", "samples"), [(2, 4), (2, 8), (4, 8), (8, 16)])
def test_as_the_router_spreads_them(replicas, samples):
    simulated, predicted = moved("spread", replicas, samples)
    assert simulated == predicted


@pytest.mark.parametrize(("replicas", "samples"), [(2, 2), (4, 4), (8, 8), (4, 8), (8, 16)])
@pytest.mark.parametrize("placement", ["cost", "spread"])
def test_upper_bound(placement, replicas, samples):
    """A sample stays where its prompt is, if that costs less. With few samples two may be placed on one replica."""
    simulated, predicted = moved(placement, replicas, samples)
    assert simulated <= predicted


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(0, 3), st.integers(0, 900)), min_size=1, max_size=5),
    st.integers(1, 8),
    st.integers(1, 8),
)
@example(shapes=[(256, 0, 0), (256, 0, 176)], replicas=3, samples=3)
def test_never_more_than_there_is(shapes, replicas, samples):
    step = [prompt(length, seed, min(length, common)) for length, seed, common in shapes]
    found = forecast([step], recipe(replicas, samples), of=len(step))
    assert 0 <= found.shareable_tokens_a_step <= found.prompt_tokens_a_step
    assert 0 <= found.local_tokens_a_step <= found.prompt_tokens_a_step
    assert found.shareable_tokens_a_step + found.local_tokens_a_step <= found.prompt_tokens_a_step
    assert replicas > 1 or not found.shareable_tokens_a_step


SHORT = [[prompt(90 + seed, seed, common=24) for seed in range(1, 25)]]


def test_verdict_of_prompts_that_fill_no_chunk():
    """The shape of GSM8K without examples."""
    assert forecast(SHORT, recipe(replicas=8, samples=8), of=7473).verdict == (
        "0.0% of prompt tokens can be shared with chunk_size 256: 0 of 24 prompts fill a chunk, their mean is 102 "
        "tokens; try chunk_size 64 (54.6%), or longer prompts (kvshare prepare --shots 8)"
    )
    # Blocks of 128 tokens, as on CPU, leave no smaller chunk to try.
    found = forecast(SHORT, recipe(block_size=128), of=24)
    assert found.verdict.endswith("their mean is 102 tokens; try longer prompts (kvshare prepare --shots 8)")


def test_verdicts_of_recipes():
    step = [prompt(1000, 1), prompt(1000, 2)]
    assert forecast([step], recipe(), of=2).verdict == (
        "19.2% of prompt tokens can be shared with chunk_size 256: "
        "1,536 of 8,000 in a step, 3,968 more within a replica"
    )
    few = forecast([step], recipe(replicas=4), of=2)
    assert few.verdict.startswith("at most 57.6% of prompt tokens can be shared")
    by_cost = forecast([step], recipe(spread=False), of=2)
    assert by_cost.verdict.startswith("at most 19.2% of prompt tokens can be shared")
    alone = forecast([step], recipe(replicas=1), of=2).verdict
    assert alone.endswith("with chunk_size 256: one replica has no other to share with; try more devices")
    assert "0.0% " in (routed := forecast([step], recipe(routed=False), of=2).verdict)
    assert routed.endswith("all replicas compute a prompt at once; try ROUTER=config/router.yaml")
    once = forecast([step], recipe(samples=1), of=2).verdict
    assert once.endswith("each prompt is answered once, and prompts have no chunk in common; try rollout.n above 1")


def test_bytes_of_a_token():
    qwen = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}
    assert kv_bytes(qwen) == 57_344
    assert kv_bytes(qwen, 4) == 2 * 57_344
    deepseek = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert kv_bytes(deepseek) == 61 * 576 * 2


def test_record_is_json():
    assert set(json.loads(json.dumps(forecast(SHORT, recipe(), of=24).record()))) == {
        *("shareable_tokens_a_step", "local_tokens_a_step", "stored_bytes_a_step", "at_most", "verdict"),
    }
