"""Id of an engine's configuration: all that changes the KV of given tokens, apart from the weights.

Engines with the same weights compute other KV with another ``rope_theta``, quantization or KV dtype. So the id is part
of every key. It is equal on every host with an equal configuration.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

from kvshare.hooks.lmcache import model_files

NEUTRAL: dict[str, Any] = {
    "model": "",
    "model_weights": "",
    "revision": None,
    "generation_config": "",
    "override_generation_config": {},
    "max_logprobs": 0,
    "enable_sleep_mode": False,
}
"""Fields of vLLM's ModelConfig that its hash covers, and that name the host's files or concern sampling only."""

PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "cp_kv_cache_interleave_size",
)
"""Fields of vLLM's ParallelConfig that decide which heads, layers and tokens a rank holds."""


def config_id(vllm_config: Any, before: float) -> str | None:
    """Id of an engine's configuration, made of vLLM's own hashes of its parts.

    vLLM's hash of the whole also covers e.g. batch sizes and CUDA graphs. Engines that differ in those share KV.

    Args:
        vllm_config: VllmConfig, with ``hf_overrides`` already applied to ``hf_config``.
        before: as in ``model_files.fingerprint``.

    Returns:
        16 hex digits. None if equal configurations may compute different KV: vLLM cannot hash a part, the draft model's
        files cannot be read, or each engine calibrates its own KV scales.
    """
    cache = vllm_config.cache_config
    if getattr(cache, "calculate_kv_scales", False):  # not in newer vLLM
        return None
    try:
        parts: list[Any] = [
            _model(vllm_config.model_config),
            cache.compute_hash(),
            [getattr(vllm_config.parallel_config, name, 1) for name in PARALLEL],
            str(vllm_config.load_config.load_format),  # "dummy" weights are not those of the files
            _hash(vllm_config, "attention_config"),
            _cpu_layout() if vllm_config.device_config.device_type == "cpu" else "",
        ]
    except TypeError:
        return None
    speculative = vllm_config.speculative_config
    if speculative and (draft := speculative.draft_model_config):  # the KV of its layers is stored too
        files = model_files.fingerprint(draft.model, draft.revision, before)
        if files is None:
            return None
        parts += [speculative.method, _model(draft), files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _model(config: Any) -> list[Any]:
    neutral = copy.copy(config)
    for name, value in NEUTRAL.items():
        setattr(neutral, name, value)
    for name in ("hf_config", "hf_text_config"):
        described = copy.deepcopy(getattr(config, name))
        described._name_or_path = ""
        setattr(neutral, name, described)
    if _has_plain_rope(config.hf_text_config):
        neutral.max_model_len = 0
    multimodal = config.multimodal_config
    return [neutral.compute_hash(), multimodal and (_hash(config, "multimodal_config"), multimodal.mm_processor_kwargs)]


def _has_plain_rope(hf_config: Any) -> bool:
    """Whether ``max_model_len`` does not change how positions are encoded. With a scaling (e.g. longrope) it may."""
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return all(one.get("rope_type", one.get("type", "default")) == "default" for one in by_layer)


def _hash(config: Any, name: str) -> str:
    part = getattr(config, name, None)
    return part.compute_hash() if part is not None else ""


def _cpu_layout() -> str:
    """vLLM packs KV blocks for the instruction set, and ``cpu_connector`` copies them as they are."""
    import torch

    return f"{torch.backends.cpu.get_cpu_capability()} {torch.cpu._is_amx_tile_supported()}"
