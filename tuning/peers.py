"""The peers that a benchmark times beside jitgen, in the same run and on the same data.

A peer's result is compared with the float64 product of the operands it was given before it is
timed. What it needs in another layout than a quantizer makes is laid out before the timed call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..api_quantize import quantize
from ..errors import DeviceError, VerifyError
from . import cutlass

# Of a row of D, |D - float64| / |float64|, both L2 norms. Rounding to BF16 costs 1.7e-3; wgmma's
# 14-bit alignment of terms 0.6e-3 with a promotion every 128 of k, and 3.2e-3 with none at k =
# 16384 (both from `jitgen.numerics`, on normal data). Scales of neighbouring blocks taken for each
# other cost 80e-3.
TOLERANCE = 2.0**-7

ROW_MULTIPLE = 4  # of m: cuBLASLt and TMA read scales of A, m to a block of k, in 16 bytes


@dataclass(frozen=True)
class Prepared:
    """A problem laid out for a peer.

    calls : by configuration, what runs it: no argument, result bfloat16 [>= m, n]
    reference : float64 [m, n]
    """

    calls: Mapping[str, Callable[[], Any]]
    reference: Any


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    name : its key in results
    title : its name for people
    method : one sentence on what is timed
    prepare : makes x [m, k] and weight [n, k], both float32, ready; DeviceError says why it cannot
    """

    name: str
    title: str
    method: str
    prepare: Callable[[Any, Any], Prepared]


def check_result(d: Any, reference: Any) -> None:
    """Raise VerifyError unless every row of the reference is that of `d`, within TOLERANCE."""
    import torch

    m = reference.shape[0]
    error = torch.linalg.vector_norm(d[:m].double() - reference, dim=1)
    relative = error / torch.linalg.vector_norm(reference, dim=1)
    wrong = torch.nonzero(~(relative <= TOLERANCE))  # a NaN is wrong
    if len(wrong):
        row = int(wrong[0])
        raise VerifyError(
            f"{len(wrong)} of {m} rows are wrong; the first, {row}, is off by"
            f" {float(relative[row]):.2g} of its norm, {TOLERANCE:.2g} is allowed"
        )


def _dequantize(matrix: Any, scale: Any, block: tuple[int, int]) -> Any:
    """The float64 values that a quantized matrix stands for."""
    rows, k = matrix.shape
    wide = scale.double().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)
    return matrix.double() * wide[:, :k]


def cublaslt_call(x: Any, weight: Any) -> Callable[[], Any]:
    """x @ weight^T in FP8 as torch calls cuBLASLt, with one scale a tensor, to BF16."""
    return _cublaslt_call(*_quantize_tensors(x, weight))


def _quantize_tensors(x: Any, weight: Any) -> tuple[Any, Any, Any, Any]:
    """x and weight in FP8, each followed by its one scale [1, 1]."""
    return *quantize(x, tuple(x.shape)), *quantize(weight, tuple(weight.shape))


def _cublaslt_call(a: Any, scale_a: Any, b: Any, scale_b: Any) -> Callable[[], Any]:
    import torch

    return functools.partial(
        torch._scaled_mm,
        *(a, b.t(), scale_a.reshape(()), scale_b.reshape(())),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _prepare_cublaslt(x: Any, weight: Any) -> Prepared:
    a, scale_a, b, scale_b = _quantize_tensors(x, weight)
    reference = _dequantize(a, scale_a, a.shape) @ _dequantize(b, scale_b, b.shape).t()
    return Prepared({"": _cublaslt_call(a, scale_a, b, scale_b)}, reference)


@dataclass(frozen=True)
class _Blockwise:
    """Operands of a GEMM with scales 1x128 and 128x128, A padded to a multiple of 4 rows."""

    a: Any
    b: Any
    sfa: Any  # [k / 128, m] row-major
    sfb: Any  # [ceil(n / 128), k / 128] row-major
    reference: Any


def _quantize_blockwise(x: Any, weight: Any) -> _Blockwise:
    import torch

    m = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -m % ROW_MULTIPLE))
    (a, sfa), (b, sfb) = quantize(padded), quantize(weight, (128, 128))
    reference = _dequantize(a[:m], sfa[:m], (1, 128)) @ _dequantize(b, sfb, (128, 128)).t()
    return _Blockwise(a, b, sfa.t().contiguous(), sfb, reference)


def _prepare_cublaslt_blockwise(x: Any, weight: Any) -> Prepared:
    import torch

    if x.shape[1] % 512:
        raise DeviceError(
            f"k = {x.shape[1]}: cuBLASLt reads 128x128 scales four blocks of k at a time, k must be"
            " a multiple of 512"
        )
    given = _quantize_blockwise(x, weight)
    call = functools.partial(
        torch._scaled_mm,
        *(given.a, given.b.t(), given.sfa.t(), given.sfb.t()),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,  # True is refused
    )
    return Prepared({"": call}, given.reference)


def _prepare_cutlass(x: Any, weight: Any) -> Prepared:
    libraries = cutlass.libraries()
    given = _quantize_blockwise(x, weight)
    calls = {str(config): _cutlass_call(library, given) for config, library in libraries.items()}
    return Prepared(calls, given.reference)


def _cutlass_call(library: cutlass.Library, given: _Blockwise) -> Callable[[], Any]:
    import torch

    (m, k), n, device = given.a.shape, given.b.shape[0], given.a.device
    sfb = given.sfb.t().contiguous()
    d = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=device)
    workspace = torch.empty(library.workspace_bytes(m, n, k), dtype=torch.uint8, device=device)
    tensors = (given.a, given.b, given.sfa, sfb, d)

    def call() -> Any:
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        stream = torch.cuda.current_stream().cuda_stream
        library.gemm(addresses, (m, n, k), workspace.data_ptr(), stream)
        return d

    return call


PEERS = (
    Peer(
        "cublaslt",
        "cuBLASLt",
        "`torch._scaled_mm` with one scale a tensor (less work than jitgen's),"
        " use_fast_accum=True and BF16 output.",
        _prepare_cublaslt,
    ),
    Peer(
        "cublaslt_blockwise",
        "cuBLASLt blockwise",
        "`torch._scaled_mm` with jitgen's scales, 1x128 and 128x128, and BF16 output. Before the"
        " timed call, which favours it, the scales of A are laid out [k/128, m] and m is padded to"
        " a multiple of 4.",
        _prepare_cublaslt_blockwise,
    ),
    Peer(
        "cutlass",
        "CUTLASS",
        "its Hopper GEMM with FP8 blockwise scales, jitgen's, and BF16 output. Before the timed"
        " call, which favours it, the scales are laid out [k/128, m] and [k/128, n/128] and m is"
        f" padded to a multiple of 4. For each shape the fastest of {len(cutlass.CONFIGS)}"
        f" configurations: {'; '.join(map(str, cutlass.CONFIGS))}.",
        _prepare_cutlass,
    ),
)
