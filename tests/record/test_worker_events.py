"""The events socket: what is no event is one line in the log, and the next one comes through."""

import asyncio
import json
import logging
from types import SimpleNamespace
from uuid import uuid4

import pytest
import zmq
from waiting import STUCK

from kvshare.core.log_limit import LimitedLogger
from kvshare.record import worker_events

LOAD = {
    "op": "load",
    "request": "r",
    "policy": "p",
    "keys": [2**64 - 1],
    "tokens": [256],
    "expected": 256,
    "seconds": 0.1,
    "epoch": 1,
    "weights": "0123456789abcdef",
}
READY = b'{"op": "ready", "rank": 1}'
EVENTS = [
    {"op": "ready", "rank": 1},
    {"op": "store", "request": None, "policy": "", "keys": [1], "epoch": 0, "weights": ""},
    {"op": "stored", "request": "r", "policy": "p", "end": 0, "seconds": 0.0},
    {"op": "partial", "request": "r", "policy": "p", "tokens": 0},
    LOAD,
    {"op": "staleprefix", "request": "r", "policy": "p", "tokens": 128},
]


async def receive(*messages):
    """What a receiver makes of them: all that it takes for events."""
    receiver = worker_events.Receiver()
    with zmq.Context.instance().socket(zmq.PUSH) as socket:
        socket.connect(receiver.address)
        for message in (*messages, READY):
            socket.send(message)
        taken = []
        while not taken or taken[-1] != EVENTS[0]:
            taken.append(await asyncio.wait_for(receiver.receive(), STUCK))
    return taken[:-1]


@pytest.mark.parametrize("event", EVENTS[1:], ids=lambda event: event["op"])
def test_event_comes_as_it_was_sent(event):
    assert asyncio.run(receive(json.dumps(event).encode())) == [event]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00\xff\xfe",
        b"{",
        b"7",
        b"[]",
        b"{}",
        b'{"op": "delete"}',
        b'{"op": ["ready"]}',
        b'{"op": "store"}',
        json.dumps({**EVENTS[1], "keys": [[]]}).encode(),
        json.dumps({**EVENTS[2], "seconds": "soon"}).encode(),
        json.dumps({**LOAD, "tokens": []}).encode(),
        json.dumps({**LOAD, "seconds": 0}).encode(),
        b"[" * 100_000,
    ],
    ids=lambda garbage: ascii(garbage[:40]),
)
def test_garbage_is_one_line(garbage, monkeypatch):
    errors = []
    monkeypatch.setattr(worker_events, "logger", SimpleNamespace(error=lambda text, *args: errors.append(text % args)))
    assert asyncio.run(receive(garbage, json.dumps(LOAD).encode())) == [LOAD]
    assert len(errors) == 1
    assert "is not an event" in errors[0]
    assert len(errors[0]) < 1000


def test_a_stream_of_garbage_is_one_line(monkeypatch, caplog):
    monkeypatch.setattr(worker_events, "logger", LimitedLogger(logging.getLogger("kvshare.test")))
    assert asyncio.run(receive(*[b"garbage"] * 500, json.dumps(LOAD).encode())) == [LOAD]
    assert len(caplog.records) == 1


def test_dropped_events_are_counted_by_the_next_one():
    """More events than zmq's queues take, because nobody receives."""
    sender = worker_events.Sender(address := f"ipc://@kvshare-test-{uuid4().hex}")
    for _ in range(5000):
        sender.send(EVENTS[1])
    with zmq.Context.instance().socket(zmq.PULL) as socket:
        socket.RCVTIMEO = 30_000
        socket.bind(address)
        sent, received, dropped = 5000, 0, 0
        while not dropped:
            dropped = json.loads(socket.recv()).get("dropped", 0)
            received += 1
            if not dropped:
                sender.send(EVENTS[1])
                sent += 1
        while sender._dropped or received + dropped < sent:
            if sender._dropped:
                sender.send(EVENTS[1])
                sent += 1
            received += 1
            dropped += json.loads(socket.recv()).get("dropped", 0)
    assert received + dropped == sent


def test_dropped_events_come_through_the_receiver():
    event = {**EVENTS[1], "dropped": 7}
    assert asyncio.run(receive(json.dumps(event).encode())) == [event]
