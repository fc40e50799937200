"""A GPU that the interpreter plays: kernels run when they are launched, on the host's memory."""

from __future__ import annotations

import ctypes
import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from jitgen import calls
from jitgen.interpret import interpret
from jitgen.kernel import (
    ExtentParameter,
    Kernel,
    PointerParameter,
    StrideParameter,
    TensorMapParameter,
)
from jitgen.lower import lower
from jitgen.problem import Gemm, is_k_grouped
from jitgen.runtime import driver
from jitgen.runtime.driver import Device, LoadedKernel
from jitgen.schedule import Schedule

H100 = Device(0, "NVIDIA H100 80GB HBM3", (9, 0), 132)
# Of a fake TMA descriptor: address, element bytes, rows, columns, pitch; matrices and theirs, or 0.
WORDS = 7


class Result(enum.IntEnum):
    """The part of CUresult that the fake gives."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201


class TensorMap:
    """A descriptor in memory of its own, or in memory that is given."""

    def __init__(self, address: int = 0) -> None:
        self._own = (ctypes.c_uint64 * 16)()
        self._address = address or ctypes.addressof(self._own)
        self.words = (ctypes.c_uint64 * WORDS).from_address(self._address)

    def getPtr(self) -> int:
        return self._address


class _Names:
    """An enumeration whose members are their names."""

    def __getattr__(self, name: str) -> str:
        return name


@dataclass(frozen=True)
class Launched:
    """One launch, and the tensors that the kernel found, by name."""

    kernel: Kernel
    grid: int
    num_threads: int
    smem_bytes: int
    stream: int
    tensors: dict[str, NDArray[Any]]
    thread: int


class FakeDriver:
    """What jitgen uses of `cuda.bindings.driver` for launches."""

    CUresult = Result
    CUtensorMap = TensorMap
    CUtensorMapDataType = CUtensorMapSwizzle = CUtensorMapInterleave = _Names()
    CUtensorMapL2promotion = CUtensorMapFloatOOBfill = _Names()
    cuuint32_t = cuuint64_t = CUstream = int
    CUlaunchConfig = CUlaunchAttribute = CUlaunchAttributeValue = SimpleNamespace
    CUlaunchAttributeID = _Names()

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.num_encoded = 0
        self.num_replaced = 0
        self.num_dependent = 0
        self.refusals: list[Result] = []  # what the next launches fail with
        self.current: list[object] = []  # contexts that were made current
        self.context = 1  # of the thread at hand; 0 is none
        self.on_launch: Callable[[], object] = lambda: None  # while arguments must not change

    def cuTensorMapEncodeTiled(
        self, data_type: str, rank: int, address: int, extents: Any, strides: Any, *_: object
    ) -> tuple[Result, TensorMap]:
        self.num_encoded += 1
        if not self.context:
            return Result.CUDA_ERROR_INVALID_CONTEXT, TensorMap()
        size = {"UINT8": 1, "BFLOAT16": 2, "FLOAT32": 4}[data_type.rpartition("_")[2]]
        made = TensorMap()
        apart = (extents[2], strides[1]) if rank == 3 else (0, 0)
        made.words[:] = (address, size, extents[1], extents[0], strides[0], *apart)
        return _aligned(address), made

    def cuTensorMapReplaceAddress(self, tensor_map: TensorMap, address: int) -> tuple[Result]:
        self.num_replaced += 1
        if not self.context:
            return (Result.CUDA_ERROR_INVALID_CONTEXT,)
        tensor_map.words[0] = address
        return (_aligned(address),)

    def cuDeviceGet(self, ordinal: int) -> tuple[Result, str]:
        return Result.CUDA_SUCCESS, f"device {ordinal}"

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Result, str]:
        return Result.CUDA_SUCCESS, f"context of {device}"

    def cuCtxGetCurrent(self) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, self.context

    def cuCtxSetCurrent(self, context: object) -> tuple[Result]:
        self.current.append(context)
        self.context = 1
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernelEx(
        self, config: Any, kernel: Kernel, arguments: int, extra: int
    ) -> tuple[Result]:
        (attribute,) = config.attrs
        assert config.numAttrs == 1
        assert attribute.id == "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
        assert attribute.value.programmaticStreamSerializationAllowed == 1
        self.num_dependent += 1
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        block = config.blockDimX, config.blockDimY, config.blockDimZ
        call = *grid, *block, config.sharedMemBytes, config.hStream, arguments, extra
        return self.cuLaunchKernel(kernel, *call)

    def cuLaunchKernel(self, kernel: Kernel, *call: Any) -> tuple[Result]:
        grid, _, _, num_threads, _, _, smem_bytes, stream, arguments, _ = call
        if self.refusals:
            return (self.refusals.pop(0),)
        tensors = _read(kernel, arguments)
        self.on_launch()
        again = _read(kernel, arguments)
        assert all(tensors[name].ctypes.data == again[name].ctypes.data for name in tensors)
        inputs = {name: tensor for name, tensor in tensors.items() if name != "d"}
        if is_k_grouped(kernel.problem):
            interpret(kernel, inputs, out=tensors["d"])
        else:
            tensors["d"][...] = interpret(kernel, inputs)
        thread = threading.get_ident()
        launched = Launched(kernel, grid, num_threads, smem_bytes, stream, tensors, thread)
        self.launches.append(launched)
        return (Result.CUDA_SUCCESS,)


def _aligned(address: int) -> Result:
    return Result.CUDA_ERROR_INVALID_VALUE if address % 16 else Result.CUDA_SUCCESS


def _read(kernel: Kernel, arguments: int) -> dict[str, NDArray[Any]]:
    """The tensors that a kernel finds with these arguments."""
    pointers = (ctypes.c_void_p * len(kernel.parameters)).from_address(arguments)
    values = dict(zip(kernel.parameters, pointers, strict=True))

    def uint32(parameter: Any) -> int:
        return ctypes.c_uint32.from_address(values[parameter] or 0).value

    extents = {p.name: uint32(p) for p in values if isinstance(p, ExtentParameter)}
    tensors: dict[str, NDArray[Any]] = {}
    for parameter, cell in values.items():
        if isinstance(parameter, TensorMapParameter):
            address, size, rows, columns, pitch, matrices, apart = TensorMap(cell or 0).words
            shape, strides = (rows, columns), [pitch, size]
            if matrices:
                shape, strides = (matrices, rows, columns), [apart, pitch, size]
            assert size == parameter.tensor.dtype.size_bytes
        elif isinstance(parameter, PointerParameter):
            address = ctypes.c_uint64.from_address(cell or 0).value
            size = parameter.tensor.dtype.size_bytes
            dims = parameter.tensor.dims
            shape = tuple(dim.num_elements or -(-extents[dim.axis] // dim.block) for dim in dims)
            strides = [size * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
            for p in values:
                if isinstance(p, StrideParameter) and p.tensor == parameter.tensor:
                    strides[p.dim] = size * uint32(p)
        else:
            continue
        num_bytes = size + sum(s * (e - 1) for s, e in zip(strides, shape, strict=True))
        memory = (ctypes.c_ubyte * num_bytes).from_address(address)
        dtype = parameter.tensor.dtype.numpy
        tensors[parameter.tensor.name] = np.ndarray(shape, dtype, memory, strides=tuple(strides))
    return tensors


@dataclass
class FakeGpu:
    """What the fake did, and torch's current device and stream, which a test may change."""

    driver: FakeDriver
    current_device: int | None = None  # the index that CPU tensors, which play CUDA's, have
    stream: int = 7
    is_capturing: bool = False

    @property
    def launches(self) -> list[Launched]:
        return self.driver.launches


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Let torch's CPU tensors run on a fake H100."""
    import torch

    gpu = FakeGpu(FakeDriver())

    def load(problem: Gemm, schedule: Schedule, ordinal: int) -> tuple[Kernel, LoadedKernel]:
        kernel = lower(problem, schedule)
        return kernel, LoadedKernel(kernel, None, kernel.smem.total_bytes, ordinal)

    monkeypatch.setattr(driver, "_driver", lambda: gpu.driver)
    monkeypatch.setattr(driver, "_primary_context", driver._primary_context.__wrapped__)
    monkeypatch.setattr(driver, "device", lambda ordinal: H100)
    monkeypatch.setattr(calls, "check_device", lambda arrays, device: None)
    monkeypatch.setattr(calls, "_load", load)
    monkeypatch.setattr(calls, "_calls", calls.Prepared())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.is_capturing)
    for name, function in (
        ("_cuda_getDevice", lambda: gpu.current_device),
        ("_cuda_getCurrentRawStream", lambda index: gpu.stream),
    ):
        monkeypatch.setattr(torch._C, name, function, raising=False)
    return gpu
