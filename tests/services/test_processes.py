"""Nothing that was started outlives its Processes, however that ends."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from kvshare.services.processes import Processes

# A child that starts a daemon in a session of its own, as Ray does, and then waits.
DAEMON = (
    "import subprocess, sys, time; "
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
    "print(p.pid, flush=True); time.sleep(600)"
)


def _pid(log) -> int:
    while not log.read_text().strip():
        time.sleep(0.05)
    return int(log.read_text())


def test_daemons_end_too(tmp_path):
    log = tmp_path / "log"
    with Processes(("KVSHARE_TEST_MARK", str(tmp_path))) as processes:
        child = processes.start([sys.executable, "-c", DAEMON], log)
        daemon = _pid(log)
        assert psutil.pid_exists(daemon)
    assert child.poll() is not None
    assert not psutil.pid_exists(daemon)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_everything(tmp_path, number):
    log = tmp_path / "log"
    code = (
        "import sys, time; from pathlib import Path; from kvshare.services.processes import Processes\n"
        f"with Processes(('KVSHARE_TEST_MARK', {str(tmp_path)!r})) as processes:\n"
        f"    processes.start([sys.executable, '-c', {DAEMON!r}], Path({str(log)!r}))\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    log.touch()
    daemon = _pid(log)
    os.kill(parent.pid, number)
    assert parent.wait(60) != 0
    assert not psutil.pid_exists(daemon)


def test_launcher_that_is_ended_leaves_nothing(tmp_path):
    """`kvshare run`, which every launcher becomes."""
    out = tmp_path / "out"
    with out.open("w") as log:
        command = [sys.executable, "-m", "kvshare", "run", str(tmp_path), sys.executable, "-c", DAEMON]
        launcher = subprocess.Popen(command, stdout=log)
    daemon = _pid(out)
    launcher.terminate()
    assert launcher.wait(60) == 130
    assert not psutil.pid_exists(daemon)


def test_exit_code_of_training_is_kept(tmp_path):
    command = [sys.executable, "-m", "kvshare", "run", str(tmp_path), sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command).returncode == 7


def test_orphaned_shared_memory_is_freed(tmp_path):
    """What a killed child leaves in /dev/shm goes, what a living process maps stays."""
    code = (
        "from multiprocessing import shared_memory, resource_tracker as t; import os, signal\n"
        "m = shared_memory.SharedMemory(create=True, size=4096); t.unregister(m._name, 'shared_memory')\n"
        "print(m.name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    with Processes(("KVSHARE_TEST_MARK", str(tmp_path))) as processes:
        ours = shared_memory.SharedMemory(create=True, size=4096)
        processes.start([sys.executable, "-c", code], tmp_path / "log").wait()
        orphan = Path("/dev/shm") / (tmp_path / "log").read_text().strip()
        assert orphan.exists()
    assert not orphan.exists()
    assert Path("/dev/shm", ours.name).exists()
    ours.close()
    ours.unlink()
