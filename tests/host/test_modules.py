"""What modules call again and again, on a GPU that the interpreter plays."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import calls  # noqa: E402
from jitgen.integrations import modules, torch_ops  # noqa: E402

from . import fake_gpu  # noqa: E402
from .fake_gpu import FakeGpu  # noqa: E402


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(calls, "_alike", calls.Prepared())
    monkeypatch.setattr(modules, "_runs_now", lambda x: True)
    return gpu


def count_found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for each call from now on that is not one that was prepared."""
    found, find = [], modules.find_call

    def counted(*args: Any) -> Any:
        found.append(args)
        return find(*args)

    monkeypatch.setattr(modules, "find_call", counted)
    return found


def quantized(seed: int, m: int, k: int, rows: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return jitgen.quantize(torch.randn(m, k, generator=generator), (rows, 128))


@pytest.mark.parametrize("has_bias", [False, True])
def test_gemm_is_prepared_once_a_shape(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, has_bias: bool
) -> None:
    found = count_found(monkeypatch)
    bias = torch.randn(136) if has_bias else None
    for seed, m in enumerate((5, 5, 7, 5)):
        (a, sfa), (b, sfb) = quantized(seed, m, 272), quantized(9 + seed, 136, 272, 128)
        got = modules.gemm(a, b, sfa, sfb, bias=bias, dtype=torch.bfloat16)
        want = torch_ops.gemm(a, b, sfa, sfb, bias=bias)
        assert torch.equal(got, want)
    assert len(found) == 2
    modules.gemm(a, b, sfa, sfb, bias=bias, dtype=torch.float32)
    assert len(found) == 3
    monkeypatch.setattr(jitgen.control, "num_sms_limit", 16)
    modules.gemm(a, b, sfa, sfb, bias=bias, dtype=torch.float32)
    assert len(found) == 4


def test_gemm_tells_a_part_and_what_is_not_aligned_from_the_rest(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = count_found(monkeypatch)
    (a, sfa), (b, sfb) = quantized(0, 5, 256), quantized(1, 128, 256, 128)
    want = torch_ops.gemm(a, b, sfa, sfb)
    assert torch.equal(modules.gemm(a, b, sfa, sfb, dtype=torch.bfloat16), want)
    wide = torch.zeros(128, 512, dtype=torch.uint8)
    wide[:, :256] = b.view(torch.uint8)
    part = wide.view(b.dtype)[:, :256]
    assert torch.equal(modules.gemm(a, part, sfa, sfb, dtype=torch.bfloat16), want)
    assert len(found) == 2
    shifted = torch.empty(sfb.numel() + 1)[1:].view(sfb.shape).copy_(sfb)
    for _ in range(2):
        assert torch.equal(modules.gemm(a, b, sfa, shifted, dtype=torch.bfloat16), want)
    assert len(found) == 4  # not kept
    bytes_off = torch.empty(b.numel() + 1, dtype=torch.uint8)[1:].view(b.dtype).view(b.shape)
    with pytest.raises(jitgen.ProblemError, match="16"):
        modules.gemm(a, bytes_off, sfa, sfb, dtype=torch.bfloat16)


def test_grouped_gemm_is_prepared_once_a_shape(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = count_found(monkeypatch)
    (a, sfa), (b, sfb) = quantized(0, 6, 256), quantized(1, 256, 256, 128)
    b, sfb = b.view(2, 128, 256), sfb.view(2, 1, 2)
    for bounds in ((0, 2, 6), (0, 5, 6)):
        offsets = torch.tensor(bounds, dtype=torch.int32)
        got, want = (torch.full((6, 128), 3.0, dtype=torch.bfloat16) for _ in range(2))
        assert modules.grouped_gemm(a, b, sfa, sfb, offsets, layout="ragged", out=got) is got
        torch_ops.grouped_gemm_out(a, b, sfa, sfb, offsets, layout="ragged", out=want)
        assert torch.equal(got, want)
    assert len(found) == 1
    b, sfb = quantized(2, 128, 256)
    offsets = torch.tensor((0, 128, 256), dtype=torch.int32)
    got, want = torch.ones(2, 6, 128), torch.ones(2, 6, 128)
    modules.grouped_gemm(a, b, sfa, sfb, offsets, layout="k_grouped", out=got)
    torch_ops.grouped_gemm_out(a, b, sfa, sfb, offsets, layout="k_grouped", out=want)
    assert torch.equal(got, want)
    assert len(found) == 2
