"""Extents as the command line takes them; the rest is tested through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jitgen import BF16, E4M3, F16, F32, Gemm, GroupedGemm, MlaDecode, ScaleBlock, gate, silu, up
from jitgen.errors import ProblemError
from jitgen.problem import of_k_groups
from jitgen.problem_list import parse_extents, read_problems
from jitgen.tuning.space_mla import BATCHES

BY_K = {"n": 8, "m": [1], "num_groups": 2, "layout": "k_grouped"}


@pytest.mark.parametrize(
    ("text", "extents"),
    [
        ("64", [64]),
        ("1, 7,4096", [1, 7, 4096]),
        ("1..64", [16, 32, 64]),
        ("33..65", [64, 96]),
        ("5..5,128", [16, 128]),
    ],
)
def test_parse_extents(text: str, extents: list[int]) -> None:
    assert parse_extents(text) == extents


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m has '' where a number or a range is due"),
        ("1..", "m has '1..'"),
        ("1-64", "m has '1-64'"),
        ("64,x", "m has 'x'"),
        ("\u0663", "m has '\u0663'"),
        ("0", "m must be an int in 1.."),
        ("1..99999999999", "m must be an int in 1.."),
        ("9..5", "ends before it begins"),
    ],
)
def test_parse_extents_rejects(text: str, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        parse_extents(text)


def test_read_problems_of_every_family(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    entries: list[dict[str, Any]] = [
        {"n": 576, "k": 7168, "m": [1, 64]},
        {"n": 576, "k": 7168, "m": [8], "num_groups": 4, "out_dtype": "f32"},
        {"n": 576, "k": 7168, "m_max": 16, "num_groups": 4, "layout": "masked", "name": "x"},
        {"n": 72, "m": [4096], "num_groups": 4, "layout": "k_grouped"},
        {"n": 72, "m_max": 100, "num_groups": 1, "layout": "k_grouped", "out_dtype": "bf16"},
        {"n": 72, "m": [8], "num_groups": 2, "layout": "k_grouped", "b_scale": "128x128"},
        {"n": 72, "k": 64, "m": [8], "b_scale": "1x128"},
        {"n": 512, "k": 7168, "m": [8], "num_groups": 4, "out_dtype": "e4m3", "swiglu": True},
        {"num_heads": 16, "name": "decode"},
        {"num_heads": 8, "num_queries": 2, "dtype": "f16", "page": 128, "b": [3, 16]},
    ]
    path.write_text(json.dumps(entries))
    assert read_problems(path) == [
        (Gemm(576, 7168), 1),
        (Gemm(576, 7168), 64),
        (GroupedGemm(576, 7168, F32, num_groups=4), 8),
        (GroupedGemm(576, 7168, num_groups=4, layout="masked"), 16),
        (of_k_groups(72, 4), 4096),
        (of_k_groups(72, 1, BF16), 64),
        (of_k_groups(72, 1, BF16), 128),
        (of_k_groups(72, 2, b_scale=ScaleBlock(128, 128)), 8),
        (Gemm(72, 64, b_scale=ScaleBlock(1, 128)), 8),
        (GroupedGemm(512, 7168, E4M3, silu(gate) * up, num_groups=4), 8),
        *((MlaDecode(16), b) for b in BATCHES),
        (MlaDecode(8, 2, page=128, dtype=F16), 3),
        (MlaDecode(8, 2, page=128, dtype=F16), 16),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"n": 8, "k": 16, "m": [1], "layout": "ragged"}, "layout is of a grouped GEMM"),
        ({"n": 8, "k": 16, "m": [1], "num_groups": 0}, "num_groups"),
        ({"n": 256, "k": 16, "m": [1], "swiglu": 1}, "swiglu must be a bool, got 1"),
        ({"n": 8, "k": 16, "m": [1], "num_groups": 2, "layout": "round"}, "layout"),
        ({"n": 8, "k": 128, "m": [1], "num_groups": 2, "layout": "k_grouped"}, "k is no choice"),
        ({"n": 8, "m": [1], "layout": "k_grouped"}, "field num_groups is missing"),
        ({**BY_K, "swiglu": True}, "swiglu is no choice of layout k_grouped"),
        ({**BY_K, "out_dtype": "f16"}, "k_grouped adds to D, which must be float32, or sets one"),
        ({**BY_K, "b_scale": "64x128"}, "b_scale has one scale a 64x128 block, must be 1x128 or"),
        ({**BY_K, "b_scale": 128}, 'b_scale must be a text such as "1x128", got 128'),
        (
            {"n": 8, "k": 16, "m": [1], "num_groups": 2, "b_scale": "1x128"},
            "b_scale has one scale a 1x128 block, must be 128x128",
        ),
        ({"num_heads": 16, "m": [1]}, "unknown field m: use name, b, num_heads"),
        ({"num_heads": 16, "b": []}, "b must be a list of extents"),
        ({"num_heads": 129}, "num_heads = 129 must be in 1..128"),
        ({"num_heads": 16, "dtype": 3}, "dtype must be a name, got 3"),
    ],
)
def test_read_problems_rejects(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(ProblemError, match=f"entry 0: .*{message}"):
        read_problems(path)
