"""What may still be written to is not freed: real sockets of a replica that is late, ends, or was not asked."""

import asyncio
from contextlib import contextmanager

import pytest
import zmq
import zmq.asyncio
from waiting import STUCK

from kvshare.hooks.lmcache import p2p_memory


class Memory:
    freed = 0

    def get_size(self):
        return 10

    def ref_count_down(self):
        self.freed += 1


@contextmanager
def replica():
    """A replica that listens, and the socket of one that loads from it."""
    context = zmq.asyncio.Context()
    listening, loading = context.socket(zmq.REP), context.socket(zmq.REQ)
    port = listening.bind_to_random_port("tcp://127.0.0.1")
    loading.connect(f"tcp://127.0.0.1:{port}")
    try:
        yield listening, loading
    finally:
        context.destroy(linger=0)


async def load(listening, loading):
    """A load that is answered, however late. After it ``loading`` waits 20 ms for an answer."""
    loading.setsockopt(zmq.RCVTIMEO, 1000 * STUCK)
    p2p_memory.watch(loading)
    await loading.send(b"load")
    await listening.recv()
    await listening.send(b"")
    await loading.recv()
    loading.setsockopt(zmq.RCVTIMEO, 20)


async def until(done):
    async with asyncio.timeout(STUCK):
        while not done():
            await asyncio.sleep(0.01)


def has_ended(loading):
    """Whether the connection of a watched socket has ended."""
    return loading.get_monitor_socket().get(zmq.EVENTS) & zmq.POLLIN


def binds(socket, address):
    """Whether the address is free. zmq closes the socket that had it on a thread of its own."""
    try:
        socket.bind(address)
    except zmq.ZMQError:
        return False
    return True


@pytest.mark.parametrize("end", ["answers", "ends", "had ended", "was not asked"])
def test_memory_is_held_until_the_load_is_over(end):
    async def scenario():
        memory, held = [Memory(), Memory()], p2p_memory.Held(100)
        with replica() as (listening, loading):
            for _ in range(2):  # the second load after one that went well
                await load(listening, loading)
            if end == "had ended":
                listening.close(linger=0)
                await until(lambda: has_ended(loading))
            p2p_memory.watch(loading)
            if end != "was not asked":
                await loading.send(b"load")
            if end in ("answers", "ends"):
                await listening.recv()
                with pytest.raises(zmq.Again):
                    await loading.recv()
            held.hold_until_over("address", memory, loading)
            assert "address" in held
            if end in ("answers", "ends"):
                for _ in range(5):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(next(iter(held._tasks))), 0.02)
                assert [one.freed for one in memory] == [0, 0]
                await listening.send(b"") if end == "answers" else listening.close(linger=0)
            await until(lambda: "address" not in held)
            assert [one.freed for one in memory] == [1, 1]
            assert loading.closed
            assert held.bytes() == 0

    asyncio.run(scenario())


def test_a_connection_that_had_ended_before_the_load_says_nothing():
    """LMCache's replicas listen anew after each idle while."""

    async def scenario():
        held = p2p_memory.Held(100)
        with replica() as (listening, loading):
            await load(listening, loading)
            address = listening.getsockopt_string(zmq.LAST_ENDPOINT)
            listening.close(linger=0)
            again = zmq.asyncio.Context.instance().socket(zmq.REP)
            connected = again.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            await until(lambda: has_ended(loading))
            await until(lambda: binds(again, address))
            await asyncio.wait_for(connected.recv_multipart(), STUCK)  # what is sent before may go to the old one
            p2p_memory.watch(loading)
            await loading.send(b"load")
            await asyncio.wait_for(again.recv(), STUCK)
            held.hold_until_over("address", [Memory()], loading)
            await asyncio.sleep(0.1)
            assert "address" in held
            await again.send(b"")
            await until(lambda: "address" not in held)
            p2p_memory.close(again)

    asyncio.run(scenario())


def test_more_than_its_share_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(p2p_memory.logger, "error", lambda text, *args: said.append(text % args))
    held = p2p_memory.Held(25)
    for address in "abcd":
        held.hold(address, [Memory()])
    assert held.full()
    assert len(said) == 1
