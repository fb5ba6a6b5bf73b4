"""What takes longer than `make test` may (`make faults`): a soak, and a server that dies and comes back under verl."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from backend import BACKENDS, BOUND
from conftest import CHUNK

from kvshare.services.processes import marked
from kvshare.tools.demo import Demo, DemoFailed, failures

STEPS = 8  # LMCache's server takes two or three to start beside them
REQUESTS = 2000


def test_soak(engines, backend):
    """Distinct prompts, about seven times what the server may keep."""
    rng, server = random.Random(0), psutil.Process(backend.process.pid)
    prompts = [[rng.randrange(300, 1500) for _ in range(CHUNK + 10)] for _ in range(REQUESTS)]
    stamp, most = "soak", 0
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda prompt: engines[0].ask(prompt, stamp, tokens=1), prompts):
            most = max(most, server.memory_info().rss)
    newest = sum(engines[1].ask(prompt, stamp, tokens=1).cached for prompt in prompts[-50:])
    oldest = sum(engines[1].ask(prompt, stamp, tokens=1).cached for prompt in prompts[:50])
    hit = newest // CHUNK
    print(f"\n{REQUESTS} requests: {most / 1e6:.0f} MB at most; newest 50: {hit} hit; oldest 50: {oldest} tokens")
    assert most < 1.2 * BOUND
    assert newest == 50 * CHUNK
    assert oldest == 0


def test_server_is_killed_in_step_2_and_back_in_step_4(processes, tmp_path, monkeypatch, pytestconfig):
    name = pytestconfig.getoption("backend")
    backend = BACKENDS[name](processes, tmp_path / "server.log")
    monkeypatch.setenv("LMCACHE_REMOTE_URL", backend.environment["LMCACHE_REMOTE_URL"])
    monkeypatch.setenv("START_SERVICES", "0")
    demo = Demo(tmp_path / "run", [f"trainer.total_epochs={STEPS}", f"trainer.total_training_steps={STEPS}"], name)
    done_before = []

    def sabotage():
        for done, do in ((1, backend.kill), (3, backend.start)):
            while _steps(demo) < done:
                time.sleep(0.2)
            do()
        done_before.append(_steps(demo))  # it was back

    threading.Thread(target=sabotage, daemon=True).start()
    result = demo.run()
    shared = [policy["shared_hit"] for policy in result["policy"]]
    print(f"\nback after step {done_before[0]}; shared hits by step: {shared}")
    assert failures(result) == []
    assert result["steps"] == STEPS
    assert shared[0] > 0
    assert shared[2] == 0
    later = shared[done_before[0] + 1 :]
    assert later
    assert all(later)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "ray::KVShareServer"])
def test_replica_dies_and_the_run_ends(tmp_path, pytestconfig, victim):
    """By itself, with a line that says what has died; verl alone would stand still."""
    demo = Demo(tmp_path / "run", [f"trainer.total_epochs={STEPS}"], pytestconfig.getoption("backend"))
    killed = []

    def sabotage():
        while not _steps(demo):
            time.sleep(0.2)
        ours = marked("KVSHARE_RUN_DIR", str(demo.folder))
        killed.append(next(process for process in ours if process.cmdline()[0].startswith(victim)))
        killed[0].kill()

    threading.Thread(target=sabotage, daemon=True).start()
    with pytest.raises(DemoFailed):
        demo.run()
    log = demo.log.read_text().splitlines()
    (line,) = [line for line in log if line.startswith("kvshare: training cannot go on: ")]
    print(f"\n{line}")
    assert ("vLLM's engine of replica" if "Engine" in victim else "KVShareServer") in line
    assert ("with signal 9" if "Engine" in victim else f"(pid {killed[0].pid} on") in line
    assert list(demo.folder.glob("worker-*.out"))
    assert marked("KVSHARE_RUN_DIR", str(demo.folder)) == []


def _steps(demo):
    file = demo.folder / "metrics.jsonl"
    return file.read_text().count('"training/global_step"') if file.exists() else 0
