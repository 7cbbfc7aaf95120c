"""What an activation tells the rest of the package about itself.

Each file in this folder ends with `ENTRIES`: for each name a class or a function that builds it, what a reader should
know of it, and its answers to the questions that the other rooms ask. All answers have a default, so that any
`torch.nn.Module` can be registered by its name alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from rtdetr_act.activations.edge_targets import Native
from rtdetr_act.spec import ActSpec

Layout = Literal["map", "tokens"]
Replaces = Literal["activation", "convolution"]
LAYOUTS: tuple[Layout, ...] = ("map", "tokens")
# The fits work on this grid. Every activation is smooth but for a few kinks, so that a grid is enough, and under a
# normal input, as BatchNorm makes it, nothing counts beyond six standard deviations.
GRID = torch.linspace(-6, 6, 1201).double()

POOLS_OVER_POSITIONS = (
    "it pools over positions, and pooling over decoder queries would mix the denoising ones, which hold ground truth, "
    "with the others"
)


@dataclass(frozen=True)
class Folded:
    """What an activation is in evaluation: `scale` times an activation of torch.

    Attributes:
        activation: The activation of torch, homogeneous where `scale` is not 1.
        scale: A positive factor.
    """

    activation: ActSpec
    scale: float = 1.0


@dataclass(frozen=True)
class Entry:
    """One activation of the zoo.

    Attributes:
        name: What a user types.
        factory: A module class, or a callable that returns a module. `channels` (C at the site) and `layout` are passed
            to parameters of these names, and to no others.
        formula: One readable line.
        paper: Paper or documentation.
        note: Why it is not meant as a drop-in for training a detector, where that is so.
        aliases: Other names; case, `_`, `-` and a leading `nn.` or `torch.nn.` never matter.
        replaces: What it takes the place of. The factory for a "convolution" is called with the `torch.nn.Conv2d`.
        tokens: Whether it can stand on (B, N, C) tokens; False: on (B, C, H, W) maps only.
        maps_only_because: The reason for `tokens=False`.
        classes: Classes of the modules that the answers are about, or their qualified names; the factory where it is a
            class.
        fit: Sets the parameters of a module to those with which it is closest to a curve, its values on `GRID`, and
            returns the curve that it then gives, both (1201,) in float64. None: it has nothing to fit.
        fold: Returns what a module equals in evaluation, or None where that is only itself.
        homogeneous: Whether f(k x) = k f(x) for k > 0: a factor on its input is one on its output.
        exportable: Returns a module that computes the same in operators that every exporter knows. None: the module
            itself.
        learned: Returns the numbers of a module that are worth recording, scalars by name. None: each scalar and
            per-channel parameter as its mean, and the norm of all others.
        coefficients: Returns what a module generates from an input x, (B, C, H, W), tensors of shape (B, C, ...) by
            name. None: nothing.
        held_at: Returns the elementwise function that a module is at an input x, with all that it computes from
            several elements of x (coefficients, neighbours) held constant. None: it is elementwise itself.
        backward_reads_result: Says whether the backward of a module reads its result and not its input, so that it may
            write the result over the input behind a layer that does not read its own output again. None: it works in
            place only where the activation that it replaces does.
        targets: What edge targets say of it, by their names.
        folds_to: The activation that it always is once folded, which is what targets then see.
    """

    name: str
    factory: Callable[..., nn.Module]
    formula: str = ""
    paper: str = ""
    note: str = ""
    aliases: tuple[str, ...] = ()
    replaces: Replaces = "activation"
    tokens: bool = True
    maps_only_because: str = ""
    classes: tuple[type | str, ...] = ()
    fit: Callable[[Any, Tensor], Tensor] | None = None
    fold: Callable[[Any], Folded | None] | None = None
    homogeneous: bool = False
    exportable: Callable[[Any], nn.Module] | None = None
    learned: Callable[[Any], Mapping[str, Tensor]] | None = None
    coefficients: Callable[[Any, Tensor], Mapping[str, Tensor]] | None = None
    held_at: Callable[[Any, Tensor], Callable[[Tensor], Tensor]] | None = None
    backward_reads_result: Callable[[Any], bool] | None = None
    targets: Mapping[str, Native] = field(default_factory=dict)
    folds_to: str = ""

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the factory by name, none where Python cannot tell."""
        try:
            found = dict(inspect.signature(self.factory).parameters)
        except (TypeError, ValueError):  # a builtin without a signature
            return {}
        # torch.nn.Module's own __init__(*args, **kwargs), as of Sigmoid, refuses whatever it is given.
        own = getattr(self.factory, "__init__", None) is not nn.Module.__init__
        return found if own or not isinstance(self.factory, type) else {}

    @property
    def needs_channels(self) -> bool:
        """Whether it cannot be built without the number of channels: its factory has no default for `channels`."""
        channels = self.parameters.get("channels")
        return channels is not None and channels.default is inspect.Parameter.empty


class Answers(TypedDict, total=False):
    """What `register` takes beside a name and a factory; the meanings are those of `Entry`."""

    formula: str
    paper: str
    note: str
    aliases: tuple[str, ...]
    tokens: bool
    maps_only_because: str
    classes: tuple[type | str, ...]
    fit: Callable[[Any, Tensor], Tensor]
    fold: Callable[[Any], Folded | None]
    homogeneous: bool
    exportable: Callable[[Any], nn.Module]
    learned: Callable[[Any], Mapping[str, Tensor]]
    coefficients: Callable[[Any, Tensor], Mapping[str, Tensor]]
    held_at: Callable[[Any, Tensor], Callable[[Tensor], Tensor]]
    backward_reads_result: Callable[[Any], bool]
    targets: Mapping[str, Native]
    folds_to: str
