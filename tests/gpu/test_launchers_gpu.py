"""The GPU launchers, each with its own service, to the end of preflight; eight GPUs are pretended."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import LAUNCHERS, ROOT
from test_launchers import backend_of, compose

from gpu.conftest import SERVES_MP

GPU = [name for name in LAUNCHERS if name.endswith("_backend.sh")]

# In preflight only: LMCache's multi-process server would take the GPUs for real ones, and fail to initialise them.
PRETEND = """
import sys, wrapt


def eight(cuda):
    cuda.device_count = lambda: 8


if "preflight" in sys.orig_argv:
    wrapt.register_post_import_hook(eight, "torch.cuda")
"""

PYTHON = """#!/bin/sh
case "$1 $2" in "-m verl.trainer.main_ppo") echo "starts: $*"; exit;; esac
exec {python} "$@"
"""


def test_there_are_three():
    assert len(GPU) == 3


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Enough for a batch of the recipe."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "kvshare", "prepare", "--offline", "--shots", "8", "--limit", "256"]
    subprocess.run([*command, "--data", str(folder)], check=True)
    return folder


@pytest.fixture
def environment(tmp_path, data, model):
    """What a user sets, sitecustomize that counts eight GPUs, and a python3 that stops before the training."""
    (tmp_path / "sitecustomize.py").write_text(PRETEND)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON.format(python=shlex.quote(sys.executable)))
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("LMCACHE", "KVSHARE_RUN"))}
    return kept | {
        "PATH": f"{python.parent}:{kept['PATH']}",
        "PYTHONPATH": f"{tmp_path}:{kept.get('PYTHONPATH', '')}",
        "MODEL_PATH": str(model),
        "DATA_DIR": str(data),
        "KVSHARE_RUN_DIR": str(tmp_path / "run"),
        "START_SERVICES": "1",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.1",
    }


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
@pytest.mark.parametrize("launcher", GPU)
def test_to_the_end_of_preflight(launcher, estimator, environment):
    refused = backend_of(launcher) == "mp" and not SERVES_MP
    more = {"ADV_ESTIMATOR": estimator} | ({"START_SERVICES": "0"} if refused else {})
    command = ["bash", str(ROOT / launcher)]
    done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    errors = [line for line in said.splitlines() if line.startswith("error")]
    if refused:
        assert done.returncode == 2, said
        assert any("lmcache==0.5.6 does: build it" in line for line in errors), said
        return
    assert done.returncode == 0, said
    assert "starts: -m verl.trainer.main_ppo" in done.stdout, said
    assert errors == []


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
@pytest.mark.parametrize("launcher", GPU)
def test_recipe_becomes_verls_dataclasses(launcher, estimator, model):
    from verl.trainer.ppo.utils import need_critic
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = compose(launcher, ADV_ESTIMATOR=estimator, MODEL_PATH=str(model))
    group = config.actor_rollout_ref
    parts = (group.actor, group.rollout, group.model, config.critic, config.algorithm)
    made = [type(omega_conf_to_dataclass(part)).__name__ for part in parts]
    assert made == ["FSDPActorConfig", "RolloutConfig", "HFModelConfig", "FSDPCriticConfig", "AlgoConfig"]
    assert need_critic(config) == (estimator == "gae")
    validate_config(config, use_reference_policy=False, use_critic=estimator == "gae")


@pytest.mark.parametrize("launcher", GPU)
def test_vllm_has_the_connector_and_takes_verls_arguments(launcher, model, hooks, monkeypatch):
    """As verl's rollout server parses them for ``vllm serve``."""
    from verl.workers.rollout.vllm_rollout.utils import build_cli_args_from_config
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli import serve
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if backend_of(launcher) == "mp" and not SERVES_MP:
        pytest.skip("the mp backend needs LMCache 0.5.6")
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    rollout = compose(launcher, MODEL_PATH=str(model)).actor_rollout_ref.rollout
    given = dict(rollout.engine_kwargs.vllm) | {
        "max_model_len": rollout.max_model_len,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "enforce_eager": rollout.enforce_eager,
        "disable_log_stats": rollout.disable_log_stats,
        "worker_extension_cls": "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension",
    }
    parser = FlexibleArgumentParser()
    commands = parser.add_subparsers(dest="subparser")
    for command in serve.cmd_init():
        command.subparser_init(commands)
    args = parser.parse_args(["serve", str(model), *build_cli_args_from_config(given)])
    args.model = args.model_tag
    transfer = AsyncEngineArgs.from_cli_args(args).kv_transfer_config
    cls = KVConnectorFactory.get_connector_class(transfer)
    assert (cls.__name__, transfer.kv_load_failure_policy) == (transfer.kv_connector, "recompute")
    assert cls.reset_cache is not cls.__mro__[1].reset_cache
