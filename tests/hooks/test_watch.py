"""A driver that waits for ever ends when an actor or an engine of its job has died; small Ray clusters."""

import sys
from tempfile import TemporaryDirectory

import pytest
from ray.core.generated.common_pb2 import ActorDeathCause
from waiting import until

from kvshare.hooks.verl import watch
from kvshare.services.processes import Processes

DRIVER = """
import os, sys, time
import ray
from kvshare.hooks.verl import watch

watch.LOOK_SECONDS = 0.2
watch._start(lambda: None, None, (), {})  # as verl's driver does right before ray.init
while not ray.is_initialized():
    try:
        ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
    except Exception as error:  # Ray gives a node 30 s to start, however busy the machine is
        if "timed out during startup" not in str(error):
            raise

@ray.remote(num_cpus=0)
class Server:
    def pid(self):
        return os.getpid()

    def report(self):
        watch.report_engine("vLLM's engine of replica 1", {"EngineCore": -9})

    def of_a_user(self):
        self.owned = Server.remote()
        return ray.get(self.owned.pid.remote())

@ray.remote(num_cpus=0)
class FullyAsyncRollouter:  # a subclass of Server would be a Server to Ray
    def starts(self):
        self.server = Server.remote()
        return ray.get(self.server.pid.remote())

@ray.remote(num_cpus=0)
class TaskRunner:
    def run(self, dies):
        server = Server.options(name="vllm_server_0_0").remote()
        pid = ray.get(server.pid.remote())
        if dies == "actor":
            os.kill(pid, 9)
        elif dies == "engine":
            ray.get(server.report.remote())
        elif dies == "actor of verl's rollouter":
            rollouter = FullyAsyncRollouter.remote()
            os.kill(ray.get(rollouter.starts.remote()), 9)
        else:
            os.kill(ray.get(server.of_a_user.remote()), 9)
            ray.kill(server)
            time.sleep(3)  # the watch looks meanwhile
            return
        time.sleep(3600)

ray.get(TaskRunner.remote().run.remote(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("dies", "says"),
    [
        ("actor", "Server vllm_server_0_0 (pid {pid} on {ip}) has ended: Worker unexpectedly exits with a connection"),
        (
            "actor of verl's rollouter",
            "Server (pid {pid} on {ip}) has ended: Worker unexpectedly exits with a connection",
        ),
        ("engine", "vLLM's engine of replica 1 (pid {pid} on {ip}) has ended: EngineCore with signal 9; read its log"),
        ("nothing that verl needs", ""),
    ],
)
def test_driver_ends_when_what_it_needs_has_died(tmp_path, dies, says):
    log = tmp_path / "log"
    with TemporaryDirectory(dir="/tmp") as short, Processes(("KVSHARE_TEST_MARK", str(tmp_path))) as processes:
        # Ray's sockets are in RAY_TMPDIR, and their paths may have about 100 characters.
        environment = {"KVSHARE_RUN_DIR": str(tmp_path), "RAY_TMPDIR": short}
        driver = processes.start([sys.executable, "-c", DRIVER, dies], log, environment)
        until(lambda: driver.poll() is not None, log=log)
        assert driver.returncode == bool(says), log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("kvshare: ")]
    assert len(lines) == bool(says)
    for line in lines:
        before, _, after = says.partition("(pid {pid} on {ip})")
        assert line.startswith(f"kvshare: training cannot go on: {before}(pid ")
        assert after in line
        assert f"log: {tmp_path}/worker-" in line
    assert bool(list(tmp_path.glob("worker-*.out"))) == bool(says)


def test_why_an_actor_has_died():
    oom = "2 worker(s) were killed …. Memory on the node (IP: 1.2.3.4) was 22.40GB used / 23.54GB limit (0.95)\n…"
    assert watch._why(_cause("oom_context", error_message=oom)) == (
        f"Ray's memory monitor killed it at 22.40GB of 23.54GB: {watch.MEMORY}"
    )
    raised = "Traceback …:\n\n  File …\n\nValueError: no such model\n"
    assert watch._why(_cause("creation_task_failure_context", formatted_exception_string=raised)) == (
        "it raised ValueError: no such model"
    )
    died = "The actor is dead because its worker process has died. Worker exit type: {} Worker exit detail: {}"
    crashed = died.format("SYSTEM_ERROR", "Worker unexpectedly exits with … End of file. Some common causes include: …")
    assert watch._why(_died("WORKER_DIED", crashed)) == f"Worker unexpectedly exits with … End of file: {watch.UNKNOWN}"
    assert watch._why(_died("NODE_DIED", "The actor died because its node has died. Node Id: 6\n…")) is not None


def test_an_end_on_purpose_is_no_death():
    user = "Worker exit type: INTENDED_USER_EXIT Worker exit detail: exit_actor() is called."
    assert watch._why(_died("WORKER_DIED", user)) is None
    for reason in ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED", "OWNER_DIED"):
        assert watch._why(_died(reason, "The actor is dead because …")) is None


def _died(reason, message):
    cause = _cause("actor_died_error_context", error_message=message)
    context = cause.actor_died_error_context
    context.reason = type(context).Reason.Value(reason)
    return cause


def _cause(context, **fields):
    cause = ActorDeathCause()
    for name, value in fields.items():
        setattr(getattr(cause, context), name, value)
    return cause
