"""FP8 linear layers on the GPU: the interpreter's bits, float32 within bounds, graphs, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jitgen.nn import Fp8GroupedLinear, Fp8Linear
from tests.host.test_nn import assert_close, make, train

DTYPES = [torch.bfloat16, torch.float32]


def on_cpu_and_gpu(layer: torch.nn.Module, *inputs: torch.Tensor, dy: torch.Tensor) -> None:
    """The layer's result and every gradient have the same bits on the CPU and on the GPU."""
    results = []
    for device in ("cpu", "cuda"):
        layer = layer.to(device)
        first, *others = (t.to(device) for t in inputs)
        x = first.clone().requires_grad_()
        y = layer(x, *others)
        parameters = [p for name, p in layer.named_parameters() if name != "bias"]
        grads = torch.autograd.grad(y, [x, *parameters], dy.to(device))
        results.append([t.detach().cpu() for t in (y, *grads)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(160, 144, 80), (7, 128, 256), (300, 272, 208)], ids=str)
def test_fp8_linear_has_the_interpreters_bits(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens, features, outputs = shape
    layer = Fp8Linear(features, outputs, dtype=dtype)
    dy = make(3, tokens, outputs, dtype=dtype)
    on_cpu_and_gpu(layer, make(2, tokens, features, dtype=dtype), dy=dy)


def test_fp8_grouped_linear_has_the_interpreters_bits() -> None:
    layer = Fp8GroupedLinear(3, 128, 256)
    offsets = torch.tensor([0, 128, 128, 384], dtype=torch.int32)
    x, dy = (make(i, 512, n, dtype=torch.bfloat16) for i, n in ((2, 128), (3, 256)))
    on_cpu_and_gpu(layer, x, offsets, dy=dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_linear_is_close_to_float32(dtype: torch.dtype) -> None:
    layer = Fp8Linear(1024, 768, bias=False, dtype=dtype, device="cuda")
    layer.weight.data.copy_(make(1, 768, 1024))
    x = make(2, 2000, 1024, dtype=dtype).cuda().requires_grad_()
    dy = make(3, 2000, 768, dtype=dtype).cuda()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert_close(y, x, layer.weight)
    assert_close(x.grad, dy, layer.weight.T)
    assert_close(layer.weight.grad, dy.T, x.T)


def step(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def test_a_step_in_a_graph_equals_eager_with_other_weights() -> None:
    layer = Fp8Linear(256, 384, device="cuda")
    x = make(2, 200, 256, dtype=torch.bfloat16).cuda().requires_grad_()
    dy = make(3, 200, 384, dtype=torch.bfloat16).cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(layer, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x, dy)
    with torch.no_grad():
        for tensor in (x, dy, *layer.parameters()):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for got, want in zip(captured, step(layer, x, dy), strict=True):
        assert torch.equal(got, want)


def test_a_compiled_step_equals_eager() -> None:
    layer = Fp8Linear(256, 384, device="cuda")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (200, 72):
        x = make(2, tokens, 256, dtype=torch.bfloat16).cuda().requires_grad_()
        dy = make(3, tokens, 384, dtype=torch.bfloat16).cuda()
        for got, want in zip(step(compiled, x, dy), step(layer, x, dy), strict=True):
            assert torch.equal(got, want)


def test_training_on_the_gpu_follows_bfloat16() -> None:
    in_bf16 = train(lambda n, m: torch.nn.Linear(n, m, dtype=torch.bfloat16), "cuda")
    in_fp8 = train(Fp8Linear, "cuda")
    last = [sum(losses[-10:]) / 10 for losses in (in_bf16, in_fp8)]
    print(f"loss {in_bf16[0]:.3f} -> bfloat16 {last[0]:.3f}, FP8 {last[1]:.3f}")
    assert last[0] < in_bf16[0] - 1.0
    assert abs(last[1] - last[0]) < 0.1
