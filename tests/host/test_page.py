"""`jitgen report`: the cost model's regret, the page's figures, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jitgen import cli
from jitgen.dtypes import F32
from jitgen.problem import Gemm
from jitgen.runtime.store import KernelStore
from jitgen.schedule import Schedule
from jitgen.target import H100
from jitgen.tuning import page, plot, regret
from jitgen.tuning.bench import GRID_DENSE, Baseline, Shape
from jitgen.tuning.model import predict_us
from jitgen.tuning.report import Result
from jitgen.tuning.session import JournalLine, read_journal
from jitgen.tuning.tune import Job, Outcome, Trial

from .test_report import META, row
from .test_session import PROVENANCE, open_session
from .test_store import put

PROBLEM = Gemm(2112, 7168)
GOOD, POOR = Schedule(128, 96, 6), Schedule(64, 16, 4, 1)
TRIALS = (Trial(GOOD, 44.0, 0.2, 6), Trial(POOR, 40.0, 0.1, 40))  # the model is wrong here
JOB = Job(PROBLEM, 512, (GOOD, POOR))
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


def journal(*outcomes: Outcome, folder: Path) -> list[JournalLine]:
    for outcome in outcomes:
        open_session(folder).add(outcome)
    return read_journal(folder)


# --- regret ---------------------------------------------------------------------------------------


def test_journal_reads_back_what_was_added(tmp_path: Path) -> None:
    first, second = journal(
        Outcome(JOB, "measured", "", TRIALS[1], TRIALS, {POOR: "it died"}),
        Outcome(JOB, "failed", "nothing works"),
        folder=tmp_path,
    )
    assert (first.gpu, first.kernels, first.job) == (H100, PROVENANCE.kernels, str(JOB))
    assert (first.trials, first.errors) == (TRIALS, {POOR: "it died"})
    assert (second.status, second.trials, second.errors) == ("failed", (), {})
    assert read_journal(tmp_path / "none") == []


def test_regret_is_the_choice_over_the_fastest(tmp_path: Path) -> None:
    assert predict_us(PROBLEM, GOOD, 512) < predict_us(PROBLEM, POOR, 512)
    (found,) = regret.regrets(
        journal(Outcome(JOB, "measured", "", TRIALS[1], TRIALS), folder=tmp_path)
    )
    assert (found.problem, found.m, found.gpu) == (PROBLEM, 512, H100)
    assert (found.fastest, found.picked) == (TRIALS[1], TRIALS[0])
    assert found.ratio == pytest.approx(1.1)
    assert dict(found.trials)[TRIALS[0]] == predict_us(PROBLEM, GOOD, 512)


def test_regrets_take_the_newest_measured_line_of_each_shape(tmp_path: Path) -> None:
    faster = (replace(TRIALS[0], kernel_us=39.0), TRIALS[1])
    f32 = replace(JOB, problem=replace(PROBLEM, d_dtype=F32), m=64)
    lines = journal(
        Outcome(JOB, "measured", "", TRIALS[1], TRIALS),
        Outcome(JOB, "measured", "", faster[0], faster),
        Outcome(JOB, "unstable", "it moved", None, TRIALS),
        Outcome(f32, "measured", "", TRIALS[1], TRIALS),
        folder=tmp_path,
    )
    assert [(r.problem, r.m, r.ratio) for r in regret.regrets(lines)] == [
        (f32.problem, 64, 1.0),
        (PROBLEM, 512, 1.0),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "grouped-m64-n2112-k7168-bf16"},
        {"job": "m64-n2112-k7168-int4"},
        {"trials": (Trial(Schedule(9, 9, 9), 1.0, 0.1, 6),)},
        {"trials": ()},
    ],
    ids=["family", "dtype", "illegal", "nothing"],
)
def test_regrets_leave_out_what_the_model_does_not_know(changes: dict[str, Any]) -> None:
    line = JournalLine(H100, PROVENANCE.kernels, str(JOB), "measured", TRIALS, {})
    assert len(regret.regrets([line])) == 1
    assert regret.regrets([replace(line, **changes)]) == []


# --- the page -------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """The page as a browser must take it: every element closed, ids once, nothing from outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.urls: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.styles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.urls += [given[name] or "" for name in ("src", "href") if name in given]
        self.styles += [given["style"] or ""] if "style" in given else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs `jitgen report` over a benchmark, records with a journal, and a store of two kernels."""
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "cache"))
    for source in ("// <one>\n", "// two\n"):
        put(KernelStore(), source)
    rows = tuple(
        row(shape, 1.5 * shape.floor_us, 2 * shape.floor_us, Baseline(1.4 * shape.floor_us, 1))
        for shape in GRID_DENSE
    )
    result = Result(replace(META, command="jitgen bench <gemm> & more"), rows)
    (tmp_path / "bench.json").write_text(json.dumps(result.to_json()))
    session = open_session(tmp_path / "records")
    session.add(Outcome(JOB, "measured", "", TRIALS[1], TRIALS))

    def run(*options: str) -> Path:
        arguments = ["report", str(tmp_path / "page.html"), *options]
        arguments = [argument.replace("@", f"{tmp_path}/") for argument in arguments]
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, done.output
        assert "page.html: " in done.stdout
        return tmp_path / "page.html"

    return run


ALL = ("--bench", "@bench.json", "--records", "@records")


def test_report_is_well_formed_and_self_contained(write: Callable[..., Path]) -> None:
    text = write(*ALL).read_text()
    read = Reader(text)
    assert read.ids == [f"section-{i}" for i in range(1, 5)]
    assert all(re.match(r"#section-\d$|data:image/svg\+xml;base64,", url) for url in read.urls)
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "jitgen bench &lt;gemm&gt; &amp; more" in text


def test_report_shows_every_shape_and_what_was_chosen(write: Callable[..., Path]) -> None:
    read = Reader(write(*ALL).read_text())
    by_shape, means, floors, every, schedules, recorded, records, choices, kernels = read.tables
    assert by_shape[0] == ["N, K", *(f"M = {m}" for m in (1, 16, 64, 128, 256, 512, 4096))]
    assert len(by_shape) == 8
    assert all(cells[1:] == ["1.50"] * 7 for cells in by_shape[1:])
    assert means[-1][2] == f"{1.4 / 1.5:.2f}"
    assert floors[-1][:3] == ["all", "1.50", "1.40"]
    assert (len(every), len(schedules)) == (50, 50)
    us = 40.0 / Shape(512, 2112, 7168).floor_us
    assert recorded == [["N, K", "M = 512"], ["n2112-k7168", f"{us:.2f}"]]
    assert records[1][:5] == [str(PROBLEM), str(POOR), "512", "40.00", "0.10"]
    assert choices[1][:2] == [str(POOR), str(GOOD)]
    assert choices[1][-1] == "1.100"
    assert [cells[0] for cells in kernels[1:]] == ["gemm", "gemm"]
    assert kernels[1][3] == "0.250"
    assert f"background: rgba(209, 73, 91, {0.5 / 2:.2f})" in read.styles


def test_report_without_a_benchmark_shows_the_shipped_records(write: Callable[..., Path]) -> None:
    text = write().read_text()
    assert "Tuning records of NVIDIA H100" in text
    assert "Regret of the cost model" not in text
    assert "beside its peers" not in text


def test_report_without_matplotlib_has_tables_and_says_so(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "_draw", lambda paint: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    read = Reader(write(*ALL).read_text())
    assert len(read.tables) == 9
    assert not any(url.startswith("data:") for url in read.urls)


def test_report_rejects_what_is_no_result(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    done = CliRunner().invoke(
        cli.app, ["report", str(tmp_path / "page.html"), "--bench", str(tmp_path / "bench.json")]
    )
    assert done.exit_code == 1
    assert "not a result that this version's" in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_render_page_is_reproducible(tmp_path: Path) -> None:
    section = page.bench_section(Result(META, (row(GRID_DENSE[0], 5.0, 6.0, None),)))
    one, two = (page.render_page([section], version="1") for _ in range(2))
    assert one == two


# --- in a browser ---------------------------------------------------------------------------------

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

# Runs after all pictures are decoded; what it finds is read from the page's title.
PROBE = """
<script>
addEventListener("load", async () => {
  await Promise.all([...document.images].map(image => image.decode()));
  document.title = JSON.stringify({
    mode: document.compatMode,
    pictures: [...document.images].map(image => image.naturalWidth > 0),
    wide: document.documentElement.scrollWidth > innerWidth,
    open: document.querySelectorAll("details[open]").length,
    tables: document.querySelectorAll("table").length,
    loaded: performance.getEntriesByType("resource")
      .filter(entry => !entry.name.startsWith("data:")).length,
  });
});
</script>
"""


@pytest.mark.parametrize("width", [1300, 500])
def test_report_in_headless_chromium(write: Callable[..., Path], width: int) -> None:
    pytest.importorskip("matplotlib")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    path = write(*ALL)
    path.write_text(path.read_text().replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={path.parent}/profile", f"--window-size={width},900"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"),
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found == {
        "mode": "CSS1Compat",
        "pictures": [True] * 5,
        "wide": False,
        "open": 7,
        "tables": 9,
        "loaded": 0,
    }
