import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare import p2p

CONFIG = {
    "lmcache_instance_id": "lmcache_instance_1",
    "p2p_init_ports": list(range(9960, 9968)),
    "p2p_lookup_ports": list(range(9968, 9976)),
    "lmcache_worker_ports": list(range(9950, 9958)),
}


@given(st.sampled_from([(8, 1), (4, 2), (2, 4), (1, 8), (2, 2)]))
def test_replicas_share_nothing(shape):
    replicas, world_size = shape
    envs = [p2p.identity(CONFIG, replica, world_size) for replica in range(replicas)]
    ports = [port for env in envs for name, value in env.items() if name.endswith("PORTS") for port in value.split(",")]
    assert len({env["LMCACHE_LMCACHE_INSTANCE_ID"] for env in envs}) == replicas
    assert len(ports) == len(set(ports)) == 3 * replicas * world_size


def test_too_few_ports_says_how_many():
    with pytest.raises(p2p.TooFewPorts, match=r"p2p_init_ports has 8 different ports, 5 replicas of 2 need 10"):
        p2p.check_ports(CONFIG, 5, 2)


def test_a_port_named_twice_counts_once():
    with pytest.raises(p2p.TooFewPorts):
        p2p.check_ports({"p2p_init_ports": [9960, 9960]}, 2, 1)


def test_empty_lists_are_left_to_lmcache():
    assert p2p.identity({}, 3, 2) == {"LMCACHE_LMCACHE_INSTANCE_ID": "kvshare_r3"}


def test_values_are_what_lmcache_reads():
    from lmcache.v1.config import LMCacheEngineConfig

    env = p2p.identity(CONFIG, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        config = LMCacheEngineConfig.from_env()
    assert config.p2p_init_ports == [9962, 9963]
    assert config.lmcache_worker_ports == [9952, 9953]
    assert config.lmcache_instance_id == "lmcache_instance_1_r1"
