"""Each condition that must stop a launcher is made here, and the line it prints is read."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import zmq
from conftest import ROOT
from jobs import CONNECTOR, MP, P2P, REMOTE

from kvshare.core import lmcache_settings, policy, ports, versions
from kvshare.core.errors import UserError
from kvshare.launch import preflight
from kvshare.launch.preflight import engine, host_memory, packages, prompts, recipe, rollout
from kvshare.launch.preflight import environment as environment_check
from kvshare.services import health
from kvshare.services.backends import BACKENDS
from kvshare.tools import gsm8k


def errors(job) -> list[str]:
    return preflight.errors(preflight.run(job))


def warnings(job) -> dict[str, str]:
    findings = preflight.run(job)
    assert preflight.errors(findings) == []
    return {finding.check: finding.text for finding in findings if finding.level == "warning"}


def test_good_job_passes_and_is_described(job):
    checked = job()
    assert errors(checked) == []
    about = preflight.describe(checked)
    assert (about["replicas"], about["backend"], about["chunk_size"]) == (2, "remote", 256)


KV = "++actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config="

BAD_OVERRIDES = {
    "foo=1": "verl's config cannot be composed: Could not override 'foo'",
    "trainer.n_gpus_per_node=0": "trainer.n_gpus_per_node is 0, must be an integer of at least 1",
    "trainer.nnodes=two": "trainer.nnodes is 'two'",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=4": "cannot be split into hybrid replicas of 4",
    "actor_rollout_ref.model.path=/no/such": "model /no/such does not exist: set MODEL_PATH",
    "actor_rollout_ref.model.path=/usr": "model folder /usr has no config.json",
    "actor_rollout_ref.model.path=nobody/nothing": "model nobody/nothing is not in the local",
    "data.train_files=/no/train.parquet": "data.train_files: /no/train.parquet does not exist: make it with kvshare",
    f"data.val_files={REMOTE}": "is not one that verl reads (.parquet, .json, .jsonl)",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=0": "is 0, must be an integer of at least 1",
    "data.train_files=null": "data.train_files is None: set it to a file, or set DATA_DIR",
    "actor_rollout_ref.rollout.router_config_path=/no/router.yaml": "router config /no/router.yaml does not exist",
    "actor_rollout_ref.rollout.full_determinism=true": "needs full_determinism: true in the router config too",
    "trainer.nnodes=2": "is this machine only, the job has 2 nodes",
    "algorithm.adv_estimator=grop": "ADV_ESTIMATOR 'grop' is not one verl knows",
    f"~{KV[2:-1]}": "kv_transfer_config is not set, so nothing would be shared",
    f"{KV}'[nonsense'": "argument --kv-transfer-config: 1 validation error for KVTransferConfig Invalid JSON",
    f"{KV}'[1]'": "1 validation error for KVTransferConfig Input should be an object",
    KV + '\'{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}\'': "a failed load would fail the request",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override(job, override):
    found = errors(job(override))
    assert any(BAD_OVERRIDES[override] in error for error in found), found
    assert all("\n" not in error for error in found)


def test_null_connector_is_a_baseline(job):
    checked = job(f"{KV}null")
    assert errors(checked) == []
    assert preflight.describe(checked)["backend"] == "no connector"


def test_forecast(job, capsys):
    checked = job()
    findings = {finding.check: finding for finding in preflight.run(checked)}
    found = checked.forecast
    assert (found.prompts, found.of, found.recipe.replicas, found.recipe.samples) == (4, 4, 2, 4)
    lengths = [len(ids) for step in prompts.steps(checked)[0] for ids in step]
    assert found.shareable_tokens_a_step == sum(length // 256 * 256 for length in lengths) > 0
    assert findings["forecast"] == ("ok", "forecast", found.verdict)
    assert preflight.describe(checked)["forecast"] == found.record()
    assert not capsys.readouterr().out


def test_forecast_has_the_token_ids_of_the_run(job):
    """As verl's own agent loop sends them, from what its own data set gives it."""
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.config import omega_conf_to_dataclass

    everything = ("data.train_max_samples=-1", "data.shuffle=false", "data.filter_overlong_prompts=false")
    checked = _composed(job, "cpu", *everything)
    config, model = checked.config, omega_conf_to_dataclass(checked.config.actor_rollout_ref.model)
    dataset = create_rl_dataset(config.data.train_files, config.data, model.tokenizer, None)

    class Sent(Exception):
        pass

    class Server:
        async def generate(self, prompt_ids, **kwargs):
            raise Sent(prompt_ids)

    def sent(messages):
        loop = SingleTurnAgentLoop(
            *(DictConfigWrap(config), Server(), model.tokenizer, None, type(dataset), DictConfigWrap(config.data)),
            hf_model_type=model.hf_config.model_type,
        )
        with pytest.raises(Sent) as caught:
            loop.loop.run_until_complete(loop.run({}, raw_prompt=messages))
        return caught.value.args[0]

    steps, of = prompts.steps(checked)
    assert [ids for step in steps for ids in step] == [sent(row["raw_prompt"]) for row in dataset]
    assert of == 8


def test_forecast_of_a_run_on_another_machine(job, environment):
    """For GPUs, of which there are none here."""
    found = preflight.forecast(job(device="cuda"))
    assert (found.recipe.block_size, found.recipe.replicas) == (16, 2)
    environment.setitem(
        versions.FITS, "cuda", [versions.Fit("x.txt", {"torch": "==1.0", "no-such-package": ">=1"}, {"remote": {}})]
    )
    with pytest.raises(UserError, match="package no-such-package is missing"):
        preflight.forecast(job(device="cuda"))


def test_nothing_can_be_shared_is_a_warning(job, environment, tmp_path):
    gsm8k.write(gsm8k.generate(train=64, test=4, seed=1), tmp_path, shots=0, limit=8)
    found = warnings(job(f"data.train_files='{tmp_path}/train.parquet'"))
    assert found["forecast"].startswith("0.0% of prompt tokens can be shared with chunk_size 256: 0 of 4 prompts fill")
    assert "0.0%" in warnings(job("actor_rollout_ref.rollout.router_config_path=null"))["forecast"]
    assert "one replica" in warnings(job("trainer.n_gpus_per_node=1"))["forecast"]


def test_too_few_prompts_for_a_step(job):
    assert errors(job("data.max_prompt_length=100")) == [
        "0 of 4 prompts have at most data.max_prompt_length 100 tokens, a step needs 4: "
        "raise data.max_prompt_length, lower data.train_batch_size, or give more data"
    ]
    assert errors(job("data.train_batch_size=5"))[0].startswith("4 of 4 prompts have at most")


def test_bound_that_is_too_small_is_a_warning(job, environment, tmp_path):
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"limit": 2**20}))
    environment.setenv("KVSHARE_SERVER_STATUS", str(status))
    assert warnings(job())["memory"].startswith("kvshare server keeps 0.00 GiB, a step stores 0.02 GiB")


def test_local_tier_larger_than_the_machine(job, environment):
    """A warning where it is all that is known, an error on CPU, where the whole run is known."""
    environment.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "1000")
    found = {finding.check: finding for finding in preflight.run(job())}
    assert found["memory"].text.startswith("max_local_cpu_size 1000 GiB for each of 2 workers is 2000 GiB, this")
    assert (found["memory"].level, found["host_memory"].level) == ("warning", "error")
    assert "LMCache 2000.0" in found["host_memory"].text


def test_port_that_others_can_reach_is_a_warning(job):
    with socket.create_server(("0.0.0.0", 0)) as listening:
        port = listening.getsockname()[1]
        assert ports.exposed({port}) == [("0.0.0.0", port)]
    assert ports.exposed({port}) == []


BAD_YAML = {
    "chunk_size: [": "is not YAML",
    "- a\n- b": "is not a mapping",
    "hello": "is not a mapping",
    "": "is not a mapping",
    "chunk_size: many": "chunk_size is 'many', must be integer",
    "chunk_size: true": "chunk_size is True, must be integer",
    "chunk_sise: 256": "LMCache knows no key chunk_sise (did you mean chunk_size?)",
    "local_cpu: maybe": "local_cpu is 'maybe', must be true or false",
    "max_local_cpu_size: lots": "max_local_cpu_size is 'lots', must be number",
    "lmcache_worker_ports: [a, b]": "must be a list of integers",
    "extra_config: x=1": "must be a mapping",
    "use_layerwise: true": "use_layerwise: true makes LMCache drop the policy",
    "chunk_size: 200": "chunk_size 200 is not a multiple of 128",
    "local_disk: 'file:///tmp/kv'": "would be one folder for all workers: remove it",
    "remote_url: http://localhost:1": "LMCache config",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_lmcache_config(job, environment, tmp_path, text):
    path = tmp_path / "lmcache.yaml"
    path.write_text(text)
    environment.setenv("LMCACHE_CONFIG_FILE", str(path))
    if text.startswith("remote_url"):
        environment.delenv("LMCACHE_REMOTE_URL")
        environment.setenv("LMCACHE_REMOTE_URL", "lm://nowhere")
    found = errors(job())
    assert any(BAD_YAML[text] in error for error in found), found


BAD_ENVIRONMENT = {
    ("LMCACHE_CONFIG_FILE", "/no/such.yaml"): "LMCache config /no/such.yaml does not exist",
    ("LMCACHE_CHUNK_SIZE", "abc"): "LMCACHE_CHUNK_SIZE='abc' must be integer",
    ("LMCACHE_P2P_INIT_PORTS", "[1,2]"): "LMCache ignores a list in brackets",
    ("PYTHONHASHSEED", "random"): "export PYTHONHASHSEED=0",
    ("VERL_USE_EXTERNAL_MODULES", "other"): "export VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin",
    ("VLLM_PLUGINS", "other"): "VLLM_PLUGINS=other keeps kvshare's plugin out",
}


@pytest.mark.parametrize("setting", BAD_ENVIRONMENT, ids=lambda s: "=".join(s))
def test_bad_environment(job, environment, setting):
    environment.setenv(*setting)
    found = errors(job())
    assert any(BAD_ENVIRONMENT[setting] in error for error in found), found


def test_server_is_not_up(job, environment):
    port = ports.free_port()
    environment.setenv("LMCACHE_REMOTE_URL", f"lm://localhost:{port}")
    assert errors(job()) == [
        f"lmcache_server at localhost:{port} does not answer (Connection refused): "
        f"start it with: lmcache_server localhost {port}"
    ]


def test_port_is_taken_by_something_else(job, environment):
    with socket.create_server(("127.0.0.1", 0)) as other:
        environment.setenv("LMCACHE_REMOTE_URL", f"lm://127.0.0.1:{other.getsockname()[1]}")
        environment.setattr(health, "TIMEOUT", 0.2)
        (error,) = errors(job())
    assert "is taken by something that is not lmcache_server" in error


def test_controller_is_not_up(job, environment):
    environment.setenv("LMCACHE_CONFIG_FILE", str(P2P))
    environment.setenv("LMCACHE_TRANSFER_CHANNEL", "nixl")  # as the launchers do
    environment.setenv("LMCACHE_CONTROLLER_PULL_URL", f"localhost:{ports.free_port()}")
    (error,) = errors(job(backend="p2p"))
    assert "lmcache_controller's pull port" in error
    assert "start it with: lmcache_controller --host localhost --port 9000 --monitor-ports" in error


def test_zmq_that_is_not_the_controller(job, environment):
    """Its sockets greet as the controller's do."""
    environment.setenv("LMCACHE_CONFIG_FILE", str(P2P))
    environment.setenv("LMCACHE_TRANSFER_CHANNEL", "nixl")  # as the launchers do
    environment.setattr(health, "TIMEOUT", 3)
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.ROUTER) as reply:
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (pull, reply)]
        for name, port in zip(("PULL", "REPLY"), ports, strict=True):
            environment.setenv(f"LMCACHE_CONTROLLER_{name}_URL", f"127.0.0.1:{port}")
        (error,) = errors(job(backend="p2p"))
    assert error.startswith(f"127.0.0.1:{ports[1]} speaks zmq, but not as lmcache_controller's reply port: stop it")


def test_ray_cluster_that_is_up_inherits_nothing(job, environment, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")  # ray start writes it
    environment.setenv("RAY_TMPDIR", str(tmp_path))
    environment.setenv("LMCACHE_CHUNK_SIZE", "256")
    forwarded = "++ray_kwargs.ray_init.runtime_env.env_vars"
    given = [f"{forwarded}.{name}=x" for name in os.environ if environment_check.PASSED_ON.fullmatch(name)]
    given.remove(f"{forwarded}.LMCACHE_CHUNK_SIZE=x")
    assert errors(job(*given)) == [
        "Ray at 10.0.0.1:6379 is up already, its workers will not see LMCACHE_CHUNK_SIZE: "
        f"add {forwarded}.LMCACHE_CHUNK_SIZE='256'"
    ]
    assert errors(job(*given, f"{forwarded}.LMCACHE_CHUNK_SIZE='256'")) == []
    environment.setenv("KVSHARE_LAUNCH", "a mark of ours")
    environment.setenv("VLLM_HOST_IP", "10.0.0.1")  # each node has its own
    assert errors(job(*given, f"{forwarded}.LMCACHE_CHUNK_SIZE='256'")) == []
    environment.setenv("RAY_ADDRESS", "local")
    assert errors(job()) == []


def test_memory_of_the_host(job, environment):
    """A model of 135M parameters with a vocabulary of 49,152, two replicas, 24 GiB."""
    from transformers import Qwen2Config

    environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    environment.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.5")
    environment.setattr("ray._private.utils.get_system_memory", lambda: 24 * 2**30)
    checked = job("trainer.total_epochs=1")
    assert errors(checked) == []
    assert checked.facts["host_memory"].startswith("about 10.")
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = Qwen2Config(**shape, num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True)
    environment.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **kwargs: config)
    model = host_memory.training(checked)
    assert model.parameters == 134_543_808
    rows, length = host_memory.micro_batch(checked)
    assert model.logits == rows * length * 49_152 * 4
    with pytest.raises(
        UserError, match=r"the run takes about 2\d.\d GiB of host memory .* Ray kills it above 22.8: lower"
    ):
        list(host_memory.host_memory(checked))
    environment.setattr("ray._private.utils.get_system_memory", lambda: 64 * 2**30)
    assert list(host_memory.host_memory(checked)) == []
    environment.setattr("ray._private.utils.get_used_memory", lambda: 50 * 2**30)
    (line,) = host_memory.host_memory(checked)
    assert "and 50.0 are in use now: end something else" in line


def test_key_too_long_for_lm(job, environment, model, tmp_path):
    """As it is with a long path and without kvshare's short names."""
    folder = tmp_path / ("long-" * 30)
    folder.symlink_to(model)
    environment.setattr(policy, "MAX_MODEL_NAME", 1000)
    (error,) = errors(job(f"actor_rollout_ref.model.path='{folder}'"))
    assert error.endswith("characters is too long for lm://, which allows 150: give the model a shorter path")


def test_compiled_code_that_does_not_load(job):
    """It is CUDA's, and this torch is not."""
    (line,) = packages.compiled(job(device="cuda"))
    assert line.startswith("lmcache.cuda_ops, LMCache's CUDA code, does not load with torch 2.13.0+cpu (lib")
    assert line.endswith("or build it with the command in requirements/gpu-verl.txt")


def test_chunks_are_whole_blocks_whatever_the_block_size(job):
    key = "+actor_rollout_ref.rollout.engine_kwargs.vllm.block_size"
    (line,) = errors(job(f"{key}=512"))
    assert line == "chunk_size 256 is not a multiple of 512, the engines' block size"
    assert errors(job(f"{key}=256")) == []


def test_flash_attention_is_wanted_but_not_installed(job, environment):
    sdpa = _composed(job, "cuda", "trainer.total_epochs=1")
    assert list(packages.attention(sdpa)) == []
    assert sdpa.facts["attention"].startswith("sdpa, flash-attn is not installed")
    flash = "actor_rollout_ref.model.override_config.attn_implementation=flash_attention_2"
    critics = "~critic.model.override_config"
    for overrides in ([flash], [critics, "algorithm.adv_estimator=gae"]):
        (line,) = packages.attention(_composed(job, "cuda", *overrides))
        assert line.endswith("add +attention=sdpa, or pip install flash-attn --no-build-isolation")
    assert list(packages.attention(_composed(job, "cuda", critics))) == []  # GRPO has no critic
    environment.setattr(packages, "has_flash_attention", lambda: True)
    assert list(packages.attention(_composed(job, "cuda", flash))) == []


def test_bucket_is_too_small_for_the_embedding(job):
    """verl: "Weight … is too large to fit in the bucket", at the first update."""
    key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    (line,) = errors(job(f"{key}=0"))
    assert line == f"{key} is 0, model.embed_tokens.weight of the model has 1 MB: set it to 1 or more"
    assert errors(job(f"{key}=1")) == []


def test_compiled_code_that_is_not_there(job, environment):
    environment.setattr(packages, "CUDA_CODE", ("lmcache.no_such_ops",))
    (line,) = packages.compiled(job(device="cuda"))
    assert line.startswith(
        "LMCache was built without its CUDA code, it would copy KV slowly: pip install --no-deps -r requirements/"
    )


def test_graphs_are_off(job):
    on, off = (f"actor_rollout_ref.rollout.enforce_eager={value}" for value in ("false", "true"))
    assert list(engine.graphs(_composed(job, "cuda", on))) == []
    (line,) = engine.graphs(_composed(job, "cuda", off))
    assert line.startswith("actor_rollout_ref.rollout.enforce_eager=true turns graphs off")


@pytest.fixture
def mp_server(processes, tmp_path, monkeypatch):
    """A real lmcache server, started as kvshare services does."""
    port = ports.free_port()
    needs = BACKENDS["mp"]
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.1")
    command = needs.command("127.0.0.1", {"server": port, "http": 0}, tmp_path)
    exports = needs.exports("127.0.0.1", {"server": port}, tmp_path)
    process = processes.start(command, tmp_path / "log")
    health.wait_healthy("lmcache server", process, lambda: needs.check(exports), tmp_path / "log")
    yield exports["LMCACHE_REMOTE_URL"]
    processes.kill(process)


def test_mp(job, environment, mp_server):
    environment.setenv("LMCACHE_CONFIG_FILE", str(MP))
    environment.setenv("LMCACHE_REMOTE_URL", mp_server)
    connector = "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config"
    right = json.dumps({**CONNECTOR, "kv_connector": "LMCacheMPConnector"})
    good = job(f"{connector}='{right}'", backend="mp")
    assert errors(good) == []
    assert good.facts["service"] == f"lmcache server at {mp_server.removeprefix('tcp://')}"
    (error,) = errors(job(backend="mp"))
    assert error == "kv_connector LMCacheConnectorV1 is not for the mp backend: run another launcher"
    environment.setenv("LMCACHE_CHUNK_SIZE", "128")
    (error,) = errors(job(f"{connector}='{right}'", backend="mp"))
    assert "has chunks of 256 tokens, chunk_size is 128" in error
    environment.setenv("LMCACHE_REMOTE_URL", f"tcp://127.0.0.1:{ports.free_port()}")
    (error,) = errors(job(f"{connector}='{right}'", backend="mp"))
    assert "start it with: kvshare services up --backend mp" in error


def test_fewer_devices_than_asked(job):
    pytest.importorskip("torch")
    found = list(rollout.devices(_composed(job, "cuda")))
    assert found == ["2 cuda devices wanted, 0 found: set N_DEVICES, or make more visible"]


def _composed(job, device, *overrides):
    made = job(*overrides, device=device)
    for check in (recipe.config, rollout.replicas, engine.engine):
        assert not list(check(made))
    return made


def test_package_missing_and_of_a_wrong_version(monkeypatch):
    fits = [versions.Fit("x.txt", {"torch": "==1.0", "no-such-package": ">=1"}, {"remote": {}})]
    monkeypatch.setattr(versions, "FITS", {"cpu": fits})
    wrong, missing = versions.problems("cpu", "remote")
    assert wrong.startswith(
        "package torch 2.13.0+cpu does not fit the others, torch==1.0 does: pip install --no-deps -r requirements/x.txt"
    )
    assert missing.startswith("package no-such-package is missing: pip install --no-deps -r requirements/x.txt")


def test_lmcaches_own_definitions_know_our_configs():
    definitions = lmcache_settings.definitions()
    for path in (REMOTE, P2P):
        assert lmcache_settings.mistakes(lmcache_settings.read(str(path)), definitions, path.name) == []


def test_launcher_stops_with_what_is_wrong_and_exit_code_2(tmp_path, data, model):
    port = ports.free_port()
    environment = {
        **os.environ,
        "DATA_DIR": str(data),
        "MODEL_PATH": str(model),
        "KVSHARE_RUN_DIR": str(tmp_path / "run"),
        "LMCACHE_REMOTE_URL": f"lm://localhost:{port}",
    }
    command = ["bash", str(ROOT / "run_qwen_remote_backend_cpu.sh")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "kvshare preflight looks at vLLM's arguments …" in done.stderr
    (wrong,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
    assert wrong.startswith(f"error  service      lmcache_server at localhost:{port} does not answer")
    assert not Path(tmp_path / "run" / "run.json").exists()
