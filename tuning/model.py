"""The cost model: predicts a kernel's time from its schedule, so that a schedule can be chosen without measuring."""

from __future__ import annotations

import functools
from dataclasses import replace

from ..expr import acc
from ..ir import Traversal
from ..problem import Gemm
from ..schedule import BLOCK_K, WGMMA_M, Schedule, part_columns
from ..target import SM90A, Target
from .space import candidates

CLOCK_GHZ = 1.65
HBM_BYTES_PER_US = 2.7e6
FIXED_US = 2.5
SMEM_BYTES_PER_CLOCK = 128
L2_BYTES_PER_CLOCK = 45.0
LATENCY_CLOCKS = 1600.0
BLOCK_CLOCKS = 90.0
SERIAL_CLOCKS = 130.0
CHAIN_CLOCKS = 230.0
EPILOGUE_CLOCKS = 600.0


def predict_us(problem: Gemm, schedule: Schedule, m: int, num_sms: int = SM90A.num_sms) -> float:
    """Predicted kernel time in microseconds."""
    s = schedule
    rows, columns = Traversal(s.block_m, s.block_n, s.cluster_m, s.cluster_n, 1).grid(m, problem.n)
    rounds = -(-rows * columns // (num_sms // s.cluster_size))
    k_blocks = -(-problem.k // BLOCK_K)
    part = part_columns(problem, s) or s.block_n
    waves = s.block_m // WGMMA_M
    tensor = waves * s.block_n * 2.0  # 64 x n x 128 multiply-adds at 4096 a clock
    smem = waves * (s.block_n // part * WGMMA_M + s.block_n) + s.block_m + s.block_n  # in rows of 128 bytes
    promote = waves / s.num_math_warpgroups * s.block_n / 2 * 1.1
    if s.promotion == "serial":
        alone = s.num_math_warpgroups == 1
        math = max(tensor, CHAIN_CLOCKS / 2) + (promote + SERIAL_CLOCKS) * (1.0 if alone else 0.35)
    else:
        math = max(tensor, CHAIN_CLOCKS, promote)
    load = (s.block_m / s.cluster_n + s.block_n / s.cluster_m) * BLOCK_K / L2_BYTES_PER_CLOCK
    latency = LATENCY_CLOCKS / s.num_stages
    block = max(math, smem * 1.05, load, latency) + BLOCK_CLOCKS
    clocks = rounds * (k_blocks * block + EPILOGUE_CLOCKS + s.block_m * s.block_n / 40)
    traffic = problem.n * problem.k + m * problem.k + m * problem.n * problem.d_dtype.size_bytes
    return FIXED_US + max(clocks / CLOCK_GHZ / 1e3, traffic / HBM_BYTES_PER_US)


def choose(problem: Gemm, m: int, num_sms: int = SM90A.num_sms, target: Target = SM90A) -> Schedule:
    """The schedule with the least predicted time for `m` rows; one for all m of a bucket."""
    return _choose(replace(problem, epilogue=acc), m_bucket(m), num_sms, target)


def m_bucket(m: int) -> int:
    """The least extent at or above m among 64 * (2, 3) * 2^i: what a schedule is chosen for."""
    bucket = 64
    while bucket < min(m, 65536):
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


@functools.lru_cache(maxsize=4096)
def _choose(problem: Gemm, m: int, num_sms: int, target: Target) -> Schedule:
    return min(candidates(problem, target), key=lambda schedule: predict_us(problem, schedule, m, num_sms))
