import asyncio
import json

from kvshare.ledger import Ledger, Prefill, StoredPrefixes, prefix_digest

PREFILL = Prefill("policy", "prefix", tokens=512)


def found(prefixes: StoredPrefixes, policy: str = "policy") -> bool:
    return prefixes.event(policy, "prefix").is_set()


def started() -> StoredPrefixes:
    prefixes = StoredPrefixes()
    prefixes.started("r", Prefill("policy", "prefix", tokens=512))
    return prefixes


def test_prefix_is_found_when_its_last_store_arrived():
    prefixes = started()
    prefixes.storing("r")  # chunked prefill: two stores
    prefixes.storing("r")
    prefixes.stored("r", end=512)
    assert not found(prefixes)
    prefixes.first_token("r", cached=0)
    assert not found(prefixes)
    prefixes.stored("r", end=256)
    assert not found(prefixes)


def test_prefix_is_found_after_stores_in_order():
    prefixes = started()
    for end in (256, 512):
        prefixes.storing("r")
        prefixes.stored("r", end)
    assert found(prefixes)
    assert not found(prefixes, "next policy")


def test_nothing_to_store_if_all_was_cached():
    prefixes = started()
    prefixes.first_token("r", cached=512)
    assert found(prefixes)


def test_ended_request_holds_nobody():
    prefixes = started()
    prefixes.finished("r")
    assert found(prefixes)


def test_waiting_before_the_request_arrives():
    async def scenario():
        prefixes = StoredPrefixes()
        waiting = asyncio.create_task(prefixes.event("policy", "prefix").wait())
        await asyncio.sleep(0)
        prefixes.started("r", PREFILL)
        prefixes.finished("r")
        await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())


def test_digest_covers_whole_chunks_only():
    assert prefix_digest([1] * 255, 256) == ""
    assert prefix_digest([1] * 256, 256) == prefix_digest([1] * 256 + [2] * 255, 256)
    assert prefix_digest([1] * 256, 256) != prefix_digest([2] + [1] * 255, 256)


def test_ledger_writes_lines(tmp_path):
    Ledger(3, str(tmp_path / "run")).write("store", policy="p", keys=[1])
    line = json.loads((tmp_path / "run" / "events-3.jsonl").read_text())
    assert (line["op"], line["replica"], line["keys"]) == ("store", 3, [1])


def test_ledger_that_cannot_write_is_in_nobodys_way(tmp_path):
    Ledger(0, None).write("store")
    (tmp_path / "file").write_text("")
    Ledger(0, str(tmp_path / "file")).write("store")
    Ledger(0, "/dev/full/x").write("store")
