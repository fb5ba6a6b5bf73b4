"""What is known of the weights in a worker, whatever the policy says: vLLM's and verl's real classes, no process."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import WorkerWrapperBase

from kvshare import vllm_plugin
from kvshare.hooks.vllm import weights


def model(seed, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, **config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_have_equal_checksums(dtype):
    one, same, other = (model(seed).to(dtype) for seed in (1, 1, 2))
    assert weights.checksum(one) == weights.checksum(same) != weights.checksum(other)


def test_a_small_step_of_training_changes_the_checksum():
    """In bf16 most elements stay as they are."""
    trained = model(1).to(torch.bfloat16)
    before = weights.checksum(trained)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1e-5 * torch.randn_like(parameter)
    assert weights.checksum(trained) != before


class Worker(vLLMColocateWorkerExtension, CPUWorker):
    """vLLM's worker with verl's methods, as vLLM mixes them; ``load`` replaces the weights."""

    def __new__(cls, *args):
        return object.__new__(cls)

    def __init__(self):
        self.model_runner = self

    def get_model(self):
        return self.model

    def update_weights_from_ipc(self, seed):
        self.model = model(seed)
        if seed < 0:
            raise RuntimeError("half-way")

    def init_device(self): ...

    def load_model(self):
        self.model = model(1)


def test_epochs_and_checksums_follow_the_weights():
    worker, known = Worker(), weights.Weights()
    assert known.now() == {"epoch": 0, "weights": ""}
    known.watch(worker)
    worker.load_model()
    first = known.now()
    assert first == known.now() == {"epoch": 1, "weights": weights.checksum(model(1))}
    worker.update_weights_from_ipc(2)
    second = known.now()
    worker.update_weights_from_ipc(1)
    third = known.now()
    assert (second["epoch"], third["epoch"]) == (2, 3)
    assert second["weights"] != first["weights"] == third["weights"]
    with pytest.raises(RuntimeError, match="half-way"):
        worker.update_weights_from_ipc(-1)
    assert known.now()["epoch"] == 4


def test_vllms_worker_is_watched_from_its_first_weights(request, monkeypatch):
    vllm_plugin.register()
    monkeypatch.setattr(weights, "weights", weights.Weights())
    wrapper = WorkerWrapperBase(0)
    wrapper.worker = Worker()
    wrapper.vllm_config = EngineArgs(model=str(request.getfixturevalue("model"))).create_engine_config()
    wrapper.init_device()
    wrapper.load_model()
    assert weights.weights.now() == {"epoch": 1, "weights": weights.checksum(model(1))}


def test_every_way_to_load_weights_is_watched():
    watched = Worker()
    weights.Weights().watch(watched)
    ways = ["load_model", "reload_weights", "update_weights", "finish_weight_update", "wake_up"]  # vLLM's
    ways += ["update_weights_from_ipc", "update_verl_delta_weights"]
    assert not [way for way in ways if way not in vars(watched)]
