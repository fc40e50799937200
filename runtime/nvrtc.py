"""CUDA source to cubin with NVRTC: no toolkit, no GPU, no host compiler, headers in memory."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import CompileError, StoreError
from ..target import SM90A, Target

# `--ptxas-options=-v` takes one ptxas option ("-v,-x" is an error) and puts the resource report
# into the program log. Without `--no-source-include`, NVRTC takes an include that was not passed in
# memory from the working directory: a kernel would depend on where the process was started. Without
# `--no-cache`, NVRTC answers a second compile on a machine with a driver from a cache of its own,
# and the log then lacks the report.
DEFAULT_OPTIONS = ("-std=c++17", "--no-source-include", "--no-cache", "--ptxas-options=-v")

_PATH_OPTIONS = ("-I", "--include-path", "-include", "--pre-include")
_REMEDY = "pip install nvidia-cuda-nvrtc cuda-bindings"

_COMMENT = re.compile(
    r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])')|//[^\n]*|/\*.*?(?:\*/|\Z)""", re.DOTALL
)
_INCLUDE = re.compile(
    r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>|([^\n]*))', re.MULTILINE
)

_ADVISORY = re.compile(r"\((C75\d\d)\)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"Used \d+ registers.*?(\d+) bytes smem")
_TOOLS_VERSION = re.compile(r"Cuda compilation tools, release [\d.]+, V(\d+\.\d+\.\d+)")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel; of several in one source the largest, spills summed."""

    registers: int
    spill_bytes: int  # stores + loads
    stack_bytes: int
    static_smem_bytes: int
    compile_seconds: float  # wall clock, so not a property of the cubin

    @classmethod
    def from_json(cls, data: object) -> Resources:
        """The resources that `dataclasses.asdict` made `data` of.

        Raises
        ------
        StoreError : a field is missing, unknown, or of another type
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(names):
            raise StoreError(
                f"resources need exactly the fields {', '.join(names)}; got {data!r:.200}"
            )
        for name, value in data.items():
            if type(value) is not int and not (name == "compile_seconds" and type(value) is float):
                raise StoreError(f"resources: {name} is {value!r:.200}, not a number of its type")
        return cls(**data)


@dataclass(frozen=True)
class Compiled:
    """A cubin with the compiler's log and resource report."""

    cubin: bytes
    log: str
    resources: Resources


def compile_options(target: Target = SM90A, options: Sequence[str] = ()) -> tuple[str, ...]:
    """Every option that NVRTC gets, which is what a kernel key must list.

    The architecture of `target`, `DEFAULT_OPTIONS`, then `options`.

    Raises
    ------
    CompileError : an option names files by path, which a key would not see
    """
    for option in options:
        if option.startswith(_PATH_OPTIONS):
            raise CompileError(f"option {option} reads files by path: pass `headers` in memory")
    return (f"--gpu-architecture={target.arch}", *DEFAULT_OPTIONS, *options)


def headers_used(source: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that `source` includes, directly or through others, sorted by name.

    An include counts wherever it stands outside a comment, under a false `#if` too. It names a
    header exactly as `headers` does, also inside another header: NVRTC resolves nothing relative to
    the file that includes.

    Parameters
    ----------
    source : CUDA C++ source
    headers : header text by include name, e.g. "jitgen/wgmma.cuh"

    Raises
    ------
    CompileError : an include is not in `headers`, or its name is a macro
    """
    used: dict[str, str] = {}
    pending = [("the source", source)]
    while pending:
        includer, text = pending.pop()
        for quoted, angled, other in _includes(text):
            name = quoted or angled
            if name not in headers:
                found = ", ".join(sorted(headers)) or "none"
                raise CompileError(
                    f'{includer} includes "{name or other.strip()}", which is not among the headers'
                    f" given: {found}"
                )
            if name not in used:
                used[name] = headers[name]
                pending.append((name, headers[name]))
    return dict(sorted(used.items()))


def compile_cubin(
    source: str,
    *,
    name: str,
    headers: Mapping[str, str],
    target: Target = SM90A,
    options: Sequence[str] = (),
) -> Compiled:
    """The cubin of `source`, with the compiler's log and the kernel's resources.

    A kernel that ptxas had to alter (any C75xx advisory: wgmma serialized, setmaxnreg ignored),
    that spills, or that needs a stack frame is refused: it would run, at a fraction of its speed.

    Parameters
    ----------
    source : CUDA C++ source with at least one `__global__` function
    name : file name for messages and, with -lineinfo, for the line table; never opened
    headers : header text by include name; only those that `headers_used` finds reach the compiler
    target : architecture of the cubin
    options : NVRTC options on top of `compile_options`

    Raises
    ------
    CompileError : NVRTC is not installed, the source does not compile, or a rule above is broken;
        carries the complete log
    """
    nvrtc = _load_nvrtc()
    used = headers_used(source, headers)
    flags = compile_options(target, options)
    started = time.perf_counter()
    program = _create(nvrtc, source, name, used)
    try:
        encoded = [flag.encode() for flag in flags]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), encoded)
        seconds = time.perf_counter() - started
        log = _read(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        text = log.decode("utf-8", "replace").rstrip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise _refusal(name, flags, [f"compile error {status.name}: the log says where"], text)
        resources = _parse_resources(text, seconds)
        if broken := _broken_rules(text, resources):
            raise _refusal(name, flags, broken, text)
        cubin = _read(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, text, resources)


@functools.cache
def compiler_version() -> str:
    """The version of the NVRTC that is loaded, such as "13.0.88", for the kernel key.

    `nvrtcVersion` has no build number, and the metadata of the `nvidia-cuda-nvrtc` package describe
    another library when torch or a toolkit brought the loaded one. The compiler itself names its
    build in the header of any PTX that it makes, so this compiles an empty program (about 15 ms,
    once per process).

    Raises
    ------
    CompileError : NVRTC is not installed, or its PTX names no version
    """
    nvrtc = _load_nvrtc()
    program = _create(nvrtc, "", "version.cu", {})
    try:
        _check(nvrtc, nvrtc.nvrtcCompileProgram(program, 1, [b"--gpu-architecture=compute_90"]))
        ptx = _read(nvrtc, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    match = _TOOLS_VERSION.search(ptx)
    if not match:
        raise CompileError(f"NVRTC does not say its version: {_REMEDY}", ptx)
    return match[1]


def _load_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the bindings load the library at the first call
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]  # the loader lists every folder it searched
        raise CompileError(f"NVRTC cannot be loaded ({reason}): {_REMEDY}") from error
    return nvrtc


def _create(nvrtc: Any, source: str, name: str, headers: Mapping[str, str]) -> Any:
    texts = [text.encode() for text in headers.values()]
    names = [include.encode() for include in headers]
    created = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(names), texts, names)
    return _check(nvrtc, created)[0]


def _check(nvrtc: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC failed: {status.name}")
    return tuple(values)


def _read(
    nvrtc: Any,
    program: Any,
    get_size: Callable[[Any], tuple[Any, ...]],
    get: Callable[[Any, bytes], tuple[Any, ...]],
) -> bytes:
    (size,) = _check(nvrtc, get_size(program))
    # Filled in place. One byte is a b"\0" that CPython shares: nothing but NUL is written to it.
    buffer = bytes(size)
    _check(nvrtc, get(program, buffer))
    return buffer


@functools.lru_cache(maxsize=64)
def _includes(text: str) -> list[tuple[str, str, str]]:
    """The includes of a text: kept, for headers come again with every kernel.

    Read as far as the line with the last of them: the regex takes a millisecond a thousand lines.
    """
    last = text.rfind("include")
    end = text.find("\n", last)
    if last < 0:
        return []
    if end > 0 and "/*" not in text[last:end]:
        text = text[:end]
    return _INCLUDE.findall(_COMMENT.sub(lambda match: match[1] or " ", text))


def _parse_resources(log: str, compile_seconds: float) -> Resources:
    functions = [tuple(map(int, counts)) for counts in _STACK.findall(log)]
    return Resources(
        registers=max(map(int, _REGISTERS.findall(log)), default=0),
        spill_bytes=sum(stores + loads for _, stores, loads in functions),
        stack_bytes=max((stack for stack, _, _ in functions), default=0),
        static_smem_bytes=max(map(int, _SMEM.findall(log)), default=0),
        compile_seconds=compile_seconds,
    )


def _broken_rules(log: str, resources: Resources) -> list[str]:
    broken = []
    if not resources.registers:
        broken.append("no resource report from ptxas: the source needs a __global__ function")
    if codes := sorted(set(_ADVISORY.findall(log))):
        broken.append(
            f"ptxas advisory {', '.join(codes)}, none allowed: restructure the code the log names"
        )
    if resources.spill_bytes:
        broken.append(
            f"{resources.spill_bytes} B of register spills (stores + loads), 0 allowed:"
            " lower block_m or block_n, or allow more registers per thread"
        )
    if resources.stack_bytes:
        broken.append(
            f"stack frame of {resources.stack_bytes} B, 0 allowed:"
            " index local arrays with compile-time constants and avoid spills"
        )
    return broken


def _refusal(name: str, flags: Sequence[str], broken: Sequence[str], log: str) -> CompileError:
    return CompileError(
        f"kernel {name} refused: {'; '.join(broken)}"
        f" (NVRTC {compiler_version()}, options {' '.join(flags)})",
        log,
    )
