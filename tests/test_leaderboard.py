from __future__ import annotations

import csv
import math
import random
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from scipy import stats

from rtdetr_act.study.leaderboard import LeaderboardRow, build_leaderboard, choose_metric
from rtdetr_act.study.leaderboard_tables import encode_leaderboard
from rtdetr_act.study.run_record import RunRecord

STOCK, ARELU, MISH = [0.50, 0.52, 0.53], [0.53, 0.553, 0.559], [0.51, 0.50, 0.55]


def write(lines: list[LeaderboardRow], folder: Path, metric: str) -> list[Path]:
    contents = encode_leaderboard(lines, metric)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def run(variant: str, seed: int, score: float | None, **more: object) -> RunRecord:
    scores = {} if score is None else {"mAP50-95": score, "mAP50": score + 0.3}
    state = "done" if scores else "failed"
    fields = {"activation": variant, "setting": "", "parameters": 1000, "gflops_640": 2.5, "sites": 7, **more}
    return RunRecord(
        name=f"{variant}-s{seed}", variant=variant, seed=seed, **{"state": state, "scores": scores, **fields}
    )


def runs(variant: str, scores: list[float], **more: object) -> list[RunRecord]:
    return [run(variant, seed, score, **more) for seed, score in enumerate(scores)]


@pytest.fixture
def study() -> list[RunRecord]:
    return [*runs("stock", STOCK), *runs("arelu", ARELU), *runs("mish", MISH), run("dyrelu_b", 0, None)]


def test_lines_best_first_with_the_right_figures(study):
    lines = build_leaderboard(study, baseline="stock", latencies={"mish": 4.5})
    assert [line.variant for line in lines] == ["arelu", "mish", "stock", "dyrelu_b"]
    arelu, mish, stock, dyrelu = lines
    assert [line.is_baseline for line in lines] == [False, False, True, False]
    assert stock.comparison is None and dyrelu.comparison is None
    assert arelu.summary.mean == pytest.approx(sum(ARELU) / 3)
    assert arelu.other_scores == pytest.approx({"mAP50": sum(ARELU) / 3 + 0.3})
    assert (mish.latency_ms, arelu.latency_ms, arelu.parameters, arelu.gflops_640, arelu.sites) == (
        4.5,
        None,
        1000,
        2.5,
        7,
    )
    assert (dyrelu.failed, dyrelu.summary.runs, dyrelu.parameters) == (1, 0, 1000)
    ps = [stats.ttest_rel(each, STOCK).pvalue for each in (ARELU, MISH)]
    assert [line.comparison.p for line in (arelu, mish)] == pytest.approx(ps)
    assert [line.comparison.p_holm for line in (arelu, mish)] == pytest.approx([2 * ps[0], ps[1]])
    assert [line.comparison.verdict for line in (arelu, mish)] == ["better", "no difference shown"]


def test_only_seeds_that_both_finished_are_paired(study):
    # stock lacks seed 1, arelu has one more; a pairing by position would take the wrong ones
    changed = [record for record in study if (record.variant, record.seed) != ("stock", 1)]
    lines = build_leaderboard([*changed, run("arelu", 7, 0.9)], baseline="stock")
    arelu = next(line for line in lines if line.variant == "arelu")
    assert (arelu.summary.runs, arelu.comparison.pairs) == (4, 2)
    assert arelu.comparison.difference == pytest.approx((0.53 - 0.50 + 0.559 - 0.53) / 2)


def test_runs_without_a_score_are_counted_only():
    records = [*runs("stock", STOCK), *runs("arelu", ARELU[:1]), run("arelu", 1, None)]
    records += [run("arelu", seed, 0.1, state=state) for seed, state in ((2, "stopped"), (3, "unfinished"))]
    arelu = build_leaderboard(records, baseline="stock")[0]
    assert (arelu.variant, arelu.summary.runs, arelu.summary.mean) == ("arelu", 1, 0.53)
    assert (arelu.failed, arelu.stopped, arelu.unfinished, arelu.comparison.pairs) == (1, 1, 1, 1)


def test_each_setting_has_its_own_baseline():
    records = [
        run(f"{activation} lr0={rate}", seed, score + seed / 100, activation=activation, setting=f"lr0={rate}")
        for activation, rate, score in (("stock", 1, 0.5), ("arelu", 1, 0.6), ("stock", 2, 0.2), ("arelu", 2, 0.25))
        for seed in range(3)
    ]
    lines = {line.variant: line for line in build_leaderboard(records, baseline="stock")}
    assert lines["arelu lr0=1"].comparison.difference == pytest.approx(0.1)
    assert lines["arelu lr0=2"].comparison.difference == pytest.approx(0.05)
    assert lines["stock lr0=2"].comparison is None


def test_without_one_baseline_nothing_is_compared(study):
    assert not any(line.comparison or line.is_baseline for line in build_leaderboard(study, baseline="gelu"))
    twice = [*study, *runs("stock again", STOCK, activation="stock")]
    assert not any(line.comparison for line in build_leaderboard(twice, baseline="stock"))


def test_of_one_seed_the_first_run_counts():
    again = [replace(run("arelu", 0, 0.9), name=name) for name in ("z", "b")]
    failed = replace(run("arelu", 0, None), name="a")
    (line,) = build_leaderboard([again[0], failed, replace(again[1], scores={"mAP50-95": 0.4})], baseline="stock")
    assert (line.summary.runs, line.summary.mean, line.failed) == (1, 0.4, 1)


def test_seconds_per_epoch_where_known():
    times = [run("arelu", seed, 0.5, seconds_per_epoch=value) for seed, value in enumerate((2.0, math.nan, 4.0))]
    assert build_leaderboard(times, baseline="stock")[0].seconds_per_epoch == 3.0
    assert math.isnan(build_leaderboard(times[1:2], baseline="stock")[0].seconds_per_epoch)


def test_classification_is_ranked_by_top1(tmp_path):
    records = [
        RunRecord(f"{name}-{seed}", name, name, "", seed, "done", scores={"top1": top1 + seed / 50, "top5": 0.9})
        for name, top1 in (("stock", 0.5), ("arelu", 0.6))
        for seed in range(2)
    ]
    assert choose_metric(records) == "top1" and choose_metric([]) == "mAP50-95"
    write(build_leaderboard(records, baseline="stock"), tmp_path, "top1")
    frame = pl.read_parquet(tmp_path / "leaderboard.parquet")
    assert frame["top1"].to_list() == pytest.approx([0.61, 0.51]) and frame["top5"].to_list() == [0.9, 0.9]


def test_files_agree(study, tmp_path):
    lines = build_leaderboard(study, baseline="stock", latencies={"stock": 1.23456789})
    paths = write(lines, tmp_path, "mAP50-95")
    assert sorted(paths) == sorted(tmp_path.iterdir())
    frame = pl.read_parquet(tmp_path / "leaderboard.parquet")
    with (tmp_path / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == frame["variant"].to_list() == [line.variant for line in lines]
    for row, full in zip(rows, frame.iter_rows(named=True), strict=True):
        for name, value in full.items():
            if value is None:
                assert row[name] == ""
            elif isinstance(value, float):
                assert float(row[name]) == float(f"{value:.6g}")
            else:
                assert row[name] == (str(value).lower() if isinstance(value, bool) else str(value))
    assert frame["mAP50-95"].to_list() == [None if math.isnan(x.summary.mean) else x.summary.mean for x in lines]
    assert frame["p_holm"].to_list()[:2] == [line.comparison.p_holm for line in lines[:2]]
    assert frame["latency_ms"].to_list() == [None, None, 1.23456789, None]
    assert not frame.select(pl.col(pl.Float64).is_nan().any()).to_numpy().any()


def test_markdown_says_what_must_be_known(study, tmp_path):
    write(build_leaderboard(study, baseline="stock"), tmp_path, "mAP50-95")
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("|")}
    assert {row.count("|") for row in rows.values()} == {11}
    titles = [title.strip() for title in rows["variant"].split("|")]
    assert rows["arelu"].split("|")[titles.index("GFLOPs (640)")].strip() == "2.50" and "640 x 640 pixels" in text
    assert "| 3 | 0.547 ± 0.015 [0.509, 0.585] | +0.031 [+0.023, +0.038] | 0.003 |" in rows["arelu"]
    assert rows["arelu"].split("|")[6].strip() == "better" and "| baseline |" in rows["stock"]
    assert "| 0 of 1 |  |  |  | not compared |" in rows["dyrelu_b"]
    assert "nan" not in text and "Holm for 2 comparisons" in text and "does not mean equal" in text
    assert "1 failed" in text


def test_markdown_without_comparisons(tmp_path):
    write(build_leaderboard(runs("a|b", [0.5]), baseline="stock"), tmp_path, "mAP50-95")
    text = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    assert "| a\\|b | 1 | 0.500 |" in text and "Nothing is compared" in text and "failed" not in text


def test_empty_study(tmp_path):
    assert build_leaderboard([], baseline="stock") == []
    write([], tmp_path, "mAP50-95")
    assert pl.read_parquet(tmp_path / "leaderboard.parquet").height == 0


def test_same_records_in_any_order_give_the_same_bytes(study, tmp_path):
    seen: set[tuple[bytes, ...]] = set()
    for number in range(5):
        folder: Path = tmp_path / str(number)
        folder.mkdir()
        random.Random(number).shuffle(study)
        seen.add(
            tuple(path.read_bytes() for path in write(build_leaderboard(study, baseline="stock"), folder, "mAP50-95"))
        )
    assert len(seen) == 1
