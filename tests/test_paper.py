"""Files of a study for a paper: what a reader would take from them is what the leaderboard says."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from records import make_folder
from test_study_bootstrap import fill

from rtdetr_act.cli.study import report
from rtdetr_act.errors import InputError
from rtdetr_act.evaluation.bootstrap import Scores
from rtdetr_act.evaluation.detection_files import RunScores, read_scores
from rtdetr_act.study import charts
from rtdetr_act.study.latex import escape_latex
from rtdetr_act.study.leaderboard import LeaderboardRow, build_leaderboard
from rtdetr_act.study.paper import make_run_frame
from rtdetr_act.study.paper_figures import draw_cost, draw_differences, draw_training
from rtdetr_act.study.paper_table import format_latex_table
from rtdetr_act.study.paper_text import write_methods
from rtdetr_act.study.pareto import LATENCY, find_front
from rtdetr_act.study.report import report_study
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.study.storage import PAPER_FILES

STOCK, ARELU, MISH = [0.50, 0.52, 0.53], [0.53, 0.553, 0.559], [0.51, 0.50, 0.55]
ARGUMENTS = {"model": "rtdetr-n.yaml", "data": "bccd.yaml", "epochs": 30, "imgsz": 160}


def make_run(variant: str, seed: int, score: float | None, **more: Any) -> RunRecord:
    scores = {} if score is None else {"mAP50-95": score, "mAP50": score + 0.3}
    fields = {
        "activation": variant, "setting": "", "state": "done" if scores else "failed", "scores": scores,
        "parameters": 32_812_345, "gflops_640": 103.44, "folder": Path(f"{variant}-s{seed}"),
        "arguments": {**ARGUMENTS, "seed": seed}, "versions": {"ultralytics": "8.4.190", "torch": "2.8.0"},
    }  # fmt: skip
    return RunRecord(name=f"{variant}-s{seed}", variant=variant, seed=seed, **{**fields, **more})


def make_runs(variant: str, scores: Sequence[float], **more: Any) -> list[RunRecord]:
    return [make_run(variant, seed, score, **more) for seed, score in enumerate(scores)]


def make_scores(records: Sequence[RunRecord], shifts: dict[str, float], sizes: float = 0.1) -> dict[Path, RunScores]:
    """Return scores as COCO would have them of runs, moved by an amount for each variant, with a little noise."""
    rng = np.random.default_rng(0)
    shared, influences = rng.normal(0, 0.01, (7, 100)), rng.normal(0, 0.001, (7, 40))
    found = {}
    for record in records:
        score = 0.4 + shifts[record.variant] + 0.001 * record.seed
        observed = np.array([score, score + 0.3, score + 0.1, math.nan, sizes, score + 0.2, score])
        own = rng.normal(0, 0.001, shared.shape)
        noise = rng.normal(0, 0.0001, influences.shape)
        found[record.folder] = RunScores(
            Scores(observed, observed[:, None] + shared + own, influences + noise), ("cell",), "digest"
        )
    return found


def format_table(records: Sequence[RunRecord], metric: str = "mAP50-95", **more: Any) -> str:
    return format_latex_table(build_leaderboard(records, baseline="stock", **more), records, metric=metric)


def list_lines(table: str) -> list[str]:
    """Return the rows below the header."""
    body = table.split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    return [line.removesuffix(r" \\") for line in body.splitlines() if line.endswith(r"\\")]


def describe(table: str) -> str:
    """Return caption and notes as one line each."""
    return " ".join(table.split())


@pytest.fixture
def study() -> list[RunRecord]:
    return [*make_runs("stock", STOCK), *make_runs("arelu", ARELU), *make_runs("mish", MISH)]


# --- the table ------------------------------------------------------------------------------------------------------


def test_cells_are_percent_with_the_best_in_bold_and_the_baseline_first(study: list[RunRecord]) -> None:
    table = format_table([*study, make_run("dyrelu_b", 0, None)], latencies={"stock": 4.5, "arelu": 5.125})
    assert table.startswith("% Needs \\usepackage{booktabs}")
    assert list_lines(table) == [
        r"stock & 3 & 51.7 & ${}\pm 1.5$ & 81.7 & 32.81 & 103.44 & 4.50",
        r"arelu & 3 & \textbf{54.7} & ${}\pm 1.5^{\uparrow\dagger}$ & \textbf{84.7} & 32.81 & 103.44 & 5.12",
        r"mish & 3 & 52.0 & ${}\pm 2.6$ & 82.0 & 32.81 & 103.44 & --",
        r"dyrelu\_b & 0 & -- &  & -- & 32.81 & 103.44 & --",
    ]
    header = table.split(r"\toprule")[1].split(r"\midrule")[0].strip().splitlines()
    assert header == [
        r"&  & \multicolumn{3}{c}{mAP} & Params & GFLOPs & Latency \\",
        r"\cmidrule(lr){3-5}",
        r"Activation & Seeds & \multicolumn{2}{c}{50--95} & 50 & (M) & (640) & (ms) \\",
    ]
    text = describe(table)
    assert "Activations of rtdetr-n, trained on bccd for 30 epochs at 160 pixels." in text
    assert r"means over 3 seeds (0, 1 and 2), $\pm$ the standard deviation for mAP" in text
    assert "IoU thresholds from 0.50 to 0.95" in text and "1 failed" in text
    assert "mAP and mAP$_{50}$: by Ultralytics' validation of the best checkpoint" in text
    assert (
        r"$\uparrow$ better than the baseline (stock), $p < 0.05$ after Holm's correction: $\dagger$ by a paired "
        "$t$-test over seeds (2 comparisons)."
    ) in text
    assert "ddagger" not in text and "COCO" not in text


def test_marks_follow_the_corrected_verdict(study: list[RunRecord]) -> None:
    # arelu alone has p = 0.0016; among enough others without a difference, Holm's correction takes it above 0.05.
    others = [run for number in range(40) for run in make_runs(f"other{number}", [0.5 + 0.001 * number, 0.51, 0.54])]
    rows = build_leaderboard([*study, *others], baseline="stock")
    (arelu,) = [row for row in rows if row.variant == "arelu"]
    assert arelu.comparison and arelu.comparison.p < 0.05 < arelu.comparison.p_holm
    table = format_table([*study, *others])
    assert r"\dagger" not in "".join(list_lines(table))
    assert (
        "No difference to the baseline (stock) is shown with $p < 0.05$ after Holm's correction by a paired $t$-test "
        "over seeds (42 comparisons)."
    ) in describe(table)


def test_a_worse_variant_has_an_arrow_down(study: list[RunRecord]) -> None:
    worse = make_runs("relu", [score - 0.03 - 0.001 * seed for seed, score in enumerate(STOCK)])
    table = format_table([*study, *worse])
    (line,) = [line for line in list_lines(table) if line.startswith("relu")]
    assert r"${}\pm 1.4^{\downarrow\dagger}$" in line and r"\textbf" not in line
    assert r"$\uparrow$ better, $\downarrow$ worse than the baseline (stock)" in describe(table)


def test_scores_that_print_alike_are_all_bold(study: list[RunRecord]) -> None:
    alike = make_runs("gelu", [score + 0.0001 for score in ARELU])
    bold = [line.split(" & ")[0] for line in list_lines(format_table([*study, *alike])) if r"& \textbf{54.7} &" in line]
    assert sorted(bold) == ["arelu", "gelu"]
    assert r"\textbf" not in "".join(list_lines(format_table(make_runs("stock", STOCK)))), "nothing to be better than"


def test_scores_of_coco_and_what_both_tests_show(study: list[RunRecord]) -> None:
    records = [replace(run, precision=0.8 + 0.01 * run.seed, recall=0.75) for run in study]
    scores = make_scores(records, {"stock": 0.0, "arelu": 0.05, "mish": -0.05})
    table = format_table(records, scores=scores)
    assert list_lines(table) == [
        r"stock & 3 & 51.7 & ${}\pm 1.5$ & 81.7 & 50.1 & \textbf{10.0} & 60.1 & \textbf{81.0} & \textbf{75.0} & 32.81 "
        "& 103.44",
        r"arelu & 3 & \textbf{54.7} & ${}\pm 1.5^{\uparrow\dagger\ddagger}$ & \textbf{84.7} & \textbf{55.1} & "
        r"\textbf{10.0} & \textbf{65.1} & \textbf{81.0} & \textbf{75.0} & 32.81 & 103.44",
        r"mish & 3 & 52.0 & ${}\pm 2.6^{\downarrow\ddagger}$ & 82.0 & 45.1 & \textbf{10.0} & 55.1 & \textbf{81.0} & "
        r"\textbf{75.0} & 32.81 & 103.44",
    ], "small objects, of which there are none, have no column"
    text = describe(table)
    assert "mAP, mAP$_{50}$, P and R: by Ultralytics' validation" in text
    assert r"mAP$_{75}$, mAP$_\mathrm{M}$ and mAP$_\mathrm{L}$: as COCO computes them" in text
    assert r"$\ddagger$ by a paired bootstrap over images with the variance between seeds, of COCO's mAP (2" in text


def test_tests_that_disagree_are_both_marked(study: list[RunRecord]) -> None:
    scores = make_scores(study, {"stock": 0.0, "arelu": -0.05, "mish": 0.0})
    (line,) = [line for line in list_lines(format_table(study, scores=scores)) if line.startswith("arelu")]
    assert r"^{\uparrow\dagger\downarrow\ddagger}$" in line


def test_one_seed_has_no_deviation_and_no_test() -> None:
    table = format_table([make_run("stock", 0, 0.5), make_run("arelu", 0, 0.6)])
    assert list_lines(table)[1] == r"arelu & 1 & \textbf{60.0} & \textbf{90.0} & 32.81 & 103.44"
    assert r"\pm" not in table and "No difference was tested" in describe(table)


def test_settings_stand_in_blocks_each_with_its_best() -> None:
    records = [
        run
        for rate, scores in (("0.01", STOCK), ("0.02", ARELU))
        for shift, activation in ((0.0, "stock"), (-0.1, "arelu"))
        for run in make_runs(
            f"{activation} lr0={rate}",
            [score + shift for score in scores],
            activation=activation,
            setting=f"lr0={rate}",
        )
    ]
    table = format_table(records)
    names = [line.split(" & ")[0].replace(r"\raggedright ", "") for line in list_lines(table)]
    assert names == ["stock lr0=0.02", "arelu lr0=0.02", "stock lr0=0.01", "arelu lr0=0.01"]
    assert table.count(r"\midrule") == 2 and "best of each column in each block" in describe(table)
    assert [r"\textbf" in line for line in list_lines(table)] == [True, False, True, False]


def test_classification_has_its_own_columns() -> None:
    records = [
        make_run(name, seed, None, state="done", scores={"top1": top1 + seed / 50, "top5": 0.9}, parameters=0)
        for name, top1 in (("stock", 0.5), ("arelu", 0.6))
        for seed in range(2)
    ]
    table = format_table(records, "top1")
    assert list_lines(table) == [
        r"stock & 2 & 51.0 & ${}\pm 1.4$ & \textbf{90.0} & 103.44",
        r"arelu & 2 & \textbf{61.0} & ${}\pm 1.4$ & \textbf{90.0} & 103.44",
    ]
    assert r"Activation & Seeds & \multicolumn{2}{c}{Top-1} & Top-5 & (640) \\" in table
    assert "mAP" not in table and "Params" not in table
    rows = build_leaderboard(records, baseline="stock")
    assert "mAP" not in write_methods(rows, records, {}, metric="top1")


def test_seeds_that_divide_the_images_are_named(study: list[RunRecord]) -> None:
    records = [replace(run, validation_share=0.25) for run in study]
    scores = make_scores(records, {"stock": 0.0, "arelu": 0.05, "mish": -0.05})
    rows = build_leaderboard(records, baseline="stock", scores=scores)
    assert {round(row.coco_scores["mAP75"], 3) for row in rows} == {0.501, 0.551, 0.451}
    for text in (format_table(records, scores=scores), write_methods(rows, records, scores, metric="mAP50-95")):
        assert "Nadeau and Bengio, 2003" in describe(text) and "bootstrap" not in text


# --- LaTeX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        (r"a_b%c&d#e$f", r"a\_b\%c\&d\#e\$f"),
        (r"{\}~^", r"\{\textbackslash{}\}\textasciitilde{}\textasciicircum{}"),
        ("0.5 ± 0.1 → α, Λ", r"0.5 $\pm$ 0.1 $\rightarrow$ $\alpha$, $\Lambda$"),
        ("a--b ''c", "a-{}-b '{}'c"),
        ("[x]*", "{[}x{]}{*}"),
        ("é ç ñ Å", r"\'{e} \c{c} \~{n} \r{A}"),
        ("激活", "{[}U+6FC0{]}{[}U+6D3B{]}"),
        ("", ""),
    ],
)
def test_text_is_escaped(text: str, escaped: str) -> None:
    assert escape_latex(text) == escaped


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40).filter(str.isprintable))
@example("{")
@example("\\")
@example("a & b \\\\ c")
@example("e\u0301\u0323")
def test_any_name_makes_a_table(name: str) -> None:
    table = format_table([*make_runs("stock", STOCK), *make_runs(f"{name}x", ARELU)])
    assert table.isascii()
    bare = re.sub(r"\\.", "", table, flags=re.DOTALL)  # without commands' first letters and escaped signs
    depths = np.cumsum([{"{": 1, "}": -1}.get(char, 0) for char in bare])
    assert depths[-1] == 0 and depths.min() == 0
    assert bare.count("$") % 2 == 0
    assert {len(re.findall(r"(?<!\\)&", line)) for line in list_lines(table)} == {6}


HOSTILE = r"a_b%c &d#e {f} \g~h ^i$j" + '"<> |[*]` ± → × ² αé 激--'


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="compiling the table takes pdflatex, of TeX Live or MiKTeX"
)
@pytest.mark.parametrize("options", ["", "twocolumn"])
def test_the_table_compiles_with_booktabs_alone(study: list[RunRecord], options: str, tmp_path: Path) -> None:
    shifts = {"stock": 0.0, "arelu": 0.05, "mish": -0.05, "dyrelu_b@backbone, dyrelu_c@neck": 0.0}
    records = [*study, *make_runs("dyrelu_b@backbone, dyrelu_c@neck", [each + 0.01 for each in MISH])]
    records = [replace(run, precision=0.8, recall=0.75) for run in records]
    scores = make_scores(records, shifts)
    for found in scores.values():
        found.scores.observed[3] = 0.2
    records += [*make_runs(HOSTILE, ARELU), *make_runs("leaky_relu(negative_slope=0.01)", ARELU)]
    rows = build_leaderboard(records, baseline="stock", latencies=dict.fromkeys(shifts, 12.5), scores=scores)
    (tmp_path / "table.tex").write_text(format_latex_table(rows, records, metric="mAP50-95"), encoding="ascii")
    (tmp_path / "methods.tex").write_text(write_methods(rows, records, scores, metric="mAP50-95"), encoding="ascii")
    page = rf"\documentclass[{options}]{{article}}\usepackage{{booktabs}}\begin{{document}}"
    (tmp_path / "paper.tex").write_text(page + r"\input{table}\sloppy\input{methods}\end{document}", encoding="ascii")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "paper.pdf").is_file(), done.stdout[-2000:]
    assert "Overfull" not in done.stdout and "Missing character" not in done.stdout


# --- the methods section, and the runs ------------------------------------------------------------------------------


def test_methods_say_what_was_done(study: list[RunRecord]) -> None:
    scores = make_scores(study, {"stock": 0.0, "arelu": 0.05, "mish": -0.05})
    rows = build_leaderboard(study, baseline="stock", scores=scores)
    assert describe(write_methods(rows, study, scores, metric="mAP50-95")) == (
        r"% For the methods section. Needs no package. We compared 3 activations (\texttt{stock}, \texttt{arelu} and "
        r"\texttt{mish}) of rtdetr-n, trained on bccd for 30 epochs at 160 pixels, with 3 seeds (0, 1 and 2): 9 runs. "
        "Differences in mAP to stock were tested by a paired $t$-test over the seeds. Differences to stock in mAP as "
        "COCO defines it were tested by a paired bootstrap over the 40 validation images (100 resamples, average "
        "precision computed anew in each) with the variance between training seeds added to the standard error. The "
        "$p$-values and intervals of each test were corrected by Holm's procedure for 2 comparisons. Differences with "
        "$p < 0.05$ are called significant. Software: Ultralytics 8.4.190 and PyTorch 2.8.0."
    )
    lost = [*study[:-1], replace(study[-1], state="failed", scores={}, arguments={**ARGUMENTS, "imgsz": None})]
    text = describe(write_methods(build_leaderboard(lost, baseline="stock"), lost, {}, metric="mAP50-95"))
    assert "at 160 and 640 pixels" in text and "9 runs, 8 of which finished" in text and "bootstrap" not in text


def test_every_number_of_every_run_is_in_a_file(tmp_path: Path) -> None:
    folder = fill(tmp_path / "study", {"stock": 0.2, "arelu": 0.1})
    report_study(folder, latex=True)
    frame = pl.read_csv(folder / "paper" / "runs.csv", infer_schema_length=None)
    assert frame["run"].to_list() == ["arelu-s0", "arelu-s1", "stock-s0", "stock-s1"]
    record = read_runs(folder)[0]
    first = frame.row(0, named=True)
    assert first["mAP50-95"] == record.scores["mAP50-95"] and first["AP circle"] == 0.5
    assert (first["precision"], first["recall"]) == (record.precision, record.recall)
    scores = read_scores(folder / "runs" / "arelu-s0" / "scores.npz")
    assert scores and first["COCO mAP75"] == scores.scores.observed[2], "in full precision"
    assert [name for name in frame.columns if name.startswith("COCO AP ")] == [
        f"COCO AP {name}" for name in scores.categories
    ]
    assert (first["argument model"], first["argument epochs"], first["version torch"]) == ("rtdetr-n.yaml", 2, 2.4)
    (folder / "runs" / "arelu-s0" / "result.json").unlink()
    lines = make_run_frame(read_runs(folder), {}).rows(named=True)
    assert lines[0]["state"] == "failed" and lines[0]["reason"] == "killed by SIGKILL"
    assert lines[0]["mAP50-95"] is None and lines[0]["parameters"] is None and lines[1]["parameters"] == 1000


# --- the files ------------------------------------------------------------------------------------------------------


def test_a_report_writes_them_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "study")
    report_study(folder)
    assert not (folder / "paper").exists()
    report(str(folder), latex=True)
    assert sorted(path.name for path in (folder / "paper").iterdir()) == sorted(PAPER_FILES)
    assert all(f"file: {folder / 'paper' / name}" in capsys.readouterr().out for name in PAPER_FILES[:1])
    written = {path: path.read_bytes() for path in (folder / "paper").iterdir()}
    assert all(content.startswith(b"%PDF") for path, content in written.items() if path.suffix == ".pdf")
    assert set(report_study(folder, latex=True).files) > set(written)
    assert written == {path: path.read_bytes() for path in (folder / "paper").iterdir()}, "the same each time"
    for path in folder.glob("runs/*/results.csv"):
        path.unlink()
    report_study(folder, latex=True)
    assert not (folder / "paper" / "training.pdf").exists(), "nothing to show, not even that of before"


@pytest.mark.parametrize("obstacle", ["paper", "paper/table.tex/x"])
def test_where_one_cannot_be_written_none_is(obstacle: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "study")
    path = folder / obstacle
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=r"is a file|is not a file"):
        report_study(folder, latex=True)
    assert not (folder / "report.html").exists() and path.read_text() == "mine"
    report_study(folder)


# --- the figures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[list[LeaderboardRow], dict[str, list[RunRecord]]]:
    records = []
    for name, scores in (("stock", STOCK), ("arelu", ARELU), ("mish", MISH)):
        for run in make_runs(name, scores):
            folder = tmp_path / run.name
            folder.mkdir()
            lines = [f"{epoch},1.0,{run.scores['mAP50-95'] * epoch / 3}" for epoch in (1, 2, 3)]
            (folder / "results.csv").write_text("\n".join(["epoch,train/loss,metrics/mAP50-95(B)", *lines, ""]))
            records.append(replace(run, folder=folder))
    rows = build_leaderboard(records, baseline="stock", latencies={"stock": 4.5, "arelu": 5.5})
    return rows, {name: [run for run in records if run.variant == name] for name in ("stock", "arelu", "mish")}


def test_differences_are_those_of_the_page(drawn: tuple[list[LeaderboardRow], dict[str, list[RunRecord]]]) -> None:
    rows, runs = drawn
    styles = charts.assign_styles(rows)
    figure = draw_differences(rows, runs, styles, "mAP50-95")
    assert figure
    (axes,) = figure.axes
    page = charts.draw_differences(rows, runs, styles, "mAP50-95").traces
    seeds = [line.get_xdata().tolist() for line in axes.lines if line.get_fillstyle() == "none"]
    assert seeds == [trace["x"] for trace in page[::2]]
    intervals = [bars.get_segments()[0][:, 0] for bars in axes.collections]
    compared = [row.comparison for row in rows if row.comparison]
    np.testing.assert_allclose(intervals, [[each.low, each.high] for each in compared])
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o" and line.get_fillstyle() == "full"]
    assert means == [each.difference for each in compared] == [trace["x"][0] for trace in page[1::2]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["arelu", "mish"]
    assert axes.xaxis.get_major_formatter()(-0.015) == "−1.5"
    assert draw_differences([row for row in rows if row.is_baseline], runs, styles, "mAP50-95") is None


def test_the_training_is_that_of_the_page(drawn: tuple[list[LeaderboardRow], dict[str, list[RunRecord]]]) -> None:
    rows, runs = drawn
    styles = charts.assign_styles(rows)
    figure = draw_training(rows, runs, styles, "mAP50-95")
    assert figure
    (axes,) = figure.axes
    page = [trace for trace in charts.draw_training(rows, runs, styles, "mAP50-95")[0].traces if "text" in trace]
    assert [line.get_ydata().tolist() for line in axes.lines] == [trace["y"] for trace in page]
    highest = [band.get_paths()[0].vertices[:, 1].max() for band in axes.collections]
    assert highest == [max(high for _, high in trace["customdata"]) for trace in page]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["arelu", "mish", "stock"]


def test_the_cost_is_latency_then_operations_then_parameters(
    drawn: tuple[list[LeaderboardRow], dict[str, list[RunRecord]]],
) -> None:
    rows, runs = drawn
    styles = charts.assign_styles(rows)
    for known, label, places in (
        (rows, "ms per image", [5.5, 4.5]),
        ([replace(row, latency_ms=None) for row in rows], "GFLOPs at 640 pixels", [103.44] * 3),
        ([replace(row, latency_ms=None, gflops_640=0) for row in rows], "parameters", [32_812_345] * 3),
    ):
        figure = draw_cost(known, runs, styles, "mAP50-95")
        assert figure
        (axes,) = figure.axes
        points = [line for line in axes.lines if line.get_marker() in ("o", "s")]
        assert axes.get_xlabel() == label and [line.get_xdata()[0] for line in points] == places
        assert [line.get_ydata()[0] for line in points] == [
            row.summary.mean for row in known if row.latency_ms or len(places) == 3
        ]
        front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
        members = find_front(known, runs, "mAP50-95", LATENCY).select("front") if len(places) == 2 else []
        if members:
            assert list(zip(*front.get_data(), strict=True)) == [(each.cost, each.score) for each in members]
        filled = {line.get_xdata()[0] for line in points if line.get_markerfacecolor() != "white"}
        assert filled == set(front.get_xdata())
        drawn_rows = [row for row in known if row.latency_ms or not members]
        dots = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "."]
        assert dots == [[run.scores["mAP50-95"] for run in runs[row.variant]] for row in drawn_rows]
    nothing = [replace(row, latency_ms=None, gflops_640=0, parameters=0) for row in rows]
    assert draw_cost(nothing, runs, styles, "mAP50-95") is None


def test_dominated_variants_are_crossed_where_it_can_be_seen(
    drawn: tuple[list[LeaderboardRow], dict[str, list[RunRecord]]],
) -> None:
    rows, runs = drawn
    rows = [replace(row, latency_ms={"stock": 5.5, "arelu": 4.5, "mish": 5.5}[row.variant]) for row in rows]
    assert [point.variant for point in find_front(rows, runs, "mAP50-95", LATENCY).select("dominated")] == ["stock"]
    figure = draw_cost(rows, runs, charts.assign_styles(rows), "mAP50-95")
    assert figure
    lines = figure.axes[0].lines
    (cross,) = [line for line in lines if line.get_marker() == "x"]
    (square,) = [line for line in lines if line.get_marker() == "s"]
    assert cross.get_xydata().tolist() == square.get_xydata().tolist()
    assert square.get_markerfacecolor() == "white" and cross.get_zorder() > square.get_zorder()


def test_many_runs_have_an_interval_and_few_do_not_widen_the_axis() -> None:
    records = [
        *make_runs("stock", [0.50, 0.52, 0.53, 0.51, 0.50]),
        *make_runs("arelu", [0.6, 0.62, 0.61, 0.6, 0.63]),
        *make_runs("mish", MISH[1:]),
    ]
    rows = build_leaderboard(records, baseline="stock")
    runs = {name: [run for run in records if run.variant == name] for name in ("stock", "arelu", "mish")}
    styles = charts.assign_styles(rows)
    figure = draw_cost(rows, runs, styles, "mAP50-95")
    assert figure and len(figure.axes[0].collections) == 2, "mish has two runs, shown one by one"
    figure = draw_differences(rows, runs, styles, "mAP50-95")
    (mish,) = [row.comparison for row in rows if row.variant == "mish"]
    span = charts.draw_differences(rows, runs, styles, "mAP50-95").layout["xaxis"]["range"]
    assert figure and mish and list(figure.axes[0].get_xlim()) == span and mish.low < span[0]
