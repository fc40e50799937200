"""The CUDA driver: devices, their contexts, and loaded kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ..errors import DeviceError
from ..target import SM90A, Gpu, Target


@dataclass(frozen=True)
class Device:
    """One GPU as the driver sees it."""

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    num_sms: int

    @property
    def gpu(self) -> Gpu:
        """What schedules are chosen for."""
        return Gpu(self.name, self.num_sms)


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that is ready to launch on one device; `library` keeps its code loaded."""

    function: Any
    library: Any
    smem_bytes: int
    ordinal: int


def driver() -> Any:
    """The initialized bindings of the CUDA driver.

    Raises
    ------
    DeviceError : there is no driver, or no GPU that it can use
    """
    return _driver()


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver as bindings

        (status,) = bindings.cuInit(0)
    except (ImportError, RuntimeError) as error:
        raise DeviceError(
            f"no CUDA driver can be loaded ({error}); `jitgen doctor` tells more"
        ) from error
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise DeviceError(
            f"the CUDA driver finds no usable GPU ({status.name}); `jitgen doctor` tells more"
        )
    return bindings


def check(result: tuple[Any, ...]) -> Any:
    """What a driver call returned beside its status; DeviceError if it failed."""
    status, *values = result
    if int(status) != 0:
        raise DeviceError(f"the CUDA driver failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def device(ordinal: int) -> Device:
    """The GPU with this ordinal.

    Raises
    ------
    DeviceError : no driver, or no such GPU
    """
    api = driver()
    count = check(api.cuDeviceGetCount())
    if not 0 <= ordinal < count:
        raise DeviceError(f"there is no GPU {ordinal}: the driver finds {count}")
    handle = check(api.cuDeviceGet(ordinal))
    attributes = api.CUdevice_attribute

    def get(attribute: Any) -> int:
        return int(check(api.cuDeviceGetAttribute(attribute, handle)))

    return Device(
        ordinal=ordinal,
        name=check(api.cuDeviceGetName(256, handle)).split(b"\0")[0].decode(),
        compute_capability=(
            get(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            get(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        ),
        num_sms=get(attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
    )


def num_devices() -> int:
    """GPUs that the driver finds; 0 without a driver."""
    try:
        return int(check(driver().cuDeviceGetCount()))
    except DeviceError:
        return 0


def driver_version() -> str:
    """The newest CUDA version that the driver runs, such as "13.0"."""
    version = int(check(driver().cuDriverGetVersion()))
    return f"{version // 1000}.{version % 1000 // 10}"


def check_architecture(found: Device, target: Target = SM90A) -> None:
    """Raise DeviceError unless kernels of `target` run on the device."""
    if found.compute_capability != target.compute_capability:
        major, minor = found.compute_capability
        raise DeviceError(
            f"{found.name} (cuda:{found.ordinal}) is sm_{major}{minor}, jitgen's kernels need"
            f" {target.arch} (H100, H200, H800)"
        )


def load(cubin: bytes, name: str, *, smem_bytes: int, ordinal: int) -> LoadedKernel:
    """Kernel `name` of a cubin, ready to launch on one GPU.

    Parameters
    ----------
    cubin : machine code for the GPU's architecture
    name : the kernel's `extern "C"` name
    smem_bytes : dynamic shared memory of a launch
    ordinal : of the GPU

    Raises
    ------
    DeviceError : the driver refuses the cubin, or it holds no such kernel
    """
    api = driver()
    library = check(api.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
    kernel = check(api.cuLibraryGetKernel(library, name.encode()))
    attribute = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(api.cuKernelSetAttribute(attribute, smem_bytes, kernel, check(api.cuDeviceGet(ordinal))))
    return LoadedKernel(api.CUfunction(int(kernel)), library, smem_bytes, ordinal)


def make_current(ordinal: int) -> None:
    """Make a GPU's primary context, which torch and the CUDA runtime use, this thread's.

    Raises
    ------
    DeviceError : the driver refuses
    """
    check(driver().cuCtxSetCurrent(_primary_context(ordinal)))


def ensure_current(ordinal: int) -> None:
    """Make a GPU's primary context current if the thread has none: it has not used CUDA yet.

    Raises
    ------
    DeviceError : the driver refuses
    """
    if not int(check(driver().cuCtxGetCurrent())):
        make_current(ordinal)


@functools.cache
def _primary_context(ordinal: int) -> Any:
    api = driver()
    return check(api.cuDevicePrimaryCtxRetain(check(api.cuDeviceGet(ordinal))))
