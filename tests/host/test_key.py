"""Kernel keys: what changes them and, more often got wrong, what does not."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from jitgen.errors import CompileError, StoreError
from jitgen.runtime.key import KernelKey, make_key

SOURCE = '#include "b.cuh"\n#include "a.cuh"\n'
HEADERS = {"a.cuh": "int a;\n", "b.cuh": "int b;\n", "unused.cuh": "int c;\n"}
OPTIONS = ("--gpu-architecture=sm_90a", "-std=c++17")
KEY = make_key(SOURCE, HEADERS, OPTIONS, "13.0.88", "sm_90a")

OTHER_FIELDS = {
    "source_sha256": "0" * 64,
    "headers": (("a.cuh", "0" * 64), KEY.headers[1]),
    "options": (*OPTIONS, "-lineinfo"),
    "compiler_version": "13.0.89",
    "arch": "sm_100a",
}


def test_make_key_hashes_contents() -> None:
    assert KEY.source_sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert KEY.headers == tuple(
        (name, hashlib.sha256(HEADERS[name].encode()).hexdigest()) for name in ("a.cuh", "b.cuh")
    )


def test_digest_is_that_of_the_canonical_json() -> None:
    text = json.dumps(KEY.to_json(), sort_keys=True, separators=(",", ":"))
    assert KEY.digest == hashlib.sha256(text.encode()).hexdigest()


def test_digest_does_not_change_between_versions_of_jitgen() -> None:
    # A store outlives the process: if this digest changes, every user compiles everything again.
    key = KernelKey("1" * 64, (("a.cuh", "2" * 64),), ("-x",), "13.0.88", "sm_90a")
    assert key.digest == "61ee116c35f1619032a1b764b472b6efcbdd1003497f3c223109cef5f2fa2199"


def test_make_key_ignores_header_order_and_headers_not_included() -> None:
    turned = dict(reversed(HEADERS.items()))
    turned["unused.cuh"] = "int changed;\n"
    assert make_key(SOURCE, turned, list(OPTIONS), "13.0.88", "sm_90a") == KEY


def test_make_key_is_the_same_in_another_process_and_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from jitgen.runtime.key import make_key;"
        f"print(make_key({SOURCE!r}, {HEADERS!r}, {OPTIONS!r}, '13.0.88', 'sm_90a').digest)"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {script}"],
        cwd=tmp_path,
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == KEY.digest


def test_make_key_rejects_unknown_include() -> None:
    with pytest.raises(CompileError, match=r"b\.cuh"):
        make_key(SOURCE, {"a.cuh": ""}, OPTIONS, "13.0.88", "sm_90a")


def test_make_key_changes_with_one_byte_of_an_included_header() -> None:
    changed = make_key(SOURCE, HEADERS | {"b.cuh": "int B;\n"}, OPTIONS, "13.0.88", "sm_90a")
    assert changed.digest != KEY.digest
    values = (KEY.headers[1][1], changed.headers[1][1])
    assert KEY.differences(changed) == {"headers[b.cuh]": values}


def test_every_field_has_a_sensitivity_case() -> None:
    assert set(OTHER_FIELDS) == {field.name for field in fields(KernelKey)}


@pytest.mark.parametrize("name", OTHER_FIELDS)
def test_digest_depends_on_every_field(name: str) -> None:
    other = replace(KEY, **{name: OTHER_FIELDS[name]})
    assert other.digest != KEY.digest
    assert [difference.partition("[")[0] for difference in KEY.differences(other)] == [name]


def test_digest_depends_on_the_order_of_options() -> None:
    assert replace(KEY, options=OPTIONS[::-1]).digest != KEY.digest


def test_digest_tells_options_from_their_concatenation() -> None:
    joined = replace(KEY, options=(" ".join(OPTIONS),))
    assert joined.digest != KEY.digest


def test_differences_of_equal_keys_are_none() -> None:
    assert KEY.differences(replace(KEY)) == {}


def test_differences_name_headers_added_and_removed() -> None:
    other = replace(KEY, headers=(("a.cuh", KEY.headers[0][1]), ("c.cuh", "3" * 64)))
    b = KEY.headers[1][1]
    assert KEY.differences(other) == {
        "headers[b.cuh]": (b, "none"),
        "headers[c.cuh]": ("none", "3" * 64),
    }
    swapped = {name: values[::-1] for name, values in KEY.differences(other).items()}
    assert other.differences(KEY) == swapped


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (("-a", "-b"), ("-a", "-c", "-d"), ("-b", "-c -d")),
        (("-a", "-b"), ("-a",), ("-b", "none")),
        (("-a", "-b"), ("-b", "-a"), ("-a -b", "-b -a")),
    ],
    ids=["changed", "removed", "another order"],
)
def test_differences_name_the_options(
    ours: tuple[str, ...], theirs: tuple[str, ...], values: tuple[str, str]
) -> None:
    differences = replace(KEY, options=ours).differences(replace(KEY, options=theirs))
    assert differences == {"options": values}


def test_json_round_trip() -> None:
    restored = KernelKey.from_json(json.loads(json.dumps(KEY.to_json())))
    assert restored == KEY
    assert restored.digest == KEY.digest


@pytest.mark.parametrize(
    "change",
    [
        {"arch": 90},
        {"source_sha256": None},
        {"compiler_version": ["13"]},
        {"options": "-x"},
        {"options": [1]},
        {"headers": {"a.cuh": "0"}},
        {"headers": [["a.cuh"]]},
        {"headers": [["a.cuh", 1]]},
        {"headers": ["ab"]},
        {"extra": 1},
    ],
    ids=str,
)
def test_from_json_rejects_other_types_and_fields(change: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="kernel key"):
        KernelKey.from_json(KEY.to_json() | change)


@pytest.mark.parametrize("missing", [field.name for field in fields(KernelKey)])
def test_from_json_rejects_missing_fields(missing: str) -> None:
    data = KEY.to_json()
    del data[missing]
    with pytest.raises(StoreError, match=missing):
        KernelKey.from_json(data)


@pytest.mark.parametrize("data", [None, [], "key", 1])
def test_from_json_rejects_what_is_no_object(data: object) -> None:
    with pytest.raises(StoreError, match=re.escape(repr(data))):
        KernelKey.from_json(data)
