"""Several checkpoints and untrained swaps under the same settings, in one table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data, Run
from torch import nn
from typer.testing import CliRunner
from ultralytics import RTDETR, YOLO

from rtdetr_act import patch_model
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, ModelError, RtdetrActError, TrainingError
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.workflows.validate import validate_checkpoints, validate_variants

FAST = ["plots=False", "workers=0", "device=cpu"]
ARGUMENTS: dict[str, Any] = {"plots": False, "workers": 0, "device": "cpu"}


def run(*words: str) -> str:
    """Run a command in this process; errors come out as they are raised."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False, standalone_mode=False)
    return result.output


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def save(model: Any, path: Path, data: Path, **arguments: Any) -> str:
    """Write the checkpoint of a finished training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = {"task": model.task, "data": str(data), "imgsz": 64, **arguments}
    torch.save({"model": model.model, "ema": None, "epoch": -1, "train_args": trained}, path)
    return str(path)


def classifier(activation: str | None, path: Path, data: Data, **arguments: Any) -> str:
    """Write the checkpoint of a classifier, whose scores are not 0 from the start."""
    torch.manual_seed(3)
    model = YOLO(str(tiny.write_yaml(path.with_suffix(".yaml"), tiny.yolo("classify"))))
    if activation:
        patch_model(model, activation)
    return save(model, path, data.classify, **arguments)


@pytest.mark.integration  # older releases start loader processes
def test_one_checkpoint_is_one_line_and_its_folder(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pt = classifier(None, tmp_path / "a" / "weights" / "best.pt", data)
    output = run("val", pt, *FAST, "plots=True")
    expected = YOLO(pt).val(**ARGUMENTS, data=str(data.classify), project=str(tmp_path / "own"))
    folder = tmp_path / "runs" / "classify" / "val"
    assert f"top1 {expected.top1:.4f}  top5 {expected.top5:.4f}\nfiles: {folder}\n" in output


@pytest.mark.integration
def test_a_table_has_the_scores_of_each_and_says_which_failed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, activation in (("stock", None), ("arelu", "arelu"), ("mish", "mish")):
        classifier(activation, tmp_path / "study" / name / "weights" / "best.pt", data)
    torch.save({"model": nn.ReLU()}, tmp_path / "broken.pt")
    words = ["val", "study", "broken.pt", "study/mish/weights/best.pt", "-o", "table.csv", *FAST]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, TrainingError) and result.exception.exit_code == 1
    assert str(result.exception) == "1 of 4 gave no scores: broken"
    assert "broken: 'broken.pt' is not an Ultralytics checkpoint" in result.output
    rows = rows_of(tmp_path / "table.csv")
    assert list(rows) == ["arelu", "mish", "stock", "broken"] and rows["broken"]["top1"] == ""
    for name, row in rows.items():
        if name != "broken":
            pt = tmp_path / "study" / name / "weights" / "best.pt"
            model = load_model(str(pt))
            assert row["activation"] == name and int(row["sites"]) == (0 if name == "stock" else 9)
            assert int(row["parameters"]) == sum(p.numel() for p in model.model.parameters())
            scores = YOLO(str(pt)).val(**ARGUMENTS, data=str(data.classify), project=str(tmp_path / "own"))
            assert (float(row["top1"]), float(row["top5"])) == pytest.approx((scores.top1, scores.top5))
            assert row["folder"] == "" and row["imgsz"] == "64"
    assert not (tmp_path / "runs").exists(), "without plots there is no file, and no folder is left for none"
    assert len({row["top1"] for row in rows.values()}) > 2, "equal scores would not tell the rows apart"


@pytest.mark.integration
def test_detectors_are_compared_with_the_size_of_their_training(
    stock_run: Run, patched_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(validate_checkpoints([str(stock_run.pt), str(patched_run.pt)], arguments=ARGUMENTS))
    assert [each.activation for each in found] == ["stock", "arelu"] and {each.imgsz for each in found} == {64}
    assert [each.sites for each in found] == [0, tiny.CONV_SITES] and found[0].gflops_640 < found[1].gflops_640
    assert all(set(each.scores or {}) == {"mAP50", "mAP50-95"} and not each.failure for each in found)
    assert [each.name for each in found] == ["stock/run", "patched/run"]
    folded = list(validate_checkpoints([str(patched_run.pt)], arguments=ARGUMENTS, fold=True))
    assert folded[0].activation == "arelu" and folded[0].parameters == found[0].parameters


def test_checkpoints_that_do_not_compare_are_refused(data: Data, tmp_path: Path) -> None:
    small, large, same = (classifier(None, tmp_path / name, data, imgsz=size) for name, size in
                          (("small.pt", 32), ("large.pt", 64), ("same.pt", 64)))  # fmt: skip
    with pytest.raises(
        InputError, match=r"different sizes \(32: small; 64: large, same\): name one for all with imgsz="
    ):
        next(validate_checkpoints([small, large, same]))
    found = list(validate_checkpoints([small, large], arguments={**ARGUMENTS, "imgsz": 64, "project": str(tmp_path)}))
    assert not any(each.failure for each in found) and {each.imgsz for each in found} == {64}
    detector = YOLO(str(tiny.write_yaml(tmp_path / "detect.yaml", tiny.yolo())))
    other = save(detector, tmp_path / "other.pt", data.detect)
    with pytest.raises(InputError, match="of different tasks"):
        next(validate_checkpoints([small, other]))
    third = save(detector, tmp_path / "third.pt", data.other)
    with pytest.raises(InputError, match=r"trained on different data \(.*detect\.yaml: other; .*other\.yaml: third\)"):
        next(validate_checkpoints([other, third]))
    single = save(detector, tmp_path / "single.pt", data.detect, single_cls=True)
    with pytest.raises(InputError, match="single_cls="):
        next(validate_checkpoints([other, single]))
    warnings: list[str] = []
    settings = {**ARGUMENTS, "project": str(tmp_path / "runs")}
    found = list(validate_checkpoints([other, third], str(data.detect), settings, warn=warnings.append))
    assert not any(each.failure for each in found) and {each.data for each in found} == {str(data.detect)}
    [warning] = warnings
    assert "trained on different data (detect.yaml: other; other.yaml: third)" in warning


def test_data_that_is_gone_fails_only_the_checkpoint_that_needs_it(data: Data, tmp_path: Path) -> None:
    here = classifier(None, tmp_path / "here.pt", data)
    gone = save(load_model(here), tmp_path / "gone.pt", tmp_path / "gone" / "set")
    found = list(validate_checkpoints([gone, here], arguments={**ARGUMENTS, "project": str(tmp_path)}))
    assert "is not here: name one with data=" in found[0].failure and found[1].scores and not found[1].failure
    with pytest.raises(InputError, match="is not here"):
        next(validate_checkpoints([gone]))


def test_a_swap_that_model_yaml_does_not_carry_is_not_called_stock(data: Data, tmp_path: Path) -> None:
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo("classify"))))
    model.model.model[0].act = nn.PReLU()
    pt = save(model, tmp_path / "best.pt", data.classify)
    [found] = validate_checkpoints([pt], arguments={**ARGUMENTS, "project": str(tmp_path)})
    assert (found.activation, found.sites) == ("stock but PReLU for SiLU", 1)


def test_swaps_are_validated_without_training(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pt = classifier("arelu", tmp_path / "best.pt", data)
    words = ["--act", "relu@0-1", "--act", "stock", "--act", "mish", "-o", "table.csv"]
    output = run("val", pt, *words, *FAST)
    rows = rows_of(tmp_path / "table.csv")
    assert list(rows) == ["stock", "relu@0-1", "mish"] and "Validated on classify at 64 pixels" in output
    assert rows["stock"]["sites"] == "0" and rows["relu@0-1"]["activation"] == "arelu, relu@0-1"
    for name, row in rows.items():
        model = load_model(pt)
        from rtdetr_act import unpatch_model

        unpatch_model(model) if name == "stock" else patch_model(model, name)
        scores = model.val(**ARGUMENTS, data=str(data.classify), project=str(tmp_path / "own"))
        assert float(row["top1"]) == pytest.approx(scores.top1)
    assert "SiLU" not in {type(m).__name__ for m in load_model(pt).model.modules()}, "the checkpoint stays as it is"


@pytest.mark.integration
def test_match_fits_a_swap_as_the_start_of_a_training_does(stock_run: Run, shared_data: Data, tmp_path: Path) -> None:
    settings = {**ARGUMENTS, "project": str(tmp_path)}
    with tiny.logged() as lines:
        found = list(validate_variants(str(stock_run.pt), ["stock", "mish"], arguments=settings, init="match"))
    fitted = [line for line in lines if "layers fitted" in line]
    assert [each.activation for each in found] == ["stock", "mish init=match"] and len(fitted) == 1
    with tiny.logged() as lines:
        model = RTDETR(str(stock_run.pt))
        patch_model(model, "mish", init="match")
        tiny.train(model, shared_data.detect, tmp_path / "trained")
    assert [line for line in lines if "layers fitted" in line] == fitted


@pytest.mark.parametrize(
    ("words", "words_of_error"),
    [
        (["nothing.pt", "best.pt"], "there is no file 'nothing.pt'"),
        (["tiny.yaml"], "is not a checkpoint"),
        (["best.pt", "tiny.yaml"], "'tiny.yaml' is not a checkpoint"),
        (["empty"], "no run with a weights/best.pt"),
        (["imgsz=64"], "val needs a checkpoint, or a folder of runs"),
        (["best.pt", "best.pt", "--act", "relu"], "one checkpoint"),
        (["best.pt", "--scope", "all"], "name one with act="),
        (["best.pt", "--act", "areluu"], "did you mean 'arelu'"),
        (["best.pt", "--act", "stock", "--act", "arelu@99"], "99"),
        (["best.pt", "-o", "table.txt"], ".csv"),
        (["best.pt", "-o", "nowhere/table.csv"], "no folder"),
        (["best.pt", "epoch=3"], "did you mean 'epochs'"),
    ],
)
def test_mistakes_are_found_before_anything_is_validated(
    words: list[str], words_of_error: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier(None, tmp_path / "tiny.pt", data)
    Path("tiny.pt").rename("best.pt")
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RtdetrActError) as caught:
        run("val", *words, *FAST)
    assert words_of_error in str(caught.value) and caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_the_only_file_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="not an Ultralytics checkpoint"):
        next(validate_checkpoints([str(tmp_path / "a.pt")]))
