"""P2P with real parts (`make p2p`): three vLLM replicas from one YAML, NIXL, and a real lmcache_controller."""

import contextlib
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations

import peers
import pytest
from conftest import CHUNK
from engines import Engine
from peers import Controller
from test_live_engines import same
from waiting import until

from kvshare.core import policy

HOSTS = ("10.213.77.1", "10.213.77.2")
WHOLE = 4 * CHUNK


@pytest.fixture(scope="module")
def controller(processes, tmp_path_factory):
    return Controller(processes, tmp_path_factory.mktemp("controller"))


@pytest.fixture(scope="module")
def start(processes, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    model = weights.make(0)

    def start(controller, rank, name, address="127.0.0.1", inside=(), **more):
        environment = peers.environment(controller, rank, address) | more
        return Engine(processes, rank, model, folder / f"{name}.log", environment, address, inside)

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def replicas(controller, start):
    started = [start(controller, rank, str(rank)) for rank in range(3)]
    for replica in started:
        replica.wait()
    for writer, reader in permutations(started, 2):
        until(partial(shares, writer, reader))
    return started


@pytest.fixture
def namespace():
    """Another host: a network namespace, joined to this one by a veth pair; the command to run in it."""
    name, here, there = "kvshare", "kvshare0", "kvshare1"
    commands = [
        f"ip netns add {name}",
        f"ip link add {here} type veth peer name {there} netns {name}",
        f"ip addr add {HOSTS[0]}/30 dev {here}",
        f"ip link set {here} up",
        f"ip -n {name} addr add {HOSTS[1]}/30 dev {there}",
        f"ip -n {name} link set {there} up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield ("ip", "netns", "exec", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for command in (f"ip link del {here}", f"ip netns del {name}"):
            with contextlib.suppress(OSError):
                subprocess.run(command.split(), check=False, capture_output=True)


def prompt(chunks=4, begin=()):
    return [*begin, *(random.randrange(300, 1500) for _ in range(chunks * CHUNK + 50 - len(begin)))]


@pytest.fixture(autouse=True)
def nothing_is_freed_twice(request):
    yield
    for log in request.getfixturevalue("start").folder.glob("*.log"):
        assert "Double free" not in log.read_text()


def hits(replica, text, stamp, weights=None, tokens=4):
    """Tokens loaded."""
    start = len(replica.events)
    answer = replica.ask(text, stamp, tokens)
    if weights:
        weights.check(0, text, answer)
    return replica.hits(start)


def test_each_reads_what_each_other_computed(replicas, weights):
    stamp = policy.private_policy()
    for writer, reader in permutations(replicas, 2):
        text = prompt()
        assert hits(writer, text, stamp, weights) == 0
        assert hits(reader, text, stamp, weights) == WHOLE


def test_a_replica_that_sleeps_serves_others_and_finds_what_it_has_when_it_wakes(replicas, weights):
    one, two, _ = replicas
    stamp, text = policy.private_policy(), prompt()
    hits(one, text, stamp, weights)
    one.sleep()
    assert hits(two, text, stamp, weights) == WHOLE
    one.wake()
    assert hits(one, text, stamp, weights) == WHOLE
    assert hits(one, text, policy.private_policy(), weights) == 0


def test_another_policy_finds_nothing(replicas, weights):
    one, two, three = replicas
    text = prompt()
    assert hits(one, text, "run-1", weights) == 0
    assert hits(two, text, "run-2", weights) == 0
    assert hits(three, text, "run-1", weights) == WHOLE
    assert hits(three, text, None, weights) == 0


def test_parts_that_several_hold(replicas, weights):
    """The second prompt's beginning is the first one's: who computes its end does not hold its beginning."""
    one, two, three = replicas
    stamp, first = policy.private_policy(), prompt(3)
    second = prompt(4, first[: 2 * CHUNK])
    assert hits(one, first, stamp) == 0
    assert hits(two, second, stamp) == 2 * CHUNK
    assert hits(three, second, stamp, weights) == WHOLE


def test_samples_that_come_together_load_once(replicas, weights):
    one, two, _ = replicas
    stamp, text = policy.private_policy(), prompt()
    one.ask(text, stamp)
    start, sent = len(two.events), one.log.read_text().count("P2P transfer finished")
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(lambda _: two.ask(text, stamp, 4), range(8)):
            weights.check(0, text, answer)
            assert answer.cached >= WHOLE
    assert two.hits(start) == WHOLE
    assert one.log.read_text().count("P2P transfer finished") == sent + 1


def test_none_of_200_expected_hits_is_missed(replicas):
    stamp = policy.private_policy()

    def pair(number):
        writer, reader = replicas[number % 3], replicas[(number + 1 + number // 3 % 2) % 3]
        text = prompt(2)
        answers = [writer.ask(text, stamp, 1), reader.ask(text, stamp, 1)]
        same(*answers)
        return answers[1].cached

    with ThreadPoolExecutor(2) as pool:
        cached = list(pool.map(pair, range(200)))
    found = cached.count(2 * CHUNK)
    print(f"\n{found} of 200 expected hits")
    assert found == 200


def test_controller_dies_and_returns(replicas, controller, weights):
    one, two, three = replicas
    stamp, before, during = policy.private_policy(), prompt(), prompt()
    hits(one, before, stamp)
    controller.kill()
    began = time.monotonic()
    hits(one, during, stamp, weights)
    assert hits(two, during, stamp, weights) == 0
    hits(two, prompt(), stamp, weights)
    print(f"\nwithout controller: {time.monotonic() - began:.2f} s for 3 requests")
    controller.start()
    began = time.monotonic()
    until(lambda: shares(one, two))
    print(f"shares again {time.monotonic() - began:.1f} s after its return")
    until(lambda: shares(two, one) and shares(one, three))
    assert hits(three, before, stamp, weights) == WHOLE
    assert hits(three, during, stamp, weights) == WHOLE


def shares(writer, reader, weights=None):
    stamp, text = policy.private_policy(), prompt()
    hits(writer, text, stamp, weights)
    return hits(reader, text, stamp, weights) == WHOLE


def test_replica_dies_and_returns(replicas, controller, start, weights):
    one, two, three = replicas
    stamp, text = policy.private_policy(), prompt()
    hits(three, text, stamp)
    assert hits(two, prompt(), stamp) == 0
    known = prompt()
    hits(three, known, stamp)
    assert hits(one, known, stamp) == WHOLE  # connected
    three.kill()
    began = time.monotonic()
    assert hits(one, text, stamp, weights) == 0
    assert hits(two, text, stamp, weights) in (0, WHOLE)  # one has it now
    print(f"\nafter a death: {time.monotonic() - began:.2f} s for 2 requests")
    other = prompt()
    hits(one, other, stamp)
    assert hits(two, other, stamp, weights) == WHOLE
    replicas[2] = three = start(controller, 2, "again").wait()
    for writer, reader in ((one, three), (three, two), (two, three), (three, one)):
        until(partial(shares, writer, reader, weights))


def test_two_hosts(namespace, processes, start, weights, tmp_path):
    """A replica and the controller on this one, a replica on the other; KV goes over TCP."""
    controller = Controller(processes, tmp_path, HOSTS[0])
    places = zip(HOSTS, ((), namespace), strict=True)
    pair = [
        start(controller, rank, f"host-{rank}", host, inside, UCX_TLS="tcp,self", VLLM_HOST_IP=host)
        for rank, (host, inside) in enumerate(places)
    ]
    for replica in pair:
        replica.wait()
    for writer, reader in (pair, pair[::-1]):
        until(partial(shares, writer, reader, weights))
    for replica in pair:
        replica.kill()
    controller.kill()
