"""What of an engine's configuration is in its keys: vLLM's real configurations."""

import shutil
import time

import pytest
from vllm.engine.arg_utils import EngineArgs

from kvshare.hooks.lmcache import engine_config

YARN = {
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
}


def made(model, **arguments):
    arguments = {"dtype": "float32", "max_model_len": 2048, **arguments}
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def config_id(*arguments, **named):
    return engine_config.config_id(made(*arguments, **named), time.time())


CHANGES = {
    "rope theta": {"hf_overrides": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}},
    "rope scaling": {"hf_overrides": YARN},
    "length with scaled rope": {"hf_overrides": YARN, "max_model_len": 4096},
    "another override": {"hf_overrides": {"rms_norm_eps": 1e-3}},
    "dtype": {"dtype": "bfloat16"},
    "KV dtype": {"kv_cache_dtype": "fp8"},
    "quantization": {"dtype": "bfloat16", "quantization": "fp8"},
    "weights of no file": {"load_format": "dummy"},
    "ranks": {"tensor_parallel_size": 2},
    "blocks": {"block_size": 64},
}


def test_whatever_changes_kv_is_in_the_id(model):
    ids = {name: config_id(model, **change) for name, change in CHANGES.items()} | {"none": config_id(model)}
    assert None not in ids.values()
    assert len(set(ids.values())) == len(ids), ids


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"max_model_len": 1024},
        {"gpu_memory_utilization": 0.5, "max_num_seqs": 3, "max_num_batched_tokens": 2048, "seed": 7},
        {"served_model_name": "other", "enforce_eager": True, "max_logprobs": 3, "generation_config": "vllm"},
        {"data_parallel_rpc_port": 12345, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_equal_engines_have_one_id(model, tmp_path, same):
    """On another host the model may lie elsewhere."""
    copy = shutil.copytree(model, tmp_path / "copy")
    assert config_id(model) == config_id(copy, **same) is not None


def test_draft_model_stores_kv_too(model, tmp_path):
    def speculating(folder):
        return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}

    copy, other = (shutil.copytree(model, tmp_path / name) for name in ("copy", "other"))
    (other / "model.safetensors").write_bytes(b"other weights")
    ids = [config_id(model, speculative_config=speculating(folder)) for folder in (model, copy, other)]
    assert ids[0] == ids[1]
    assert len({*ids, config_id(model)}) == 3


def test_scales_that_each_engine_calibrates_are_its_own(model):
    config = made(model)
    config.cache_config.calculate_kv_scales = True
    assert engine_config.config_id(config, time.time()) is None
