"""The zoo: every entry against its formula, its gradient, its types and layouts; names, arguments, users' own."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from reference import REFERENCE

from rtdetr_act.activations.acon import AconC, MetaAconC
from rtdetr_act.activations.aglu import AGLU, LAMBDA_MIN
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.dyrelu import DyReLUA, DyReLUB, DyReLUC
from rtdetr_act.activations.frelu import FReLU
from rtdetr_act.activations.glu import GatedLinearUnit
from rtdetr_act.activations.placed import get_placement, set_placement
from rtdetr_act.activations.prelu import PReLU, build_prelu
from rtdetr_act.activations.registry import (
    count_parameters,
    create,
    find_entry,
    get_entry,
    list_own_classes,
    names,
    register,
    resolve,
)
from rtdetr_act.activations.torch_native import Softmax2d
from rtdetr_act.errors import ModelError, RtdetrActWarning, SelectionError, SpecError
from rtdetr_act.kernels.backend import read_parameters
from rtdetr_act.kernels.pool import global_avg_pool
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.patcher import patch_model
from rtdetr_act.surgery.sites import find_sites

ROOT = Path(__file__).parents[1]
MAP, TOKENS = (2, 6, 5, 4), (2, 7, 6)
MAP_ONLY = {"dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc", "frelu", "softmax2d"}
OURS = {
    "arelu": AReLU,
    "dyrelu_a": DyReLUA,
    "dyrelu_b": DyReLUB,
    "dyrelu_c": DyReLUC,
    "aconc": AconC,
    "meta_aconc": MetaAconC,
    "frelu": FReLU,
    "aglu": AGLU,
    "glu": GatedLinearUnit,
}
ARGUMENTS = {"threshold": {"threshold": 0.1, "value": -0.3}}
BUILT_IN = sorted(REFERENCE)
SITES = [(name, layout) for name in BUILT_IN for layout in ("map", "tokens") if layout == "map" or name not in MAP_ONLY]
OUR_SITES = [*((name, layout) for name, layout in SITES if name in OURS), ("prelu", "tokens")]
# Of the others, which are torch's own classes as they are, the values, names and arguments are checked; how torch
# differentiates, rounds and copies them is torch's to check.
OUR_NAMES = sorted([*OURS, "prelu"])
OUR_PLACES = [(name, layout) for name, layout in SITES if name in OUR_NAMES]
VARIANTS = [
    ("arelu", {"alpha": 0.5, "beta": -1.0}),
    ("dyrelu_a", {"reduction": 4, "k": 3}),
    ("dyrelu_b", {"reduction": 2, "k": 3, "lambda_a": 0.7, "lambda_b": 0.2}),
    ("dyrelu_b", {"k": 1}),
    ("dyrelu_c", {"tau": 0.05}),
    ("prelu", {"per_channel": True, "init": 0.1}),
    ("prelu", {"num_parameters": 6}),
    ("aconc", {"init": "silu"}),
    ("aglu", {"lambd": 3.0, "kappa": -0.5}),
    ("repact", {"softmax": True}),
    ("meta_aconc", {"reduction": 2, "init": "silu"}),
    ("leaky_relu", {"negative_slope": 0.1}),
    ("gelu", {"approximate": "tanh"}),
    ("elu", {"alpha": 0.5}),
    ("celu", {"alpha": 2.0}),
    ("softplus", {"beta": 2.0}),
    ("hardtanh", {"min_val": -0.2, "max_val": 0.7}),
    ("hardshrink", {"lambd": 1.0}),
    ("softshrink", {"lambd": 1.0}),
    ("rrelu", {"lower": 0.1, "upper": 0.2}),
    ("softmax", {"dim": 2}),
    ("threshold", {"threshold": -0.5, "value": 2.0}),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, layout: str = "map", channels: int = 6, **kwargs: object) -> nn.Module:
    """Build an entry with every parameter and running statistic away from its start, where errors could hide."""
    module = create(name, channels, layout, **{**ARGUMENTS.get(name, {}), **kwargs})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        for key, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in key else 0.0))
        if name in ("aglu", "apa"):
            module.lambd.copy_(torch.rand(1) + 0.2)
    return module


def state_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().double().numpy() for key, value in module.state_dict().items()}


def data(layout: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (2 * torch.randn(MAP if layout == "map" else TOKENS, dtype=torch.float64)).to(dtype)


def expected(name: str, x: torch.Tensor, module: nn.Module, layout: str, **kwargs: object) -> torch.Tensor:
    axis = 1 if layout == "map" else x.ndim - 1
    reference = REFERENCE[name]
    return torch.from_numpy(
        np.asarray(reference(x.double().numpy(), state_of(module), axis, **{**ARGUMENTS.get(name, {}), **kwargs}))
    )


# ---------------------------------------------------------------- every entry


@pytest.mark.integration
def test_every_entry_has_a_reference_formula() -> None:
    code = "from rtdetr_act.activations.registry import names; print(*names())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) - set(REFERENCE) == set()
    assert set(REFERENCE) - set(names()) == set()


@pytest.mark.parametrize(("name", "layout"), SITES)
def test_forward_is_the_formula(name: str, layout: str) -> None:
    module, x = build(name, layout).double().eval(), data(layout)
    torch.testing.assert_close(module(x), expected(name, x, module, layout), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_arguments_do_what_the_formula_says(name: str, kwargs: dict[str, object]) -> None:
    module, x = build(name, **kwargs).double().eval(), data("map")
    torch.testing.assert_close(module(x), expected(name, x, module, "map", **kwargs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - MAP_ONLY))
def test_tokens_without_a_sequence(name: str) -> None:
    module, x = build(name, "tokens").double().eval(), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), expected(name, x, module, "tokens"), rtol=1e-9, atol=1e-9)


def test_prelu_per_channel_on_tokens() -> None:
    module, x = build("prelu", "tokens", per_channel=True).double(), data("tokens")
    assert type(module) is PReLU
    torch.testing.assert_close(module(x), expected("prelu", x, module, "tokens"))


def test_frelu_normalises_by_the_batch_in_training() -> None:
    module, x = build("frelu").double().train(), data("map")
    torch.testing.assert_close(module(x), expected("frelu", x, module, "map", training=True))


def test_rrelu_draws_slopes_in_training() -> None:
    slopes = create("rrelu").train()(-torch.ones(1000)).neg()
    assert 0.125 <= slopes.min() < 0.15 and 0.3 < slopes.max() <= 1 / 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "layout"), OUR_PLACES)
def test_half_types_are_close_to_float64(name: str, layout: str, dtype: torch.dtype) -> None:
    module, x = build(name, layout).to(dtype).eval(), data(layout, dtype)
    y = module(x)
    assert y.dtype == dtype
    exact = expected(name, x, module, layout)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * step, atol=6 * step * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OUR_NAMES)
def test_channels_last_stays(name: str, dtype: torch.dtype) -> None:
    module = build(name).to(dtype).eval()
    x = data("map", dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, module(x.contiguous()), rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("name", "layout"), OUR_PLACES)
def test_autocast(name: str, layout: str) -> None:
    module, x = build(name, layout).eval(), data(layout, torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        from_float, from_half = module(x), module(x.bfloat16())
    exact = expected(name, x.detach(), module, layout)
    bound = 0.05 * max(1.0, float(exact.abs().max()))
    for y in (from_float, from_half):
        assert float((y.detach().double() - exact).abs().max()) < bound
    if name in OURS:
        assert from_half.dtype == torch.bfloat16
    (from_float.float().sum() + from_half.float().sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "layout"), OUR_SITES)
def test_trace_holds_for_other_sizes(name: str, layout: str) -> None:
    module = build(name, layout).eval()
    traced = torch.jit.trace(module, data(layout, torch.float32))
    x = torch.randn((3, 6, 7, 2) if layout == "map" else (1, 11, 6))
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.parametrize("name", OUR_NAMES)
def test_deterministic_algorithms(name: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        x = data("map", torch.float32).requires_grad_()
        build(name)(x).sum().backward()
        assert x.grad.shape == x.shape
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("channels", [16, 3])
@pytest.mark.parametrize("name", BUILT_IN)
def test_parameter_count_is_that_of_the_module(name: str, channels: int) -> None:
    if name in ARGUMENTS:
        with pytest.raises(SpecError, match="missing a required argument"):
            count_parameters(name, channels)
    else:
        assert count_parameters(name, channels) == sum(p.numel() for p in create(name, channels).parameters())


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_activation_hides_inside(name: str) -> None:
    inner = [child for key, child in create(name, 6, **ARGUMENTS.get(name, {})).named_modules() if key]
    # The walk over a network must find the activation, not a part of it.
    assert [type(child) for child in inner if type(child).__module__ == "torch.nn.modules.activation"] == (
        [nn.Softplus] if name == "apa" else []
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_map_only_entries_refuse_tokens(name: str) -> None:
    assert get_entry(name).tokens == (name not in MAP_ONLY)
    if name in MAP_ONLY:
        with pytest.raises(SelectionError, match="feature maps only"):
            create(name, 6, "tokens")


def test_pooling_entries_say_why_they_refuse_tokens() -> None:
    for name in ("dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc"):
        with pytest.raises(SelectionError, match="denoising"):
            create(name, 6, "tokens")


@pytest.mark.parametrize("name", BUILT_IN)
def test_needs_channels(name: str) -> None:
    if get_entry(name).needs_channels:
        with pytest.raises(SpecError, match="number of channels"):
            create(name)
    else:
        assert isinstance(create(name, **ARGUMENTS.get(name, {})), nn.Module)


@pytest.mark.parametrize("name", BUILT_IN)
def test_entries_are_described(name: str) -> None:
    found = get_entry(name)
    assert found.name == name and found.formula and "\n" not in found.formula and found.paper
    assert found.tokens or found.maps_only_because


# ---------------------------------------------------------------- the families


def test_arelu_starts_as_in_the_paper() -> None:
    module = AReLU()
    assert [(key, tuple(p.shape)) for key, p in module.named_parameters()] == [("alpha", (1,)), ("beta", (1,))]
    torch.testing.assert_close(module(torch.tensor([-2.0, 0.0, 1.0])), torch.tensor([-1.8, 0.0, 1.880797]))


def test_arelu_amplifies_active_gradients_where_relu_passes_them() -> None:
    x = torch.tensor([3.0, -3.0], requires_grad=True)
    AReLU()(x).sum().backward()
    assert x.grad[0] > 1 and 0 < x.grad[1] < 1


@pytest.mark.parametrize(("alpha", "slope"), [(1.7, 0.99), (-0.4, 0.01)])
def test_arelu_clamp_has_no_gradient_outside_its_range(alpha: float, slope: float) -> None:
    module = AReLU(alpha=alpha)
    y = module(-torch.ones(3))
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.full((3,), -slope))
    assert module.alpha.grad.item() == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(-2, 3), st.floats(-6, 6), st.integers(0, 999))
def test_arelu_is_a_scaled_leaky_relu_and_homogeneous(shape: list[int], alpha: float, beta: float, seed: int) -> None:
    module = AReLU(alpha, beta).double()
    x = 5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    s, a = 1 + torch.sigmoid(module.beta).item(), min(max(module.alpha.item(), 0.01), 0.99)
    torch.testing.assert_close(module(x), F.leaky_relu(s * x, a / s))
    torch.testing.assert_close(module(3.5 * x), 3.5 * module(x))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([DyReLUA, DyReLUB]),
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 16),
    st.floats(0.1, 50),
)
def test_dyrelu_with_a_silent_generator_is_relu(
    kind: type[nn.Module], shape: tuple[int, ...], reduction: int, scale: float
) -> None:
    x = scale * torch.randn(shape)
    module = kind(shape[1], reduction=reduction)
    assert torch.equal(module(x), torch.relu(x))  # as constructed
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(x), torch.relu(x))


def test_dyrelu_with_more_branches_starts_close_to_relu_and_can_tell_them_apart() -> None:
    module, x = DyReLUB(16, k=4), torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(module(x), torch.relu(x), atol=5e-3, rtol=5e-3)
    branches = module.expand.weight.view(8, 16, -1)
    assert not torch.equal(branches[1], branches[2])


def test_dyrelu_generator_learns_from_the_start() -> None:
    module = DyReLUB(8)
    for _ in range(2):  # the first step moves the last Linear, which then passes a gradient to the first
        module.zero_grad()
        module(torch.randn(4, 8, 3, 3)).square().sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.01 * parameter.grad
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.floats(0.01, 20),
    st.integers(0, 99),
)
def test_dyrelu_c_attention_is_a_bounded_share_per_image(shape: tuple[int, ...], tau: float, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = DyReLUC(shape[1], tau=tau), 3 * torch.randn(shape)
    pi = module.attention(x)
    assert pi.shape == (shape[0], 1, *shape[2:])
    assert (pi >= 0).all() and (pi <= 1).all()
    assert (pi.sum((1, 2, 3)) <= shape[2] * shape[3] / 3 * (1 + 1e-5)).all()
    torch.testing.assert_close(module.attention(x[:1]), pi[:1])  # one image does not see another


def test_dyrelu_c_starts_as_a_third_of_relu_on_a_flat_map() -> None:
    x = torch.full((1, 4, 6, 5), 2.0)
    torch.testing.assert_close(DyReLUC(4)(x), x / 3)


DYRELU = [("dyrelu_a", {}), ("dyrelu_b", {}), ("dyrelu_c", {}), ("dyrelu_c", {"tau": 0.5, "tau_start": 3.0, "k": 3})]
DYRELU += [(name, arguments) for name, arguments in VARIANTS if name.startswith("dyrelu")]


def layers_of(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize(("name", "arguments"), DYRELU)
@pytest.mark.parametrize("shape", [(1, 6, 7, 7), (3, 6, 5, 1), (2, 6, 160, 160)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@torch.no_grad()
def test_dyrelu_without_autograd_is_the_formula(
    name: str, arguments: dict[str, float], shape: tuple[int, ...], layout: str
) -> None:
    module, x = build(name, **arguments).eval(), 2 * torch.randn(shape)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    assert len(read_parameters(x, module, module.layers) or ()) == 2 * len(layers_of(module))
    y = module(x)
    if "tau_start" not in arguments:
        torch.testing.assert_close(
            y.double(), expected(name, x, module, "map", **arguments), rtol=2e-5, atol=2e-5, check_stride=False
        )
    with torch.enable_grad():
        recorded = module(x).detach()
    torch.testing.assert_close(y, recorded, rtol=2e-5, atol=2e-6)
    assert y.stride() == recorded.stride()
    torch.testing.assert_close(module.double()(x.double()), y.double(), rtol=2e-5, atol=2e-5, check_stride=False)


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c"])
@torch.no_grad()
def test_dyrelu_without_autograd_computes_with_its_weights_of_now(name: str) -> None:
    module, other, x = build(name).eval(), build(name).eval(), data("map", torch.float32)
    for each in (module, other):
        each.squeeze.bias.fill_(3)  # so that the hidden layer is not cut off, and all weights have an effect

    def check() -> torch.Tensor:
        y = module(x.to(module.squeeze.weight.dtype)).float()
        torch.testing.assert_close(y.double(), expected(name, x, module, "map"), rtol=2e-5, atol=2e-5)
        return y

    results = [check()]
    with torch.enable_grad():
        module(x).square().sum().backward()
    torch.optim.AdamW(module.parameters(), lr=0.1).step()
    results.append(check())
    for parameter, value in zip(module.parameters(), other.parameters(), strict=True):
        parameter.data.mul_(0.5).add_(value.data, alpha=0.5)  # as an EMA does, past the version counter
    results.append(check())
    module.expand.weight.data = 2 * module.expand.weight.data
    results.append(check())
    for value in module.state_dict().values():
        value.mul_(0.7)
    results.append(check())
    module.expand = nn.Linear(module.expand.in_features, module.expand.out_features)
    results.append(check())
    module.load_state_dict(other.state_dict())
    results.append(check())
    for parameter in module.parameters():
        parameter.copy_(parameter.half())  # values that double() does not round
    results.append(check())
    assert not any(torch.allclose(*pair) for pair in itertools.combinations(results[:-1], 2))
    for changed in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double()):
        torch.testing.assert_close(changed(x.to(changed.squeeze.weight.dtype)).float(), results[-1])
    assert set(module.state_dict()) == set(other.state_dict())
    assert vars(module).keys() == vars(other).keys()


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c"])
@torch.no_grad()
def test_dyrelu_calls_its_layers_where_somebody_watches_them(name: str) -> None:
    x = data("map", torch.float32)

    def may_be_read(layer: nn.Module) -> bool:
        return read_parameters(x, nn.Sequential(layer), "0") is not None

    module = build(name).eval()
    seen: list[nn.Module] = []
    for layer in layers_of(module):
        layer.register_forward_hook(lambda layer, inputs, y: seen.append(layer))
        assert not may_be_read(layer)
    module(x)
    assert seen[:2] == [module.squeeze, module.expand]
    everywhere = nn.modules.module.register_module_forward_hook(lambda layer, inputs, y: None)
    assert not may_be_read(nn.Linear(2, 2))
    everywhere.remove()
    assert may_be_read(nn.Linear(2, 2))

    pruned = build(name).eval()
    prune.l1_unstructured(pruned.expand, "weight", amount=0.5)
    want = copy.deepcopy(pruned)
    prune.remove(want.expand, "weight")
    torch.testing.assert_close(pruned(x), want(x))
    assert not may_be_read(pruned.expand)

    weighted = build(name).eval()
    want = weighted(x)
    nn.utils.parametrizations.weight_norm(weighted.expand)
    torch.testing.assert_close(weighted(x), want)
    assert not may_be_read(weighted.expand)

    with torch.autocast("cpu", torch.bfloat16):
        assert not may_be_read(nn.Linear(2, 2))
    with FlopCounterMode(display=False):
        assert not may_be_read(nn.Linear(2, 2))
    for other in (nn.Linear(2, 2).half(), nn.Linear(2, 2, bias=False), nn.Identity()):
        assert not may_be_read(other)
    with torch.enable_grad():
        assert not may_be_read(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c"])
@torch.no_grad()
def test_a_trace_of_dyrelu_holds_for_other_sizes(name: str) -> None:
    module, x = build(name).eval(), data("map", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.*is deprecated")
        traced = torch.jit.trace(module, x)
    other = torch.randn(3, 6, 9, 2)
    for each in (x, other):
        torch.testing.assert_close(traced(each), module(each))


@pytest.mark.parametrize("name", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "meta_aconc"])
def test_pooling_does_not_overflow_half(name: str) -> None:
    module, x = build(name).half().eval(), torch.full((1, 6, 160, 160), 60.0, dtype=torch.float16)
    y = module(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), expected(name, x, module, "map"), rtol=0.02, atol=0.05)


def test_pooling_of_half_types_is_not_rounded() -> None:
    x = (torch.randn(2, 6, 40, 40) + 1 / 3).bfloat16()
    torch.testing.assert_close(global_avg_pool(x, torch.float64), x.double().mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_aconc_silu_start_is_silu_and_paper_start_is_random() -> None:
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(create("aconc", 8, init="silu")(x), F.silu(x))
    paper = create("aconc", 64)
    assert (paper.p1 < 0).any() and (paper.p1 > 0).any() and (paper.beta == 1).all()


def test_aglu_starts_as_silu_and_is_the_input_times_ultralytics_gate() -> None:
    x = torch.randn(2, 8, 50, 50, dtype=torch.float64)
    module, gate = AGLU().double(), create("apa").double()
    assert [(key, tuple(p.shape), p.item()) for key, p in module.named_parameters()] == [
        ("lambd", (1,), 1.0),
        ("kappa", (1,), 1.0),
    ]
    torch.testing.assert_close(module(x), F.silu(x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        module.load_state_dict({"lambd": gate.lambd, "kappa": gate.kappa})
        torch.testing.assert_close(module(x), x * gate(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lambd", [1e-5, 1.1e-4, 0.003, 0.7, 30.0])
@pytest.mark.parametrize("kappa", [-2.0, 0.9, 10.0])
def test_aglu_and_its_gradients_hold_for_all_it_may_learn(lambd: float, kappa: float) -> None:
    x = torch.linspace(-30, 30, 101, dtype=torch.float64, requires_grad=True)
    exact, module = AGLU(lambd, kappa).double(), AGLU(lambd, kappa)
    found, wanted = module(x.float()), exact(x)
    formula = REFERENCE["aglu"](x.detach().numpy(), state_of(exact), 0)
    torch.testing.assert_close(wanted.detach(), torch.from_numpy(formula), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    loss = [y.cos().sum() for y in (found, wanted)]
    for mine, right in zip(
        torch.autograd.grad(loss[0], [*module.parameters()]),
        torch.autograd.grad(loss[1], [*exact.parameters()]),
        strict=True,
    ):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine.double(), right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("x", [torch.randn(3, 4), torch.randn(2, 8, 64, 64)], ids=["small", "in blocks"])
def test_aglu_learns_lambda_down_to_its_bound(x: torch.Tensor) -> None:
    for lambd, learns in ((1.01 * LAMBDA_MIN, True), (0.99 * LAMBDA_MIN, False), (-1.0, False)):
        module = AGLU(kappa=0.8)
        with torch.no_grad():
            module.lambd.fill_(lambd)
        y = module(x)
        y.square().sum().backward()
        assert torch.isfinite(y).all() and module.kappa.grad.item() != 0
        assert (module.lambd.grad.item() != 0) == learns


def test_meta_aconc_has_no_batchnorm_and_treats_images_apart() -> None:
    module, x = build("meta_aconc").train(), torch.randn(3, 6, 4, 4)
    assert not any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
    torch.testing.assert_close(module(x)[:1], module(x[:1]))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["softmax", "softmin", "log_softmax"]),
    st.sampled_from(["map", "tokens"]),
    st.lists(st.integers(1, 6), min_size=4, max_size=4),
)
def test_softmaxes_act_over_the_channels(name: str, layout: str, sizes: list[int]) -> None:
    shape, dim = (sizes, 1) if layout == "map" else (sizes[:3], -1)
    y = create(name, layout=layout)(10 * torch.randn(shape, dtype=torch.float64))
    total = (y.exp() if name == "log_softmax" else y).sum(dim)
    torch.testing.assert_close(total, torch.ones_like(total))


# ---------------------------------------------------------------- names and arguments


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SiLU", "silu"),
        ("nn.SiLU", "silu"),
        ("torch.nn.SiLU", "silu"),
        ("swish", "silu"),
        ("Swish", "silu"),
        ("leakyrelu", "leaky_relu"),
        ("LeakyReLU", "leaky_relu"),
        ("lrelu", "leaky_relu"),
        ("hard_swish", "hardswish"),
        ("hswish", "hardswish"),
        ("h_swish", "hardswish"),
        ("hard_sigmoid", "hardsigmoid"),
        ("nn.Softmax2d", "softmax2d"),
        ("nn.LogSoftmax", "log_softmax"),
        ("DyReLU-B", "dyrelu_b"),
        ("dynamic_relu_b", "dyrelu_b"),
        ("AReLU", "arelu"),
        ("Mish", "mish"),
        ("AconC", "aconc"),
        ("meta-acon", "meta_aconc"),
        (" relu ", "relu"),
        ("leakyrelu", "leaky_relu"),
        ("Leaky ReLU", "leaky_relu"),
        ("lrelu", "leaky_relu"),
        ("hard_swish", "hardswish"),
        ("F.relu", "relu"),
    ],
)
def test_aliases(text: str, name: str) -> None:
    assert get_entry(text).name == name
    if name != "meta_aconc":
        assert resolve(text) == ActSpec(name)


@pytest.mark.parametrize("cls", [n for n in nn.modules.activation.__all__ if n != "MultiheadAttention"])
def test_every_torch_activation_is_there_under_its_class_name(cls: str) -> None:
    module = create(f"nn.{cls}", 6, **ARGUMENTS.get(cls.lower(), {}))
    # The latter two are subclasses of torch's: with a faster backward, and with channels in dimension 1 at any shape.
    ours = {"GLU": GatedLinearUnit, "PReLU": PReLU, "Softmax2d": Softmax2d}
    assert type(module) is ours.get(cls, getattr(nn, cls))
    assert cls == "GLU" or isinstance(module, getattr(nn, cls))


@pytest.mark.parametrize(("name", "cls"), OURS.items())
def test_our_own_classes(name: str, cls: type) -> None:
    assert type(create(name, 6)) is cls and cls in list_own_classes()


def test_every_site_gets_its_own_instance() -> None:
    assert create("arelu") is not create("arelu")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("arlu", "did you mean 'arelu'"),
        ("dyrelu", "did you mean 'dyrelu_a', 'dyrelu_b' or 'dyrelu_c'"),
        ("Dynamic ReLU", "did you mean 'dyrelu_a', 'dyrelu_b' or 'dyrelu_c'"),
        ("soft", "did you mean 'soft"),  # too many begin with it to offer all of them
        ("dynamic_conv", "not an activation"),
        ("leaky_relu(slope=0.1)", r"takes \(negative_slope=0.01, inplace=False\)"),
        ("leaky_relu(0.1, False, 3)", "too many positional"),
        ("leaky_relu('x')", "leaky_relu"),
        ("gelu(approximate='fast')", "gelu"),
        ("threshold", "takes \\(threshold, value"),
        ("threshold(0.1)", "'value'"),
        ("sigmoid(2)", "takes no arguments"),
        ("dyrelu_b(reduction=0)", "reduction is an integer of at least 1, not 0"),
        ("dyrelu_b(channels=8)", "channels"),
        ("dyrelu_b(layout='map')", "layout"),
        ("dyrelu_b(k=-1)", "k is an integer"),
        ("dyrelu_b(lambda_a=-1.0)", "lambda_a is a non-negative number"),
        ("dyrelu_c(tau=0)", "tau is a positive number"),
        ("dyrelu_b(reducton=4)", "did you mean 'reduction'"),
        ("meta_aconc(reduction=0)", "reduction"),
        ("aconc(init='zero')", "'paper' or 'silu'"),
        ("arelu(alpha='x')", "alpha is a finite number"),
        ("arelu(alpha=1e39)", "alpha is a finite number"),
        ("aglu(lambd=0)", "lambd is a positive number"),
        ("aglu(kappa=True)", "kappa is a finite number"),
        ("pwlu(intervals=5)", "intervals is an even number"),
        ("pwlu(bound=0)", "bound is a positive number"),
        ("pwlu(realign_epoch=-1)", "realign_epoch is a non-negative number"),
        ("prelu(init=1e999)", "init is a finite number"),
        ("arelu(beta=1e999)", "beta is a finite number"),
        ("prelu(num_parameters=0)", "num_parameters"),
        ("softmax(dim=9)", "softmax"),
        ("relu(", "not an activation"),
        ("__import__('os').getcwd()", "not an activation"),
    ],
)
def test_wrong_specs_are_named(spec: str, message: str) -> None:
    for ask in (resolve, lambda text: create(text, 8)):
        with pytest.raises(SpecError, match=message):
            ask(spec)


def test_wrong_sites_are_named() -> None:
    for channels in (0, -3, True, 2.0, "8"):
        with pytest.raises(SpecError, match="channels is an integer"):
            create("dyrelu_b", channels)
    with pytest.raises(SpecError, match="layout is 'map' or 'tokens'"):
        create("relu", layout="nchw")
    with pytest.raises(SpecError, match="number of channels"):
        create("prelu", per_channel=True)
    with pytest.raises(SelectionError, match="12 channels"):
        create("prelu(num_parameters=6)", 12)
    with pytest.raises(SpecError, match="no activation"):
        get_entry(3)
    with pytest.raises(SpecError, match="ActSpec"):
        resolve(3)


def test_constructors_refuse_nonsense_with_value_error() -> None:
    for build_wrong in (
        lambda: DyReLUA(0),
        lambda: DyReLUB(-1),
        lambda: DyReLUC(4, tau=-1.0),
        lambda: AconC(0),
        lambda: AconC(4, layout="x"),
        lambda: MetaAconC(4, reduction=0),
        lambda: FReLU(0),
        lambda: GatedLinearUnit(4, layout="x"),
        lambda: AReLU(alpha=float("nan")),
        lambda: AReLU(beta=10**5000),
        lambda: AGLU(lambd=-1.0),
        lambda: AGLU(kappa=float("inf")),
        lambda: DyReLUB(4, lambda_a=10**400),
        lambda: build_prelu(init=1j),
    ):
        with pytest.raises(ValueError):
            build_wrong()


def test_resolve_keeps_arguments_and_the_random_state() -> None:
    before = torch.random.get_rng_state()
    assert resolve("nn.LeakyReLU(0.1)") == ActSpec("leaky_relu", (0.1,))
    assert resolve(ActSpec("DyReLUC", (), (("tau", 5.0),))) == ActSpec("dyrelu_c", (), (("tau", 5.0),))
    assert resolve("prelu(num_parameters=64)") == ActSpec("prelu", (), (("num_parameters", 64),))
    resolve("aconc")
    assert torch.equal(before, torch.random.get_rng_state())


def test_keywords_win_over_the_text() -> None:
    assert create("leaky_relu(0.1)", negative_slope=0.2).negative_slope == 0.2
    assert create("leaky_relu(negative_slope=0.1)", negative_slope=0.2).negative_slope == 0.2
    assert create("DyReLU-B", 16, reduction=2).expand.in_features == 8
    assert create("threshold(0.1)", value=3.0).value == 3.0
    with pytest.raises(SpecError, match="multiple values"):
        create("leaky_relu(0.1, negative_slope=0.3)", inplace=True)


def test_narrow_layers_keep_one_hidden_unit() -> None:
    assert create("dyrelu_b", 3).squeeze.out_features == 1


@pytest.mark.integration
def test_names_need_no_ultralytics() -> None:
    code = (
        "import sys; from rtdetr_act.activations.registry import names, get_entry; names(); get_entry('SiLU');"
        "assert 'ultralytics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_apa_is_ultralytics_own_and_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.nn.modules import activation

    module = create("apa")
    assert type(module) is activation.AGLU
    monkeypatch.delattr(activation, "AGLU")  # as in Ultralytics 8.2
    with pytest.raises(SpecError, match="not installed here"):
        create("apa")
    assert type(create("aglu")) is AGLU


# ---------------------------------------------------------------- users' own


class Plain(nn.Module):
    def __init__(self, power: int = 3) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x**self.power


class PerChannel(nn.Module):
    def __init__(self, channels: int, gain: float = 1.0, layout: str = "map") -> None:
        super().__init__()
        self.site = (channels, gain, layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Bare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()


@pytest.mark.usefixtures("own_zoo")
def test_register_a_plain_class() -> None:
    assert register("my_cube", Plain, aliases=("cubic_act",)) is Plain
    module = create("MyCube(power=5)", 64)
    assert type(module) is Plain and module.power == 5
    assert create("cubic_act(7)").power == 7
    assert "my_cube" in names() and Plain in list_own_classes() and not get_entry("my_cube").needs_channels
    with pytest.raises(SpecError, match=r"takes \(power=3\)"):
        resolve("my_cube(gain=1)")
    register("bare_act", Bare)
    assert type(create("bare_act")) is Bare
    with pytest.raises(SpecError, match="no arguments"):
        create("bare_act(3)")


@pytest.mark.usefixtures("own_zoo")
def test_register_passes_channels_and_layout_to_those_who_ask() -> None:
    register("my_gain", PerChannel)
    assert get_entry("my_gain").needs_channels
    assert create("my_gain(2.5)", 12, "tokens").site == (12, 2.5, "tokens")
    with pytest.raises(SpecError, match="number of channels"):
        create("my_gain")

    @register("my_function", tokens=False)
    def build_mine(power: int = 2, *, channels: int = 5) -> nn.Module:
        return nn.Sequential(Plain(power), nn.Identity(), *[nn.Identity() for _ in range(channels)])

    assert len(create("my_function", 3)) == 5 and len(create("my_function")) == 7
    made = create("my_function(4)")
    assert made[0].power == 4
    with pytest.raises(SelectionError, match="feature maps only"):
        create("my_function", 3, "tokens")


@pytest.mark.usefixtures("own_zoo")
def test_register_refuses_what_cannot_be() -> None:
    register("my_cube", Plain)
    register("my_cube", Plain)  # the same again is no error
    # Other names of a user, torch's names and their aliases, and that of a convolution.
    taken = [("my_cube", Bare), ("MyCube", Plain), ("relu", Plain), ("swish", Plain), ("HardSwish", Bare)]
    for name, factory in (*taken, ("PReLU", Plain), ("parametric_relu", Plain), ("GLU", Bare), ("dynamic_conv", Bare)):
        with pytest.raises(SpecError, match="is taken"):
            register(name, factory)
    for other in ("silu", "my_cube"):
        with pytest.raises(SpecError, match="is taken"):
            register("fresh", Bare, aliases=("aglu", other))
    assert "fresh" not in names() and type(create("aglu")) is AGLU
    for name in ("my act", "my-act", "2x", "", "lambda"):
        with pytest.raises(SpecError, match="cannot name"):
            register(name, Plain)
    with pytest.raises(SpecError, match="callable"):
        register("number", 3)
    register("no_module", lambda: 3)
    with pytest.raises(SpecError, match="not a torch"):
        create("no_module")


@pytest.mark.usefixtures("own_zoo")
def test_a_name_of_ours_that_a_user_registers_is_the_users() -> None:
    ours = create("aglu")
    with pytest.warns(RtdetrActWarning, match=r"Plain is now used under 'aglu' in place of rtdetr_act's own") as caught:
        register("aglu", Plain)
    assert [warning.filename for warning in caught] == [__file__]
    assert create("nn.AGLU(5)").power == 5 and resolve("aglu") == ActSpec("aglu") and names().count("aglu") == 1
    with pytest.raises(SpecError, match="no activation 'adaptive_glu'"):  # it named what is no longer there
        get_entry("adaptive_glu")
    # A checkpoint may still hold ours: it is described, and may be loaded.
    assert find_entry(ours).fold(ours).activation == ActSpec("silu") and find_entry(create("aglu")).fold is None
    assert {AGLU, Plain} <= set(list_own_classes())
    with pytest.raises(SpecError, match="is taken by the activation 'aglu'"):
        register("aglu", Bare)
    with pytest.warns(RtdetrActWarning):
        register("arelu", fail)
    with pytest.raises(SpecError, match="raised it"):  # in one sentence, as of any factory of a user
        create("arelu")


def fail() -> nn.Module:
    raise OSError("raised it")


@pytest.mark.usefixtures("own_zoo")
def test_other_names_of_ours_can_be_taken_one_by_one() -> None:
    with pytest.warns(RtdetrActWarning, match="under 'acon' and 'frelu' in"):
        register("my_act", Plain, aliases=("acon", "frelu"))
    assert type(create("acon")) is type(create("FReLU")) is Plain and "frelu" not in names()
    assert get_entry("acon_c").name == "aconc" and get_entry("aconc").aliases == ("acon_c",)
    with pytest.warns(RtdetrActWarning, match="under 'Dy_ReLU_B' in"):
        register("Dy_ReLU_B", Bare)  # its name as others write it
    assert get_entry("dyrelu_b").name == "Dy_ReLU_B" and "dyrelu_b" not in names()


@pytest.mark.usefixtures("own_zoo")
def test_a_name_of_ours_may_be_taken_with_all_its_aliases() -> None:
    with pytest.warns(RtdetrActWarning, match="under 'aconc' and 'acon' in"):
        register("aconc", Plain, aliases=("acon_c", "acon"))
    assert type(create("acon")) is Plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register("aconc", Plain, aliases=("acon_c", "acon"))


def test_what_a_test_took_over_was_given_back() -> None:
    assert type(create("adaptive_glu")) is type(create("aglu")) is AGLU and type(create("acon", 4)) is AconC


@pytest.mark.integration
def test_a_name_is_taken_in_any_order_and_told_of_once() -> None:
    code = (
        "import subprocess, sys\n"
        "from torch import nn\n"
        "from rtdetr_act import create, register\n"
        "register('aglu', nn.Identity)  # before anything is looked up\n"
        "print(create('aglu(1)'), flush=True)\n"
        "if len(sys.argv) > 1: subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)  # as a worker does\n"
    )
    done = subprocess.run([sys.executable, "-c", code, code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Identity()"] * 2
    assert done.stderr.count("torch.nn.modules.linear.Identity is now used under 'aglu'") == 1, done.stderr


def test_weights_of_a_users_activation_are_not_loaded_into_ours() -> None:
    from ultralytics.nn.tasks import DetectionModel

    source, network = (DetectionModel(tiny.yolo(), verbose=False) for _ in range(2))
    for model in (source, network):
        patch_model(model, "aglu")
    network.load(source, verbose=False)
    for site in find_sites(source):
        theirs = Plain()
        set_placement(theirs, get_placement(site.module))
        setattr(site.owner, site.attribute, theirs)
    source = copy.deepcopy(source)
    with pytest.raises(ModelError, match=r"the 'aglu' of these weights is .*Plain, which is not registered here"):
        network.load(source, verbose=False)


@pytest.mark.integration
def test_entry_points(tmp_path: Path) -> None:
    (tmp_path / "strange_acts.py").write_text(
        "from torch import nn\n"
        "from rtdetr_act.activations.protocol import Entry\n"
        "class Cube(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x ** 3\n"
        "def make(channels, slope=0.1):\n"
        "    return nn.LeakyReLU(slope * channels)\n"
        "def build(layout, value=1.0):\n"
        "    return nn.Hardtanh(-value, value)\n"
        "described = Entry('plugin_entry', build, formula='clamp')\n"
        "several = {'plugin_one': Cube, 'plugin_two': 2, 'plugin_three': Entry('plugin_three', make)}\n"
    )
    dist = tmp_path / "strange_acts-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-acts\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text(
        "[rtdetr_act.activations]\n"
        "plugin_cube = strange_acts:Cube\n"
        "plugin_make = strange_acts:make\n"
        "plugin_entry = strange_acts:described\n"
        "relu = strange_acts:Cube\n"
        "frelu = strange_acts:Cube\n"
        "plugin_broken = strange_acts:missing\n"
        "all_of_them = strange_acts:several\n"
    )
    code = (
        "import warnings\n"
        "from rtdetr_act.activations.registry import create, names\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(*[n for n in names() if n.startswith('plugin')])\n"
        "for w in caught: print('W', w.message)\n"
        "print(type(create('plugin_cube')).__name__, create('plugin_make(0.5)', 4), create('plugin_entry(2.0)'))\n"
        "import sys\n"
        "print(type(create('relu')).__name__, type(create('frelu')).__name__, 'ultralytics' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0] == "plugin_cube plugin_entry plugin_make plugin_one plugin_three"
    assert [line for line in lines if "'plugin_two' (strange_acts:several) was left out: SpecError" in line]
    assert [line for line in lines if "'plugin_broken'" in line and line.startswith("W")]
    assert [line for line in lines if "'relu'" in line and "taken" in line]
    assert lines[-2] == "Cube LeakyReLU(negative_slope=2.0) Hardtanh(min_val=-2.0, max_val=2.0)"
    assert [line for line in lines if "strange_acts.Cube is now used under 'frelu'" in line]
    assert lines[-1] == "ReLU Cube False"  # asking imports no Ultralytics
