"""The registry entry of an activation: how to build, describe, fit, fold, export and record it.

Each file in this folder ends with `ENTRIES`: for each activation its name, a class or function that builds it, its
documentation, and optional callbacks for the rest of the package. Every optional member has a default, so any
`torch.nn.Module` can be registered by name alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from rtdetr_act.activations.edge_targets import Native
from rtdetr_act.spec import ActSpec

Layout = Literal["map", "tokens"]
SiteLayout = Literal["map", "tokens", "pooled"]
Replaces = Literal["activation", "convolution"]
LAYOUTS: tuple[Layout, ...] = ("map", "tokens")
SITE_PARAMETERS = ("channels", "layout", "dims")  # parameters of a factory that the site of an activation fills
# Activations are fitted on this grid. They are smooth except for a few kinks, so a grid is enough, and BatchNorm makes
# their inputs about standard normal, so that values beyond six standard deviations do not matter.
GRID = torch.linspace(-6, 6, 1201).double()

POOLS_OVER_POSITIONS = (
    "it pools over positions, and pooling over decoder queries would mix the denoising ones, which hold ground truth, "
    "with the others"
)
POOLS_A_POOLED_MAP = "it computes its coefficients from the pooled input, which a single position already is"


@dataclass(frozen=True)
class Folded:
    """The equivalent of an activation in evaluation mode: `scale` times an activation of torch.

    Attributes:
        activation: The activation of torch, which must be homogeneous if `scale` is not 1.
        scale: A positive factor, 1.0 by default.
    """

    activation: ActSpec
    scale: float = 1.0


@dataclass(frozen=True)
class Entry:
    """The registry entry of one activation; the callbacks take a module that the entry built.

    Attributes:
        name: The name that users type.
        factory: A module class, or a callable that returns a module. `channels` (C at the site), `layout` and `dims`
            (its number of spatial dimensions) are passed to parameters of these names only.
        formula: The formula in one line of text.
        paper: Reference: the paper or documentation.
        note: Why it is not recommended as a drop-in for training a detector, if it is not.
        aliases: Other names. Lookups ignore case, spaces, `_`, `-` and a leading `nn.`, `torch.nn.` or `F.`.
        replaces: "activation" (default) or "convolution". The factory of a convolution is called with the
            `torch.nn.Conv2d` that it replaces.
        tokens: Whether it accepts (B, N, C) tokens, True by default; False if it accepts (B, C, ...) maps only.
        maps_only_because: The reason for `tokens=False`.
        not_pooled_because: Why it makes no sense on maps pooled to a single position, (B, C, 1, 1), such as those in
            squeeze-and-excitation; "" (default) if it does.
        classes: Module classes, or their qualified names, that this entry describes; the factory by default, if that is
            a class.
        fit: Sets the parameters of a module so that it is closest to a target curve, the target's values on `GRID`, and
            returns the fitted curve, both (1201,) in float64. None (default): it has no parameters to fit.
        fold: Returns the equivalent of a module in evaluation mode, or None if torch has none.
        homogeneous: Whether f(k x) = k f(x) for every k > 0, False by default.
        exportable: Returns an equivalent module made of operators that every exporter supports. None (default): the
            module can be exported as it is.
        learned: Returns the numbers to record during training, scalar tensors by name. None (default): the mean of
            every scalar and per-channel parameter, and the norm of all others.
        coefficients: Returns what a module computes from an input x, (B, C, ...): tensors (B, C, ...) by name. None
            (default): nothing.
        held_at: Returns the elementwise function that a module applies to an input x, with everything computed from
            several elements of x (coefficients, neighbourhoods) held constant. None (default): it is elementwise.
        backward_reads_result: Returns whether the backward of a module reads its output and not its input, so that it
            can work in place after a layer whose backward does not read its own output. None (default): one of torch
            works in place if the activation that it replaces does, another as it was built.
        targets: Edge targets that run it natively, by name.
        folds_to: Name of the activation that it always folds to, the one that targets run.
        use_when: When to choose it, in a sentence or two for the documentation; "" (default) says nothing.
        title: The name as its paper spells it, such as "DY-ReLU-B", which figures show. Default: the name of its class
            if the factory is one, which is right for SiLU and GELU, else `name`.
        start: What its initial parameters make it, in a few words such as "silu exactly". "" (default): found out from
            its curve at construction, which tells nothing where that is random or depends on the whole input.
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
    not_pooled_because: str = ""
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
    use_when: str = ""
    title: str = ""
    start: str = ""

    def __post_init__(self) -> None:
        if not self.title:
            title = self.factory.__name__ if isinstance(self.factory, type) else self.name
            object.__setattr__(self, "title", title)

    @cached_property  # a model has hundreds of sites, and each would read the signature several times
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the factory by name; empty if its signature is unknown."""
        try:
            found = dict(inspect.signature(self.factory).parameters)
        except (TypeError, ValueError):  # a builtin without a signature
            return {}
        # torch.nn.Module.__init__(*args, **kwargs), which Sigmoid inherits, accepts no argument.
        own = getattr(self.factory, "__init__", None) is not nn.Module.__init__
        return found if own or not isinstance(self.factory, type) else {}

    @property
    def needs_channels(self) -> bool:
        """Whether building it requires the number of channels: its factory has no default for `channels`."""
        channels = self.parameters.get("channels")
        return channels is not None and channels.default is inspect.Parameter.empty


class Answers(TypedDict, total=False):
    """The keyword arguments of `register`, with the meaning of the attributes of `Entry`."""

    formula: str
    paper: str
    note: str
    aliases: tuple[str, ...]
    tokens: bool
    maps_only_because: str
    not_pooled_because: str
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
    use_when: str
    title: str
    start: str
