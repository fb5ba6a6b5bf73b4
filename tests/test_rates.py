import math

import pytest

from kvshare.rates import ENOUGH, Pace, Rates, break_even


def seen(prefill, load, delay=0.02, times=ENOUGH):
    rates = Rates()
    for waited in range(1, times + 1):  # for others, all but the first
        rates.prefilled(1000, waited * 1000 / prefill)
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
