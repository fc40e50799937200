"""Launching: arguments laid out once, addresses written if they change, one driver call."""

from __future__ import annotations

import ctypes
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DeviceError
from .driver import LoadedKernel, driver, ensure_current, make_current
from .tensor_map import TensorMapSpec, encode, replace_address

TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT = 64
MAX_IDLE_LAUNCHES = 4  # of a pool, about 5 KB each; beyond, addresses are rewritten


@dataclass(frozen=True)
class TensorMap:
    """The TMA descriptor of a call's `tensor`-th tensor."""

    tensor: int
    spec: TensorMapSpec


@dataclass(frozen=True)
class Pointer:
    """The device address of a call's `tensor`-th tensor."""

    tensor: int


@dataclass(frozen=True)
class UInt32:
    """An unsigned 32-bit kernel argument: an extent, or a stride in elements."""

    value: int


Argument = TensorMap | Pointer | UInt32


class Launch:
    """A kernel with its grid and its arguments for tensors at `addresses`: all but the stream.

    If it `is_cooperative`, its blocks run all at once, and may wait for each other.
    Threads may share it as long as none moves it.
    """

    def __init__(
        self,
        kernel: LoadedKernel,
        arguments: Sequence[Argument],
        addresses: tuple[int, ...],
        *,
        grid: int,
        num_threads: int,
        is_cooperative: bool = False,
    ) -> None:
        self.addresses = addresses
        self._kernel = kernel  # keeps the code loaded
        ensure_current(kernel.ordinal)  # TMA descriptors are encoded in a context
        self._storage = [_store(argument, addresses) for argument in arguments]
        self._writers = [
            (argument.tensor, _writer(argument, cell, kernel.ordinal))
            for argument, cell in zip(arguments, self._storage, strict=True)
            if not isinstance(argument, UInt32)
        ]
        cells = [_address(cell) for cell in self._storage]
        self._pointers = (ctypes.c_void_p * len(cells))(*cells)
        self._call = (
            kernel.function,
            *(grid, 1, 1),
            *(num_threads, 1, 1),
            kernel.smem_bytes,
        )
        self._arguments = ctypes.addressof(self._pointers)
        # A cooperative launch takes no extra options, and its kernel does not wait by itself for
        # the one before it: it must not begin while that runs.
        self._options = () if is_cooperative else (0,)
        self._may_depend = not is_cooperative
        api = driver()
        self._launch = api.cuLaunchCooperativeKernel if is_cooperative else api.cuLaunchKernel

    def __call__(self, stream: int, *, pdl: bool = False) -> None:
        """Launch on `stream`, a CUstream handle of the kernel's device.

        With `pdl` under programmatic dependent launch, unless it is cooperative: the kernel may be
        set up while the one before it on the stream ends. No context of another device may be
        current.

        Raises
        ------
        DeviceError : the driver refuses the launch
        """
        pdl = pdl and self._may_depend
        if pdl:
            status = self._enqueue_dependent(stream)
        else:
            (status,) = self._launch(*self._call, stream, self._arguments, *self._options)
        if status and status == driver().CUresult.CUDA_ERROR_INVALID_CONTEXT:
            make_current(self._kernel.ordinal)  # the thread's first use of CUDA
            if pdl:
                status = self._enqueue_dependent(stream)
            else:
                (status,) = self._launch(*self._call, stream, self._arguments, *self._options)
        if status:
            raise DeviceError(f"the kernel cannot be launched: {status.name}")

    def _enqueue_dependent(self, stream: int) -> Any:
        api, (function, *extents, smem_bytes) = driver(), self._call
        allowed = api.CUlaunchAttributeValue()
        allowed.programmaticStreamSerializationAllowed = 1
        attribute = api.CUlaunchAttribute()
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = allowed
        config = api.CUlaunchConfig()  # a new one: threads may share the launch, not its stream
        config.gridDimX, config.gridDimY, config.gridDimZ = extents[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = extents[3:]
        config.sharedMemBytes, config.hStream = smem_bytes, api.CUstream(stream)
        config.attrs, config.numAttrs = [attribute], 1
        (status,) = api.cuLaunchKernelEx(config, function, self._arguments, 0)
        return status

    def move(self, addresses: tuple[int, ...]) -> None:
        """Point the arguments at tensors like those before, elsewhere.

        Earlier launches keep their arguments: the driver has copied them.

        Raises
        ------
        DeviceError : the driver refuses an address; the launch must not be used any more
        """
        for tensor, write in self._writers:
            if addresses[tensor] != self.addresses[tensor]:
                write(addresses[tensor])
        self.addresses = addresses


class LaunchPool:
    """Launches of one kernel that differ in their addresses only; safe in threads.

    A launch is taken by one thread at a time.
    """

    def __init__(
        self,
        kernel: LoadedKernel,
        arguments: Sequence[Argument],
        *,
        grid: int,
        num_threads: int,
        is_cooperative: bool = False,
    ) -> None:
        self._make = functools.partial(
            Launch,
            kernel,
            arguments,
            grid=grid,
            num_threads=num_threads,
            is_cooperative=is_cooperative,
        )
        self._idle: OrderedDict[tuple[int, ...], Launch] = OrderedDict()  # the oldest first

    def make(self, addresses: tuple[int, ...]) -> Launch:
        """A launch that stays the caller's."""
        return self._make(addresses)

    def take(self, addresses: tuple[int, ...]) -> Launch:
        """A launch with these addresses, for `give_back` after use.

        Raises
        ------
        DeviceError : the driver refuses an address
        """
        launch = self._idle.pop(addresses, None)
        if launch is not None:
            return launch
        if len(self._idle) < MAX_IDLE_LAUNCHES:
            return self._make(addresses)
        try:
            launch = self._idle.popitem(last=False)[1]
        except KeyError:  # other threads have taken them all
            return self._make(addresses)
        launch.move(addresses)
        return launch

    def give_back(self, launch: Launch) -> None:
        self._idle[launch.addresses] = launch


_Cell = ctypes.Array[ctypes.c_char] | ctypes.c_uint64 | ctypes.c_uint32


def _store(argument: Argument, addresses: Sequence[int]) -> _Cell:
    match argument:
        case TensorMap():
            buffer = (ctypes.c_char * (TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT))()
            descriptor = encode(argument.spec, addresses[argument.tensor])
            ctypes.memmove(_address(buffer), int(descriptor.getPtr()), TENSOR_MAP_BYTES)
            return buffer
        case Pointer():
            return ctypes.c_uint64(addresses[argument.tensor])
        case UInt32():
            return ctypes.c_uint32(argument.value)


def _writer(argument: TensorMap | Pointer, cell: _Cell, ordinal: int) -> Callable[[int], None]:
    """What puts another address into a stored argument."""
    if isinstance(argument, TensorMap):
        return functools.partial(replace_address, driver().CUtensorMap(_address(cell)), ordinal)
    return functools.partial(setattr, cell, "value")


def _address(cell: _Cell) -> int:
    address = ctypes.addressof(cell)
    if isinstance(cell, ctypes.Array):
        return -(-address // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
    return address
