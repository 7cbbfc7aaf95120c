"""Dynamic convolution: the op against a loop over images, the module, and its way through Ultralytics."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics import RTDETR, YOLO
from ultralytics.nn import tasks

from rtdetr_act import (
    DynamicConv2d,
    Plan,
    find_sites,
    fold_activations,
    patch_convs,
    patch_model,
    unpatch_model,
)
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.dynamic_conv import dynamic_conv, dynamic_conv_parallel
from rtdetr_act.analysis.flops import count_gflops
from rtdetr_act.errors import InputError, ModelError, SelectionError, SpecError
from rtdetr_act.integrations.ultralytics import hooks
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.integrations.ultralytics.optimizer import exclude_dynamic_kernels_from_muon
from rtdetr_act.surgery.epochs import set_epoch
from rtdetr_act.surgery.model_plan import normalise_model_yaml, split_model_yaml
from rtdetr_act.surgery.sites import iterate_placed_convolutions


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def one_by_one(x: Tensor, pi: Tensor, weight: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    """Compute the formula of the paper as it stands there, an image at a time."""
    results = []
    for image, shares in zip(x, pi, strict=True):
        kernel = sum(share * w for share, w in zip(shares, weight, strict=True))
        b = None if bias is None else sum(share * w for share, w in zip(shares, bias, strict=True))
        results.append(F.conv2d(image[None], kernel, b, *where))
    return torch.cat(results)


@st.composite
def cases(draw: Callable) -> tuple[Any, ...]:
    """Draw x, attention, kernels, biases, and where the kernels go."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside, outside = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 3), (1, 5)]))
    stride, dilation = draw(st.sampled_from([1, 2, (1, 2)])), draw(st.sampled_from([1, 2]))
    padding = draw(st.sampled_from([0, 1, (1, 2), "same" if stride == 1 else 0]))
    batch, k = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    few = kernel == (1, 1) and draw(st.booleans())
    size = (draw(st.integers(1, 5)), 3) if few else (draw(st.integers(9, 12)), draw(st.integers(9, 12)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    drawn = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, inside * groups, *size), (batch, k), (k, outside * groups, inside, *kernel))
    ]
    bias = torch.randn(k, outside * groups, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    if draw(st.booleans()):
        drawn[0] = drawn[0].to(memory_format=torch.channels_last)
    return (drawn[0], drawn[1].softmax(1), drawn[2], bias), (stride, padding, dilation, groups)


@settings(max_examples=60)
@given(cases())
def test_equals_the_formula_image_by_image(case: tuple[Any, ...]) -> None:
    tensors, where = case
    found, expected = [], []
    for form, results in ((dynamic_conv, found), (dynamic_conv_parallel, found), (one_by_one, expected)):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        y = form(*leaves, *where)
        grads = torch.autograd.grad((y * y.detach().cos()).sum(), [t for t in leaves if t is not None])
        results.append([y, *grads])
    for results in found:
        for one, other in zip(results, expected[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("where", [(1, 0, 1, 1), (2, 1, 1, 2)])
def test_gradients_of_both_orders(where: tuple[int, ...]) -> None:
    kernel = 1 if where[0] == 1 else 3
    shapes = (2, 4, 4, 4), (2, 2), (2, 2, 4 // where[3], kernel, kernel), (2, 2)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: dynamic_conv(*t, *where), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: dynamic_conv(*t, *where), leaves)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_equal_kernels_are_the_convolution(mode: str) -> None:
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode=mode)
    dynamic, x = DynamicConv2d.from_conv(conv), torch.randn(3, 6, 11, 9)
    # The noise sums to zero over the kernels, and is there.
    torch.testing.assert_close(dynamic.weight.mean(0), conv.weight, rtol=0, atol=1e-6)
    off = (dynamic.weight - conv.weight).std() / conv.weight.std()
    assert 0.05 < off < 0.15
    expected = conv(x)
    assert 0 < (dynamic(x) - expected).abs().max() / expected.abs().max() < 0.01
    with torch.no_grad():
        dynamic.expand.weight.zero_()
        dynamic.expand.bias.zero_()
    torch.testing.assert_close(dynamic(x), expected, rtol=1e-5, atol=1e-6)


def test_attention_and_temperature() -> None:
    conv, x = DynamicConv2d(32, 8, 3), torch.randn(6, 32, 8, 8) + torch.randn(6, 32, 1, 1)
    pi = conv.attention(x)
    assert pi.shape == (6, 4) and (pi > 0).all()
    torch.testing.assert_close(pi.sum(1), torch.ones(6))
    hot = (pi - 0.25).abs().max()
    assert 0 < hot < 0.01
    seen = []
    for epoch in (0, 2.5, 5, 10, 300):
        set_epoch(conv, epoch)
        seen.append(float(conv.temperature()))
    assert seen == [30.0, 22.75, 15.5, 1.0, 1.0]
    cold = conv.attention(x)
    z = conv.expand(F.relu(conv.squeeze(x.mean((2, 3)))))
    torch.testing.assert_close(cold, z.softmax(1))
    assert (cold - 0.25).abs().max() > 5 * hot
    assert "temperature.now" not in DynamicConv2d(2, 2, 1).state_dict() and not [*conv.buffers()]
    assert DynamicConv2d(2, 2, 1, tau=3, tau_start=None).temperature() == 3


def test_parameters_and_operations_are_the_formulas() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 12, 3, stride=2, padding=1))
    stock = count_gflops(net, 20) * 1e9
    own = sum(p.numel() for p in net[1].parameters())
    report = patch_convs(net)
    hidden = 8 // 4
    added = 8 * hidden + hidden + hidden * 4 + 4
    assert report.parameters == 4 * own + added
    pooling, attention = 20 * 20 * 8, 2 * (8 * hidden + hidden * 4)
    mixing = 2 * 4 * (12 * 8 * 3 * 3 + 12)
    assert count_gflops(net, 20) * 1e9 - stock == pytest.approx(pooling + attention + mixing)


def test_types_layouts_copies_and_batches() -> None:
    net = nn.Sequential(DynamicConv2d(8, 8, 3, padding=1, groups=2), nn.SiLU(), DynamicConv2d(8, 4, 1))
    x = torch.randn(3, 8, 6, 6)
    expected = net(x)
    torch.testing.assert_close(torch.cat([net(image[None]) for image in x]), expected)
    assert net(x[:0]).shape == (0, 4, 6, 6)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), expected)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    y = last(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    for dtype in (torch.float16, torch.bfloat16):
        y = copy.deepcopy(net).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02)
    assert net[0].weight.grad.dtype == torch.float32


@pytest.mark.integration
def test_compiles_whole_and_not_again_for_a_temperature() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(module: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    net = nn.Sequential(DynamicConv2d(4, 8, 3, padding=1), nn.ReLU(), DynamicConv2d(8, 4, 1))
    compiled = torch.compile(net, fullgraph=True, backend=count)
    x = torch.randn(3, 4, 6, 6)
    for epoch in (0, 3, 9):
        set_epoch(net, epoch)
        torch.testing.assert_close(compiled(x), net(x))
    assert graphs == 1
    for batch in (2, 5, 1):
        torch.testing.assert_close(compiled(x[:1].repeat(batch, 1, 1, 1)), net(x[:1].repeat(batch, 1, 1, 1)))
    torch._dynamo.reset()


def test_random_state_stays_and_kernels_differ_between_layers() -> None:
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    before = torch.random.get_rng_state()
    patch_convs(net)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(net[1].squeeze.weight, net[2].squeeze.weight)


def test_takes_out_the_very_objects() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    convs, weights = (net[3], net[4]), [net[3].weight.clone(), net[4].weight.clone()]
    patch_model(net, "arelu")
    patch_convs(net, layers=None, include="[34]")
    patch_convs(net, kernels=2, include="4")  # again, with other settings
    assert [net[3].kernels, net[4].kernels] == [4, 2]
    assert unpatch_model(net) == 3
    assert net[3] is convs[0] and net[4] is convs[1] and type(net[2]) is nn.ReLU
    assert torch.equal(net[3].weight, weights[0]) and torch.equal(net[4].weight, weights[1])
    patch_convs(net)
    with torch.no_grad():
        net[3].weight += 1
    trained = net[3].weight.mean(0)
    assert unpatch_model(net) == 2 and net[3] is convs[0]
    torch.testing.assert_close(net[3].weight, trained)


def test_shared_and_special_convolutions() -> None:
    class RepConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 3)

        def get_equivalent_kernel_bias(self) -> None: ...

    class Odd(nn.Conv2d):
        pass

    shared, frozen = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1).requires_grad_(False)
    net = nn.ModuleList([nn.Conv2d(3, 4, 3), shared, RepConv(), Odd(4, 4, 1), frozen, nn.Sequential(shared)])
    report = patch_convs(net)
    assert report.sites == ["1", "5.0"] and net[1] is net[5][0]
    assert unpatch_model(net) == 2 and net[1] is shared and net[5][0] is shared
    every = copy.deepcopy(net).requires_grad_(False)  # as a checkpoint's network is
    report = patch_convs(every, include=["1", "4"])
    assert len(report) == 2 and not any(p.requires_grad for p in every.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kernels": 1}, SpecError, "kernels is an integer of at least 2, not 1"),
        ({"tau": 0}, SpecError, "tau is a positive number"),
        ({"tau_epochs": "ten"}, SpecError, "tau_epochs is a positive number"),
        ({"layers": "3"}, SelectionError, "no Ultralytics layers"),
        ({"include": "nothing"}, SelectionError, "matches none of the 1 convolutions"),
        ({"layers": "x"}, SpecError, "'x' is not a section"),
        ({"layers": "2-1"}, SpecError, "layers are indices and ranges"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict, error: type, words: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(error, match=words) as caught:
        patch_convs(net, **arguments)
    assert "\n" not in str(caught.value) and type(net[1]) is nn.Conv2d


def test_the_plan_carries_convolutions() -> None:
    spec = "dynamic_conv(kernels=2, tau_start=None)"
    model_yaml = tiny.with_rows(tiny.yolo(), {}, convolution=f"{spec}@backbone, dynamic_conv@5")
    plan = split_model_yaml(model_yaml)[1]
    assert plan and {rule.replaces for rule in plan.rules} == {"convolution"}
    assert str(plan) == f"{spec}@backbone, dynamic_conv@5"
    whole = normalise_model_yaml({**model_yaml, "activation": "arelu"})
    text = f"arelu, {spec}@backbone, dynamic_conv@5"
    assert "convolution" not in whole and whole["activation"] == f"rtdetr_act.Plan({text!r})"
    assert Plan.from_yaml(whole["activation"]) == split_model_yaml(whole)[1]
    assert Plan.from_yaml(plan.to_yaml()) == plan
    stacked = plan.followed_by(Plan.from_yaml({"rules": [{"activation": "dynamic_conv", "layers": "5"}]}))
    assert len(stacked.rules) == 2
    wrong = {"dynamic_conf": "did you mean 'dynamic_conv'", "dynamic_conv(kernel=3)": "did you mean 'kernels'"}
    for text, words in wrong.items():
        with pytest.raises(SpecError, match=words):
            tasks.DetectionModel({**tiny.yolo(), "convolution": text}, verbose=False)


def test_which_convolutions_of_ultralytics() -> None:
    model = tasks.DetectionModel({**tiny.yolo(), "convolution": "dynamic_conv"}, verbose=False)
    stock = tasks.DetectionModel(tiny.yolo(), verbose=False)
    names = [name for name, module in stock.named_modules() if type(module) is nn.Conv2d]
    head = stock.model[-1]
    predicts = {f"model.5.{branch}.{i}.2" for branch in ("cv2", "cv3") for i in range(head.nl)}
    expected = [n for n in names if n not in predicts and n not in ("model.0.conv", "model.5.dfl.conv")]
    assert [name for name, _ in iterate_placed_convolutions(model)] == expected
    rtdetr = tasks.RTDETRDetectionModel({**tiny.RTDETR, "convolution": "dynamic_conv"}, verbose=False)
    placed = {name for name, _ in iterate_placed_convolutions(rtdetr)}
    assert placed and not any("model.13.m.0" in name for name in placed)  # RepC3's RepConv
    assert {f"model.14.input_proj.{i}.0" for i in range(3)} <= placed
    # The activations of a patched model are found beside them, and the other way round.
    assert len(find_sites(rtdetr)) == len(find_sites(tasks.RTDETRDetectionModel(tiny.RTDETR, verbose=False)))
    assert len(patch_model(rtdetr, "dyrelu_b")) == tiny.CONV_SITES
    assert len(split_model_yaml(rtdetr.yaml)[1].rules) == 2
    report = patch_convs(rtdetr, layers="1-3", tau_start=None)
    assert {swap.site.layer for swap in report.swaps} == {1, 2, 3}
    assert str(report.plan) == "dynamic_conv, dyrelu_b, dynamic_conv(tau_start=None)@1-3"
    assert "dynamic_conv" in str(report)
    stock = tasks.RTDETRDetectionModel(tiny.RTDETR, verbose=False)
    assert "depthwise" in str(patch_convs(stock, layers="1-3"))
    unpatch_model(rtdetr)
    assert not list(iterate_placed_convolutions(rtdetr)) and "activation" not in rtdetr.yaml


def test_a_plan_as_plain_data_places_both(tmp_path: Path) -> None:
    file = tiny.write_yaml(tmp_path / "m.yaml", tiny.yolo())
    convolutions = [{"activation": "dynamic_conv", "layers": "1-3"}]
    for rules in ([{"activation": "arelu"}], []):
        data = {"rules": [*rules, *convolutions]}
        name, model = load_variant(str(file), data)
        assert name == str(Plan.from_yaml(data)) and "dynamic_conv@1-3" in name
        assert {found.split(".")[1] for found, _ in iterate_placed_convolutions(model.model)} == {"1", "2", "3"}
        assert tiny.count(model.model, AReLU) == bool(rules) * len(find_sites(model))
    name, model = load_variant(str(file), "mish", conv="dynamic_conv@backbone")
    assert name == "mish, dynamic_conv@backbone" and model.model.model[1].conv.kernels == 4
    assert load_variant(str(file), "stock", conv="dynamic_conv")[0] == "stock"
    # Nothing is changed where anything is wrong.
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(SelectionError):
        patch_model(net, Plan.from_yaml({"rules": [{"activation": "arelu"}, {"activation": "dynamic_conv"}]}))
    assert type(net[1]) is nn.ReLU


def test_starts_as_the_stock_network_of_the_same_seed() -> None:
    torch.manual_seed(0)
    stock = tasks.DetectionModel(tiny.yolo(), verbose=False)
    torch.manual_seed(0)
    model = tasks.DetectionModel({**tiny.yolo(), "convolution": "dynamic_conv"}, verbose=False)
    weights = stock.state_dict()
    for name, conv in iterate_placed_convolutions(model):
        torch.testing.assert_close(conv.weight.mean(0), weights[f"{name}.weight"], rtol=0, atol=1e-6)
    # And a stock checkpoint goes into every kernel.
    other = tasks.DetectionModel(tiny.yolo(), verbose=False)
    model.load(other, verbose=False)
    for name, conv in iterate_placed_convolutions(model):
        torch.testing.assert_close(conv.weight.mean(0), other.state_dict()[f"{name}.weight"], rtol=0, atol=1e-6)
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = other.eval()(image)[0], model.eval()(image)[0]
    assert (found - expected).abs().max() / expected.abs().max() < 0.02


def settled(model: nn.Module) -> nn.Module:
    """Give BatchNorms statistics of their own, and the attentions something to tell."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, DynamicConv2d):
            nn.init.normal_(module.expand.weight, 0, 2)
            module.temperature.set_epoch(99)
            module.weight.data += 0.1 * module.weight.std() * torch.randn_like(module.weight)
    return model.eval()


def fuse(model: Any) -> Any:
    """Fuse a copy in float64; Ultralytics 8.3 makes biases of torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return copy.deepcopy(model).fuse(verbose=False)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["yolo", "rtdetr"])
def test_fuses_and_folds_exactly(kind: str) -> None:
    torch.manual_seed(0)
    cls, base = {
        "yolo": (tasks.DetectionModel, tiny.yolo()),
        "rtdetr": (tasks.RTDETRDetectionModel, tiny.RTDETR),
    }[kind]
    model = settled(cls({**base, "convolution": "dynamic_conv", "activation": "arelu"}, verbose=False)).double()
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)[0]
        folded = copy.deepcopy(model)
        assert len(fold_activations(folded)) > 0
        torch.testing.assert_close(folded(image)[0], expected, rtol=1e-7, atol=1e-7)
        fused = fuse(model)
        torch.testing.assert_close(fused(image)[0], expected, rtol=1e-9, atol=1e-9)
        fold_activations(fused)
        torch.testing.assert_close(fused(image)[0], expected, rtol=1e-7, atol=1e-7)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.model[1].modules())
    with pytest.raises(ModelError, match="was folded into its kernels"):
        unpatch_model(fuse(model))


def test_biases_are_not_decayed(data: Data, tmp_path: Path) -> None:
    from ultralytics.models.yolo.detect import DetectionTrainer

    arguments = tiny.train_args(data.detect, tmp_path, model=str(tiny.write_yaml(tmp_path / "m.yaml", tiny.yolo())))
    trainer = DetectionTrainer(overrides=arguments)
    model = trainer.get_model(cfg={**tiny.yolo(), "convolution": "dynamic_conv"}, verbose=False)
    for place in (model.model[1].conv, model.model[3].conv):
        place.bias = nn.Parameter(torch.zeros(4, place.out_channels))
    for name in ("SGD", "AdamW", "MuSGD"):
        try:
            optimizer = trainer.build_optimizer(model, name=name, decay=5e-4)
        except NotImplementedError:  # Ultralytics before 8.4
            continue
        home = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert len(home) == len(list(model.parameters()))
        for module in (model.model[1].conv, model.model[3].conv):
            group = home[id(module.bias)]
            assert group["weight_decay"] == 0 and not group.get("use_muon")
            assert home[id(module.weight)]["weight_decay"] == 5e-4
        assert exclude_dynamic_kernels_from_muon(optimizer, model) == 0


def check_trained(file: Path, data: Data, kind: type) -> None:
    """Look at a checkpoint: its kernels were trained apart, and it reloads, fuses, validates and predicts."""
    convs = dict(iterate_placed_convolutions(tiny.load(file)))
    assert convs
    for conv in convs.values():
        assert conv.weight.shape[0] == 4
        assert all(conv.weight[k].ne(conv.weight[0]).any() for k in range(1, 4))
    model = kind(str(file))
    assert [name for name, _ in iterate_placed_convolutions(model.model)] == list(convs)
    metrics = model.val(data=str(data.detect), imgsz=64, batch=4, workers=0, plots=False, device="cpu", verbose=False)
    assert metrics is not None
    fused = copy.deepcopy(model.model).fuse(verbose=False)
    image = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        one, other = model.model.eval()(image)[0], fused.eval()(image)[0]
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert len(model.predict(str(data.image), imgsz=64, verbose=False, save=False)) == 1


@pytest.mark.integration
def test_patched_in_python_it_trains_and_comes_back(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    report = patch_convs(model, exclude="model.14.*")
    file = tiny.train(model, data.detect, tmp_path)
    trained = dict(iterate_placed_convolutions(tiny.load(file)))
    assert list(trained) == report.sites
    check_trained(file, data, RTDETR)


@pytest.mark.integration
def test_command_and_yaml_train_it(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = tiny.write_yaml(tmp_path / "plain.yaml", tiny.yolo())
    named = tiny.write_yaml(tmp_path / "named.yaml", {**tiny.yolo(), "convolution": "dynamic_conv@backbone"})
    arguments = [f"{k}={v}" for k, v in tiny.train_args(data.detect, tmp_path).items() if k not in ("data", "name")]
    common = ["--data", str(data.detect), *arguments]
    printed = run("train", "--model", str(plain), "--conv", "dynamic_conv@backbone", "name=cli", *common)
    assert "dynamic_conv@backbone" in printed
    check_trained(tmp_path / "cli" / "weights" / "last.pt", data, YOLO)
    printed = run("train", "--model", str(named), "--act", "arelu", "name=both", *common)
    assert "arelu" in printed
    file = tmp_path / "both" / "weights" / "last.pt"
    check_trained(file, data, YOLO)
    assert str(split_model_yaml(tiny.load(file).yaml)[1]) == "dynamic_conv@backbone, arelu"
    with pytest.raises(InputError, match="leave act= out"):
        run("train", "--model", str(plain), "--act", "stock", "--conv", "dynamic_conv", *common)


def test_stock_ultralytics_refuses_it() -> None:
    model = tasks.DetectionModel(tiny.yolo(), verbose=False)
    patch_convs(model)
    hooks.remove()
    try:
        with pytest.raises(NameError, match="name 'rtdetr_act' is not defined"):
            tasks.DetectionModel(model.yaml, verbose=False)
    finally:
        hooks.install()
    assert len(list(iterate_placed_convolutions(tasks.DetectionModel(model.yaml, verbose=False)))) > 0


@pytest.mark.integration
def test_mobilenet_learns() -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.mobilenet_v2(num_classes=4, width_mult=0.35)
    report = patch_convs(model)
    assert len(report) == 51 and type(model.features[0][0]) is nn.Conv2d
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(8):
        for module in model.modules():
            if isinstance(module, DynamicConv2d):
                module.temperature.set_epoch(2 * step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


class Net(nn.Module):
    """All forms of dynamic convolutions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)]
        layers.append(nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="reflect"))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def exported_net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    patch_convs(net)
    return settled(net)


def test_torchscript_takes_any_batch() -> None:
    net = exported_net()
    traced = torch.jit.trace(net, torch.randn(1, 3, 16, 16))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)


def test_onnx_takes_any_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    net, path = exported_net(), tmp_path / "net.onnx"
    torch.onnx.export(
        net,
        (torch.randn(1, 3, 16, 16),),
        str(path),
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    session = runtime.InferenceSession(str(path))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.integration
def test_ultralytics_exports_it(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from rtdetr_act.integrations.ultralytics.export import export_model

    torch.manual_seed(0)
    yolo = YOLO(str(tiny.write_yaml(tmp_path / "t.yaml", {**tiny.yolo(), "convolution": "dynamic_conv"})))
    settled(yolo.model).pt_path = str(tmp_path / "t.pt")
    session = runtime.InferenceSession(str(export_model(yolo, imgsz=64, dynamic=True)))
    for batch in (1, 3):
        image = torch.rand(batch, 3, 64, 64)
        with torch.no_grad():
            expected = yolo.model(image)[0]
        found = torch.from_numpy(session.run(None, {"images": image.numpy()})[0])
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
