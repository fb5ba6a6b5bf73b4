"""kvshare's metrics in verl's own logger: the real Tracking, its file and console backends, and an event log."""

import json
import logging

import pytest
import verl.utils.tracking as tracking
from test_report import load, request, store

from kvshare.hooks.verl import step_metrics
from kvshare.record.event_log import EventLog


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Logs to verl; ``log.lines()`` is what its file got."""
    monkeypatch.setenv("KVSHARE_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    monkeypatch.setattr(tracking.Tracking, "log", tracking.Tracking.log)  # undone with what wraps it
    if not hasattr(tracking.Tracking.log, "__wrapped__"):
        step_metrics.patch_tracking(tracking)
    (tmp_path / "run.json").write_text('{"replicas": 2}')
    verl = tracking.Tracking("project", "experiment", ["console", "file"])

    def log(**data):
        verl.log(data=data, step=1)

    log.lines = lambda: [json.loads(x)["data"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    yield log
    verl.finish()


def write(folder, *events):
    for event in events:
        log = EventLog(event["replica"], str(folder))
        log.write(**{k: v for k, v in event.items() if k not in ("time", "replica")})
        log.close()


def step(number):
    return {"training/global_step": number, "reward": 0.5}


def test_a_step_has_what_came_since_the_last(log, tmp_path, capsys):
    write(tmp_path, store(0, "p", 1), request(0, "p", 300))
    log(**step(1))
    write(tmp_path, load(1, "p", 1), request(1, "p", 400, cached=256))
    log(**step(2))
    first, second = log.lines()
    assert first["kvshare/computed_tokens"] == 300
    assert first["kvshare/replicas_seen"] == 1
    assert second["reward"] == 0.5
    assert (second["kvshare/shared_hit_tokens"], second["kvshare/computed_tokens"]) == (256, 144)
    assert second["kvshare/stale_hit_tokens"] == 0
    assert "kvshare/time_saved_s" not in second  # not known yet
    said = capsys.readouterr().out
    assert "kvshare step 1: 300 prompt tokens: 300 computed, 0 local hit, 0 restored, 0 shared hit, 0 stale" in said
    assert "NOT SEEN: replica 1 " in said
    assert "144 computed, 0 local hit, 0 restored, 256 shared hit, 0 stale; time saved" in said


def test_replicas_that_only_validate_are_not_missed(log, tmp_path, capsys):
    """Nothing is heard of them without a connector: of hybrid ones, which have the first ranks, in separate_async."""
    (tmp_path / "run.json").write_text('{"replicas": 3, "standby": 1}')
    write(tmp_path, request(1, "p", 300))
    log(**step(1))
    assert "NOT SEEN: replica 2 " in capsys.readouterr().out
    write(tmp_path, request(2, "p", 300))
    log(**step(2))
    assert "NOT SEEN" not in capsys.readouterr().out


def test_versions_in_flight(log, tmp_path, capsys):
    write(tmp_path, request(0, "p1", 300), request(0, "p2", 300), request(1, "private-1", 300))
    log(**step(1))
    write(tmp_path, request(0, "p2", 300))
    log(**step(2))
    assert [line["kvshare/policies"] for line in log.lines()] == [2, 1]
    first, second = capsys.readouterr().out.split("kvshare step 2")
    assert "0 stale; 2 versions in flight; " in first
    assert "in flight" not in second


def test_stale_tokens_are_loud(log, tmp_path, capsys):
    write(tmp_path, store(0, "p0", 1), load(1, "p1", 1), request(1, "p1", 300, cached=256))
    log(**step(1))
    assert "STALE: 256" in capsys.readouterr().out


def test_lost_events_are_loud(log, tmp_path, capsys):
    log(**step(1))
    (tmp_path / "events-0.jsonl").write_text('{"op": "lost", "time": 1, "replica": 0, "events": 7}\nno event\n')
    log(**step(2))
    assert [line["kvshare/lost_events"] for line in log.lines()] == [0, 8]
    assert "8 EVENTS WERE LOST" in capsys.readouterr().out


def test_validation_is_left_as_it_is(log):
    log(**{"val/accuracy": 1.0})
    assert log.lines() == [{"val/accuracy": 1.0}]


def test_an_error_stops_the_metrics_and_nothing_else(log, tmp_path, caplog):
    (tmp_path / "run.json").write_text("[]")  # nothing that preflight writes
    with caplog.at_level(logging.ERROR):
        log(**step(1))
        log(**step(2))
    assert log.lines() == [step(1), step(2)]
    assert sum("metrics end here" in record.message for record in caplog.records) == 1
