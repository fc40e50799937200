"""Peers without a GPU: what they are given, and that wrong results are found."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jitgen.dtypes import BF16, E4M3  # noqa: E402
from jitgen.errors import DeviceError, VerifyError  # noqa: E402
from jitgen.tuning import cutlass, peers  # noqa: E402

PEERS = {peer.name: peer for peer in peers.PEERS}


def matrices(m: int, n: int, k: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)


def wide(scale: Any, rows: int, block: int) -> Any:
    """A scale for each of `rows` rows and each column, of a scale every `block` rows."""
    return scale.double().repeat_interleave(block, 0)[:rows].repeat_interleave(128, 1)


# --- the check ------------------------------------------------------------------------------------


def test_check_result_accepts_rounding_and_ignores_padded_rows() -> None:
    reference = torch.randn(5, 512, dtype=torch.float64)
    d = torch.cat([reference, torch.full((3, 512), torch.nan)]).bfloat16()
    peers.check_result(d, reference)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: d[2, 17].fill_(torch.nan),
            r"1 of 5 rows are wrong; the first, 2, is off by nan",
        ),
        (lambda d: d[3:, :64].zero_(), r"2 of 5 rows are wrong; the first, 3, is off by 0\.3"),
        (lambda d: d.mul_(1.02), r"5 of 5 rows are wrong"),
    ],
    ids=["nan", "tile", "scale"],
)
def test_check_result_rejects_wrong_rows(spoil: Any, message: str) -> None:
    torch.manual_seed(0)
    reference = torch.randn(5, 512, dtype=torch.float64)
    d = reference.bfloat16()
    spoil(d)
    with pytest.raises(VerifyError, match=message):
        peers.check_result(d, reference)


# --- cuBLASLt -------------------------------------------------------------------------------------


def test_cublaslt_is_right_on_the_cpu() -> None:
    prepared = PEERS["cublaslt"].prepare(*matrices(17, 48, 512))
    (call,) = prepared.calls.values()
    peers.check_result(call(), prepared.reference)


def scaled_mm(
    a: Any, b: Any, sfa: Any, sfb: Any, *, out_dtype: Any, use_fast_accum: bool
) -> torch.Tensor:
    """What torch does on a Hopper GPU with blockwise scales, and what it checks."""
    (m, k), n = a.shape, b.shape[1]
    assert not use_fast_accum
    assert m % 4 == 0  # cuBLASLt's own rule
    assert (tuple(sfa.shape), sfa.stride()) == ((m, k // 128), (1, m))
    assert (tuple(sfb.shape), sfb.stride()) == ((k // 128, -(-n // 128)), (1, k // 128))
    d = (a.double() * wide(sfa, m, 1)) @ (b.t().double() * wide(sfb.t(), n, 128)).t()
    return d.to(out_dtype)


@pytest.mark.parametrize("m", [1, 8, 70])
def test_cublaslt_blockwise_lays_scales_out_as_torch_wants_them(
    monkeypatch: pytest.MonkeyPatch, m: int
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    prepared = PEERS["cublaslt_blockwise"].prepare(*matrices(m, 272, 512))
    (call,) = prepared.calls.values()
    assert prepared.reference.shape == (m, 272)
    peers.check_result(call(), prepared.reference)


def test_cublaslt_blockwise_rejects_k_whose_scales_it_would_misread() -> None:
    with pytest.raises(DeviceError, match=r"k = 640: .* must be a multiple of 512"):
        PEERS["cublaslt_blockwise"].prepare(*matrices(8, 272, 640))


# --- CUTLASS --------------------------------------------------------------------------------------


def at(address: int, dtype: np.dtype[Any], *shape: int) -> np.ndarray[Any, Any]:
    """The array in memory at an address."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class FakeLibrary:
    """Computes on the CPU what cutlass_gemm.cu says that it does, or fails."""

    def __init__(self, status: str = "") -> None:
        self.status = status
        self.streams: list[int] = []

    def workspace_bytes(self, m: int, n: int, k: int) -> int:
        return 64

    def gemm(
        self, operands: Sequence[int], extents: tuple[int, int, int], workspace: int, stream: int
    ) -> None:
        if self.status:
            raise DeviceError(self.status)
        m, n, k = extents
        float32 = np.dtype(np.float32)
        a, b = at(operands[0], E4M3.numpy, m, k), at(operands[1], E4M3.numpy, n, k)
        sfa = at(operands[2], float32, k // 128, m)
        sfb = at(operands[3], float32, k // 128, -(-n // 128))
        left = a.astype(float) * sfa.T.repeat(128, 1)
        right = b.astype(float) * sfb.T.repeat(128, 0)[:n].repeat(128, 1)
        at(operands[4], BF16.numpy, m, n)[...] = (left @ right.T).astype(BF16.numpy)
        at(workspace, np.dtype(np.uint8), 64)[...] = 1
        self.streams.append(stream)


def install(monkeypatch: pytest.MonkeyPatch, fakes: Mapping[cutlass.Config, FakeLibrary]) -> None:
    monkeypatch.setattr(cutlass, "libraries", lambda: fakes)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)


@pytest.mark.parametrize("m", [1, 70])
def test_cutlass_is_given_what_its_source_asks_for(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    fakes = {config: FakeLibrary() for config in cutlass.CONFIGS}
    install(monkeypatch, fakes)
    prepared = PEERS["cutlass"].prepare(*matrices(m, 264, 384))
    assert list(prepared.calls) == [str(config) for config in cutlass.CONFIGS]
    for call in prepared.calls.values():
        peers.check_result(call(), prepared.reference)
    assert [fake.streams for fake in fakes.values()] == [[77]] * len(fakes)


def test_cutlass_poisons_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLibrary()
    monkeypatch.setattr(fake, "gemm", lambda *arguments: None)
    install(monkeypatch, {cutlass.CONFIGS[0]: fake})
    prepared = PEERS["cutlass"].prepare(*matrices(8, 264, 384))
    (call,) = prepared.calls.values()
    with pytest.raises(VerifyError, match="8 of 8 rows are wrong"):
        peers.check_result(call(), prepared.reference)


def test_cutlass_passes_on_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def libraries() -> None:
        raise DeviceError("no nvcc")

    monkeypatch.setattr(cutlass, "libraries", libraries)
    with pytest.raises(DeviceError, match="no nvcc"):
        PEERS["cutlass"].prepare(*matrices(8, 264, 384))
