"""Arrays of other libraries (CuPy, JAX): their memory as NumPy's or torch's, and back again.

On a CPU they become NumPy arrays, on a CUDA device torch tensors, by DLPack, without a copy. DLPack
also orders streams: what the library did before is done before torch's current stream goes on, and
`hand_over` has the library's wait for torch's.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import E4M3, DType
from .errors import DeviceError, ProblemError

if TYPE_CHECKING:
    pass

CPU, CUDA = 1, 2  # device types of DLPack
IMMUTABLE = ("jax", "jaxlib")  # packages whose arrays must not be written
_REFUSALS = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)


def is_foreign(array: object) -> bool:
    """Whether it is an array that speaks DLPack, neither NumPy's nor torch's."""
    torch = sys.modules.get("torch")
    native = (np.ndarray, torch.Tensor) if torch else np.ndarray
    return hasattr(array, "__dlpack__") and not isinstance(array, native)


def borrow(name: str, array: Any, like: Any, *, is_output: bool = False) -> Any:
    """The array's memory as a NumPy array or, on a CUDA device, as a torch tensor.

    Parameters
    ----------
    name : of the array, for errors; "a" and "b" may be uint8, the codes of float8_e4m3fn
    like : an array of the library that this one must be of
    is_output : it will be written

    Raises
    ------
    ProblemError : it is of another library or dtype than can be read, or cannot be written
    DeviceError : it is neither on the CPU nor on a CUDA device, or torch is missing
    """
    if not is_foreign(array) or _library(array) is not _library(like):
        raise ProblemError(
            f"{name} is a {type(array).__name__}, a is a {type(like).__name__}: give arrays of one"
            " library only"
        )
    if is_output and _package(array) in IMMUTABLE:
        raise ProblemError(
            f"{name} is a {type(array).__name__}, which cannot be written: take what `gemm` returns"
        )
    try:
        device = array.__dlpack_device__()[0]
        native = _reader(device, is_output=is_output)(array)
    except DeviceError:
        raise
    except _REFUSALS as error:
        raise ProblemError(
            f"{name} is a {type(array).__name__} that cannot be read by DLPack: {error}. Where the"
            " library has no float8, give its codes as uint8"
        ) from error
    if is_output and device == CPU and not native.flags.writeable:
        raise ProblemError(f"{name} is a {type(array).__name__}, which is read-only")
    return _as_codes(native) if name in ("a", "b") else native


def hand_over(native: Any, like: Any) -> Any:
    """A NumPy array or torch tensor as one of `like`'s library: float8 as uint8 if it has none.

    Raises
    ------
    ProblemError : the library takes no array of that dtype
    """
    wanted = _maker(like, native)
    if native.itemsize == 1 and _refusal(wanted, native.dtype, getattr(native, "device", None)):
        native = native.view(np.uint8 if isinstance(native, np.ndarray) else _torch().uint8)
    try:
        return wanted(native)
    except _REFUSALS as error:
        raise _refused(like, native.dtype, error) from error


def check_hand_over(dtype: DType, native: Any, like: Any) -> None:
    """Raise ProblemError unless `like`'s library takes arrays of `dtype` from where `native` is."""
    wanted = _maker(like, native)
    spec = dtype.numpy if isinstance(native, np.ndarray) else getattr(_torch(), dtype.name)
    if error := _refusal(wanted, spec, getattr(native, "device", None)):
        raise _refused(like, spec, error) from error


def keep_until_done(*tensors: Any) -> None:
    """Keep borrowed tensors until what was launched on torch's current stream has read them.

    Not every library waits for that stream before it gives memory that was freed to others. The
    last call's tensors are kept up to the next one.
    """
    if isinstance(tensors[0], np.ndarray) or _torch().cuda.is_current_stream_capturing():
        return
    while _in_flight and _in_flight[0][0].query():
        _in_flight.popleft()
    event = _torch().cuda.Event()
    event.record(_torch().cuda.current_stream(tensors[0].device))
    _in_flight.append((event, tensors))


_in_flight: deque[tuple[Any, tuple[Any, ...]]] = deque()


def _reader(device: int, *, is_output: bool) -> Callable[[Any], Any]:
    if device == CUDA:
        return _torch().from_dlpack  # type: ignore[no-any-return]
    if device != CPU:
        raise DeviceError(f"arrays must be on the CPU or a CUDA device, not on {device} of DLPack")
    # NumPy reads bfloat16 and float8 of JAX by its own protocol only, which may make a copy.
    return np.from_dlpack if is_output else _asarray


def _asarray(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)


def _as_codes(native: Any) -> Any:
    """uint8 as float8_e4m3fn; anything else as it is, for the rules to judge."""
    if isinstance(native, np.ndarray):
        return native.view(E4M3.numpy) if native.dtype == np.uint8 else native
    torch = _torch()
    return native.view(torch.float8_e4m3fn) if native.dtype == torch.uint8 else native


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise DeviceError("arrays on a GPU need torch: pip install 'jitgen[torch]'") from None
    return torch


def _package(array: object) -> str:
    return type(array).__module__.partition(".")[0]


def _library(array: Any) -> Any:
    """The module with the functions that make the library's arrays."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[_package(array)]


def _maker(like: Any, native: Any) -> Callable[[Any], Any]:
    """What makes an array of `like`'s library of this one."""
    library = _library(like)
    names = ("asarray", "from_dlpack") if isinstance(native, np.ndarray) else ("from_dlpack",)
    found = (getattr(library, name, None) for name in names)
    maker = next(filter(None, found), None)
    if maker is None:
        raise ProblemError(f"{library.__name__} has no {names[-1]}: convert the arrays yourself")
    return maker  # type: ignore[no-any-return]


@functools.cache
def _refusal(maker: Callable[[Any], Any], dtype: Any, device: Any) -> Exception | None:
    """Why the library takes no array of that dtype; None if it does."""
    numpy = isinstance(dtype, np.dtype)
    one = np.zeros(1, dtype) if numpy else _torch().zeros(1, dtype=dtype, device=device)
    try:
        maker(one)
    except _REFUSALS as error:
        return error
    return None


def _refused(like: Any, dtype: Any, error: Exception) -> ProblemError:
    return ProblemError(
        f"{_library(like).__name__} takes no {str(dtype).removeprefix('torch.')}: {error}. Ask for"
        " another out_dtype, or give `out`"
    )
