"""A training killed again and again ends with the weights of an undisturbed one."""

from __future__ import annotations

import csv
import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data
from ultralytics import RTDETR, YOLO
from ultralytics.models.yolo.detect import DetectionValidator

from rtdetr_act import patch_model
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.runs import run_training
from rtdetr_act.study.averaging import RecentWeights
from rtdetr_act.study.snapshot import Snapshots

# DY-ReLU's coefficients are measured on images after each epoch, which must leave no trace; its temperature falls.
PLANS = {"rtdetr": "arelu", "yolo": "arelu, dyrelu_c(tau_start=30.0, tau_epochs=3)@2"}


class Kill(Exception):
    """Ends a training from inside, where Ultralytics does not catch it."""


def build(kind: str, model_yaml: Path) -> Any:
    """Return a patched model."""
    model = (RTDETR if kind == "rtdetr" else YOLO)(str(model_yaml))
    patch_model(model, PLANS[kind], **({} if kind == "rtdetr" else {"init": "match"}))
    return model


def train(
    kind: str, model_yaml: Path, data: Data, folder: Path, kills: list[tuple[int, int]], **more: Any
) -> tuple[Any, RecentWeights]:
    """Train, ending after each (epoch, batch) of `kills` and going on in a new object; return what the last one has."""
    for kill in [*kills, None]:
        model = build(kind, model_yaml)
        batches = [0]

        def count(trainer: Any, batches: list[int] = batches, kill: tuple[int, int] | None = kill) -> None:
            batches[0] += 1
            if kill == (trainer.epoch, batches[0]):
                raise Kill

        def start(_: Any, batches: list[int] = batches) -> None:
            batches[0] = 0

        recent = RecentWeights(3)
        recent.attach(model)
        Snapshots(folder / "snapshot.pt", recent).attach(model)
        model.add_callback("on_train_epoch_start", start)
        model.add_callback("on_train_batch_end", count)
        arguments = tiny.train_args(data.detect, folder, epochs=4, batch=3, close_mosaic=2, lr0=0.003, **more)
        if kill is None:
            model.train(**arguments)
        else:
            with pytest.raises(Kill):
                model.train(**arguments)
    return model, recent


# Without a true positive, older releases report the scores of the validation before, which a new process does not know.
STALE = "any():" in inspect.getsource(DetectionValidator.get_stats)


def curve(folder: Path) -> list[dict[str, str]]:
    """Return the rows of results.csv without the time, and with 0 for scores that may be those of the row before."""
    lines = (folder / "run" / "results.csv").read_text().replace(" ", "").splitlines()
    rows = [{key: cell for key, cell in row.items() if key != "time"} for row in csv.DictReader(lines)]
    scores = [{key: cell for key, cell in row.items() if key.startswith("metrics/")} for row in rows]
    for row, before, now in zip(rows[1:], scores, scores[1:], strict=False):
        if STALE and now == before:
            row.update(dict.fromkeys(now, "0"))
    return rows


@pytest.mark.kill
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        # Steps gather several batches, over the end of epochs too, while the warm-up changes how many.
        ("rtdetr", {"nbs": 12, "mosaic": 1.0, "warmup_epochs": 2}),
        ("yolo", {"nbs": 7, "mosaic": 0.5, "mixup": 0.3, "warmup_epochs": 1}),
    ],
)
def test_killed_run_ends_as_the_undisturbed_one(
    kind: str, more: dict[str, Any], stock_yaml: Path, data: Data, tmp_path: Path
) -> None:
    model_yaml = stock_yaml if kind == "rtdetr" else tiny.write_yaml(tmp_path / "yolo.yaml", tiny.yolo())
    plain, kept = build(kind, model_yaml), RecentWeights(3)
    kept.attach(plain)
    arguments = {"epochs": 4, "batch": 3, "close_mosaic": 2, "lr0": 0.003, **more}
    plain.train(**tiny.train_args(data.detect, tmp_path / "plain", **arguments))

    # Before the first snapshot, within the warm-up, and behind the end of mosaics.
    kills = [(0, 2), (1, 2), (3, 3)]
    killed, recent = train(kind, model_yaml, data, tmp_path / "killed", kills, **more)

    assert curve(tmp_path / "killed") == curve(tmp_path / "plain")
    histories = [(tmp_path / name / "run" / "activations.csv").read_bytes() for name in ("killed", "plain")]
    assert histories[0] == histories[1] and b"\n4,model.0" in histories[0]
    expected, found = plain.trainer.model.state_dict(), killed.trainer.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(value, expected[name]) for name, value in killed.trainer.ema.ema.state_dict().items())
    assert len(kept.epochs) == 3 and [each for each, _ in recent.epochs] == [each for each, _ in kept.epochs]
    for (_, one), (_, other) in zip(recent.epochs, kept.epochs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.integration
def test_damaged_snapshot_starts_the_run_again(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    (tmp_path / "snapshot.pt").write_bytes(b"half a fi")
    model = RTDETR(str(stock_yaml))
    Snapshots(tmp_path / "snapshot.pt").attach(model)
    model.train(**tiny.train_args(data.detect, tmp_path, epochs=2))
    assert model.trainer.start_epoch == 0
    assert len(curve(tmp_path)) == 2


@pytest.mark.kill
def test_full_disk_leaves_the_last_checkpoints_whole(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    weights = tmp_path / "run" / "weights"
    first: dict[str, bytes] = {}

    def note(trainer: Any) -> None:
        first.update({path.name: path.read_bytes() for path in weights.iterdir()})

    def fill(trainer: Any) -> None:
        if trainer.epoch == 1:
            disk.enter_context(tiny.full_disk())

    model.add_callback("on_model_save", note)
    model.add_callback("on_train_epoch_end", fill)
    with (
        ExitStack() as disk,
        pytest.raises(InputError, match=r"File too large; go on with: rtdetr-act resume .*last\.pt"),
    ):
        run_training(model, **tiny.train_args(data.detect, tmp_path, epochs=3))
    assert set(first) == {"best.pt", "last.pt"}
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == first
