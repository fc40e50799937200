"""The doctor: looks at what this machine can do, and knows what to install for the rest."""

from __future__ import annotations

import functools
import importlib.util
import platform
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from . import __version__
from .api import gemm
from .build import open_shared_store, store_tiers
from .codegen import headers, render
from .control import jit_mode
from .dtypes import E4M3
from .errors import DeviceError, JitgenError, StoreError, one_line
from .lower import lower
from .problem import Gemm
from .runtime import driver
from .runtime.nvrtc import compile_cubin, compiler_version
from .runtime.remote import RemoteTier
from .runtime.stats import Counters
from .runtime.tiers import LowerTier, SharedTier, Tiers, list_folders
from .tuning.model import choose

MIN_CUDA_MAJOR = 13  # of the NVRTC that pyproject.toml asks for: a driver runs no newer cubins


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor looked at."""

    name: str
    is_ok: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and whether kernels can be interpreted, compiled and launched here."""

    findings: tuple[Finding, ...]
    can_interpret: bool
    can_compile: bool
    can_launch: bool


def diagnose() -> Diagnosis:
    """What works on this machine; what does not is a finding with its remedy, never an error."""
    interpreter = _find("interpreter", _look_at_interpreter)
    compiler = _find("compiler", _look_at_compiler)
    cuda, torch = _find("CUDA driver", _look_at_driver), _find("torch", _look_at_torch)
    ordinals = range(driver.num_devices())
    gpus = [_find(f"GPU {i}", functools.partial(_look_at_gpu, i)) for i in ordinals]
    python, nvrtc = _find("Python", _look_at_python), _find("NVRTC", _look_at_nvrtc)
    store, jit = _find("kernel store", _look_at_store), _find("JIT", _look_at_jit)
    tiers = _look_at_tiers()
    return Diagnosis(
        findings=(python, interpreter, nvrtc, compiler, store, *tiers, jit, cuda, *gpus, torch),
        can_interpret=interpreter.is_ok,
        can_compile=compiler.is_ok,
        can_launch=cuda.is_ok and torch.is_ok and any(gpu.is_ok for gpu in gpus),
    )


def _find(name: str, look: Callable[[], str]) -> Finding:
    """What `look` returns, or what it raises."""
    try:
        return Finding(name, True, look())
    except (JitgenError, ImportError) as error:
        return Finding(name, False, one_line(error))


def _look_at_python() -> str:
    return f"{platform.python_version()}, jitgen {__version__}"


def _look_at_interpreter() -> str:
    """Runs a GEMM whose result is known."""
    a, b = np.ones((4, 256), E4M3.numpy), np.ones((8, 256), E4M3.numpy)
    scales = np.ones((4, 2), np.float32), np.ones((1, 2), np.float32)
    if not (gemm(a, b, scales, out_dtype="float32") == 256).all():
        raise JitgenError(f"a GEMM of ones is wrong with NumPy {np.__version__}: report this")
    return f"NumPy {np.__version__}"


def _look_at_nvrtc() -> str:
    return f"{compiler_version()}, cuda-bindings {metadata.version('cuda-bindings')}"


def _look_at_compiler() -> str:
    """Compiles a kernel, past the store."""
    problem = Gemm(128, 128)
    kernel = lower(problem, choose(problem, 64))
    compiled = compile_cubin(
        render(kernel), name=f"{kernel.name}.cu", headers=headers(), target=kernel.target
    )
    return f"{kernel.target.arch} kernel in {compiled.resources.compile_seconds:.2f} s"


def _look_at_store() -> str:
    with warnings.catch_warnings(record=True) as damages:
        warnings.simplefilter("always")
        store = open_shared_store()
        count = sum(1 for _ in store.entries())
    damaged = f", damaged: {len(damages)}" if damages else ""
    return f"{store.root}, writable, kernels: {count}{damaged}"


def _look_at_tiers() -> list[Finding]:
    """A finding for each tier beyond the own folder."""
    try:
        tiers = store_tiers()
    except StoreError:  # said of the kernel store
        return []
    looks: list[tuple[str, Callable[[], str]]] = [
        ("lower store", functools.partial(_look_at_folder, root, LowerTier)) for root in tiers.lower
    ]
    if tiers.shared:
        looks.append(("shared store", functools.partial(_look_at_folder, tiers.shared, SharedTier)))
    if tiers.remote:
        looks.append(("remote store", functools.partial(_look_at_remote, tiers)))
    return [_find(name, look) for name, look in looks]


def _look_at_folder(root: Path, tier: Callable[[Path], object]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            tier(root)
        except RuntimeWarning as problem:
            raise StoreError(str(problem)) from None
    return f"{root}, kernels: {len(list_folders(root))}"


def _look_at_remote(tiers: Tiers) -> str:
    remote = RemoteTier(
        tiers.remote, write=False, timeout_s=tiers.remote_timeout_s, counters=Counters()
    )
    mode = "read and written" if tiers.remote_write else "read"
    return f"{remote.check()}, {mode}"


def _look_at_jit() -> str:
    mode = jit_mode()
    return f"{mode}: JITGEN_JIT, what calls do about a kernel that is not in the store"


def _look_at_driver() -> str:
    remedy = "launching needs a Hopper GPU with NVIDIA driver 580 or newer"
    try:
        version = driver.driver_version()
    except DeviceError as error:
        reason = str(error).removesuffix("; `jitgen doctor` tells more")
        raise DeviceError(f"{reason}: {remedy}") from None
    if int(version.partition(".")[0]) < MIN_CUDA_MAJOR:
        raise DeviceError(f"runs CUDA {version}, kernels are of {MIN_CUDA_MAJOR}.0: {remedy}")
    return f"runs CUDA {version}"


def _look_at_gpu(ordinal: int) -> str:
    found = driver.device(ordinal)
    driver.check_architecture(found)
    major, minor = found.compute_capability
    return f"{found.name}, compute capability {major}.{minor}, {found.num_sms} SMs"


def _look_at_torch() -> str:
    """Reads torch's version file: importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise DeviceError("missing, calls on a GPU take its tensors: pip install 'jitgen[torch]'")
    text = Path(spec.origin).with_name("version.py").read_text()
    version, cuda = (
        match[1] if (match := re.search(rf"^{name}\b.*= '([^']+)'$", text, re.MULTILINE)) else None
        for name in ("__version__", "cuda")
    )
    if cuda is None:
        raise DeviceError(
            f"{version} is without CUDA: install one with it, see https://pytorch.org"
        )
    return f"{version}, CUDA {cuda}"
