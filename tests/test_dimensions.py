"""Maps of one, two and three spatial dimensions: formulas, gradients, sites, small networks, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import REFERENCE
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act import ShapeError, create, diagnose, find_sites, fold_activations, patch_model, unpatch_model
from rtdetr_act.activations.dyrelu import DyReLUA, DyReLUB, DyReLUC
from rtdetr_act.activations.frelu import FReLU
from rtdetr_act.activations.registry import get_entry, register, resolve
from rtdetr_act.analysis.flops import count_gflops
from rtdetr_act.errors import SelectionError, SpecError

OURS = "aconc aglu apa arelu dyrelu_a dyrelu_b dyrelu_c frelu glu meta_aconc prelu(per_channel=True) softmax2d".split()
# Their formula reads each position alone or the mean of all, so that it does not matter how positions are arranged.
UNARRANGED = [*(set(OURS) - {"frelu"}), "prelu", "softmax", "softmin", "log_softmax", "silu"]
SHAPES = {1: (2, 6, 7), 2: (2, 6, 5, 4), 3: (2, 6, 2, 3, 2)}
# With a hidden unit in every two channels: of a single one, as eight channels have by default, ReLU may pass nothing.
TRAINED = [f"dyrelu_{variant}(reduction=2)" for variant in "abc"]
TRAINED += ["meta_aconc", "aconc", "prelu(per_channel=True)", "glu", "frelu", "arelu"]
SPECS = {"threshold": "threshold(0.1, -0.3)"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(spec: str, dims: int, channels: int = 6) -> nn.Module:
    """Build an activation in float64, with every parameter and statistic away from its initial value."""
    module = create(SPECS.get(spec, spec), channels, dims=dims).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else 0.0))
        if spec in ("aglu", "apa"):
            module.lambd.copy_(torch.rand(1) + 0.2)
    return module


def draw(dims: int, channels: int = 6) -> Tensor:
    batch, _, *sizes = SHAPES[dims]
    return 2 * torch.randn(batch, channels, *sizes, dtype=torch.float64)


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_every_name_is_its_formula(name: str, dims: int) -> None:
    module, x = build(name, dims), draw(dims)
    state = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    arguments = {"threshold": 0.1, "value": -0.3} if name == "threshold" else {}
    expected = torch.from_numpy(np.asarray(REFERENCE[name](x.numpy(), state, 1, **arguments)))
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


def loop_over_positions(module: DyReLUA | DyReLUB | DyReLUC, x: Tensor) -> Tensor:
    """DY-ReLU from the paper's equations, one position at a time."""
    images, channels, *sizes = x.shape
    places = list(np.ndindex(*sizes))
    y = []
    for image in x:
        pooled = sum(image[(slice(None), *place)] for place in places) / len(places)
        hidden = (module.squeeze.weight @ pooled + module.squeeze.bias).clamp(min=0)
        theta = 2 / (1 + torch.exp(-(module.expand.weight @ hidden + module.expand.bias))) - 1
        logits = []
        if isinstance(module, DyReLUC):
            weight = module.spatial.weight.flatten()
            logits = [torch.exp((weight @ image[(slice(None), *p)] + module.spatial.bias[0]) / 10) for p in places]
        for c in range(channels):
            for index, place in enumerate(places):
                at = c if len(theta) > 4 else 0
                step = channels if len(theta) > 4 else 1
                a1, a2, b1, b2 = 1 + theta[at], theta[at + step], theta[at + 2 * step] / 2, theta[at + 3 * step] / 2
                value = image[(c, *place)]
                best = torch.maximum(a1 * value + b1, a2 * value + b2)
                y.append(best * (len(places) / 3 * logits[index] / sum(logits)).clamp(max=1) if logits else best)
    return torch.stack(y).view(images, channels, *sizes)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c"])
def test_dynamic_relu_is_a_loop_over_positions(name: str, dims: int) -> None:
    module, x = build(name, dims, 3), draw(dims, 3).requires_grad_()
    of = [x, *module.parameters()]
    weights = torch.randn_like(x)
    found, expected = module(x), loop_over_positions(module, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), of) for y in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc", "glu", "frelu"])
def test_gradcheck(name: str, dims: int) -> None:
    module, x = build(name, dims, 3), draw(dims, 3)
    x = torch.where(x.abs() < 0.05, 0.3, x).requires_grad_()
    keys = [key for key, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(keys, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()))
    assert torch.autograd.gradcheck(module, (x,))  # without torch.func, by the backward of its own


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(UNARRANGED)),
    st.tuples(*(st.integers(1, top) for top in (3, 9, 4, 4, 4))),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(["contiguous", "channels last", "strided"]),
    st.booleans(),
)
def test_the_arrangement_of_positions_does_not_matter(
    spec: str, shape: tuple[int, ...], dtype: torch.dtype, strides: str, small: bool
) -> None:
    batch, channels, depth, height, width = shape
    module = build(spec, 2, channels).to(dtype)
    volume = (
        torch.randn(shape, dtype=dtype) if small else torch.randn(*shape[:2], depth, 8 * height, 8 * width).to(dtype)
    )
    if strides == "channels last":
        volume = volume.to(memory_format=torch.channels_last_3d)
    elif strides == "strided":
        volume = volume.transpose(2, 4)
    volume = volume.requires_grad_()
    image, signal = (
        volume.detach().reshape(batch, channels, *sizes).requires_grad_() for sizes in ((depth, -1), (-1,))
    )
    expected = module(image)
    expected_grad = torch.autograd.grad(expected.square().sum(), image)[0]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for x in (signal, volume):
        y = module(x)
        assert y.shape == x.shape and y.dtype == dtype
        torch.testing.assert_close(y.reshape(image.shape), expected, **close)
        grad = torch.autograd.grad(y.square().sum(), x)[0]
        torch.testing.assert_close(grad.reshape(image.shape), expected_grad, **close)


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc", "aconc", "prelu(per_channel=True)"])
def test_channels_last_3d_stays(name: str) -> None:
    x = draw(3).to(memory_format=torch.channels_last_3d).requires_grad_()
    y = build(name, 3)(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert x.grad.is_contiguous(memory_format=torch.channels_last_3d)


def test_frelu_normalises_by_the_batch_in_training() -> None:
    for dims in (1, 3):
        module, x = build("frelu", dims).train(), draw(dims)
        state = {key: value.detach().numpy() for key, value in module.state_dict().items()}
        expected = REFERENCE["frelu"](x.numpy(), state, 1, training=True)
        torch.testing.assert_close(module(x), torch.from_numpy(expected))
        assert (
            module(x[:1, :, :1] if dims == 1 else x[:1, :, :1, :1, :1]).isfinite().all()
        )  # a single value per channel


@pytest.mark.parametrize("name", ["softmax2d", "softmax", "softmin", "log_softmax"])
def test_softmaxes_do_not_normalise_over_the_batch(name: str) -> None:
    for dims in SHAPES:
        y = create(name, dims=dims)(draw(dims))
        total = (y.exp() if name == "log_softmax" else y).sum(1)
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("name", ["dyrelu_b", "dyrelu_c", "meta_aconc"])
def test_coefficients_broadcast_over_the_input(name: str) -> None:
    module, x = build(name, 3), draw(3)
    for key, value in get_entry(name).coefficients(module, x).items():
        expected = (2, 1, *x.shape[2:]) if key == "pi" else (2, 6) if key == "beta" else (2, 6, 1, 1, 1)
        assert value.shape == expected
    held = module.held_at(x)
    torch.testing.assert_close(held(x), module(x))
    assert held(2 * x).shape == x.shape


# ---------------------------------------------------------------- parameters and copies


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc", "aconc", "glu", "softmax2d"])
def test_parameters_do_not_depend_on_the_number_of_dimensions(name: str) -> None:
    shapes = [{key: t.shape for key, t in create(name, 6, dims=dims).state_dict().items()} for dims in SHAPES]
    assert shapes[0] == shapes[1] == shapes[2]
    if name == "dyrelu_c":
        assert shapes[0]["spatial.weight"] == (1, 6, 1, 1)
    if name == "glu":
        assert shapes[0]["proj.weight"] == (12, 6, 1, 1)


def test_frelu_has_the_kernel_of_its_dimensions() -> None:
    for dims, norm in ((1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        module = create("frelu", 6, dims=dims)
        assert module.conv.weight.shape == (6, 1, *[3] * dims) and type(module.bn) is norm
    assert str(FReLU(6)).startswith("FReLU(\n  6\n") and "6, dims=3" in str(FReLU(6, 3))


def test_a_frelu_pickled_before_it_had_dims_still_works() -> None:
    module = FReLU(6)
    del vars(module)["dims"]
    loaded = pickle.loads(pickle.dumps(module)).eval()
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(loaded(x), module.eval()(x))
    assert copy.deepcopy(loaded).dims == 2


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc", "glu", "softmax2d"])
def test_wrong_shapes_are_named(name: str) -> None:
    module = create(name, 6)
    for shape in ((4, 6), (2, 6, 2, 2, 2, 2)):
        with pytest.raises(
            ShapeError, match=rf"shape \({', '.join(map(str, shape))}\): .*\(B, C, L\), \(B, C, H, W\) or"
        ):
            module(torch.randn(shape))


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc", "frelu"])
def test_a_wrong_number_of_channels_is_named(name: str) -> None:
    with pytest.raises(ShapeError, match=r"shape \(2, 5, 3, 3\): .*with C = 6"):
        create(name, 6)(torch.randn(2, 5, 3, 3))


def test_frelu_refuses_other_dimensions_than_its_own() -> None:
    for dims, takes in ((1, "(B, C, L)"), (2, "(B, C, H, W)"), (3, "(B, C, D, H, W)")):
        for other in set(SHAPES) - {dims}:
            with pytest.raises(ShapeError) as caught:
                create("frelu", 6, dims=dims)(torch.randn(SHAPES[other]))
            assert str(caught.value).endswith(f"this activation takes {takes} with C = 6")
            assert str(SHAPES[other]) in str(caught.value)


def test_wrong_dims_are_named() -> None:
    for dims in (0, 4, True, "2"):
        with pytest.raises(SpecError, match="dims is 1, 2 or 3"):
            create("relu", dims=dims)
    with pytest.raises(ValueError, match="dims is 1, 2 or 3, not 5"):
        FReLU(6, 5)
    with pytest.raises(SpecError, match="dims"):  # the site says it, not the user
        resolve("frelu(dims=1)")


@pytest.mark.usefixtures("own_zoo")
def test_a_registered_factory_gets_dims_where_it_asks_for_them() -> None:
    @register("my_pool")
    def build_mine(dims: int, layout: str = "map", gain: float = 1.0) -> nn.Module:
        return nn.Hardtanh(-dims, gain * dims)

    assert create("my_pool(gain=2.0)", dims=3).max_val == 6 and create("my_pool").max_val == 2
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU())
    patch_model(net, "my_pool")
    assert net[1].max_val == 1


# ---------------------------------------------------------------- networks


class Bare(nn.Module):
    """An activation whose owner has no layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x)


def build_network(dims: int) -> nn.Sequential:
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 1]
    pool, mean = (getattr(nn, f"{kind}Pool{dims}d") for kind in ("Max", "AdaptiveAvg"))
    return nn.Sequential(
        *(conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2), nn.SiLU()),
        *(conv(8, 12, 1), nn.GroupNorm(2, 12), Bare(), mean(1), nn.Flatten(), nn.Linear(12, 2)),
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_sites_of_a_network(dims: int) -> None:
    sites = find_sites(build_network(dims))
    assert [(site.name, site.channels, site.layout, site.dims) for site in sites] == [
        ("2", 8, "map", dims),
        ("4", 8, "map", dims),
        ("7.relu", 12, "map", dims),
    ]


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("spec", TRAINED)
def test_a_patched_network_trains(spec: str, dims: int) -> None:
    net = build_network(dims)
    stock = copy.deepcopy(net).eval()
    assert len(patch_model(net, spec)) == 3
    again = find_sites(net)  # the layers inside an activation must not be taken for those of the network
    assert {(site.layout, site.dims) for site in again} == {("map", dims)}
    x, labels = torch.randn(8, 3, *((24,), (), (4, 6, 6))[dims - 1]), torch.arange(8) % 2
    before = {key: value.clone() for key, value in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and math.isfinite(losses[-1])
    still = [key for key, value in net.named_parameters() if torch.equal(value, before[key])]
    # The softmax of DY-ReLU-C does not change when a constant is added to its logits.
    assert not [key for key in still if not key.endswith("spatial.bias")]
    clone = pickle.loads(pickle.dumps(net)).eval()
    torch.testing.assert_close(clone(x), net.eval()(x))
    unpatch_model(net)
    net.load_state_dict(stock.state_dict())
    assert torch.equal(net.eval()(x), stock(x))


@pytest.mark.parametrize("dims", [1, 3])
def test_fold_and_diagnosis_of_a_network(dims: int) -> None:
    net = build_network(dims).eval()
    patch_model(net, "arelu")
    x = torch.randn(4, 3, *((24,), (), (4, 6, 6))[dims - 1])
    before = net(x)
    assert len(fold_activations(net)) == 3
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    patch_model(net, "dyrelu_c")
    found = diagnose(net, [x], lambda model, batch: model(batch).square().mean())
    assert [site.name for site in found.sites] == ["2", "4", "7.relu"]


def test_a_transformer_with_a_convolutional_stem_has_tokens() -> None:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Conv1d(3, 8, 16, 16), nn.GELU()
            self.turned = Bare()
            self.norm, self.fc, self.inner = nn.LayerNorm(8), nn.Linear(8, 20), Bare()

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.turned(self.act(self.stem(x)).transpose(1, 2))
            return self.inner(self.fc(self.norm(tokens)))

    found = {site.name: (site.channels, site.layout) for site in find_sites(Speech())}
    assert found == {"act": (8, "map"), "turned.relu": (8, "tokens"), "inner.relu": (20, "tokens")}
    with pytest.raises(SelectionError, match=r"feature maps only, but turned\.relu"):
        patch_model(Speech(), "dyrelu_b", scope="all")


def test_an_activation_after_a_linear_names_the_shape_that_it_does_not_take() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    patch_model(net, "dyrelu_b")
    with pytest.raises(ShapeError, match=r"the input has the shape \(5, 8\)"):
        net(torch.randn(5, 4))


def test_gflops_are_of_images_only() -> None:
    assert math.isnan(count_gflops(build_network(1))) and count_gflops(build_network(2), 32) > 0
