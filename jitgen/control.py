"""Control: whether `gemm` may compile in this process, and counts of what it did.

Serving has two phases. `prebuild` compiles, always; `gemm` and `bind` load what is in the store,
and what they do about a kernel that is not there is the user's choice.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import warnings
from typing import TYPE_CHECKING

from .errors import JitForbiddenError, JitgenError
from .expr import acc
from .merge import MergeStates
from .problem import Gemm
from .problem_mla import MlaDecode
from .quantization import Quantization
from .runtime.entry import Entry
from .runtime.key import KernelKey
from .runtime.stats import PROCESS, Stats
from .runtime.tiers import Tiers

if TYPE_CHECKING:  # what compiles is imported by those who need it: `import jitgen` is quick
    from .lower import AnyKernel, AnyProblem, AnySchedule

JIT_MODES = ("allow", "warn", "forbid")

_configured: str | None = None
_places: dict[str, str] = {}  # of the store, that `configure` was given
pdl_enabled = False  # whether kernels are launched under programmatic dependent launch
num_sms_limit = 0  # SMs that a GEMM takes at most; 0: all


def configure(
    *,
    jit: str | None = None,
    pdl: bool | None = None,
    num_sms: int | None = None,
    cache_dir: str | None = None,
    cache_lower: str | None = None,
    cache_shared: str | None = None,
    cache_remote: str | None = None,
    cache_remote_write: str | None = None,
    cache_remote_timeout: str | None = None,
) -> None:
    """How `gemm` and `bind` find, compile and launch kernels, from now on in this process.

    Parameters
    ----------
    jit : what they do about a kernel not in the store: "allow" compiles it, "warn" compiles it with
        a RuntimeWarning, "forbid" raises JitForbiddenError, which says how to make it. Default:
        $JITGEN_JIT or else "allow".
    pdl : launch under programmatic dependent launch, in CUDA graphs too: a kernel is set up while
        the one before it on the stream ends, and waits for its results. It pays where small kernels
        follow one another in a graph; a launch without a graph costs the host more. MLA decode is
        always launched when the kernel before it has ended. Default: False.
    num_sms : how many SMs a GEMM takes at most, grouped or not: its grid is no larger, and others
        are left to kernels that run beside it, such as those that communicate. Schedules are the
        cost model's for that many, not those measured. A schedule that is pinned and splits k takes
        what it needs. 0 stands for all, the default.
    cache_dir, cache_lower, cache_shared, cache_remote, cache_remote_write, cache_remote_timeout :
        where kernels are kept, each spelled as the environment variable of its name,
        $JITGEN_CACHE_DIR and so on, and in its place: see `jitgen.runtime.tiers.Tiers.of`

    What is None stays as it was. `prebuild` and `Plan.prebuild` compile in every mode, and a call
    that is prepared already runs.

    Raises
    ------
    JitgenError : `jit` is none of these, `pdl` is no bool, or `num_sms` no count
    StoreError : a cache parameter is not understood
    """
    global _configured, pdl_enabled, num_sms_limit
    if num_sms is not None and (type(num_sms) is not int or num_sms < 0):
        raise JitgenError(f"num_sms is {num_sms!r:.80}, must be a count of SMs, or 0 for all")
    if pdl is not None and not isinstance(pdl, bool):
        raise JitgenError(f"pdl is {pdl!r:.80}, must be True or False")
    mode = _configured if jit is None else _check_mode(jit, "jit")
    places = {
        "cache_dir": cache_dir,
        "cache_lower": cache_lower,
        "cache_shared": cache_shared,
        "cache_remote": cache_remote,
        "cache_remote_write": cache_remote_write,
        "cache_remote_timeout": cache_remote_timeout,
    }
    given = _places | {name: text for name, text in places.items() if text is not None}
    if given != _places:
        from .build import configure_store

        configure_store(Tiers.of(**given))
        _places.update(given)
    _configured = mode
    if pdl is not None:
        pdl_enabled = pdl
    if num_sms is not None:
        num_sms_limit = num_sms


def jit_mode() -> str:
    """One of JIT_MODES, as `configure` or else $JITGEN_JIT says.

    Raises
    ------
    JitgenError : $JITGEN_JIT is none of them
    """
    return _configured or _check_mode(os.environ.get("JITGEN_JIT") or "allow", "JITGEN_JIT")


def stats() -> Stats:
    """Counts of this process since it started; none ever falls.

    `prebuild` looks for its kernels here; the processes that it compiles the missing ones in have
    counts of their own.
    """
    return PROCESS.stats


def count_load() -> None:
    """Count a kernel that was loaded onto a GPU."""
    from .build import default_store

    default_store().count_load()


def build_for_call(problem: AnyProblem, schedule: AnySchedule) -> tuple[AnyKernel, Entry]:
    """A kernel and its compiled entry for a call, which compiles only as `configure` says.

    Raises
    ------
    JitForbiddenError : the kernel is not in the store, and the mode is "forbid"
    JitgenError : $JITGEN_JIT is no mode
    ProblemError, ScheduleError, VerifyError, CompileError, StoreError : as lower and build
    """
    from .build import build, default_store
    from .lower import lower_any

    mode = jit_mode()
    if mode == "forbid":
        entry = default_store().get(_key(problem, schedule))
        if entry is None:
            raise JitForbiddenError(
                f'jit="forbid": {_missing(problem, schedule)}; {remedy(problem, schedule)}'
            )
        return lower_any(problem, schedule), entry

    def warn() -> None:
        if mode == "warn":
            warnings.warn(
                f"compiling while serving: {_missing(problem, schedule)};"
                f" {remedy(problem, schedule)}",
                RuntimeWarning,
                stacklevel=2,
            )

    kernel = lower_any(problem, schedule)
    return kernel, build(kernel, before_compile=warn)


def remedy(problem: AnyProblem, schedule: AnySchedule) -> str:
    """How to compile one kernel into the store in advance: a shell command, or Python.

    Only Python can spell an epilogue, and there it is the one of the call.
    """
    if isinstance(problem, MergeStates):
        dtype = f"jitgen.{problem.dtype.short.upper()}"
        made = f"(jitgen.MergeStates({problem.head_dim_v}, {dtype}), jitgen.{schedule!r})"
        return f"this makes it: jitgen.build.prebuild([{made}])"
    if isinstance(problem, Quantization):
        dtype = f"jitgen.{problem.dtype.short.upper()}"
        made = f"(jitgen.Quantization({dtype}, {problem.rows}, {problem.columns}, {problem.rule!r})"
        return f"this makes it: jitgen.build.prebuild([{made}, jitgen.{schedule!r})])"
    if isinstance(problem, MlaDecode):
        p, dtype = problem, f"jitgen.{problem.dtype.short.upper()}"
        fields = (
            f"{p.num_heads}, {p.num_queries}, {p.head_dim_qk}, {p.head_dim_v}, {p.page}, {dtype}"
        )
        fields += f", {p.causal}, {p.cache!r}, {p.sparse}, {p.sink}"
        made = f"(jitgen.MlaDecode({fields}), jitgen.{schedule!r})"
        return f"this makes it: jitgen.build.prebuild([{made}])"
    plan = "`jitgen.plan(...).prebuild()` makes those of every m"
    if problem.epilogue != acc:
        gemm = f"jitgen.Gemm({problem.n}, {problem.k}, jitgen.{problem.d_dtype.short.upper()}"
        made = f"jitgen.build.prebuild([({gemm}, epilogue), jitgen.{schedule!r})])"
        return f"{plan}, and this one, whose epilogue is {problem.epilogue}: {made}"
    return f"{plan}, and this one: {prebuild_command(problem, schedule)}"


def prebuild_command(problem: Gemm, schedule: AnySchedule) -> str:
    """The shell command that compiles one kernel, of a problem without an epilogue."""
    entry = {"n": problem.n, "k": problem.k, "m": [1], "out_dtype": problem.d_dtype.name}
    return (
        f"echo {shlex.quote(json.dumps([entry]))} | jitgen prebuild --problems /dev/stdin"
        f" --schedule {shlex.quote(str(schedule))}"
    )


@functools.lru_cache(maxsize=4096)
def _key(problem: AnyProblem, schedule: AnySchedule) -> KernelKey:
    """Kept for those who ask again: making it takes 0.6 ms, all the rest of a miss 0.03 ms."""
    from .build import key_of
    from .lower import lower_any

    return key_of(lower_any(problem, schedule))


def _missing(problem: AnyProblem, schedule: AnySchedule) -> str:
    from .build import default_store
    from .lower import lower_any

    name = lower_any(problem, schedule).name
    store = default_store().root or "in memory"
    return f"kernel {name} is not in the store {store} ({problem}; schedule {schedule})"


def _check_mode(mode: object, name: str) -> str:
    if mode not in JIT_MODES:
        raise JitgenError(f"{name} is {mode!r:.80}, must be one of {', '.join(JIT_MODES)}")
    return str(mode)
