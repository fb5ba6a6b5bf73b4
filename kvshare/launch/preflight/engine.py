"""Asks vLLM what it makes of the arguments that verl gives it, and checks its KV connector."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Iterator
from typing import Any, cast

from pydantic import ValidationError

from kvshare.core import ascend
from kvshare.core.job import Job, one_line

BLOCK_SIZE = {"cuda": 16, "cpu": 128, "npu": 128}
"""vLLM's default tokens per block of its KV cache, which it sets only when the engine starts."""

IN_PROCESS = ("LMCacheConnectorV1", "LMCacheConnectorV1Dynamic")
MP_CONNECTOR = "LMCacheMPConnector"
CONNECTORS = {"cuda": (*IN_PROCESS, MP_CONNECTOR), "cpu": (*IN_PROCESS, MP_CONNECTOR), "npu": (ascend.CONNECTOR,)}
"""Connectors that kvshare's hooks extend, by device."""

ROLES = {
    "kv_consumer": "loads and never stores",
    "kv_producer": "stores and never loads",
}
"""What LMCache's connectors do in a role that is not kv_both."""


def engine(job: Job) -> Iterator[str]:
    """Let verl's rollout server make vLLM's arguments, and vLLM parse them."""
    from verl.utils.config import omega_conf_to_dataclass
    from vllm.config import CacheConfig, LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            job.model = omega_conf_to_dataclass(job.config.actor_rollout_ref.model)
            job.engine = parsed_by_vllm(job)
            block = {} if job.engine.block_size is None else {"block_size": job.engine.block_size}
            CacheConfig(gpu_memory_utilization=job.engine.gpu_memory_utilization, **block)
            extra = job.engine.model_loader_extra_config
            get_model_loader(LoadConfig(load_format=job.engine.load_format, model_loader_extra_config=extra))
    except SystemExit:  # from argparse, which has written why
        yield f"vLLM refuses what verl gives it: {_reason(said.getvalue())}: correct rollout.engine_kwargs.vllm"
        return
    except ValidationError as error:
        yield f"vLLM refuses what verl gives it: {_reason(str(error))}: correct it"
        return
    except Exception as error:
        yield f"verl's vLLM server does not start: {one_line(error)}: correct it"
        return
    kept = (
        str(kv_dtype(job)).removeprefix("torch.") if job.engine.kv_cache_dtype == "auto" else job.engine.kv_cache_dtype
    )
    job.facts["engine"] = f"blocks of {block_size(job)} tokens, KV in {kept}, {kv_dtype(job).itemsize} bytes an element"


def parsed_by_vllm(job: Job) -> Any:
    """The arguments of ``vllm serve`` in replica 0, parsed (argparse.Namespace)."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    replica = job.replica_list[0]

    class Server(vLLMHttpServer):
        """verl's, up to the point where it would start vLLM."""

        def __init__(self) -> None:
            self.config = omega_conf_to_dataclass(job.rollout)
            self.model_config = job.model
            self._validate_configs()
            self.replica_rank = self.node_rank = 0
            self.nnodes, self.gpus_per_node = replica.nnodes, replica.gpus_per_replica_node
            self.workers = cast(Any, [None] * self.gpus_per_node)
            self._disaggregation_role = "null"
            self._master_address, self._master_port, self._dp_rpc_port = "127.0.0.1", 0, 0

        def _should_profile(self) -> bool:
            return False

        async def run_server(self, args: Any) -> None:
            self.parsed = args

    server = Server()
    asyncio.run(server.launch_server())
    return server.parsed


def _reason(said: str) -> str:
    """What argparse and pydantic have written, in one line and without the input, which may hold a password."""
    lines = (line.strip().partition(" [type=")[0] for line in said.rpartition("error: ")[2].splitlines())
    return " ".join(line for line in lines if line and not line.startswith("For further information")).rstrip(".")


def block_size(job: Job) -> int:
    """Tokens per block that the engines will have."""
    return job.engine.block_size or BLOCK_SIZE[job.device]


def kv_dtype(job: Job) -> Any:
    """torch.dtype of the engines' KV cache."""
    from vllm.utils.torch_utils import get_kv_cache_torch_dtype

    return get_kv_cache_torch_dtype(job.engine.kv_cache_dtype, dtype(job))


def dtype(job: Job) -> Any:
    """torch.dtype of the engines' weights."""
    import torch
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    return STR_DTYPE_TO_TORCH_DTYPE.get(job.engine.dtype) or job.model.hf_config.dtype or torch.bfloat16


def connector(job: Job) -> Iterator[str]:
    """Find LMCache's connector in vLLM's KVTransferConfig, and check that kvshare knows how it works."""
    if not job.shares:
        return
    outer = job.engine.kv_transfer_config
    if outer is None:
        yield "kv_transfer_config is not set, so nothing would be shared: add the lines of kvshare overrides"
        return
    if not outer.kv_connector:
        yield f"kv_transfer_config has no kv_connector, so nothing would be shared: add {CONNECTORS[job.device][0]}"
        return
    try:
        job.connectors = [child for child in _children(outer) if str(child.kv_connector).startswith("LMCache")]
    except Exception as error:
        yield f"vLLM refuses kv_transfer_config: {one_line(error)}: correct it"
        return
    job.facts["connector"] = outer.kv_connector + (
        "" if not _multi(outer) else f" of {', '.join(str(c.kv_connector) for c in _children(outer))}"
    )
    if len(job.connectors) != 1:
        yield (
            f"kv_connector {job.facts['connector']} has {len(job.connectors)} connectors of LMCache, "
            f"so nothing would be shared: use {CONNECTORS[job.device][0]}"
        )
        return
    if outer.kv_load_failure_policy != "recompute":
        yield 'kv_transfer_config lacks "kv_load_failure_policy": "recompute": a failed load would fail the request'
    yield from _known(job, job.connectors[0])


def _multi(config: Any) -> bool:
    return config.kv_connector == "MultiConnector"


def _children(config: Any) -> list[Any]:
    """The connectors of a MultiConnector, as vLLM builds their configs; otherwise ``config`` itself."""
    if not _multi(config):
        return [config]
    given = config.kv_connector_extra_config.get("connectors") or []
    return [type(config)(**{"engine_id": config.engine_id, **child}) for child in given]


def _known(job: Job, found: Any) -> Iterator[str]:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    name = found.kv_connector
    if does := ROLES.get(found.kv_role):
        yield f"kv_role {found.kv_role}: each replica {does}, so none shares with another: set it to kv_both"
    if name not in CONNECTORS[job.device]:
        fix = f"use {CONNECTORS[job.device][0]}" + (" (docs/npu.md)" if job.device == "npu" else "")
        why = "does not work on Ascend" if job.device == "npu" else "is not one that kvshare extends"
        yield f"kv_connector {name} {why}: {fix}"
        return
    if (name == MP_CONNECTOR) != (job.backend == "mp"):
        yield f"kv_connector {name} is not for the {job.backend} backend: run another launcher"
        return
    try:
        cls = KVConnectorFactory.get_connector_class(found)
    except Exception as error:
        yield f"vLLM cannot load kv_connector {name}: {one_line(error)}: correct kv_connector_module_path, or remove it"
        return
    if name == MP_CONNECTOR and not cls.__module__.startswith("lmcache."):
        module = '"kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector"'
        yield f"vLLM would use its own LMCacheMPConnector, which kvshare does not extend: add {module}"
    if found.get_from_extra_config("use_native", False):
        yield "use_native: true in kv_connector_extra_config is vLLM's old copy of LMCache, without a policy: remove it"


def untried(job: Job) -> Iterator[str]:
    """Say that LMCache's connector beside others is not known to work."""
    if job.shares and _multi(outer := job.engine.kv_transfer_config):
        others = [
            child.kv_connector for child in _children(outer) if child.kv_connector != job.connectors[0].kv_connector
        ]
        beside = ", ".join(map(str, others)) or "nothing else"
        yield f"MultiConnector of LMCache's connector and {beside} is not known to work: use LMCache's connector alone"


def graphs(job: Job) -> Iterator[str]:
    if job.device != "cpu" and job.shares and job.rollout.enforce_eager:
        yield (
            "actor_rollout_ref.rollout.enforce_eager=true turns graphs off, so every decode step launches its kernels "
            "one by one: set it to false"
        )
