"""P2P without vLLM: what is found, that it is right, and what happens when something dies."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from peers import Controller, Peer
from waiting import until

WHOLE = 512  # tokens, two chunks
BYTES = 2 * 2 * 2 * 64 * 4  # of KV of a token, as in peer.py
numbers = itertools.count()


@pytest.fixture(scope="module")
def controller(processes, tmp_path_factory):
    return Controller(processes, tmp_path_factory.mktemp("controller"))


@pytest.fixture(scope="module")
def start(processes, controller, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    return lambda rank, name: Peer(processes, controller, rank, folder / name)


@pytest.fixture(scope="module")
def peers(start):
    started = [start(rank, str(rank)) for rank in range(3)]
    for writer, reader in itertools.permutations(started, 2):
        wait_until_shared(writer, reader)
    yield started
    for peer in started:  # which take 750 MiB each
        peer.kill()


def loads(writer, reader):
    """What the reader loads, as soon as it finds all: the controller hears of a store later, and chunk by chunk."""
    number = next(numbers)
    writer.store(number)
    return load_whole(reader, number)


def load_whole(reader, number):
    return until(lambda: (found := reader.load(number)) in (WHOLE, -1) and found)


def wait_until_shared(writer, reader):
    """Each try stores another prompt: what is stored before the writer is registered is not found."""

    def shared():
        number = next(numbers)
        writer.store(number)
        return reader.load(number) == WHOLE

    until(shared)


def test_all_is_found_and_right(peers):
    """With few pages: they are used again and again."""
    pairs = list(itertools.permutations(peers, 2)) * 5
    assert [loads(writer, reader) for writer, reader in pairs] == [WHOLE] * len(pairs)
    assert not any("Double free" in peer.log.read_text() for peer in peers)  # LMCache's warning


def test_all_at_once(peers):
    """Each one stores, serves and loads at the same time."""
    with ThreadPoolExecutor(3) as pool:
        for shift in (1, 2):
            known = [next(numbers) for _ in peers]
            for at, (peer, number) in enumerate(zip(peers, known, strict=True)):
                peer.store(number)
                wait_until_shared(peer, peers[at - shift])  # the controller hears of stores in their order
            asked = [(peers[(at + shift) % 3], number) for at, number in enumerate(known)]
            assert list(pool.map(lambda pair: pair[0].load(pair[1]), asked)) == [WHOLE] * 3


def test_what_was_loaded_is_kept(peers):
    """Else a replica finds nothing of its own behind it."""
    writer, reader, _ = peers
    number = next(numbers)
    writer.store(number)
    assert load_whole(reader, number) == WHOLE
    assert writer.used() == 0  # it has lost all that it had
    assert reader.load(number) == WHOLE


@pytest.mark.slow
def test_controller_dies_and_returns(peers, controller):
    one, two, three = peers
    before, during = next(numbers), next(numbers)
    one.store(before)
    controller.kill()
    one.store(during)
    assert two.load(during) == 0
    controller.start()
    for writer, reader in ((one, two), (two, three), (three, one)):
        wait_until_shared(writer, reader)
    assert three.load(before) == WHOLE  # it was told again


@pytest.mark.slow
def test_peer_hangs_and_goes_on(peers):
    """One load waits for it, whatever is asked meanwhile; its memory is free once the peer can write no more."""
    one, _, three = peers
    known = [next(numbers) for _ in range(3)]
    for number in known:
        three.store(number)
    wait_until_shared(three, one)  # the controller has heard of them
    until(lambda: one.used() == 0)
    with three.stopped():
        assert [one.load(number) for number in known] == [0, 0, 0]
        assert one.used() == WHOLE * BYTES
    wait_until_shared(three, one)
    until(lambda: one.used() == 0)


@pytest.mark.slow
def test_peer_dies_and_returns(peers, start):
    one, two, three = peers
    known = next(numbers)
    three.store(known)
    wait_until_shared(three, one)  # the controller has heard of both
    three.kill()
    assert one.load(known) == 0
    assert loads(one, two) == WHOLE
    until(lambda: one.used() == 0)
    peers[2] = three = start(2, "again")
    for writer, reader in itertools.permutations(peers, 2):
        wait_until_shared(writer, reader)
