"""Reports of a sensitivity measurement: tables, sentences, Markdown, a CSV file and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.table import Table

from rtdetr_act.analysis.figures import COLOURS, figure_style, render_figure
from rtdetr_act.analysis.sensitivity import AT_THE_END, Sensitivity, SwapCost
from rtdetr_act.analysis.site_axes import label_sites, mark_layers
from rtdetr_act.files import convert_write_errors, create_folder, write_files_atomically
from rtdetr_act.formatting import format_count, format_number, format_score
from rtdetr_act.tables import format_markdown_table, print_wide_table

PLAN_FILE = "plan.yaml"
_LISTED = 10  # sites in the tables; the CSV file has all
_NO_CHANGE = 1e-5  # of the loss, below which the axis is linear
_SWAP_COLUMNS = ("swapped alone", "sites", "cost", "± standard error", "change", "kept")


def print_sensitivity(title: str, found: Sensitivity) -> None:
    """Print a table of stages and of the sites that change the loss most, one of plans, and sentences on the best.

    Args:
        title: Title of the first table.
        found: The measurement.
    """
    costs = Table(title=title)
    for index, column in enumerate(_SWAP_COLUMNS):
        costs.add_column(column, justify="right" if 0 < index < 5 else "left")
    for group in _group_costs(found):
        for cells in map(_format_swap, group):
            costs.add_row(*cells)
        costs.add_section()
    print_wide_table(costs)
    header, rows = _make_plan_table(found)
    plans = Table(title="All swapped but the kept ones")
    for index, column in enumerate(header):
        plans.add_column(column, justify="right" if index else "left")
    for row in rows:
        plans.add_row(*row)
    print_wide_table(plans)
    for sentence in describe_proposal(found):
        print(sentence)


def describe_proposal(found: Sensitivity) -> list[str]:
    """Return sentences on the proposed plan: how good it is, against what is kept by hand, and what to type."""
    plan, count = found.proposal, len(found.kept)
    total = format_count(len(found.sites), "site")
    if not found.is_within_bound:
        verdict = f"{count} of {total} is the most to keep, and too few for the bound of {found.bound:.1%}:"
    elif count:
        verdict = f"{count} of {total} is the fewest to keep within the bound of {found.bound:.1%}:"
    else:
        verdict = f"none of {total} has to be kept for the bound of {found.bound:.1%}:"
    verdict += f" the loss changes by {_format_cost(plan.choice)} on the images of the choice"
    sentences = [f"{verdict}, and by {_format_cost(plan.cost, plan.error)} on the others"]
    by_hand = next((each for each in found.plans if each.name == AT_THE_END), None)
    if by_hand:
        sentences.append(
            f"as many kept at the end of the network: by {_format_cost(by_hand.cost, by_hand.error)} on the others"
        )
        sentences.append(f"keep: {','.join(found.kept)}")
    return sentences


def write_sensitivity(found: Sensitivity, folder: Path, title: str) -> list[Path]:
    """Write `sensitivity.csv`, `.md` and `.png`, and the proposed plan as `plan.yaml`; all of them or none.

    Args:
        found: The measurement.
        folder: Folder to write to, created if missing.
        title: Title of the text and of the figure.

    Returns:
        The paths of the files.

    Raises:
        InputError: The folder cannot be written; its files are then unchanged.
    """
    contents = {
        "sensitivity.csv": found.to_csv().encode(),
        "sensitivity.md": format_sensitivity(found, title).encode(),
        "sensitivity.png": draw_sensitivity(found, title),
        PLAN_FILE: found.plan.dump().encode(),
    }
    with convert_write_errors(folder), create_folder(folder):
        write_files_atomically({folder / name: content for name, content in contents.items()})
    return [folder / name for name in contents]


def format_sensitivity(found: Sensitivity, title: str) -> str:
    """Return the summary as Markdown."""
    costs = [_format_swap(each) for group in _group_costs(found) for each in group]
    header, plans = _make_plan_table(found)
    parts = [
        f"# {title}",
        "![Cost of each site and layer](sensitivity.png)",
        "\n".join(f"- {sentence}" for sentence in describe_proposal(found)),
        "A cost is the increase of the loss by the swap, after a refit; a change its rms over the batches.",
        format_markdown_table(header, plans, ["---", *["---:"] * (len(header) - 1)]),
        f"Swapped alone: sections, layers, and the {_LISTED} sites that change the loss most; sensitivity.csv has all.",
        format_markdown_table(_SWAP_COLUMNS, costs, ["---", "---:", "---:", "---:", "---:", "---"]),
    ]
    return "\n\n".join(parts) + "\n"


def _group_costs(found: Sensitivity) -> list[list[SwapCost]]:
    """Return sections, layers and the sites that change the loss most, without empty groups."""
    sites = sorted(found.sites, key=lambda site: -site.change)[:_LISTED]
    groups = ([each for each in found.stages if each.kind == kind] for kind in ("section", "layer"))
    return [group for group in (*groups, sites) if group]


def _format_swap(each: SwapCost) -> list[str]:
    """Return the cells of `_SWAP_COLUMNS`."""
    cost, *others = format_number(each.cost, "{:+.2%}"), *map(_format_share, (each.error, each.change))
    return [each.name, str(each.sites), cost, *others, "kept" if each.kept else ""]


def _format_share(value: float) -> str:
    return format_number(value, "{:.2%}")


def _make_plan_table(found: Sensitivity) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table of plans."""
    names = list(found.proposal.scores or {})
    header = ["plan", "kept", "cost, images of the choice", "cost, others", "± standard error", *names]
    return header, [
        [
            each.name,
            str(len(each.kept)),
            format_number(each.choice, "{:+.2%}"),
            format_number(each.cost, "{:+.2%}"),
            _format_share(each.error),
            *(format_score((each.scores or {}).get(name)) for name in names),
        ]
        for each in found.plans
    ]


def _format_cost(cost: float, error: float = float("nan")) -> str:
    """Return a cost as text.

    >>> _format_cost(0.0125, 0.0017), _format_cost(-0.002)
    ('+1.25 % ± 0.17', '−0.20 %')
    """
    return format_number(100 * cost, "{:+.2f} %") + (f" ± {100 * error:.2f}" if error == error else "")


@figure_style()
def draw_sensitivity(found: Sensitivity, title: str) -> bytes:
    """Plot the cost of each site and layer in the order of depth, and of the plans, and return the PNG file.

    Args:
        found: The measurement.
        title: Title of the figure.
    """
    figure = Figure(figsize=(min(max(7.0, 2.5 + 0.09 * len(found.sites)), 16), 7.2))
    grid = figure.subplots(3, 1)
    grid[0].sharex(grid[1])
    grid[0].tick_params(labelbottom=False)
    _draw_changes(grid[0], found)
    _draw_costs(grid[1], found)
    label_sites(grid[0], grid[1], found.sites)
    _draw_plans(grid[2], found)
    for axes in grid:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.legend(loc="best")
    figure.suptitle(title, parse_math=False)
    return render_figure(figure)


def _draw_changes(axes: Any, found: Sensitivity) -> None:
    """Draw how much each site changes the loss, and which sites are kept."""
    mark_layers(axes, found.sites)
    for kept, marker, label in ((True, "D", "kept by the proposed plan"), (False, "o", "swapped by the proposed plan")):
        there = [(place, site.change) for place, site in enumerate(found.sites) if site.kept == kept]
        if there:
            places, changes = zip(*there, strict=True)
            axes.plot(places, changes, marker, markersize=3.5, color=COLOURS[int(kept)], label=label)
    axes.set_yscale("symlog", linthresh=_NO_CHANGE)  # some sites change nothing
    axes.set_ylim(bottom=-0.3 * _NO_CHANGE)
    axes.set_ylabel("one site swapped:\nrms change of the loss")


def _draw_costs(axes: Any, found: Sensitivity) -> None:
    """Draw the cost of each site, with its standard error, and that of each layer as a bar over its sites."""
    mark_layers(axes, found.sites)
    style = {"alpha": 0.45, "color": COLOURS[2], "ecolor": COLOURS[2], "error_kw": {"elinewidth": 0.9}}
    for index, layer in enumerate(each for each in found.stages if each.kind == "layer"):
        places = [place for place, site in enumerate(found.sites) if site.layer == layer.layer]
        middle, width = (places[0] + places[-1]) / 2, places[-1] - places[0] + 0.8
        label = "all sites of a layer swapped" if index == 0 else None
        axes.bar(middle, layer.cost, width, yerr=layer.error, label=label, **style)
    costs, errors = [site.cost for site in found.sites], [site.error for site in found.sites]
    axes.errorbar(range(len(costs)), costs, errors, fmt=".", elinewidth=0.7, color=COLOURS[0], label="one site swapped")
    axes.axhline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.set_ylabel("increase of the loss")


def _draw_plans(axes: Any, found: Sensitivity) -> None:
    """Draw the cost of the plans of the search over the number of sites that they keep."""
    counts = [len(trial.kept) for trial in found.trials]
    axes.plot(counts, [trial.choice for trial in found.trials], marker="o", label="images of the choice")
    others = [trial.cost for trial in found.trials], [trial.error for trial in found.trials]
    axes.errorbar(counts, *others, marker="s", elinewidth=0.9, label="other images")
    for each in found.plans:
        if each.name == AT_THE_END:
            label = f"{each.name}, other images"
            axes.errorbar([len(each.kept)], [each.cost], [each.error], fmt="^", elinewidth=0.9, label=label)
    axes.axhline(found.bound, color="0.5", linewidth=0.8, linestyle=":", label=f"bound, {found.bound:.1%}")
    axes.axhline(0, color="black", linewidth=0.8, zorder=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"sites kept, of {len(found.sites)}")
    axes.set_ylabel("the others swapped:\nincrease of the loss")
