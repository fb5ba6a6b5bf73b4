"""Nothing that was started outlives its Processes, however that ends."""

import os
import re
import signal
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest
from waiting import STUCK, until

from kvshare.services.processes import Processes

# A child that starts a daemon in a session of its own, as Ray does, and then waits.
DAEMON = (
    "import subprocess, sys, time; "
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
    "print(p.pid, flush=True); time.sleep(600)"
)


def _pid(log, process) -> int:
    return int(until(lambda: log.read_text().strip(), process))


def test_daemons_end_too(tmp_path):
    log = tmp_path / "log"
    with Processes(("KVSHARE_TEST_MARK", str(tmp_path))) as processes:
        child = processes.start([sys.executable, "-c", DAEMON], log)
        daemon = _pid(log, child)
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
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  # whatever runs the tests ignores
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, preexec_fn=heard)
    log.touch()
    daemon = _pid(log, parent)
    os.kill(parent.pid, number)
    assert parent.wait(STUCK) != 0
    assert not psutil.pid_exists(daemon)


@pytest.fixture
def launch(tmp_path):
    """`kvshare launch`, which every launcher becomes, with a package verl whose training is some code."""

    def start(training: str, preflight: int = 0, **kwargs) -> subprocess.Popen:
        trainer = tmp_path / "verl" / "trainer"
        trainer.mkdir(parents=True)
        for package in (trainer, trainer.parent):
            (package / "__init__.py").touch()
        (trainer / "main_ppo.py").write_text(training)
        ends = f"import os, sys\nif 'preflight' in sys.orig_argv:\n    os._exit({preflight})\n"
        (tmp_path / "sitecustomize.py").write_text(ends)
        command = [sys.executable, "-m", "kvshare", "launch", "--backend", "remote", "--device", "cpu", "--"]
        command += [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(tmp_path), "--config-name", "c"]
        environment = {**os.environ, "KVSHARE_RUN_DIR": str(tmp_path / "run"), "PYTHONPATH": str(tmp_path)}
        return subprocess.Popen(command, env=environment, text=True, **kwargs)

    return start


def test_launcher_that_is_ended_leaves_nothing(launch, tmp_path):
    out = tmp_path / "out"
    with out.open("w") as log:
        launcher = launch(DAEMON, stdout=log)
    daemon = _pid(out, launcher)
    launcher.terminate()
    assert launcher.wait(STUCK) == 130
    assert not psutil.pid_exists(daemon)


def test_what_nohup_ignores_stays_ignored(launch, tmp_path):
    out = tmp_path / "out"
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    with out.open("w") as log:
        launcher = launch(DAEMON, stdout=log, preexec_fn=ignore)
    _pid(out, launcher)
    status = Path(f"/proc/{launcher.pid}/status").read_text()
    assert int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) & 1 << signal.SIGHUP - 1
    launcher.terminate()
    assert launcher.wait(STUCK) == 130


@pytest.mark.parametrize(("training", "code"), [("raise SystemExit(7)", 7), ("", 0)])
def test_exit_code_is_trainings_whatever_becomes_of_the_report(launch, training, code):
    launcher = launch(training, stderr=subprocess.PIPE)
    _, err = launcher.communicate(timeout=STUCK)
    assert launcher.returncode == code
    assert ("no report" in err) == (code == 0)  # there is no run.json
    assert "Traceback" not in err


def test_folder_of_the_run_cannot_be_made(launch, tmp_path):
    (tmp_path / "run").touch()
    launcher = launch("print('trained')", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = launcher.communicate(timeout=STUCK)
    assert (launcher.returncode, out) == (2, "")
    assert err.startswith(f"kvshare: cannot write to {tmp_path}/run (")
    assert err.count("\n") == 1


def test_nothing_is_trained_when_preflight_fails(launch):
    launcher = launch("print('trained')", preflight=2, stdout=subprocess.PIPE)
    out, _ = launcher.communicate(timeout=STUCK)
    assert (launcher.returncode, out) == (2, "")


SEGMENT = (
    "from multiprocessing import shared_memory, resource_tracker as t; import time\n"
    "m = shared_memory.SharedMemory(create=True, size=4096); t.unregister(m._name, 'shared_memory')\n"
    "print(m.name, flush=True); time.sleep(600)"
)
"""Makes a segment that nobody removes when the process is killed."""


@pytest.fixture
def make_segment():
    """Makes shared memory that the test removes, however it ends."""
    made = []

    def make(name=None):
        made.append(shared_memory.SharedMemory(name, create=True, size=4096))
        return made[-1]

    yield make
    for segment in made:
        segment.close()
        segment.unlink()


@pytest.mark.parametrize("killed_earlier", [True, False])
def test_shared_memory_of_killed_processes_is_freed_and_no_neighbours(tmp_path, make_segment, killed_earlier):
    """The neighbour's process is not to be seen: it has the same /dev/shm in another container."""
    log = tmp_path / "log"
    with Processes(("KVSHARE_TEST_MARK", str(tmp_path))) as processes:
        neighbour = make_segment()
        neighbour.close()  # nobody maps it
        child = processes.start([sys.executable, "-c", SEGMENT], log)
        name = until(lambda: log.read_text().strip(), child)
        if killed_earlier:
            until(lambda: name in processes._shared_memory.ours, child)
            processes.kill(child)
        assert Path("/dev/shm", name).exists()
    assert not Path("/dev/shm", name).exists()
    assert Path("/dev/shm", neighbour.name).exists()


def test_shared_memory_of_a_server_that_others_have_started_stays(tmp_path, make_segment, monkeypatch):
    monkeypatch.setattr("kvshare.services.shared_memory.LOOK_SECONDS", STUCK)  # so it looks once, at the end
    log = tmp_path / "log"
    with Processes(("KVSHARE_TEST_MARK", str(tmp_path))) as processes:
        servers = make_segment(f"lmcache_l1_pool_{tmp_path.name}")
        opens = SEGMENT.replace("create=True, size=4096", f"name={servers.name!r}")
        until(lambda: log.exists() and log.read_text(), processes.start([sys.executable, "-c", opens], log))
    assert servers.name in processes._shared_memory.ours
    assert Path("/dev/shm", servers.name).exists()
