"""Sensitivity: the costs are those of separate swaps, the costliest sites are kept, and the network is as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import polars
import pytest
import tiny
import torch
from conftest import Data
from test_cli import run
from torch import Tensor, nn
from ultralytics import RTDETR, YOLO

from rtdetr_act import Plan, find_sites, measure_checkpoint_sensitivity, measure_sensitivity, patch_model, refit
from rtdetr_act.analysis.diagnosis import compute_training_loss
from rtdetr_act.analysis.sensitivity import PlanCost, _choose
from rtdetr_act.errors import InputError, RtdetrActError, SelectionError, SpecError, TrainingError
from rtdetr_act.integrations.ultralytics.datasets import check_data
from rtdetr_act.integrations.ultralytics.images import load_batches
from rtdetr_act.surgery.modules import evaluation_mode

IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Three branches whose SiLUs get inputs of different scale; a ReLU differs most from SiLU in `middle`.

    Far from 0 both are the same, and a branch that is hardly weighted matters little whatever stands in it.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3)
        self.far, self.middle, self.hardly, self.already = nn.SiLU(), nn.SiLU(), nn.SiLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = [self.far(10 * x) / 10, self.middle(x), 0.01 * self.hardly(x), self.already(x)]
        return torch.cat(parts, 1)


def distance(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return a loss that is 1 for the network that made the batch."""
    x, y = batch
    return 1 + (network(x) - y).square().mean()


def make_batches(network: nn.Module, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(2)]
    with torch.no_grad():
        return [(x, network(x)) for x in images]


def test_the_site_that_changes_the_network_most_is_kept_and_the_network_is_as_it_was() -> None:
    net = Branches().train()
    state, text = copy.deepcopy(net.state_dict()), repr(net)
    random = torch.get_rng_state()
    choosing, scoring = make_batches(net, 1), make_batches(net, 2)
    found = measure_sensitivity(net, "relu", IMAGES, choosing, scoring, distance, bound=1e-4, most=0.5)
    costs = {site.name: site.cost for site in found.sites}
    assert list(costs) == ["far", "middle", "hardly"]  # where a ReLU stands already, nothing is swapped
    assert costs["middle"] > 10 * max(costs["far"], costs["hardly"]) and min(costs.values()) > 0
    assert found.kept == ("middle",) and found.is_within_bound
    assert [site.kept for site in found.sites] == [False, True, False]
    assert {each.name: len(each.kept) for each in found.plans} == {
        "nothing swapped": 3,
        "everything swapped": 0,
        "proposed": 1,
        "last ones kept": 1,
    }
    nothing, everything, proposed, last = found.plans
    assert nothing.cost == nothing.choice == 0 and last.kept == ("hardly",)
    assert proposed.cost < 0.1 * min(everything.cost, last.cost)
    assert repr(net) == text and net.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert json.loads(json.dumps(found.to_dict()))["plan"] == found.plan.to_yaml()
    assert patch_model(net, found.plan).sites == ["far", "hardly", "already"]


def test_a_cost_is_that_of_the_swap_and_refit_alone() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3))
    net = nn.Sequential(*layers)
    choosing = make_batches(net, 1)
    found = measure_sensitivity(net, "relu", IMAGES, choosing, make_batches(net, 2), distance)
    other = copy.deepcopy(net)
    patch_model(other, "relu", include="1", init="match")
    refit(other, IMAGES, net)
    with torch.no_grad():
        losses = torch.stack([distance(other, batch) for batch in choosing]).double()
    assert found.sites[0].cost == pytest.approx(float(losses.mean()) - 1, rel=1e-3)
    change = float((losses - 1).square().mean().sqrt())
    assert found.sites[0].change == pytest.approx(change, rel=1e-2) and change >= found.sites[0].cost
    # The losses before the swap are all 1, so that the error of their ratio is that of the mean.
    assert found.sites[0].error == pytest.approx(float(losses.std()) / 2**0.5, rel=1e-2)


@pytest.mark.parametrize(("bound", "fewest", "measured"), [(0.3, 3, 6), (2.0, 0, 1), (0.0, 10, 2), (0.95, 1, 6)])
def test_the_fewest_sites_are_found_by_bisection(bound: float, fewest: int, measured: int) -> None:
    def measure(count: int) -> PlanCost:
        return PlanCost("", ("site",) * count, 1 / (1 + count) if count else 1.0, 0.0, 0.0)

    trials = _choose(measure, bound, 10)
    chosen = next((each for each in trials if each.choice <= bound), trials[-1])
    assert len(chosen.kept) == fewest
    assert len(trials) <= measured


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    torch.manual_seed(0)
    YOLO(str(tiny.write_yaml(folder / "tiny-detect.yaml", tiny.yolo()))).save(folder / "tiny.pt")
    return folder / "tiny.pt"


def test_command_writes_the_costs_a_picture_and_a_plan_that_can_be_applied(
    checkpoint: Path, data: Data, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = (f"data={data.detect}", "imgsz=64", "bound=0", "most=0.5", "-o", str(out))
    printed = run("sensitivity", str(checkpoint), "act=relu@2+4", *words)  # a C2f and a Conv
    rows = polars.read_csv(out / "sensitivity.csv")
    sites, layers, sections = (rows.filter(polars.col("kind") == kind) for kind in ("site", "layer", "section"))
    model = YOLO(str(checkpoint))
    assert set(sites["name"]) == {site.name for site in find_sites(model) if site.layer in (2, 4)}
    assert sections["name"].to_list() == ["backbone"] and sections["sites"].to_list() == [len(sites)]
    assert layers["layer"].to_list() == [2, 4] and layers["sites"].to_list() == [len(sites) - 1, 1]
    assert layers["cost"][1] == sites.filter(polars.col("layer") == 4)["cost"][0]
    kept = set(sites.filter(polars.col("kept"))["name"])
    assert kept == set(sites.sort("change", descending=True)["name"][: len(kept)]) and len(kept) <= len(sites) // 2
    report = patch_model(model, Plan.load(out / "plan.yaml"))
    assert set(report.sites) == set(sites["name"]) - kept
    assert "everything swapped" in printed and "mAP50-95" in printed
    assert "proposed" in (out / "sensitivity.md").read_text(encoding="utf-8")
    assert (out / "sensitivity.png").stat().st_size > 20_000
    assert len(list(out.iterdir())) == 4


def test_an_rtdetr_is_measured_without_the_sites_that_are_relu_already(data: Data, stock_yaml: Path) -> None:
    torch.manual_seed(0)
    model = RTDETR(str(stock_yaml))
    checked = check_data(str(data.detect), "detect")
    halves = [load_batches(model, checked, 4, 64, 1, part=slice(start, None, 2)) for start in (0, 1)]
    images = torch.cat([batch["img"] for batch in halves[0]])
    found = measure_sensitivity(model, "relu", images, *halves, most=0.0)
    assert len(found.sites) == tiny.SILU_SITES and {site.section for site in found.sites} == {"neck"}
    assert all(site.change > 0 and site.change >= abs(site.cost) for site in found.sites)
    assert found.kept == () and [each.name for each in found.plans][-1] == "proposed"


def test_an_interrupted_measurement_leaves_no_folder(checkpoint: Path, data: Data, tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_checkpoint_sensitivity(
            checkpoint, "relu", data.detect, tmp_path / "a" / "b", imgsz=64, show_progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", tiny.YOLO_HEADS)
def test_the_loss_of_every_task_can_be_measured_in_evaluation_mode(task: str, data: Data, tmp_path: Path) -> None:
    model = YOLO(str(tiny.write_yaml(tmp_path / f"tiny-{task}.yaml", tiny.yolo(task))))
    checked = check_data(str(data.of(task)), task)
    halves = [load_batches(model, checked, 8, 64, 2, part=slice(start, None, 2)) for start in (0, 1)]
    assert [len(batch["img"]) for half in halves for batch in half] == [2, 2, 2, 2]
    assert not any(torch.equal(a["img"], b["img"]) for a in halves[0] for b in halves[1])
    with evaluation_mode(model.model), torch.no_grad():
        losses = [float(compute_training_loss(model.model, batch)) for batch in halves[0]]
        assert losses == [float(compute_training_loss(model.model, batch)) for batch in halves[0]]
    assert min(losses) > 0


def test_what_cannot_be_measured_is_said() -> None:
    net = Branches()
    batches = make_batches(net, 1)

    def measure(activation: str = "relu", images: Tensor = IMAGES, choosing: object = batches, **more: object) -> None:
        arguments = {"loss": distance, "scoring": batches, **more}
        measure_sensitivity(net, activation, images, choosing, **arguments)  # type: ignore[arg-type]

    for wrong, error, words in (
        (lambda: measure("rleu"), SpecError, "there is no activation 'rleu' in the zoo"),
        (lambda: measure("relu from=relu"), SelectionError, "nothing to swap: the model computes relu from=relu"),
        (lambda: measure("relu from=mish"), SelectionError, "nothing to swap: no activation of the model is"),
        (lambda: measure(images=IMAGES[:0]), InputError, "no image to refit"),
        (lambda: measure(choosing=[]), InputError, "there are no labelled images"),
        (lambda: measure(scoring=[]), InputError, "there are no labelled images"),
        (lambda: measure(bound=-0.1), SpecError, "bound is a share from 0 to 1 such as 0.01, not -0.1"),
        (lambda: measure(most=2), SpecError, "most is a share from 0 to 1 such as 0.25, not 2"),
        (lambda: measure(loss=None), InputError, "no training loss of its own"),
        (lambda: measure(loss=lambda m, b: m(b[0])), InputError, "one element, not shape"),
        (lambda: measure(loss=lambda m, b: m(b[0]).sum() * 0), TrainingError, "the loss of the model is 0"),
    ):
        with pytest.raises(error, match=words):
            wrong()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("data=detect",), "sensitivity needs an activation: rtdetr-act sensitivity best.pt act=relu"),
        (("act=rleu", "data=detect"), "there is no activation 'rleu' in the zoo; did you mean 'relu'"),
        (("act=silu", "data=detect"), "nothing to swap"),
        (("act=relu,relu6", "data=detect"), "takes one activation or plan, not 2"),
        (("act=relu",), "the checkpoint does not tell what it was trained on: name a data set with data="),
        (("act=relu", "data=nowhere.yaml"), "there is no data set 'nowhere.yaml'"),
        (("act=relu", "data=empty"), "have no labels, which the loss needs"),
        (("act=relu", "data=more"), "knows 2 classes, and .* has 3"),
        (("act=relu", "data=detect", "epochs=3"), "sensitivity takes imgsz, batch and device, not 'epochs'"),
    ],
)
def test_command_says_what_is_wrong(
    words: tuple[str, ...], error: str, checkpoint: Path, data: Data, tmp_path: Path
) -> None:
    rows = {"path": str(data.detect.parent / "detect"), "train": "images", "val": "images"}
    empty = tmp_path / "empty" / "images"
    empty.mkdir(parents=True)
    (empty / "0.png").write_bytes(data.image.read_bytes())
    files = {
        "data=detect": data.detect,
        "data=more": tiny.write_yaml(tmp_path / "more.yaml", {**rows, "names": list("abc")}),
        "data=empty": tiny.write_yaml(tmp_path / "empty.yaml", {**rows, "val": str(empty), "names": list("ab")}),
    }
    given = [f"data={files[word]}" if word in files else word for word in words]
    with pytest.raises(RtdetrActError, match=error):
        run("sensitivity", str(checkpoint), "imgsz=64", "-o", str(tmp_path / "out"), *given)
    assert not (tmp_path / "out").exists()
