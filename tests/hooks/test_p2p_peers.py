"""One YAML, many replicas: ids, ports, addresses, and what the real controller answers to workers of several ranks."""

import asyncio
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare.core import lmcache_settings, p2p_replica, policy
from kvshare.hooks.lmcache import keys

CONFIG = {
    "lmcache_instance_id": "lmcache_instance_1",
    "p2p_host": "localhost",
    "p2p_init_ports": list(range(9960, 9968)),
    "p2p_lookup_ports": list(range(9968, 9976)),
    "lmcache_worker_ports": list(range(9950, 9958)),
}


def identity(config, replica, world_size, address="127.0.0.1"):
    return p2p_replica.identity(config, replica, world_size, address, count(20_000 + 100 * replica).__next__)


@given(st.sampled_from([(8, 1), (4, 2), (2, 4), (1, 8), (2, 2)]), st.sets(st.sampled_from(p2p_replica.PORT_LISTS)))
def test_replicas_share_nothing(shape, empty):
    replicas, world_size = shape
    config = CONFIG | {key: [] for key in empty}
    envs = [identity(config, replica, world_size) for replica in range(replicas)]
    ports = [port for env in envs for name, value in env.items() if name.endswith("PORTS") for port in value.split(",")]
    assert len({env["LMCACHE_LMCACHE_INSTANCE_ID"] for env in envs}) == replicas
    assert len(ports) == len(set(ports)) == 3 * replicas * world_size


def test_too_few_ports_says_how_many():
    with pytest.raises(p2p_replica.TooFewPorts, match="has 8 different ports, 5 replicas of 2 need 10"):
        p2p_replica.check_ports(CONFIG, 5, 2)


def test_a_port_named_twice_counts_once():
    with pytest.raises(p2p_replica.TooFewPorts):
        p2p_replica.check_ports({"p2p_init_ports": [9960, 9960]}, 2, 1)


def test_one_that_returns_has_another_id():
    """The controller still knows the one that died."""
    one, again = (identity(CONFIG, 0, 1)["LMCACHE_LMCACHE_INSTANCE_ID"] for _ in range(2))
    assert one != again


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", "10.0.0.7"), ("127.0.0.1", "10.0.0.7"), (None, "10.0.0.7"), ("node-3", "node-3")],
)
def test_others_can_reach_the_address(host, expected):
    assert identity(CONFIG | {"p2p_host": host}, 0, 1, "10.0.0.7")["LMCACHE_P2P_HOST"] == expected


@pytest.mark.parametrize("empty", [(), p2p_replica.PORT_LISTS])
def test_values_are_what_lmcache_reads(tmp_path, monkeypatch, empty):
    """Of the second replica of two workers, through a file as LMCache loads it."""
    from lmcache.v1.config import load_engine_config_with_overrides

    more = {"enable_p2p": True, "enable_controller": True, "transfer_channel": "nixl"}
    more |= {"controller_pull_url": "localhost:8300", "controller_reply_url": "localhost:8400"}
    file = tmp_path / "p2p.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in (CONFIG | more | {key: [] for key in empty}).items()))
    settings = lmcache_settings.effective(str(file))
    assert (settings.lmcache_worker_ports == []) == bool(empty)
    for name, value in identity(settings.to_dict(), 1, 2).items():
        monkeypatch.setenv(name, value)
    config = load_engine_config_with_overrides(str(file))
    assert config.p2p_init_ports == ([20100, 20101] if empty else [9962, 9963])
    assert config.lmcache_worker_ports == ([20104, 20105] if empty else [9952, 9953])
    assert config.lmcache_instance_id.startswith("lmcache_instance_1_r1_")
    assert config.p2p_host == "127.0.0.1"


def test_each_rank_is_sent_to_its_like():
    """LMCache's own registry looks for a hash only: without the rank in it rank 1 would be sent to a rank 0."""
    from lmcache.v1.cache_controller.controllers import KVController
    from lmcache.v1.cache_controller.message import BatchedKVOperationMsg, BatchedP2PLookupMsg, KVOpEvent, OpType
    from lmcache.v1.cache_controller.utils import RegistryTree

    registry = RegistryTree()
    for rank in (0, 1):
        registry.register_worker("a", rank, "127.0.0.1", 1, f"a{rank}", None, 0.0)
        operation = KVOpEvent(OpType.ADMIT, key_hash(rank), 0)
        registry.handle_batched_kv_operations(BatchedKVOperationMsg("a", rank, "LocalCPUBackend", [operation]))
    for rank in (0, 1):
        question = BatchedP2PLookupMsg(hashes=[key_hash(rank)], instance_id="b", worker_id=rank)
        answer = asyncio.run(KVController(registry).batched_p2p_lookup(question))
        assert answer.layout_info == [("a", "LocalCPUBackend", 1, f"a{rank}")]


def key_hash(rank):
    """Of one chunk, as a worker of this rank makes it."""
    database = SimpleNamespace(metadata=SimpleNamespace(worker_id=rank))

    def upstream(chunk_hash, request_configs):
        return SimpleNamespace(chunk_hash=chunk_hash, model_name="m")

    return keys._make_key(upstream, database, (7, {policy.TAG: "run-1"}), {}).chunk_hash


AGENT = """
import os, signal, sys, time
from pathlib import Path
from kvshare.hooks.lmcache import nixl_agents
nixl_agents.patch_nixl(None)
from nixl._api import nixl_agent, nixl_agent_config
threads = lambda: set(Path("/proc/self/task").iterdir())
before = threads()
with nixl_agents.nixl_agents(thread={thread}):
    agent = nixl_agent(sys.argv[1], nixl_agent_config(backends=["UCX"]))
new = threads() - before
"""
STOPPED = f"""{AGENT.format(thread=False)}
print(agent.get_agent_metadata().hex())
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGSTOP)
"""
WAITING = f"""{AGENT.format(thread=False)}
agent.add_remote_agent(bytes.fromhex(sys.argv[2]))
agent.get_new_notifs()
before = time.process_time()
time.sleep(1)
print("busy", time.process_time() - before)
"""
IDLE = f"""{AGENT.format(thread=True)}
waits = lambda: [int((t / "status").read_text().split("\\nvoluntary_ctxt_switches:")[1].split()[0]) for t in new]
first, began, most = waits(), time.process_time(), 0
while most < 20 and time.process_time() < began + 5:  # one that takes a core gets there on any machine
    time.sleep(0.1)
    most = max(b - a for a, b in zip(first, waits()))
print("waits", most)
"""


def test_waiting_for_a_connection_takes_no_core():
    """As LMCache starts it, NIXL takes one: the other may need it to answer."""
    with subprocess.Popen([sys.executable, "-c", STOPPED, "other"], stdout=subprocess.PIPE, text=True) as other:
        try:
            metadata = next(line for line in other.stdout if set(line) <= set("0123456789abcdef\n"))
            command = [sys.executable, "-c", WAITING, "one", metadata.strip()]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        finally:
            other.kill()
    assert float(done.stdout.rpartition("busy")[2]) < 0.2


def test_nixls_thread_waits_for_news():
    """As LMCache starts it, it never does, and takes a core."""
    done = subprocess.run([sys.executable, "-c", IDLE, "idle"], capture_output=True, text=True, check=True)
    assert int(done.stdout.rpartition("waits")[2]) >= 20
