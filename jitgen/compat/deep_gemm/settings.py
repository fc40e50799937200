"""deep_gemm's settings of the process; those that only guide its choices change nothing here."""

from __future__ import annotations

import torch

from ... import control

_tc_util = 100


def set_num_sms(new_num_sms: int) -> None:
    """All of the GPU's, or NotImplementedError."""
    if new_num_sms != get_num_sms():
        raise NotImplementedError(
            f"set_num_sms({new_num_sms}): kernels of jitgen use all {get_num_sms()} SMs"
        )


def get_num_sms() -> int:
    """Of the current GPU."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(gpu.multi_processor_count)


def set_pdl(new_enable_pdl: bool) -> None:
    """`jitgen.configure(pdl=...)`."""
    control.configure(pdl=new_enable_pdl)


def get_pdl() -> bool:
    """Whether kernels are launched under programmatic dependent launch."""
    return control.pdl_enabled


def set_tc_util(new_tc_util: int) -> None:
    """Kept for `get_tc_util`: the percentage guides DeepGEMM's choice of a block size."""
    global _tc_util
    _tc_util = new_tc_util


def get_tc_util() -> int:
    """What `set_tc_util` was given; 100 at first."""
    return _tc_util


def set_ignore_compile_dims(new_value: bool) -> None:
    """Nothing: n and k are compiled in, m never is."""


def set_block_size_multiple_of(new_value: int | tuple[int, int]) -> None:
    """NotImplementedError, unless it is 1: pin a schedule with `jitgen.gemm(schedule=...)`."""
    if new_value not in (1, (1, 1)):
        raise NotImplementedError(
            f"set_block_size_multiple_of({new_value}): pin a schedule with jitgen.gemm(schedule=..)"
        )
