"""Routing under verl (`make routing`, about 15 minutes): verl's own router against `placement: spread`, n = 4 and 8."""

import json

import pytest
from rich.console import Console
from rich.table import Table

from kvshare.tools.demo import Demo, failures

STEPS = 3
ARMS = {  # router (None: the launcher's, spread) and samples a prompt
    "verl, n = 4": ("null", 4),
    "kvshare, n = 4": (None, 4),
    "kvshare, n = 8": (None, 8),
}


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    results = {}
    for name, (router, n) in ARMS.items():
        overrides = [f"trainer.total_training_steps={STEPS}", f"actor_rollout_ref.rollout.n={n}"]
        with pytest.MonkeyPatch.context() as environment:
            if router:
                environment.setenv("ROUTER", router)
            run = folder / name.replace(", n = ", "")
            results[name] = {**Demo(run, overrides).run(), "folder": run}
    _print(results)
    return results


def _print(results):
    table = Table(title=f"{STEPS} steps, 2 replicas, 4 prompts")
    for column in ("routing", "prefill amplification", "shared hit", "stale", "correlation", "held", "longest wait"):
        table.add_column(column)
    for name, run in results.items():
        tokens, routing = run["tokens"], run["routing"]
        cells = [run["prefill_amplification"], f"{tokens['shared_hit']:,}", tokens["stale_hit"]]
        cells += [f"{run['mismatch']['pearson_min']:.8f}", routing.get("held"), routing.get("longest_wait")]
        table.add_row(name, *map(str, cells))
    Console(width=120).print("\n", table)


def test_verls_own_routing_prefills_on_every_replica(arms):
    assert arms["verl, n = 4"]["prefill_amplification"] > 1.7


@pytest.mark.parametrize("arm", [name for name in ARMS if name.startswith("kvshare")])
def test_every_prefix_is_computed_once(arms, arm):
    result = arms[arm]
    assert failures(result) == []
    assert result["prefill_amplification"] <= 1.1
    assert result["routing"]["gave_up"] == 0
    shared = shared_hits(result["folder"])
    assert len(shared) == STEPS * 2
    assert all(shared.values())


def shared_hits(folder):
    """Tokens by (policy, replica)."""
    events = [json.loads(line) for path in folder.glob("events-?.jsonl") for line in path.read_text().splitlines()]
    stored = {(key, e["replica"]) for e in events if e["op"] == "store" for key in e["keys"]}
    found = {(e["policy"], e["replica"]): 0 for e in events if e["op"] == "request"}
    for e in (e for e in events if e["op"] == "load"):
        for key, tokens in zip(e["keys"], e["tokens"], strict=True):
            found[e["policy"], e["replica"]] += tokens if (key, e["replica"]) not in stored else 0
    return found
