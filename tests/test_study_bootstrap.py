"""Detections that the runs of a study keep, and what its report says of other seeds and images."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from records import make_folder
from test_cli import run
from test_compare import draw

from rtdetr_act.cli.study import report
from rtdetr_act.errors import InputError
from rtdetr_act.evaluation.average_precision import compute_average_precision
from rtdetr_act.evaluation.bootstrap import (
    Components,
    combine_components,
    compare_over_seeds_and_images,
    draw_resamples,
    score_resamples,
)
from rtdetr_act.evaluation.detection_files import encode_detections, encode_scores, read_scores
from rtdetr_act.evaluation.detections import Detections, GroundTruth
from rtdetr_act.evaluation.matching import match_detections
from rtdetr_act.evaluation.statistics import Difference
from rtdetr_act.study import power
from rtdetr_act.study.power import Noise, plan_seeds
from rtdetr_act.study.report import report_study


def name_images(truth: GroundTruth, folder: Path) -> GroundTruth:
    return replace(truth, image_ids=tuple(str(folder / f"{index}.jpg") for index in truth.image_ids))


def fill(folder: Path, noises: dict[str, float]) -> Path:
    """Write a study of two seeds, and the scores of detectors that find boxes with more or less noise."""
    make_folder(folder)
    for path in sorted(folder.glob("runs/*")):
        variant, seed = path.name.split("-s")
        truth, found = draw(40, 2, 160, seed=0, noise=noises[variant])
        moved = np.random.default_rng(int(seed)).normal(0, 1, found.boxes.shape)
        found = replace(found, boxes=np.maximum(found.boxes + moved, 1))
        (path / "scores.npz").write_bytes(encode_scores(name_images(truth, path), found))
    return folder


def test_scores_are_read_as_they_were_and_name_images_below_their_folder(tmp_path: Path) -> None:
    truth, found = draw(20, 2, 80, seed=0)
    here, there = (name_images(truth, tmp_path / name) for name in ("here", "there"))
    content = encode_scores(here, found)
    assert content == encode_scores(there, found), "the same on another machine"
    (tmp_path / "scores.npz").write_bytes(content)
    read = read_scores(tmp_path / "scores.npz")
    assert read is not None and read.categories == truth.categories
    expected = score_resamples(match_detections(truth, found), draw_resamples(20, 1000))
    for name in ("observed", "resampled", "influences"):
        np.testing.assert_allclose(getattr(read.scores, name), getattr(expected, name), atol=1e-6)
    moved = replace(here, boxes=here.boxes + 1)
    (tmp_path / "moved.npz").write_bytes(encode_scores(moved, found))
    other = read_scores(tmp_path / "moved.npz")
    assert other is not None and other.truth != read.truth
    assert read_scores(tmp_path / "missing.npz") is None


def test_detections_are_kept_as_far_as_they_count(tmp_path: Path) -> None:
    truth, found = draw(3, 1, 300, seed=1)
    assert np.bincount(found.images).max() > 100
    content = encode_detections(name_images(truth, tmp_path), found)
    with np.load(io.BytesIO(content), allow_pickle=False) as data:
        assert data["image_ids"].tolist() == ["0.jpg", "1.jpg", "2.jpg"]
        kept = Detections(*(data[name].astype(float) for name in ("images", "labels", "boxes", "scores")))
    kept = replace(kept, images=kept.images.astype(np.int64), labels=kept.labels.astype(np.int64))
    assert np.bincount(kept.images).max() == 100 and len(kept.scores) < len(found.scores)
    one = np.ones((3, 1))
    np.testing.assert_allclose(
        compute_average_precision(match_detections(truth, kept), one),
        compute_average_precision(match_detections(truth, found), one),
        atol=1e-3,  # by the rounding of boxes at a threshold
    )


def test_a_report_says_what_holds_over_seeds_and_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "study", {"stock": 0.2, "arelu": 0.1})
    written = report_study(folder)
    (row,) = [row for row in written.rows if row.variant == "arelu"]
    scores = {
        name: [read_scores(folder / "runs" / f"{name}-s{seed}" / "scores.npz") for seed in (0, 1)]
        for name in ("stock", "arelu")
    }
    groups = [[each.scores for each in scores[name] if each] for name in ("stock", "arelu")]
    expected = compare_over_seeds_and_images(groups[0], groups[1], 0)
    assert row.over_images and row.over_images.verdict == "better"
    assert row.over_seeds_and_images and row.over_seeds_and_images.p == pytest.approx(expected.p)
    with (folder / "leaderboard.csv").open(newline="", encoding="utf-8") as text:
        (line,) = [line for line in csv.DictReader(text) if line["variant"] == "arelu"]
    assert float(line["images_low"]) == pytest.approx(row.over_images.low, rel=1e-5)
    assert line["images_verdict"] == "better" and float(line["seeds_images_p"]) == pytest.approx(expected.p, rel=1e-5)
    for name in ("leaderboard.md", "report.html"):
        assert "Over images, and over seeds and images" in (folder / name).read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "By the bootstrap over seeds and images, better: arelu." in page
    report(str(folder))
    assert "Over seeds and images" in capsys.readouterr().out


def test_runs_without_detections_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "study", {"stock": 0.2, "arelu": 0.1})
    (folder / "runs" / "arelu-s1" / "scores.npz").unlink()
    (row,) = [row for row in report_study(folder).rows if row.variant == "arelu"]
    assert row.runs_with_detections == 1 and row.over_images and row.over_seeds_and_images is None
    for name in ("leaderboard.md", "report.html"):
        assert "kept no detections of these images: 1 run of arelu." in (folder / name).read_text(encoding="utf-8")


def test_runs_on_other_images_or_without_anything_learned_are_left_out(tmp_path: Path) -> None:
    folder = fill(tmp_path / "study", {"stock": 0.2, "arelu": 0.1})
    truth, found = draw(30, 2, 160, seed=5)
    for path in folder.glob("runs/arelu-*"):
        (path / "scores.npz").write_bytes(encode_scores(name_images(truth, path), found))
    assert not any(row.over_images for row in report_study(folder).rows)
    assert "Over images" not in (folder / "leaderboard.md").read_text(encoding="utf-8")
    for name in ("leaderboard.md", "report.html"):
        assert "kept no detections of these images: 2 runs of arelu." in (folder / name).read_text(encoding="utf-8")
    with pytest.raises(InputError, match="not a pilot study"):
        plan_seeds(folder)
    wrong = replace(found, boxes=np.tile([0.0, 0.0, 1.0, 1.0], (len(found.boxes), 1)))
    for path in folder.glob("runs/*"):
        (path / "scores.npz").write_bytes(encode_scores(name_images(truth, path), wrong))
    assert not any(row.over_images for row in report_study(folder).rows)
    with pytest.raises(InputError, match="nothing was learned"):
        plan_seeds(folder)


@pytest.mark.parametrize("damage", ["cut", "text", "other", "numbers"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / "study", {"stock": 0.2, "arelu": 0.1})
    path = folder / "runs" / "arelu-s1" / "scores.npz"
    if damage == "other":
        content = io.BytesIO()
        np.savez_compressed(
            content, observed=np.zeros(3), resampled=np.zeros(3), influences=np.zeros(3), categories=["a"], truth="x"
        )
        path.write_bytes(content.getvalue())
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"not an archive")
    with pytest.raises(InputError, match=r"arelu-s1.scores\.npz' is damaged: .*delete it") as caught:
        report_study(folder)
    assert "\n" not in str(caught.value)


NOISE = Noise(12, 100, 0.01, 0.008, 0.004, math.nan, math.nan, math.nan)


def test_the_power_of_a_plan_is_that_of_simulated_studies() -> None:
    """The variances between images are known to a study, up to their freedom; that between runs is what it sees."""
    rng, seeds, difference = np.random.default_rng(0), 5, 0.02
    spread = math.hypot(NOISE.of_seeds, NOISE.of_images)
    shown = 0
    for _ in range(4000):
        runs = rng.normal(0, spread, (2, seeds))
        between = float(runs.var(axis=1, ddof=1).mean())
        components = Components(between, NOISE.of_images**2, NOISE.of_differences**2, 99)
        error, freedom = combine_components(components, seeds, seeds)
        seen = difference + runs[1].mean() - runs[0].mean() + rng.normal(0, NOISE.of_differences)
        shown += Difference(seen, error, freedom).p < 0.05
    assert shown / 4000 == pytest.approx(power._compute_power(NOISE, seeds, 100, difference, 0.05), abs=0.03)


def test_a_plan_needs_fewer_seeds_on_more_images_and_none_help_against_shared_noise() -> None:
    counts = [power._count_seeds(NOISE, images, 0.015, 0.05) for images in (100, 200, 1000)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    for images, count in zip((100, 200, 1000), counts, strict=True):
        assert power._compute_power(NOISE, count, images, 0.015, 0.05) >= 0.8
        assert power._compute_power(NOISE, count - 1, images, 0.015, 0.05) < 0.8
    assert power._count_seeds(NOISE, 100, 0.01, 0.05) is None, "2.8 x 0.004 is more than that"
    assert power._count_seeds(NOISE, 100, 0.015, 0.01) > counts[0]
    least = power._find_detectable(NOISE, 5, 100, 0.05)
    assert power._compute_power(NOISE, 5, 100, least, 0.05) == pytest.approx(0.8, abs=1e-6)


def test_a_plan_comes_from_a_pilot_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path / "study", {"stock": 0.2, "arelu": 0.1})
    found = plan_seeds(folder, 0.02, comparisons=2)
    assert found.noise.runs == 4 and found.noise.images == 40 and found.noise.of_images > 0
    # The results that the folder holds go up by the same amount from seed to seed.
    assert found.noise.correlation == pytest.approx(1)
    assert list(found.seeds_needed) == [40, 80, 160, 400]
    output = run("plan", str(folder), "difference=0.02", "comparisons=2")
    assert (
        "correlation of runs with equal seeds: +1.00" in output and "0.02 is shown in four cases of five by" in output
    )
    for words, sentence in (
        ([str(folder), "baseline=mish"], "not a pilot study"),
        ([str(folder), "difference=2"], "a fraction of 1"),
        ([str(folder), "comparisons=0"], "1 or more"),
        ([], "plan needs the folder"),
    ):
        with pytest.raises(InputError, match=sentence):
            run("plan", *words)
    for path in folder.glob("runs/*/scores.npz"):
        path.unlink()
    with pytest.raises(InputError, match=r"with scores\.npz in their folders"):
        plan_seeds(folder)
