"""What trackers log of a real training, read back from TensorBoard's own file."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from rtdetr_act import patch_model
from rtdetr_act.analysis.learned import read_quantities

PREFIX = "activations/"
PLAN = "arelu, prelu@1-3, dyrelu_b@13"
EPOCHS = 3
# TensorBoard is off by default, and in Ultralytics while pytest runs. Without validation trainer.metrics is carried
# from one epoch to the next; the last one is validated always.
_TRAINING = """
import json, os, sys
from pathlib import Path
os.environ.pop("PYTEST_CURRENT_TEST", None)
from ultralytics import settings
settings.update({"tensorboard": True, "raytune": False})  # ray takes seconds to import
from ultralytics import RTDETR
from rtdetr_act import patch_model
from rtdetr_act.integrations.ultralytics.runs import run_training

arguments = json.loads(Path(sys.argv[1]).read_text())
model = RTDETR(sys.argv[2])
patch_model(model, sys.argv[3])
model.train(**{**arguments, "name": "patched", "epochs": int(sys.argv[4])})
run_training(RTDETR(sys.argv[2]), **{**arguments, "name": "stock"})
"""


def learned_parameters(model: nn.Module) -> dict[str, float]:
    """Return the learned quantities of a model by site and name."""
    return {f"{read.site}.{read.name}": read.value for read in read_quantities(model)}


@dataclass(frozen=True)
class Logged:
    """The folder of a run, and its event file as TensorBoard reads it."""

    folder: Path
    events: Any


@pytest.fixture(scope="module")
def runs(data: Any, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Logged]:
    """Train a patched model for three epochs and then a stock one for one, in a process of their own."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "config").mkdir()
    arguments = tiny.train_args(data.detect, folder, val=False, save_period=1)
    (folder / "args.json").write_text(json.dumps(arguments))
    result = tiny.run_python(
        _TRAINING, folder, folder / "args.json", stock_yaml, PLAN, EPOCHS, YOLO_CONFIG_DIR=str(folder / "config")
    )
    assert result.returncode == 0, result.stderr
    return {
        name: Logged(
            folder / name,
            reader.EventAccumulator(str(next((folder / name).glob("events.out.*")))).Reload(),
        )
        for name in ("patched", "stock")
    }


@pytest.mark.integration
def test_plan_is_logged(runs: dict[str, Logged]) -> None:
    events = runs["patched"].events
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.startswith(PREFIX)
    }
    assert texts == {f"{PREFIX}plan/text_summary": PLAN, f"{PREFIX}act_lr/text_summary": "1.0"}


@pytest.mark.integration
def test_parameters_of_every_epoch_are_those_of_its_checkpoint(runs: dict[str, Logged]) -> None:
    folder, events = runs["patched"].folder, runs["patched"].events
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(PREFIX)]
    logged = {tag.removeprefix(PREFIX): [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    generated = {name: logged.pop(name) for name in list(logged) if name.startswith("model.13.")}
    expected: dict[str, list[tuple[int, Any]]] = {}
    for epoch in range(EPOCHS):
        for site, module in tiny.activations(tiny.load(folder / "weights" / f"epoch{epoch}.pt")).items():
            if type(module).__name__ == "AReLU":
                values = {"alpha": module.alpha.clamp(0.01, 0.99), "beta": torch.sigmoid(module.beta)}
            elif type(module).__name__ == "PReLU":
                values = {"weight": module.weight.mean()}
            else:
                continue
            for name, value in values.items():
                rounded = pytest.approx(value.item(), rel=2e-3)  # a checkpoint is saved in half precision
                expected.setdefault(f"{site}.{name}", []).append((epoch + 1, rounded))
    assert len(expected) > tiny.CONV_SITES
    assert logged == expected
    assert any(abs(first[1] - last[1]) > 5e-3 for first, *_, last in logged.values())  # they do learn
    assert [len(values) for values in generated.values()] == [EPOCHS] * 3 * 9  # what images get of DY-ReLU


@pytest.mark.integration
def test_trackers_and_file_agree(runs: dict[str, Logged]) -> None:
    folder, events = runs["patched"].folder, runs["patched"].events
    with (folder / "activations.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] != "0"]
    written = {
        (int(row["epoch"]), f"{row['site']}.{row['quantity']}"): pytest.approx(float(row["value"]), rel=1e-5, abs=1e-12)
        for row in rows
    }
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(PREFIX)]
    assert {(e.step, tag.removeprefix(PREFIX)): e.value for tag in tags for e in events.Scalars(tag)} == written
    assert not (runs["stock"].folder / "activations.csv").exists()


@pytest.mark.integration
def test_files_of_the_run_are_those_of_a_stock_run(runs: dict[str, Logged]) -> None:
    patched, stock = runs["patched"].folder, runs["stock"].folder
    expected = _metrics(stock / "weights" / "last.pt")
    assert len(expected) > 4
    for name in ("epoch0.pt", "epoch1.pt", "epoch2.pt", "last.pt", "best.pt"):
        assert _metrics(patched / "weights" / name) == expected
    rows, stock_rows = (list(csv.reader((run / "results.csv").open(encoding="utf-8"))) for run in (patched, stock))
    assert rows[0] == stock_rows[0]
    assert [len(row) for row in rows] == [len(stock_rows[0])] * (1 + EPOCHS)


def _metrics(checkpoint: Path) -> set[str]:
    return set(torch.load(checkpoint, map_location="cpu", weights_only=False)["train_metrics"])


@pytest.mark.integration
def test_stock_model_logs_nothing_new(runs: dict[str, Logged]) -> None:
    tags = runs["stock"].events.Tags()
    assert any(tag.startswith("metrics/") for tag in tags["scalars"])
    assert not [tag for kind in ("scalars", "tensors") for tag in tags[kind] if tag.startswith(PREFIX)]


def _network(activation: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU())
    patch_model(model, activation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=2)
    return model


def test_per_channel_parameters_are_means() -> None:
    model = _network("aconc")
    expected = {f"{i}.{name}": getattr(model[i], name).mean().item() for i in (1, 3) for name in ("p1", "p2", "beta")}
    assert learned_parameters(model) == expected


def test_slopes_of_arelu_are_those_it_multiplies_by() -> None:
    model = _network("arelu")
    with torch.no_grad():
        model[1].alpha.fill_(-3)
    read = learned_parameters(model)
    one = torch.ones(())
    for i in (1, 3):
        assert 1 + read[f"{i}.beta"] == pytest.approx(model[i](one).item(), rel=1e-6)
        assert -read[f"{i}.alpha"] == pytest.approx(model[i](-one).item(), rel=1e-6)


@pytest.mark.parametrize("activation", ["dyrelu_b", "dyrelu_c", "frelu"])
def test_generated_slopes_are_one_number_per_site(activation: str) -> None:
    model = _network(activation)
    expected = {
        f"{i}.weights_norm": pytest.approx(
            torch.cat([p.detach().flatten() for p in model[i].parameters()]).norm().item()
        )
        for i in (1, 3)
    }
    assert learned_parameters(model) == expected


def test_meta_acon_has_both() -> None:
    read = learned_parameters(_network("meta_aconc"))
    assert list(read) == [f"{i}.{name}" for i in (1, 3) for name in ("p1", "p2", "weights_norm")]


@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_nothing_learned_is_nothing_logged(activation: str) -> None:
    assert learned_parameters(_network(activation)) == {}
    assert learned_parameters(nn.Sequential(nn.PReLU())) == {}
