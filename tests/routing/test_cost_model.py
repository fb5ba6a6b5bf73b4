import math

import pytest

from kvshare.routing.cost_model import ENOUGH, Pace, Rates, break_even


def seen(prefill, load, delay=0.02, times=ENOUGH):
    rates = Rates()
    for waited in range(1, times + 1):  # for others, all but the first
        rates.prefilled(1000, waited * 1e6, waited * (1e6 + 1000 / prefill))
        rates.loaded(1000, waited * 1000 / load)
        rates.stored(waited * delay)
    return rates.pace()


def test_break_even_is_where_both_take_as_long():
    n = break_even(seen(prefill=10_000, load=100_000))
    assert n / 10_000 == pytest.approx(0.02 + n / 100_000)


def test_slower_than_recomputing_never_pays():
    assert break_even(seen(prefill=50_000, load=35_000)) == math.inf


def test_everything_is_tried_until_the_rates_are_known():
    assert break_even(Rates().pace()) == 0
    assert break_even(seen(prefill=50_000, load=35_000, times=ENOUGH - 1)) == 0
    assert break_even(Pace(prefill=1e4, load=None, delay=0.1, decode=None, response=None)) == 0


def test_prompts_that_are_computed_together_are_the_engines_rate_together():
    rates = Rates()
    first, *_, last = [rates.prefilled(1000, 0.0, answered) for answered in (0.1, 0.2, 0.3, 0.4)]
    assert (first, last) == (pytest.approx(10_000), pytest.approx(10_000))
    assert rates.prefilled(1000, 10.0, 10.5) == pytest.approx(2000)  # alone, later


def test_a_prompt_counts_for_the_part_that_was_computed_meanwhile():
    rates = Rates()
    rates.prefilled(1000, 0.0, 1.0)
    assert rates.prefilled(100, 0.9, 1.1) == pytest.approx((100 + 100) / 0.2)
