"""Extents as the command line takes them; the rest is tested through the commands."""

from __future__ import annotations

import pytest

from jitgen.errors import ProblemError
from jitgen.problem_list import parse_extents


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
