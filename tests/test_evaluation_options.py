"""Studies whose seeds divide the images anew, and that score mean weights of the last epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import Data
from filelock import Timeout
from test_cli import run
from test_leaderboard import run as record

from rtdetr_act import load_model
from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.evaluation.statistics import compare, summarise
from rtdetr_act.integrations.ultralytics import splits
from rtdetr_act.integrations.ultralytics.results import read_scores
from rtdetr_act.integrations.ultralytics.splits import LabelCacheLock, list_images, split_data
from rtdetr_act.study import worker
from rtdetr_act.study.averaging import average_weights
from rtdetr_act.study.grid import check_runs, expand_study, make_study
from rtdetr_act.study.leaderboard import build_leaderboard
from rtdetr_act.study.leaderboard_tables import encode_leaderboard
from rtdetr_act.study.run_folders import read_run
from rtdetr_act.study.storage import write_json
from rtdetr_act.study.worker import EpochBarrier, train_run

EPOCHS = 2
TRAINING = {
    key: value for key, value in tiny.train_args(Path(), Path(), epochs=EPOCHS, save_period=1).items()
    if key not in ("data", "project", "name", "exist_ok")
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(stock_yaml: Path, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two seeds of a study with both options, in this process."""
    folder = tmp_path_factory.mktemp("study")
    given = {"activations": ["stock"], "seeds": 2, "split_seeds": True, "average_last": 2, **TRAINING}
    for config in expand_study(make_study({**given, "model": str(stock_yaml), "data": str(data.detect)})):
        place = folder / "runs" / config.name
        place.mkdir(parents=True)
        write_json(place / "run.json", config.to_plain())
        train_run(config, place, device="cpu", threads=1, barrier=EpochBarrier([]))
    return folder


@pytest.mark.integration
def test_averaged_checkpoint_is_the_mean_of_the_last_epochs(trained: Path) -> None:
    place = trained / "runs" / "stock-s0"
    weights = place / "weights"
    # Ultralytics' own files of both epochs, written for save_period=1.
    epochs = [torch.load(weights / f"epoch{each}.pt", weights_only=False)["ema"].state_dict() for each in (0, 1)]
    averaged = load_model(weights / "averaged.pt")
    moved = 0
    for name, value in averaged.model.state_dict().items():
        expected = (epochs[0][name].double() + epochs[1][name].double()) / 2
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-6)
            moved += not torch.equal(epochs[0][name], epochs[1][name])
        else:
            assert torch.equal(value, epochs[1][name])
    assert moved > 50
    result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    validated = averaged.val(data=str(place / "split" / "data.yaml"), imgsz=64, batch=8, device="cpu", plots=False)
    assert result["averaged_scores"] == pytest.approx(read_scores(validated), abs=1e-3)
    read = read_run(place)
    assert read.averaged_epochs == 2 and read.averaged_scores == result["averaged_scores"]


@pytest.mark.integration
def test_each_seed_divides_the_images_anew(trained: Path, data: Data) -> None:
    before = yaml.safe_load(data.detect.read_text(encoding="utf-8"))
    root = data.detect.parent / before.get("path", "")
    numbers = {name: len(list_images(root / before[name])) for name in ("train", "val")}
    pool = {path for name in numbers for path in list_images(root / before[name])}
    seen = []
    for seed in (0, 1):
        place = trained / "runs" / f"stock-s{seed}"
        division = yaml.safe_load((place / "split" / "data.yaml").read_text(encoding="utf-8"))
        parts = {name: set(list_images(place / "split" / division[name])) for name in numbers}
        assert not parts["train"] & parts["val"] and parts["train"] | parts["val"] == pool
        share = numbers["val"] / sum(numbers.values())
        assert len(parts["val"]) == round(share * len(pool))
        with np.load(place / "detections.npz") as kept:
            assert {Path(each).name for each in kept["image_ids"]} == {each.name for each in parts["val"]}
            assert len(kept["truth_boxes"]), "labels are found where they were"
        seen.append(parts["val"])
        read = read_run(place)
        assert read.validation_share == pytest.approx(len(parts["val"]) / len(parts["train"]))
        assert f"data={place / 'split' / 'data.yaml'}" in read.command
    assert seen[0] != seen[1]


@pytest.mark.integration
def test_a_run_whose_average_fails_keeps_its_scores(
    stock_yaml: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(worker, "score_average", fail)
    given = {"activations": ["stock"], "seeds": 1, "average_last": 1, **TRAINING, "epochs": 1}
    (config,) = expand_study(make_study({**given, "model": str(stock_yaml), "data": str(data.detect)}))
    train_run(config, tmp_path, device="cpu", threads=1, barrier=EpochBarrier([]))
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["state"] == "done" and result["scores"] and not result["averaged_scores"]
    assert "the report names this run" in capsys.readouterr().out


def test_integers_are_not_averaged() -> None:
    states = [{"w": torch.tensor(each, dtype=torch.float16), "n": torch.tensor(n)} for each, n in ((1.0, 3), (2.0, 8))]
    averaged = average_weights(states)
    assert averaged["w"].dtype == torch.float32 and averaged["w"] == 1.5 and averaged["n"] == 8


def write_set(folder: Path, val: str) -> Path:
    for name, count in (("train", 6), ("other", 3)):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(count):
            (folder / "images" / name / f"{index}.jpg").write_bytes(b"")
    (folder / "listed.txt").write_bytes(b"./images/other/0.jpg\n\n./images/other/1.jpg\n./images/notes.md\n")
    path = folder / "set.yaml"
    path.write_text(yaml.safe_dump({"path": str(folder), "train": "images/train", "val": val, "names": ["a"]}))
    return path


@pytest.mark.parametrize(
    ("val", "numbers"), [("images/other", (6, 3)), ("listed.txt", (6, 2)), ("images/train", (3, 3))]
)
def test_splits_keep_the_numbers_of_images(val: str, numbers: tuple[int, int], tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", val)
    first, again, other = (
        split_data(str(path), "detect", seed, tmp_path / name) for seed, name in ((5, "a"), (5, "b"), (6, "c"))
    )
    assert (first.train, first.val) == numbers
    members = [
        [Path(each.data.parent / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "val")]
        for each in (first, again, other)
    ]
    assert members[0] == members[1] != members[2]
    assert len(set("".join(members[0]).split())) == sum(numbers)


def test_a_set_of_one_image_and_classes_in_folders_are_not_divided(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set", "images/train")
    for image in sorted((tmp_path / "set" / "images" / "train").iterdir())[1:]:
        image.unlink()
    with pytest.raises(InputError, match="has 1 images, which cannot be divided"):
        split_data(str(path), "detect", 0, tmp_path / "a")
    with pytest.raises(InputError, match="are folders"):
        split_data("imagenet10", "classify", 0, tmp_path / "a")


def test_label_caches_are_read_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits.platformdirs, "user_cache_path", lambda *_, **__: tmp_path)

    class Model:
        def __init__(self) -> None:
            self.callbacks: dict[str, Any] = {}

        def add_callback(self, event: str, function: Any) -> None:
            self.callbacks[event] = function

    model, mine, theirs = Model(), LabelCacheLock("a.yaml"), LabelCacheLock("a.yaml")
    mine.attach(model)
    model.callbacks["on_pretrain_routine_start"](None)
    with pytest.raises(Timeout):
        theirs.lock.acquire(timeout=0)
    LabelCacheLock("b.yaml").lock.acquire(timeout=0)
    model.callbacks["on_pretrain_routine_end"](None)
    theirs.lock.acquire(timeout=0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"split_seeds": "yes"}, "split_seeds must be true or false, not 'yes'"),
        ({"average_last": -1}, "average_last must be a number of epochs such as 5"),
        ({"average_last": True}, "average_last must be a number of epochs such as 5"),
        ({"average_last": 5, "epochs": 4}, "average_last=5 is more than the 4 epochs"),
        ({"average_last": 2, "epochs": 4, "device": "0,1"}, "average_last needs runs on one device each"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], sentence: str, stock_yaml: Path, data: Data) -> None:
    with pytest.raises(RtdetrActError, match=sentence):
        check_runs(
            expand_study(
                make_study({"activations": ["stock"], "model": str(stock_yaml), "data": str(data.detect), **given})
            )
        )


def test_options_reach_the_runs_from_the_command_line(tmp_path: Path, stock_yaml: Path, data: Data) -> None:
    words = [str(stock_yaml), "act=stock", "seeds=1", f"data={data.detect}", "epochs=4", "-o", str(tmp_path / "s")]
    with pytest.raises(InputError, match="average_last=9 is more than the 4 epochs"):
        run("study", *words, "average_last=9", "--dry-run")
    assert "stock-s0" in run("study", *words, "average_last=2", "split_seeds=True", "--dry-run")


def test_runs_that_share_images_are_compared_more_carefully() -> None:
    """The interval of Nadeau and Bengio: s² (1/n + n_val / n_train) in place of s² / n."""
    variant, baseline = [0.52, 0.55, 0.53, 0.56], [0.50, 0.51, 0.52, 0.52]
    plain, careful = (compare({"a": (variant, baseline)}, shares)["a"] for shares in ({}, {"a": 0.5}))
    assert careful.difference == plain.difference and careful.effect == pytest.approx(plain.effect)
    widen = np.sqrt((1 / 4 + 0.5) / (1 / 4))
    assert careful.high - careful.difference == pytest.approx(widen * (plain.high - plain.difference))
    assert plain.verdict == "better" and careful.verdict == "no difference shown"
    assert summarise(variant, 0.5).deviation == summarise(variant).deviation
    assert summarise(variant, 0.5).high - summarise(variant, 0.5).mean == pytest.approx(
        widen * (summarise(variant).high - summarise(variant).mean)
    )


def test_report_has_mean_weights_and_says_what_seeds_divide() -> None:
    scores = {"stock": (0.40, 0.42, 0.41), "arelu": (0.41, 0.43, 0.42)}
    averaged = {"stock": (0.40, 0.41, 0.42), "arelu": (0.44, 0.46, 0.45)}
    records = [
        record(variant, seed, score, averaged_scores={"mAP50-95": averaged[variant][seed]}, averaged_epochs=5)
        for variant, each in scores.items()
        for seed, score in enumerate(each)
    ]
    rows = {row.variant: row for row in build_leaderboard(records, baseline="stock")}
    own = rows["arelu"].averaged
    assert own and own.epochs == 5 and own.summary.mean == pytest.approx(0.45)
    assert own.comparison == compare({"arelu": (averaged["arelu"], averaged["stock"])})["arelu"]
    contents = encode_leaderboard(list(rows.values()), "mAP50-95")
    text = contents["leaderboard.md"].decode()
    assert "| last 5 epochs |" in text and "| 0.450 ± 0.010 | +0.040" in text and "Each seed divides" not in text
    header, *lines = contents["leaderboard.csv"].decode().splitlines()
    (line,) = [dict(zip(header.split(","), each.split(","), strict=True)) for each in lines if each.startswith("arelu")]
    assert float(line["averaged"]) == pytest.approx(0.45) and line["averaged_epochs"] == "5"
    assert line["averaged_verdict"] == own.comparison.verdict

    divided = [record("stock", seed, score, validation_share=0.25) for seed, score in enumerate(scores["stock"])]
    (row,) = build_leaderboard([*divided], baseline="stock")
    assert row.averaged is None and row.validation_share == 0.25
    assert row.summary == summarise(scores["stock"], 0.25)
    assert "Nadeau and Bengio" in encode_leaderboard([row], "mAP50-95")["leaderboard.md"].decode()
    missing = [*records, record("arelu", 7, 0.4)]
    text = encode_leaderboard(build_leaderboard(missing, baseline="stock"), "mAP50-95")["leaderboard.md"].decode()
    assert "Without mean weights: 1 run of arelu." in text
