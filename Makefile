# Everything runs in .venv, made from requirements/cpu.txt. Start with `make demo`.
PYTHON ?= python3
BIN := .venv/bin
UV := .venv-uv/bin/uv
TORCH := $(shell grep -o '^torch==[^ ]*' requirements/cpu.txt)

.PHONY: demo demo-p2p demo-mp demo-tools tiny-model install test test-npu test-gpu-install test-gpu-file freshness async \
  routing faults soak p2p bench forecast verify wheel lint lock clean
.DEFAULT_GOAL := demo

demo: install
	$(BIN)/kvshare demo --run outputs/demo

demo-p2p: install
	$(BIN)/kvshare demo --backend p2p --run outputs/demo-p2p

demo-mp: install
	$(BIN)/kvshare demo --backend mp --run outputs/demo-mp

# The demo with tools. BACKEND is remote, p2p or mp.
BACKEND := remote
demo-tools: install
	$(BIN)/kvshare demo --tools --backend $(BACKEND) --run outputs/demo-tools

install: .venv/installed

# Install torch first: its CPU build comes from pip's default index, or else from PyTorch's index.
.venv/installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$(TORCH)" --no-deps || \
	  $(BIN)/pip install -q "$(TORCH)" --no-deps --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install -q --no-deps -r requirements/cpu.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

.venv/dev: .venv/installed requirements/dev.txt
	$(BIN)/pip install -q -r requirements/dev.txt
	touch $@

test: .venv/dev
	$(BIN)/pytest
	$(BIN)/pytest --backend mp tests/hooks/test_live_engines.py tests/hooks/test_live_faults.py -k "not (stopped or restarted)"

# Under verl: the A/B test of docs/freshness.md (17 minutes), PPO with a critic, and the mp backend.
freshness: .venv/dev
	$(BIN)/pytest -s tests/long/freshness.py
	$(BIN)/pytest -s -m slow tests/launch/test_training.py tests/hooks/test_live_engines.py
	$(BIN)/pytest -s --backend mp tests/hooks/test_live_engines.py tests/hooks/test_live_freshness.py tests/launch/test_training.py

# verl's async trainers: 14 runs of six updates (docs/async.md), over an hour; those of one with -k fully.
async: .venv/dev
	$(BIN)/pytest -s tests/long/async_trainers.py

# verl's routing compared with kvshare's under verl, and the simulated tables of docs/routing.md.
routing: .venv/dev
	$(BIN)/pytest -s tests/long/routing.py
	$(BIN)/python benchmarks/routing.py

# Faults on live engines, and a server that is killed and restarted under verl (docs/reliability.md).
faults: export LMCACHE_BLOCKING_TIMEOUT_SECS ?= 2
faults: .venv/dev
	$(BIN)/pytest -s tests/hooks/test_live_faults.py tests/services/test_lm_server.py tests/long/faults.py \
	  tests/long/tensor_parallel.py
	$(BIN)/pytest -s --backend shared tests/hooks/test_live_faults.py tests/hooks/test_remote_shm.py
	$(BIN)/pytest -s --backend valkey tests/hooks/test_live_faults.py tests/hooks/test_remote_engine.py
	$(BIN)/pytest -s --backend mooncake tests/hooks/test_live_faults.py
	$(BIN)/pytest -s --backend mp tests/hooks/test_live_faults.py tests/long/faults.py -k "not soak"

# Weight updates and 50 faults on one engine, 50 deaths and hangs in P2P: an hour (SOAK_REQUESTS=400 for minutes).
soak: .venv/dev
	$(BIN)/pytest -s tests/long/soak.py

# The forecast compared with measurements under verl, about 15 minutes.
forecast: .venv/dev
	$(BIN)/pytest -s tests/long/forecast.py

# kvshare verify on engines with different setup mistakes, about 6 minutes.
verify: .venv/dev
	$(BIN)/pytest -s tests/long/verify.py

# The wheel, installed in a new environment.
wheel: .venv/dev
	$(BIN)/pytest -s tests/long/wheel.py

# P2P: three replicas and a controller, each of them killed once; two hosts (network namespaces). 10 minutes.
p2p: .venv/dev
	$(BIN)/pytest -s -m "slow or not slow" tests/hooks/test_live_peers.py tests/long/p2p.py

# The CPU tables of docs/benchmarks/cpu.md, 10 minutes.
bench: .venv/dev
	$(BIN)/kvshare prepare --offline --tiny-model --limit 4 --data outputs/bench/data
	for backend in remote p2p mp; do $(BIN)/kvshare bench config/bench/$${backend}_cpu.yaml -n 4 --repeat 3 || exit; done
	LMCACHE_LOG_LEVEL=ERROR $(BIN)/python benchmarks/remote.py

# Tests of the NPU launchers, with the packages for NPUs (no NPU needed, 2 minutes). LMCache-Ascend is not on PyPI:
# make test-npu LMCACHE_ASCEND=<checkout of its tag v0.4.4>. Without it the tests that need it are skipped.
NPU := .venv-npu
test-npu: $(NPU)/installed
	LMCACHE_ASCEND="$(LMCACHE_ASCEND)" $(NPU)/bin/python -m pytest tests/npu

# The LMCache version for NPUs takes precedence over that of .venv. vLLM and vllm-ascend are only unpacked.
PINNED = $(shell grep -o '^$(1)==[^ ]*' requirements/npu.txt)
NPU_PIP = $(BIN)/pip --python $(NPU)/bin/python
VLLM_NPU := $(shell grep -o 'vllm@v[0-9.]*[0-9]' requirements/npu.txt | cut -dv -f3)
$(NPU)/installed: .venv/dev requirements/npu.txt
	rm -rf $(NPU) && $(BIN)/python -m venv --without-pip $(NPU)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(NPU)/venv.pth
	mv $(NPU)/venv.pth $(NPU)/lib/python*/site-packages/
	$(NPU_PIP) install -q --no-deps setuptools-rust semantic_version gguf diskcache
	NO_CUDA_EXT=1 $(NPU_PIP) install -q --no-deps --no-build-isolation --no-binary lmcache \
	  $(call PINNED,lmcache)
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM_NPU) $(NPU_PIP) download -q --no-deps --no-build-isolation \
	  --no-binary vllm -d $(NPU) vllm==$(VLLM_NPU)
	tar xzf $(NPU)/vllm-$(VLLM_NPU).tar.gz -C $(NPU) && mv $(NPU)/vllm-$(VLLM_NPU)/vllm $(NPU)/lib/python*/site-packages/
	cp $(NPU)/vllm-$(VLLM_NPU)/requirements/common.txt $(NPU)/vllm-common.txt
	$(NPU_PIP) download -q --no-deps --only-binary :all: --platform manylinux_2_34_$(shell uname -m) -d $(NPU) \
	  $(call PINNED,vllm-ascend)
	$(NPU)/bin/python -m zipfile -e $(NPU)/vllm_ascend-*.whl $(NPU)/vllm-ascend
	touch $@

# Train the demo's model again: 2 minutes on an H200, hours on CPUs.
tiny-model: .venv/installed
	$(BIN)/python dev/train_tiny_model.py

lint: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck *.sh .ci/run

# Tests of the GPU launchers (tests/gpu), with the exact packages of each GPU file. They need no GPU, 12 GB of disk and
# downloads, and 5 minutes for each file. The second environment replaces the first.
GPU := .venv-gpu
GPU_FILES := gpu gpu-verl
test-gpu-install: $(UV)
	for file in $(GPU_FILES); do $(MAKE) --no-print-directory test-gpu-file FILE=$$file || exit; done

GPU_UV = $(UV) pip $(1) --python $(GPU)/bin/python
test-gpu-file: $(UV)
	@echo "== requirements/$(FILE).txt into $(GPU), in place of what is there"
	rm -rf $(GPU)
	@free=$$(df --output=avail -BG . | tail -1 | tr -dc 0-9); [ $$free -ge 25 ] || \
	  { echo "$$free GB free here, 25 are needed: 12 for $(GPU), and uv's downloads (uv cache clean)"; exit 2; }
	$(UV) venv -q --python $(PYTHON) $(GPU)
	$(call GPU_UV,sync) -q requirements/$(FILE).txt
	$(call GPU_UV,install) -q --no-deps -e .
	$(call GPU_UV,check)
	$(call GPU_UV,install) -q --no-deps --target $(GPU)/test $(call DEV,hypothesis) $(call DEV,pytest)
	PYTHONPATH=$(CURDIR)/$(GPU)/test GPU_FILE=$(FILE) $(GPU)/bin/python -m pytest -v tests/gpu

# uv in its own environment, in the version that made the locks.
DEV = $(shell grep -o '^$(1)==[^ ]*' requirements/dev.txt)
$(UV): requirements/dev.txt
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install -q $(call DEV,uv)
	touch $@

# Update the locks after a change of a .in file. Pins stay, except with: make lock UPGRADE=--upgrade. Headers stay too.
# The CPU lock is for any Linux, with torch's CPU build if pip finds it. LEFT_OUT needs CUDA or does not load with it.
LEFT_OUT := torchvision torchaudio torchcodec cupy-cuda13x cuda-python cuda-core cuda-bindings cuda-pathfinder \
  cufile-python nvtx nixl-cu13
LOCK_cpu := --universal $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) $(addprefix --no-emit-package ,$(LEFT_OUT))
LOCK_gpu := --python-platform x86_64-manylinux_2_28
LOCK_gpu-verl := $(LOCK_gpu)
lock: lock-cpu lock-gpu lock-gpu-verl
lock-%: $(UV)
	grep '==' requirements/$*.txt | grep -v '^#' > $*.lock || true
	$(UV) pip compile -q $(UPGRADE) --python-version 3.11 --no-header --no-annotate $(LOCK_$*) -o $*.lock requirements/$*.in
	{ grep '^#\|^\./' requirements/$*.txt; grep -v '^#' $*.lock; } > $*.lock.txt
	mv $*.lock.txt requirements/$*.txt && rm $*.lock

clean:
	rm -rf .venv .venv-uv $(NPU) $(GPU) outputs
