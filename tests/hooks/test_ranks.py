import pytest

from kvshare.hooks.lmcache.ranks import rank_in_replica


@pytest.mark.parametrize(
    ("engine_id", "world_size", "rank", "expected"),
    [("e5a", 2, 1, 1), (None, 1, 0, 0), ("e5a_dp0", 2, 1, 1), ("e5a_dp3", 2, 1, 7), ("e5a_dp12", 1, 0, 12)],
)
def test_rank_counts_data_parallel_first(engine_id, world_size, rank, expected):
    assert rank_in_replica(engine_id, world_size, rank) == expected
