"""Compare what an image becomes before and after the activations of trained models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rtdetr_act.analysis.feature_map_figure import describe_activation, draw_feature_maps
from rtdetr_act.analysis.feature_maps import Capture, ValueSummary, capture_activations, choose_sites, summarise_values
from rtdetr_act.analysis.figures import DPI, check_dpi, check_figure_path, write_figure
from rtdetr_act.errors import InputError, quote
from rtdetr_act.formatting import format_count, join_words
from rtdetr_act.integrations.ultralytics.arguments import check_positive_integers, move_to
from rtdetr_act.integrations.ultralytics.images import load_image, training_imgsz
from rtdetr_act.integrations.ultralytics.models import load_checkpoint
from rtdetr_act.integrations.ultralytics.run_folders import name_checkpoints
from rtdetr_act.results import Result, Table, TableResult
from rtdetr_act.spec import as_list
from rtdetr_act.surgery.sites import find_sites


@dataclass(frozen=True, repr=False)
class SiteMaps(Result):
    """What one activation of one model does to the feature map of an image.

    Attributes:
        model: Name of the model.
        site: Qualified name of the site.
        layer: Index of the Ultralytics layer.
        activation: The activation as papers name it, such as "DY-ReLU-B".
        channels: Channels of the map.
        height: Height of the map.
        width: Width of the map.
        calls: How often the activation is called; the rest is of its first call.
        dead: Share of channels whose output is 0 at every position of this image.
        drawn: The channels in the figure: those whose output varies most over the image.
        before: The values that the activation gets.
        after: The values that it returns.
    """

    model: str
    site: str
    layer: int | None
    activation: str
    channels: int
    height: int
    width: int
    calls: int
    dead: float
    drawn: tuple[int, ...]
    before: ValueSummary
    after: ValueSummary

    def _summarise(self) -> str:
        """Return model, site and the share of zeros."""
        return f"{self.model}, {self.site}, {self.activation}, {self.after.zeros:.1%} zeros"


@dataclass(frozen=True, repr=False)
class FeatureMaps(TableResult):
    """Feature maps of one image in several models, in numbers.

    Attributes:
        image: The image file.
        height: Height of what the models got, in pixels.
        width: Its width.
        sites: Measurements, site by site and within a site by model.
        left_out: Chosen activations that could not be seen: sites that the image does not pass, with the name of the
            model in front, and functional calls that cannot be intercepted.
    """

    image: str
    height: int
    width: int
    sites: tuple[SiteMaps, ...]
    left_out: tuple[str, ...] = ()

    def _summarise(self) -> str:
        """Return the numbers of sites and models."""
        sites, models = ({getattr(each, key) for each in self.sites} for key in ("site", "model"))
        return f"{format_count(len(sites), 'site')} of {format_count(len(models), 'model')}"

    def _make_table(self) -> Table:
        """Return a row per site and model; the channels drawn are separated by spaces."""
        single = [each.name for each in fields(SiteMaps) if each.name not in ("before", "after")]
        values = [each.name for each in fields(ValueSummary)]
        columns = [*single, *(f"{name}_{side}" for side in ("before", "after") for name in values)]
        return columns, (
            (
                *(" ".join(map(str, each.drawn)) if name == "drawn" else getattr(each, name) for name in single),
                *astuple(each.before),
                *astuple(each.after),
            )
            for each in self.sites
        )


def compare_feature_maps(
    sources: str | Path | Sequence[str | Path],
    image: str | Path,
    output: str | Path,
    *,
    layers: str | int | Iterable[int] | None = None,
    include: str | Iterable[str] | None = None,
    channels: int = 8,
    imgsz: int | None = None,
    device: str = "cpu",
    dpi: int = DPI,
    show: Callable[[FeatureMaps], object] | None = None,
) -> tuple[FeatureMaps, Path]:
    """Draw feature maps of an image before and after the activations of trained models, and measure them.

    The models run in evaluation mode, with their averaged weights, and BatchNorm is not fused. The sites are those of
    the first model; the others need sites of the same names, as models of one architecture have. Each model shows its
    own channels, those whose output varies most over the image: channels of models that were trained apart do not
    correspond. What is measured is of all channels.

    Args:
        sources: One or several .pt checkpoints.
        image: An image file. The models get it as Ultralytics' prediction prepares it for the first of them.
        output: PNG, SVG or PDF file to write.
        layers: Layers as a plan selects them: indices, or text such as "2,4", "0-9" and "backbone+12". The last
            activation of each is taken. Default: None, three layers at equal distances in the backbone.
        include: Glob pattern(s) on site names. All sites that match are taken, with `layers` those of the layers.
            Default: None.
        channels: Maps of each model at each site. Default: 8.
        imgsz: Side of the image, in pixels. Default: None, the size that the first model was trained with.
        device: "cpu", "cuda" or "cuda:1".
        dpi: Dots per inch of a PNG file. Default: 150.
        show: Called with the measurements before they are drawn.

    Returns:
        The measurements, and the path of the figure.

    Raises:
        InputError: A file does not exist or cannot be read, an argument is invalid, the models do not have the same
            sites, or the figure cannot be written.
        ModelError: A file is not a checkpoint.
        SelectionError: No site is chosen, or the image passes none of them.
        SpecError: `layers` is invalid.
    """
    path = check_figure_path(output)
    if path.resolve() == Path(image).resolve():
        raise InputError(f"the figure would overwrite the image {quote(str(image))}: name another file with -o")
    check_positive_integers(channels=channels)
    check_dpi(dpi)
    files = list(dict.fromkeys(str(source) for source in as_list(sources)))
    if not files:
        raise InputError("there is no model to compare: give a .pt file")
    models = dict(zip(name_checkpoints([Path(file) for file in files]), map(load_checkpoint, files), strict=True))
    first = next(iter(models.values()))
    size = training_imgsz(first, 640) if imgsz is None else imgsz
    pixels = load_image(first, image, size)
    captures, left_out = _capture(models, pixels, device, layers, include)
    names = list(next(iter(captures.values())))
    rows = (_measure(model, own[name], channels) for name in names for model, own in captures.items() if name in own)
    height, width = pixels.shape[2:]
    found = FeatureMaps(str(image), height, width, tuple(rows), tuple(left_out))
    if show:
        show(found)
    figure = draw_feature_maps(pixels[0], captures, Path(image).name, channels, dpi=dpi)
    return found, write_figure(figure, path, dpi=dpi)


def _capture(
    models: Mapping[str, Any],
    image: torch.Tensor,
    device: str,
    layers: str | int | Iterable[int] | None,
    include: str | Iterable[str] | None,
) -> tuple[dict[str, dict[str, Capture]], list[str]]:
    """Return the captures of each model by site, and what could not be seen; sites in the order of the first model."""
    sites = {name: {site.name: site for site in find_sites(model)} for name, model in models.items()}
    base, first = next(iter(models.items()))
    shared = set.intersection(*(set(own) for own in sites.values()))
    image = image.to(next(move_to(first.model, device).parameters()).device)
    chosen, left_out = choose_sites(first.model, image, layers=layers, include=include, preferred=shared)
    names = [site.name for site in chosen]
    for name, own in sites.items():
        if lacking := [each for each in names if each not in own]:
            raise InputError(
                f"{quote(name)} has no activation {join_words(lacking)}, which {quote(base)} has: compare models "
                "of one architecture, or choose sites that all of them have"
            )
    captures: dict[str, dict[str, Capture]] = {}
    for name, model in models.items():
        found = capture_activations(move_to(model.model, device), image, [sites[name][each] for each in names])
        captures[name] = {each: found[each] for each in names if each in found}
        left_out += [f"{name}: {each}" for each in names if each not in found]
    return captures, left_out


def _measure(model: str, capture: Capture, channels: int) -> SiteMaps:
    """Return the measurements of a capture."""
    site, (count, height, width) = capture.site, capture.before.shape
    return SiteMaps(
        model,
        site.name,
        site.layer,
        describe_activation(site),
        count,
        height,
        width,
        capture.calls,
        capture.dead,
        capture.choose_channels(channels),
        summarise_values(capture.before),
        summarise_values(capture.after),
    )
