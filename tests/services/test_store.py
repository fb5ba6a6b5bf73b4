"""The least recently used goes first, and what is counted is what is held."""

import os
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare.services.store import OVERHEAD, Store

META = (1,)


def _put(store: Store, key: bytes, length: int) -> bool:
    entry = store.reserve(length, META)
    if entry:
        store.put(key, entry)
    return entry is not None


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
    assert store.reserve(store.limit, META) is None
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


def test_entry_being_received_counts_and_cannot_be_found(store):
    entry = store.reserve(2000, META)
    assert entry
    assert store.bytes == 2000 + OVERHEAD
    del entry
    assert store.bytes == 0


def test_entry_takes_the_memory_of_the_one_evicted_for_it(store):
    for key in (b"a", b"b", b"c"):
        _put(store, key, 1000)
    offset = store.get(b"b").offset
    store.get(b"a"), store.get(b"c")
    new = store.reserve(900, META)
    assert (new.offset, new.warm) == (offset, True)
    assert store.get(b"b") is None


def test_memory_of_one_length_is_given_up_for_another(store):
    for number in range(100):
        assert _put(store, b"small%d" % number, 1000)
        assert _memory(store) <= store.limit
    large = store.reserve(store.limit - OVERHEAD, META)
    large.data[:] = b"x" * len(large.data)
    assert _memory(store) <= store.limit
    assert store.status()["entries"] == 0


def _memory(store: Store) -> int:
    """Bytes that the system has allocated."""
    return os.fstat(store.arena.fd).st_blocks * 512


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
        assert store.bytes == sum(model.values()) <= store.arena.resident <= store.limit
        assert store.status()["entries"] == len(model)
