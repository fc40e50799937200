"""MLA decode calls on torch tensors: checked and prepared once a signature, then launched."""

from __future__ import annotations

import functools
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .arrays import ADDRESS_UNIT, ArrayView
from .arrays_mla import NAMES, SPARSE_NAMES, MlaCall, check_mla_call, check_mla_out
from .calls import Call, Prepared, check_device, load
from .dtypes import F32, array_dtype
from .errors import DeviceError, ProblemError
from .problem_mla import HEAD_DIMS
from .runtime import driver
from .runtime.launch import Argument, LaunchPool, Pointer, TensorMap, UInt32
from .runtime.tensor_map import TensorMapSpec
from .schedule_mla import TILE_ROWS, MlaSchedule, num_parts
from .tuning.select import select

if TYPE_CHECKING:
    import torch

    from .ir_mla import MlaKernel


class MlaPlan:
    """What the parts of a call leave for each other on one GPU: 35 MB, of fixed size and address.

    The plan itself, which part has which keys, is made on the device by every launch from the
    lengths it finds. Calls that may run at the same time need an MlaPlan each; one that a CUDA
    graph was given must live as long. It serves every problem.
    """

    def __init__(self, device: Any = None) -> None:
        """
        Parameters
        ----------
        device : torch device of the calls; None for the current CUDA device

        Raises
        ------
        DeviceError : there is no such GPU, or it cannot run the kernels
        """
        import torch

        index = torch.device("cuda" if device is None else device).index
        index = torch.cuda.current_device() if index is None else index
        found = driver.device(index)
        driver.check_architecture(found)
        self.device = torch.device("cuda", index)
        tiles = 2 * found.num_sms  # at most, of all parts, each with two partial results
        columns = max(head_dim_v for _, head_dim_v in HEAD_DIMS)
        empty = functools.partial(torch.empty, device=self.device)
        self.partial_out = empty(tiles, TILE_ROWS, columns, dtype=torch.float32)
        self.partial_states = empty(tiles, TILE_ROWS, 2, dtype=torch.float32)
        self.counters = torch.zeros(found.num_sms, device=self.device, dtype=torch.int32)
        if not torch.cuda.is_current_stream_capturing():  # or the capture orders the zeros
            torch.cuda.current_stream(self.device).synchronize()
        self.addresses = tuple(
            tensor.data_ptr() for tensor in (self.partial_out, self.partial_states, self.counters)
        )


# The inputs whose addresses a kernel takes, of dense and of sparse decode.
ADDRESSED = (NAMES, SPARSE_NAMES)

_calls: Prepared[tuple[Call, MlaCall]] = Prepared()
_plans: dict[tuple[int, int], MlaPlan] = {}


def mla_on_device(
    tensors: dict[str, torch.Tensor],
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    plan: MlaPlan | None,
    out: torch.Tensor | None,
    schedule: MlaSchedule | None,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of tensors by name, as `jitgen.mla_decode` or `jitgen.mla_decode_sparse`."""

    given = tensors if out is None else {**tensors, "out": out}
    try:
        addresses = {name: tensor.data_ptr() for name, tensor in given.items()}
        signature = (
            head_dim_v,
            softmax_scale,
            causal,
            schedule,
            batch_invariant,
            *given,
            *[(t.dtype, t.shape, t.stride(), t.get_device()) for t in given.values()],
            *[address % ADDRESS_UNIT for address in addresses.values()],
        )
        found = _calls.get(signature)
    except AttributeError as error:
        raise ProblemError(
            f"{', '.join(given)} must be all torch tensors, or all NumPy arrays: {error}"
        ) from error
    if found is None:
        found = _prepare(tensors, head_dim_v, softmax_scale, causal, out, schedule, batch_invariant)
        _calls.keep(signature, found)
    call, about = found
    device = tensors["q"].device
    o, lse = call.empty() if out is None else (out, *call.empty())
    if about.batch:
        plan = _plan_of_stream(device) if plan is None else plan
        if plan.device != device:
            raise DeviceError(f"plan is for {plan.device}, q is on {device}: make one for it")
        results = (o.data_ptr(), lse.data_ptr(), *plan.addresses)
        inputs = [addresses.get(name, 0) for name in ADDRESSED[about.problem.sparse]]
        call.launch((*inputs, *results))
    return o, lse


def _plan_of_stream(device: torch.device) -> MlaPlan:
    """The plan of calls that name none: calls on one stream do not run at the same time.

    Under capture it is the call's own, from the memory of the graph, which has it back behind the
    call: graphs may be replayed at the same time.
    """
    import torch

    if torch.cuda.is_current_stream_capturing():
        return MlaPlan(device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    plan = _plans.get(key)
    if plan is None:
        # In a thread of its own: torch may be giving this one the memory of a graph to come.
        with ThreadPoolExecutor(1) as thread:
            plan = _plans.setdefault(key, thread.submit(MlaPlan, device).result())
    return plan


def _prepare(
    tensors: dict[str, torch.Tensor],
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    out: torch.Tensor | None,
    schedule: MlaSchedule | None,
    batch_invariant: bool,
) -> tuple[Call, MlaCall]:
    """Check everything, then build, load and lay out the launches of one signature."""
    given = tensors if out is None else {**tensors, "out": out}
    device = tensors["q"].device
    check_device(given, device)
    gpu = driver.device(device.index)
    driver.check_architecture(gpu)
    views = {
        name: ArrayView(
            name, array_dtype(t.dtype, t.itemsize), tuple(t.shape), tuple(t.stride()), t.data_ptr()
        )
        for name, t in given.items()
    }
    about = check_mla_call(views, head_dim_v, softmax_scale, causal)
    problem = about.problem
    shape = (about.batch, problem.num_queries, problem.num_heads, problem.head_dim_v)
    if out is not None:
        check_mla_out(views["out"], problem, about.batch)
    outputs = [] if out is not None else [ArrayView("o", problem.dtype, shape, ())]
    outputs.append(ArrayView("lse", F32, (shape[0], shape[2], shape[1]), ()))
    if about.batch == 0:
        return Call(device, outputs, None), about
    if schedule is None:
        options: dict[str, Any] = {"max_keys": about.max_keys, "batch_invariant": batch_invariant}
        schedule = select(problem, about.batch, gpu.gpu, **options)
    kernel, loaded = load(problem, schedule, device.index)
    launches = LaunchPool(
        loaded,
        _arguments(kernel, about),
        grid=num_parts(kernel.body.tiles, gpu.num_sms, schedule.meet) * kernel.body.tiles,
        num_threads=kernel.num_threads,
        is_cooperative=True,
    )
    return Call(device, outputs, launches), about


def _arguments(kernel: MlaKernel, about: MlaCall) -> list[Argument]:
    """The kernel's arguments; addresses are those of `mla_on_device`."""
    from .ir_mla import LoadKeys, LoadQueries, walk_mla

    problem = kernel.problem
    num_rows = about.batch * problem.num_tokens * problem.num_rows

    def tensor_map(index: int, rows: int, pitch: int, box: tuple[int, int]) -> TensorMap:
        size = problem.dtype.size_bytes
        spec = TensorMapSpec(
            element_bytes=size,
            rows=rows,
            columns=problem.head_dim_qk,
            pitch_bytes=pitch * size,
            box_rows=box[0],
            box_columns=box[1],
            swizzle_bytes=128,
        )
        return TensorMap(index, spec)

    (scale_bits,) = struct.unpack("I", struct.pack("f", about.scale_log2))
    places = (*ADDRESSED[problem.sparse], "o", "lse", "partial_out", "partial_states", "counters")
    values: dict[str, Argument] = {name: Pointer(i) for i, name in enumerate(places)}
    values |= {
        "pitch_q": UInt32(about.pitch_q),
        "num_sequences": UInt32(about.batch * problem.num_tokens),
        "block_table_stride": UInt32(about.list_stride),
        "indices_stride": UInt32(about.list_stride),
        "num_tokens": UInt32(about.num_blocks * problem.page),
        "topk": UInt32(about.topk),
        "page_rows": UInt32(about.page_rows),
        "scale_log2": UInt32(scale_bits),
    }
    for stmt in walk_mla(kernel.body.body):
        if isinstance(stmt, LoadQueries):
            values["map_q"] = tensor_map(0, num_rows, about.pitch_q, stmt.box)
        if isinstance(stmt, LoadKeys):
            rows = (about.num_blocks - 1) * about.page_rows + problem.page
            values["map_kv"] = tensor_map(1, rows, about.pitch_kv, stmt.box)
    return [values[parameter.name] for parameter in kernel.parameters]
