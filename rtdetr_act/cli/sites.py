"""Commands that show the activations inside a model: sites, learned."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rtdetr_act.cli.grammar import command
from rtdetr_act.cli.options import (
    Act,
    Data,
    Dpi,
    From,
    Model,
    Name,
    OutputFile,
    Project,
    ScopeOption,
    Verify,
    open_file,
    require,
    split_variants,
)
from rtdetr_act.cli.printing import print_files
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.surgery.plan import check_scope

if TYPE_CHECKING:
    from rtdetr_act.workflows.learned import Learned
    from rtdetr_act.workflows.sites import SiteListing


@command("rtdetr-l.yaml act=arelu from=silu", "best.pt verify=true")
@no_downloads()
def sites(
    model: Model = None,
    act: Act = None,
    replaces: From = None,
    scope: ScopeOption = "conv",
    verify: Verify = False,
) -> None:
    """List the activation sites of a model.

    With act=, also what a plan would change there; nothing is written.
    """
    from rtdetr_act.workflows.sites import list_sites

    source = require(model, "sites needs a model", "rtdetr-act sites rtdetr-l.yaml act=arelu")
    variants = split_variants([act] if act else None, replaces)
    if len(variants) > 1:
        raise InputError(f"sites shows one plan, not {len(variants)}: {', '.join(variants)}")
    listing = list_sites(source, variants[0] if variants else None, scope=check_scope(scope), verify=verify)
    _print_sites(source, listing)
    if listing.report:
        print(listing.report)
    elif listing.unreachable:
        print(f"no swap reaches: {', '.join(listing.unreachable)}")
    if listing.coverage:
        print(listing.coverage)


def _print_sites(model: str, listing: SiteListing) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: {len(listing.sites)} activation sites")
    after = {swap.site.name: swap.after for swap in listing.report.swaps} if listing.report else None
    titles = (
        "layer",
        "section",
        "site",
        "owner",
        "channels",
        "layout",
        "before",
        *(["after"] if listing.report else []),
    )
    for title in titles:
        table.add_column(title, justify="right" if title in ("layer", "channels") else "left", overflow="fold")
    for site in listing.sites:
        layer = "" if site.layer is None else str(site.layer)
        channels = "" if site.channels is None else str(site.channels)
        cells = [site.current] if after is None else [site.current, after.get(site.name, "")]
        table.add_row(layer, site.section, site.name, site.owner_class, channels, site.layout, *cells)
    Console().print(table)


@command("best.pt", "best.pt data=my.yaml -o learned.svg")
@no_downloads()
def learned(
    model: Model = None,
    data: Data = None,
    dpi: Dpi = 150,
    output: OutputFile = None,
    project: Project = None,
    name: Name = None,
) -> None:
    """Show what the activations of a checkpoint learned.

    Each quantity of each site is shown, and where it started if the run recorded it. What DY-ReLU and Meta-ACON
    make from the image is measured on validation images of data=, else as the run noted it: mean ± standard
    deviation over images. The figure is runs/learned/learned.png if -o does not name a PNG, SVG or PDF.
    """
    from rtdetr_act.workflows.learned import report_learned

    weights = require(model, "learned needs a checkpoint", "rtdetr-act learned best.pt")
    with open_file("learned", "learned.png", output, project, name) as path:
        report_learned(weights, path, data, show=_print_learned, dpi=dpi)
        print_files([path])


def _print_learned(found: Learned) -> None:
    from rich.console import Console
    from rich.table import Table

    from rtdetr_act.analysis.history_figure import select_quantities
    from rtdetr_act.analysis.learned import layer_index

    for activation in dict.fromkeys(each.activation for each in found.quantities):
        own = [each for each in found.quantities if each.activation == activation]
        names, _ = select_quantities(each.name for each in own)
        table = Table(title=f"{activation}: {'start → now' if found.start else 'now'}")
        for title in ("layer", "site", *names):
            table.add_column(title, justify="left" if title == "site" else "right", overflow="fold")
        for site, group in groupby(own, key=lambda each: each.site):
            values = {each.name: each.value for each in group}
            layer = layer_index(site)
            cells = [_format_change(found, site, name, values) for name in names]
            table.add_row("" if layer is None else str(layer), site, *cells)
        Console().print(table)
    if found.note:
        print(found.note)


def _format_change(found: Learned, site: str, name: str, values: dict[str, float]) -> str:
    """Return `0.9 → 0.873`, and below it `± 0.021` where the value differs between images."""
    from rtdetr_act.analysis.learned import SPREAD

    if name not in values:
        return ""
    start = found.start.get((site, name))
    spread = values.get(name + SPREAD)
    before = "" if start is None else f"{start:.3g} → "
    return f"{before}{values[name]:.3g}" + ("" if spread is None else f"\n± {spread:.2g}")
