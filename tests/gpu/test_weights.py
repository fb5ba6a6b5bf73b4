"""What the checksum of a model's weights costs on a GPU: pytest -s."""

import statistics
import time

import pytest
import torch

from kvshare.hooks.vllm import weights

SHAPES = {"0.5B": (896, 4864, 128, 24, 151936), "7B": (3584, 18944, 512, 28, 152064)}  # Qwen2.5's


def parameters(hidden, intermediate, kv, layers, vocab):
    layer = [(hidden + 2 * kv, hidden), (hidden + 2 * kv,), (hidden, hidden), (2 * intermediate, hidden)]
    layer += [(hidden, intermediate), (hidden,), (hidden,)]
    shapes = [(vocab, hidden), *layer * layers]
    return torch.nn.ParameterList(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SHAPES)
def test_checksum_is_quick_and_sees_an_update(name):
    model, seconds = parameters(*SHAPES[name]), []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        before = weights.checksum(model)
        seconds.append(time.perf_counter() - began)
    print(f"\n{name}: {len(model)} parameters, {1000 * statistics.median(seconds):.1f} ms")
    with torch.no_grad():
        model[-1] *= 2
    assert weights.checksum(model) != before
