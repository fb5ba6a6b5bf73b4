"""The least recently used goes first, and what is counted is what is held."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare.services.store import OVERHEAD, Store

META = (1,)


def _put(store: Store, key: bytes, length: int) -> bool:
    entry = store.begin(length, META)
    if entry is None or not store.grow(entry, length):
        return False
    store.put(key, entry)
    return True


@pytest.fixture
def store() -> Store:
    """Room for three entries of 1,000 bytes."""
    return Store(3 * (1000 + OVERHEAD))


def test_least_recently_used_goes_first(store):
    for key in (b"a", b"b", b"c"):
        assert _put(store, key, 1000)
    assert store.get(b"a")
    assert _put(store, b"d", 1000)
    assert [key for key in (b"a", b"b", b"c", b"d") if store.get(key)] == [b"a", b"c", b"d"]
    assert store.status() == {
        "bytes": store.limit,
        "limit": store.limit,
        "entries": 3,
        "evicted": 1,
        "evicted_bytes": 1000 + OVERHEAD,
        "refused": 0,
    }


def test_what_cannot_fit_evicts_nothing(store):
    assert _put(store, b"a", 1000)
    assert store.begin(store.limit, META) is None
    assert store.get(b"a")


def test_as_many_are_evicted_as_it_takes(store):
    for key in (b"a", b"b", b"c"):
        _put(store, key, 1000)
    assert _put(store, b"d", store.limit - OVERHEAD)
    assert store.status()["entries"] == 1
    assert store.evicted == 3


def test_replaced_entry_counts_once_and_is_not_called_evicted(store):
    for _ in range(3):
        _put(store, b"a", 1000)
    assert (store.bytes, store.evicted) == (1000 + OVERHEAD, 0)


def test_entry_being_received_counts_what_has_come_and_no_more(store):
    entry = store.begin(2000, META)
    assert entry
    store.grow(entry, 10)
    assert store.bytes == OVERHEAD + 10
    del entry
    assert store.bytes == 0


def test_evicted_entry_counts_until_nobody_is_being_sent_it(store):
    """Else slow clients, each with an evicted entry of its own, could take any amount of memory."""
    _put(store, b"a", store.limit - OVERHEAD)
    sending = store.get(b"a")
    assert not _put(store, b"b", 1000)
    assert store.get(b"a") is None
    assert store.bytes == store.limit
    del sending
    assert store.bytes == 0
    assert _put(store, b"b", 1000)


OPERATIONS = st.lists(st.tuples(st.sampled_from("pg"), st.sampled_from([b"a", b"b", b"c", b"d"]), st.integers(1, 9000)))


@given(OPERATIONS)
def test_agrees_with_a_plain_model(operations):
    store, model = Store(20_000), OrderedDict()
    for operation, key, length in operations:
        if operation == "g":
            assert bool(store.get(key)) == (key in model)
            if key in model:
                model.move_to_end(key)
        else:
            size = length + OVERHEAD
            while sum(model.values()) + size > store.limit:  # the old value of a key stays until the new one is whole
                model.popitem(last=False)
            model[key] = size
            model.move_to_end(key)
            assert _put(store, key, length)
        assert store.bytes == sum(model.values()) <= store.limit
        assert store.status()["entries"] == len(model)
