"""Folding: the same outputs without the activations of the zoo, all else as it was, or the model left alone."""

from __future__ import annotations

import copy
import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data, Run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner
from ultralytics import RTDETR, YOLO
from ultralytics.nn.modules.block import RepVGGDW, ResNetBlock
from ultralytics.nn.modules.conv import Conv, Conv2, ConvTranspose, DWConv, RepConv
from ultralytics.nn.tasks import BaseModel

from rtdetr_act import FoldReport, find_sites, fold_activations, patch_model, unpatch_model
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.cli.main import app
from rtdetr_act.errors import FoldError, ModelError, RtdetrActError
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.scales import flatten_tensors

models = pytest.importorskip("torchvision").models


def shuffled(model: nn.Module) -> nn.Module:
    """Give every BatchNorm and AReLU values as if it were trained, and return the model in evaluation mode."""
    random = torch.Generator().manual_seed(1)
    for number, unit in enumerate(m for m in model.modules() if isinstance(m, AReLU)):
        unit.alpha.data.fill_((-0.5, 0.3, 1.7, 0.8)[number % 4])  # two of them outside of the clamp
        unit.beta.data.copy_(3 * torch.randn(1, generator=random))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -0.5)):
                t.data.copy_(torch.rand(t.shape, generator=random) + low)
    return model.eval()


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what a copy of a model computes in evaluation mode."""
    with torch.no_grad():
        found = flatten_tensors(copy.deepcopy(model).eval()(x))
    assert any(t.std() > 1e-3 for t in found)
    return found


def assert_near(now: list[Tensor], then: list[Tensor], tolerance: float) -> None:
    """Two lists of outputs agree, in units of the largest value of each."""
    for one, other in zip(now, then, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def assert_folds(model: nn.Module, x: Tensor, sites: int, tolerance: float, example: Any = None) -> FoldReport:
    """Fold a model of AReLUs: none is left, and the outputs are the same."""
    then = outputs(model, x)
    report = fold_activations(model, example)
    assert (len(report), dict(report.kept)) == (sites, {}) and report.error < 1e-11
    assert_near(outputs(model, x), then, tolerance)
    assert not [m for m in model.modules() if isinstance(m, AReLU)]
    slopes = [m.negative_slope for m in model.modules() if type(m) is nn.LeakyReLU]
    assert len(slopes) == sites and all(0 < slope < 1 for slope in slopes)
    return report


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Neither a tensor of a model nor one of its modules is another one afterwards."""
    state, modules = {name: t.clone() for name, t in model.state_dict().items()}, dict(model.named_modules())
    modes, rules = [m.training for m in model.modules()], copy.deepcopy(getattr(model, "yaml", None))
    yield
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[name] is m for name, m in modules.items())
    assert [name for name, t in model.state_dict().items() if not torch.equal(t, state[name])] == []
    assert [m.training for m in model.modules()] == modes and getattr(model, "yaml", None) == rules


class Stack(BaseModel):
    """Layers that Ultralytics fuses as it fuses those of a whole model."""

    def __init__(self, *layers: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = nn.Sequential(*layers, nn.Conv2d(8, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def is_fused(self, thresh: int = 10) -> bool:
        return False


PRODUCERS: dict[str, Callable[[], list[nn.Module]]] = {
    "Conv": lambda: [Conv(3, 8, 3)],
    "DWConv": lambda: [Conv(3, 8, 1), DWConv(8, 8, 3)],
    "Conv2": lambda: [Conv2(3, 8, 3)],
    "RepConv with identity": lambda: [Conv(3, 8, 1), RepConv(8, 8, 3, bn=True)],
    "RepVGGDW": lambda: [Conv(3, 8, 1), RepVGGDW(8)],
    "ConvTranspose": lambda: [Conv(3, 4, 1), ConvTranspose(4, 8)],
    "ConvTranspose without BatchNorm": lambda: [Conv(3, 4, 1), ConvTranspose(4, 8, bn=False)],
    "Sequential": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()],
    "BatchNorm behind": lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)],
    "ResNetBlock": lambda: [ResNetBlock(3, 2), ResNetBlock(8, 2)],
    "BasicBlock": lambda: [Conv(3, 8, 1), models.resnet.BasicBlock(8, 8), models.resnet.BasicBlock(8, 8)],
    "Bottleneck": lambda: [Conv(3, 8, 1), models.resnet.Bottleneck(8, 2), models.resnet.Bottleneck(8, 2)],
    "DenseNet": lambda: [models.DenseNet(8, (2, 3), 16, num_classes=8), nn.Unflatten(1, (8, 1, 1))],
}


@pytest.mark.integration
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("name", PRODUCERS)
def test_every_kind_of_layer_takes_the_factor_up(name: str, fused: bool) -> None:
    torch.manual_seed(0)
    model = Stack(*PRODUCERS[name]())
    sites = len(patch_model(model, "arelu", scope="all"))
    shuffled(model)
    if fused:
        try:
            model.fuse(verbose=False)(torch.zeros(1, 3, 16, 16))
        except AttributeError:  # of Conv2, and of ConvTranspose without BatchNorm, in 8.3
            pytest.skip("this Ultralytics cannot fuse it")
    assert sites and assert_folds(model, torch.randn(2, 3, 16, 16), sites, 1e-5).changed


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4), nn.ReLU()], (2, 7, 6)),
        ([nn.Conv1d(6, 8, 3), nn.ReLU(), nn.GroupNorm(2, 8), nn.ReLU(), nn.AvgPool1d(2)], (2, 6, 9)),
    ],
)
def test_layers_of_no_images_fold_with_an_example(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = nn.Sequential(*layers)
    sites = len(patch_model(model, "arelu", scope="all", example_input=x))
    if isinstance(layers[0], nn.Linear):  # a convolution says what it takes
        with untouched(model), pytest.raises(FoldError, match="give example_input="):
            fold_activations(model)
    assert_folds(shuffled(model), x, sites, 1e-5, x)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "fused"),
    [*product(("tiny", "yolov9t", "yolov10n", "yolo11n"), (False, True)), ("rtdetr-resnet50", False)],
)
def test_whole_models_fold(name: str, fused: bool, stock_yaml: Path) -> None:
    model = (YOLO if name.startswith("yolo") else RTDETR)(str(stock_yaml) if name == "tiny" else f"{name}.yaml").model
    patch_model(model, "arelu", scope="all")
    shuffled(model)
    if fused:
        model.fuse(verbose=False)  # leaves out the one-to-many heads of YOLOv10
    model.double().train()  # double, because the last bit of float32 reorders the queries of RT-DETR
    sites = len(find_sites(model))
    side = 128 if name == "rtdetr-resnet50" else 64  # enough positions for 300 queries
    x = torch.rand(2, 3, side, side, dtype=torch.float64)
    report = assert_folds(model, x, sites, 1e-9, x)
    assert all(m.training for m in model.modules())
    assert not [name for name in report.changed if "running" in name]
    assert report.needs == (("ResNetBlock",) if name == "rtdetr-resnet50" else ())
    assert f"{sites} activations folded, 0 kept" in str(report)
    rules = read_plan(model).rules
    assert len(rules) == sites and all(str(rule).startswith("leaky_relu(negative_slope=0.") for rule in rules)


class Net(nn.Module):
    """Convolutions and two AReLUs, wired by a function."""

    def __init__(self, wiring: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.d = nn.Conv2d(6, 3, 3, padding=1, padding_mode="reflect")
        self.act, self.act2 = AReLU(-0.5, 1.0), AReLU(0.4, -1.0)
        self.silu, self.leaky, self.batch, self.group = (
            nn.SiLU(),
            nn.LeakyReLU(0.2),
            nn.BatchNorm2d(3),
            nn.GroupNorm(1, 3),
        )
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2))
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x


@dataclass
class Result:
    y: Tensor


# What it computes, where the factors of its two activations go ("kept" if it is not called, too), what is scaled.
WIRINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str]] = {
    "chain": (lambda n, x: n.c(n.act2(n.b(n.act(n.a(x))))), "before, before", "a b"),
    "result": (lambda n, x: n.act2(n.b(n.act(n.a(x)))), "before, before", "a b"),
    "input": (lambda n, x: n.a(y := n.act(x)) + n.b(n.act2(n.c(y))), "behind, before", "a.weight c"),
    "skip": (lambda n, x: n.c((y := n.act(n.a(x))) + n.act2(n.b(y))), "before, before", "a b"),
    "called twice": (lambda n, x: n.c(n.act(n.b(n.act(n.a(x))))), "before, kept", "a b"),
    "pooled": (
        lambda n, x: n.d(torch.cat([n.pool(n.act(x)), n.act2(n.a(x))], 1)),
        "behind, on both sides",
        "a d.weight",
    ),
    "layer of two inputs": (lambda n, x: n.b(n.act(n.a(x))) + n.b(n.act2(n.c(x))), "before, before", "a c"),
    "two readers": (lambda n, x: n.b(n.act(n.a(x))) + n.c(n.act2(n.a(x))), "before, on both sides", "a c.weight"),
    "layer behind itself": (lambda n, x: n.a(n.act(n.a(x))) + n.c(n.act2(n.b(x))), "kept, before", "b"),
    "weight read": (lambda n, x: n.b(n.act(n.a(x))) * n.a.weight.sum(), "behind, kept", "b.weight"),
    "both read": (lambda n, x: n.b(n.act(n.a(x))) * n.a.weight.sum() * n.b.bias.sum(), "kept, kept", ""),
    "beside its own input": (lambda n, x: n.b((y := n.a(x)) + n.act(y)) + n.act2(n.c(x)), "kept, before", "c"),
    "sigmoids": (lambda n, x: n.act(n.a(x).sigmoid()).sigmoid() + n.c(n.act2(n.b(x))), "kept, before", "b"),
    "opaque module": (lambda n, x: n.c(n.act2(n.silu(n.b(n.act(n.a(x)))))), "before, behind", "a c.weight"),
    "passing module": (lambda n, x: n.c(n.act2(n.leaky(n.b(n.leaky(n.act(x)))))), "behind, before", "b"),
    "BatchNorm": (lambda n, x: n.c(n.batch(n.act(x))), "behind, kept", "batch.running_mean batch.weight"),
    "GroupNorm": (lambda n, x: n.c(n.group(n.act(x))), "kept, kept", ""),
    "product": (lambda n, x: n.act(x) * n.act2(n.a(x)), "kept, before", "a"),
    "offset": (lambda n, x: n.b(n.act(x) + 1) + n.c(-n.act2(n.a(x)) / 2), "kept, before", "a"),
    "offset by name": (lambda n, x: n.b(torch.add(n.act(x), other=1)) + n.act2(n.c(x)), "kept, before", "c"),
    "floor": (lambda n, x: n.b(torch.div(n.act(x), 2, rounding_mode="floor")) + n.act2(n.c(x)), "kept, before", "c"),
    "padded": (lambda n, x: n.b(F.pad(n.act(x), (1, 1), value=2)), "kept, kept", ""),
    "padded with zeros": (lambda n, x: n.act2(n.b(F.pad(n.act(x), (1, 1)))), "behind, before", "b"),
    "numpy": (lambda n, x: n.b(torch.from_numpy(n.act(x).numpy() ** 2)) + n.act2(n.c(x)), "kept, before", "c"),
    "autograd": (lambda n, x: n.b(Squared.apply(n.act(x))) + n.act2(n.c(x)), "kept, before", "c"),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_the_factor_goes_where_it_can_and_stays_where_it_cannot(name: str) -> None:
    wiring, sides, changed = WIRINGS[name]
    torch.manual_seed(0)
    model, x = shuffled(Net(wiring)).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    then = outputs(model, x)
    report = fold_activations(model, x)
    into = {fold.site: fold.into for fold in report.folds}
    assert ", ".join(into.get(site, "kept") for site in ("act", "act2")) == sides
    assert re.sub(r"(\w+)\.bias \1\.weight", r"\1", " ".join(report.changed)) == changed
    assert_near(outputs(model, x), then, 1e-12)
    assert report.kept.keys() == {"act", "act2"} - into.keys()
    assert [type(act) is AReLU for act in (model.act, model.act2)] == [act in report.kept for act in ("act", "act2")]
    assert all(f"{site} keeps its factor: {reason}" in str(report) for site, reason in report.kept.items())
    assert report.needs == (("AReLU",) if report.kept else ())


def test_a_result_in_a_dataclass_keeps_its_scale() -> None:
    model, x = Net(lambda n, x: Result(n.act(n.b(n.act2(x))))), torch.randn(1, 3, 8, 8)
    then = model(x).y
    assert len(fold_activations(model)) == 2
    torch.testing.assert_close(model(x).y, then, rtol=1e-4, atol=1e-5)


def test_a_cast_to_a_narrower_type_is_no_reason_to_refuse() -> None:
    assert len(fold_activations(Net(lambda n, x: n.b(n.act(x).float().to(x.dtype))))) == 1


def test_names_and_first_layers_of_any_kind() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.Conv2d(8, 4, 1))
    model.add_module("[a]", AReLU())
    assert len(fold_activations(model)) == 1


def test_a_model_without_weights_or_with_another_input_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), AReLU())
    with untouched(model), pytest.raises(FoldError, match="give an example_input that it takes"):
        fold_activations(model, torch.zeros(1, 5, 8, 8))
    with pytest.raises(FoldError, match="device 'meta'"):
        fold_activations(model.to("meta"))


def test_what_was_folded_cannot_be_unpatched() -> None:
    model = net_of("arelu")
    fold_activations(model)
    with untouched(model), pytest.raises(ModelError, match="unpatch the model from before folding"):
        unpatch_model(model)
    model = net_of("prelu")
    fold_activations(model)
    assert unpatch_model(model) == 1 and type(model[2]) is nn.ReLU


def test_the_learning_rate_of_what_stays_learnable_is_kept(stock_yaml: Path) -> None:
    model = RTDETR(str(stock_yaml)).model
    patch_model(model, "arelu@0, aconc@3", act_lr=3)
    assert len(fold_activations(model)) == 5 and read_plan(model).act_lr == 3


def test_factors_that_multiply_along_a_chain_spread_to_both_sides_of_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *[ResNetBlock(8, 2) for _ in range(8)], nn.Conv2d(8, 3, 1))
    assert len(patch_model(model, "arelu")) == 24
    assert_folds(model.double(), torch.randn(2, 3, 8, 8, dtype=torch.float64), 24, 1e-12)
    factors = [block.cv3.bn.weight[0].item() for block in model[1:-1]]  # BatchNorm's weights start at 1
    slope = 1 + 1 / (1 + math.exp(-2))  # to the 8th, 156, if they all went to one side
    assert slope**-4.5 < min(factors) < 1 / slope and slope < max(factors) < slope**4.5


def net_of(spec: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Dropout())
    patch_model(model, spec)
    return shuffled(model)


FORMS = {
    "prelu": nn.LeakyReLU(0.25),
    "prelu(per_channel=True)": nn.LeakyReLU(0.25),
    "rrelu(0.1, 0.5)": nn.LeakyReLU(0.3),
    "aconc(init='silu')": nn.SiLU(),
    "aglu": nn.SiLU(),
    "smu1(mu=0.0)": nn.LeakyReLU(0.25),
    "swish_beta(per_channel=True)": nn.SiLU(),
    "hardtanh(0, 6)": nn.ReLU6(),
    "celu(1.0)": nn.ELU(),
    "threshold(0, 0)": nn.ReLU(),
    "leaky_relu(0.0)": nn.ReLU(),
}


@pytest.mark.parametrize("spec", FORMS)
def test_what_equals_an_activation_of_torch_becomes_it(spec: str) -> None:
    model, x = net_of(spec), torch.randn(2, 3, 16, 16)
    then = outputs(model, x)
    report = fold_activations(model)
    assert (len(report), report.changed, report.needs, report.folds[0].into) == (1, (), (), "")
    assert str(model[2]).replace(", inplace=True", "").replace("inplace=True", "") == str(FORMS[spec])
    assert_near(outputs(model, x), then, 1e-6)


NONE = "silu relu relu6 leaky_relu(0.1) hardtanh celu(0.5) threshold(0.1,0) threshold(0,0.1) frelu dyrelu_b aconc"
NONE += " apa aglu(0.5) pwlu rational repact smu smu1 star_relu swish_beta(2.0)"
TRAINED = ["prelu(per_channel=True)", "aconc(init='silu')", "aglu", "swish_beta"]


@pytest.mark.parametrize("spec", [*NONE.split(), *TRAINED])
def test_what_equals_none_or_has_been_trained_stays(spec: str) -> None:
    model = net_of(spec)
    if spec in TRAINED:
        [*model[2].parameters()][-1].data[0].add_(0.1)
    with untouched(model):
        assert len(fold_activations(model)) == 0


@given(st.floats(-2, 3), st.floats(-6, 6), st.lists(st.floats(-9, 9, width=16), min_size=1, max_size=6))
def test_the_form_of_arelu_is_its_formula(alpha: float, beta: float, values: list[float]) -> None:
    unit = AReLU().double()
    unit.alpha.data.fill_(alpha)
    unit.beta.data.fill_(beta)
    fold = get_entry("arelu").fold
    assert fold is not None
    form = fold(unit)
    assert form is not None and 1 < form.scale < 2
    positive, negative = 1 + 1 / (1 + math.exp(-beta)), min(max(alpha, 0.01), 0.99)
    expected = torch.tensor([value * (positive if value >= 0 else negative) for value in values], dtype=torch.float64)
    leaky = F.leaky_relu(torch.tensor(values, dtype=torch.float64), dict(form.activation.kwargs)["negative_slope"])
    torch.testing.assert_close(form.scale * leaky, expected, rtol=1e-12, atol=0)


def test_a_folded_model_is_copied_pickled_rebuilt_and_folded_again(stock_yaml: Path) -> None:
    model, x = RTDETR(str(stock_yaml)).model, torch.rand(1, 3, 64, 64, dtype=torch.float64)
    patch_model(model, "arelu")
    assert_folds(shuffled(model).double(), x, tiny.CONV_SITES, 1e-9, x)
    then, buffer = outputs(model, x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    rebuilt = type(model)(model.yaml, verbose=False).double()
    rebuilt.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), rebuilt):
        assert_near(outputs(other, x), then, 1e-9)
    with untouched(model):
        assert len(fold_activations(model, x)) == 0
    again = patch_model(model, "arelu", layers="0-3")
    then = outputs(shuffled(model), x)
    report = fold_activations(model, x)
    assert [fold.site for fold in report.folds] == again.sites and not report.needs
    assert_near(outputs(model, x), then, 1e-9)
    assert len(read_plan(model).rules) == tiny.CONV_SITES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_types_layout_modes_gradients_and_objects_stay(dtype: torch.dtype) -> None:
    model = net_of("arelu").to(dtype).to(memory_format=torch.channels_last).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    objects = {name: t for name, t in model.state_dict(keep_vars=True).items() if not name.startswith("2.")}
    then = {name: (t.clone(), t.stride(), t.requires_grad) for name, t in objects.items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    scale = 1 + torch.sigmoid(model[2].beta.double()).item()
    assert fold_activations(model).changed == ("1.bias", "1.weight")
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert model.state_dict().keys() == objects.keys()
    for name, t in model.state_dict(keep_vars=True).items():
        value = then[name][0]
        assert t is objects[name] and t.dtype == value.dtype and (t.stride(), t.requires_grad) == then[name][1:]
        assert torch.equal(t, (value.double() * scale).to(dtype) if name in ("1.bias", "1.weight") else value), name


HIDDEN = {
    "vmap": (lambda n, x: n.b(torch.vmap(lambda y: y + 1)(n.act(x))), "gave other outputs"),
    "random": (lambda n, x: n.b(n.act(n.a(x)) + torch.rand_like(x)), "gave other outputs"),
    "nothing": (lambda n, x: print(n.act(x).shape), "returns no tensors"),
    "wrong": (lambda n, x: n.b(n.act(n.a(x)[:, :2])), "failed (RuntimeError"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_model_that_does_not_fold_is_left_alone(name: str) -> None:
    model = Net(HIDDEN[name][0])
    with untouched(model), pytest.raises(FoldError, match=re.escape(HIDDEN[name][1])) as caught:
        fold_activations(model)
    assert "\n" not in str(caught.value)


@pytest.mark.integration
def test_a_compiled_wrapped_or_exported_model_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), AReLU())
    for other in (torch.compile(model), nn.DataParallel(model), "best.onnx"):
        with pytest.raises(ModelError, match=r"is compiled|is wrapped|is not a torch"):
            fold_activations(other)


def fold(*words: object) -> str:
    return CliRunner().invoke(app, ["fold", *map(str, words)], catch_exceptions=False, standalone_mode=False).output


@pytest.fixture(scope="module")
def folded(patched_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fold the checkpoint of an interrupted training on the command line, to the name that it takes by itself."""
    source = tmp_path_factory.mktemp("folded") / "best.pt"
    stored = torch.load(patched_run.pt, weights_only=False)
    interrupted = {"ema": stored["model"], "model": None, "optimizer": {"state": {}}, "epoch": 3}
    torch.save({**stored, **interrupted}, source)
    output, target = fold(source), source.with_name("best-folded.pt")
    assert f"{tiny.CONV_SITES} activations folded, 0 kept" in output and f"file: {target}" in output
    assert sorted(source.parent.iterdir()) == [target, source]
    return target


def test_a_folded_checkpoint_holds_the_same_network_and_nothing_of_ours(folded: Path, patched_run: Run) -> None:
    old, new = (torch.load(path, weights_only=False) for path in (patched_run.pt, folded))
    assert new.keys() == old.keys() and new["train_args"] == old["train_args"]
    assert (new["ema"], new["optimizer"], new["epoch"]) == (None, None, -1)
    before, after = old["model"].state_dict(), new["model"].state_dict()
    assert set(before) - set(after) == {name for name in before if name.endswith((".alpha", ".beta"))}
    scaled = {name for name in after if not torch.equal(after[name].double(), before[name].double())}
    assert len(scaled) > tiny.CONV_SITES and {after[name].dtype for name in scaled} == {torch.float32}
    assert {before[name].dtype for name in scaled} == {torch.float16}
    assert all(after[name].dtype == before[name].dtype for name in after.keys() - scaled)
    with zipfile.ZipFile(folded) as archive:
        (pickled,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    # The plan in model.yaml is a text that starts with our name, on which a stock training stops; classes have modules.
    classes = [argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"]
    assert classes and not [name for name in classes if name.startswith("rtdetr_act.")]
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert_near(outputs(new["model"].double(), x), outputs(old["model"].double(), x), 1e-5)


_WITHOUT_US = """
import sys
sys.modules["rtdetr_act"] = None  # importing it fails
import torch
from ultralytics import RTDETR
boxes = RTDETR(sys.argv[1]).predict(sys.argv[2], imgsz=64, conf=1e-6, device="cpu", verbose=False)[0].boxes
x = torch.linspace(0, 1, 3 * 64 * 64, dtype=torch.float64).reshape(1, 3, 64, 64)
output = RTDETR(sys.argv[1]).model.double().eval()(x)[0]
torch.save([len(boxes), output], sys.argv[3])
"""


def test_a_folded_checkpoint_predicts_without_us(folded: Path, patched_run: Run, data: Data, tmp_path: Path) -> None:
    done = tiny.run_python(_WITHOUT_US, tmp_path, folded, data.image, tmp_path / "said.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    boxes, output = torch.load(tmp_path / "said.pt")
    x = torch.linspace(0, 1, 3 * 64 * 64, dtype=torch.float64).reshape(1, 3, 64, 64)
    assert boxes > 0
    assert_near([output], outputs(tiny.load(patched_run.pt).double(), x)[:1], 1e-5)


def test_training_goes_on_from_a_folded_checkpoint(folded: Path, data: Data, tmp_path: Path) -> None:
    start, model = tiny.load(folded), tiny.load(tiny.train(RTDETR(str(folded)), data.detect, tmp_path))
    now, then = ([(name, m) for name, m in net.named_modules() if type(m) is nn.LeakyReLU] for net in (model, start))
    assert str(now) == str(then) and len(now) == tiny.CONV_SITES and not tiny.count(model, AReLU)
    assert not torch.equal(model.model[0].stem1.conv.weight, start.model[0].stem1.conv.weight)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("stock.pt", "out.pt", "nothing to fold"),
        ("folded.pt", "out.pt", "nothing to fold"),
        ("missing.pt", "out.pt", "no file"),
        ("numbers.pt", "out.pt", "not an Ultralytics checkpoint"),
        ("arelu.pt", "arelu.pt", "name another file"),
        ("arelu.pt", "link.pt", "name another file"),
        ("arelu.pt", "out.onnx", "let it end in .pt"),
        ("missing.pt", "text.pt", "no file"),
        ("x.yaml", "out.pt", "x.yaml' is not a checkpoint"),
        (".", "out.pt", "is not a checkpoint"),
        ("arelu.pt", "text.pt/below/out.pt", "cannot write"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    source: str, target: str, words: str, folded: Path, patched_run: Run, stock_yaml: Path, tmp_path: Path
) -> None:
    (tmp_path / "arelu.pt").write_bytes(patched_run.pt.read_bytes())
    (tmp_path / "folded.pt").write_bytes(folded.read_bytes())
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "link.pt").symlink_to("arelu.pt")
    stock = RTDETR(str(stock_yaml))
    stock.ckpt = stock.ckpt or {}  # None in 8.3
    stock.save(tmp_path / "stock.pt")
    torch.save({"numbers": [1, 2]}, tmp_path / "numbers.pt")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(RtdetrActError, match=re.escape(words)) as caught:
        fold(tmp_path / source, "-o", tmp_path / target)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
