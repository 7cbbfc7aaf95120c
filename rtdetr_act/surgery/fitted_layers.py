"""The layers whose weights `refit` fits, and what it collects for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rtdetr_act.surgery.least_squares import (
    Linear,
    NormalEquations,
    collect_inputs,
    collect_outputs,
    count_inputs,
    count_positions,
    sample_positions,
)
from rtdetr_act.surgery.modules import find_frozen
from rtdetr_act.surgery.rescale import Rescaling
from rtdetr_act.surgery.sites import iterate_placed_activations

# Positions, over all images, that a layer is fitted to: eight for each of its unknowns, within these bounds.
_SAMPLES_PER_INPUT = 8
_MIN_SAMPLES, _MAX_SAMPLES = 2048, 16_384
_UNCHANGED = 1e-5  # relative difference below which a layer's output is what it was before the swap

Hook = tuple[nn.Module, Callable[..., Any]]


@dataclass
class FittedLayer:
    """A layer that may be fitted.

    Attributes:
        name: Its qualified name, in both networks.
        module: The layer of the patched network.
        norm: The BatchNorm that directly follows it in the patched network, None if none does.
        factor: Factor on its output in the patched network, relative to the original one.
        mean: Running mean of the BatchNorm before the fit, None without one.
        equations: What was collected for its fit; None before the first samples, and after the fit.
        changed: Whether its output differs from what it was; None before the first chunk.
    """

    name: str
    module: Linear
    norm: nn.Module | None
    factor: float
    mean: Tensor | None = None
    equations: NormalEquations | None = None
    changed: bool | None = None

    def add(self, x: Tensor, target: Tensor, images: int) -> None:
        """Add a chunk to the equations.

        Args:
            x: The input in the patched network.
            target: The output that it should have.
            images: Number of images in all chunks.
        """
        if self.changed is None:
            # A layer before all swaps, or one behind a fitted layer alone.
            difference = (type(self.module).forward(self.module, x) - target).norm()  # type: ignore[arg-type]
            self.changed = bool(difference > _UNCHANGED * target.norm())
        if not self.changed:
            return
        positions = self.sample_positions(target, images)
        self.add_samples(collect_inputs(self.module, x, positions), collect_outputs(self.module, target, positions))

    def add_samples(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add samples, as `collect_inputs` and `collect_outputs` return them, to the equations."""
        if self.equations is None:
            centred = self.mean is not None or self.module.bias is not None
            self.equations = NormalEquations(self.module, centred=centred)
        self.equations.add(inputs, outputs)

    def sample_positions(self, output: Tensor, images: int) -> Tensor:
        """Return the indices of the positions of its output that are used of each image.

        Args:
            output: An output.
            images: Number of images in all.
        """
        samples = min(max(_SAMPLES_PER_INPUT * count_inputs(self.module), _MIN_SAMPLES), _MAX_SAMPLES)
        return sample_positions(count_positions(self.module, output), -(-samples // images))

    def fit(self, ridge: float) -> bool:
        """Set the weight to the solution, with a penalty on its change; return whether there is one."""
        solution = self.equations.solve(ridge) if self.equations else None
        self.equations = None
        if not solution:
            return False
        weight, constant = solution
        self.module.weight.copy_(weight)
        if self.module.bias is not None:
            self.module.bias.copy_(constant)
        elif self.norm is not None and self.mean is not None:
            self.norm.running_mean.copy_(self.mean - constant.to(self.mean))  # type: ignore[operator]
        return True


def find_fitted_layers(root: nn.Module, original: nn.Module, images: Tensor, rescaling: Rescaling) -> list[FittedLayer]:
    """Return the layers that may be fitted: those that run exactly once in the original network."""
    placed = {id(part) for _, module in iterate_placed_activations(root) for part in module.parameters()}
    theirs = dict(original.named_modules())
    found = {
        f"{path}.{name}" if path else name: child
        for path, owner in root.named_modules()
        if type(owner).__name__ != "DFL"  # whose weights are the constants 0, 1, 2, …
        for name, child in owner.named_children()
        if type(child) in (nn.Conv2d, nn.Linear)
        and id(child.weight) not in placed  # a subclass computes something else
    }
    found = {name: child for name, child in found.items() if type(theirs.get(name)) is type(child)}
    calls, norms = _trace_calls(original, {name: theirs[name] for name in found}, images)
    ours = dict(root.named_modules())
    frozen = find_frozen(layer.weight for layer in found.values())
    uses = Counter(id(layer.weight) for layer in found.values())
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    fitted = []
    for name, layer in found.items():
        if calls[name] == 1 and uses[id(layer.weight)] == 1 and id(layer.weight) not in frozen:
            norm = ours[norms[name]] if name in norms else None
            mean = norm.running_mean.clone() if norm is not None else None
            factor = rescaling.output_factor(names[id(layer.weight)])
            fitted.append(FittedLayer(name, layer, norm, factor, mean))
    return fitted


def _trace_calls(
    original: nn.Module, layers: dict[str, nn.Module], images: Tensor
) -> tuple[Counter[str], dict[str, str]]:
    """Run a network, and return how often each layer runs and the BatchNorm that reads nothing but its output."""
    calls: Counter[str] = Counter()
    readers: dict[str, list[str]] = {}
    last: tuple[str, Tensor | None] = ("", None)

    def record_output(name: str, output: Tensor) -> None:
        nonlocal last
        calls[name] += 1
        last = (name, output)

    def record_norm(name: str, x: Tensor) -> None:
        readers.setdefault(name, []).append(last[0] if x is last[1] else "")

    norms = {
        name: module
        for name, module in original.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    after: list[Hook] = [(layer, lambda _, __, y, name=name: record_output(name, y)) for name, layer in layers.items()]
    pre: list[Hook] = [
        (norm, lambda _, inputs, name=name: record_norm(name, inputs[0])) for name, norm in norms.items()
    ]
    with forward_hooks(pre, after):
        original(images[:1])
    return calls, {layers[0]: norm for norm, layers in readers.items() if len(layers) == 1}


@contextmanager
def forward_hooks(pre: Sequence[Hook] = (), after: Sequence[Hook] = ()) -> Iterator[None]:
    """Register forward pre-hooks and forward hooks inside the block."""
    handles = [module.register_forward_pre_hook(call) for module, call in pre]
    handles += [module.register_forward_hook(call) for module, call in after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
