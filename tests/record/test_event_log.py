"""The event log's writer: what stalls or fills the record costs events, which are counted, and never a wait."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from kvshare.record import event_log, events
from kvshare.record.event_log import EventLog
from kvshare.record.event_reader import Reader


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_event_log_writes_lines(tmp_path):
    log = EventLog(3, str(tmp_path / "run"))
    log.write("store", policy="p", keys=[1])
    log.close()
    (line,) = lines(tmp_path / "run" / "events-3.jsonl")
    assert (line["op"], line["replica"], line["keys"]) == ("store", 3, [1])


def test_event_log_that_cannot_write_raises_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (None, str(tmp_path / "file"), "/dev/full/x"):
        log = EventLog(0, folder)
        log.write("ready")
        log.close()


def test_it_goes_on_in_a_new_part_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "PART_BYTES", 10_000)
    reader, read = Reader(tmp_path), []
    for start in range(0, 3000, 300):  # a replica that is started ten times
        log = EventLog(0, str(tmp_path))
        for number in range(start, start + 300):
            log.write("store", policy="p", keys=[number])
            if number % 100 == 0:
                read += reader.read()
        log.close()
    read += reader.read()
    assert [event.keys[0] for event in read] == list(range(3000))
    parts = event_log.parts(tmp_path)["0"]
    assert [path.name for path in parts[:2]] == ["events-0.jsonl", "events-0.1.jsonl"]
    assert len(parts) >= 5
    assert len(list(Reader(tmp_path).read())) == 3000


def test_a_stalled_disk_costs_events_that_are_counted(tmp_path, monkeypatch):
    """The file is a pipe that nobody reads: the thread that writes stands still, like on NFS without its server."""
    monkeypatch.setattr(event_log, "QUEUED", 100)
    path = tmp_path / "events-0.jsonl"
    os.mkfifo(path)
    log = EventLog(0, str(tmp_path))
    for number in range(10_000):
        log.write("store", policy="p", keys=[number])
    received = []

    def read():
        with path.open("rb") as pipe:
            received.extend(events.decode(line) for line in pipe)

    reading = threading.Thread(target=read)
    reading.start()
    log.close()
    log._file._close()  # the reader's end of file
    reading.join(30)
    stored = sum(isinstance(event, events.Store) for event in received)
    lost = sum(event.events for event in received if isinstance(event, events.Lost))
    assert 100 <= stored < 10_000
    assert stored + lost == 10_000


def test_a_process_ends_although_its_record_is_stalled(tmp_path):
    os.mkfifo(tmp_path / "events-0.jsonl")
    code = f"""
from kvshare.record import event_log
event_log.FLUSH_SECONDS = 0.5
log = event_log.EventLog(0, {str(tmp_path)!r})
for number in range(20_000):
    log.write("ready")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_is_queued_is_written_at_the_end_of_the_process(tmp_path):
    code = f"""
from kvshare.record.event_log import EventLog
log = EventLog(0, {str(tmp_path)!r})
for number in range(5_000):
    log.write("ready")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert len(list(Reader(tmp_path).read())) == 5000


@pytest.fixture
def full_disk():
    """Files may have so many bytes, and a write beyond fails: as on a full disk, with half a line before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_events_that_are_counted(tmp_path, full_disk):
    log = EventLog(0, str(tmp_path))
    full_disk(1010)
    for number in range(100):
        log.write("store", policy="p", keys=[number])
    wait(lambda: log._queue.empty() and log._lost)
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])  # no limit: there is room again
    log.write("ready")
    log.close()
    found = list(Reader(tmp_path).read())
    stored = sum(isinstance(event, events.Store) for event in found)
    assert 0 < stored < 100
    assert stored + sum(event.events for event in found if isinstance(event, events.Lost)) == 100
    assert isinstance(found[-1], events.Ready)


def wait(until):
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)
