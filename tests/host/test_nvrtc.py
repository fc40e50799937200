"""NVRTC: compiling without a GPU, and what is refused. Advisories and spills here are real ones."""

from __future__ import annotations

import re
import sys

import pytest

from jitgen.errors import CompileError
from jitgen.runtime.nvrtc import (
    compile_cubin,
    compile_options,
    compiler_version,
    headers_used,
)

HEADERS = {
    "jitgen/scale.cuh": '#include "jitgen/two.cuh"\n#define SCALE (TWO * 2)\n',
    "jitgen/two.cuh": "#define TWO 2\n",
    "jitgen/unused.cuh": "#error not to be included\n",
}

SCALE_KERNEL = """
#include <jitgen/scale.cuh>
extern "C" __global__ void scale(float* x) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = SCALE * tile[31 - threadIdx.x];
}
"""

STACK_KERNEL = """
extern "C" __global__ void stack(float* x, int i) {
  float local[64];
  for (int j = 0; j < 64; ++j) local[j] = x[j];
  local[i] = 0;
  x[1] = local[i * 3] + local[i * 7];
}
"""

SPILL_KERNEL = """
extern "C" __global__ void __launch_bounds__(1024) spill(float* x, int n) {
  float a[96];
#pragma unroll
  for (int j = 0; j < 96; ++j) a[j] = x[j * 128 + threadIdx.x];
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < 96; ++j) a[j] = a[j] * a[(j + 7) % 96] + a[(j + 13) % 96];
  }
#pragma unroll
  for (int j = 0; j < 96; ++j) x[j * 128 + threadIdx.x] = a[j];
}
"""

# A wgmma group left in flight over the loop's back-edge while another accumulator is read.
SERIALIZED_KERNEL = """
__device__ __forceinline__ void mma(float (&c)[4], unsigned long long a, unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, %4, %5, 1, 1, 1;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
extern "C" __global__ void serialized(float* d, unsigned long long a, unsigned long long b, int n) {
  float c0[4] = {}, c1[4] = {}, acc[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  mma(c0, a, b);
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    mma(c1, a + i, b + i);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    for (int j = 0; j < 4; ++j) { acc[j] += c0[j]; c0[j] = c1[j]; }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int j = 0; j < 4; ++j) d[threadIdx.x * 4 + j] = acc[j] + c1[j];
}
"""


def refusal(source: str, options: tuple[str, ...] = ()) -> CompileError:
    with pytest.raises(CompileError) as caught:
        compile_cubin(source, name="refused.cu", headers={}, options=options)
    return caught.value


def test_compile_cubin_takes_headers_from_memory() -> None:
    compiled = compile_cubin(SCALE_KERNEL, name="scale.cu", headers=HEADERS)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert b"scale" in compiled.cubin
    assert "Compiling entry function 'scale' for 'sm_90a'" in compiled.log
    assert not compiled.log.endswith(("\0", "\n", " "))


def test_compile_cubin_reports_resources() -> None:
    resources = compile_cubin(SCALE_KERNEL, name="scale.cu", headers=HEADERS).resources
    assert 0 < resources.registers <= 255
    assert resources.static_smem_bytes == 32 * 4
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)
    assert resources.compile_seconds > 0


def test_compile_cubin_is_deterministic_and_blind_to_name_and_header_order() -> None:
    turned = dict(reversed(HEADERS.items()))
    first = compile_cubin(SCALE_KERNEL, name="scale.cu", headers=HEADERS)
    second = compile_cubin(SCALE_KERNEL, name="other.cu", headers=turned)
    assert first.cubin == second.cubin


def test_compile_cubin_rejects_wrong_source_with_the_whole_log() -> None:
    error = refusal('extern "C" __global__ void k(int* x) {\n  *x = missing;\n}\n')
    assert 'refused.cu(2): error: identifier "missing" is undefined' in error.log
    assert error.log in str(error)
    for part in ("kernel refused.cu refused: compile error", "--gpu-architecture=sm_90a", "13."):
        assert part in str(error)


def test_compile_cubin_rejects_unknown_option() -> None:
    error = refusal('extern "C" __global__ void k() {}', options=("--no-such-option",))
    assert "--no-such-option" in error.log


def test_compile_cubin_rejects_stack_frame() -> None:
    error = refusal(STACK_KERNEL)
    assert "stack frame of 256 B, 0 allowed" in str(error)
    assert "spills" not in str(error).splitlines()[0].replace("avoid spills", "")
    assert "256 bytes stack frame" in error.log


def test_compile_cubin_rejects_spills() -> None:
    error = refusal(SPILL_KERNEL)
    assert re.search(r"[1-9]\d* B of register spills \(stores \+ loads\), 0 allowed", str(error))
    assert re.search(r"[1-9]\d* bytes spill stores", error.log)


def test_compile_cubin_rejects_ptxas_advisory() -> None:
    error = refusal(SERIALIZED_KERNEL)
    assert re.search(r"ptxas advisory (C75\d\d, )*C7514", str(error))
    assert "wgmma.mma_async instructions are serialized" in error.log
    assert "spills" not in str(error).splitlines()[0]


def test_compile_cubin_rejects_ignored_setmaxnreg() -> None:
    error = refusal(
        'extern "C" __global__ void k(int* x) {'
        ' asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); *x = 1; }'
    )
    assert "ptxas advisory C7508" in str(error)


def test_compile_cubin_rejects_source_without_kernel() -> None:
    assert "needs a __global__ function" in str(refusal("__device__ int f() { return 1; }"))


def test_compile_cubin_never_reads_headers_from_the_working_directory(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "local.cuh").write_text("#define VALUE 1\n")
    monkeypatch.chdir(tmp_path)
    source = (
        '#if __has_include("local.cuh")\n#error found on disk\n#endif\n'
        'extern "C" __global__ void k(int* x) { *x = 1; }\n'
    )
    assert compile_cubin(source, name="k.cu", headers={}).cubin


def test_compile_cubin_says_how_to_install_nvrtc(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CompileError, match="pip install nvidia-cuda-nvrtc"):
        compile_cubin(SCALE_KERNEL, name="scale.cu", headers=HEADERS)


def test_compile_cubin_says_how_to_install_a_missing_library(monkeypatch) -> None:
    from cuda.bindings import nvrtc

    def fail() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"')

    monkeypatch.setattr(nvrtc, "nvrtcVersion", fail)
    with pytest.raises(CompileError, match=r"libnvrtc\.so.*pip install nvidia-cuda-nvrtc"):
        compile_cubin(SCALE_KERNEL, name="scale.cu", headers=HEADERS)


def test_compiler_version_agrees_with_the_loaded_library() -> None:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    assert re.fullmatch(rf"{major}\.{minor}\.\d+", compiler_version())


def test_compile_options_start_with_the_architecture() -> None:
    options = compile_options(options=("-lineinfo",))
    assert options[0] == "--gpu-architecture=sm_90a"
    assert "-std=c++17" in options
    assert options[-1] == "-lineinfo"


@pytest.mark.parametrize("option", ["-I/opt/include", "--include-path=x", "-include=x.h"])
def test_compile_options_rejects_paths(option: str) -> None:
    with pytest.raises(CompileError, match="reads files by path"):
        compile_options(options=(option,))


def test_headers_used_is_transitive_and_leaves_the_rest_out() -> None:
    used = headers_used(SCALE_KERNEL, HEADERS)
    assert list(used) == ["jitgen/scale.cuh", "jitgen/two.cuh"]
    assert used["jitgen/two.cuh"] == HEADERS["jitgen/two.cuh"]


def test_headers_used_ends_on_a_cycle() -> None:
    headers = {"a.cuh": '#pragma once\n#include "b.cuh"\n', "b.cuh": "#include <a.cuh>\n"}
    assert list(headers_used("# include<b.cuh>", headers)) == ["a.cuh", "b.cuh"]


@pytest.mark.parametrize(
    "source",
    [
        '// #include "gone.cuh"',
        '/*\n#include "gone.cuh"\n*/',
        '/*\n#include "gone.cuh"',
        'const char* s = "/*"; // don\'t\n// */ #include <gone.cuh>',
        "int n = 1'000'000; /* '\n#include <gone.cuh>\n' */",
        "int n; // not to include\nint m;",
    ],
    ids=["line", "block", "open-block", "string", "separator", "word"],
)
def test_headers_used_skips_comments(source: str) -> None:
    assert headers_used(source, {}) == {}


def test_headers_used_is_not_fooled_by_comment_marks_in_strings() -> None:
    source = 'asm("// no comment"); const char c = \'"\';\n#include "two.cuh"\n'
    assert list(headers_used(source, {"two.cuh": ""})) == ["two.cuh"]


@pytest.mark.parametrize(
    "source",
    [
        '#include /* a\ncomment */ "two.cuh"\n',
        '#include "two.cuh"',
        '#include "two.cuh"\nint n; // where the last include is named',
        '/* include */ #include "two.cuh" // include\n',
    ],
)
def test_headers_used_reads_as_far_as_the_last_include(source: str) -> None:
    assert list(headers_used(source, {"two.cuh": ""})) == ["two.cuh"]


def test_headers_used_rejects_unknown_include_and_names_the_includer() -> None:
    headers = {"jitgen/a.cuh": "#include <cuda_fp8.h>\n"}
    with pytest.raises(CompileError, match=r'jitgen/a\.cuh includes "cuda_fp8\.h".*jitgen/a\.cuh'):
        headers_used('#include "jitgen/a.cuh"', headers)


def test_headers_used_rejects_include_by_macro() -> None:
    with pytest.raises(CompileError, match='the source includes "HEADER"'):
        headers_used("#define HEADER <a.cuh>\n#include HEADER\n", {"a.cuh": ""})
