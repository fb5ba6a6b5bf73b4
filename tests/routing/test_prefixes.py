import asyncio

import pytest

from kvshare.routing.prefixes import Prefill, StoredPrefixes

KEY = ("policy", "prefix")


def outcome(*calls, key=KEY, seconds=0.05):
    """What somebody who waits for the prefix is told, while these calls are made."""

    async def scenario():
        prefixes = StoredPrefixes()
        prefixes.started("r", Prefill(*KEY, tokens=512))
        waiting = asyncio.create_task(prefixes.wait(key, seconds))
        await asyncio.sleep(0)
        for name, *args in calls:
            getattr(prefixes, name)(*args)
        told = await waiting
        return told, await prefixes.wait(key, 0.01)

    return asyncio.run(scenario())


STORED = [("storing", "r"), ("stored", "r", 512)]


@pytest.mark.parametrize(
    ("calls", "found"),
    [
        (STORED, True),
        ([("storing", "r"), ("storing", "r"), ("stored", "r", 256), ("stored", "r", 512)], True),  # chunked prefill
        ([("storing", "r"), ("storing", "r"), ("stored", "r", 512)], False),  # the first has not arrived
        ([("first_token", "r", 512)], True),  # there was nothing to store
        ([("first_token", "r", 256)], False),
        ([("ended", "r")], False),
        ([("storing", "r"), ("ended", "r"), ("stored", "r", 512)], True),  # a short answer, a slow store
        ([("storing", "r"), ("stored", "r", 0)], False),  # it failed; the answer goes on
        ([("give_up",)], False),
        ([], False),
    ],
)
def test_who_waits_is_told(calls, found):
    assert outcome(*calls) == (found, found)


def test_another_policy_is_another_prefix():
    assert outcome(*STORED, key=("next policy", "prefix")) == (False, False)


def test_lost_events_leave_nothing_behind():
    """Each request stores, and its end is told, but not that its KV has arrived; nobody answers who waits."""

    async def scenario():
        prefixes = StoredPrefixes(remember=10)
        for number in range(100):
            key = ("policy", str(number))
            prefixes.started(str(number), Prefill(*key, tokens=512))
            prefixes.storing(str(number))
            prefixes.ended(str(number))
            assert not await prefixes.wait(key, 0)
        return len(prefixes._prefills), len(prefixes._waiting)

    assert asyncio.run(scenario()) == (10, 0)
