"""The benchmark's peers compute what jitgen computes, so that their times can be compared."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen.errors import DeviceError  # noqa: E402
from jitgen.tuning import cutlass, peers  # noqa: E402

SHAPES = [(1, 576, 7168), (16, 2112, 7168), (130, 272, 1024), (256, 7168, 2048), (1028, 1040, 512)]
BLOCKWISE = [peer for peer in peers.PEERS if peer.name != "cublaslt"]


def random(*extents: int) -> torch.Tensor:
    return torch.randn(*extents, device="cuda")


def prepare(peer: peers.Peer, x: torch.Tensor, weight: torch.Tensor) -> peers.Prepared:
    try:
        return peer.prepare(x, weight)
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "m{}-n{}-k{}".format(*shape))
@pytest.mark.parametrize("peer", BLOCKWISE, ids=lambda peer: peer.name)
def test_blockwise_peer_equals_jitgen_within_tolerance(
    peer: peers.Peer, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    x, weight = random(m, k), random(n, k)
    prepared = prepare(peer, x, weight)
    (a, sfa), (b, sfb) = jitgen.quantize(x), jitgen.quantize(weight, (128, 128))
    ours = jitgen.gemm(a, b, (sfa, sfb))
    peers.check_result(ours, prepared.reference)
    for call in prepared.calls.values():
        peers.check_result(call(), prepared.reference)
        peers.check_result(call(), ours.double())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "m{}-n{}-k{}".format(*shape))
def test_cublaslt_equals_float64_within_tolerance(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    prepared = prepare(peers.PEERS[0], random(m, k), random(n, k))
    peers.check_result(prepared.calls[""](), prepared.reference)


def test_cutlass_says_which_problem_it_cannot_run() -> None:
    try:
        libraries = cutlass.libraries()
    except DeviceError as error:
        pytest.skip(str(error))
    for library in libraries.values():
        with pytest.raises(DeviceError, match=r"refuses m4-n8-k24"):
            library.gemm([0] * 5, (4, 8, 24), 0, 0)
