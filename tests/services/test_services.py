"""``kvshare services`` with the real services."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import zmq
from engine_backends import skip_if_missing
from waiting import STUCK, stopped, until

from kvshare.core import ports
from kvshare.core.errors import UserError
from kvshare.services import background, health
from kvshare.services.backends import BACKENDS, ENGINES
from kvshare.services.processes import marked

PATIENT = "from kvshare.services import health; health.TIMEOUT = 60; from kvshare.cli.main import main; main()"


def command(*arguments, run=("-c", PATIENT), **more):
    given = [sys.executable, *run, "services", *map(str, arguments)]
    return subprocess.run(given, capture_output=True, text=True, timeout=STUCK, **more)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.1")
    yield tmp_path / "services"
    for backend in BACKENDS:
        background.down(backend, tmp_path / "services")


def up(backend, folder, **more):
    done = command("up", "--backend", backend, "--folder", folder, "--json", **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_up_status_down(backend, folder):
    started = up(backend, folder)
    assert BACKENDS[backend].check(started["exports"])
    assert ports.exposed({int(v.rpartition(":")[2]) for v in started["exports"].values() if ":" in v}) == []
    assert up(backend, folder) == started  # it stays
    printed = command("status", "--backend", backend, "--folder", folder)
    assert printed.returncode == 0
    exports = [line for line in printed.stdout.splitlines() if not line.startswith("#")]
    assert exports == [f"export {name}={shlex.quote(value)}" for name, value in started["exports"].items()]
    assert command("down", "--backend", backend, "--folder", folder).returncode == 0
    assert not psutil.pid_exists(started["pid"])
    assert command("status", "--backend", backend, "--folder", folder).returncode == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_of_remote(engine, folder):
    """They take the place of kvshare server, which ends, and the other way round."""
    skip_if_missing(engine, folder)
    before = up("remote", folder)
    done = command("up", "--backend", "remote", "--engine", engine, "--folder", folder, "--json")
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)
    assert not psutil.pid_exists(before["pid"])
    assert started["service"] == ENGINES[engine].service
    assert ENGINES[engine].check(started["exports"])
    assert ports.exposed({int(started["exports"]["LMCACHE_REMOTE_URL"].rpartition(":")[2])}) == []
    assert up("remote", folder)["exports"]["LMCACHE_REMOTE_URL"].startswith("lm://")
    assert not psutil.pid_exists(started["pid"])


@pytest.mark.parametrize("arguments", [("p2p", "--engine", "valkey"), ("remote", "--engine", "etcd")])
def test_an_engine_that_a_backend_does_not_have(arguments, folder):
    done = command("up", "--folder", folder, "--backend", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"kvshare: --engine {arguments[-1]}: must be one of valkey, mooncake, with --backend remote"
    ]


def test_what_hangs_is_started_again(folder):
    hung = up("remote", folder)
    with stopped(hung["pid"]):
        assert command("status", "--backend", "remote", "--folder", folder, run=("-m", "kvshare")).returncode == 1
        again = up("remote", folder, run=("-m", "kvshare"))
    assert again["pid"] != hung["pid"]
    assert not psutil.pid_exists(hung["pid"])


def test_after_a_crash_of_up_down_ends_it(folder):
    """up is killed while it waits for the service, which then has nobody."""
    with subprocess.Popen(
        [sys.executable, "-m", "kvshare", "services", "up", "--backend", "p2p", "--folder", str(folder)],
        stdout=subprocess.DEVNULL,
    ) as starting:
        until(lambda: (folder / "p2p.json").is_file() and (folder / "p2p.json").read_text().endswith("}\n"), starting)
        starting.kill()
    (left,) = marked(background.MARK, background.read("p2p", folder).mark)
    assert command("down", "--backend", "p2p", "--folder", folder).returncode == 0
    assert not left.is_running()


def test_fails_at_once_with_the_end_of_the_log(folder):
    done = command("up", "--backend", "remote", "--folder", folder, "--", "--memory", "plenty")
    assert done.returncode == 1
    assert "--memory 'plenty' must be a number" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("kvshare services: kvshare server ended with exit code 2; log: ")
    assert background.read("remote", folder) is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--backend", "smb"), "--backend smb: must be one of remote, p2p"),
        (("--backend", "remote", "--host", "203.0.113.9"), "cannot listen on 203.0.113.9"),
        (("--backend", "mp", "--host", "::1"), "lmcache server and the engines that ask it have no IPv6"),
        (("--backend", "p2p", "--host", "::"), "lmcache_controller and the engines that ask it have no IPv6"),
        (("--backend", "remote", "--folder", "/proc/services"), "cannot write to /proc/services"),
    ],
)
def test_bad_input_is_one_line(arguments, error, tmp_path):
    done = command("up", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert error in line


def test_taken_ports_are_replaced_by_free_ones():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = ports.free_ports("127.0.0.1", {"a": port, "b": ports.free_port(), "c": port})
    assert port not in found.values()
    assert len(set(found.values())) == 3


def test_health_request_is_what_lmcache_would_send():
    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.protocol import ClientCommand, ClientMetaMessage

    key = CacheEngineKey("kvshare", 1, 0, 0, torch.float16)
    shape = torch.Size([0, 0, 0, 0])
    message = ClientMetaMessage(ClientCommand.HEALTH, key, 0, MemoryFormat(1), torch.float16, shape)
    assert message.serialize() == health.HEALTH_REQUEST


def test_mp_server_is_started_with_what_the_config_says(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("chunk_size: 512\nmax_local_cpu_size: 3\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "mine.yaml"))
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.5")
    started = BACKENDS["mp"].command("127.0.0.1", {"server": 1, "http": 2}, tmp_path)
    assert started[started.index("--chunk-size") + 1] == "512"
    assert started[started.index("--l1-size-gb") + 1] == "0.5"


def test_mp_server_takes_no_more_than_dev_shm_has(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))  # docker run's default
    with pytest.raises(UserError, match=r"below the 0\.1 that are free in this machine's memory and /dev/shm"):
        BACKENDS["mp"].command("127.0.0.1", {"server": 1, "http": 2}, tmp_path)


SLEEP, KINDS = "cannot map KV that vLLM's sleep mode frees", "layers of several kinds (full, sliding)"


@pytest.mark.parametrize(
    ("mode", "asleep", "kinds", "wrong"),
    [
        (None, True, ["full", "full"], []),
        ("engine_driven", True, ["full", "full"], []),
        ("auto", True, ["full", "full"], [SLEEP]),
        ("auto", False, ["full", "sliding"], []),
        (None, True, ["full", "sliding"], [KINDS]),
    ],
)
def test_who_copies_kv_with_mp(mode, asleep, kinds, wrong):
    text = SimpleNamespace(layer_types=kinds)
    job = SimpleNamespace(
        device="cuda",
        model=SimpleNamespace(hf_config=SimpleNamespace(get_text_config=lambda: text)),
        engine=SimpleNamespace(enable_sleep_mode=asleep, disable_hybrid_kv_cache_manager=None),
        extra_config={"lmcache.mp.server_urls": "tcp://a:1"} | ({"lmcache.mp.mp_transfer_mode": mode} if mode else {}),
    )
    found = list(BACKENDS["mp"].settings(job, None))
    assert [expected in line for expected, line in zip(wrong, found, strict=True)] == [True] * len(wrong)


@pytest.mark.parametrize("size", ["100000", "much", "0"])
def test_mp_server_takes_no_more_than_there_is(size, tmp_path):
    done = command("up", "--backend", "mp", cwd=tmp_path, env={**os.environ, "LMCACHE_MAX_LOCAL_CPU_SIZE": size})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kvshare: max_local_cpu_size {size} must be a number of GiB below the ")


def test_get_chunk_size_is_what_lmcache_calls_it():
    from lmcache.v1.multiprocess.transport.zmq_impl.wire import LEGACY_OPERATION_IDS

    assert LEGACY_OPERATION_IDS["get_chunk_size"] == health.GET_CHUNK_SIZE


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("lm://127.0.0.1:5555", "is not tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "is not tcp://HOST:PORT"),
        (f"tcp://127.0.0.1:{ports.free_port()}", "start it with: kvshare services up --backend mp"),
    ],
)
def test_no_mp_server(url, error):
    with pytest.raises(UserError, match=error):
        health.check_mp_server(url)


@pytest.mark.parametrize("kind", [zmq.PULL, zmq.REP])
def test_zmq_but_no_mp_server(kind, monkeypatch):
    monkeypatch.setattr(health, "TIMEOUT", 0.3)
    with zmq.Context() as context, context.socket(kind) as other:
        port = other.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(UserError, match="does not answer as lmcache server does"):
            health.check_mp_server(f"tcp://127.0.0.1:{port}")
