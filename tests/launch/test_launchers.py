"""All launchers: what they would run is taken by the real verl, vLLM and LMCache."""

import json
import os
import shlex
import subprocess
from importlib.util import find_spec

import pytest
from conftest import LAUNCHERS, ROOT

from kvshare.core.errors import UserError
from kvshare.launch import hydra_overrides, launchers, preflight
from kvshare.launch.launch import Launch
from kvshare.launch.preflight import recipe


def dry_run(
    launcher: str, cwd=ROOT, more="trainer.seed_for_test=1", **environment: str
) -> tuple[dict[str, str], list[str]]:
    """Environment and command that a launcher prints with DRY_RUN=1."""
    clean = {k: v for k, v in os.environ.items() if not k.upper().startswith("LMCACHE")}
    done = subprocess.run(
        ["bash", str(ROOT / launcher), more],
        cwd=cwd,
        env={**clean, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    *exports, command = done.stdout.strip().splitlines()
    pairs = [shlex.split(line)[1].split("=", 1) for line in exports]
    return dict(pairs), shlex.split(command)


def compose(launcher: str, **environment: str):
    _, command = dry_run(launcher, **environment)
    job = preflight.Job("remote", "cpu", [a for a in command[3:] if not a.startswith("trainer.seed_for_test")])
    assert not list(recipe.config(job))
    return job.config


def backend_of(launcher: str) -> str:
    return launcher.split("_")[2]


def device_of(launcher: str) -> str:
    return next((device for device in ("cpu", "npu") if device in launcher), "cuda")


def test_there_are_eight():
    kinds = [f"run_qwen_{b}_backend{d}.sh" for b in ("p2p", "remote", "mp") for d in ("", "_cpu", "_npu")]
    kinds.remove("run_qwen_mp_backend_npu.sh")  # LMCache-Ascend has no multi-process server: docs/backends.md
    assert sorted(kinds) == LAUNCHERS


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_environment_and_command(launcher, tmp_path):
    environment, command = dry_run(launcher, KVSHARE_RUN_DIR="/run")
    backend = backend_of(launcher)
    config = str(ROOT / "config" / f"{backend}_backend_config.yaml")
    assert environment["LMCache_CONFIG_FILE"] == environment["LMCACHE_CONFIG_FILE"] == config
    assert environment["PYTHONHASHSEED"] == "0"
    assert command[:3] == ["python3", "-m", "verl.trainer.main_ppo"]
    assert "trainer.seed_for_test=1" in command
    assert "+attention=sdpa" not in command or device_of(launcher) == "cuda"
    model = f"{ROOT}/models/tiny-qwen2" if "cpu" in launcher else "Qwen/Qwen2.5-7B-Instruct"
    assert f"actor_rollout_ref.model.path='{model}'" in command
    if backend == "p2p":
        assert environment.get("LMCACHE_TRANSFER_CHANNEL") == (None if "npu" in launcher else "nixl")
    assert dry_run(launcher, cwd=tmp_path, KVSHARE_RUN_DIR="/run") == (environment, command)


def test_what_the_caller_sets_reaches_a_cluster_once():
    environment, command = dry_run(
        "run_qwen_p2p_backend.sh", LMCACHE_CHUNK_SIZE="128", LMCACHE_TRANSFER_CHANNEL="mine", LMCACHE_CONFIG_FILE="a"
    )
    assert environment["LMCACHE_CHUNK_SIZE"] == "128"
    assert environment["LMCACHE_TRANSFER_CHANNEL"] == "nixl"
    names = [argument.split("=")[0] for argument in command if "runtime_env" in argument]
    assert "++ray_kwargs.ray_init.runtime_env.env_vars.LMCACHE_CHUNK_SIZE" in names
    assert len(names) == len(set(names)) == len(environment)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_read_as_bash_runs_them(launcher, monkeypatch, tmp_path):
    """`kvshare overrides` and `forecast` read the launcher's text; `kvshare launch` gets what bash makes of it."""
    caller = {"MODEL_PATH": "some/model", "N_DEVICES": "3", "LMCACHE_CONFIG_FILE": "/mine.yaml", "PATH": str(tmp_path)}
    shown = tmp_path / "python3"
    shown.write_text('#!/bin/sh\n[ "$1" = -c ] || { env; printf "argument %s\\n" "$@"; }\n')
    shown.chmod(0o755)
    bash = ["/bin/bash", str(ROOT / launcher)]
    path = f"{tmp_path}:/usr/bin:/bin"
    lines = subprocess.run(bash, env=caller | {"PATH": path}, capture_output=True, text=True, check=True).stdout
    given = [line.removeprefix("argument ") for line in lines.splitlines() if line.startswith("argument ")]
    exports, arguments = launchers.read(backend_of(launcher), device_of(launcher), caller)
    assert arguments == given[given.index("verl.trainer.main_ppo") + 1 :]
    assert set(lines.splitlines()) >= {f"{name}={value}" for name, value in exports.items()}
    assert exports["LMCache_CONFIG_FILE"] == "/mine.yaml"


def test_no_launcher_for_mp_on_ascend():
    with pytest.raises(UserError, match="the mp backend does not run on npu"):
        launchers.read("mp", "npu", {})


@pytest.mark.parametrize(
    ("recipe", "main"),
    [
        ("separate", "verl.trainer.main_ppo"),
        ("fully_cpu", "verl.experimental.fully_async_policy.fully_async_main"),
        ("one_step", "verl.experimental.one_step_off_policy.main_ppo"),
    ],
)
def test_recipe_runs_the_main_of_its_trainer(recipe, main):
    _, command = dry_run("run_qwen_remote_backend_cpu.sh", more=f"+async={recipe}")
    assert command[:3] == ["python3", "-m", main]
    assert find_spec(main)
    assert ("pkg://verl.trainer.config" in command) == (main != "verl.trainer.main_ppo")


def test_config_of_another_main_is_refused(tmp_path):
    """The config can name its recipe otherwise than on the command line."""
    command = ["python3", "-m", "verl.trainer.main_ppo", "--config-dir", "config", "--config-name", "mine"]
    (tmp_path / "run.json").write_text('{"trainer": "fully_async_policy"}')
    for more in ([], ["+async=one_step"]):
        launch = Launch("remote", "cpu", [*command, *more], {"KVSHARE_RUN_DIR": str(tmp_path)})
        with pytest.raises(UserError, match=r"fully_async_policy trainer: give \+async=fully"):
            launch.check_main()
    Launch("remote", "cpu", [*command, "+async=fully_cpu"], {"KVSHARE_RUN_DIR": str(tmp_path)}).check_main()


@pytest.mark.parametrize("path", ["it's here/model", "back\\slash", "a b=c,d{e}", 'quo"te', "ends\\"])
def test_any_path_reaches_verl_as_it_is(path, tmp_path):
    (tmp_path / path).mkdir(parents=True)
    _, command = dry_run(LAUNCHERS[0], cwd=tmp_path, MODEL_PATH=path, DATA_DIR=path)
    job = preflight.Job("remote", "cpu", [a for a in command[3:] if not a.startswith("trainer.seed_for_test")])
    assert not list(recipe.config(job))
    assert job.config.actor_rollout_ref.model.path == str(tmp_path / path)
    assert job.config.data.train_files == str(tmp_path / path / "train.parquet")


@pytest.mark.parametrize("installed", [True, False])
def test_attention_is_one_that_is_installed(installed, monkeypatch):
    """verl takes flash-attn for granted."""
    monkeypatch.setattr(hydra_overrides, "find_spec", lambda name: installed or None)
    monkeypatch.setenv("KVSHARE_RUN_DIR", "/run")
    _, given = launchers.read("mp", "cuda", os.environ)
    job = preflight.Job("mp", "cuda", hydra_overrides.complete(given, "cuda", {}))
    assert not list(recipe.config(job))
    for part in (job.config.actor_rollout_ref.model, job.config.critic.model):
        assert part.use_remove_padding == installed
        assert part.override_config.get("attn_implementation", "flash_attention_2") == (
            "flash_attention_2" if installed else "sdpa"
        )
    assert job.config.actor_rollout_ref.actor.use_dynamic_bsz == installed
    assert hydra_overrides.complete(["+attention=sdpa"], "cuda", {}) == ["+attention=sdpa"]


@pytest.mark.parametrize("name", ["LMCache_CONFIG_FILE", "LMCACHE_CONFIG_FILE"])
def test_users_config_wins_and_is_made_absolute(name, tmp_path):
    environment, _ = dry_run(LAUNCHERS[0], cwd=tmp_path, **{name: "mine.yaml"})
    assert environment["LMCache_CONFIG_FILE"] == environment["LMCACHE_CONFIG_FILE"] == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_verl_builds_its_dataclasses(launcher, estimator, model):
    from verl.trainer.ppo.utils import need_critic
    from verl.utils.config import omega_conf_to_dataclass

    config = compose(launcher, ADV_ESTIMATOR=estimator, N_DEVICES="4", N_NODES="2", MODEL_PATH=str(model))
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (2, 4)
    assert config.trainer.device == device_of(launcher)
    for part in (config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm, config.critic):
        omega_conf_to_dataclass(part)
    assert need_critic(config) == (estimator == "gae")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_vllm_parses_the_connector(launcher):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    text = compose(launcher).actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--kv-transfer-config", text]).kv_transfer_config
    assert parsed.kv_role == "kv_both"
    assert parsed.kv_load_failure_policy == "recompute"
    connectors = {"npu": "LMCacheAscendConnectorV1Dynamic", "mp": "LMCacheMPConnector"}
    kind = "npu" if "npu" in launcher else backend_of(launcher)
    assert parsed.kv_connector == connectors.get(kind, "LMCacheConnectorV1")
    if "npu" in launcher:
        module = "lmcache_ascend.integration.vllm.lmcache_ascend_connector_v1"
        assert json.loads(text)["kv_connector_module_path"] == module


@pytest.mark.parametrize("backend", ["remote", "p2p", "mp"])
def test_lmcache_loads_the_config(backend, capfd, monkeypatch):
    from lmcache.v1.config import load_engine_config_with_overrides

    config = load_engine_config_with_overrides(str(ROOT / "config" / f"{backend}_backend_config.yaml"))
    assert "Unknown" not in "".join(capfd.readouterr())
    assert config.chunk_size == 256
    if backend == "remote":
        assert (config.remote_url, config.remote_serde, config.local_cpu) == ("lm://localhost:65432", "naive", True)
    elif backend == "mp":
        assert (config.remote_url, config.max_local_cpu_size) == ("tcp://localhost:5555", 5)
    else:
        assert config.p2p_init_ports == list(range(9960, 9968))
        assert config.extra_config == {"lookup_backoff_time": 0.001}


def test_shellcheck_is_clean():
    scripts = [str(ROOT / launcher) for launcher in LAUNCHERS]
    done = subprocess.run(["shellcheck", *scripts, str(ROOT / ".ci" / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_overrides_are_pasted_into_somebodys_own_job(launcher, tmp_path):
    """verl's own config and recipe, with nothing of ours but what is printed."""
    import verl

    backend, device = backend_of(launcher), device_of(launcher)
    own = ["algorithm.adv_estimator=rloo", "actor_rollout_ref.model.path=/mine", "actor_rollout_ref.rollout.n=3"]
    script = f"""
        source <(kvshare overrides --backend {backend} --device {device})
        printf '%s\\n' "$PYTHONHASHSEED" "$VERL_USE_EXTERNAL_MODULES" "$LMCACHE_CONFIG_FILE"
        printf '%s\\n' {" ".join(own)} "${{kvshare_overrides[@]}}"
    """
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    seed, plugin, config, *overrides = done.stdout.splitlines()
    assert (seed, plugin) == ("0", "kvshare.verl_plugin")
    assert config == str(ROOT / "config" / f"{backend}_backend_config.yaml")
    folder = os.path.dirname(verl.__file__) + "/trainer/config"
    job = preflight.Job(backend, device, ["--config-dir", folder, "--config-name", "ppo_trainer", *overrides])
    assert not list(recipe.config(job))
    assert job.shares
    router = "router_spread.yaml" if device == "cpu" else "router.yaml"
    assert job.rollout.router_config_path == str(ROOT / "config" / router)
    assert config == job.config.ray_kwargs.ray_init.runtime_env.env_vars.LMCACHE_CONFIG_FILE
    assert (job.config.algorithm.adv_estimator, job.rollout.n) == ("rloo", 3)
    assert job.config.actor_rollout_ref.model.path == "/mine"
