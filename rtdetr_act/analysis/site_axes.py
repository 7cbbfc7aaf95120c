"""Axes with the activation sites of a network from left to right: shaded sections, marked layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

_SECTION_SHADES = {"backbone": "0.96", "neck": "1", "head": "0.96"}


class Located(Protocol):
    """Protocol of what stands at a site."""

    @property
    def layer(self) -> int | None: ...  # noqa: D102
    @property
    def section(self) -> str: ...  # noqa: D102


def mark_layers(axes: Any, sites: Sequence[Located]) -> None:
    """Shade the sections of a panel, and draw a line between layers.

    Args:
        axes: The panel; site number i is at x = i.
        sites: The sites.
    """
    for start, end, section in group_consecutive(sites, "section"):
        axes.axvspan(start - 0.5, end + 0.5, color=_SECTION_SHADES.get(section, "1"), linewidth=0, zorder=0)
    for start, _, _ in list(group_consecutive(sites, "layer"))[1:]:
        axes.axvline(start - 0.5, color="0.85", linewidth=0.5, zorder=1)
    axes.grid(axis="x", visible=False)  # the layers are marked


def label_sites(top: Any, bottom: Any, sites: Sequence[Located]) -> None:
    """Label the sections above the top panel and the layers below the bottom panel, centred on their sites."""
    for start, end, section in group_consecutive(sites, "section"):
        top.annotate(section, ((start + end) / 2, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    layers = [
        ((start + end) / 2, layer) for start, end, layer in group_consecutive(sites, "layer") if layer is not None
    ]
    bottom.set_xlim(-0.5, len(sites) - 0.5)
    if layers:
        room = len(sites) / (5 * bottom.figure.get_figwidth())  # a label of two digits is a fifth of an inch wide
        shown = layers[:1]
        for layer in layers[1:]:
            shown += [layer] if layer[0] - shown[-1][0] > room else []
        bottom.set_xticks([place for place, _ in shown], [str(layer) for _, layer in shown])
        bottom.set_xlabel("layer (a point is an activation site)")
    else:
        bottom.set_xlabel("activation sites in the order of their first call")


def group_consecutive(sites: Sequence[Located], attribute: str) -> Iterator[tuple[int, int, Any]]:
    """Yield first index, last index and value of each group of consecutive sites with equal values of an attribute."""
    for value, group in groupby(enumerate(sites), key=lambda pair: getattr(pair[1], attribute)):
        indices = [index for index, _ in group]
        yield indices[0], indices[-1], value
