"""Which transport UCX has chosen, between two real processes with a NIXL agent each."""

import os
import subprocess
import sys

import pytest
from waiting import STUCK

from kvshare.record import ucx

PAIR = """
import os, sys, torch
from kvshare.record import ucx
ucx.ask()
from nixl._api import nixl_agent, nixl_agent_config

def agent(name):
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    made = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    made.register_memory([(memory.data_ptr(), len(memory), 0, "")], "DRAM")
    return made, memory, made.get_xfer_descs([(memory.data_ptr(), len(memory), 0)], "DRAM")

told, tell = os.pipe()
alive, ended = os.pipe()
if not os.fork():
    os.close(ended)
    made, memory, descs = agent("other")
    meta = made.get_agent_metadata()
    os.write(tell, len(meta).to_bytes(8, "big") + meta + made.get_serialized_descs(descs))
    os.close(tell)
    os.set_blocking(alive, False)
    while True:
        made.get_new_notifs()
        try:
            if not os.read(alive, 1):
                os._exit(0)
        except BlockingIOError:
            pass
os.close(tell)
made, memory, descs = agent("one")
data = open(told, "rb").read()
size = int.from_bytes(data[:8], "big")
name = made.add_remote_agent(data[8 : 8 + size])
transfer = made.initialize_xfer("WRITE", descs, made.deserialize_descs(data[8 + size :]), name)
state = made.transfer(transfer)
while state == "PROC":
    state = made.check_xfer_state(transfer)
print(state, ucx.own(), sep=": ", flush=True)
os._exit(0)
"""


def run(folder, **environment):
    environment = {**os.environ, "KVSHARE_RUN_DIR": str(folder), **environment}
    command = [sys.executable, "-c", PAIR]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STUCK)
    return done.stdout.splitlines()[-1] if done.stdout else done.stderr


def test_what_ucx_has_chosen(tmp_path):
    pytest.importorskip("nixl")
    assert run(tmp_path, UCX_TLS="tcp,self", UCX_NET_DEVICES="lo") == "DONE: tcp/lo on one host"
    assert ucx.of_run(tmp_path) == "tcp/lo on one host"
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    assert "on one host" in run(chosen)  # whatever this host allows


def test_the_users_own_settings_stay(tmp_path):
    pytest.importorskip("nixl")
    assert run(tmp_path, UCX_PROTO_INFO="n") == "DONE: "
    assert ucx.of_run(tmp_path) == ""


def test_several_hosts(tmp_path):
    (tmp_path / "ucx-1.log").write_text(
        "[1.0] [host:1:0]   | one inter-node cfg#2                        |\n"
        "[1.0] [host:1:0]   | remote memory write by ucp_put*(multi)      |\n"
        "[1.0] [host:1:0]   |    0..20 | short     | tcp/eth0             |\n"
        "[1.0] [host:1:0]   |  21..inf | zero-copy | rc_mlx5/mlx5_0:1     |\n"
        "[1.0] [host:1:0]   | active message by ucp_am_send*              |\n"
        "[1.0] [host:1:0]   |   0..inf | zero-copy | tcp/eth0             |\n"
    )
    assert ucx.of_run(tmp_path) == "rc_mlx5/mlx5_0:1 between hosts"
