"""Arrays of other libraries (CuPy, JAX): their memory as NumPy's or torch's, and back again.

On a CPU they become NumPy arrays, on a CUDA device torch tensors, by DLPack, without a copy. DLPack
also orders streams: what the library did before is done before torch's current stream goes on, and
`hand_over` has the library's wait for torch's.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dtypes import BF16, E4M3, dtype_of
from .errors import DeviceError, ProblemError
from .expr import Bound
from .layouts import GroupLayout, with_tensor

CPU, CUDA = 1, 2  # device types of DLPack
IMMUTABLE = ("jax", "jaxlib")  # packages whose arrays must not be written
_REFUSALS = (AttributeError, BufferError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Loan:
    """A call's arrays, as NumPy's or torch's; `original` is the caller's a, `given` its `out`."""

    original: Any
    given: Any
    a: Any
    b: Any
    scales: tuple[Any, Any]
    bound: Bound
    out: Any
    layout: GroupLayout | None

    def check_output(self, out_dtype: object) -> None:
        """Raise ProblemError unless the library takes a new D of that dtype, before it is made."""
        dtype = dtype_of(BF16 if out_dtype is None else out_dtype)
        if self.out is not None or dtype == E4M3:
            return
        is_numpy = isinstance(self.a, np.ndarray)
        spec = dtype.numpy if is_numpy else getattr(_torch(), dtype.name)
        maker = _maker(self.original, is_numpy)
        if error := _refusal(maker, spec, None if is_numpy else self.a.device):
            raise _refused(self.original, spec, error)

    def give_back(self, made: Any) -> Any:
        """What a call returns that made this D (and its scales); the library waits for it."""
        groups = () if self.layout is None else (self.layout.tensor,)
        keep_until_done(self.a, self.b, *self.scales, *self.bound.tensors.values(), *groups)
        handed_over = self._hand_over(made)
        return handed_over if self.given is None else self.given

    def in_order(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run`, which writes `out`, with its place on the library's stream."""

        def call() -> Any:
            _borrow_output(self.given, self.original)
            self._hand_over(run())
            return self.given

        return call

    def _hand_over(self, made: Any) -> Any:
        if isinstance(made, tuple):
            return tuple(hand_over(d, self.original) for d in made)
        return hand_over(made, self.original)


def borrow_call(
    a: Any,
    b: Any,
    scales: tuple[Any, Any],
    bound: Bound,
    out: Any,
    layout: GroupLayout | None,
) -> Loan:
    """The arrays of a call, all of a's library. Errors as `borrow`."""
    return Loan(
        original=a,
        given=out,
        a=borrow("a", a, a),
        b=borrow("b", b, a),
        scales=(borrow("sfa", scales[0], a), borrow("sfb", scales[1], a)),
        bound=Bound(bound.expr, {name: borrow(name, t, a) for name, t in bound.tensors.items()}),
        out=_borrow_output(out, a),
        layout=_borrow_layout(layout, a),
    )


def _borrow_output(out: Any, like: Any) -> Any:
    if out is None:
        return None
    names = ("d", "sfd")
    if isinstance(out, tuple):
        pairs = zip(names, out, strict=False)
        return tuple(borrow(name, array, like, is_output=True) for name, array in pairs)
    return borrow(names[0], out, like, is_output=True)


def _borrow_layout(layout: GroupLayout | None, like: Any) -> GroupLayout | None:
    return layout and with_tensor(layout, borrow("groups", layout.tensor, like))


def is_foreign(array: object) -> bool:
    """Whether it is an array that speaks DLPack, neither NumPy's nor torch's."""
    torch = sys.modules.get("torch")
    native = (np.ndarray, torch.Tensor) if torch else np.ndarray
    return hasattr(array, "__dlpack__") and not isinstance(array, native)


def borrow(name: str, array: Any, like: Any, *, is_output: bool = False) -> Any:
    """The array's memory as a NumPy array or, on a CUDA device, as a torch tensor.

    Parameters
    ----------
    name : of the array; "a", "b" and "d" may be uint8, the codes of float8_e4m3fn
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
    return _as_codes(native) if name in ("a", "b", "d") else native


def hand_over(native: Any, like: Any) -> Any:
    """A NumPy array or torch tensor as one of `like`'s library: float8 as uint8 if it has none.

    Raises
    ------
    ProblemError : the library takes no array of that dtype
    """
    is_numpy = isinstance(native, np.ndarray)
    wanted = _maker(like, is_numpy)
    if native.itemsize == 1 and _refusal(wanted, native.dtype, None if is_numpy else native.device):
        native = native.view(np.uint8 if is_numpy else _torch().uint8)
    try:
        return wanted(native)
    except _REFUSALS as error:
        raise _refused(like, native.dtype, error) from error


def keep_until_done(*tensors: Any) -> None:
    """Keep borrowed tensors until what was launched on torch's current stream has read them.

    Not every library waits for that stream before it gives memory that was freed to others. The
    last call's tensors are kept up to the next one.
    """
    if isinstance(tensors[0], np.ndarray) or _torch().cuda.is_current_stream_capturing():
        return
    event = _torch().cuda.Event()
    event.record(_torch().cuda.current_stream(tensors[0].device))
    with _mutex:
        while _in_flight and _in_flight[0][0].query():
            _in_flight.popleft()
        _in_flight.append((event, tensors))


_in_flight: deque[tuple[Any, tuple[Any, ...]]] = deque()
_mutex = threading.Lock()


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


def _maker(like: Any, is_numpy: bool) -> Callable[[Any], Any]:
    """What makes an array of `like`'s library of one of NumPy or torch."""
    library = _library(like)
    names = ("asarray", "from_dlpack") if is_numpy else ("from_dlpack",)
    found = (getattr(library, name, None) for name in names)
    maker = next(filter(None, found), None)
    if maker is None:
        raise ProblemError(f"{library.__name__} has no {names[-1]}: convert the arrays yourself")
    return maker  # type: ignore[no-any-return]


@functools.cache
def _refusal(maker: Callable[[Any], Any], dtype: Any, device: Any) -> Exception | None:
    """Why the library takes no array of that dtype; None if it does."""
    is_numpy = isinstance(dtype, np.dtype)
    one = np.zeros(1, dtype) if is_numpy else _torch().zeros(1, dtype=dtype, device=device)
    try:
        maker(one)
    except _REFUSALS as error:
        return error.with_traceback(None)
    return None


def _refused(like: Any, dtype: Any, error: Exception) -> ProblemError:
    return ProblemError(
        f"{_library(like).__name__} takes no {str(dtype).removeprefix('torch.')}: {error}. Ask for"
        " another out_dtype, or give `out`"
    )
