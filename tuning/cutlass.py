"""CUTLASS as a peer: its Hopper FP8 GEMM with blockwise scales, built from its installed headers.

The only part of jitgen that needs nvcc: it runs when a benchmark does, and one without it goes on.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from ..errors import DeviceError
from ..runtime.key import sha256_hex
from ..runtime.store import KernelStore

SOURCE = "cutlass_gemm.cu"
NVCC_OPTIONS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr"),
    *("-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler=-fPIC"),
)
BUILD_TIMEOUT_S = 1200


@dataclass(frozen=True)
class Config:
    """How CUTLASS computes a GEMM: the macros of cutlass_gemm.cu, which explains them."""

    tile_m: int
    tile_n: int
    cluster_m: int = 1
    pingpong: bool = False
    stream_k: bool = False
    swapped: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("pingpong", "stream_k", "swapped") if getattr(self, name)]
        return " ".join([f"{self.tile_m}x{self.tile_n} cluster={self.cluster_m}x1", *flags])

    @property
    def macros(self) -> list[str]:
        """As options of nvcc."""
        return [f"-D{name.upper()}={int(value)}" for name, value in asdict(self).items()]


# One for large problems, one for few rows, and for few tiles one of each kind that shares k.
CONFIGS = (
    Config(128, 128, cluster_m=2),
    Config(64, 128, pingpong=True),
    Config(128, 128, stream_k=True),
    Config(128, 64, stream_k=True, swapped=True),
)


class Library:
    """One configuration, compiled and loaded."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._workspace_bytes = library.cutlass_workspace_bytes
        self._workspace_bytes.argtypes = [ctypes.c_int] * 3
        self._workspace_bytes.restype = ctypes.c_size_t
        self._gemm = library.cutlass_gemm
        pointers, extents = [ctypes.c_void_p] * 5, [ctypes.c_int] * 3
        self._gemm.argtypes = [*pointers, *extents, ctypes.c_void_p, ctypes.c_void_p]
        self._gemm.restype = ctypes.c_int
        self._status_name = library.cutlass_status_name
        self._status_name.argtypes = [ctypes.c_int]
        self._status_name.restype = ctypes.c_char_p

    def workspace_bytes(self, m: int, n: int, k: int) -> int:
        """What `gemm` needs at `workspace`, on the current device."""
        return int(self._workspace_bytes(m, n, k))

    def gemm(
        self,
        operands: Sequence[int],
        extents: tuple[int, int, int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch D = (A * sfa) @ (B * sfb)^T.

        Parameters
        ----------
        operands : addresses on the current device of a e4m3 [m, k], b e4m3 [n, k], sfa float32
            [k/128, m], sfb float32 [k/128, ceil(n/128)], d bfloat16 [m, n], all row-major
        extents : m, n, k
        workspace : address of `workspace_bytes` bytes
        stream : of the current device

        Raises
        ------
        DeviceError : this configuration cannot run the problem, or the launch failed
        """
        status = self._gemm(*operands, *extents, workspace, stream)
        if status:
            m, n, k = extents
            raise DeviceError(f"refuses m{m}-n{n}-k{k}: {self._status_name(status).decode()}")


def libraries() -> Mapping[Config, Library]:
    """Each of CONFIGS, built at the first call of a process unless an earlier process did.

    Raises
    ------
    DeviceError : headers, nvcc or a cache folder are missing, or nvcc failed
    """
    built = _libraries()
    if isinstance(built, DeviceError):
        raise built
    return built


@functools.cache
def _libraries() -> Mapping[Config, Library] | DeviceError:
    """A failure is a value here, so that no shape of a benchmark tries to build again."""
    try:
        headers, nvcc, folder = find_headers(), find_nvcc(), _folder()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            paths = list(pool.map(lambda config: _build(config, headers, nvcc, folder), CONFIGS))
        return {config: Library(path) for config, path in zip(CONFIGS, paths, strict=True)}
    except DeviceError as error:
        return error
    except OSError as error:
        return DeviceError(f"CUTLASS was not built: {error}")


def describe() -> str:
    """What the peer is built from, or why it cannot be."""
    try:
        headers, nvcc = find_headers(), find_nvcc()
        release = re.search(r"V([\d.]+)", _nvcc_version(nvcc))
        return f"{_version(headers)} (nvcc {release[1] if release else 'of unknown version'})"
    except DeviceError as error:
        return f"none ({error})"


def find_headers() -> Path:
    """The folder to include from, in the package nvidia-cutlass, which is not imported."""
    spec = importlib.util.find_spec("cutlass_library")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        headers = Path(location) / "source" / "include"
        if (headers / "cutlass" / "cutlass.h").is_file():
            return headers
    raise DeviceError("CUTLASS's headers are missing: pip install 'jitgen[bench]'")


def find_nvcc() -> Path:
    """The compiler, on PATH or in the toolkit that CUDA_HOME names."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if not found:
        raise DeviceError("CUTLASS needs nvcc: put it on PATH, or name its toolkit in CUDA_HOME")
    return Path(found)


def _folder() -> Path:
    """For libraries: in the kernel store's root, which only this user can write."""
    root = KernelStore().root
    if root is None:
        raise DeviceError("CUTLASS needs a folder to build in: name one in JITGEN_CACHE_DIR")
    return root / "peers"


def _build(config: Config, headers: Path, nvcc: Path, folder: Path) -> Path:
    """The library of `config`, compiled unless it is there; it appears by one rename."""
    source = (resources.files("jitgen.tuning") / SOURCE).read_text()
    options = [*NVCC_OPTIONS, *config.macros]
    key = sha256_hex("\n".join([source, *options, _version(headers), _nvcc_version(nvcc)]).encode())
    library = folder / f"cutlass-{key[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (Path(scratch) / SOURCE).write_text(source)
        _run([str(nvcc), *options, f"-I{headers}", "-o", library.name, SOURCE], folder=scratch)
        (Path(scratch) / library.name).replace(library)
    return library


@functools.cache
def _nvcc_version(nvcc: Path) -> str:
    return _run([str(nvcc), "--version"])


def _version(headers: Path) -> str:
    """Such as "4.2.0"."""
    text = (headers / "cutlass" / "version.h").read_text()
    parts = (re.search(rf"#define CUTLASS_{p}\s+(\d+)", text) for p in ("MAJOR", "MINOR", "PATCH"))
    return ".".join(part[1] if part else "?" for part in parts)


def _run(command: list[str], folder: str | None = None) -> str:
    """What the command prints; DeviceError with its first complaint if it fails."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{name} took more than {BUILD_TIMEOUT_S} s") from None
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        complaint = next((line for line in lines if "error" in line), "no error named")
        raise DeviceError(
            f"{name} failed with exit code {done.returncode}: {complaint.strip():.300}"
        )
    return done.stdout
