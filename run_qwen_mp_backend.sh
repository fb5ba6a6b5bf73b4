#!/usr/bin/env bash
# Train Qwen with GRPO (or PPO) on GSM8K with verl, on NVIDIA GPUs;
# rollout replicas of a host share KV through one lmcache server, LMCache's multi-process one.
#
# Before, once:              kvshare prepare --shots 8
# Before:                    eval "$(kvshare services up --backend mp)"
# Then:                      bash run_qwen_mp_backend.sh [Hydra overrides of verl's config]
#
# MODEL_PATH           model to train                   (Qwen/Qwen2.5-7B-Instruct)
# RECIPE               config/<name>.yaml, the recipe   (gsm8k)
# DATA_DIR             train.parquet and test.parquet   (data/gsm8k)
# ADV_ESTIMATOR        grpo, or gae (PPO with a critic) (grpo)
# N_DEVICES, N_NODES   devices a node, nodes            (8, 1)
# LMCache_CONFIG_FILE  LMCache settings                 (config/mp_backend_config.yaml)
# ROUTER               router YAML, null: verl's own    (config/router.yaml)
# KVSHARE_RUN_DIR      metrics, events and the report   (outputs/mp-<time>)
# START_SERVICES=1     start the service too, as kvshare services up does, and end it with the run
# DRY_RUN=1            print environment and command, start nothing
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LMCache_CONFIG_FILE=${LMCache_CONFIG_FILE:-${LMCACHE_CONFIG_FILE:-$here/config/mp_backend_config.yaml}}
model=${MODEL_PATH:-Qwen/Qwen2.5-7B-Instruct}
data=${DATA_DIR:-$here/data/gsm8k}
kv_transfer_config='{"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector"}' # module: not the copy that vLLM has

python3 -c "import kvshare" 2>/dev/null || { echo "kvshare is not installed here: activate .venv, or pip install -e $here" >&2; exit 2; }
# Copies to the GPU are 3 to 5 times as fast with blocks of 128 tokens as with 16: docs/benchmarks/h100.md.
exec python3 -m kvshare launch --backend mp --device cuda -- \
  python3 -m verl.trainer.main_ppo --config-dir "$here/config" --config-name "${RECIPE:-gsm8k}" \
  "algorithm.adv_estimator=${ADV_ESTIMATOR:-grpo}" \
  trainer.device=cuda "trainer.nnodes=${N_NODES:-1}" "trainer.n_gpus_per_node=${N_DEVICES:-8}" \
  "actor_rollout_ref.model.path=$model" "critic.model.path=$model" \
  "data.train_files=$data/train.parquet" "data.val_files=$data/test.parquet" \
  "actor_rollout_ref.rollout.router_config_path=${ROUTER:-$here/config/router.yaml}" \
  "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config='$kv_transfer_config'" \
  +actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=128 \
  "$@"
