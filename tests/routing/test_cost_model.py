import math

import pytest

from kvshare.routing.cost_model import ENOUGH, UNKNOWN, Rates, break_even, cost, expected


def seen(prefill, load, delay=0.02, times=ENOUGH):
    rates = Rates()
    for waited in range(1, times + 1):  # for others, all but the first
        rates.prefilled(1000, waited * 1e6, waited * (1e6 + 1000 / prefill))
        rates.loaded(1000, waited * 1000 / load)
        rates.stored(delay)
    return rates.pace()


def test_break_even_is_where_both_take_as_long():
    n = break_even(seen(prefill=10_000, load=100_000))
    assert n / 10_000 == pytest.approx(0.02 + n / 100_000)


def test_slower_than_recomputing_never_pays():
    assert break_even(seen(prefill=50_000, load=35_000)) == math.inf


def test_everything_is_tried_until_the_rates_are_known():
    assert break_even(Rates().pace()) == 0
    assert break_even(seen(prefill=50_000, load=35_000, times=ENOUGH - 1)) == 0
    assert break_even(UNKNOWN | {"prefill": 1e4, "delay": 0.1}) == 0


def test_prompts_that_are_computed_together_are_the_engines_rate_together():
    rates = Rates()
    first, *_, last = [rates.prefilled(1000, 0.0, answered) for answered in (0.1, 0.2, 0.3, 0.4)]
    assert (first, last) == (pytest.approx(10_000), pytest.approx(10_000))
    assert rates.prefilled(1000, 10.0, 10.5) == pytest.approx(2000)  # alone, later


def test_a_prompt_counts_for_the_part_that_was_computed_meanwhile():
    rates = Rates()
    rates.prefilled(1000, 0.0, 1.0)
    assert rates.prefilled(100, 0.9, 1.1) == pytest.approx((100 + 100) / 0.2)


@pytest.mark.parametrize("requests", [[1, 4, 8, 16], [8] * 4])
def test_steps_get_longer_with_the_kv_that_they_read(requests):
    """Also if there was always as much of it: then the assumed proportion divides a step's time."""
    rates, now = Rates(), 0.0
    for running in requests:
        step = 0.01 + 2e-8 * running * 1000
        began = [rates.decoding(1000, now) for _ in range(running)]
        now += 100 * step
        for begun in began:
            rates.answered(101, 100 * step, rates.decoding(-1000, now) - begun)
    assert (rates.pace()["step"], rates.pace()["context"]) == (pytest.approx(0.01, 0.02), pytest.approx(2e-8, 0.02))


def test_cost_counts_what_others_lose():
    rate = expected(UNKNOWN | {"prefill": 1e4, "load": 1e5, "step": 0.01, "context": 1e-6, "response": 100, "stall": 0})
    alone = cost(rate, 0, 0, stalled=0, wait=0, compute=1000, load=0, prompt=1000)
    assert (alone.prompt, alone.stall, alone.answer) == pytest.approx((0.1, 0, 100 * 0.011))
    busy = cost(rate, 10, 10_000, stalled=10, wait=0, compute=1000, load=0, prompt=1000)
    assert (busy.stall, busy.answer) == pytest.approx((1.0, 100 * (0.01 + 0.011 + 5 * 0.001)))
    assert cost(rate, 10, 10_000, stalled=10, wait=0, compute=0, load=1000, prompt=1000).stall == 0  # in the background
