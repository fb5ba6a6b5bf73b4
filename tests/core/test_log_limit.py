import logging

from kvshare.core import log_limit
from kvshare.core.log_limit import LimitedLogger


def test_one_line_a_minute_with_the_number_left_out(caplog, monkeypatch):
    now = 5.0
    monkeypatch.setattr(log_limit.time, "monotonic", lambda: now)
    limited = LimitedLogger(logging.getLogger("kvshare.test"))
    for number in range(1000):
        limited.error("entry %d is bad", number)
    limited.error("%s is slow", "one server")
    limited.error("%s is slow", "another")
    now += log_limit.EVERY
    limited.error("entry %d is bad", 1000)
    assert [record.getMessage() for record in caplog.records] == [
        "entry 0 is bad",
        "one server is slow",
        "another is slow",
        "entry 1000 is bad (and 999 times since this was last logged)",
    ]
    assert {record.filename for record in caplog.records} == {"test_log_limit.py"}


def test_an_exception_keeps_its_traceback(caplog):
    limited = LimitedLogger(logging.getLogger("kvshare.test"))
    for _ in range(2):
        try:
            raise KeyError("k")
        except KeyError:
            limited.exception("it failed")
    (record,) = caplog.records
    assert record.exc_info[0] is KeyError
