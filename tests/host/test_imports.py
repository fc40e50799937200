"""The architecture, as the imports that it allows.

A module may import what the table gives it and nothing else. The compiler is a chain of layers:
each layer may use every layer before it. A new module must be entered here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FOUNDATION = ("errors", "dtypes", "target")
COMPILER = (
    ("expr",),  # epilogue expressions
    ("problem", "problem_mla"),  # what is computed: fixed by the user
    ("groups",),  # which rows are whose
    ("layouts",),  # as users say it
    ("schedule",),  # how it is mapped to the GPU: what may be tuned
    ("schedule_rules",),  # what of that kernels, registers and shared memory allow
    ("schedule_mla",),  # of MLA decode
    ("traversal",),  # the order of its tiles
    ("ir",),  # the tile program that both become
    ("kernel",),  # it, and what a launch passes
    ("ir_mla_fp8",),  # ops over an FP8 cache
    ("ir_mla",),  # that of MLA decode
    ("numerics",),  # arithmetic of the tensor core, in NumPy
    ("numerics_16",),  # of BF16 and FP16
    ("tokens_mla",),  # of an FP8 cache
    ("limits",),  # what the hardware takes of a kernel
    ("lower_mla", "interpret_mla", "codegen_mla"),  # as below, for MLA decode
    ("verify_mla", "verify_tile"),  # by `verify`
    ("merge",),  # a kernel of its own, from problem to meaning
    ("quantization",),  # another
    ("lower", "verify", "interpret", "codegen"),  # make it, check it, run it, print it
)

# Module or package -> what it may import. A package stands for all modules in it, unless one of
# them has a line of its own; the modules of a package may import each other.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "dtypes": {"errors"},
    "target": {"errors"},
}
_before = set(FOUNDATION)
for _layer in COMPILER:
    ALLOWED |= {module: set(_before) for module in _layer}
    _before |= set(_layer)
ALLOWED |= {
    "runtime": set(FOUNDATION),  # NVRTC, kernel store, driver: knows no problem and no kernel
    "tuning": _before | {"runtime"},  # candidates, cost model, measured records
    "tuning.bench": _before | {"runtime", "tuning", "api", "api_quantize"},  # times what users call
    "tuning.bench_mla": _before | {"runtime", "tuning", "tuning.operands_mla"},
    "tuning.operands_mla": _before | {"api_mla"},  # that are timed and checked
    "tuning.measure_mla": _before | {"tuning.operands_mla"},
    "tuning.bench_grouped": _before | {"runtime", "tuning", "tuning.bench", "api", "api_quantize"},
    "tuning.bench_fused": _before | {"runtime", "tuning", "tuning.bench_grouped", "api"},
    "tuning.report_grouped": {"tuning.bench", "tuning.bench_grouped", "tuning.report"},
    "tuning.report_mla": {"errors", "tuning.bench_mla", "tuning.report"},
    "tuning.bench_linear": {"nn"},
    "tuning.operands": {"api_quantize"},  # that are timed and checked
    "tuning.bench_k_grouped": _before
    | {"runtime", "tuning", "tuning.bench", "tuning.operands_k_grouped"},
    "tuning.operands_k_grouped": _before | {"tuning.bench", "api", "api_quantize"},
    "tuning.measure_k_grouped": _before | {"tuning.operands_k_grouped"},
    "tuning.measure": _before | {"api", "api_quantize"},  # checks, and times, what may be recorded
    "tuning.timing": {"errors"},  # of any call
    "tuning.peers": _before | {"tuning", "api_quantize"},  # what it is timed beside
    "tuning.cutlass": {"errors", "runtime"},  # a peer that nvcc builds
    "tuning.host": _before  # times what they wait for
    | {"runtime", "tuning.bench", "tuning.peers", "calls", "api", "api_quantize"},
    "tuning.load": _before | {"runtime", "build"},  # of kernels that are compiled
    "tuning.report": _before | {"runtime", "tuning.bench"},  # its results in words and tables
    "tuning.plot": {"problem", "tuning.bench", "tuning.report"},  # and in a picture
    "tuning.page": _before
    | {"runtime", "tuning.bench", "tuning.report", "tuning.plot"},  # and all of it on a page
    "arrays": set(_before),  # the rules that a caller's arrays must keep
    "arrays_mla": _before | {"arrays"},
    "build": _before | {"runtime"},  # kernels to store entries; needs no GPU
    "ray_prebuild": _before | {"runtime", "build"},  # the same on many machines
    "control": _before | {"runtime", "build"},  # what calls may compile, and counts
    "calls": _before | {"runtime", "tuning", "arrays", "control"},  # on torch, prepared once
    "calls_mla": _before | {"runtime", "tuning", "arrays", "arrays_mla", "calls"},
    "dlpack": set(_before),  # arrays of other libraries
    "api": _before | {"tuning", "arrays", "calls", "dlpack"},  # what users call
    "api_mla": _before | {"tuning", "api", "api_quantize", "arrays", "arrays_mla", "calls_mla"},
    "api_merge": _before | {"runtime", "arrays", "calls"},
    "api_quantize": _before | {"runtime", "arrays", "calls", "dlpack"},
    "plans": _before | {"tuning", "build"},  # finite sets of kernels
    # __init__.py: the public names
    "jitgen": _before
    | {"runtime", "api", "api_merge", "api_mla", "api_quantize", "calls_mla", "control", "plans"},
    # jitgen in other libraries, which each module may import
    "integrations": _before | {"api", "api_mla", "api_quantize", "calls"},
    # other libraries' interfaces, on torch as those are
    "compat": _before | {"integrations", "control", "api_quantize"},
    "nn": _before | {"api", "integrations"},
    "minilm": _before,  # the demo's model
    "demo": _before | {"runtime", "build", "tuning", "minilm", "jitgen"},
    "doctor": _before | {"runtime", "build", "control", "tuning", "api", "jitgen"},
    "console": set(),  # what the commands print on
    "epilogues": {"expr"},  # that the commands know by name
    "files": {"errors"},  # that users name
    "problem_list": _before  # what to compile or tune
    | {"files", "tuning", "tuning.bench", "tuning.bench_fused", "tuning.bench_grouped"}
    | {"tuning.bench_k_grouped", "tuning.bench_mla"},
    "models": _before | {"files"},  # what a model computes
    "schedule_text": _before | {"tuning"},  # schedules as users spell them
    "cli_bench": {"console", "files", "jitgen", "problem_list", "tuning.bench", "tuning.host"}
    | {"tuning.report", "tuning.plot", "tuning.bench_grouped", "tuning.report_grouped"}
    | {"tuning.bench_fused", "tuning.bench_k_grouped", "tuning.bench_mla", "tuning.report_mla"}
    | {"tuning.bench_linear", "tuning.load", "build", "plans", "problem", "runtime"},
    "cli_cache": _before | {"runtime", "build", "console", "jitgen", "problem_list", "tuning"},
    "cli_explain": _before
    | {"runtime", "build", "control", "epilogues", "schedule_text", "tuning"},
    "cli_prebuild": _before
    | {"build", "cli_problems", "console", "models", "problem_list", "schedule_text", "tuning"}
    | {"ray_prebuild"},
    "cli_tune": _before
    | {"runtime", "build", "console", "jitgen", "problem_list", "tuning", "tuning.measure"},
    "cli_problems": {"problem", "files", "models"},
    "cli_report": {"cli_cache", "files", "jitgen", "runtime", "tuning"}
    | {"tuning.page", "tuning.report"},
    "cli": _before
    | {"build", "console", "epilogues", "schedule_text", "tuning", "doctor", "demo"}
    | {"cli_bench", "cli_cache", "cli_explain", "cli_prebuild", "cli_problems", "cli_report"}
    | {"cli_tune"},
    "__main__": {"cli"},
}

# Libraries that most users lack or wait for: who may import them, and only inside functions.
LAZY: dict[str, set[str]] = {
    "torch": {
        "calls",
        "api_merge",
        "api_quantize",
        "calls_mla",
        "demo",
        "dlpack",
        "tuning.bench",
        "tuning.bench_fused",
        "tuning.bench_grouped",
        "tuning.bench_linear",
        "tuning.operands_mla",
        "tuning.host",
        "tuning.peers",
        "tuning.report",
    }
    | {"tuning.bench_k_grouped", "tuning.measure", "tuning.measure_k_grouped"}
    | {"tuning.operands", "tuning.operands_k_grouped", "tuning.timing"},
    "matplotlib": {"tuning.plot"},
    "cuda": {"runtime"},
    "jinja2": {"codegen", "tuning.page"},
    "filelock": {"runtime"},
    "fsspec": {"runtime"},
    "ray": {"ray_prebuild"},
    "tokenizers": {"minilm"},
    "safetensors": {"minilm"},
}

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jitgen"
SUBPACKAGES = (  # runtime and tuning through their symlinks
    *(
        "compat",
        "compat/deep_gemm",
        "compat/deep_gemm/utils",
        "integrations",
        "nn",
        "runtime",
        "tuning",
    ),
)


@dataclass(frozen=True)
class Import:
    """One imported name: its absolute module, and whether the import runs with the module."""

    target: str
    line: int
    is_eager: bool


def _module_name(path: Path) -> str:
    """`tuning.bench` for jitgen/tuning/bench.py, `jitgen` for jitgen/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts) or "jitgen"


def _modules() -> dict[str, Path]:
    folders = (PACKAGE, *(PACKAGE / name for name in SUBPACKAGES))
    return {_module_name(path): path for folder in folders for path in sorted(folder.glob("*.py"))}


MODULES = _modules()


def _row(module: str) -> str:
    """The line of ALLOWED for `module`: its own, or else its package's."""
    return module if module in ALLOWED else module.partition(".")[0]


def _imports(tree: ast.Module, path: Path) -> Iterator[Import]:
    parts = ("jitgen", *path.relative_to(PACKAGE).parent.parts)
    for node, is_eager in _walk(tree, is_eager=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_eager)
        elif isinstance(node, ast.ImportFrom):
            anchor = parts[: len(parts) - node.level + 1] if node.level else ()
            source = ".".join((*anchor, *filter(None, [node.module])))
            for alias in node.names:
                yield Import(f"{source}.{alias.name}", node.lineno, is_eager)


def _walk(node: ast.AST, *, is_eager: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs when the module is imported."""
    is_for_mypy = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        eager = is_eager and not is_for_mypy and not is_function
        yield child, eager
        yield from _walk(child, is_eager=eager)


def _edge(target: str) -> str:
    """The module of jitgen that importing `target` reaches: the longest prefix that is one."""
    inside = target.removeprefix("jitgen").removeprefix(".")
    while inside and inside not in ALLOWED and inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or "jitgen"


def _is_allowed(module: str, edge: str) -> bool:
    same_package = module.partition(".")[0] == edge.partition(".")[0] != "jitgen"
    return same_package or _row(edge) in ALLOWED[_row(module)]


def _violations(module: str, source: str, path: Path) -> list[str]:
    found = []
    for item in _imports(ast.parse(source), path):
        where = f"{module}:{item.line}"
        root = item.target.partition(".")[0]
        if root == "jitgen":
            edge = _edge(item.target)
            if not _is_allowed(module, edge):
                found.append(f"{where} must not import {edge}")
        elif root in ("runtime", "tuning", "templates"):
            found.append(f"{where} imports bare {root}: write jitgen.{root}, or relative")
        elif root in LAZY:
            if _row(module) in ("compat", "integrations", "nn"):
                continue  # users import it by name, for that library
            if _row(module) not in LAZY[root]:
                found.append(f"{where} must not import {root}")
            elif item.is_eager:
                found.append(f"{where} must import {root} inside a function")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_is_allowed(module: str) -> None:
    assert _row(module) in ALLOWED, f"enter {module} in ALLOWED: which layer is it?"
    path = MODULES[module]
    assert not _violations(module, path.read_text(), path)


@pytest.mark.parametrize(
    ("path", "source", "error"),
    [
        ("expr.py", "from .problem import Gemm", "must not import problem"),
        ("ir.py", "from . import api", "must not import api"),
        ("errors.py", "from .dtypes import F32", "must not import dtypes"),
        ("lower.py", "def f():\n    import jitgen.codegen", "must not import codegen"),
        ("schedule.py", "import jitgen", "must not import jitgen"),
        ("runtime/store.py", "from ..problem import Gemm", "must not import problem"),
        ("runtime/store.py", "from runtime import key", "imports bare runtime"),
        ("tuning/tune.py", "from ..api import gemm", "must not import api"),
        ("runtime/driver.py", "from cuda.bindings import driver", "inside a function"),
        ("tuning/model.py", "def f():\n    import torch", "must not import torch"),
        ("calls.py", "try:\n    import torch\nexcept ImportError: ...", "inside a function"),
        ("api.py", "from .integrations import torch_ops", "must not import integrations"),
    ],
)
def test_rule_rejects(path: str, source: str, error: str) -> None:
    violations = _violations(_module_name(PACKAGE / path), source, PACKAGE / path)
    assert len(violations) == 1
    assert error in violations[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dtypes.py", "from .errors import ProblemError"),
        ("interpret.py", "from . import numerics, ir"),
        ("runtime/store.py", "from . import key\nfrom ..errors import StoreError"),
        ("runtime/driver.py", "def f():\n    from cuda.bindings import driver"),
        ("tuning/bench.py", "from ..api import gemm\nfrom .space import candidates"),
        ("calls.py", "if TYPE_CHECKING:\n    import torch"),
        ("integrations/torch_ops.py", "import torch\nfrom .. import api"),
    ],
)
def test_rule_accepts(path: str, source: str) -> None:
    assert not _violations(_module_name(PACKAGE / path), source, PACKAGE / path)


def test_import_jitgen_needs_no_environment_and_no_heavy_library() -> None:
    code = f"import jitgen, sys; print(*(name for name in {tuple(LAZY)} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
