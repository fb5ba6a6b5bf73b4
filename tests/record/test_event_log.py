"""The event log's writer: what stalls or fills the record costs events, which are counted, and never a wait."""

import json
import os
import subprocess
import sys
import threading

from waiting import STUCK

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
    monkeypatch.setattr(event_log, "FLUSH_SECONDS", 300)
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
    monkeypatch.setattr(event_log, "FLUSH_SECONDS", 300)
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
    reading.join(STUCK)
    stored = sum(isinstance(event, events.Store) for event in received)
    lost = sum(event.events for event in received if isinstance(event, events.Lost))
    assert 100 <= stored < 10_000
    assert stored + lost == 10_000


def run(code, folder):
    """Run code with a ``log`` in a process of its own, which ends as Python processes do."""
    start = f"""
import resource, signal, time
from kvshare.record import event_log
log = event_log.EventLog(0, {str(folder)!r})
"""
    subprocess.run([sys.executable, "-c", start + code], check=True, timeout=600)


def test_a_process_ends_although_its_record_is_stalled(tmp_path):
    os.mkfifo(tmp_path / "events-0.jsonl")
    code = """
event_log.FLUSH_SECONDS = 0.5
for _ in range(20_000):
    log.write("ready")
"""
    run(code, tmp_path)


def test_what_is_queued_is_written_at_the_end_of_the_process(tmp_path):
    code = """
event_log.FLUSH_SECONDS = 300
for _ in range(5_000):
    log.write("ready")
"""
    run(code, tmp_path)
    assert len(list(Reader(tmp_path).read())) == 5000


def test_a_full_disk_costs_events_that_are_counted(tmp_path):
    """A file may have 1,010 bytes, and a write beyond fails: half a line is written, as on a full disk."""
    code = """
event_log.FLUSH_SECONDS = 300
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1010, most))
for number in range(100):
    log.write("store", policy="p", keys=[number])
while not (log._queue.empty() and log._lost):
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
log.write("ready")
"""
    run(code, tmp_path)
    found = list(Reader(tmp_path).read())
    stored = sum(isinstance(event, events.Store) for event in found)
    assert 0 < stored < 100
    assert stored + sum(event.events for event in found if isinstance(event, events.Lost)) == 100
    assert isinstance(found[-1], events.Ready)
