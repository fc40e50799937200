"""Arrays of a library that is neither NumPy nor torch, on the GPU: shared memory, ordered streams.

The library is played by torch tensors behind DLPack, on a stream of its own.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402

M, N, K = 100, 576, 1536
WAIT_CYCLES = 100_000_000  # about 50 ms, in which a kernel that does not wait has long read A


class Duck:
    """An array of the library."""

    def __init__(self, tensor: Any, stream: Any) -> None:
        self.tensor = tensor
        self.stream = stream  # the library's current one

    def __dlpack__(self, *, stream: int, max_version: Any = None) -> Any:
        consumer = torch.cuda.default_stream() if stream == 1 else torch.cuda.ExternalStream(stream)
        consumer.wait_stream(self.stream)
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.tensor.__dlpack_device__()
        return int(kind), index


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library's current stream; the library itself is the module `ducks`."""
    side = torch.cuda.Stream()
    library = ModuleType("ducks")
    library.from_dlpack = lambda tensor: Duck(  # type: ignore[attr-defined]
        torch.utils.dlpack.from_dlpack(tensor.__dlpack__(stream=side.cuda_stream)), side
    )
    monkeypatch.setitem(sys.modules, "ducks", library)
    monkeypatch.setattr(Duck, "__module__", "ducks")
    return side


def make() -> tuple[Any, ...]:
    a, sfa = jitgen.quantize(torch.randn(M, K, device="cuda"))
    b, sfb = jitgen.quantize(torch.randn(N, K, device="cuda"), (128, 128))
    return a, b, sfa, sfb


@pytest.mark.parametrize("bound", [False, True], ids=["gemm", "bind"])
def test_kernel_waits_for_the_library_and_the_library_for_it(stream: Any, bound: bool) -> None:
    a, b, sfa, sfb = make()
    expected = jitgen.gemm(a, b, (sfa, sfb), out_dtype="float32")
    late = torch.zeros_like(a.view(torch.uint8))
    ducks = [Duck(t, stream) for t in (late, b.view(torch.uint8), sfa, sfb)]
    out = Duck(torch.full((M, N), torch.nan, device="cuda"), stream)
    arguments = ducks[0], ducks[1], (ducks[2], ducks[3])
    run = jitgen.bind(*arguments, out=out) if bound else None
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(WAIT_CYCLES)
        late.copy_(a.view(torch.uint8))
    d = run() if run else jitgen.gemm(*arguments, out_dtype="float32")
    with torch.cuda.stream(stream):
        got = d.tensor.clone()
    torch.cuda.synchronize()
    assert type(d) is Duck
    assert torch.equal(got, expected)


def test_quantize_gives_codes_in_the_librarys_kind(stream: Any) -> None:
    x = torch.randn(M, K, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    quantized, scale = jitgen.quantize(Duck(x, stream))
    torch.cuda.synchronize()
    want = jitgen.quantize(x)
    assert torch.equal(quantized.tensor.view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(scale.tensor, want[1])
