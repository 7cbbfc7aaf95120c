"""Feature maps of one image before and after the activations of a network, and what can be counted in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.errors import SelectionError
from rtdetr_act.results import Result
from rtdetr_act.surgery.functional_calls import find_unreachable_calls
from rtdetr_act.surgery.modules import evaluation_mode, unwrap
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.sites import Site, find_sites, observe_activations

DEFAULT_SITES = 3


@dataclass(frozen=True, repr=False)
class ValueSummary(Result):
    """What the values of a feature map are, over all channels and positions.

    Attributes:
        mean: Mean.
        std: Standard deviation, that of the population.
        minimum: Smallest value.
        maximum: Largest value.
        zeros: Share of values that are exactly 0.
        negative: Share of values below 0.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    zeros: float
    negative: float

    def _summarise(self) -> str:
        """Return mean, standard deviation and the share of zeros."""
        return f"{self.mean:.3g} ± {self.std:.3g}, {self.zeros:.1%} zeros"


@dataclass(frozen=True)
class Capture:
    """What went into an activation and came out of it, for one image.

    Attributes:
        site: The site.
        before: Input of its first call, of shape (C, H, W), on the CPU.
        after: Output of that call, of the same shape.
        calls: How often it was called.
    """

    site: Site
    before: Tensor
    after: Tensor
    calls: int

    @property
    def dead(self) -> float:
        """Share of channels whose output is 0 at every position of this image."""
        return float((self.after == 0).flatten(1).all(1).double().mean())

    def choose_channels(self, count: int) -> tuple[int, ...]:
        """Return the channels whose output differs most between positions, by its standard deviation, largest first.

        Args:
            count: How many; fewer where the map has fewer.
        """
        spread = self.after.flatten(1).double().std(1, correction=0)
        # Stable, so that equal ones, such as channels that are all zero, are in the order of the map.
        order = spread.nan_to_num(-1.0).sort(descending=True, stable=True).indices
        return tuple(order[:count].tolist())


def summarise_values(values: Tensor) -> ValueSummary:
    """Return mean, standard deviation, range and shares of the values of a tensor that has some.

    >>> summarise_values(torch.tensor([-1.0, 0.0, 0.0, 3.0]))
    <ValueSummary: 0.5 ± 1.5, 50.0% zeros>
    """
    exact = values.double()  # float32 has too few digits for the sum of a million values
    shares = [float(found.double().mean()) for found in (values == 0, values < 0)]
    return ValueSummary(
        float(exact.mean()), float(exact.std(correction=0)), float(exact.min()), float(exact.max()), *shares
    )


def capture_activations(model: nn.Module, image: Tensor, sites: Iterable[Site]) -> dict[str, Capture]:
    """Run an image through a model in evaluation mode, and return what activations got and gave.

    Both are copied at once: an activation in place overwrites what it got, and a network may overwrite what it gave.
    The model is left as it was.

    Args:
        model: The model that the sites are of.
        image: Batch of one image, (1, C, H, W), that the model takes.
        sites: Sites to look at, hidden calls included.

    Returns:
        The captures by the name of the site, in the order of the first call. A site is missing if it was not called, or
        with something else than a feature map (1, C, H, W).

    >>> net = nn.Sequential(nn.ReLU(inplace=True))
    >>> capture = capture_activations(net, torch.tensor([[[[-1.0, 2.0]]]]), find_sites(net))["0"]
    >>> capture.before.tolist(), capture.after.tolist()
    ([[[-1.0, 2.0]]], [[[0.0, 2.0]]])
    """
    captures: dict[str, Capture] = {}

    def observe(site: Site) -> Callable[..., Tensor]:
        def call(activation: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first = captures.get(site.name)
            before = _copy(x) if first is None and _is_map(x) else None
            y: Tensor = activation(x, *args, **kwargs)
            if before is not None:
                captures[site.name] = Capture(site, before, _copy(y), 1)
            elif first is not None:
                captures[site.name] = replace(first, calls=first.calls + 1)
            return y

        return call

    _run_observed(model, image, sites, observe)
    return captures


def list_called_sites(model: nn.Module, image: Tensor, sites: Iterable[Site]) -> list[Site]:
    """Return those of some sites that are called with a feature map, in the order of their first call.

    Args:
        model: As in `capture_activations`.
        image: As in `capture_activations`.
        sites: The sites.
    """
    called: dict[str, Site] = {}

    def observe(site: Site) -> Callable[..., Tensor]:
        def call(activation: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if _is_map(x):
                called.setdefault(site.name, site)
            y: Tensor = activation(x, *args, **kwargs)
            return y

        return call

    _run_observed(model, image, sites, observe)
    return list(called.values())


def _is_map(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[0] == 1


def _copy(batch: Tensor) -> Tensor:
    """Return a copy, on the CPU, of the only image of a batch."""
    return batch[0].detach().to("cpu", torch.float32, copy=True)


def _run_observed(
    model: nn.Module, image: Tensor, sites: Iterable[Site], observe: Callable[[Site], Callable[..., Tensor]]
) -> None:
    """Run an image through a model in evaluation mode while the activations of some sites are observed."""
    with observe_activations(sites, observe), evaluation_mode(model), torch.no_grad():
        model(image)


def choose_sites(
    model: nn.Module,
    image: Tensor,
    *,
    layers: str | int | Iterable[int] | None = None,
    include: str | Iterable[str] | None = None,
    preferred: Collection[str] = (),
) -> tuple[list[Site], list[str]]:
    """Choose activation sites on feature maps, in the order in which an image passes them.

    Args:
        model: Ultralytics task model; with `include`, any module.
        image: As in `capture_activations`.
        layers: Layers as a plan selects them: indices, or text such as "0-9" and "backbone+12". The last activation of
            each is taken. Default: None, three layers at equal distances in the backbone.
        include: Glob pattern(s) on site names. All sites that match are taken, with `layers` those of the layers.
            Default: None.
        preferred: Names of sites that are taken by default, as far as there are such in the backbone. Default: empty.

    Returns:
        The sites, and the names of activations that belong to the choice and cannot be seen: sites that are not called,
        if patterns name them, and functional calls in these layers that cannot be intercepted.

    Raises:
        SelectionError: There is no such site, or none of them is called.
        SpecError: `layers` is invalid.
    """
    # A rule selects sites by layers, sections and patterns; which activation it names has no part in it.
    (rule,) = Plan.parse("relu", layers=layers, include=include).rules
    root = unwrap(model)
    selected = [site for site in find_sites(root) if rule.selects(site)]
    called = list_called_sites(root, image, selected)
    if include is not None:
        chosen = called
    elif layers is not None:
        chosen = _take_last_of_layers(called)
    else:
        chosen = _space_evenly(_take_last_of_layers(called), preferred)
    if not chosen:
        given = [f"{key}={value}" for key, value in (("layers", layers), ("include", include)) if value is not None]
        where = f" at {' '.join(given)}" if given else ""
        raise SelectionError(f"no activation{where} is called with a feature map: `rtdetr-act sites` lists the sites")
    names = {site.name for site in called}
    idle = [site.name for site in selected if site.name not in names] if include is not None else []
    return chosen, [*idle, *_find_unreachable(root, chosen)]


def _take_last_of_layers(called: Sequence[Site]) -> list[Site]:
    """Return the last site of each layer, in the order of the layers' first calls."""
    last = {site.layer: site for site in called}
    last.pop(None, None)
    return list(last.values())


def _space_evenly(sites: Sequence[Site], preferred: Collection[str]) -> list[Site]:
    """Return three sites at equal distances, those of the backbone, and preferred ones, if there are such."""
    candidates = [site for site in sites if site.section == "backbone"] or sites
    candidates = [site for site in candidates if site.name in preferred] or candidates
    places = {(number + 1) * len(candidates) // (DEFAULT_SITES + 1) for number in range(DEFAULT_SITES)}
    return [candidates[place] for place in sorted(places) if place < len(candidates)]


def _find_unreachable(root: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Return descriptions of functional calls that cannot be intercepted, in the layers of some sites."""
    layers = {site.name.split(".")[1] for site in sites if site.layer is not None}
    found = (call for layer in sorted(layers, key=int) for call in find_unreachable_calls(_get_layer(root, layer)))
    return list(dict.fromkeys(found))


def _get_layer(root: nn.Module, layer: str) -> nn.Module:
    return root.get_submodule(f"model.{layer}")
