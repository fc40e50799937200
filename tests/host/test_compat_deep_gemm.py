"""jitgen.compat.deep_gemm on CPU tensors, by the interpreter; tests/gpu has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitgen  # noqa: E402
from jitgen import F32, Quantization, QuantizationSchedule, control  # noqa: E402
from jitgen.compat import deep_gemm  # noqa: E402
from jitgen.compat.deep_gemm import settings  # noqa: E402
from jitgen.quantization import Rule, interpret_quantization, lower_quantization  # noqa: E402

M, N, K, G = 5, 136, 272, 3
Pair = tuple[Any, Any]


def pair(rows: int, *, is_weight: bool = False) -> Pair:
    x = torch.randn(rows, K)
    if is_weight:
        return deep_gemm.per_block_cast_to_fp8(x, use_ue8m0=False)
    return deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=False)


def weights() -> Pair:
    codes, scales = zip(*(pair(N, is_weight=True) for _ in range(G)), strict=True)
    return torch.stack(codes), torch.stack(scales)


def exact(a: Pair, b: Pair) -> torch.Tensor:
    """a @ b^T in float64, from the quantized values."""

    def values(codes: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
        spread = scale.double().repeat_interleave(rows, 0).repeat_interleave(128, 1)
        return codes.double() * spread[: codes.shape[0], : codes.shape[1]]

    return values(*a, 1) @ values(*b, 128).t()


def near(d: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((d.double() - expected).abs().max() < 2**-7 * expected.abs().max())


@pytest.fixture(autouse=True)
def alignment() -> Any:
    yield
    deep_gemm.set_mk_alignment_for_contiguous_layout(128)


# --- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gemm_writes_the_product(dtype: Any) -> None:
    a, b = pair(M), pair(N, is_weight=True)
    d = torch.full((M, N), torch.nan, dtype=dtype)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert near(d, exact(a, b))
    again = torch.full_like(d, torch.nan)
    deep_gemm.fp8_fp4_gemm_nt(
        *(a, b, again), recipe_a=(1, 128), recipe_b=(128, 128), disable_ue8m0_cast=True
    )
    assert torch.equal(again, d)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_gemm_adds_c(is_in_place: bool) -> None:
    a, b, c = pair(M), pair(N, is_weight=True), torch.randn(M, N)
    d = c.clone() if is_in_place else torch.full((M, N), torch.nan)
    deep_gemm.fp8_gemm_nt(a, b, d, d if is_in_place else c, recipe=(1, 128, 128))
    assert near(d, exact(a, b) + c)


def test_gemm_takes_other_scale_layouts_and_transposed_views() -> None:
    a, b = pair(M), pair(N, is_weight=True)
    d, again = torch.empty(M, N), torch.full((M, N), torch.nan)
    deep_gemm.fp8_gemm_nt(a, b, d)
    sfa, sfb = deep_gemm.get_mn_major_tma_aligned_tensor(a[1]), b[1].t().contiguous().t()
    for function, left, right in (
        (deep_gemm.fp8_gemm_nt, (a[0], sfa), (b[0], sfb)),
        (deep_gemm.fp8_gemm_nn, a, (b[0].t(), b[1].t())),
        (deep_gemm.fp8_gemm_tn, (a[0].t(), a[1].t()), (b[0].t(), b[1].t())),
        (deep_gemm.fp8_gemm_tt, (a[0].t(), a[1].t()), b),
    ):
        again.fill_(torch.nan)
        function(left, right, again)
        assert torch.equal(again, d)


def test_gemm_of_nothing_is_c_or_zero() -> None:
    empty = torch.empty(M, 0, dtype=torch.float8_e4m3fn), torch.empty(M, 0)
    d, c = torch.full((M, M), torch.nan), torch.randn(M, M)
    deep_gemm.fp8_gemm_nt(empty, empty, d)
    assert (d == 0).all()
    deep_gemm.fp8_gemm_nt(empty, empty, d, c)
    assert torch.equal(d, c)
    deep_gemm.fp8_gemm_nt(pair(M), pair(N, is_weight=True), torch.empty(0, N))


# --- grouped --------------------------------------------------------------------------------------


def test_contiguous_gives_a_block_the_group_of_its_first_row() -> None:
    deep_gemm.set_mk_alignment_for_contiguous_layout(64)
    a, b = pair(200), weights()
    groups = torch.full((200,), -1, dtype=torch.int32)
    groups[:3], groups[128:190] = 2, 1
    d = torch.full((200, N), torch.nan, dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, groups)
    assert near(d[:64], exact((a[0][:64], a[1][:64]), (b[0][2], b[1][2])))
    assert d[64:128].isnan().all()
    assert near(d[128:192], exact((a[0][128:192], a[1][128:192]), (b[0][1], b[1][1])))
    assert d[192:].isnan().all()


def test_contiguous_takes_ends_of_groups() -> None:
    a, b = pair(300), weights()
    ends = torch.tensor([3, 128, 260], dtype=torch.int32)  # the groups begin at 0, 128 and 128
    d = torch.full((300, N), torch.nan, dtype=torch.bfloat16)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, ends, use_psum_layout=True)
    for group, (begin, end) in {0: (0, 3), 2: (128, 260)}.items():
        rows = slice(begin, end)
        assert near(d[rows], exact((a[0][rows], a[1][rows]), (b[0][group], b[1][group])))
    assert d[3:128].isnan().all()
    assert d[260:].isnan().all()
    again = torch.full_like(d, torch.nan)
    transposed = b[0].mT, b[1].mT
    deep_gemm.m_grouped_fp8_gemm_nn_contiguous(a, transposed, again, ends, use_psum_layout=True)
    assert torch.equal(again.nan_to_num(7.0), d.nan_to_num(7.0))


def test_masked_leaves_other_rows_alone() -> None:
    b, counts = weights(), [4, 0, 2]
    a = tuple(part.view(G, 4, -1) for part in pair(G * 4))
    d = torch.full((G, 4, N), torch.nan, dtype=torch.bfloat16)
    masked_m = torch.tensor(counts, dtype=torch.int32)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, 2)
    for group, count in enumerate(counts):
        rows = a[0][group, :count], a[1][group, :count]
        assert count == 0 or near(d[group, :count], exact(rows, (b[0][group], b[1][group])))
        assert d[group, count:].isnan().all()


def test_k_grouped_adds_each_group_to_its_matrix() -> None:
    ks, m, n = [128, 0, 256], 8, 24
    a, sfa = deep_gemm.per_channel_cast_to_fp8(torch.randn(384, m), use_ue8m0=False)
    b, sfb = deep_gemm.per_channel_cast_to_fp8(torch.randn(384, n), use_ue8m0=False)
    flat_a = torch.cat([part.t().reshape(-1) for part in a.split(ks)])
    flat_b = torch.cat([part.t().reshape(-1) for part in b.split(ks)])
    c = torch.randn(3, m, n)
    grouped_layout = torch.tensor(ks, dtype=torch.int32)
    for d in (torch.full_like(c, torch.nan), c.clone()):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (flat_a, sfa.t()),
            (flat_b, sfb.t()),
            d,
            ks,
            grouped_layout,
            c if d[0].isnan().any() else d,
        )
        for group, begin in enumerate((0, 128, 128)):
            rows = slice(begin, begin + ks[group])
            left = a[rows].double() * sfa.repeat_interleave(128, 0)[rows]
            right = b[rows].double() * sfb.repeat_interleave(128, 0)[rows]
            assert near(d[group], left.t() @ right + c[group])
    with pytest.raises(ValueError, match="needs c and ks_cpu"):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (flat_a, sfa.t()), (flat_b, sfb.t()), d, ks, grouped_layout
        )
    with pytest.raises(ValueError, match="are not those of ks_cpu"):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (flat_a, sfa.t()), (flat_b, sfb.t()), d, [128, 0, 128], grouped_layout, d
        )


def test_gemm_takes_scales_of_single_rows() -> None:
    a, b = pair(M), pair(N)
    d, c = torch.full((M, N), torch.nan), torch.randn(M, N)
    deep_gemm.fp8_gemm_nt(a, b, d, c, recipe=(1, 1, 128))
    spread = [part[1].double().repeat_interleave(128, 1)[:, :K] for part in (a, b)]
    exact = (a[0].double() * spread[0]) @ (b[0].double() * spread[1]).t()
    assert near(d, exact + c)
    again = torch.full_like(d, torch.nan)
    deep_gemm.fp8_gemm_nt(a, b, again, c, recipe_a=(1, 128), recipe_b=(1, 128))
    assert torch.equal(again, d)


# --- casts and layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize(
    ("cast", "block"),
    [
        (deep_gemm.per_token_cast_to_fp8, (1, 128)),
        (deep_gemm.per_block_cast_to_fp8, (128, 128)),
        (deep_gemm.per_channel_cast_to_fp8, (128, 1)),
    ],
)
def test_casts_scale_each_block(cast: Any, block: tuple[int, int], use_ue8m0: bool) -> None:
    x = torch.randn(256, 200).bfloat16() * 3
    x[:128, 0] = 0
    codes, scales = cast(x, use_ue8m0)
    assert scales.shape == (-(-256 // block[0]), -(-200 // block[1]))
    for i, rows in enumerate(x.float().split(block[0])):
        for j, part in enumerate(rows.split(block[1], dim=1)):
            expected = part.abs().max().clamp(1e-4) * np.float32(1 / 448)
            if use_ue8m0:
                assert scales[i, j].log2().frac() == 0
                assert expected <= scales[i, j] < 2 * expected
            else:
                assert scales[i, j] == expected
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:, :200]
    assert ((codes.float() * spread - x.float()).abs() <= 2**-4 * x.float().abs() + spread).all()


def test_cast_of_whole_dimensions_has_a_scale_for_each_index() -> None:
    x = torch.randn(3, 4, 5)
    codes, scales = deep_gemm.per_custom_dims_cast_to_fp8(x, (1,), use_ue8m0=False)
    assert torch.equal(scales, x.abs().amax(dim=(0, 2)) * np.float32(1 / 448))
    assert codes.shape == x.shape


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("rows", [1, 128])
def test_casts_have_the_bits_of_the_kernel_that_cuda_tensors_run(
    rows: int, use_ue8m0: bool
) -> None:
    x = torch.randn(300, 200) * torch.randn(300, 1).exp()
    x[7] = 1e-7
    cast = deep_gemm.per_token_cast_to_fp8 if rows == 1 else deep_gemm.per_block_cast_to_fp8
    codes, scales = cast(x, use_ue8m0)
    rule: Rule = "reciprocal_ue8m0" if use_ue8m0 else "reciprocal"
    kernel = lower_quantization(Quantization(F32, rows, 0, rule), QuantizationSchedule())
    made = interpret_quantization(kernel, {"x": x.numpy()})
    assert np.array_equal(codes.view(torch.uint8).numpy(), made["q"].view(np.uint8))
    assert np.array_equal(scales.numpy(), made["sf"])


def test_num_sms_is_that_of_configure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "num_sms_limit", 0)
    monkeypatch.setattr(settings, "_all_sms", lambda: 132)
    assert deep_gemm.get_num_sms() == 132
    deep_gemm.set_num_sms(100)
    assert deep_gemm.get_num_sms() == control.num_sms_limit == 100
    for wrong in (0, 133):
        with pytest.raises(ValueError, match="the GPU has 132 SMs"):
            deep_gemm.set_num_sms(wrong)


def test_ceil_to_ue8m0_is_the_next_power_of_two() -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 0.3, -5.0, 1e-40])
    assert deep_gemm.ceil_to_ue8m0(x).tolist() == [1.0, 2.0, 2.0, 0.5, 8.0, 2.0**-126]


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (4, 1)])
def test_scales_are_made_mn_major_and_padded(shape: tuple[int, ...]) -> None:
    sf = torch.randn(shape)
    moved = deep_gemm.get_mn_major_tma_aligned_tensor(sf)
    pitch = deep_gemm.get_tma_aligned_size(shape[-2], 4)
    assert torch.equal(moved, sf)
    assert pitch == -(-shape[-2] // 4) * 4
    assert moved.stride()[-2:] == (1, pitch)
    assert deep_gemm.get_mn_major_tma_aligned_tensor(moved) is moved
    assert torch.equal(
        deep_gemm.transform_sf_into_required_layout(
            sf, shape[-2], 128 * shape[-1], (1, 128), None if len(shape) == 2 else shape[0]
        ),
        sf,
    )


def test_scales_of_weights_stay_and_wrong_shapes_are_refused() -> None:
    sf = torch.randn(2, 3)
    transform = deep_gemm.transform_sf_into_required_layout
    assert transform(sf, 200, 384, (1, 128, 128), is_sfa=False) is sf
    with pytest.raises(ValueError, match=r"must be \[2, 3\]"):
        transform(torch.randn(3, 3), 200, 384, (128, 128))


# --- settings, and what is not there --------------------------------------------------------------


def test_settings_are_kept() -> None:
    assert deep_gemm.get_m_alignment_for_contiguous_layout() == 128
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout() == 128
    deep_gemm.set_mk_alignment_for_contiguous_layout(64)
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 64
    assert not deep_gemm.get_pdl()
    deep_gemm.set_pdl(True)
    assert deep_gemm.get_pdl()
    jitgen.configure(pdl=False)
    assert not deep_gemm.get_pdl()
    deep_gemm.set_tc_util(80)
    assert deep_gemm.get_tc_util() == 80
    deep_gemm.set_tc_util(100)
    deep_gemm.set_ignore_compile_dims(True)
    deep_gemm.set_block_size_multiple_of(1)


@pytest.mark.parametrize("name", deep_gemm.UNSUPPORTED)
def test_unsupported_function_names_itself(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        getattr(deep_gemm, name)(1, x=2)


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(deep_gemm, "fp8_gemm_xx")


@pytest.mark.parametrize("name", deep_gemm.__all__)
def test_name_is_documented(name: str) -> None:
    assert getattr(deep_gemm, name).__doc__


def test_unsupported_arguments_name_themselves() -> None:
    a, b, d = pair(M), pair(N, is_weight=True), torch.empty(M, N)
    for message, call in {
        "recipe": lambda: deep_gemm.fp8_gemm_nt(a, b, d, recipe=(128, 128, 128)),
        "recipe \\(1, 1": lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(
            a, b, d, d, 1, recipe=(1, 1, 128)
        ),
        "use_psum_layout": lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            a, b, d, [K], d, d, use_psum_layout=True
        ),
        "recipe_a": lambda: deep_gemm.fp8_gemm_nt(a, b, d, recipe_a=(1, 32), recipe_b=(32, 32)),
        "FP4": lambda: deep_gemm.fp8_gemm_nt(a, (b[0].view(torch.int8), b[1]), d),
        "UE8M0": lambda: deep_gemm.fp8_gemm_nt((a[0], a[1].int()), b, d),
        "alignment of 96": lambda: deep_gemm.set_mk_alignment_for_contiguous_layout(96),
        "use_packed_ue8m0": lambda: deep_gemm.per_token_cast_to_fp8(
            torch.randn(1, 128), True, use_packed_ue8m0=True
        ),
        "multiple_of": lambda: deep_gemm.set_block_size_multiple_of((64, 32)),
        "1x32": lambda: deep_gemm.transform_sf_into_required_layout(d, M, N, (1, 32)),
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            call()


def test_baseline_multiplies_without_scales() -> None:
    a, b = torch.randn(16, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    c = torch.randn(16, 48)
    for function, left, right in (
        (deep_gemm.cublaslt_gemm_nt, a, b),
        (deep_gemm.cublaslt_gemm_nn, a, b.t()),
        (deep_gemm.cublaslt_gemm_tn, a.t(), b.t()),
        (deep_gemm.cublaslt_gemm_tt, a.t(), b),
    ):
        d = torch.full((16, 48), torch.nan)
        function(left, right, d, c)
        assert torch.allclose(d, c + (a.float() @ b.float().t()), atol=0.1, rtol=2**-6)
