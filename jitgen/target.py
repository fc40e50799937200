"""What the hardware allows: limits that legality rules and the cost model read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Limits of one GPU architecture.

    The sm_90a figures are those of the CUDA C++ Programming Guide, table of compute capability 9.0.
    """

    arch: str
    compute_capability: tuple[int, int]
    smem_per_block_bytes: int
    registers_per_sm: int
    max_registers_per_thread: int
    num_sms: int


@dataclass(frozen=True)
class Gpu:
    """One GPU model, or a slice of one: what a choice of schedule depends on.

    name : as the driver gives it
    num_sms : streaming multiprocessors that a kernel can use
    """

    name: str
    num_sms: int


SM90A = Target(
    arch="sm_90a",
    compute_capability=(9, 0),
    smem_per_block_bytes=232_448,  # 227 KiB, opt-in maximum
    registers_per_sm=65_536,
    max_registers_per_thread=255,
    num_sms=132,  # H100 SXM, H200, H800
)

H100 = Gpu("NVIDIA H100 80GB HBM3", SM90A.num_sms)  # the SXM module
