"""What preflight says of a configuration: a table to which anyone can add a row.

A row is a job of tests/support/jobs.py with something changed, and words that one line must have. ERRORS stop the run,
WARNINGS do not, and WORKS pass with the words in a row of the table.
"""

import json
from dataclasses import dataclass, field

import datasets
import pytest
from jobs import CONNECTOR, MP, P2P

from kvshare.core.job import verl_config
from kvshare.launch import preflight
from kvshare.launch.hydra_overrides import quote

KV = "++actor_rollout_ref.rollout.engine_kwargs.vllm"
ROLLOUT = "actor_rollout_ref.rollout"


@dataclass
class Given:
    """What differs from a job that passes."""

    overrides: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    yaml: str = ""  # LMCache's config
    router: str = ""  # the router's YAML
    connector: dict = field(default_factory=dict)  # of kv_transfer_config; a value of None removes the key
    backend: str = "remote"
    device: str = "cpu"


def extra(**keys) -> Given:
    """With ``lmcache.<key>`` in kv_connector_extra_config."""
    return Given(connector={"kv_connector_extra_config": {f"lmcache.{key}": value for key, value in keys.items()}})


def env(backend: str = "remote", **variables: str) -> Given:
    return Given(environ={f"LMCACHE_{name}": value for name, value in variables.items()}, backend=backend)


def verl(*overrides: str, device: str = "cuda") -> Given:
    return Given(overrides=overrides, device=device)


def nodes(*overrides: str) -> Given:
    """Several, with a server that all of them reach."""
    return Given(overrides=overrides, device="cuda", environ={"LMCACHE_REMOTE_URL": "lm://10.0.0.1:65432"})


def multi(*children: dict) -> Given:
    connectors = [{**CONNECTOR, **child} for child in children]
    return Given(connector={"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": connectors}})


def mp(**keys) -> Given:
    """The mp backend, with ``lmcache.mp.<key>`` in kv_connector_extra_config."""
    given = {f"lmcache.mp.{key}": value for key, value in keys.items()}
    connector = {"kv_connector": "LMCacheMPConnector", "kv_connector_extra_config": given}
    return Given(connector=connector, backend="mp", yaml=MP.read_text())


OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"num_cpu_blocks": 8}}
LAYERWISE = "makes LMCache drop the policy of a request"

ERRORS = [
    # vLLM's connector
    (Given(connector={"kv_role": "kv_consumer"}), "kv_role kv_consumer: each replica loads and never stores"),
    (Given(connector={"kv_role": "kv_producer"}), "kv_role kv_producer: each replica stores and never loads"),
    (Given(connector={"kv_role": "kv_bth"}), "vLLM refuses what verl gives it: argument --kv-transfer-config"),
    (Given(connector={"kv_role": None}), "Please specify kv_role when kv_connector is set"),
    (Given(connector={"kv_rolle": "kv_both"}), "kv_rolle"),
    (Given(connector={"kv_load_failure_policy": "fail"}), "a failed load would fail the request"),
    (Given(connector={"kv_load_failure_policy": "ignore"}), "kv_load_failure_policy Input should be"),
    (
        Given(connector={"kv_connector": "LMCacheConnectorV2"}),
        "is not one that kvshare extends: use LMCacheConnectorV1",
    ),
    (Given(connector={"kv_connector": "NixlConnector"}), "has 0 connectors of LMCache, so nothing would be shared"),
    (Given(connector={"kv_connector_module_path": "no.such"}), "vLLM cannot load kv_connector LMCacheConnectorV1"),
    (Given(connector={"kv_connector_extra_config": {"use_native": True}}), "vLLM's old copy of LMCache"),
    (Given(connector={"kv_connector": "LMCacheMPConnector"}), "is not for the remote backend: run another launcher"),
    (multi(OFFLOADING), "has 0 connectors of LMCache"),
    (multi({}, {}), "has 2 connectors of LMCache"),
    (multi({"kv_role": "kv_consumer"}, OFFLOADING), "loads and never stores"),
    (multi({"kv_role": "kv_nobody"}, OFFLOADING), "vLLM refuses kv_transfer_config: "),
    # keys through kv_connector_extra_config
    (extra(use_layerwise=True), f"kv_connector_extra_config lmcache.use_layerwise: true {LAYERWISE}"),
    (extra(use_layerwise="1"), f"kv_connector_extra_config lmcache.use_layerwise: true {LAYERWISE}"),
    (extra(enable_blending=True), LAYERWISE),
    (extra(use_layervise=True), "LMCache knows no key use_layervise (did you mean use_layerwise?)"),
    (extra(local_cpu="Flase"), "kv_connector_extra_config: local_cpu is 'Flase', must be true or false"),
    (extra(max_local_cpu_size="lots"), "max_local_cpu_size is 'lots', must be number"),
    (extra(max_local_cpu_size=-1), "kv_connector_extra_config lmcache.max_local_cpu_size is -1.0, must be 0 or more"),
    (extra(chunk_size=128), "kvshare's router and servers do not see lmcache.chunk_size"),
    (extra(p2p_init_ports=[1, 2]), "kvshare's router and servers do not see lmcache.p2p_init_ports"),
    (extra(remote_serde="cachegen"), "remote_serde cachegen: replicas would not load KV as it was stored"),
    (extra(remote_url="127.0.0.1:1"), "remote_url 127.0.0.1:1 has no scheme, LMCache would run degraded"),
    (Given(connector={"kv_connector": None}), "kv_transfer_config has no kv_connector, so nothing would be shared"),
    (Given(connector={"kv_connector_extra_config": {"use_layerwise": 1}}), "it would read lmcache.use_layerwise"),
    (Given(connector={"kv_connector_extra_config": {"lmcache_chunk_size": 1}}), "it would read lmcache.chunk_size"),
    (Given(connector={"kv_connector_extra_cfg": {}}), "kv_connector_extra_cfg Unexpected keyword argument"),
    (verl(f"{KV}.kv_transfer_config=LMCacheConnectorV1"), "KVTransferConfig Invalid JSON"),
    # the file and other variables
    (Given(environ={"LMCACHE_CONFIG_FILE": "/tmp"}), "LMCache config /tmp is not a file: set LMCache_CONFIG_FILE"),
    (Given(environ={"LMCACHE_CONFIG_FILE": "/proc/self/mem"}), "cannot be read (Input/output error): make it readable"),
    (Given(yaml="- chunk_size: 256"), "is not a mapping of keys to values"),
    (Given(yaml="1: 2"), "LMCache knows no key 1: remove or correct it"),
    (Given(environ={"VLLM_CPU_KVCACHE_SPACE": "lots"}), "VLLM_CPU_KVCACHE_SPACE=lots is not a number"),
    (Given(environ={"RAY_memory_usage_threshold": "high"}), "RAY_memory_usage_threshold=high is not a number"),
    (Given(environ={"KVSHARE_FRESHNESS": "strickt"}), "KVSHARE_FRESHNESS is 'strickt': set it to strict or trajectory"),
    # LMCache's server
    (env(REMOTE_URL="lm://[::1%lo]:1"), "lmcache_server at [::1%lo]:1 does not answer"),
    (env(REMOTE_URL="lm://127.0.0.1:1,lm://127.0.0.1:2"), "is not lm://HOST:PORT"),
    (env(REMOTE_URL="lm://me:passw@rd@127.0.0.1:1"), "lmcache_server at 127.0.0.1:1 does not answer"),
    (env(REMOTE_URL="tcp://127.0.0.1:5555"), "LMCache has no connector for remote_url tcp://127.0.0.1:5555"),
    (Given(yaml="remote_serde: cachegen"), "remote_serde cachegen: replicas would not load KV as it was stored"),
    (env(REMOTE_SERDE="kivi"), "remote_serde kivi: "),
    (env(REMOTE_SERDE="torch"), "remote_serde torch: "),
    (env(REMOTE_SERDE=""), "remote_serde : "),
    (env(REMOTE_URL="127.0.0.1:65477"), "remote_url 127.0.0.1:65477 has no scheme"),
    (env(REMOTE_URL="localhost"), "remote_url localhost has no scheme"),
    (env(REMOTE_URL=""), "has no remote_url, so nothing would be shared"),
    (env(REMOTE_URL="lm://localhost"), "remote_url 'lm://localhost' is not lm://HOST:PORT"),
    (env(REMOTE_URL="lm://:65432"), "is not lm://HOST:PORT"),
    (env(REMOTE_URL="lm://localhost:port"), "is not lm://HOST:PORT"),
    (env(REMOTE_URL="lm://localhost:99999"), "is not lm://HOST:PORT"),
    (env(REMOTE_URL="lm://::1:65432"), "is not lm://HOST:PORT"),
    (env(REMOTE_URL="lm://[::1]:1"), "lmcache_server at [::1]:1 does not answer"),
    (env(REMOTE_URL="http://localhost:1"), "LMCache has no connector for remote_url http://localhost:1"),
    (env(REMOTE_URL="LM://localhost:1"), "LMCache has no connector for remote_url LM://localhost:1"),
    (env(REMOTE_URL="fs:///tmp/kv"), "remote_url 'fs:///tmp/kv' is not fs://HOST:PORT"),
    (env(REMOTE_URL="redis://localhost"), "remote_url 'redis://localhost' is not redis://HOST:PORT"),
    (env(REMOTE_URL="blackhole://"), "is for LMCache's own tests and shares nothing"),
    (env(REMOTE_URL="mock://100"), "is for LMCache's own tests and shares nothing"),
    (env(REMOTE_URL="redis://me:passw@rd@127.0.0.1:1"), "no Valkey or Redis answers at 127.0.0.1:1"),
    (env(REMOTE_URL="redis://127.0.0.1:1", SAVE_UNFULL_CHUNK="true"), "kvshare stores only whole chunks"),
    (env(REMOTE_URL="redis://me:pass/w@rd@127.0.0.1:1"), "remote_url 'redis://***@127.0.0.1:1' is not redis://HOST"),
    (env(REMOTE_URL="me:password@127.0.0.1:1"), "remote_url ***@127.0.0.1:1 has no scheme"),
    (env(REMOTE_STORAGE_PLUGINS="nosuch"), "LMCache has no connector for remote_url plugin://nosuch"),
    (env(RETRIEVE_LOCATIONS="LocalCPUBackend"), "leaves the remote server out"),
    (env(STORE_LOCATION="LocalCPUBackend"), "leaves the remote server out"),
    (env(EXTERNAL_LOOKUP_CLIENT="mooncakestore://x"), "looks KV up without the policy"),
    (env(REMOTE_CONFIG_URL="http://x"), "lets a server change the settings when the engine starts"),
    # how LMCache reads the environment
    (env(LOCAL_CPU="Flase"), "LMCACHE_LOCAL_CPU='Flase' must be true or false"),
    (env(LOCAL_CPU="yes"), "LMCACHE_LOCAL_CPU='yes' must be true or false"),
    (env(USE_LAYERWISE="on"), "LMCACHE_USE_LAYERWISE='on' must be true or false"),
    (env(USE_LAYERWISE="TRUE"), f"LMCACHE_USE_LAYERWISE: true {LAYERWISE}"),
    (env(CHUNK_SIZE="256.0"), "LMCACHE_CHUNK_SIZE='256.0' must be integer"),
    (env(CHUNK_SIZE=""), "LMCACHE_CHUNK_SIZE='' must be integer"),
    (env(MAX_LOCAL_CPU_SIZE="5GB"), "LMCACHE_MAX_LOCAL_CPU_SIZE='5GB' must be number"),
    (env(MAX_LOCAL_CPU_SIZE="nan"), "LMCACHE_MAX_LOCAL_CPU_SIZE is nan, must be a number"),
    (env(MAX_LOCAL_CPU_SIZE="inf"), "LMCACHE_MAX_LOCAL_CPU_SIZE is inf, must be finite"),
    (env(P2P_INIT_PORTS="9960-9967"), "must be a list of integers"),
    (env(EXTRA_CONFIG="{a: 1}"), "must be a mapping"),
    (env(CHUNK_SISE="128"), "LMCache does not read LMCACHE_CHUNK_SISE (did you mean LMCACHE_CHUNK_SIZE?)"),
    (env(Chunk_Size="128"), "LMCache does not read LMCACHE_Chunk_Size (did you mean LMCACHE_CHUNK_SIZE?)"),
    (env(FORCE_SKIP_SAVE="0"), "LMCACHE_FORCE_SKIP_SAVE is set, to any text at all, so LMCache stores nothing"),
    # sizes, times and ports
    (Given(yaml="chunk_size: 0"), "chunk_size is 0, must be more than 0"),
    (Given(yaml="chunk_size: -256"), "chunk_size is -256, must be 0 or more"),
    (Given(yaml="chunk_size: null"), "chunk_size is None, must be integer"),
    (Given(yaml="max_local_cpu_size: 0"), "max_local_cpu_size is 0.0, must be more than 0"),
    (Given(yaml="blocking_timeout_secs: -1"), "blocking_timeout_secs is -1, must be 0 or more"),
    (Given(yaml="blocking_timeout_secs: 0"), "blocking_timeout_secs is 0, must be more than 0"),
    (Given(yaml="blocking_timeout_secs: 2.5"), "blocking_timeout_secs is 2.5, must be integer"),
    (env(LOCAL_CPU="false", MAX_LOCAL_CPU_SIZE="9000"), "the run takes about 180"),
    (Given(yaml="lookup_timeout_ms: -3"), "lookup_timeout_ms is -3, must be 0 or more"),
    (Given(yaml="p2p_init_ports: [9960, 99600]"), "p2p_init_ports is [9960, 99600], must be from 0 to 65535"),
    (Given(yaml="min_retrieve_tokens: 100000"), "min_retrieve_tokens 100000 is longer than any prompt"),
    (Given(yaml="save_unfull_chunk: true"), "save_unfull_chunk: true does not work on CPU"),
    (Given(yaml="local_cpu: 'Flase'"), "local_cpu is 'Flase', must be true or false"),
    # verl
    (verl(f"{ROLLOUT}.name=sglang"), "rollout.name=sglang: kvshare extends verl's vLLM server only"),
    (verl(f"{ROLLOUT}.name=trtllm"), "rollout.name=trtllm: kvshare extends verl's vLLM server only"),
    (verl(f"{ROLLOUT}.disaggregation.enabled=true"), "rollout.disaggregation.enabled=true: verl then starts"),
    (verl(f"{ROLLOUT}.pipeline_model_parallel_size=2"), "not implemented pipeline_model_parallel_size > 1 yet"),
    (verl(f"{ROLLOUT}.expert_parallel_size=3"), "expert_parallel_size must be equal to"),
    (verl(f"{ROLLOUT}.mode=sync"), "Rollout mode 'sync' has been removed"),
    (
        verl("trainer.n_gpus_per_node=3", f"{ROLLOUT}.tensor_model_parallel_size=2"),
        "3 devices (nodes: 1, devices a node",
    ),
    (verl("actor_rollout_ref.actor.ppo_mini_batch_size=64"), "verl refuses the config: train_batch_size"),
    (verl(f"{ROLLOUT}.max_model_len=100000000"), "max_model_len (100000000) should be less than or equal to"),
    (verl(f"{KV}.block_size=many"), "vLLM refuses what verl gives it: argument --block-size"),
    (verl(f"{KV}.block_size=0"), "vLLM refuses what verl gives it: 1 validation error for CacheConfig block_size"),
    (verl(f"{ROLLOUT}.load_format=nope"), "Load format `nope` is not supported: correct it"),
    (verl(f"{KV}.kv_cache_dtype=fp7"), "vLLM refuses what verl gives it: argument --kv-cache-dtype"),
    (verl(f"{KV}.no_such_argument=1"), "vLLM refuses what verl gives it: unrecognized arguments: --no-such-argument"),
    (verl("algorithm.adv_estimator=grop", device="cpu"), "'grop' is not one verl knows"),
    (verl("actor_rollout_ref.model.path=it's"), r"write it as 'actor_rollout_ref.model.path='"),
    (verl("--config-name=ppo_trainer", "--config-dir", verl_config()), "actor_rollout_ref.rollout.name: set it"),
    (verl(f"{ROLLOUT}.tensor_model_parallel_size='2'"), "tensor_model_parallel_size is '2', must be an integer"),
    (verl(f"{ROLLOUT}.tensor_model_parallel_size=null"), "tensor_model_parallel_size is None, must be an integer"),
    (verl(f"{ROLLOUT}.tensor_model_parallel_size=1.5"), "tensor_model_parallel_size is 1.5, must be an integer"),
    (verl(f"{ROLLOUT}.n=0"), "rollout.n is 0, must be an integer of at least 1"),
    (verl(f"{ROLLOUT}.n=four"), "rollout.n is 'four', must be an integer of at least 1"),
    (verl("data.max_prompt_length=-1"), "data.max_prompt_length is -1, must be an integer of at least 1"),
    (verl("data.train_batch_size=all"), "data.train_batch_size is 'all', must be an integer of at least 0"),
    (verl(f"{ROLLOUT}.engine_kwargs=null"), "rollout.engine_kwargs is null, verl's server then fails: remove it"),
    (verl(f"++{ROLLOUT}.engine_kwargs.vlm.block_size=64"), "has no vlm (did you mean vllm?), verl ignores it"),
    (verl(f"{ROLLOUT}.gpu_memory_utilization=7"), "gpu_memory_utilization Input should be less than or equal to 1"),
    # the router's YAML
    (Given(router="hold_seconds: 30"), "has no router_class, which verl needs"),
    (Given(router="[1]"), "has no router_class, which verl needs"),
    (Given(router="router_class: Router"), "router_class Router cannot be loaded"),
    (Given(router="router_class: kvshare.routing.router.Rooter"), "cannot be loaded"),
    (Given(router="router_class: [kvshare"), "is not YAML"),
    (Given(router="OURS\nhold_seconds: thirty"), "hold_seconds is 'thirty', must be a number of seconds"),
    (Given(router="OURS\nhold_seconds: -1"), "hold_seconds is -1, must be a number of seconds"),
    (Given(router="OURS\nhold_seconds: .nan"), "hold_seconds is nan, must be a number of seconds"),
    (Given(router="OURS\nhold_second: 3"), "kvshare's router knows no key hold_second (did you mean hold_seconds?)"),
    (Given(router="OURS\nfull_determinism: 'no'"), "full_determinism is 'no', must be true or false"),
    (Given(router="OURS\nchunk_size: 0"), "chunk_size is 0, must be an integer above 0"),
    (Given(router="OURS\nchunk_size: .inf"), "chunk_size is inf, must be an integer above 0"),
    (Given(router="router_class: os.path"), "router_class os.path is not a class"),
    (Given(router="router_class: builtins.dict"), "router_class builtins.dict has no acquire_server, which verl calls"),
    (Given(router="OURS\nplacement: [cost]"), "placement is ['cost'], must be one of cost, spread"),
    (Given(router="OURS\nplacement: spred"), "placement is 'spred', must be one of cost, spread"),
    (Given(router="OURS\nmax_imbalance: 8"), "kvshare's router knows no key max_imbalance"),
    (
        Given(router="router_class: kvshare.routing.affinity.Router\nmax_imbalance: 0"),
        "max_imbalance is 0, must be an integer above 0",
    ),
    # peer to peer
    (env("p2p", LOCAL_CPU="false"), "with local_cpu: false LMCache keeps nothing that other replicas could read"),
    (env("p2p", RETRIEVE_LOCATIONS="LocalCPUBackend"), "leaves P2PBackend out"),
    (env("p2p", CONTROLLER_PULL_URL="[::1]:8300"), "lmcache_controller and the engines that ask it have no IPv6"),
    (env("p2p", P2P_INIT_PORTS="-1,-2"), "LMCACHE_P2P_INIT_PORTS is [-1, -2], must be from 0 to 65535"),
    (env("p2p", TRANSFER_CHANNEL="nixxl"), "transfer_channel nixxl is not one through which LMCache's P2P works"),
    # multi-process
    (mp(prot=1), "LMCacheMPConnector knows no key lmcache.mp.prot (did you mean lmcache.mp.port?)"),
    (mp(mq_timeout="soon"), "lmcache.mp.mq_timeout is 'soon', must be a number of seconds above 0"),
    (mp(heartbeat_interval=0), "lmcache.mp.heartbeat_interval is 0, must be a number of seconds above 0"),
    (mp(server_urls="a:1,b:1"), "names 2 servers, kvshare knows one per host"),
    (mp(server_urls="lm://a:1"), "the mp backend needs tcp://HOST:PORT"),
    (mp(host="127.0.0.1", port=1), "lmcache server at 127.0.0.1:1 does not answer"),
    (mp(server_urls="[::1]:1"), "lmcache server and the engines that ask it have no IPv6, ::1 is that"),
]

WARNINGS = [
    (multi({}, OFFLOADING), "MultiConnector of LMCache's connector and OffloadingConnector is not known to work"),
    (Given(connector={"kv_connector_extra_config": {"skip_last_n_tokens": 1}}), "skip_last_n_tokens is not known to"),
    (extra(save_decode_cache=True), "lmcache.save_decode_cache: True is not known to work with kvshare"),
    (env(SAVE_DECODE_CACHE="true"), "LMCACHE_SAVE_DECODE_CACHE: True is not known to work with kvshare"),
    (env(PRIORITY_LIMIT="3"), "LMCACHE_PRIORITY_LIMIT: 3 is not known to work"),
    (env(EXTRA_CONFIG='{"lookup_unpinned": true}'), "lookup_unpinned is not known to work with kvshare"),
    (Given(yaml=P2P.read_text()), "enable_p2p: true beside a remote server is not known to work"),
    (env(QQQQQQQQ="1"), "LMCache does not read LMCACHE_QQQQQQQQ: correct or unset it"),
    (
        env(REMOTE_URL="fs://localhost:1/tmp/kv"),
        "fs://localhost:1/tmp/kv is not known to work with kvshare: only lm, valkey, redis",
    ),
    (env(REMOTE_STORAGE_PLUGINS="fs"), "plugin://fs is not known to work with kvshare: only lm, valkey, redis"),
]

TP4 = (f"{ROLLOUT}.tensor_model_parallel_size=4",)
WORKS = [
    (nodes("trainer.nnodes=2", *TP4), "replicas", "1 replicas of 4 cuda on 2 nodes each"),
    (nodes("trainer.nnodes=4", *TP4), "replicas", "2 replicas of 4 cuda on 2 nodes each"),
    (verl("trainer.n_gpus_per_node=8", *TP4), "replicas", "2 replicas of 4 cuda"),
    (
        verl("trainer.n_gpus_per_node=8", f"{ROLLOUT}.data_parallel_size=2", f"{ROLLOUT}.expert_parallel_size=2"),
        "replicas",
        "4 replicas of 2 cuda",
    ),
    (verl(f"{KV}.kv_cache_dtype=fp8", f"{ROLLOUT}.dtype=bfloat16"), "engine", "KV in fp8, 1 bytes an element"),
    (verl(f"{ROLLOUT}.dtype=bfloat16"), "engine", "blocks of 16 tokens, KV in bfloat16, 2 bytes"),
    (verl(f"{ROLLOUT}.dtype=float16", f"{KV}.block_size=64"), "engine", "blocks of 64 tokens, KV in float16"),
    (Given(yaml='chunk_size: "128"'), "settings", "chunk_size 128"),
    (env(CHUNK_SIZE="'128'"), "settings", "chunk_size 128"),
    (extra(max_local_cpu_size="0.5", cache_policy="LRU"), "settings", "chunk_size 256"),
    (env("p2p", P2P_INIT_PORTS="9960,9961"), "settings", "chunk_size 256"),
    (Given(yaml=P2P.read_text() + "\np2p_init_ports: 9960\n", backend="p2p"), "settings", "chunk_size 256"),
    (Given(connector={"kv_connector": "LMCacheConnectorV1Dynamic", "kv_connector_module_path":
        "lmcache.integration.vllm.lmcache_connector_v1"}), "connector", "LMCacheConnectorV1Dynamic"),
    (mp(host="tcp://10.0.0.1", port="6000"), "connector", "LMCacheMPConnector"),
]  # fmt: skip


@pytest.fixture
def make(job, environment, tmp_path, lmcache_server):
    def make(given: Given) -> preflight.Job:
        yaml = given.yaml or (P2P.read_text() if given.backend == "p2p" else "")
        if yaml:
            path = tmp_path / "lmcache.yaml"
            path.write_text(yaml)
            environment.setenv("LMCACHE_CONFIG_FILE", str(path))
        if given.backend != "remote":
            environment.delenv("LMCACHE_REMOTE_URL")
        if given.backend == "p2p":
            environment.setenv("LMCACHE_TRANSFER_CHANNEL", "nixl")
        for name, value in given.environ.items():
            environment.setenv(name, value)
        if "LMCACHE_REMOTE_STORAGE_PLUGINS" in given.environ:
            environment.delenv("LMCACHE_REMOTE_URL")
            environment.setenv("LMCACHE_CONFIG_FILE", str(empty := tmp_path / "plugins.yaml"))
            empty.write_text("chunk_size: 256")
        overrides = list(given.overrides)
        if given.connector:
            made = {key: value for key, value in {**CONNECTOR, **given.connector}.items() if value is not None}
            overrides.append(f"{KV}.kv_transfer_config='{json.dumps(made)}'")
        if given.router:
            router = tmp_path / "router.yaml"
            router.write_text(given.router.replace("OURS", "router_class: kvshare.routing.router.Router"))
            overrides.append(f"{ROLLOUT}.router_config_path='{router}'")
        return job(*overrides, backend=given.backend, device=given.device)

    return make


def ids(rows):
    return [words for _, *_, words in rows]


@pytest.mark.parametrize(("given", "words"), ERRORS, ids=ids(ERRORS))
def test_error(make, monkeypatch, given, words):
    monkeypatch.setattr(preflight.packages, "packages", lambda job: iter(()))
    found = preflight.errors(preflight.run(make(given)))
    assert any(words in line for line in found), found
    assert not any("\n" in line or "check of" in line or "w@rd" in line for line in found)


@pytest.mark.parametrize(("given", "words"), WARNINGS, ids=ids(WARNINGS))
def test_warning(make, given, words):
    findings = preflight.run(make(given))
    assert preflight.errors(findings) == []
    found = [finding.text for finding in findings if finding.level == "warning"]
    assert any(words in line for line in found), found


@pytest.mark.parametrize(("given", "row", "words"), WORKS, ids=ids(WORKS))
def test_works(make, given, row, words):
    """As far as it can be seen without the devices and services that it needs."""
    made = make(given)
    for stage in list(preflight.STAGES.values())[1:-1]:
        for check in stage:
            assert list(check(made)) == []
    assert words in made.facts[row]


@pytest.mark.parametrize(
    ("given", "size"), [((), 4), ((f"{ROLLOUT}.dtype=bfloat16",), 2), ((f"{KV}.kv_cache_dtype=fp8",), 1)]
)
def test_forecast_counts_bytes_as_vllm_stores_them(make, model, given, size):
    made = make(verl(f"{ROLLOUT}.dtype=float32", *given))
    for stage in list(preflight.STAGES.values())[1:-1]:
        for check in stage:
            assert list(check(made)) == []
    shape = json.loads((model / "config.json").read_text())
    head = shape["hidden_size"] // shape["num_attention_heads"]
    assert preflight.memory.recipe(made).token_bytes == (
        2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * size
    )


@pytest.mark.parametrize("ends", [["parquet"], ["jsonl"], ["json"], ["jsonl", "parquet"]])
def test_data_is_read_as_verl_reads_it(make, data, tmp_path, ends):
    """A file, or a list of them, of each kind that verl reads."""
    rows = datasets.load_dataset("parquet", data_files=str(data / "train.parquet"), split="train")
    rows.to_parquet(tmp_path / "it's.parquet")
    for end in ("json", "jsonl"):
        rows.to_json(tmp_path / f"it's.{end}")
    files = ",".join(quote(str(tmp_path / f"it's.{end}")) for end in ends)
    given = f"data.train_files={files}" if len(ends) == 1 else f"data.train_files=[{files}]"
    made = make(verl(given, "data.train_max_samples=-1", device="cpu"))
    assert preflight.errors(preflight.run(made)) == []
    assert made.forecast.of == len(ends) * len(rows)


def test_files_that_do_not_go_together(make, data, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"prompt": 7}\n')
    made = make(verl(f"data.train_files=[{data}/train.parquet,{tmp_path}/other.jsonl]", device="cpu"))
    found = preflight.errors(preflight.run(made))
    assert len(found) == 1, found
    assert found[0].startswith("verl cannot read data.train_files (The features can't be aligned")
