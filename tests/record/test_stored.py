"""The compact record of who stored what, compared with plain sets."""

from hypothesis import given
from hypothesis import strategies as st

from kvshare.record import events
from kvshare.record.key_table import KeyTable, RecentKeys
from kvshare.record.stored import Stored

KEYS = st.integers(0, 40) | st.integers(-(2**63), 2**64 - 1)


@given(st.lists(st.tuples(KEYS.map(lambda key: key % 2**64), st.integers(1, 2**64 - 1))))
def test_table_is_a_dict(pairs):
    table, plain = KeyTable(), {}
    for key, value in pairs:
        table.put(key, value)
        plain[key] = value
        assert len(table) == len(plain)
    for key in [*plain, 77]:
        assert table.get(key) == plain.get(key, 0)


def test_table_grows():
    table = KeyTable()
    for key in range(10_000):
        table.put(key * 2**32, key + 1)  # all keys want the same slot of a small table
    assert all(table.get(key * 2**32) == key + 1 for key in range(10_000))


def test_recent_keys_are_bounded():
    table = RecentKeys(100)
    for key in range(1000):
        table.put(key, 1)
    assert sum(table.get(key) for key in range(1000)) <= 200
    assert all(table.get(key) for key in range(900, 1000))


STORES = st.lists(st.tuples(st.sampled_from([0, 1, 40]), st.sampled_from("abc"), st.lists(KEYS, max_size=4)))


@given(STORES, st.sampled_from([0, 1, 40]), st.sampled_from("abc"), st.lists(KEYS))
def test_hits_and_amplification_are_those_of_plain_sets(stores, replica, policy, keys):
    stored, plain = Stored(), {}
    for by, under, stored_keys in stores:
        stored.add(events.Store(time=0, replica=by, policy=under, keys=stored_keys))
        for key in stored_keys:
            plain.setdefault(key % 2**64, set()).add((by, under))
    keys += [key for _, _, stored_keys in stores for key in stored_keys]
    load = events.Load(time=0, replica=replica, policy=policy, keys=keys, tokens=[1] * len(keys), expected=0)
    of_keys = [plain.get(key % 2**64, set()) for key in keys]
    found = stored.hits(load)
    assert found.unknown == sum(not by for by in of_keys)
    assert found.local == sum(any(r == replica for r, _ in by) for by in of_keys)
    assert found.local + found.shared + found.unknown == len(keys)
    assert found.stale == sum(any(p != policy for _, p in by) for by in of_keys)
    distinct = sum(len({p for _, p in by}) for by in plain.values())
    assert stored.amplification() == (round(sum(map(len, plain.values())) / distinct, 3) if distinct else None)
