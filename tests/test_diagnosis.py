"""The diagnosis: every quantity against a plain computation in float64, and a model that is as it was afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import tiny
import torch
from conftest import Data, Run
from test_cli import run
from torch import Tensor, nn
from ultralytics import RTDETR, YOLO
from ultralytics.nn.modules.block import ResNetBlock

from rtdetr_act import create, diagnose, find_sites, names, patch_model
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.analysis.diagnosis import Diagnosis, SiteDiagnosis, _Probe
from rtdetr_act.analysis.diagnosis_report import describe_gradients, draw_diagnosis
from rtdetr_act.errors import InputError, ModelError, RtdetrActError, TrainingError
from rtdetr_act.integrations.ultralytics.datasets import check_data
from rtdetr_act.integrations.ultralytics.images import load_batches

torchvision = pytest.importorskip("torchvision")


class Skip(nn.Module):
    """Reads the first activation's input twice, so that its gradient is more than what the activation gives back."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn, self.act1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=inplace)
        self.conv2, self.act2 = nn.Conv2d(6, 6, 1), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn(self.conv1(x))
        skip = 0.5 * first
        return self.act2(self.conv2(self.act1(first)) + skip)


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def make(kind: type[nn.Module] = Skip, **more: bool) -> nn.Module:
    torch.manual_seed(0)
    return kind(**more).double()


def draw(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 9, 9, generator=generator, dtype=torch.float64) for _ in range(count)]


def expect(pairs: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Compute all quantities from (x, y, dL/dx, dL/dy, dy/dx) of each batch, the long way."""
    rows = []
    for x, y, into, out, slope in pairs:
        on = x > 0
        rows.append(
            {
                "gradient_in": into.pow(2).sum().sqrt(),
                "gradient_out": out.pow(2).sum().sqrt(),
                "gain": (into.pow(2).sum() / out.pow(2).sum()).sqrt(),
                "gain_active": (into.pow(2)[on].sum() / out.pow(2)[on].sum()).sqrt(),
                "scale": y.pow(2).mean().sqrt(),
                "mean": y.mean(),
                "saturation": (slope.abs() < 0.01).double().mean(),
            }
        )
    found = {key: float(torch.stack([row[key] for row in rows]).mean()) for key in rows[0]}
    slopes = torch.cat([slope.transpose(0, 1).flatten(1) for *_, slope in pairs], 1)
    matrix = torch.cat([y.transpose(0, 1).flatten(1) for _, y, *_ in pairs], 1)
    values = torch.linalg.svdvals(matrix)
    values = values[values > 0] / values.sum()
    rank = float((-(values * values.log()).sum()).exp())
    dead = float((slopes.abs() < 1e-6).all(1).double().mean())
    return {**found, "dead": dead, "effective_rank": rank, "rank_share": rank / len(matrix)}


def assert_equal(found: SiteDiagnosis, wanted: dict[str, float]) -> None:
    for key, value in wanted.items():  # singular values by way of their squares have half the digits
        assert getattr(found, key) == pytest.approx(value, rel=1e-6 if "rank" in key else 1e-9, abs=1e-12), key


@pytest.mark.parametrize("inplace", [False, True])
def test_every_quantity_is_that_of_a_plain_computation(inplace: bool) -> None:
    net, batches = make(inplace=inplace), draw()
    with torch.no_grad():
        net.bn.bias[2] = -50.0  # a channel that is never on
    plain = copy.deepcopy(net)
    pairs: list[list] = [[], []]
    for batch in batches:
        x1 = plain.bn(plain.conv1(batch))
        inner = x1.detach().requires_grad_()  # what the activation reads, told apart from what the skip reads
        y1 = inner.clamp(min=0)
        x2 = plain.conv2(y1) + 0.5 * x1
        gate = torch.sigmoid(x2)
        y2 = x2 * gate
        loss = y2.square().mean()
        of_x1, of_y1, of_x2, of_y2 = torch.autograd.grad(loss, [inner, y1, x2, y2])
        pairs[0].append((x1.detach(), y1.detach(), of_x1, of_y1, (x1 > 0).double()))
        pairs[1].append((x2.detach(), y2.detach(), of_x2, of_y2, (gate * (1 + x2 * (1 - gate))).detach()))
    found = diagnose(net, batches, square)
    assert [site.name for site in found.sites] == ["act1", "act2"] and found.batches == 2 and found.left_out == ()
    for site, rows in zip(found.sites, pairs, strict=True):
        assert_equal(site, expect(rows))
    assert found.sites[0].dead == 1 / 6  # as built
    assert found.sites[0].gain_active == 1 and not found.sites[0].swapped


def test_positions_beyond_the_limit_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = diagnose(make(), draw(), square)
    monkeypatch.setattr("rtdetr_act.analysis.diagnosis.MAX_POSITIONS", 100)  # of 196
    part = diagnose(make(), draw(), square)
    for one, other in zip(whole.sites, part.sites, strict=True):
        assert one.effective_rank != other.effective_rank == pytest.approx(one.effective_rank, rel=0.05)
        assert one.gradient_in == other.gradient_in


@pytest.mark.parametrize("spec", ["arelu", "arelu(inplace=True)"])
def test_arelu_multiplies_the_gradient_of_active_inputs_by_its_slope(spec: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)).double()
    patch_model(net, spec)
    betas = [-1.0, 0.3, 2.0]
    for beta in betas:
        net[2].beta.data.fill_(beta)
        (site,) = diagnose(net, draw(), square).sites
        assert site.gain_active == pytest.approx(1 + 1 / (1 + np.exp(-beta)), rel=1e-12)
        assert site.swapped and site.dead == site.saturation == 0


def slopes_by_definition(module: nn.Module, x: Tensor) -> Tensor:
    """Return the derivative of each element by itself through everything, one element at a time."""
    found = torch.zeros_like(x).flatten()
    for index in range(x.numel()):
        leaf = x.clone().requires_grad_()
        (row,) = torch.autograd.grad(module(leaf).flatten()[index], leaf)
        found[index] = row.flatten()[index]
    return found.view_as(x)


@pytest.mark.parametrize("name", [name for name in names() if get_entry(name).name not in ("rrelu", "frelu")])
def test_slopes_are_those_of_single_elements(name: str) -> None:
    torch.manual_seed(0)
    module = create(name, 8).double() if name != "threshold" else create("threshold(0.1, 0.0)")
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    site = find_sites(net)[0]
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    tap = _Probe(site, module)
    wanted = slopes_by_definition(module, x)
    mixes = name in ("softmax", "softmin", "softmax2d", "log_softmax", "glu")
    draws = torch.stack([tap._compute_derivatives(x) for _ in range(3000 if mixes else 1)])
    # A generator reads the pool of 9 positions, of which the element itself is one: its own share stays out here.
    tolerance = 6 * float(draws.std(0).max()) / 3000**0.5 if mixes else 0.1 if hasattr(module, "held_at") else 1e-12
    assert float((draws.mean(0) - wanted).abs().max()) <= tolerance


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc", "frelu"])
def test_held_activations_are_the_activations_where_they_are_held(name: str) -> None:
    torch.manual_seed(0)
    module = create(name, 8)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(module.held_at(x)(x), module(x))
    other = torch.randn(2, 8, 5, 5)
    assert not torch.allclose(module.held_at(x)(other), module(other), atol=1e-3)


def test_a_random_slope_is_the_one_of_the_call() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.RReLU(0.001, 0.3)).double()
    (site,) = diagnose(net, draw(1), square).sites
    x = net[0](draw(1)[0]).detach().requires_grad_()
    torch.manual_seed(0)  # as the diagnosis does for its first batch
    y = net.train()[1](x)
    (slopes,) = torch.autograd.grad(y.sum(), x)
    assert site.saturation == float((slopes < 0.01).double().mean()) > 0
    assert site.scale == pytest.approx(float(y.square().mean().sqrt()), rel=1e-12)


def test_everything_is_as_it_was(data: Data, patched_run: Run) -> None:
    model = RTDETR(str(patched_run.pt))
    batches = load_batches(model, check_data(str(data.detect), "detect"), 4, 64, 2)
    root = model.model.eval()
    root.model[0].train()
    for number, parameter in enumerate(root.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, 0.5) if number % 2 else None

    def picture() -> dict[str, object]:
        return {
            "state": {key: value.clone() for key, value in root.state_dict().items()},
            "modes": [(name, module.training) for name, module in root.named_modules()],
            "classes": [
                (name, type(module), getattr(module, "inplace", None)) for name, module in root.named_modules()
            ],
            "grads": [None if p.grad is None else p.grad.clone() for p in root.parameters()],
            "wants": [p.requires_grad for p in root.parameters()],
            "attributes": sorted(vars(root)),
            "hooks": sum(len(m._forward_hooks) + len(m._backward_hooks) for m in root.modules()),
            "args": copy.deepcopy(root.args),
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
        }

    before, ids = picture(), [id(module) for module in root.modules()]
    images = [batch["img"].clone() for batch in batches]
    found = diagnose(model, batches)
    after = picture()
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert ids == [id(module) for module in root.modules()]
    for one, other in zip(after.pop("grads"), before.pop("grads"), strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    for one, other in zip(after.pop("random"), before.pop("random"), strict=True):
        assert np.array_equal(one, other) if not isinstance(one, tuple) else one == other
    assert before == after
    assert all(torch.equal(batch["img"], image) for batch, image in zip(batches, images, strict=True))
    assert len(found.sites) == tiny.CONV_SITES + tiny.TOKEN_SITES and found.batches == 2
    assert sum(site.swapped for site in found.sites) == tiny.CONV_SITES
    assert all(site.gradient_out > 0 for site in found.sites)
    assert diagnose(model, batches) == found, "the same draws each time"


def test_the_gradient_is_that_of_a_training_step(data: Data, stock_run: Run) -> None:
    """The first site's, against hooks on the model itself, with weights that want gradients."""
    model = RTDETR(str(stock_run.pt))
    batches = load_batches(model, check_data(str(data.detect), "detect"), 4, 64, 4)
    found = diagnose(model, batches)
    root = copy.deepcopy(model.model).train().requires_grad_(True)
    for module in root.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        inputs[0].register_hook(lambda grad: kept.update(into=grad))
        output.register_hook(lambda grad: kept.update(out=grad))

    root.get_submodule(found.sites[0].name).register_forward_hook(keep)
    from ultralytics.cfg import get_cfg

    root.args, root.nc, root.criterion = get_cfg(), 2, None
    root.criterion = root.init_criterion()
    torch.manual_seed(0)
    root.loss(batches[0])[0].sum().backward()
    assert found.sites[0].gradient_in == pytest.approx(float(kept["into"].norm()), rel=1e-4)
    assert found.sites[0].gradient_out == pytest.approx(float(kept["out"].norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("build", "shape", "hidden"),
    [
        (lambda: torchvision.models.resnet18(num_classes=3), (2, 3, 32, 32), 16),
        (lambda: nn.Sequential(ResNetBlock(16, 4), ResNetBlock(16, 4)), (2, 16, 8, 8), 2),
    ],
)
def test_hidden_calls_are_seen(build: Callable[[], nn.Module], shape: tuple[int, ...], hidden: int) -> None:
    torch.manual_seed(0)
    model = build()
    found = diagnose(model, [torch.randn(shape)], square)
    sites = find_sites(model)
    assert sum(site.hidden for site in sites) == hidden
    assert {site.name for site in sites} == {site.name for site in found.sites}
    relus = [site for site in found.sites if "ReLU" in site.activation]
    assert len(relus) >= hidden and all(site.gain_active == pytest.approx(1, rel=1e-6) for site in relus)
    assert not any(hasattr(module, "hidden_calls") for module in model.modules()), "rewired in the copy only"


@pytest.mark.parametrize("task", tiny.YOLO_HEADS)
def test_every_task_has_labelled_batches_and_a_loss(task: str, data: Data, tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / f"tiny-{task}.yaml", tiny.yolo(task))
    model = YOLO(str(path))
    batches = load_batches(model, check_data(str(data.of(task)), task), 3, 64, 2)
    assert [len(batch["img"]) for batch in batches] == [2, 1]
    assert all(0 <= float(batch["img"].min()) < float(batch["img"].max()) <= 1 for batch in batches[:1]) or (
        task == "classify"
    )
    found = diagnose(model, batches)
    assert len(found.sites) == len(find_sites(model)) and all(site.gradient_in > 0 for site in found.sites)


def test_data_names_the_images_of_an_ultralytics_model(data: Data, stock_run: Run) -> None:
    model = RTDETR(str(stock_run.pt))  # which was trained at 64 pixels
    model.model.train()
    random.seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = diagnose(model, data=str(data.detect), images=3, batch=2)
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2]) and model.model.training
    batches = load_batches(model, check_data(str(data.detect), "detect"), 3, 64, 2)
    assert found == diagnose(model, batches) and found.batches == 2
    assert found != diagnose(model, data=str(data.detect), images=3, imgsz=96, batch=2)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "diagnose needs images: give data=, such as data='coco8.yaml', or batches"),
        ({"data": "shapes", "batches": []}, "batches and data= are two sources of images"),
        ({"data": "coco9.yaml"}, "there is no data set 'coco9.yaml'"),
        ({"data": "coco8.yaml", "images": 0}, "images must be one positive integer here, not 0"),
        ({"data": "detect", "imgsz": [64, 64]}, "imgsz must be one positive integer here"),
    ],
)
def test_data_that_cannot_be_used_is_one_sentence(
    settings: dict[str, Any], error: str, data: Data, stock_yaml: Path
) -> None:
    if settings.get("data") in ("detect", "coco8.yaml"):
        settings = {**settings, "data": str(data.detect)}
    with pytest.raises(InputError, match=error):
        diagnose(RTDETR(str(stock_yaml)), **settings)


def test_data_is_for_models_that_know_their_task_and_classes(data: Data, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data= is for RTDETR and YOLO objects, which know their task, not for a Skip"):
        diagnose(make(), data=str(data.detect))
    one_class = tiny.write_yaml(tmp_path / "one.yaml", {**tiny.RTDETR, "nc": 1})
    with pytest.raises(InputError, match=r"' has 2 classes, and the model only 1: give data like its own"):
        diagnose(RTDETR(str(one_class)), data=str(data.detect))


def test_command_prints_tables_and_writes_rows_and_a_figure(data: Data, patched_run: Run, tmp_path: Path) -> None:
    words = ("--data", str(data.detect), "--images", "4", "imgsz=64", "batch=2", "-o", str(tmp_path / "out"))
    printed = run("diagnose", "--model", str(patched_run.pt), "--act", "arelu", "--act", "silu", *words)
    assert "stock" in printed and "backbone" in printed and "silu: the gradient of active inputs" in printed
    rows = polars.read_csv(tmp_path / "out" / "diagnosis.csv")
    assert rows["variant"].unique(maintain_order=True).to_list() == ["stock", "arelu", "silu"]
    sites = tiny.CONV_SITES + tiny.TOKEN_SITES
    assert len(rows) == 3 * sites * 10
    assert (tmp_path / "out" / "diagnosis.png").stat().st_size > 30_000
    printed = run("diagnose", "--model", str(patched_run.pt), "--sites", *words)
    assert printed.count("AReLU") == 0 and printed.count("arelu") >= tiny.CONV_SITES
    assert polars.read_csv(tmp_path / "out" / "diagnosis.csv")["variant"].unique().to_list() == ["arelu"]


@pytest.mark.integration
def test_variants_of_a_yaml_start_from_the_same_weights(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    words = ("--data", str(data.detect), "--images", "4", "imgsz=64", "-o", str(tmp_path))
    # A ReLU under another name: everything must be as in stock where stock is a ReLU.
    run("diagnose", "--model", str(stock_yaml), "--act", "dyrelu_b@backbone", *words)
    rows = polars.read_csv(tmp_path / "diagnosis.csv").pivot("variant", index=["site", "quantity"], values="value")
    assert np.allclose(rows["stock"], rows["dyrelu_b@backbone"], rtol=1e-4, equal_nan=True)


def test_checkpoints_are_compared(data: Data, stock_run: Run, patched_run: Run, tmp_path: Path) -> None:
    words = ("--data", str(data.detect), "--images", "2", "imgsz=64", "-o", str(tmp_path))
    printed = run("diagnose", "--model", str(stock_run.pt), "--model", str(patched_run.pt), *words)
    assert "2 models on detect" in printed and "times run's" in printed
    assert set(polars.read_csv(tmp_path / "diagnosis.csv")["variant"]) == {"run", "run 2"}


def test_the_verdict_counts_and_compares() -> None:
    def site(name: str, gain: float, active: float, into: float, swapped: bool) -> SiteDiagnosis:
        return SiteDiagnosis(name, 0, "backbone", "a", swapped, into, 1, gain, active, 0, 1, 0, 0, 1, 1)

    stock = Diagnosis((site("a", 0.7, 1, 2, False), site("b", 0.7, 1, 2, False), site("c", 0.5, 1, 2, False)), 1)
    other = Diagnosis((site("a", 1.4, 1.9, 3, True), site("b", 1.2, 0.9, 8, True), site("c", 0.5, 1, 2, False)), 1)
    first, second = describe_gradients({"stock": stock, "new": other})
    assert first == (
        "stock: the gradient of active inputs is multiplied by 1.00, by more than 1 at 0 of 3 sites; the whole "
        "gradient's norm by 0.70"
    )
    assert second == (
        "new: the gradient of active inputs is multiplied by 1.40 (median; 0.90 to 1.90), by more than 1 at 1 of 2 "
        "swapped sites; the whole gradient's norm by 1.30 (stock: 0.70 there); the gradient that reaches the input of "
        "the first site is 1.50 times stock's, over the backbone 1.50 times (median)"
    )
    assert draw_diagnosis({"stock": stock, "new": other}, "title").startswith(b"\x89PNG")


def test_what_cannot_be_diagnosed_is_said() -> None:
    net = make()
    for wrong, error, words in (
        (lambda: diagnose(nn.Linear(2, 2), draw(), square), ModelError, "no activation site"),
        (lambda: diagnose(net, [], square), InputError, "no batch"),
        (lambda: diagnose(net, draw()), InputError, "no training loss of its own: give loss="),
        (lambda: diagnose(net, draw(), lambda m, b: m(b)), InputError, "one element, not shape"),
        (lambda: diagnose(net, draw(), lambda m, b: net(b).sum()), InputError, "the model that it is given"),
        (lambda: diagnose(net, draw(), lambda m, b: m(b).sum() * float("nan")), TrainingError, "batch 1 is nan"),
    ):
        with pytest.raises(error, match=words):
            wrong()
    net.kept = net.conv1.weight * 2  # no leaf, which cannot be copied
    with pytest.raises(ModelError, match="which cannot be copied"):
        diagnose(net, draw(), square)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--act", "arleu"), "did you mean 'arelu'"),
        (("epochs=3",), "diagnose takes imgsz, batch and device, not 'epochs'"),
        (("--act", "relu", "--model", "rtdetr-n.yaml", "--model", "yolo11n.yaml"), "in one model"),
        (("--scope", "all"), "name one with act="),
        (("imgsz=0",), "imgsz must be a size in pixels"),
        (("imgsz=[64,64]",), "imgsz must be one positive integer"),
        (("--data", "nowhere.yaml"), "there is no data set"),
        (("device=cuda:77", "imgsz=32"), "device 'cuda:77' cannot be used"),
        (("device=0,0", "imgsz=32"), "device must be a single one"),
    ],
)
def test_command_says_what_is_wrong(words: tuple[str, ...], error: str, data: Data, tmp_path: Path) -> None:
    given = words if "--data" in words else (*words, "--data", str(data.detect))
    with pytest.raises(RtdetrActError, match=error):
        run("diagnose", "-o", str(tmp_path), *given)


def test_a_checkpoint_of_fewer_classes_is_refused(data: Data, patched_run: Run, tmp_path: Path) -> None:
    more = tiny.write_yaml(
        tmp_path / "more.yaml",
        {"path": str(data.detect.parent / "detect"), "train": "images", "val": "images", "names": list("abc")},
    )
    with pytest.raises(InputError, match=r"knows 2 classes, and .* has 3"):
        run("diagnose", "--model", str(patched_run.pt), "--data", str(more), "-o", str(tmp_path))
