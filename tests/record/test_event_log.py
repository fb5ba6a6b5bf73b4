import json

from kvshare.record.event_log import EventLog, Reader


def test_event_log_writes_lines(tmp_path):
    EventLog(3, str(tmp_path / "run")).write("store", policy="p", keys=[1])
    line = json.loads((tmp_path / "run" / "events-3.jsonl").read_text())
    assert (line["op"], line["replica"], line["keys"]) == ("store", 3, [1])


def test_event_log_that_cannot_write_raises_nothing(tmp_path):
    EventLog(0, None).write("store")
    (tmp_path / "file").write_text("")
    EventLog(0, str(tmp_path / "file")).write("store")
    EventLog(0, "/dev/full/x").write("store")


def test_reader_reads_whole_lines_once(tmp_path):
    reader, path = Reader(tmp_path), tmp_path / "events-0.jsonl"
    assert reader.read() == []
    path.write_text('{"a": 1}\n{"a": ')
    assert reader.read() == [{"a": 1}]
    with path.open("a") as file:
        file.write('2}\nhalf a line of a full disk\n{"a": 3}\n')
    assert reader.read() == [{"a": 2}, {"a": 3}]
    assert reader.read() == []
