"""TMA descriptors: a matrix in global memory, and the box that one copy moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import DeviceError
from .driver import check, driver, make_current


@dataclass(frozen=True)
class TensorMapSpec:
    """A row-major matrix, and the box [rows, columns] of it that one TMA instruction moves.

    With `num_matrices` > 0 as many of them, `matrix_bytes` apart, of which a third coordinate
    chooses one.

    What lies outside the matrix is read as zero and never written. The rules of the hardware (CUDA
    driver API, cuTensorMapEncodeTiled): address and row pitch multiples of 16 bytes, box extents at
    most 256, a box row at most `swizzle_bytes`.
    """

    element_bytes: int
    rows: int
    columns: int
    pitch_bytes: int
    box_rows: int
    box_columns: int
    swizzle_bytes: int
    num_matrices: int = 0
    matrix_bytes: int = 0


def encode(spec: TensorMapSpec, address: int) -> Any:
    """The descriptor of a matrix at `address`, as the driver's 128-byte CUtensorMap.

    Raises
    ------
    DeviceError : the driver refuses the matrix or the box
    """
    api = driver()
    types, swizzles = api.CUtensorMapDataType, api.CUtensorMapSwizzle
    data_type = {
        1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        4: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }[spec.element_bytes]
    swizzle = {
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[spec.swizzle_bytes]

    def words(*values: int) -> list[Any]:
        return [api.cuuint32_t(value) for value in values]

    apart = [1] if spec.num_matrices else []
    extents = (spec.columns, spec.rows, spec.num_matrices)[: 2 + len(apart)]
    strides = (spec.pitch_bytes, spec.matrix_bytes)[: 1 + len(apart)]
    return check(
        api.cuTensorMapEncodeTiled(
            data_type,
            len(extents),
            address,
            [api.cuuint64_t(extent) for extent in extents],
            [api.cuuint64_t(stride) for stride in strides],
            words(spec.box_columns, spec.box_rows, *apart),
            words(1, 1, *apart),
            api.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            api.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            api.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def replace_address(descriptor: Any, ordinal: int, address: int) -> None:
    """Make a CUtensorMap describe a matrix like the one before, at another address of a GPU.

    Raises
    ------
    DeviceError : the driver refuses the address
    """
    (status,) = driver().cuTensorMapReplaceAddress(descriptor, address)
    if status and status == driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:
        make_current(ordinal)  # the thread's first use of CUDA
        (status,) = driver().cuTensorMapReplaceAddress(descriptor, address)
    if status:
        raise DeviceError(f"a tensor at {address:#x} cannot be described for TMA: {status.name}")
