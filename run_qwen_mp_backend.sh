#!/usr/bin/env bash
# Train Qwen with GRPO (or PPO) on GSM8K with verl, on NVIDIA GPUs;
# rollout replicas of a host share KV through one lmcache server, LMCache's multi-process one.
#
# Before, once:              kvshare prepare --shots 8
# Before, in another shell:  kvshare services up --backend mp
# Then:                      bash run_qwen_mp_backend.sh [Hydra overrides of verl's config]
#
# MODEL_PATH           model to train                   (Qwen/Qwen2.5-7B-Instruct)
# DATA_DIR             train.parquet and test.parquet   (data/gsm8k)
# ADV_ESTIMATOR        grpo, or gae (PPO with a critic) (grpo)
# N_DEVICES, N_NODES   devices a node, nodes            (8, 1)
# LMCache_CONFIG_FILE  LMCache settings                 (config/mp_backend_config.yaml)
# ROUTER               router YAML, null: verl's own    (config/router.yaml)
# KVSHARE_RUN_DIR      metrics, events and the report   (outputs/mp-<time>)
# START_SERVICES=1     start what the second line above says, on this host, and end it with the run
# DRY_RUN=1            print environment and command, start nothing
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

config=$(realpath -m "${LMCache_CONFIG_FILE:-${LMCACHE_CONFIG_FILE:-$here/config/mp_backend_config.yaml}}")
run_dir=$(realpath -m "${KVSHARE_RUN_DIR:-$here/outputs/mp-$(date +%Y%m%d-%H%M%S)}")
model=${MODEL_PATH:-Qwen/Qwen2.5-7B-Instruct}
data=$(realpath -m "${DATA_DIR:-$here/data/gsm8k}")

kv_transfer_config='{"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector"}' # not a copy vLLM may have

environment=(
  "LMCache_CONFIG_FILE=$config"
  "LMCACHE_CONFIG_FILE=$config" # the name LMCache reads
  PYTHONHASHSEED=0              # chunk hashes must agree between processes
  VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin
  "KVSHARE_RUN_DIR=$run_dir"
  "VERL_FILE_LOGGER_PATH=$run_dir/metrics.jsonl"
)
for name in $(compgen -e LMCACHE_); do # what the caller has set
  [[ " ${environment[*]}" == *" $name="* ]] || environment+=("$name=${!name}")
done

runtime_env=() # the same for Ray: a cluster that is up already inherits nothing
for setting in "${environment[@]}"; do
  runtime_env+=("+ray_kwargs.ray_init.runtime_env.env_vars.${setting%%=*}='${setting#*=}'")
done

train=(
  python3 -m verl.trainer.main_ppo --config-dir "$here/config" --config-name gsm8k
  "algorithm.adv_estimator=${ADV_ESTIMATOR:-grpo}"
  trainer.device=cuda
  "trainer.nnodes=${N_NODES:-1}"
  "trainer.n_gpus_per_node=${N_DEVICES:-8}"
  "actor_rollout_ref.model.path='$model'"
  "critic.model.path='$model'"
  "data.train_files='$data/train.parquet'"
  "data.val_files='$data/test.parquet'"
  "actor_rollout_ref.rollout.router_config_path=${ROUTER:-$here/config/router.yaml}"
  "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_transfer_config='$kv_transfer_config'"
  # The server maps the engine's KV by CUDA IPC: memory that sleeps and wakes elsewhere it would not follow.
  ++actor_rollout_ref.rollout.enable_sleep_mode=False
  actor_rollout_ref.rollout.free_cache_engine=False
  +actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=128 # loads 2 to 5 times as fast as 16: docs/benchmarks.md
  "${runtime_env[@]}"
  "$@"
)

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf 'export %q\n' "${environment[@]}"
  printf '%q ' "${train[@]}"
  echo
  exit
fi
export "${environment[@]}"
python3 -c "import kvshare" 2>/dev/null ||
  { echo "kvshare is not installed for $(command -v python3): activate .venv, or pip install -e $here" >&2; exit 2; }
if [[ ${START_SERVICES:-0} == 1 ]]; then # this script again, with the service beside it
  exec env START_SERVICES=0 python3 -m kvshare services run --backend mp --folder "$run_dir" -- bash "$0" "$@"
fi
python3 -m kvshare preflight --backend mp --device cuda -- "${train[@]:3}"
exec python3 -m kvshare run "$run_dir" "${train[@]}" # ends what it started, however it ends; then the report
