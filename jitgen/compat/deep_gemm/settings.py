"""deep_gemm's settings of the process; those that only guide its choices change nothing here."""

from __future__ import annotations

import torch

from ... import control

_tc_util = 100


def set_num_sms(new_num_sms: int) -> None:
    """`jitgen.configure(num_sms=...)`: how many SMs a GEMM takes at most, 1 .. those of the GPU."""
    if not 0 < new_num_sms <= _all_sms():
        raise ValueError(f"set_num_sms({new_num_sms}): the GPU has {_all_sms()} SMs")
    control.configure(num_sms=new_num_sms)


def get_num_sms() -> int:
    """What `set_num_sms` was given; all of the current GPU's at first."""
    return control.num_sms_limit or _all_sms()


def _all_sms() -> int:
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
