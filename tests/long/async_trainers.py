"""verl's async trainers on CPU (`make async`): requests run across weight updates, and replicas differ in version.

Six updates, two replicas, the same prompts in every step, answers so long that each update aborts some of them. A run
takes five minutes; each trainer also runs twice without a connector, which shows how much runs differ.
"""

import json
from collections import Counter
from itertools import accumulate
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console
from rich.table import Table

from kvshare.core.policy import is_private
from kvshare.record import event_reader, events
from kvshare.tools.demo import Demo

STEPS = 6
STALE = ("stale_hit", "stale_hit_by_weights")
SUPPORT = Path(__file__).resolve().parents[1] / "support"
NO_CONNECTOR = "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config=null"
LONG = (  # generation goes on while the actor trains. Such answers earn nothing, so entropy moves the weights
    *(f"trainer.total_training_steps={STEPS}", "trainer.total_epochs=20", "data.max_response_length=192"),
    *("actor_rollout_ref.rollout.ignore_eos=true", "actor_rollout_ref.actor.entropy_coeff=0.01"),
    *("actor_rollout_ref.rollout.max_num_seqs=2", "data.max_prompt_length=1152"),
)
COLOCATE = (*LONG, "trainer.v1.trainer_mode=colocate_async", "actor_rollout_ref.actor.ppo_mini_batch_size=4")
SEPARATE = (*LONG, "+async=separate_cpu", "data.max_response_length=512")  # longer than the actor trains
FULLY = (*LONG, "+async=fully_cpu", "data.max_response_length=512", "async_training.staleness_threshold=3")
ONE_STEP = (*LONG, "+async=one_step_cpu")
ONE_BY_ONE = "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=one_by_one"

TRAINERS = {  # overrides, and devices that train
    "colocate_async": (COLOCATE, 2),
    "separate_async": (SEPARATE, 1),
    "fully_async_policy": (FULLY, 1),
    "one_step_off_policy": (ONE_STEP, 1),
}
ALONE = ("no connector", "no connector again")
ARMS = {  # and variables
    **{f"{name}, {alone}": ((*given, NO_CONNECTOR), n, {}) for name, (given, n) in TRAINERS.items() for alone in ALONE},
    **{name: (*given, {}) for name, given in TRAINERS.items()},
    "separate_async, trajectory": (SEPARATE, 1, {"KVSHARE_FRESHNESS": "trajectory", "KVSHARE_MAX_VERSIONS": "8"}),
    "separate_async, one replica lags": ((*SEPARATE, ONE_BY_ONE), 1, {"PYTHONPATH": str(SUPPORT)}),
}
SHARING = [arm for arm in ARMS if "no connector" not in arm]


class Arms(dict):
    """The report of each arm. It runs when a test first asks for it."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __missing__(self, name):
        overrides, devices, variables = ARMS[name]
        run = self.folder / name.replace(", ", "-").replace(" ", "_")
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("N_DEVICES", str(devices))
            for variable, value in variables.items():
                environment.setenv(variable, value, prepend=":" if variable == "PYTHONPATH" else None)
            self[name] = {**Demo(run, list(overrides)).run(), "again": again(run), "apart": apart(run)}
        return self[name]


@pytest.fixture(scope="session")
def arms(tmp_path_factory):
    made = Arms(tmp_path_factory.mktemp("async"))
    yield made
    _print(made.folder, made)


def of(run, kinds):
    return [event for event in event_reader.Reader(run).read() if isinstance(event, kinds)]


def again(run) -> dict[str, int]:
    """Of the requests that go on after an abort: their number, and tokens that they had and that were computed again.

    Their prompt is longer than that of any first request, by what was generated before.
    """
    requests = of(run, events.Request)
    found = Counter(request.prompt for request in requests)
    first = {prompt for prompt, count in found.items() if count >= STEPS}  # each prompt is sampled in every step
    later = [request for request in requests if request.prompt not in first]
    return {"requests": len(later), "tokens": sum(request.prompt - request.cached for request in later)}


def apart(run) -> int:
    """How often something was stored, loaded or answered at an older version than before: on a replica that lags."""
    seen = of(run, events.Store | events.Load | events.Request)
    versions = [int(event.policy.rpartition("-")[2]) for event in seen if not is_private(event.policy)]
    return sum(version < newest for version, newest in zip(versions, accumulate(versions, max), strict=True))


def loss(run) -> list[float]:
    """1 - the correlation of rollout and actor, of each step. A step trains on versions before the actor's."""
    return [1 - step["pearson"] for step in run["step"]]


def _print(folder, results):
    table = Table(title=f"{STEPS} updates, 2 replicas, 4 prompts")
    columns = ("trainer", "correlation, lowest", "median", "shared hit", "stale, by id", "by weights")
    for column in (*columns, "continued", "computed again", "kept", "versions", "spans"):
        table.add_column(column)
    for name, run in results.items():
        tokens, flight = run["tokens"], run["versions_in_flight"]
        cells = [f"{1 - max(loss(run)):.6f}", f"{1 - median(loss(run)):.6f}"]
        cells += [f"{tokens[key]:,}" for key in ("shared_hit", *STALE)]
        cells += [f"{run['again']['requests']:,}", f"{run['again']['tokens']:,}", f"{tokens['kept_hit']:,}"]
        table.add_row(name, *cells, str(flight["in_a_step"]), str(flight["of_a_trajectory"]))
    Console(width=160).print("\n", table)
    (folder / "async.json").write_text(json.dumps(results, indent=2))


@pytest.mark.parametrize("arm", SHARING)
def test_shared_and_never_stale(arms, arm):
    run = arms[arm]
    assert run["steps"] == STEPS
    assert [run["tokens"][count] for count in STALE] == [0, 0]
    assert all(replica["shared_hit"] for replica in run["replica"])
    assert (run["unseen"], run["degraded"], run["lost"]) == ([], [], 0)


@pytest.mark.parametrize("arm", SHARING)
def test_mismatch_is_that_of_the_trainer(arms, arm):
    """Trajectories of several versions differ from the actor's probabilities by themselves, and runs differ."""
    worst = max(max(loss(arms[f"{arm.split(',')[0]}, {alone}"])) for alone in ALONE)
    assert median(loss(arms[arm])) <= worst
    assert max(loss(arms[arm])) <= 3 * worst


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "one_step" not in arm])
def test_requests_go_on_across_updates(arms, arm):
    """So the arms show what they are for."""
    assert arms[arm]["again"]["requests"]


def test_replicas_were_at_different_versions(arms):
    assert arms["separate_async, one replica lags"]["apart"] > 0
    assert arms["separate_async"]["apart"] == 0


def test_trajectories_keep_their_kv(arms):
    strict, trajectory = arms["separate_async"], arms["separate_async, trajectory"]
    assert strict["tokens"]["kept_hit"] == 0 < trajectory["tokens"]["kept_hit"]
    each = [run["again"]["tokens"] / run["again"]["requests"] for run in (strict, trajectory)]
    assert each[1] < each[0]


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in SHARING])
def test_baseline_misses_nobody(arms, arm):
    assert arms[arm]["unseen"] == []
