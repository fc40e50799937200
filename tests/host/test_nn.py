"""FP8 linear layers on the interpreter: against float32, against the GEMMs they stand for, and in
training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import ProblemError  # noqa: E402
from jitgen.integrations.tensors import to_numpy  # noqa: E402
from jitgen.nn import Fp8GroupedLinear, Fp8Linear  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
# Relative errors of E4M3 operands, 2^-4 each; of a K block, 4 steps that each cut 34 terms at 2^-13
# of the largest (tests/host/test_grouped.py); of a result in bfloat16, 2^-8.
RELATIVE = 2 * 2.0**-4 + 2.0**-8 + 4 * 34 * 2.0**-13 + 2.0**-8
# Codes below 2^-6 are 2^-9 apart: values below amax / 448 / 64 are off by 2^-10 of amax / 448.
TINY = 2.0**-10 / 448


def assert_close(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`got` is about a @ b^T, within the bound that follows from the operands' rounding."""
    a, b = a.detach().double(), b.detach().double()
    error = (got.detach().double() - a @ b.T).abs()
    # No amax of a block is above that of the whole operand.
    magnitudes = (a.abs() + 2 * TINY * a.abs().max()) @ (b.abs() + 2 * TINY * b.abs().max()).T
    assert (error <= RELATIVE * magnitudes + 1e-6).all()
    # The bound adds up the worst of every product; rounding errors average out.
    assert error.norm() <= 0.06 * (a @ b.T).norm()


def make(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(160, 144, 80), (7, 128, 256), (128, 16, 48)], ids=str)
def test_fp8_linear_is_close_to_float32(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, features, outputs = shape
    layer = Fp8Linear(features, outputs, bias=False, dtype=dtype)
    layer.weight.data.copy_(make(1, outputs, features))
    x = make(2, tokens, features, dtype=dtype).requires_grad_()
    dy = make(3, tokens, outputs, dtype=dtype)
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, dtype)
    assert_close(y, x, layer.weight)
    assert_close(x.grad, dy, layer.weight.T)
    assert_close(layer.weight.grad, dy.T, x.T)


def test_fp8_linear_is_three_gemms_bit_for_bit() -> None:
    layer = Fp8Linear(144, 80)
    assert layer.bias is not None
    x = make(2, 3, 50, 144, dtype=torch.bfloat16).requires_grad_()
    dy = make(3, 3, 50, 80, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(dy)
    rows, grads = x.detach().view(-1, 144), dy.view(-1, 80)
    weight, scales = jitgen.quantize(layer.weight.detach(), (128, 128))

    def gemm(a: torch.Tensor, b: Any, out_dtype: str, sfb: Any, bias: Any = None) -> Any:
        codes, sfa = jitgen.quantize(a)
        epilogue = jitgen.acc if bias is None else jitgen.acc + jitgen.vector("bias")
        bound = epilogue.bind(**({} if bias is None else {"bias": to_numpy(bias)}))
        arrays = to_numpy(codes), to_numpy(b), (to_numpy(sfa), to_numpy(sfb))
        return jitgen.gemm(*arrays, out_dtype=out_dtype, epilogue=bound)

    want = gemm(rows, weight, "bfloat16", scales, layer.bias.detach())
    assert np.array_equal(to_numpy(y.detach()).reshape(-1, 80), want)
    transposed = weight.view(torch.uint8).t().contiguous().view(weight.dtype)
    want = gemm(grads, transposed, "bfloat16", scales.t().contiguous())
    assert x.grad is not None
    assert np.array_equal(to_numpy(x.grad).reshape(-1, 144), want)
    padded = [torch.nn.functional.pad(t, (0, 0, 0, 256 - 150)).t() for t in (grads, rows)]
    x_codes, x_scales = jitgen.quantize(padded[1].contiguous(), (128, 128))
    want = gemm(padded[0].contiguous(), x_codes, "float32", x_scales)
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert torch.equal(layer.weight.grad, torch.from_numpy(want).bfloat16())
    assert torch.equal(layer.bias.grad, grads.float().sum(0).bfloat16())


@pytest.mark.parametrize("offsets", [(0, 128, 128, 384), (128, 256, 256, 256)], ids=str)
def test_fp8_grouped_linear_is_a_linear_of_each_group(offsets: tuple[int, ...]) -> None:
    layer = Fp8GroupedLinear(3, 128, 256, debug=True)
    x = make(2, 384, 128, dtype=torch.bfloat16).requires_grad_()
    dy = make(3, 384, 256, dtype=torch.bfloat16)
    y = layer(x, torch.tensor(offsets, dtype=torch.int32))
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    inside = torch.zeros(384, dtype=torch.bool)
    for group in range(3):
        rows = slice(offsets[group], offsets[group + 1])
        inside[rows] = True
        one = Fp8Linear(128, 256, bias=False)
        one.weight.data.copy_(layer.weight.data[group])
        part = x.detach()[rows].clone().requires_grad_()
        want = one(part)
        want.backward(dy[rows])
        assert torch.equal(y[rows], want)
        assert part.grad is not None
        assert torch.equal(x.grad[rows], part.grad)
        assert one.weight.grad is not None
        assert torch.equal(layer.weight.grad[group], one.weight.grad)
    assert not y[~inside].any()
    assert not x.grad[~inside].any()


def test_fp8_linear_of_no_tokens_and_of_frozen_weights() -> None:
    layer = Fp8Linear(64, 32)
    y = layer(torch.empty(0, 64, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 32)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    x = make(1, 16, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def count_quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what is quantized from now on, in 128 x 128 blocks."""
    from jitgen.nn import linear

    found, quantize = [], linear._quantize

    def counted(x: torch.Tensor, blocks: tuple[int, int], transposed: bool) -> Any:
        if blocks == (128, 128):
            found.append(tuple(x.shape))
        return quantize(x, blocks, transposed)

    monkeypatch.setattr(linear, "_quantize", counted)
    return found


def test_kept_codes_are_those_of_the_weight_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, usual = Fp8Linear(64, 32, keep_codes=True), Fp8Linear(64, 32)
    x = make(1, 16, 64, dtype=torch.bfloat16).requires_grad_()
    quantized = count_quantized(monkeypatch)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)

    def check(count: int) -> None:
        usual.load_state_dict(layer.state_dict())
        before = len(quantized)
        y = layer(x)
        assert len(quantized) == before + count
        want = usual(x)
        assert torch.equal(y, want)
        got_dx, want_dx = (torch.autograd.grad(z.sum(), x)[0] for z in (y, want))
        assert torch.equal(got_dx, want_dx)

    check(1)
    check(0)
    layer(x).sum().backward()
    optimizer.step()
    check(1)
    check(0)
    with torch.no_grad():
        layer.weight.mul_(2)
    check(1)
    layer.weight.data = layer.weight.data * 2  # other memory
    check(1)
    layer.load_state_dict(Fp8Linear(64, 32).state_dict())
    check(1)
    layer.weight.data.mul_(2)  # moves no counter
    layer.forget_codes()
    check(1)


def test_kept_codes_without_gradients_lack_the_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Fp8Linear(64, 32, keep_codes=True)
    x = make(1, 16, 64, dtype=torch.bfloat16).requires_grad_()
    quantized = count_quantized(monkeypatch)
    with torch.no_grad():
        y = layer(x)
        assert len(layer.weight_codes(False)) == 2
    assert torch.equal(y, layer(x))
    assert len(layer.weight_codes(True)) == 4
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    assert len(quantized) == 2


def test_a_compiled_step_is_one_graph_and_equals_eager() -> None:
    layer = Fp8Linear(64, 32, keep_codes=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (20, 40):
        x = make(1, tokens, 64, dtype=torch.bfloat16).requires_grad_()
        inputs = [x, *layer.parameters()]
        y, want = compiled(x), layer(x)
        assert torch.equal(y, want)
        grads = (torch.autograd.grad(z.sum(), inputs) for z in (y, want))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        layer.weight.mul_(-1)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("make_layer", "match"),
    [
        (lambda: Fp8Linear(100, 64), "in_features = 100 must be a positive multiple of 16"),
        (lambda: Fp8Linear(64, 64, dtype=torch.float16), "dtype is torch.float16"),
        (lambda: Fp8GroupedLinear(2, 128, 64), "out_features = 64 must be .* of 128"),
        (
            lambda: Fp8Linear(64, 64)(torch.zeros(3, 32)),
            r"must be bfloat16 or float32 \[\.\.\., 64",
        ),
        (lambda: Fp8Linear(64, 64)(torch.zeros(3, 64).half()), "x is torch.float16"),
        (
            lambda: Fp8GroupedLinear(1, 128, 128)(torch.zeros(100, 128), torch.zeros(2)),
            "m a multiple of 128",
        ),
        (
            lambda: Fp8GroupedLinear(1, 128, 128, debug=True)(
                torch.zeros(128, 128), torch.tensor([0, 64], dtype=torch.int32)
            ),
            r"groups\[1\] = 64 must be a multiple of 128",
        ),
    ],
)
def test_layers_reject(make_layer: Any, match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        make_layer()


# --- training -------------------------------------------------------------------------------------

CONTEXT, WIDTH, BATCH, STEPS = 4, 64, 256, 60


def train(make_linear: Any, device: str = "cpu") -> list[float]:
    """Losses of a small model of characters, which learns this repository's README."""
    text = (Path(__file__).parents[2] / "README.md").read_bytes()
    data = torch.tensor([min(byte, 127) for byte in text])
    torch.manual_seed(0)
    embed = torch.nn.Embedding(128, WIDTH).to(device)
    hidden, head = (make_linear(n, 128).to(device) for n in (CONTEXT * WIDTH, 128))
    optimizer = torch.optim.Adam(
        [*embed.parameters(), *hidden.parameters(), *head.parameters()], lr=0.01
    )
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        at = torch.randint(0, len(data) - CONTEXT, (BATCH,), generator=generator)
        context = data[at[:, None] + torch.arange(CONTEXT)].to(device)
        x = torch.relu(hidden(embed(context).flatten(1).bfloat16()))
        loss = torch.nn.functional.cross_entropy(head(x).float(), data[at + CONTEXT].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_follows_bfloat16() -> None:
    """Two layers in FP8, the same two in bfloat16: the same loss, from the same start."""
    in_bf16 = train(lambda n, m: torch.nn.Linear(n, m, dtype=torch.bfloat16))
    in_fp8 = train(Fp8Linear)
    assert abs(in_fp8[0] - in_bf16[0]) < 0.2
    last = [float(np.mean(losses[-10:])) for losses in (in_bf16, in_fp8)]
    print(f"loss {in_bf16[0]:.3f} -> bfloat16 {last[0]:.3f}, FP8 {last[1]:.3f}")
    assert last[0] < in_bf16[0] - 1.0
    assert abs(last[1] - last[0]) < 0.1
