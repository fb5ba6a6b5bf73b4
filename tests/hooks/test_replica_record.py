"""What the workers of a replica report, and what the event log has of it."""

import asyncio

from waiting import STUCK

from kvshare.hooks.verl import replica_record
from kvshare.hooks.verl.replica_record import ReplicaRecord
from kvshare.record.event_log import RUN_DIR
from kvshare.record.event_reader import Reader


def test_lmcache_that_is_not_up_is_not_silent_and_may_come_late(monkeypatch, tmp_path):
    errors = []
    monkeypatch.setattr(replica_record, "READY_SECONDS", 0.01)
    monkeypatch.setattr(replica_record.logger, "error", lambda text, *args: errors.append(text % args))
    monkeypatch.setenv(RUN_DIR, str(tmp_path))
    record = ReplicaRecord(0, 0, range(3))

    async def scenario():
        record.record({"op": "ready", "rank": 0})
        checking = asyncio.create_task(record.check_ready())
        while not errors:
            await asyncio.sleep(0.01)
        assert "replica 0 shares NO KV: LMCache did not start on rank 1, 2" in errors[0]
        record.record({"op": "ready", "rank": 2})
        await asyncio.sleep(0)
        assert len(errors) == 1
        record.record({"op": "ready", "rank": 1})
        await checking

    asyncio.run(asyncio.wait_for(scenario(), STUCK))
    assert len(errors) == 2
    assert "it shares KV from here on" in errors[1]
    record._event_log.close()
    assert [type(event).__name__ for event in Reader(tmp_path).read()] == ["Degraded", "Ready"]


def test_events_that_a_worker_dropped_are_in_the_record(monkeypatch, tmp_path):
    monkeypatch.setenv(RUN_DIR, str(tmp_path))
    record = ReplicaRecord(0, 0, range(1))
    record.record({"op": "ready", "rank": 0, "dropped": 3})
    record._event_log.close()
    lost, ready = Reader(tmp_path).read()
    assert (lost.events, type(ready).__name__) == (3, "Ready")
