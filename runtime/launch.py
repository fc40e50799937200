"""Launching: argument buffers laid out once, then one driver call a launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DeviceError
from .driver import LoadedKernel, driver
from .tensor_map import TensorMapSpec, encode

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64


@dataclass(frozen=True)
class Pointer:
    """A device address."""

    address: int


@dataclass(frozen=True)
class UInt32:
    """An unsigned 32-bit kernel argument: an extent, or a stride in elements."""

    value: int


Argument = TensorMapSpec | Pointer | UInt32


class Launch:
    """A kernel with its arguments and grid: everything but the stream.

    It never changes, so threads may share it.
    """

    def __init__(
        self, kernel: LoadedKernel, arguments: Sequence[Argument], *, grid: int, num_threads: int
    ) -> None:
        self._kernel = kernel  # keeps the code loaded
        self._storage = [_store(argument) for argument in arguments]
        addresses = [_address(cell) for cell in self._storage]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._call = (
            kernel.function,
            *(grid, 1, 1),
            *(num_threads, 1, 1),
            kernel.smem_bytes,
        )
        self._arguments = ctypes.addressof(self._pointers)
        self._launch = driver().cuLaunchKernel

    def __call__(self, stream: int) -> None:
        """Launch on `stream`, a CUstream handle of the kernel's device.

        The context of that device must be current.

        Raises
        ------
        DeviceError : the driver refuses the launch
        """
        (status,) = self._launch(*self._call, stream, self._arguments, 0)
        if status:
            raise DeviceError(f"the kernel cannot be launched: {status.name}")


def _store(argument: Argument) -> ctypes.Array[ctypes.c_char] | ctypes._SimpleCData[int]:
    match argument:
        case TensorMapSpec():
            buffer = (ctypes.c_char * (TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT))()
            ctypes.memmove(_address(buffer), int(encode(argument).getPtr()), TENSOR_MAP_BYTES)
            return buffer
        case Pointer():
            return ctypes.c_uint64(argument.address)
        case UInt32():
            return ctypes.c_uint32(argument.value)


def _address(cell: ctypes.Array[ctypes.c_char] | ctypes._SimpleCData[int]) -> int:
    address = ctypes.addressof(cell)
    if isinstance(cell, ctypes.Array):
        return -(-address // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
    return address
