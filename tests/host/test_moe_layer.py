"""The example of an MoE layer against float64: on the interpreter, and on a GPU if there is one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.examples import FOLDER, load

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def moe() -> Any:
    return load("moe_layer")


def dequantized(quantized: Any, scale: Any, block: tuple[int, int]) -> Any:
    wide = scale.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    rows, columns = quantized.shape[-2:]
    return quantized.double() * wide[..., :rows, :columns]


def reference(x: Any, experts: Any, weights: Any, chosen: Any) -> Any:
    """The layer in float64, of the weights as they are quantized."""
    gate_up = dequantized(experts.gate_up, experts.gate_up_scale, (128, 128))
    down = dequantized(experts.down, experts.down_scale, (128, 128))
    y = torch.zeros_like(x, dtype=torch.float64)
    for token, (of_token, ids) in enumerate(zip(weights.double(), chosen, strict=True)):
        for weight, expert in zip(of_token, ids, strict=True):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            y[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return y


ROUTERS = {
    "softmax": (16, lambda moe, logits: moe.route_softmax(logits, 3)),
    "node-limited": (
        256,
        lambda moe, logits: moe.route_node_limited(
            logits, torch.linspace(-0.1, 0.1, 256, device=logits.device)
        ),
    ),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_moe_layer_is_close_to_float64(moe: Any, device: str, router: str) -> None:
    num_experts, route = ROUTERS[router]
    tokens, hidden, intermediate = 5, 128, 128
    generator = torch.Generator(device).manual_seed(torch.seed() % 2**31)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=device, generator=generator)

    gate_up = normal(num_experts, 2 * intermediate, hidden) * hidden**-0.5
    down = normal(num_experts, hidden, intermediate) * intermediate**-0.5
    experts = moe.Experts.quantize(gate_up, down)
    x = normal(tokens, hidden)
    weights, chosen = route(moe, normal(tokens, num_experts))
    got = moe.moe_layer(x, experts, weights, chosen)
    want = reference(x, experts, weights, chosen)
    # x and the middle are rounded to 4 bits: a root mean square error of 2^-4 / sqrt(12) to twice
    # that of each value. Both factors of SwiGLU carry that of x, and silu may double it.
    error = torch.linalg.vector_norm(got - want, dim=1) / torch.linalg.vector_norm(want, dim=1)
    assert (error < 0.12).all()
    assert error.max() > 1e-4  # it was FP8 that was computed


def test_route_node_limited_keeps_to_the_best_nodes(moe: Any) -> None:
    logits, bias = torch.randn(40, 256), torch.randn(256) * 0.1
    weights, chosen = moe.route_node_limited(logits, bias)
    biased = (logits.sigmoid() + bias).view(40, 8, 32)
    best = biased.topk(2, -1).values.sum(-1).topk(4, -1).indices
    for token in range(40):
        nodes = set((chosen[token] // 32).tolist())
        assert nodes <= set(best[token].tolist())
        inside = torch.full((256,), -torch.inf)
        for node in best[token].tolist():
            inside[32 * node : 32 * node + 32] = biased[token, node]
        assert set(chosen[token].tolist()) == set(inside.topk(8).indices.tolist())
    affinity = logits.sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights, 2.5 * affinity / affinity.sum(1, keepdim=True))


def test_route_softmax_renormalizes(moe: Any) -> None:
    logits = torch.randn(40, 16)
    weights, chosen = moe.route_softmax(logits, 4)
    assert torch.equal(chosen, logits.topk(4).indices)
    torch.testing.assert_close(weights.sum(1), torch.ones(40))


def test_permute_orders_pairs_by_expert(moe: Any) -> None:
    experts = torch.randint(0, 7, (30, 3))
    order, inverse, offsets = moe.permute(experts, 9)
    flat = experts.flatten()
    assert torch.equal(flat[order], flat.sort(stable=True).values)
    assert torch.equal(order[inverse], torch.arange(90))
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [int((flat < expert).sum()) for expert in range(10)]


def test_example_runs() -> None:
    done = subprocess.run(
        [sys.executable, FOLDER / "moe_layer.py"], capture_output=True, text=True, check=True
    )
    assert "64 tokens, 16 experts: [64, 256]" in done.stdout
