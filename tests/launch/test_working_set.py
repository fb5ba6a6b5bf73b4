"""R: when the conversations of a step fit into the KV pool, and what follows."""

import pytest

from kvshare.launch.working_set import WorkingSet

GIB = 2**30


def of(pool, turns=8):
    """48 conversations at 57,344 bytes a token: prompts of 2,048 tokens, and 16,000 more in 8 turns."""
    return WorkingSet(48, 1, 1, 2048, 16_000, turns, 57_344, pool)


def test_what_does_not_fit_is_evicted():
    found = of(16 * GIB)
    assert found.r == pytest.approx(48 * 18_048 * 57_344 / 16 / GIB)
    assert found.evicted == 1 - 1 / found.r
    assert found.verdict == (
        "at most 2.89: up to 65% of what turns repeat is evicted, 2,208,565 tokens in a step; with offloading it is "
        "loaded, without it is computed again"
    )


def test_what_fits_gains_nothing():
    found = of(64 * GIB)
    assert found.evicted == 0
    assert found.verdict.endswith("nothing is evicted between turns, so offloading brings nothing")


def test_a_pool_that_is_not_known_and_turns_without_a_limit():
    assert of(None).verdict == (
        "at most 1 if the pool has 46.27 GiB: then offloading brings nothing; above 1 if it is smaller"
    )
    assert of(16 * GIB, turns=None).verdict.startswith("at most 2.89: up to 65% of what turns repeat is evicted; with")


def test_a_prompt_counts_once_for_each_replica_that_keeps_it():
    assert WorkingSet(4, 4, 2, 1000, 500, 4, 1, None).bytes == 4 * (2 * 1000 + 4 * 500)
