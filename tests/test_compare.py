"""Detectors compared: average precision against pycocotools, the bootstrap, the command."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Data, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from test_cli import run
from ultralytics import YOLO

from rtdetr_act import compare_detectors
from rtdetr_act.errors import RtdetrActError
from rtdetr_act.evaluation.average_precision import compute_average_precision
from rtdetr_act.evaluation.bootstrap import (
    HEADLINES,
    Scores,
    compare_over_images,
    compare_over_seeds_and_images,
    compute_influences,
    draw_resamples,
    score_resamples,
)
from rtdetr_act.evaluation.coco_files import CocoFile
from rtdetr_act.evaluation.detections import Detections, Floats, GroundTruth
from rtdetr_act.evaluation.differences import compare_methods
from rtdetr_act.evaluation.matching import match_detections
from rtdetr_act.evaluation.statistics import Difference
from rtdetr_act.integrations.ultralytics.detections import collect_detections
from rtdetr_act.integrations.ultralytics.models import load_checkpoint


def draw(images: int, categories: int, boxes: int, seed: int, *, noise: float = 0.12) -> tuple[GroundTruth, Detections]:
    """Return labelled boxes of all sizes, some of them crowds, and detections near them and elsewhere, with ties."""
    rng = np.random.default_rng(seed)
    owners, labels = rng.integers(0, images, boxes), rng.integers(0, categories, boxes)
    sides = np.exp(rng.normal(4, 1, (boxes, 2))).clip(4, 400)
    placed = np.concatenate([rng.uniform(0, 1, (boxes, 2)) * (640 - sides), sides], axis=1)
    areas = sides.prod(1) * rng.uniform(0.4, 1, boxes)
    names = tuple(f"category {index}" for index in range(categories))
    truth = GroundTruth(tuple(range(images)), names, owners, labels, placed, areas, rng.random(boxes) < 0.05)
    near = np.repeat(np.arange(boxes), rng.poisson(1.5, boxes))
    moved = placed[near] + noise * rng.standard_normal((len(near), 4)) * np.tile(placed[near, 2:], 2)
    wrong = rng.uniform(5, 200, (boxes, 4))
    found = np.concatenate([moved, wrong])
    found[:, 2:] = found[:, 2:].clip(1)
    named = np.where(rng.random(len(near)) < 0.8, labels[near], rng.integers(0, categories, len(near)))
    return truth, Detections(
        images=np.concatenate([owners[near], rng.integers(0, images, boxes)]),
        labels=np.concatenate([named, rng.integers(0, categories, boxes)]),
        boxes=found.round(2),
        scores=np.concatenate([rng.beta(3, 2, len(near)), rng.beta(1, 4, boxes)]).round(2),
    )


def to_coco(truth: GroundTruth) -> dict[str, Any]:
    """Return a ground truth as COCO's JSON holds it; identifiers start at 1."""
    boxes = zip(truth.images, truth.labels, truth.boxes, truth.areas, truth.crowds, strict=True)
    return {
        "images": [{"id": index + 1} for index in range(len(truth.image_ids))],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(truth.categories)],
        "annotations": [
            {
                "id": number, "image_id": int(image) + 1, "category_id": int(label) + 1, "bbox": box.tolist(),
                "area": float(area), "iscrowd": int(crowd),
            }
            for number, (image, label, box, area, crowd) in enumerate(boxes, 1)
        ],
    }  # fmt: skip


def to_results(found: Detections) -> list[dict[str, Any]]:
    """Return detections as COCO's JSON holds them."""
    return [
        {"image_id": int(image) + 1, "category_id": int(label) + 1, "bbox": box.tolist(), "score": float(score)}
        for image, label, box, score in zip(found.images, found.labels, found.boxes, found.scores, strict=True)
    ]


def evaluate(truth: GroundTruth, found: Detections) -> tuple[Floats, Floats]:
    """Return pycocotools' average precision of categories, sizes and thresholds, and the six headline scores."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = to_coco(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(to_results(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., -1]  # thresholds, recalls, categories, sizes
    means = np.where(precision[:, 0] < 0, np.nan, precision.mean(1))
    return means.transpose(1, 2, 0), np.where(evaluation.stats[:6] < 0, np.nan, evaluation.stats[:6])


@given(
    images=st.integers(1, 12), categories=st.integers(1, 4), boxes=st.integers(1, 60), seed=st.integers(0, 2**32 - 1)
)
@settings(max_examples=60, deadline=None)
def test_average_precision_is_that_of_pycocotools(images: int, categories: int, boxes: int, seed: int) -> None:
    truth, found = draw(images, categories, boxes, seed)
    expected, headlines = evaluate(truth, found)
    matches = match_detections(truth, found)
    own = compute_average_precision(matches, np.ones((images, 1)))[..., 0]
    np.testing.assert_allclose(own, expected, rtol=0, atol=1e-12)
    scores = score_resamples(matches, draw_resamples(images, 2))
    np.testing.assert_allclose(scores.observed[:6], headlines, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.observed[6:], expected[:, 0].mean(1), rtol=0, atol=1e-12)


def test_only_a_hundred_detections_of_an_image_and_category_count() -> None:
    truth, found = draw(2, 1, 200, seed=3)
    assert np.bincount(found.images).max() > 100
    own = compute_average_precision(match_detections(truth, found), np.ones((2, 1)))[..., 0]
    np.testing.assert_allclose(own, evaluate(truth, found)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("boxes", [29, 57, 58, 100])
def test_recalls_are_rounded_as_coco_rounds_them(boxes: int) -> None:
    """57 of 100 boxes are less than a recall of 0.57, which is 57 * 0.01 there."""
    ones = np.ones(100)
    placed = np.stack([np.arange(100) * 10.0, 0 * ones, 5 * ones, 5 * ones], axis=1)
    zeros = np.zeros(100, np.int64)
    truth = GroundTruth((0,), ("a",), zeros, zeros, placed, 25 * ones, zeros.astype(bool))
    found = Detections(zeros[:boxes], zeros[:boxes], placed[:boxes], ones[:boxes])
    own = compute_average_precision(match_detections(truth, found), np.ones((1, 1)))[..., 0]
    np.testing.assert_allclose(own, evaluate(truth, found)[0], rtol=0, atol=1e-12)


@given(weights=st.lists(st.integers(0, 3), min_size=5, max_size=5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_weight_counts_an_image_so_often(weights: list[int], seed: int) -> None:
    truth, found = draw(5, 2, 25, seed)
    # Without ties, whose order depends on the numbers of the images.
    found = Detections(
        found.images, found.labels, found.boxes, np.random.default_rng(seed).permutation(len(found.scores)) / 1e4
    )
    copies = [image for image, count in enumerate(weights) for _ in range(count)]
    boxes = [np.flatnonzero(truth.images == image) for image in copies]
    dets = [np.flatnonzero(found.images == image) for image in copies]
    kept, taken = (np.concatenate([*each, np.empty(0, np.int64)]).astype(np.int64) for each in (boxes, dets))
    repeated = GroundTruth(
        tuple(range(max(len(copies), 1))), truth.categories, np.repeat(np.arange(len(copies)), list(map(len, boxes))),
        truth.labels[kept], truth.boxes[kept], truth.areas[kept], truth.crowds[kept],
    )  # fmt: skip
    again = Detections(
        np.repeat(np.arange(len(copies)), list(map(len, dets))), found.labels[taken], found.boxes[taken],
        found.scores[taken],
    )  # fmt: skip
    weighted = compute_average_precision(match_detections(truth, found), np.array(weights, float)[:, None])
    copied = compute_average_precision(match_detections(repeated, again), np.ones((len(repeated.image_ids), 1)))
    np.testing.assert_allclose(weighted, copied, rtol=0, atol=1e-12)


def test_a_resample_has_as_many_images_and_is_the_same_each_time() -> None:
    drawn = draw_resamples(50, 200)
    assert drawn.shape == (50, 200) and (drawn.sum(0) == 50).all() and len(np.unique(drawn, axis=1).T) == 200
    assert (drawn == draw_resamples(50, 200)).all() and (drawn != draw_resamples(50, 200, seed=1)).any()


def fake(observed: float, resampled: Sequence[float] | Floats, images: int = 100_000) -> Scores:
    """Return a score whose noise comes from all images alike."""
    return Scores(np.array([observed]), np.array([resampled], float), np.tile([1.0, -1.0], (1, images // 2)))


def test_an_error_is_the_spread_of_the_paired_resamples() -> None:
    rng = np.random.default_rng(0)
    both, own = rng.normal(0, 0.1, 100_000), rng.normal(0, 0.01, 100_000)
    variant = replace(fake(0.52, 0.52 + both + own), influences=np.tile([2.0, -2.0], (1, 50_000)))
    found = compare_over_images([fake(0.5, 0.5 + both)], [variant], 0)
    assert found.estimate == pytest.approx(0.02) and found.error == pytest.approx(own.std(ddof=1), rel=1e-4)
    assert found.p == pytest.approx(2 * stats.norm.sf(0.02 / own.std(ddof=1)), rel=1e-2)
    low, high = found.compute_interval(0.05)
    assert (low, high) == pytest.approx((0.02 - 1.96 * found.error, 0.02 + 1.96 * found.error), abs=1e-5)


def test_the_freedom_of_an_error_is_that_of_the_images_that_make_it() -> None:
    """A mean over images is a score whose error is known: that of Student's t."""
    rng = np.random.default_rng(0)
    resamples = draw_resamples(40, 20_000)

    def score(values: Floats) -> Scores:
        resampled = (values @ resamples)[None] / 40
        return Scores(np.array([values.mean()]), resampled, compute_influences(resampled, resamples))

    zeros, values = np.zeros(40), rng.normal(0.1, 1, 40)
    found = compare_over_images([score(zeros)], [score(values)], 0)
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(40), rel=0.02)
    kurtosis = stats.kurtosis(values, fisher=False)
    assert found.freedom == pytest.approx(2 / ((kurtosis - 1) / 40 + 2 / 20_000), rel=0.05)
    rare = compare_over_images([score(zeros)], [score(np.eye(40)[0])], 0)
    assert rare.freedom == pytest.approx(2, abs=0.2), "one image makes all of the difference"


@given(
    baseline=st.lists(st.floats(0, 1), min_size=2, max_size=6),
    variant=st.lists(st.floats(0, 1), min_size=2, max_size=6),
)
def test_without_noise_of_images_it_is_the_t_test_of_two_samples(baseline: list[float], variant: list[float]) -> None:
    groups = [[fake(score, np.full(20, score)) for score in each] for each in (baseline, variant)]
    found = compare_over_seeds_and_images(groups[0], groups[1], 0)
    spread = np.var(baseline) + np.var(variant)
    if spread > 1e-12:
        assert found.p == pytest.approx(stats.ttest_ind(variant, baseline).pvalue, rel=1e-6, abs=1e-12)


def test_noise_of_images_that_all_seeds_share_is_not_divided_by_their_number() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.1, 4000)
    baseline = [fake(score, score + rng.normal(0, 0.001, 4000)) for score in (0.50, 0.501, 0.499, 0.5)]
    variant = [fake(score, score + shared + rng.normal(0, 0.001, 4000)) for score in (0.52, 0.521, 0.519, 0.52)]
    found = compare_over_seeds_and_images(baseline, variant, 0)
    assert found.error == pytest.approx(shared.std(), rel=0.01)


def test_noise_of_images_that_each_run_has_of_its_own_is_counted_once() -> None:
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(200):
        groups = [[fake(0.5 + rng.normal(0, 0.02), 0.5 + rng.normal(0, 0.02, 300)) for _ in range(8)] for _ in range(2)]
        found = compare_over_seeds_and_images(groups[0], groups[1], 0)
        estimates.append(found.estimate)
        errors.append(found.error)
    # A little more than the true one, since it is never below that of the images; counted twice, it would be 0.0141.
    assert 0.0098 < np.sqrt(np.mean(np.square(errors))) < 0.0115
    assert np.std(estimates) == pytest.approx(0.02 / 2, rel=0.1)


@given(seed=st.integers(0, 2**32 - 1), runs=st.integers(2, 4), spread=st.floats(0, 0.1))
@settings(max_examples=50, deadline=None)
def test_other_seeds_never_make_the_error_smaller(seed: int, runs: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    groups = [
        [fake(0.5 + rng.normal(0, spread), 0.5 + rng.normal(0, 0.02, 200), 100) for _ in range(runs)] for _ in range(2)
    ]
    images = compare_over_images(groups[0], groups[1], 0)
    both = compare_over_seeds_and_images(groups[0], groups[1], 0)
    assert both.error >= images.error * (1 - 1e-9) and both.estimate == images.estimate


def test_equal_runs_do_not_differ_and_nothing_is_said_without_boxes() -> None:
    run_a, none = fake(0.5, np.linspace(0.4, 0.6, 9)), fake(math.nan, np.full(9, math.nan))
    same = compare_over_images([run_a], [run_a], 0)
    assert (same.p, same.compute_interval(0.05)) == (1.0, (0.0, 0.0))
    unknown = compare_over_images([none], [none], 0)
    assert math.isnan(unknown.p) and math.isnan(unknown.estimate)
    assert math.isnan(Difference(0.1, 0.0, 5).p)


@given(
    gains=st.lists(st.floats(-0.05, 0.05), min_size=1, max_size=4), runs=st.integers(1, 3), seed=st.integers(0, 10_000)
)
@settings(max_examples=50, deadline=None)
def test_intervals_and_verdicts_never_contradict_each_other(gains: list[float], runs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = len(HEADLINES) + 2

    def make(gain: float) -> list[Scores]:
        centres = 0.5 + gain + rng.normal(0, 0.005, (runs, rows))
        return [
            Scores(each, each[:, None] + rng.normal(0, 0.01, (rows, 50)), rng.normal(0, 1, (rows, 40)))
            for each in centres
        ]

    methods = {"stock": make(0.0)} | {f"method {index}": make(gain) for index, gain in enumerate(gains)}
    found = compare_methods(methods, ["cat", "dog"])
    assert len(found) == rows * len(gains)
    for row in found:
        assert (row.over_seeds_and_images is None) is (runs == 1)
        for each in filter(None, (row.over_images, row.over_seeds_and_images)):
            assert (each.verdict == "better") is (each.low > 0) and (each.verdict == "worse") is (each.high < 0)
            assert each.low <= row.difference <= each.high and each.p <= each.p_holm <= 1
            assert (each.verdict != "no difference shown") is (each.p_holm < 0.05)
    # The primary score is not corrected for the others.
    alone = compare_methods({name: methods[name] for name in ("stock", "method 0")}, ["cat", "dog"])[0]
    assert alone.score == "mAP50-95" and alone.over_images.p == alone.over_images.p_holm


def write(folder: Path, name: str, data: Any) -> str:
    (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return str(folder / name)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with truth.json, and detections of two methods, three seeds each, one method much worse."""
    truth, _ = draw(30, 3, 120, seed=0)
    coco = to_coco(truth)
    coco["annotations"][0]["ignore"] = 1  # which COCO's tools overwrite by iscrowd
    write(tmp_path, "truth.json", coco)
    for method, noise in (("good", 0.05), ("bad", 0.2)):
        for seed in range(3):
            _, found = draw(30, 3, 120, seed=0, noise=noise)
            rng = np.random.default_rng(seed)
            moved = found.boxes + rng.normal(0, 1, found.boxes.shape)
            found = replace(found, boxes=np.maximum(moved, 1))
            write(tmp_path, f"{method}-s{seed}.json", to_results(found))
    return tmp_path


def test_files_of_detections_are_compared(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    words = ["bad-s*.json", "good-s0.json,good-s1.json,good-s2.json", "truth.json", "-o", "table.csv"]
    output = run("compare", *words, "resamples=200")
    assert "30 images, " in output and "file: table.csv" in output
    assert "On other images of this kind" in output and "Trained with other seeds" in output
    with Path("table.csv").open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    assert len(rows) == 2 * (6 + 3) and {row["baseline"] for row in rows} == {"bad"}
    first = [row for row in rows if row["score"] == "mAP50-95" and not row["category"]]
    assert [row["question"] for row in first] == ["images", "seeds and images"]
    assert {row["verdict"] for row in first} == {"better"} and {row["variant"] for row in first} == {"good"}
    truth = CocoFile(files / "truth.json")
    expected = [
        evaluate(truth.truth, truth.read_detections(files / f"bad-s{seed}.json", pytest.fail))[1][0]
        for seed in range(3)
    ]
    assert float(first[0]["baseline_score"]) == pytest.approx(np.mean(expected), abs=1e-12)


def test_groups_of_different_sizes_compare_and_single_runs_say_nothing_of_seeds(files: Path) -> None:
    every = [str(files / f"{name}-s{seed}.json") for name in ("bad", "good") for seed in range(3)]
    found = compare_detectors([every[:2], every[3:]], files / "truth.json", resamples=100)
    assert [len(method.files) for method in found.methods] == [2, 3] and found.rows[0].over_seeds_and_images
    assert found.methods[0].deviation > 0
    single = compare_detectors([every[0], *every[3:5]], files / "truth.json", resamples=100)
    assert not any(row.over_seeds_and_images for row in single.rows) and len(single.rows) == 2 * 9
    assert "no difference shown" in repr(compare_detectors([every[0], every[0]], files / "truth.json", resamples=100))


def test_a_file_of_text_identifiers_without_areas_is_read(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": "b.jpg"}, {"id": "a.jpg"}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3}],
        "annotations": [{"image_id": "a.jpg", "category_id": 7, "bbox": [1, 2, 10, 20]}],
    }
    opened = CocoFile(Path(write(tmp_path, "truth.json", truth)))
    assert opened.truth.image_ids == ("a.jpg", "b.jpg") and opened.truth.categories == ("3", "cat")
    assert opened.truth.areas.tolist() == [200] and opened.truth.labels.tolist() == [1]


DETECTION = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
TRUTH: dict[str, Any] = {
    "images": [{"id": 1}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
}


@pytest.mark.parametrize(
    ("detections", "truth", "words"),
    [
        ([{**DETECTION, "image_id": 2}], TRUTH, "has detections in 1 image that 'truth.json' lacks, such as '2'"),
        ([{**DETECTION, "score": None}], TRUTH, "the score None, not a number"),
        ([{**DETECTION, "bbox": [1, 2, 3]}], TRUTH, "the bbox [1, 2, 3], which is not [left, top, width, height]"),
        ([{**DETECTION, "bbox": [1, 2, 3, "x"]}], TRUTH, "which is not [left, top, width, height]"),
        ([{**DETECTION, "image_id": [1]}], TRUTH, "the image_id [1], which is neither"),
        ([{"image_id": 1}], TRUTH, "detection 0 of 'a.json' has no category_id"),
        ([3], TRUTH, "detection 0 of 'a.json' is 3"),
        (TRUTH, TRUTH, "has annotations, as a ground truth, which comes last"),
        ([DETECTION], [DETECTION], "'truth.json' is a list, as a file of detections is"),
        ([DETECTION], {**TRUTH, "categories": None}, "has no list of categories"),
        ([DETECTION], {**TRUTH, "images": []}, "has no images"),
        ([DETECTION], {**TRUTH, "images": [{"id": 1}, {"id": 1}]}, "has images with the same id"),
        ([DETECTION], {**TRUTH, "annotations": [{**DETECTION, "image_id": 9}]}, "has the image_id 9, which it lacks"),
    ],
)
def test_a_file_that_is_wrong_is_named(
    detections: Any, truth: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("a.json", detections), ("b.json", [DETECTION]), ("truth.json", truth)):
        write(tmp_path, name, data)
    with pytest.raises(RtdetrActError) as caught:
        run("compare", "a.json", "b.json", "truth.json")
    assert words in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "compare needs two checkpoints"),
        (["a.json", "truth.json"], "need a ground truth"),
        (["a.json", "data=truth.json"], "two methods or more, not 1"),
        (["a.json", "missing.json", "truth.json"], "there is no file 'missing.json'"),
        (["a.json", "a.pt", "truth.json"], "compare either kind alone"),
        (["a.json", "a.json", "truth.json", "split=test"], "split= is for the validation of checkpoints"),
        (["a.json", "a.json", "truth.json", "resamples=99"], "needs 100 resamples or more, not 99"),
        (["a.json", "a.json", "truth.json", "-o", "x.txt"], ".csv"),
        (["a.json", "a.json", "broken.json"], "'broken.json' is not a JSON file"),
        (["folder", "a.json", "truth.json"], "no run with a weights/best.pt"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.json", [DETECTION])
    write(tmp_path, "truth.json", TRUTH)
    Path("broken.json").write_bytes(b"{\xff")
    Path("a.pt").write_bytes(b"")
    Path("folder").mkdir()
    with pytest.raises(RtdetrActError) as caught:
        run("compare", *words)
    assert sentence in str(caught.value) and caught.value.exit_code == 2


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    truth, found = draw(20, 2, 60, seed=1)
    path = Path(write(tmp_path, "truth.json", to_coco(truth)))
    results = to_results(found)
    write(tmp_path, "all.json", results)
    write(tmp_path, "none.json", [])
    write(tmp_path, "half.json", [each for each in results if each["image_id"] <= 10])
    write(tmp_path, "more.json", [*results, {**DETECTION, "category_id": 99}])
    names = ["all", "none", "half", "more"]
    said: list[str] = []
    compared = compare_detectors([tmp_path / f"{name}.json" for name in names], path, resamples=100, warn=said.append)
    assert len(said) == 3
    assert "'" + str(tmp_path / "none.json") + "' has no detections: it scores 0" in said
    assert any("half.json' has no detection in" in each and "was it made on all of them?" in each for each in said)
    assert any("1 detection of categories that" in each and each.endswith("left out: 99") for each in said)
    by_name = {row.variant: row for row in compared.rows if row.score == "mAP50-95"}
    assert by_name["none"].variant_score == 0 and by_name["none"].over_images.verdict == "worse"
    assert by_name["more"].difference == 0 and by_name["more"].over_images.p == 1
    said.clear()
    empty = compare_detectors([tmp_path / "none.json"] * 2, path, resamples=100, warn=said.append)
    assert "nothing was learned" in said[-1]
    assert {row.over_images.verdict for row in empty.rows} == {"nothing was learned"}


@pytest.mark.integration
def test_checkpoints_are_compared_by_what_they_find(
    trained: Path, stock_run: Run, shared_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = {"imgsz": 64, "workers": 0, "device": "cpu"}
    truth, found = collect_detections(load_checkpoint(trained), data=str(shared_data.detect), **fast)
    assert len(truth.labels) and len(found.scores) and list(tmp_path.iterdir()) == []
    # A pattern that matches a run folder, and a checkpoint.
    words = [str(stock_run.pt), str(trained.parents[1].with_name("ru*")), f"data={shared_data.detect}"]
    output = run("compare", *words, *(f"{key}={value}" for key, value in fast.items()))
    assert f"validating {trained}" in output and "better" in output
    compared = compare_detectors([stock_run.pt, trained], shared_data.detect, fast, resamples=100)
    assert compared.boxes == len(truth.labels) and compared.images == len(truth.image_ids)
    assert list(compared.methods[1].scores.values()) == pytest.approx(evaluate(truth, found)[1].tolist(), nan_ok=True)
    assert compared.methods[1].scores["mAP50"] > 0.5, "the network has learned too little to tell it from another"
    assert compared.rows[0].over_images.verdict == "better"
    # Ultralytics interpolates precision in its own way: close, and not the same.
    own = load_checkpoint(trained).val(data=str(shared_data.detect), plots=False, project=str(tmp_path), **fast).box
    assert compared.methods[1].scores["mAP50"] == pytest.approx(own.map50, abs=0.05)
    assert compared.methods[1].scores["mAP50-95"] == pytest.approx(own.map, abs=0.05)


@pytest.mark.integration
def test_checkpoints_whose_training_data_are_gone_are_compared_on_other_data(
    trained: Path, shared_data: Data, tmp_path: Path
) -> None:
    checkpoint = torch.load(trained, map_location="cpu", weights_only=False)
    checkpoint["train_args"]["data"] = str(tmp_path / "gone.yaml")
    torch.save(checkpoint, tmp_path / "a.pt")
    fast = {"imgsz": 64, "workers": 0, "device": "cpu"}
    compared = compare_detectors([tmp_path / "a.pt", trained], shared_data.detect, fast, resamples=100, warn=print)
    assert compared.rows[0].difference == 0
    with pytest.raises(RtdetrActError, match="is not here: name one with data="):
        compare_detectors([tmp_path / "a.pt", trained], None, fast)


@pytest.mark.integration
def test_labels_are_in_pixels_of_the_original_images(shared_data: Data, tmp_path: Path) -> None:
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())))
    truth, _ = collect_detections(model, data=str(shared_data.detect), imgsz=64, workers=0)
    for index, image in enumerate(truth.image_ids):
        width, height = Image.open(image).size
        lines = Path(image.replace("images", "labels")).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        polygons = [np.array(line.split()[1:], float).reshape(-1, 2) * [width, height] for line in lines]
        expected = [[*each.min(0), *np.ptp(each, axis=0)] for each in polygons]
        np.testing.assert_allclose(truth.boxes[truth.images == index], expected, atol=1e-3)
