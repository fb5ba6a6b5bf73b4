"""The events socket: what is no event is one line in the log, and the next one comes through."""

import asyncio
import json

import pytest
import zmq
from waiting import STUCK

from kvshare.record import worker_events

LOAD = {
    "op": "load",
    "request": "r",
    "policy": "p",
    "keys": [2**64 - 1],
    "tokens": [256],
    "expected": 256,
    "seconds": 0.1,
}
EVENTS = [
    {"op": "ready"},
    {"op": "store", "request": None, "policy": "", "keys": [1]},
    {"op": "stored", "request": "r", "policy": "p", "end": 0, "seconds": 0.0},
    LOAD,
]


async def receive(*messages):
    """What a receiver makes of them: all that it takes for events."""
    receiver = worker_events.Receiver()
    with zmq.Context.instance().socket(zmq.PUSH) as socket:
        socket.connect(receiver.address)
        for message in (*messages, b'{"op": "ready"}'):
            socket.send(message)
        taken = []
        while not taken or taken[-1] != {"op": "ready"}:
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
    monkeypatch.setattr(worker_events.logger, "error", lambda text, *args: errors.append(text % args))
    assert asyncio.run(receive(garbage, json.dumps(LOAD).encode())) == [LOAD]
    assert len(errors) == 1
    assert "is not an event" in errors[0]
    assert len(errors[0]) < 1000
