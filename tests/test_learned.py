"""What activations learned, as real trainings write it down: the file, the picture, the command."""

from __future__ import annotations

import csv
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
import torch
from conftest import Data, Resumed, Run
from torch import nn
from typer.testing import CliRunner
from ultralytics import RTDETR, YOLO

from rtdetr_act import patch_model
from rtdetr_act.analysis.history import COLUMNS, make_history, read_history, write_quantities
from rtdetr_act.analysis.history_figure import draw_history
from rtdetr_act.analysis.learned import Quantity, read_quantities
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, ModelError
from rtdetr_act.integrations.ultralytics import tracking
from rtdetr_act.integrations.ultralytics.images import pick_images
from rtdetr_act.integrations.ultralytics.runs import run_training
from rtdetr_act.workflows.fold import fold_checkpoint

EPOCHS = 2
COEFFICIENTS = ("a1", "a2", "b1", "b2")
Values = dict[tuple[int, str, str], float]


def train(plan: str, model_yaml: Path, data: Data, folder: Path, **more: Any) -> Path:
    """Train two epochs, each with a checkpoint of its own, and return the run folder."""
    model = (RTDETR if "stock" in model_yaml.name else YOLO)(str(model_yaml))
    patch_model(model, plan)
    model.train(**tiny.train_args(data.detect, folder, epochs=EPOCHS, save_period=1, **more))
    return folder / "run"


@pytest.fixture(scope="module")
def slopes_run(data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train AReLU, and PReLU with a slope per channel in the last layer with sites, with pictures."""
    plan = "arelu, prelu(per_channel=True)@13"
    return train(plan, stock_yaml, data, tmp_path_factory.mktemp("slopes"), plots=True)


@pytest.fixture(scope="module")
def dynamic_run(data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train DY-ReLU-B, with augmentation that draws from every random generator."""
    return train("dyrelu_b", stock_yaml, data, tmp_path_factory.mktemp("dynamic"), mosaic=1.0, mixup=0.5, hsv_h=0.5)


def values_of(run: Path) -> Values:
    """Return the values of a run's file by (epoch, site, quantity); none stands there twice."""
    with (run / "activations.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    values = {(int(row["epoch"]), row["site"], row["quantity"]): float(row["value"]) for row in rows}
    assert len(values) == len(rows) and tuple(rows[0]) == COLUMNS
    return values


@pytest.mark.integration
def test_slopes_of_every_epoch_are_those_of_its_checkpoint(slopes_run: Path) -> None:
    expected: dict[tuple[int, str, str], Any] = {}
    for epoch in range(1, EPOCHS + 1):
        for site, module in tiny.activations(tiny.load(slopes_run / "weights" / f"epoch{epoch - 1}.pt")).items():
            if type(module).__name__ == "AReLU":
                read = {"alpha": module.alpha.clamp(0.01, 0.99), "beta": torch.sigmoid(module.beta)}
            elif type(module).__name__ == "PReLU":
                slope = module.weight
                read = {"weight": slope.mean(), "weight_min": slope.min(), "weight_max": slope.max()}
            else:
                continue
            # A checkpoint is saved in half precision.
            expected |= {(epoch, site, name): pytest.approx(value.item(), rel=2e-3) for name, value in read.items()}
    values = values_of(slopes_run)
    assert {key: value for key, value in values.items() if key[0] > 0} == expected
    starts = {"alpha": 0.9, "beta": 1 / (1 + math.exp(-2)), "weight": 0.25, "weight_min": 0.25, "weight_max": 0.25}
    before = {key: value for key, value in values.items() if key[0] == 0}
    assert before == {key: pytest.approx(starts[key[2]], abs=1e-6) for key in before}
    assert {(1, *key[1:]) for key in before} == {key for key in values if key[0] == 1}


@pytest.mark.integration
def test_rows_name_layer_and_activation(slopes_run: Path) -> None:
    with (slopes_run / "activations.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["site"]: (row["layer"], row["activation"]) for row in csv.DictReader(file)}
    assert rows["model.1.m.0.act"] == ("1", "arelu")
    assert rows["model.13.cv1.act"] == ("13", "prelu(per_channel=True)")
    assert len(rows) == tiny.CONV_SITES


@pytest.mark.integration
def test_coefficients_are_those_that_the_images_get(dynamic_run: Path, data: Data) -> None:
    model = tiny.load(dynamic_run / "weights" / "last.pt").eval()
    files = sorted(data.image.parent.glob("*.png"))
    pixels = np.stack([cv2.imread(str(file))[..., ::-1] for file in files])  # 64x64, the size of the training
    seen: dict[str, Any] = {}

    def note(module: Any, inputs: Any, site: str) -> None:
        hidden = torch.relu(module.squeeze(inputs[0].mean((2, 3))))
        deltas = 2 * torch.sigmoid(module.expand(hidden)) - 1
        a1, a2, b1, b2 = deltas.chunk(4, 1)
        seen[site] = dict(zip(COEFFICIENTS, (1 + a1, a2, 0.5 * b1, 0.5 * b2), strict=True))

    for site, module in tiny.activations(model).items():
        if type(module).__name__ == "DyReLUB":
            module.register_forward_pre_hook(lambda module, inputs, site=site: note(module, inputs, site))
    with torch.no_grad():
        model(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255)
    assert len(seen) == tiny.CONV_SITES
    values = values_of(dynamic_run)
    for site, coefficients in seen.items():
        for name, value in coefficients.items():
            mean, spread = value.mean().item(), value.std(0, correction=0).mean().item()
            assert values[EPOCHS, site, name] == pytest.approx(mean, rel=5e-3, abs=2e-5)
            assert values[EPOCHS, site, f"{name}_spread"] == pytest.approx(spread, rel=0.05, abs=1e-6)


@pytest.mark.integration
def test_spread_is_zero_before_the_first_step_and_grows(dynamic_run: Path) -> None:
    values = values_of(dynamic_run)
    spreads = {key: value for key, value in values.items() if key[2].endswith("_spread")}
    assert len(spreads) == (EPOCHS + 1) * 4 * tiny.CONV_SITES
    assert {value for key, value in spreads.items() if key[0] == 0} == {0.0}
    assert {values[0, "model.13.cv1.act", name] for name in COEFFICIENTS} == {1.0, 0.0}
    # In so small a network many hidden units are one, and dead.
    assert sum(value > 1e-6 for key, value in spreads.items() if key[0] == EPOCHS) > 4


@pytest.mark.integration
def test_training_is_the_same_without_the_record(
    data: Data, stock_yaml: Path, dynamic_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "add_callbacks", lambda trainer: None)
    bare = train("dyrelu_b", stock_yaml, data, tmp_path, mosaic=1.0, mixup=0.5, hsv_h=0.5)
    assert not (bare / "activations.csv").exists()
    for name in ("epoch0.pt", "last.pt"):
        found, expected = (tiny.load(run / "weights" / name).state_dict() for run in (dynamic_run, bare))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    first, second = ((run / "results.csv").read_text().splitlines()[-1].split(",") for run in (dynamic_run, bare))
    assert first[2:] == second[2:]


def test_resumed_run_has_every_epoch_once(resumed: Resumed) -> None:
    values = values_of(resumed.folder / "run")  # killed after its first epoch
    sites = {site for _, site, _ in values}
    assert values.keys() == {(epoch, site, name) for epoch in range(4) for site in sites for name in ("alpha", "beta")}
    assert len(sites) == tiny.CONV_SITES
    last = tiny.load(resumed.folder / "run" / "weights" / "last.pt")
    stored = last.model[0].stem1.act.beta.item()
    assert values[3, "model.0.stem1.act", "beta"] == pytest.approx(1 / (1 + math.exp(-stored)), rel=2e-3)


def test_rows_from_the_epoch_on_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "activations.csv"
    for epoch, value in enumerate((0.25, 0.5, 0.75, 1.0)):
        write_quantities(path, epoch, [Quantity("model.3.act", "leaky(a=1, b=2)", "weight", value)])
    write_quantities(path, 2, [Quantity("model.3.act", "leaky(a=1, b=2)", "weight", 1 / 3)])
    assert path.read_text(encoding="utf-8").splitlines()[1:] == [
        '0,model.3.act,3,"leaky(a=1, b=2)",weight,0.25',
        '1,model.3.act,3,"leaky(a=1, b=2)",weight,0.5',
        '2,model.3.act,3,"leaky(a=1, b=2)",weight,0.333333',
    ]
    assert read_history(path)["value"].to_list() == [0.25, 0.5, 0.333333]
    path.write_text("something else\n1,2\n")
    write_quantities(path, 1, [Quantity("a", "prelu", "weight", float("nan"))])
    assert path.read_text(encoding="utf-8").splitlines() == [",".join(COLUMNS), "1,a,,prelu,weight,nan"]
    assert math.isnan(read_history(path)["value"][0])


@pytest.mark.integration
def test_file_that_cannot_be_written_is_one_warning(
    data: Data, stock_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tracking, "log", lambda text, warn=False: said.append(text))
    (tmp_path / "run" / "activations.csv" / "inside").mkdir(parents=True)  # root may write into any folder
    run = train("arelu", stock_yaml, data, tmp_path)
    assert (run / "weights" / "last.pt").exists()
    assert len(said) == 1 and "activations.csv is incomplete" in said[0]
    assert not list(run.glob(".activations*"))


@pytest.mark.integration
def test_images_that_the_model_refuses_cost_the_coefficients_only(
    data: Data, stock_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(tracking, "log", lambda text, warn=False: said.append(text))
    monkeypatch.setattr(tracking, "pick_images", lambda dataset: [torch.zeros(7, 64, 64)])
    run = train("dyrelu_b@13", stock_yaml, data, tmp_path)
    assert len(said) == 1 and "coefficients" in said[0]
    values = values_of(run)
    assert {name for _, _, name in values} == {"weights_norm"} and {epoch for epoch, _, _ in values} == {0, 1, 2}


@pytest.mark.integration
def test_folder_that_is_used_again_holds_the_new_training(
    data: Data, stock_yaml: Path, slopes_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("activations.csv", "activations.png"):
        shutil.copy(slopes_run / name, tmp_path / "run" / name)
    run_training(RTDETR(str(stock_yaml)), **tiny.train_args(data.detect, tmp_path))  # nothing learnable in it
    assert not list((tmp_path / "run").glob("activations.*"))


@pytest.mark.integration
def test_yolo_is_measured_on_its_rectangles(data: Data, tmp_path: Path) -> None:
    folder = tmp_path / "shapes" / "images"
    shutil.copytree(data.image.parent.parent / "labels", folder.parent / "labels", ignore=lambda *_: ["labels.cache"])
    folder.mkdir()
    for number in range(8):
        image = np.full((32 if number % 2 else 64, 64, 3), 20 * number, np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    settings = {"path": str(folder.parent), "train": "images", "val": "images", "names": ["a", "b"]}
    source = tiny.write_yaml(tmp_path / "rectangles.yaml", settings)
    model = YOLO(str(tiny.write_yaml(tmp_path / "yolo.yaml", tiny.yolo())))
    patch_model(model, "meta_aconc")
    shapes: set[Any] = set()
    model.add_callback(
        "on_train_end", lambda t: shapes.update(image.shape for image in getattr(t, tracking._RECORD).images)
    )
    model.train(**tiny.train_args(source, tmp_path, batch=2))
    assert len(shapes) > 1
    values = values_of(tmp_path / "run")
    assert all(value > 0 for (_, _, name), value in values.items() if name == "beta_spread")
    assert {name for _, _, name in values} == {"p1", "p2", "weights_norm", "beta", "beta_spread"}


@pytest.mark.parametrize("activation", ["dyrelu_a", "dyrelu_b(k=3)", "dyrelu_c", "meta_aconc"])
def test_measuring_leaves_the_model_as_it_was(activation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
    patch_model(model, activation)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    images = [torch.rand(3, 4, 6) for _ in range(5)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    read = {one.name: one.value for one in read_quantities(model, images, batch=2)}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    module, x = model[2], model[:2].eval()(torch.stack(images)).detach()
    expected = {"beta": module.compute_beta(x)} if activation == "meta_aconc" else {}
    if not expected:
        a, b = module.coefficients(x)
        expected = {
            f"{letter}{k + 1}": part[:, :, 0, 0]
            for letter, parts in (("a", a), ("b", b))
            for k, part in enumerate(parts)
        }
    for name, value in expected.items():
        assert read[name] == pytest.approx(value.mean().item(), rel=1e-4, abs=1e-6)
        assert read[f"{name}_spread"] == pytest.approx(value.std(0, correction=0).mean().item(), rel=1e-4)
    if activation == "dyrelu_c":
        pi = module.attention(x).flatten(1)
        assert read["pi"] == pytest.approx(pi.mean().item(), rel=1e-4)
        assert read["pi_spread"] == pytest.approx(pi.std(1, correction=0).mean().item(), rel=1e-4)
    assert len(read) == 2 * len(expected) + (2 if activation == "dyrelu_c" else 0) + (3 if "meta" in activation else 1)


def test_picking_images_draws_no_random_number() -> None:
    class Drawn:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> dict[str, Any]:
            random.random(), np.random.rand(), torch.rand(1)
            return {"img": torch.tensor(index)}

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    picked = [int(image) for image in pick_images(Drawn())]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert len(picked) == 16 and picked == sorted(set(picked)) and picked[-1] > 36
    assert [int(image) for image in pick_images([{"img": torch.tensor(i)} for i in range(3)])] == [0, 1, 2]


@pytest.mark.parametrize("parts", [1, 2])
def test_picking_images_leaves_what_a_data_set_has_at_hand(parts: int) -> None:
    class Kept(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.ims, self.buffer = [None, "image", None, None], [1]

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.ims[index] = "image"
            self.buffer.append(index)
            return {"img": torch.tensor(index)}

    datasets = [Kept() for _ in range(parts)]
    pick_images(torch.utils.data.ConcatDataset(datasets) if parts > 1 else datasets[0])
    for dataset in datasets:
        assert dataset.ims == [None, "image", None, None] and dataset.buffer == [1]


# --- the picture ----------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_picture_comes_with_the_plots_only(slopes_run: Path, dynamic_run: Path) -> None:
    height, width = cv2.imread(str(slopes_run / "activations.png")).shape[:2]
    assert height > 400 and width > 600
    assert not (dynamic_run / "activations.png").exists()


def test_rows_of_the_picture_are_the_sites_in_order(tmp_path: Path) -> None:
    sites = [f"model.{index}.act" for index in range(12)]
    history = [
        (epoch, site, index, "arelu", "alpha", 0.9 + (0.01 if index == 10 else 0.0) * epoch)
        for epoch in range(3)
        for index, site in enumerate(sites)
    ]
    import polars

    path = draw_history(polars.DataFrame(history, schema=list(COLUMNS), orient="row"), tmp_path / "one.png")
    image = cv2.imread(str(path)).astype(int)
    blue, _, red = np.moveaxis(image, -1, 0)
    rows, columns = np.nonzero(red - blue > 60)
    heat = rows < 0.8 * image.shape[0]  # below it is the colour bar
    rows, columns = rows[heat], columns[heat]
    top, bottom = 0.12 * image.shape[0], 0.75 * image.shape[0]
    assert top + 9 / 12 * (bottom - top) < rows.mean() < image.shape[0] * 0.8
    assert columns.min() > image.shape[1] / 3 and np.ptp(rows) < 1.5 * (bottom - top) / 12


@pytest.mark.parametrize(("sites", "epochs"), [(1, 1), (1, 0), (60, 30)])
def test_picture_of_any_size_leaves_pyplot_alone(sites: int, epochs: int, tmp_path: Path) -> None:
    import matplotlib
    import polars
    from matplotlib import pyplot

    figures, backend, settings = pyplot.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)
    quantities = [
        Quantity(f"model.{i // 3}.m.{i}.act", "dyrelu_b", name, 0.5) for i in range(sites) for name in COEFFICIENTS
    ]
    history = polars.concat([make_history(quantities, epoch) for epoch in range(epochs + 1)])
    path = draw_history(history, tmp_path / "any.png", "any")
    assert cv2.imread(str(path)).shape[0] > 100 + 15 * sites
    assert (pyplot.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)) == (figures, backend, settings)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no table fold."""
    monkeypatch.setenv("COLUMNS", "200")
    yield


def show(*words: object) -> str:
    result = CliRunner().invoke(app, ["learned", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def cells(output: str, site: str) -> list[str]:
    line = next(line for line in output.splitlines() if f" {site} " in line)
    return [cell.strip() for cell in line.split("│")[1:-1]]


@pytest.mark.integration
def test_command_shows_start_and_end(slopes_run: Path, tmp_path: Path) -> None:
    output = show(slopes_run / "weights" / "last.pt", "-o", tmp_path / "learned.png")
    values = values_of(slopes_run)
    layer, _, alpha, beta = cells(output, "model.0.stem1.act")
    assert (layer, beta.split(" → ")[0]) == ("0", "0.881") and alpha.split(" → ")[0] == "0.9"
    assert float(alpha.split(" → ")[1]) == pytest.approx(values[EPOCHS, "model.0.stem1.act", "alpha"], rel=5e-3)
    assert len(cells(output, "model.13.cv1.act")) == 5 and "prelu(per_channel=True)" in output
    assert sum("model." in line for line in output.splitlines()) == tiny.CONV_SITES
    assert (tmp_path / "learned.png").stat().st_size > 10_000


@pytest.mark.integration
def test_command_takes_coefficients_from_the_run_or_from_data(
    dynamic_run: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = dynamic_run / "weights" / "last.pt"
    noted = show(weights)
    assert "epoch 2 in activations.csv" in noted and Path("runs/learned/learned.png").exists()
    Path("alone").mkdir()
    shutil.copy(weights, "alone/best.pt")  # as of an older run, without a history
    bare = show("alone/best.pt", "-o", "bare.svg")
    assert "give data=" in bare and "±" not in bare and "weights_norm" in bare and Path("bare.svg").exists()
    measured = show("alone/best.pt", "--data", data.detect)
    assert "give data=" not in measured
    for site in ("model.1.m.0.act", "model.13.cv1.act"):
        ends = [float(cell.split(" → ")[1]) for cell in cells(noted, site)[2:]]
        assert [float(cell) for cell in cells(measured, site)[2:]] == pytest.approx(ends, rel=0.02, abs=2e-5)
    checkpoint = torch.load("alone/best.pt", weights_only=False)
    checkpoint["train_args"]["imgsz"] = [64, 64]  # height and width
    torch.save(checkpoint, "alone/best.pt")
    again = show("alone/best.pt", "--data", data.detect)
    assert cells(again, "model.13.cv1.act") == cells(measured, "model.13.cv1.act")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "bare.svg", "runs"]


def test_nothing_learned_is_one_sentence(stock_run: Run, patched_run: Run, tmp_path: Path) -> None:
    _, folded = fold_checkpoint(str(patched_run.pt), tmp_path / "folded.pt")
    for weights in (stock_run.pt, folded):
        with pytest.raises(ModelError, match="no learnable activations") as raised:
            show(weights, "-o", tmp_path / "x.png")
        assert raised.value.exit_code == 2
    assert "alpha" in show(patched_run.pt, "-o", tmp_path / "x.png")


def test_user_mistakes_are_one_sentence(patched_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ending"):
        show(patched_run.pt, "-o", tmp_path / "x.txt")
    with pytest.raises(InputError, match="not a checkpoint"):
        show("rtdetr-n.yaml")
    weights = tmp_path / "run" / "weights" / "last.pt"
    weights.parent.mkdir(parents=True)
    shutil.copy(patched_run.pt, weights)
    (tmp_path / "run" / "activations.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"activations\.csv' cannot be read"):
        show(weights, "-o", tmp_path / "x.png")
