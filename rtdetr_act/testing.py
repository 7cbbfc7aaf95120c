"""Conformance tests for activations, both built-in and registered ones.

>>> import numpy as np
>>> check_activation("leaky_relu", lambda x, state, axis: np.where(x >= 0, x, 0.01 * x))
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from rtdetr_act.activations.fitting import relative_error
from rtdetr_act.activations.protocol import GRID, Entry, Layout
from rtdetr_act.activations.registry import create, find_entry, get_entry, names, resolve
from rtdetr_act.deploy.fold import fold_activations
from rtdetr_act.errors import FoldError
from rtdetr_act.surgery.patcher import patch_model, unpatch_model
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.recomputation import SMALL_BYTES, Recomputation
from rtdetr_act.surgery.tracing import sample_curve

Reference: TypeAlias = Callable[[np.ndarray, Mapping[str, np.ndarray], int], Any]
HALF = (torch.float16, torch.bfloat16)
# By number of spatial dimensions: the sizes of the maps drawn, the layers of a network, and the memory format.
_SIZES: dict[int, tuple[int, ...]] = {1: (20,), 2: (5, 4), 3: (3, 4, 2)}
_LAYERS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class _Case:
    """An activation under test; parameters are perturbed, since initial values can hide errors."""

    spec: str
    entry: Entry
    layout: Layout
    channels: int
    reference: Reference | None
    dims: int = 2

    @property
    def place(self) -> str:
        """The layout as failures name it."""
        return self.layout if self.layout == "tokens" or self.dims == 2 else f"{self.dims}-d map"

    def build(self, dtype: torch.dtype = torch.float32, channels: int | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            module = create(self.spec, channels or self.channels, self.layout, self.dims)
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.rand_like(parameter))
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():  # a variance stays positive
                    buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else 0.0))
        return module.to(dtype).eval()

    def draw(self, dtype: torch.dtype = torch.float32, channels: int | None = None) -> Tensor:
        c = channels or self.channels
        shape = (2, c, *_SIZES[self.dims]) if self.layout == "map" else (2, 7, c)
        return (2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).to(dtype)

    def expect(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the expected output in float64, from the reference or else from a float64 copy of the module."""
        if self.reference is None:
            with torch.no_grad():
                expected: Tensor = copy.deepcopy(module).double()(x.double())
                return expected
        state = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}
        axis = 1 if self.layout == "map" else x.ndim - 1
        return torch.from_numpy(np.asarray(self.reference(x.detach().double().numpy(), state, axis)))


def check_activation(
    activation: str | type[nn.Module],
    reference: Reference | None = None,
    *,
    channels: int = 6,
    dims: Sequence[int] = (2,),
) -> None:
    """Check that a registered activation has all properties that the package relies on.

    It must match its formula in float64, have correct gradients, be accurate in half types and under autocast, and
    compile without graph breaks. It must keep memory format, dtype and shape, also for a single pixel. It must survive
    deepcopy, pickle, state dicts and checkpoints, and its plan must survive YAML. Swapping it in must not change the
    random state, and must be reversible. Its callbacks must be correct: the folded and the exportable form are
    equivalent, a fit reduces the error and returns the fitted curve, and if its backward reads the output, working in
    place does not change gradients.

    Args:
        activation: A name, with or without literal arguments, or a registered class.
        reference: An independent implementation of the formula. It maps x (a float64 array of any shape), the module's
            state dict (float64 arrays by name) and the channel dimension to the output. Default: None, which compares
            with the module in float64 and does not check the formula itself.
        channels: Number of channels of the inputs. Default: 6.
        dims: The numbers of spatial dimensions of the maps that it must accept. Default: (2,), which is (B, C, H, W);
            1 is (B, C, L) and 3 is (B, C, D, H, W).

    Raises:
        SpecError: The activation is unknown, or a number of dimensions is not 1, 2 or 3.
        AssertionError: A check failed; the message names the activation, the layout and the check.
    """
    resolved = resolve(activation if isinstance(activation, str) else _registered_name(activation))
    known = get_entry(resolved.name)
    maps = [_Case(str(resolved), known, "map", channels, reference, count) for count in dims]
    for case in [*maps, *([_Case(str(resolved), known, "tokens", channels, reference)] if known.tokens else [])]:
        for check in _CHECKS:
            with torch.random.fork_rng(devices=[]), _name_failures(case, check):
                torch.manual_seed(0)
                check(case)


def _registered_name(cls: type[nn.Module]) -> str:
    for name in names():
        if get_entry(name).factory is cls:
            return name
    raise AssertionError(f"{cls.__name__} is not registered: register('its_name', {cls.__name__})")


@contextmanager
def _name_failures(case: _Case, check: Callable[[_Case], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        what = (check.__doc__ or check.__name__).strip().rstrip(".")
        said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"{case.spec} ({case.place}): {what}: {said}") from error


# ---------------------------------------------------------------- computation


def _check_formula(case: _Case) -> None:
    """It is its formula in float64."""
    module, x = case.build(torch.float64), case.draw(torch.float64)
    torch.testing.assert_close(module(x), case.expect(module, x), rtol=1e-9, atol=1e-9)


def _check_gradients(case: _Case) -> None:
    """Its gradients are those of finite differences."""
    channels = 3 if case.channels > 3 else case.channels
    module = case.build(torch.float64, channels)
    x = case.draw(torch.float64, channels)
    x = (x[..., :6] if case.place == "1-d map" else x[..., :3, :]).contiguous()
    x = torch.where(x.abs() < 0.05, 0.3, x).requires_grad_()  # away from a kink at 0
    keys = [key for key, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(keys, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()))


def _check_half_types(case: _Case) -> None:
    """It is accurate in half types, up to about one rounding."""
    for dtype in HALF:
        module, x = case.build(dtype), case.draw(dtype)
        y, exact, step = module(x), case.expect(module, x), torch.finfo(dtype).eps
        assert y.dtype == dtype, f"{dtype} became {y.dtype}"
        torch.testing.assert_close(y.double(), exact, rtol=4 * step, atol=6 * step * max(1.0, float(exact.abs().max())))


def _check_autocast(case: _Case) -> None:
    """Under autocast it accepts float32 and bfloat16, and its parameters get float32 gradients."""
    module, x = case.build(), case.draw().requires_grad_()
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(given)
        exact = case.expect(module, given)
        error = float((y.detach().double() - exact).abs().max())
        assert error < 0.05 * max(1.0, float(exact.abs().max())), f"off by {error:.2g}"
        y.float().sum().backward()
    wrong = [name for name, p in module.named_parameters() if p.grad is None or p.grad.dtype != torch.float32]
    assert not wrong, f"no float32 gradient for {', '.join(wrong)}"


def _check_memory_format(case: _Case) -> None:
    """It keeps channels_last, except for torch's kernels, some of which return contiguous results."""
    if case.layout == "tokens":
        return
    module, x = case.build(), case.draw()
    if case.dims == 1:  # there is no such memory format, but (B, L, C) may be transposed
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(module(strided), module(x), rtol=1e-4, atol=1e-5)
        return
    y = module(x.to(memory_format=_CHANNELS_LAST[case.dims]))
    kept = y.is_contiguous(memory_format=_CHANNELS_LAST[case.dims])
    of_torch = type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Softmax2d)
    assert kept or of_torch, "the result is contiguous"
    torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)


def _check_small_inputs(case: _Case) -> None:
    """It accepts one image of one pixel, also in training mode, and an empty batch."""
    one = (1, case.channels, *(1,) * case.dims) if case.layout == "map" else (1, 1, case.channels)
    for training in (True, False):
        x = torch.randn(one, requires_grad=True)
        y = case.build().train(training)(x)
        y.sum().backward()
        assert y.shape == x.shape and x.grad is not None and bool(torch.isfinite(x.grad).all()), "one pixel"
    assert case.build()(case.draw()[:0]).shape == case.draw()[:0].shape, "no image"


def _check_compile(case: _Case) -> None:
    """It compiles without graph breaks, with the same output and gradients."""
    module, x = case.build(), case.draw()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    parameters = list(module.parameters())
    x.requires_grad_()
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *parameters])
    expected = torch.autograd.grad(module(x).square().sum(), [x, *parameters])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- copies and swaps


def _check_copies(case: _Case) -> None:
    """Copies, pickles and loaded state dicts are equivalent and share no parameters."""
    module, x = case.build(), case.draw()
    loaded = case.build()
    loaded.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is type(module), f"a {type(module).__name__} became a {type(twin).__name__}"
        torch.testing.assert_close(twin(x), module(x))
        own = {p.data_ptr() for p in twin.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in module.parameters()), "a copy shares parameters"


def _check_parameters(case: _Case) -> None:
    """Scalar and per-channel parameters have one dimension, by which they are assigned to optimizer groups."""
    module = case.build()
    inner = {f"{name}." for name, child in module.named_modules() if name and isinstance(child, _WEIGHT_LAYERS)}
    wrong = [n for n, p in module.named_parameters() if p.ndim != 1 and not n.startswith(tuple(inner))]
    assert not wrong, f"{', '.join(wrong)} has another number of dimensions"


_WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


def _check_swap(case: _Case) -> None:
    """It can be swapped in without changing the random state, kept in a checkpoint and in YAML, and removed again."""
    net = _build_network(case)
    before, state = copy.deepcopy(net), torch.get_rng_state()
    plan = Plan.parse(case.spec, scope="all")
    for stored in (plan.to_yaml(), plan.to_model_yaml()):
        assert Plan.from_yaml(stored) == plan, "its plan does not survive YAML"
    assert len(patch_model(net, plan, example_input=_draw_input(case))) == 1, "it was not swapped in"
    assert torch.equal(torch.get_rng_state(), state), "the random state moved"
    content = io.BytesIO()
    torch.save(net, content)
    content.seek(0)
    loaded = torch.load(content, weights_only=False)
    torch.testing.assert_close(loaded.eval()(_draw_input(case)), net.eval()(_draw_input(case)))
    for patched in (net, loaded):
        assert unpatch_model(patched) == 1, "it was not taken out"
        torch.testing.assert_close(patched.eval()(_draw_input(case)), before.eval()(_draw_input(case)))


def _build_network(case: _Case) -> nn.Sequential:
    c = case.channels
    if case.layout == "tokens":
        return nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 2))
    conv, norm = _LAYERS[case.dims]
    return nn.Sequential(conv(c, c, 1), norm(c), nn.SiLU(), conv(c, 2, 1))


def _draw_input(case: _Case) -> Tensor:
    return case.draw()


# ---------------------------------------------------------------- callbacks of the entry


def _check_fold(case: _Case) -> None:
    """Its folded form is equivalent, also in a network."""
    if case.entry.fold is None:
        return
    module, x = case.build(torch.float64), case.draw(torch.float64)
    folded = case.entry.fold(module)
    if folded is None:
        return
    found = folded.scale * create(folded.activation, case.channels, case.layout).double().eval()(x)
    torch.testing.assert_close(found, module(x), rtol=1e-9, atol=1e-9)
    assert folded.scale > 0 and (folded.scale == 1 or get_entry(folded.activation.name).homogeneous), (
        "its factor cannot be folded into weights"
    )
    net = _build_network(case).double().eval()
    patch_model(net, Plan.parse(case.spec, scope="all"), example_input=_draw_input(case).double())
    expected = net(x)
    try:
        report = fold_activations(net, x)
    except FoldError as error:
        raise AssertionError(str(error)) from error
    assert len(report) == 1, f"kept in a network: {dict(report.kept)}"
    torch.testing.assert_close(net(x), expected, rtol=1e-8, atol=1e-8)


def _check_homogeneous(case: _Case) -> None:
    """It is homogeneous if its entry says so."""
    if case.entry.homogeneous:
        module, x = case.build(torch.float64), case.draw(torch.float64)
        torch.testing.assert_close(module(3.7 * x), 3.7 * module(x), rtol=1e-9, atol=1e-9)


def _check_exportable(case: _Case) -> None:
    """Its exportable form is equivalent, and accepted by torch.export."""
    module, x = case.build(), case.draw()
    written = case.entry.exportable(module).eval() if case.entry.exportable else module
    torch.testing.assert_close(written(x), module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(written, (x,)).module()(x), module(x), rtol=1e-4, atol=1e-5)


def _check_fit(case: _Case) -> None:
    """A fit returns the curve of the fitted module, which is at least as close to the target as the initial one."""
    if case.entry.fit is None:
        return
    for old in (nn.SiLU(), nn.ReLU()):
        module = create(case.spec, case.channels, case.layout, case.dims)
        target = sample_curve(old, GRID.float(), case.channels, case.layout).double()
        start = relative_error(sample_curve(module, GRID.float(), case.channels, case.layout).double(), target)
        curve = case.entry.fit(module, target)
        if case.entry.held_at is None:  # otherwise the curve depends on the other positions of the input
            found = sample_curve(module, GRID.float(), case.channels, case.layout).double()
            torch.testing.assert_close(found, curve, rtol=1e-4, atol=1e-4)
        error = relative_error(curve, target)
        assert error <= start + 1e-6, f"{error:.3f} off {type(old).__name__}, {start:.3f} before"


def _check_inplace(case: _Case) -> None:
    """If its backward reads the output, working in place does not change gradients."""
    answer = case.entry.backward_reads_result
    module = case.build(torch.float64)
    if answer is None or not answer(module) or not hasattr(module, "inplace"):
        return
    gradients = []
    for inplace in (False, True):
        module.inplace = inplace  # type: ignore[assignment]
        x = case.draw(torch.float64).requires_grad_()
        norm = _LAYERS[x.ndim - 2][1](x.shape[1]).double()
        y = module(norm(x))
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    for plain, over in zip(*gradients, strict=True):
        torch.testing.assert_close(over, plain, rtol=1e-9, atol=1e-9)


def _check_low_memory(case: _Case) -> None:
    """Computing it again for the backward does not change gradients."""
    gradients = []
    for low in (False, True):
        module = case.build(torch.float64)
        # Many positions, since what is small is kept.
        dims = case.dims if case.layout == "map" else 1
        positions = (SMALL_BYTES // (8 * case.channels), *(1,) * (dims - 1))
        x = torch.randn(2, case.channels, *positions, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        leaf = x.requires_grad_()
        norm = _LAYERS[dims][1](case.channels).double()
        with Recomputation() if low else nullcontext():
            maps = norm(leaf)
            y = module(maps if case.layout == "map" else maps.transpose(1, 2)).square()
        gradients.append(torch.autograd.grad(y.sum(), [leaf, *norm.parameters(), *module.parameters()]))
    for kept, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(computed, kept, rtol=1e-7, atol=1e-7 * max(1.0, float(kept.abs().max())))


def _check_recorded(case: _Case) -> None:
    """Its recorded numbers are scalars, its coefficients are per image, and `held_at(x)` returns the output for x."""
    module, x = case.build(), case.draw()
    if case.entry.learned:
        for name, value in case.entry.learned(module).items():
            assert isinstance(name, str) and value.numel() == 1, f"{name} is not one number"
    if case.entry.coefficients:
        for name, value in case.entry.coefficients(module, x).items():
            assert len(value) == len(x), f"{name} is not a value per image"
    if case.entry.held_at:
        torch.testing.assert_close(case.entry.held_at(module, x)(x), module(x), rtol=1e-5, atol=1e-6)


def _check_entry(case: _Case) -> None:
    """Its entry can be found by the class of its module."""
    found = find_entry(case.build())
    assert found is not None, f"no entry for {type(case.build()).__name__}: name it under classes="


_CHECKS: tuple[Callable[[_Case], None], ...] = (
    _check_entry,
    _check_formula,
    _check_gradients,
    _check_half_types,
    _check_autocast,
    _check_memory_format,
    _check_small_inputs,
    _check_compile,
    _check_copies,
    _check_parameters,
    _check_swap,
    _check_fold,
    _check_homogeneous,
    _check_exportable,
    _check_fit,
    _check_inplace,
    _check_low_memory,
    _check_recorded,
)
