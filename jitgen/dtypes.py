"""Element types, with their NumPy and CUDA names."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import ProblemError


@dataclass(frozen=True)
class DType:
    """One element type; `name` is the spelling that NumPy (ml_dtypes) and torch share."""

    name: str
    short: str
    size_bytes: int
    cuda: str

    def __str__(self) -> str:
        return self.short

    @property
    def numpy(self) -> np.dtype:
        """The NumPy dtype (ml_dtypes for E4M3 and BF16)."""
        return np.dtype(getattr(ml_dtypes, self.name, self.name))


E4M3 = DType("float8_e4m3fn", "e4m3", 1, "fp8_e4m3")
BF16 = DType("bfloat16", "bf16", 2, "bf16")
F16 = DType("float16", "f16", 2, "fp16")
F32 = DType("float32", "f32", 4, "float")
I32 = DType("int32", "i32", 4, "int")  # of counts and positions; no problem computes in it

ALL = (E4M3, BF16, F16, F32)


def dtype_of(spec: object) -> DType:
    """The DType named by `spec`: a DType, a NumPy or torch dtype, or a name such as "bf16".

    Raises
    ------
    ProblemError : no element type of jitgen has that name
    """
    if isinstance(spec, DType):
        return spec
    name = _name(spec)
    for dtype in ALL:
        if name in (dtype.name, dtype.short):
            return dtype
    raise ProblemError(
        f"dtype {spec} is not supported: use one of {', '.join(d.name for d in ALL)}"
    )


def array_dtype(spec: object, size_bytes: int) -> DType:
    """The DType of an array, which may be one that no problem of jitgen takes."""
    name = _name(spec)
    known = (dtype for dtype in (*ALL, I32) if dtype.name == name)
    return next(known, DType(name, name, size_bytes, cuda=""))


def _name(spec: object) -> str:
    """The name that NumPy and torch share: `float32` of np.float32 and of torch.float32."""
    if isinstance(spec, str):
        return spec
    try:
        return np.dtype(spec).name  # type: ignore[call-overload, no-any-return]
    except TypeError:
        return str(spec).removeprefix("torch.")
