"""What preflight makes of verl's trainers: their replicas, ranks, ports, memory and checks, with each backend."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from jobs import CONNECTOR, MP, P2P

from kvshare.core import p2p_replica
from kvshare.core.errors import UserError
from kvshare.launch import launchers, preflight
from kvshare.launch.preflight import trainer
from kvshare.services.backends import p2p

ROLLOUT = "actor_rollout_ref.rollout"
ENVIRONMENT = "ray_kwargs.ray_init.runtime_env.env_vars"
EXPERIMENTAL = Path(str(find_spec("verl").origin)).parent / "experimental"


def own_main(name: str, *overrides: str) -> tuple[str, ...]:
    """A job of a main of its own in verl.experimental, with that main's config: 2 devices train, 6 generate."""
    folder = EXPERIMENTAL / f"{name}_policy" / "config"
    return (
        *("--config-dir", str(folder), "--config-name", f"{name}_ppo_trainer", f"{ROLLOUT}.name=vllm"),
        *("actor_rollout_ref.actor.use_dynamic_bsz=true", "data.max_prompt_length=2048"),
        *(f"{ROLLOUT}.tensor_model_parallel_size=1", "rollout.nnodes=1", "rollout.n_gpus_per_node=6"),
        *("actor_rollout_ref.hybrid_engine=false", *overrides),
    )


def fully(*overrides: str) -> tuple[str, ...]:
    given = ("data.train_batch_size=0", "actor_rollout_ref.actor.ppo_mini_batch_size=2")
    return own_main("fully_async", *given, *overrides)


def separate(*overrides: str) -> tuple[str, ...]:
    """2 devices train, 6 generate; an update of the weights each step."""
    return (
        *("trainer.v1.trainer_mode=separate_async", f"{ROLLOUT}.nnodes=1", f"{ROLLOUT}.n_gpus_per_node=6"),
        *("trainer.v1.separate_async.parameter_sync_step=1", "actor_rollout_ref.actor.ppo_mini_batch_size=4"),
        *(f"{ROLLOUT}.checkpoint_engine.backend=nccl", *overrides),
    )


OLD = ("trainer.use_v1=false",)
COLOCATE = ("trainer.v1.trainer_mode=colocate_async",)
WITHOUT_HYBRID = ("actor_rollout_ref.hybrid_engine=false", f"+{ENVIRONMENT}.VERL_LOGGING_LEVEL=WARNING")
SWITCH = "trainer.v1.separate_async.hybrid_rollout.enable_switch=true"
VALIDATE = "async_training.use_trainer_do_validate=true"
DYNAMIC = "async_training.use_dynamic_resource_scheduling=true"
RECIPES = ("separate", "fully", "one_step")
TP2 = f"{ROLLOUT}.tensor_model_parallel_size=2"

REPLICAS = [  # overrides, their row, and how many of them generate what is trained on
    ((), "2 replicas of 1 cuda", 2),
    (COLOCATE, "2 replicas of 1 cuda", 2),
    (separate(), "8 replicas of 1 cuda (2 hybrid for validation only, 6 standalone)", 6),
    (separate(SWITCH), "8 replicas of 1 cuda (2 hybrid, 6 standalone)", 8),
    (separate(*WITHOUT_HYBRID), "6 replicas of 1 cuda (6 standalone)", 6),
    (separate(TP2), "4 replicas of 2 cuda (1 hybrid for validation only, 3 standalone)", 3),
    (own_main("one_step_off"), "6 replicas of 1 cuda (6 standalone)", 6),
    (fully(), "6 replicas of 1 cuda (6 standalone)", 6),
    (fully(VALIDATE), "8 replicas of 1 cuda (2 hybrid for validation only, 6 standalone)", 6),
    (fully(DYNAMIC), "8 replicas of 1 cuda (2 hybrid, 6 standalone)", 8),
    (fully(DYNAMIC, "rollout.nnodes=0"), "2 replicas of 1 cuda", 2),
]

REFUSED = [
    (separate(f"{ROLLOUT}.nnodes=0"), "separate_async trainer refuses the config: nnodes must be > 0"),
    (separate("data.train_batch_size=8"), "train_batch_size must equal parameter_sync_step * ppo_mini_batch_size"),
    (separate(f"{ROLLOUT}.checkpoint_engine.backend=naive"), "please use nccl/nixl/mooncake"),
    (separate("actor_rollout_ref.hybrid_engine=false"), f"set ++{ENVIRONMENT}.VERL_LOGGING_LEVEL=WARNING"),
    (separate(f"{ROLLOUT}.n_gpus_per_node=3", TP2), "3 devices (nodes: 1, devices a node: 3) cannot be split into sta"),
    (separate(f"{ROLLOUT}.n_gpus_per_node=null"), "verl's separate_async trainer refuses the config: "),
    (
        ("trainer.v1.trainer_mode=asink",),
        "trainer.v1.trainer_mode: Unknown trainer 'asink'. Available trainers: coloca",
    ),
    (("trainer.v1.trainer_mode=fully_async_policy",), "fully_async_policy is +async=fully"),
    ((*COLOCATE, "trainer.v1.sampler.max_off_policy_threshold=0"), "Invalid max off policy threshold: 0"),
    ((*COLOCATE, "trainer.v1.sampler.max_off_policy_strategy=keep"), "Invalid max off policy strategy: keep"),
    (own_main("one_step_off", "actor_rollout_ref.hybrid_engine=true"), "asserts actor_rollout_ref.hybrid_engine=false"),
    (own_main("one_step_off", "rollout.nnodes=null"), "nnodes of the standalone replicas is None"),
    (
        own_main("one_step_off", "rollout.nnodes=2", "rollout.n_gpus_per_node=3"),
        "this machine only, the job has 2 nodes",
    ),
    (fully("algorithm.adv_estimator=gae"), "fully_async_policy trainer cannot make a critic"),
    (own_main("fully_async"), "fully_async_policy trainer asserts data.train_batch_size=0, it is"),
    (fully("data.gen_batch_size=2"), "asserts data.gen_batch_size=1, it is 2"),
    (fully(f"{ROLLOUT}.tensor_model_parallel_size=4"), "6 devices (nodes: 1, devices a node: 6"),
]


@pytest.fixture
def checked(job, environment):
    """A job for GPUs after all checks that need neither devices nor services, and what they found wrong."""

    def checked(*overrides: str, backend: str = "remote", until: str | None = None) -> tuple[preflight.Job, list[str]]:
        if backend != "remote":
            environment.setenv("LMCACHE_CONFIG_FILE", str({"p2p": P2P, "mp": MP}[backend]))
            environment.delenv("LMCACHE_REMOTE_URL")
        if backend == "p2p":
            environment.setenv("LMCACHE_TRANSFER_CHANNEL", "nixl")
        if backend == "mp":
            connector = json.dumps(CONNECTOR | {"kv_connector": "LMCacheMPConnector"} | MODULE)
            overrides = (*overrides, f"++{ROLLOUT}.engine_kwargs.vllm.kv_transfer_config='{connector}'")
        made = job(*overrides, backend=backend, device="cuda")
        wrong = []
        for name, stage in list(preflight.STAGES.items())[1:-1]:
            wrong += [line for check in stage for line in check(made)]
            if wrong or name == until:
                break
        return made, wrong

    return checked


MODULE = {"kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector"}


@pytest.mark.parametrize(("given", "row", "serving"), REPLICAS, ids=[f"{row[1]} {row[2]}" for row in REPLICAS])
def test_replicas_are_those_of_verl(checked, given, row, serving):
    made, wrong = checked(*given, until="verl's objects")
    assert wrong == []
    assert made.facts["replicas"] == row
    assert [replica.replica_rank for replica in made.replica_list] == list(range(made.replicas))
    assert made.serving == serving


@pytest.mark.parametrize("backend", ["remote", "p2p", "mp"])
def test_forecast_and_memory(checked, backend):
    made, wrong = checked(*separate(), backend=backend)
    assert wrong == []
    assert list(preflight.memory.forecast(made)) == []
    assert made.forecast.recipe.replicas == 6  # the hybrid ones only validate
    memory = preflight.memory.needed(made)
    assert memory.startswith({"mp": "5 GiB a host (lmcache server)"}.get(backend, "40 GiB a node (8 workers, 5 each)"))
    described = preflight.describe(made)
    assert (described["replicas"], described["standby"], described["trainer"]) == (8, 2, "separate_async")


@pytest.mark.parametrize(
    ("backend", "device", "recipe", "training", "row"),
    [
        *(("mp", "cuda", recipe, 2, "6 replicas of 1 cuda (6 standalone)") for recipe in RECIPES),
        *(("remote", "cpu", f"{recipe}_cpu", 1, "2 replicas of 1 cpu (2 standalone)") for recipe in RECIPES),
    ],
)
def test_launchers_take_our_recipes(environment, backend, device, recipe, training, row):
    _, given = launchers.read(backend, device, {"N_DEVICES": str(training)})
    made = preflight.Job(backend, device, [*given, f"+async={recipe}"])
    checks = [check for stage in list(preflight.STAGES.values())[1:4] for check in stage]
    assert [line for check in checks if check is not preflight.recipe.model for line in check(made)] == []
    assert made.facts["replicas"] == row
    if device == "cpu":
        assert made.config.ray_kwargs.ray_init.num_gpus == training + made.replicas


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refused(checked, given, words):
    _, wrong = checked(*given)
    assert any(words in line for line in wrong), wrong
    assert not any("\n" in line for line in wrong)


@pytest.mark.parametrize("ports", [6, 7, 8])
@pytest.mark.parametrize("given", [separate(), separate(*WITHOUT_HYBRID), fully(VALIDATE), separate(TP2)])
def test_port_lists_that_pass_are_enough_for_each_actor(checked, environment, given, ports):
    for name in p2p_replica.PORT_LISTS:
        environment.setenv(f"LMCACHE_{name.upper()}", ",".join(str(9960 + i) for i in range(ports)))
    environment.setattr(p2p.health, "check_controller", lambda *urls: "here")
    environment.setattr(p2p.host_ports, "is_free", lambda *address: True)
    made, wrong = checked(*given, backend="p2p")
    assert wrong == []
    passes = list(p2p.BACKEND.running(made)) == []
    assert passes == (ports >= made.replicas * made.world_size)
    try:
        variables = [
            p2p_replica.identity(made.lmcache.to_dict(), r.replica_rank, r.world_size, "here", lambda: 0)
            for r in made.replica_list
        ]
    except p2p_replica.TooFewPorts:
        assert not passes
    else:
        assert passes
        assert len({of_replica["LMCACHE_P2P_INIT_PORTS"] for of_replica in variables}) == made.replicas


def test_weights_need_an_engine_that_is_installed(checked):
    made, _ = checked(*separate())
    (line,) = trainer.weights(made)
    assert line.startswith("checkpoint_engine.backend=nccl: Checkpoint engine nccl not registered")
    made.device = "cpu"
    made.config.actor_rollout_ref.rollout.checkpoint_engine.backend = "zmq"
    made.config.actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module = (
        "kvshare.hooks.verl.cpu_checkpoint_engine"
    )
    assert list(trainer.weights(made)) == []
    assert made.facts["weights"] == "by verl's checkpoint engine zmq"
    made, _ = checked(*own_main("one_step_off", f"{ROLLOUT}.checkpoint_engine.backend=naive"))
    assert list(trainer.weights(made)) == [
        "checkpoint_engine.backend=naive does not reach standalone replicas: set it to nccl"
    ]


@pytest.mark.parametrize(
    ("given", "versions", "words"),
    [
        ((), None, "strict; a trajectory spans 1 version at most"),
        (COLOCATE, None, "strict; a trajectory spans 8 versions at most"),
        (fully(), "4", "trajectory; a trajectory spans any number of versions"),
        (COLOCATE, "8", "trajectory; a trajectory spans 8 versions at most"),
        (COLOCATE, "9", "KVSHARE_MAX_VERSIONS is 9, but verl trains on no trajectory that spans more than 8 versions"),
        ((), "2", "KVSHARE_FRESHNESS=trajectory changes nothing with verl's sync trainer"),
        (fully("async_training.partial_rollout=false"), "2", "changes nothing with verl's fully_async_policy trainer"),
    ],
)
def test_verls_staleness_and_ours_agree(checked, environment, given, versions, words):
    if versions:
        environment.setenv("KVSHARE_FRESHNESS", "trajectory")
        environment.setenv("KVSHARE_MAX_VERSIONS", versions)
    made, _ = checked(*given)
    said = list(trainer.staleness(made)) or [made.facts["staleness"]]
    assert len(said) == 1
    assert words in said[0]


@pytest.mark.parametrize(("given", "known"), [((), True), (separate(), True), (fully(), True), (OLD, False)])
def test_trainers_that_have_run_with_kvshare(checked, given, known):
    made, _ = checked(*given, until="verl's objects")
    assert (list(trainer.untried(made)) == []) == known


def test_step_of_fully_async_is_what_it_trains_on_between_two_weight_updates(checked):
    given = ("async_training.require_batches=2", "async_training.trigger_parameter_sync_step=2")
    made, wrong = checked(*fully(*given))
    assert wrong == []
    steps, _ = preflight.memory.prompts.steps(made)
    assert {len(step) for step in steps} == {2 * 2 * 2}  # with a ppo_mini_batch_size of 2
    assert made.workers_a_node == 6


def test_step_of_fully_async_takes_all_epochs(checked):
    """verl trains on nothing if all of a run's prompts are less than a step."""
    given = ("data.train_max_samples=3", "async_training.trigger_parameter_sync_step=2")  # with mini batches of 2
    once, _ = checked(*fully(*given, "trainer.total_epochs=1"))
    with pytest.raises(UserError, match="a step needs 4"):
        preflight.memory.prompts.steps(once)
    twice, _ = checked(*fully(*given, "trainer.total_epochs=2"))
    assert [len(step) for step in preflight.memory.prompts.steps(twice)[0]] == [3]
