"""The A/B of docs/freshness.md (`make freshness`, about 17 minutes): is staleness visible under verl, and is it gone?

Three GRPO runs on the same seed, data and lmcache_server, two replicas each: no connector (the noise
floor), LMCache's keys as they are upstream, and kvshare's. Ours also validates, and resumes from a
checkpoint half-way.
"""

import json

import pytest
from plain_keys import plugin_path
from rich.console import Console
from rich.table import Table

from kvshare.tools.demo import Demo

STEPS = 8
STALE = ("stale_hit", "stale_hit_by_weights")
NO_CONNECTOR = "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config=null"
SAME = ["data.shuffle=false", "data.seed=1", f"trainer.total_epochs={STEPS}"]


@pytest.fixture(scope="module")
def arms(tmp_path_factory, lmcache_server):
    folder = tmp_path_factory.mktemp("freshness")

    def train(name, *overrides, until=STEPS):
        return Demo(folder / name, [*SAME, f"trainer.total_training_steps={until}", *overrides]).run()

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LMCACHE_REMOTE_URL", f"lm://{lmcache_server}")
        environment.setenv("START_SERVICES", "0")
        results = {"no connector": [train("none", NO_CONNECTOR)]}
        validating = ["trainer.val_before_train=true", "trainer.test_freq=2"]
        checkpoints = f"trainer.default_local_dir={folder / 'checkpoints'}"
        resuming = [*validating, checkpoints, "trainer.save_freq=4", "trainer.resume_mode=auto"]
        results["kvshare"] = [train("ours", *resuming, until=STEPS // 2), train("resumed", *resuming)]
        environment.setenv("PYTHONPATH", plugin_path(folder))
        results["plain keys"] = [train("plain")]
    _print(folder, results)
    return results


def _print(folder, results):
    table = Table(title=f"rollout/actor mismatch over {STEPS} updates")
    columns = ("connector", "correlation, lowest", "probability difference, highest", "shared hit")
    for column in (*columns, "stale hit by policy id", "by weights"):
        table.add_column(column)
    for name, runs in results.items():
        worst = {key: [run["mismatch"][key] for run in runs] for key in ("pearson_min", "probs_diff_max")}
        hits = [f"{sum(run['tokens'][key] for run in runs):,}" for key in ("shared_hit", *STALE)]
        table.add_row(name, f"{min(worst['pearson_min']):.8f}", f"{max(worst['probs_diff_max']):.1e}", *hits)
    Console(width=110).print("\n", table)
    (folder / "freshness.json").write_text(json.dumps(results, indent=2))


def mismatch(runs):
    """How far the correlation is from 1; float32 knows no less than 6e-8."""
    return max(1 - run["mismatch"]["pearson_min"] for run in runs) + 1e-7


def test_ours_is_within_the_noise(arms):
    assert mismatch(arms["kvshare"]) <= 3 * mismatch(arms["no connector"])
    assert sum(run["steps"] for run in arms["kvshare"]) == STEPS
    for run in arms["kvshare"]:
        assert [run["tokens"][count] for count in STALE] == [0, 0]
        assert all(replica["shared_hit"] for replica in run["replica"])


def test_plain_keys_are_stale(arms):
    """So the comparison can see it."""
    assert mismatch(arms["plain keys"]) > 10 * mismatch(arms["no connector"])
    for count in STALE:
        assert sum(run["tokens"][count] for run in arms["plain keys"]) > 0
