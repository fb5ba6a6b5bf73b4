from kvshare.record import events
from kvshare.record.event_reader import Reader


def line(replica, time):
    return f'{{"op": "ready", "time": {time}, "replica": {replica}}}\n'


def test_whole_lines_are_read_once(tmp_path):
    reader, path = Reader(tmp_path), tmp_path / "events-0.jsonl"
    assert list(reader.read()) == []
    path.write_text(line(0, 1) + line(0, 2)[:20])
    assert [event.time for event in reader.read()] == [1]
    with path.open("a") as file:
        file.write(line(0, 2)[20:] + line(0, 3))
    record = reader.read()
    assert [event.time for event in record] == [event.time for event in record] == [2, 3]
    assert list(reader.read()) == []


def test_a_line_that_is_no_event_counts_as_lost(tmp_path):
    strange = ["half a line of a full disk", '{"op": "request"}', '{"op": "x"}', "\x00", "[1]", "NaN"]
    strange += ['{"op": "ready", "time": 1, "replica": "zero"}', '{"op": "ready", "time": 1, "replica": -1}']
    (tmp_path / "events-0.jsonl").write_text("".join(f"{text}\n\n" for text in strange) + line(0, 1))
    found = list(Reader(tmp_path).read())
    assert sum(event.events for event in found if isinstance(event, events.Lost)) == len(strange)
    assert isinstance(found[-1], events.Ready)


def test_logs_are_merged_in_order_of_time_and_parts_in_theirs(tmp_path):
    (tmp_path / "events-0.jsonl").write_text(line(0, 1) + line(0, 4))
    for part in range(1, 12):
        (tmp_path / f"events-0.{part}.jsonl").write_text(line(0, 4 + part))
    (tmp_path / "events-10.jsonl").write_text(line(10, 2) + line(10, 3))
    assert [event.time for event in Reader(tmp_path).read()] == list(range(1, 16))


def test_a_long_last_line_is_not_read_before_it_is_whole(tmp_path):
    path = tmp_path / "events-0.jsonl"
    path.write_text(line(0, 1) + '{"op": "store", "keys": [' + "1," * 100_000)
    assert [event.time for event in Reader(tmp_path).read()] == [1]
