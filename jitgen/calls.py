"""GEMM calls on torch tensors: checked and prepared once a signature, then launched anywhere.

A signature is all that the rules look at and the kernel is chosen by. What remains are addresses,
which may differ at every call, and the current stream.
"""

from __future__ import annotations

import functools
import operator
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from . import control
from .arrays import (
    ADDRESS_UNIT,
    ArrayView,
    check_gemm,
    name_arrays,
    output_scale_shape,
    output_shape,
)
from .dtypes import F32, array_dtype, dtype_of
from .errors import CaptureError, DeviceError
from .expr import Bound
from .groups import expected_rows
from .layouts import GroupLayout
from .merge import MergeSchedule, MergeStates
from .problem import Gemm, adds_to_d
from .problem_mla import MlaDecode
from .quantization import Quantization, QuantizationSchedule
from .runtime import driver
from .runtime.launch import Argument, Launch, LaunchPool, Pointer, TensorMap, UInt32
from .runtime.stats import log
from .runtime.tensor_map import TensorMapSpec
from .schedule import Schedule
from .schedule_mla import MlaSchedule
from .tuning.select import select

if TYPE_CHECKING:
    import torch

    from .ir_mla import MlaKernel
    from .kernel import Kernel, Parameter
    from .lower import AnyKernel, AnyProblem, AnySchedule
    from .merge import MergeKernel
    from .quantization import QuantizationKernel

MAX_CALLS = 4096  # signatures that stay prepared

Addresses = tuple[int, ...]  # of a, b, sfa, sfb, groups, the operands as bound, d, sfd
T = TypeVar("T")


class Prepared(dict[object, T]):
    """What is prepared, by signature; safe in threads, and `get` takes no lock."""

    def __init__(self) -> None:
        super().__init__()
        self._mutex = threading.Lock()

    def keep(self, signature: object, call: T) -> T:
        """Have `call` found from now on, in place of the oldest if there are too many."""
        with self._mutex:
            self[signature] = call
            while len(self) > MAX_CALLS:
                del self[next(iter(self))]
        return call


class Call:
    """A signature, checked and prepared; safe in threads."""

    def __init__(
        self,
        device: torch.device,
        outputs: list[ArrayView],
        launches: LaunchPool | None,
        *,
        adds: bool = False,
    ) -> None:
        import torch

        self.launches = launches  # None if nothing is computed
        self._index = device.index
        self._current_device = torch._C._cuda_getDevice
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._as_current = torch.cuda.device
        # One element with the shape of D: `empty_like` takes half the time of `empty`.
        likes = (
            torch.empty(1, dtype=getattr(torch, out.dtype.name), device=device).expand(out.shape)
            for out in outputs
        )
        make = torch.zeros_like if adds else torch.empty_like
        self._make_outputs = [
            functools.partial(make, like, memory_format=torch.contiguous_format) for like in likes
        ]

    def empty(self) -> tuple[torch.Tensor, ...]:
        """New tensors for d, of zeros if it is added to, and, if it has scales, sfd."""
        return tuple([make() for make in self._make_outputs])  # a generator takes longer

    def launch(self, addresses: Addresses) -> None:
        """Run on the tensors at `addresses`; DeviceError if the driver refuses."""
        if self.launches is not None:
            launch = self.launches.take(addresses)
            self._run(launch)
            self.launches.give_back(launch)

    def bind(self, addresses: Addresses, arrays: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        """What runs on `arrays`, which are at `addresses`, keeps them alive and returns d, or d and
        sfd."""
        result = (arrays["d"], arrays["sfd"]) if "sfd" in arrays else arrays["d"]
        launch = self.launches.make(addresses) if self.launches is not None else None

        def call(kept: Mapping[str, torch.Tensor] = arrays) -> Any:
            if launch is not None:
                self._run(launch)
            return result

        return call

    def _run(self, launch: Launch) -> None:
        """Launch on the current stream of the tensors' device, with that device current."""
        pdl = control.pdl_enabled
        if self._current_device() == self._index:
            launch(self._current_stream(self._index), pdl=pdl)
        else:
            with self._as_current(self._index):
                launch(self._current_stream(self._index), pdl=pdl)


def find_call(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    bound: Bound,
    out: torch.Tensor | None,
    out_dtype: object,
    schedule: Schedule | None,
    batch_invariant: bool = False,
    layout: GroupLayout | None = None,
    ue8m0: bool = False,
) -> tuple[Call, Addresses]:
    """The prepared call of these tensors' signature, and their addresses.

    Raises
    ------
    As `jitgen.gemm`; a signature that is prepared already keeps every rule
    """
    sfa, sfb = scales
    try:
        # Written out: a loop over the tensors would take a microsecond more of every call.
        addresses: Addresses = (
            (at_a := a.data_ptr()),
            (at_b := b.data_ptr()),
            (at_sfa := sfa.data_ptr()),
            (at_sfb := sfb.data_ptr()),
        )
        signature: tuple[Any, ...] = (
            bound.expr,
            schedule,
            batch_invariant,
            out_dtype,
            ue8m0,
            control.num_sms_limit,
            (a.dtype, a.shape, a.is_contiguous() or a.stride(), a.get_device()),
            (b.dtype, b.shape, b.is_contiguous() or b.stride(), b.get_device()),
            (sfa.dtype, sfa.shape, sfa.is_contiguous() or sfa.stride(), sfa.get_device()),
            (sfb.dtype, sfb.shape, sfb.is_contiguous() or sfb.stride(), sfb.get_device()),
            (at_a | at_b | at_sfa | at_sfb) % ADDRESS_UNIT
            and tuple(address % ADDRESS_UNIT for address in addresses),
        )
        if layout is not None:
            t = layout.tensor
            addresses += (t.data_ptr(),)
            view = (t.dtype, t.shape, t.is_contiguous() or t.stride(), t.get_device())
            signature += (layout.kind, layout.alignment, layout.expected_rows, view)
            signature += (addresses[-1] % ADDRESS_UNIT,)
        for name, t in bound.tensors.items():
            addresses += (t.data_ptr(),)
            view = (t.dtype, t.shape, t.is_contiguous() or t.stride(), t.get_device())
            signature += (name, view, addresses[-1] % ADDRESS_UNIT)
        if out is not None:
            for t in out if isinstance(out, tuple) else (out,):
                addresses += (t.data_ptr(),)
                view = (t.dtype, t.shape, t.is_contiguous() or t.stride(), t.get_device())
                signature += (view, addresses[-1] % ADDRESS_UNIT)
        call = _calls.get(signature)
    except (AttributeError, TypeError):
        name_arrays(a, b, scales, bound, out, layout)  # something is no tensor
        if out_dtype is not None:
            dtype_of(out_dtype)  # or neither a dtype nor hashable
        raise
    if call is None:
        arrays = name_arrays(a, b, scales, bound, out, layout)
        call = _prepare(arrays, out_dtype, bound, schedule, batch_invariant, layout, ue8m0)
        _calls.keep(signature, call)
    return call, addresses


_calls: Prepared[Call] = Prepared()


def multiply_alike(
    key: tuple[object, ...],
    operands: tuple[torch.Tensor, ...],
    find: Callable[[], tuple[Call, Addresses]],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """D, and its scales if it has any, of a GEMM that a program makes again and again: what `find`
    finds, in half the time.

    Parameters
    ----------
    key : all that the signature depends on but for addresses
    operands : a, b, sfa, sfb, the layout's tensor and the epilogue's, as far as there are any
    find : `find_call` of them and out

    Raises
    ------
    As `jitgen.gemm`
    """
    addresses = tuple([tensor.data_ptr() for tensor in operands])
    key = (key, control.num_sms_limit)
    is_aligned = not functools.reduce(operator.or_, addresses) % ADDRESS_UNIT
    call = _alike.get(key) if is_aligned else None
    if call is None:
        call, _ = find()
        if is_aligned:
            _alike.keep(key, call)
    outputs = call.empty() if out is None else (out,)
    call.launch((*addresses, *[tensor.data_ptr() for tensor in outputs]))
    return outputs


_alike: Prepared[Call] = Prepared()


def _prepare(
    arrays: dict[str, torch.Tensor],
    out_dtype: object,
    bound: Bound,
    schedule: Schedule | None,
    batch_invariant: bool,
    layout: GroupLayout | None,
    ue8m0: bool,
) -> Call:
    """Check everything, then build, load and lay out the launches of one signature."""
    device = arrays["a"].device
    check_device(arrays, device)
    found = driver.device(device.index)
    driver.check_architecture(found)
    views = {
        name: ArrayView(
            name,
            array_dtype(t.dtype, t.itemsize),
            tuple(t.shape),
            tuple(t.stride()),
            t.data_ptr(),
        )
        for name, t in arrays.items()
    }
    problem, m = check_gemm(views, out_dtype, bound, layout, ue8m0)
    outputs = _outputs(problem, m)
    for view in outputs:
        views.setdefault(view.name, view)
    adds = adds_to_d(problem)
    if m == 0 or views["a"].shape[-1] == 0:
        return Call(device, outputs, None, adds=adds)
    rows = expected_rows(problem, m, layout.expected_rows if layout else None)
    gpu = found.gpu
    if is_limited := 0 < control.num_sms_limit < gpu.num_sms:
        gpu = replace(gpu, num_sms=control.num_sms_limit)
    if schedule is None:
        schedule = select(problem, rows, gpu, batch_invariant=batch_invariant)
        if is_limited:  # blocks that share the k of a tile would all be there at once
            schedule = replace(schedule, split_k=1)
    kernel, loaded = load(problem, schedule, device.index)
    launches = LaunchPool(
        loaded,
        [_argument(parameter, views, m) for parameter in kernel.parameters],
        grid=kernel.num_blocks(m, gpu.num_sms),
        num_threads=kernel.num_threads,
    )
    return Call(device, outputs, launches, adds=adds)


def _outputs(problem: Gemm, m: int) -> list[ArrayView]:
    """d and, if it has scales, sfd, as new arrays are."""
    shapes = {"d": (problem.d_dtype, output_shape(problem, m))}
    if problem.is_quantized:
        shapes["sfd"] = F32, output_scale_shape(problem, m)
    return [
        ArrayView(name, dtype, shape, (m * shape[-1], shape[-1], 1)[-len(shape) :])
        for name, (dtype, shape) in shapes.items()
    ]


def check_device(arrays: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Raise DeviceError unless all are on `device`, a GPU."""
    for name, tensor in arrays.items():
        if tensor.device.type != "cuda":
            raise DeviceError(
                f"{name} is on {tensor.device}: torch tensors must be on a CUDA device (`.cuda()`);"
                " NumPy arrays (`.numpy()`) run on the interpreter"
            )
        if tensor.device != device:
            raise DeviceError(
                f"{name} is on {tensor.device}, {next(iter(arrays))} is on {device}: all must be on"
                " one device"
            )


@overload
def load(problem: Gemm, schedule: Schedule, ordinal: int) -> tuple[Kernel, driver.LoadedKernel]: ...
@overload
def load(
    problem: MlaDecode, schedule: MlaSchedule, ordinal: int
) -> tuple[MlaKernel, driver.LoadedKernel]: ...
@overload
def load(
    problem: MergeStates, schedule: MergeSchedule, ordinal: int
) -> tuple[MergeKernel, driver.LoadedKernel]: ...
@overload
def load(
    problem: Quantization, schedule: QuantizationSchedule, ordinal: int
) -> tuple[QuantizationKernel, driver.LoadedKernel]: ...
def load(
    problem: AnyProblem, schedule: AnySchedule, ordinal: int
) -> tuple[AnyKernel, driver.LoadedKernel]:
    """The kernel, built or taken from the store, and loaded on one device; each once."""
    return _load(problem, schedule, ordinal)


@functools.cache
def _load(
    problem: AnyProblem, schedule: AnySchedule, ordinal: int
) -> tuple[AnyKernel, driver.LoadedKernel]:
    _check_capture(problem, schedule)
    kernel, entry = control.build_for_call(problem, schedule)
    started = time.perf_counter()
    loaded = driver.load(
        entry.cubin, kernel.name, smem_bytes=kernel.smem.total_bytes, ordinal=ordinal
    )
    seconds = time.perf_counter() - started
    control.count_load()
    fields = {"kernel": kernel.name, "key": entry.key.digest, "seconds": seconds, "gpu": ordinal}
    log.info("loaded %s onto GPU %d in %.4f s", kernel.name, ordinal, seconds, extra=fields)
    return kernel, loaded


def _check_capture(problem: AnyProblem, schedule: AnySchedule) -> None:
    import torch

    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            f"the kernel for {problem}, schedule {schedule}, is not loaded yet, and the current"
            " stream is being captured: make the call once before the capture"
        )


def _argument(parameter: Parameter, views: Mapping[str, ArrayView], m: int) -> Argument:
    """The value of a kernel parameter for these arrays; their order is that of addresses."""
    from .kernel import ExtentParameter, PointerParameter, StrideParameter, TensorMapParameter

    match parameter:
        case ExtentParameter():
            return UInt32({"m": m, "k": views["a"].shape[-1]}[parameter.name])
        case PointerParameter():
            return Pointer(list(views).index(parameter.tensor.name))
        case StrideParameter():
            view, dim = views[parameter.tensor.name], parameter.dim
            if len(view.shape) == 3 and dim == 1 and view.shape[1] == 1:
                dim = 0  # what is one row further is in the next group's matrix
            return UInt32(view.strides[dim])
        case TensorMapParameter():
            view = views[parameter.tensor.name].flat
            size, (rows, columns) = view.dtype.size_bytes, view.shape
            if parameter.is_apart:
                rows = m
            box_rows, box_columns = parameter.box
            if parameter.tensor.dims[-2].extent is None:
                box_rows = min(box_rows, rows)
            spec = TensorMapSpec(
                element_bytes=size,
                rows=rows,
                columns=columns,
                pitch_bytes=view.row_stride * size,
                box_rows=box_rows,
                box_columns=box_columns,
                swizzle_bytes=parameter.swizzle_bytes,
                num_matrices=view.shape[0] // m if parameter.is_apart else 0,
                matrix_bytes=m * view.row_stride * size if parameter.is_apart else 0,
            )
            return TensorMap(list(views).index(view.name), spec)
