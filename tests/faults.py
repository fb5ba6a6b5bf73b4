"""A server that is killed and restarted under verl (`make faults`, about 7 minutes)."""

import threading
import time

from backend import Backend

from kvshare.demo import Demo, failures

STEPS = 5


def test_server_is_killed_in_step_2_and_back_in_step_3(processes, tmp_path, monkeypatch):
    backend = Backend(processes, tmp_path / "server.log")
    monkeypatch.setenv("LMCACHE_REMOTE_URL", f"lm://{backend.address}")
    demo = Demo(tmp_path / "run", [f"trainer.total_epochs={STEPS}", f"trainer.total_training_steps={STEPS}"])

    def sabotage():
        for done, do in ((1, backend.kill), (2, backend.start)):
            while _steps(demo) < done:
                time.sleep(0.2)
            do()

    threading.Thread(target=sabotage, daemon=True).start()
    result = demo.run()
    print("\npolicy, shared hits:", *(f"{p['policy'][-2:]}: {p['shared_hit']:,}" for p in result["policy"]))
    assert failures(result) == []
    assert result["steps"] == STEPS
    shared = [policy["shared_hit"] for policy in result["policy"]]
    assert shared[0] > 0
    assert shared[1] == 0
    assert all(shared[3:])


def _steps(demo):
    file = demo.folder / "metrics.jsonl"
    return file.read_text().count('"training/global_step"') if file.exists() else 0
