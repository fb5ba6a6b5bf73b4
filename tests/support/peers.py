"""A real lmcache_controller, and replicas without vLLM (peer.py), to kill and start again."""

import sys
from functools import partial
from pathlib import Path
from uuid import uuid4

import zmq
from conftest import ROOT
from waiting import stopped

from kvshare.core import lmcache_settings, p2p_replica, ports
from kvshare.services import backends, health

CONFIG = str(ROOT / "config" / "p2p_backend_config.yaml")
SETTINGS = {
    "LMCACHE_CONFIG_FILE": CONFIG,
    "LMCACHE_TRANSFER_CHANNEL": "nixl",
    "LMCACHE_NIXL_BUFFER_DEVICE": "cpu",
    "LMCACHE_LOOKUP_TIMEOUT_MS": "10000",  # a busy machine may take its time
}


class Controller:
    """A real lmcache_controller that can be killed and started again at the same place."""

    def __init__(self, processes, folder, listen="127.0.0.1"):
        self._processes, self._log = processes, folder / "controller.log"
        self._needs = backends.BACKENDS["p2p"]
        self.command, self.exports = backends.place(self._needs, listen, folder)
        self.start()

    def start(self):
        self.process = self._processes.start(self.command, self._log)
        health.wait_healthy("controller", self.process, partial(self._needs.check, self.exports), self._log)

    def kill(self):
        self._processes.kill(self.process)


def environment(controller, rank, address="127.0.0.1"):
    """Of a replica: the one YAML, and what the rollout server sets for it; on free ports."""
    settings = lmcache_settings.effective(CONFIG).to_dict() | {name: [] for name in p2p_replica.PORT_LISTS}
    return SETTINGS | controller.exports | p2p_replica.identity(settings, rank, 1, address, ports.free_port)


class Peer:
    def __init__(self, processes, controller, rank, log, **more):
        address = f"ipc://@kvshare-peer-{uuid4().hex}"
        command = [sys.executable, str(Path(__file__).with_name("peer.py")), address]
        settings = {"PYTHONHASHSEED": "0", "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.05"}  # pages are soon used again
        self.process = processes.start(command, log, settings | environment(controller, rank) | more)
        self._processes, self.log = processes, log
        self._socket = zmq.Context.instance().socket(zmq.REQ)
        self._socket.connect(address)

    def store(self, number):
        return self._ask("store", number)

    def load(self, number):
        """Tokens found and loaded, or -1: they are not those of the prompt."""
        return self._ask("load", number)

    def kill(self):
        self._processes.kill(self.process)

    def stopped(self):
        return stopped(self.process.pid)

    def used(self):
        """Bytes of LMCache's local memory that are not free."""
        return self._ask("used", 0)

    def _ask(self, command, number):
        self._socket.send_json([command, number])
        while not self._socket.poll(500):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
        return self._socket.recv_json()
