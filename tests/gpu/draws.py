"""Random GEMM calls, and how one is run on the GPU and compared with the interpreter."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch

import jitgen
from jitgen import Gemm, Schedule
from jitgen.dtypes import BF16, F32
from jitgen.expr import Expr, acc, cast, gelu, is_exact, matrix, maximum, relu, scalar, silu, vector
from jitgen.interpret import interpret
from jitgen.lower import lower
from jitgen.schedule import max_stages
from jitgen.tuning.bench import GRID_NK
from jitgen.tuning.space import candidates, is_legal

M = (1, 7, 63, 64, 65, 127, 128, 129, 333, 4096)
ODD_N, ODD_K = (8, 72, 264, 576, 2112), (16, 128, 144, 576, 1040, 16384)
SFA_LAYOUTS = ("row", "row-padded", "column", "column-padded")
CANARY = -1.1754943508222875e-38  # around D; exact in bfloat16 and float32

EPILOGUES: dict[str, Expr] = {
    "plain": acc,
    "bias": acc + vector("bias"),
    "bias-f32": acc + vector("bias", F32),
    "residual": acc + matrix("residual"),
    "bias-relu-residual": relu(acc + vector("bias")) + matrix("residual", F32),
    "scaled": acc * scalar("alpha") - 0.25,
    "clipped": maximum(cast(acc, BF16) * 0.5, vector("floor")),
    "silu": silu(acc + vector("bias")),
    "gelu": gelu(acc + vector("bias", F32)),
}


@dataclass(frozen=True)
class Draw:
    """One call: everything but the data."""

    m: int
    problem: Gemm
    schedule: Schedule
    sfa_layout: str
    epilogue: str
    seed: int

    def __str__(self) -> str:
        p, s = self.problem, self.schedule
        return (
            f"m{self.m}-n{p.n}-k{p.k}-{p.d_dtype}-{self.epilogue}-{self.sfa_layout}-{s.block_m}x{s.block_n}"
            f"-s{s.num_stages}-w{s.num_math_warpgroups}-c{s.cluster_m}x{s.cluster_n}-g{s.raster_group}"
            f"-k{s.split_k}-{s.promotion}{'-swap' * s.swap_ab}{'-pingpong' * s.pingpong}"
            f"-seed{self.seed}"
        )


def draw(rng: random.Random, index: int) -> Draw:
    """The `index`-th random call: M and epilogues in turn, dense or odd shapes."""
    m = M[index % len(M)]
    n, k = rng.choice(GRID_NK) if rng.random() < 0.3 else (rng.choice(ODD_N), rng.choice(ODD_K))
    epilogue = list(EPILOGUES)[index // len(M) % len(EPILOGUES)]
    problem = Gemm(n, k, rng.choice((BF16, F32)), EPILOGUES[epilogue])
    schedule = rng.choice(list(candidates(problem)))
    if schedule.split_k == 1 and rng.random() < 0.5:
        cluster = rng.choice(((2, 2), (4, 1), (1, 4)))
        larger = replace(schedule, cluster_m=cluster[0], cluster_n=cluster[1])
        schedule = larger if is_legal(problem, larger) else schedule
    stages = rng.randint(2, max_stages(problem, schedule))
    schedule = replace(schedule, num_stages=min(stages, 32), raster_group=rng.choice((1, 3, 8, 16)))
    return Draw(m, problem, schedule, rng.choice(SFA_LAYOUTS), epilogue, rng.getrandbits(31))


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's values in NumPy's (or ml_dtypes') dtype of the same bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).cpu().numpy().view(ml_dtypes.float8_e4m3fn)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def make_inputs(d: Draw) -> dict[str, torch.Tensor]:
    """Random operands on the GPU: Gaussian with rows of very different scale, or bytes."""
    generator = torch.Generator("cuda").manual_seed(d.seed)
    n, k = d.problem.n, d.problem.k

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    a, sfa = jitgen.quantize(normal(d.m, k) * torch.exp(2 * normal(d.m, 1)))
    b, sfb = jitgen.quantize(normal(n, k), (d.problem.b_scale.rows, 128))
    if d.problem.b_scale.rows == 1:
        sfb = _laid_out(sfb, SFA_LAYOUTS[d.seed % len(SFA_LAYOUTS)])
    if d.seed % 4 == 0:
        codes = torch.randint(
            0, 256, (d.m, k), device="cuda", generator=generator, dtype=torch.uint8
        )
        a = torch.where(codes & 0x7F == 0x7F, 0x3C, codes).to(torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"a": a, "b": b, "sfa": _laid_out(sfa, d.sfa_layout), "sfb": sfb}
    if d.epilogue in ("bias", "bias-relu-residual", "silu"):
        tensors["bias"] = normal(n).bfloat16()
    if d.epilogue in ("bias-f32", "gelu"):
        tensors["bias"] = normal(n)
    if d.epilogue == "residual":
        tensors["residual"] = normal(d.m, n + 8).bfloat16()[:, :n]
    if d.epilogue == "bias-relu-residual":
        tensors["residual"] = normal(d.m, n)
    if d.epilogue == "scaled":
        tensors["alpha"] = normal(1)
    if d.epilogue == "clipped":
        tensors["floor"] = normal(n).bfloat16()
    return tensors


def _laid_out(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """The same scales in another memory layout; padding holds NaN."""
    rows, columns = scale.shape
    pad = 3 if layout.endswith("padded") else 0
    if layout.startswith("row"):
        memory = scale.new_full((rows, columns + pad), float("nan"))[:, :columns]
    else:
        memory = scale.new_full((columns, rows + pad), float("nan"))[:, :rows].t()
    return memory.copy_(scale)


def run_and_compare(d: Draw, *, num_runs: int = 10, num_tiles: int = 3) -> None:
    """Run into a poisoned output between canaries, several times, and compare sampled tiles."""
    inputs = make_inputs(d)
    operands = {name: t for name, t in inputs.items() if name not in ("a", "b", "sfa", "sfb")}
    n, dtype = d.problem.n, getattr(torch, d.problem.d_dtype.name)
    memory = torch.full((d.m + 4, n + 16), CANARY, dtype=dtype, device="cuda")
    out = memory[2 : d.m + 2, 8 : n + 8]
    first: torch.Tensor | None = None
    for run in range(num_runs):
        out.fill_(float("nan"))
        scales = (inputs["sfa"], inputs["sfb"])
        epilogue = d.problem.epilogue.bind(**operands)
        result = jitgen.gemm(
            inputs["a"], inputs["b"], scales, out=out, epilogue=epilogue, schedule=d.schedule
        )
        assert result is out
        if first is None:
            first = out.clone()
        assert torch.equal(bits(out.clone()), bits(first)), f"run {run} differs from the first: {d}"
    assert not torch.isnan(out).any(), f"elements of D were not written: {d}"
    compare_tiles(d, inputs, out, num_tiles)
    out.fill_(CANARY)
    assert torch.all(bits(memory) == bits(memory.new_full((1,), CANARY))), f"canaries lost: {d}"


def compare_tiles(
    d: Draw, inputs: dict[str, torch.Tensor], out: torch.Tensor, num_tiles: int
) -> None:
    """Some of D's tiles against the interpreter, which runs the same kernel on a tile's rows."""
    kernel = lower(d.problem, d.schedule)
    host = {name: to_numpy(t) for name, t in inputs.items() if name not in ("a", "sfa", "residual")}
    block_m, block_n = d.schedule.block_m, d.schedule.block_n
    tiles = [(r, c) for r in range(0, d.m, block_m) for c in range(0, d.problem.n, block_n)]
    for row, column in random.Random(d.seed).sample(tiles, min(num_tiles, len(tiles))):
        rows = slice(row, min(row + block_m, d.m))
        for name in ("a", "sfa", "residual"):
            if name in inputs:
                host[name] = to_numpy(inputs[name][rows])
        columns = slice(column, min(column + block_n, d.problem.n))
        expected = interpret(kernel, host, tiles=[(0, column)])[:, columns]
        got = to_numpy(out[rows, columns])
        integer = np.uint16 if got.dtype.itemsize == 2 else np.uint32
        steps = np.abs(_ordered(got.view(integer)) - _ordered(expected.view(integer)))
        wrong = (steps > _allowed_steps(d, integer)) & ~_is_tiny_difference(d, got, expected)
        if wrong.any():
            bad = np.argwhere(wrong)
            raise AssertionError(
                f"{d}: {len(bad)} of {got.size} elements of the tile at ({row}, {column}) differ,"
                f" first at {bad[0]}: got {got[tuple(bad[0])]}, expected {expected[tuple(bad[0])]}"
            )


def _allowed_steps(d: Draw, integer: type) -> int:
    """Representable values that the GPU's result may lie off: see jitgen.expr.OPERATIONS."""
    if is_exact(d.problem.epilogue):
        return 0
    return 1 if integer is np.uint16 else 11  # two such float32 round to neighbouring bfloat16


def _is_tiny_difference(
    d: Draw, got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Where the absolute part of the bound covers the difference."""
    if is_exact(d.problem.epilogue):
        return np.zeros(got.shape, bool)
    return np.abs(got.astype(np.float64) - expected.astype(np.float64)) <= 2.0**-121


def _ordered(pattern: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floating-point bit patterns as integers that count representable values; both zeros are 0."""
    sign = np.int64(1) << (pattern.dtype.itemsize * 8 - 1)
    wide = pattern.astype(np.int64)
    return np.where(wide >= sign, sign - wide, wide)
