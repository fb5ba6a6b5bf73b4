"""A request has loaded what every rank has loaded."""

from kvshare.hooks.verl.loads import Loads

LOAD = {"request": "r", "keys": [1, 2, 3], "tokens": [200, 256, 256], "expected": 712}


def loaded(*partial):
    loads = Loads()
    loads.started("r")
    for tokens in partial[:1]:  # may come before the report of rank 0, or after
        loads.partial({"request": "r", "tokens": tokens})
    assert loads.loaded(LOAD)
    for tokens in partial[1:]:
        loads.partial({"request": "r", "tokens": tokens})
    (load,) = loads.ended("r")
    return load["keys"], load["tokens"], load["expected"]


def test_whole():
    assert loaded() == ([1, 2, 3], [200, 256, 256], 712)


def test_the_worst_rank_counts():
    assert loaded(456, 711) == ([1, 2], [200, 256], 712)
    assert loaded(711, 456) == ([1, 2], [200, 256], 712)
    assert loaded(455) == ([1], [200], 712)
    assert loaded(0) == ([], [], 712)


def test_of_a_request_that_is_not_running():
    loads = Loads()
    assert not loads.loaded(LOAD)
    loads.partial({"request": "r", "tokens": 0})
    loads.started("r")
    assert loads.ended("r") == []
