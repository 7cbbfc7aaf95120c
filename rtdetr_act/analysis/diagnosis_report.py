"""Reports of a diagnosis: tables, sentences, a CSV file and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from rich.table import Table

from rtdetr_act.analysis.diagnosis import Diagnosis, SiteDiagnosis
from rtdetr_act.analysis.figures import figure_style, render_figure
from rtdetr_act.analysis.site_axes import label_sites, mark_layers
from rtdetr_act.files import convert_write_errors, create_folder, write_files_atomically
from rtdetr_act.tables import print_wide_table

QUANTITIES = "gradient_in gradient_out gain gain_active dead scale mean saturation effective_rank rank_share".split()
# Fractions are mostly 0 with a few outliers, so that their mean is more informative than their median.
_SHARES = {"dead": "dead units", "saturation": "saturated", "rank_share": "effective rank"}
_FACTORS = {"gradient_in": "gradient at input", "gain": "gain", "gain_active": "gain, active", "scale": "output rms"}
_COLUMNS = {**_FACTORS, **_SHARES}
# Titles of the panels by quantity.
_PANELS = {
    "gradient_in": "gradient at input\n‖dL/dx‖",
    "gain": "gain\n‖dL/dx‖ / ‖dL/dy‖",
    "gain_active": "gain of\nactive inputs",
    "scale": "output rms",
    "dead": "dead units",
    "saturation": "saturated\nelements",
    "rank_share": "effective rank\nof channels",
}
_LOGARITHMIC = ("gradient_in", "scale")


def print_summary(title: str, diagnoses: Mapping[str, Diagnosis]) -> None:
    """Print a table with a row per section and variant: medians over the sites, means of fractions.

    Args:
        title: Title of the table.
        diagnoses: Diagnoses by the name of the variant.
    """
    table, sections = _make_table(title, ("section", "variant", "sites")), _list_sections(diagnoses.values())
    for section in [*sections, *(["all"] if len(sections) > 1 else [])]:
        for name, diagnosis in diagnoses.items():
            there = [site for site in diagnosis.sites if section in (site.section or "all", "all")]
            if there:
                table.add_row(
                    section, name, str(len(there)), *(_format_cell(key, _average(key, there)) for key in _COLUMNS)
                )
        table.add_section()
    print_wide_table(table)


def print_sites(title: str, diagnoses: Mapping[str, Diagnosis]) -> None:
    """Print a table with a row per site and variant.

    Args:
        title: Title of the table.
        diagnoses: Diagnoses by the name of the variant.
    """
    table = _make_table(title, ("site", "variant", "activation"))
    for name, rows in _group_by_site(diagnoses).items():
        for variant, site in rows.items():
            table.add_row(name, variant, site.activation, *(_format_cell(key, getattr(site, key)) for key in _COLUMNS))
        table.add_section()
    print_wide_table(table)


def _make_table(title: str, first: Sequence[str]) -> Any:
    """Return an empty table with some first columns and one per quantity."""
    table = Table(title=title)
    for name in first:
        table.add_column(name, justify="right" if name == "sites" else "left", overflow="fold")
    for name in _COLUMNS.values():
        table.add_column(name, justify="right")
    return table


def _format_cell(key: str, value: float) -> str:
    """Return the value of a quantity as text."""
    if math.isnan(value):
        return "-"
    return f"{value:.1%}" if key in _SHARES else f"{value:.2f}" if key.startswith("gain") else f"{value:.3g}"


def _average(key: str, sites: Iterable[SiteDiagnosis]) -> float:
    """Return the median of a quantity over sites, for a fraction the mean; NaN if it is undefined at all sites."""
    values = [value for site in sites if not math.isnan(value := getattr(site, key))]
    if not values:
        return math.nan
    return statistics.fmean(values) if key in _SHARES else statistics.median(values)


def _list_sections(diagnoses: Iterable[Diagnosis]) -> list[str]:
    """Return the sections that occur in some diagnoses, in the order of the network."""
    present = {site.section or "all" for diagnosis in diagnoses for site in diagnosis.sites}
    return [name for name in ("backbone", "neck", "head", "all") if name in present]


def _group_by_site(diagnoses: Mapping[str, Diagnosis]) -> dict[str, dict[str, SiteDiagnosis]]:
    """Return the measurements by site and variant, sites in the order of the first variant that has them."""
    rows: dict[str, dict[str, SiteDiagnosis]] = {}
    for variant, diagnosis in diagnoses.items():
        for site in diagnosis.sites:
            rows.setdefault(site.name, {})[variant] = site
    return rows


def describe_gradients(diagnoses: Mapping[str, Diagnosis]) -> list[str]:
    """Return a sentence per variant on its gradient flow, compared with the first variant.

    Args:
        diagnoses: Diagnoses by the name of the variant, one or more.
    """
    base, first = next(iter(diagnoses.items()))
    return [_describe_variant(name, each, base, first if name != base else None) for name, each in diagnoses.items()]


def _describe_variant(name: str, diagnosis: Diagnosis, base: str, other: Diagnosis | None) -> str:
    """Return a sentence on the gradient flow of a variant, compared with another one named `base` if given."""
    swapped = [site for site in diagnosis.sites if site.swapped]
    sites = [site for site in swapped or diagnosis.sites if not math.isnan(site.gain_active)]
    if not sites:
        return f"{name}: no gradient reached any of its {len(diagnosis.sites)} sites"
    gains = [site.gain_active for site in sites]
    above = sum(gain > 1.001 for gain in gains)
    spread = "" if max(gains) - min(gains) < 0.005 else f" (median; {min(gains):.2f} to {max(gains):.2f})"
    words = (
        f"{name}: the gradient of active inputs is multiplied by {statistics.median(gains):.2f}{spread}, by more than "
        f"1 at {above} of {len(sites)}{' swapped' if swapped else ''} sites; the whole gradient's norm by "
        f"{_average('gain', sites):.2f}"
    )
    pairs = _match_sites(sites, other)
    if not pairs:
        return words
    there = f" ({base}: {_average('gain', [mine for _, mine in pairs]):.2f} there)"
    start, *_ = all_pairs = _match_sites(diagnosis.sites, other)
    at_start = _format_median_ratio([start])
    words += f"{there}; the gradient that reaches the input of the first site is {at_start} times {base}'s"
    early = [pair for pair in all_pairs if pair[0].section == "backbone"]
    return words + (f", over the backbone {_format_median_ratio(early)} times (median)" if early else "")


def _match_sites(sites: Iterable[SiteDiagnosis], other: Diagnosis | None) -> list[tuple[SiteDiagnosis, SiteDiagnosis]]:
    """Return the sites that another diagnosis has too, each with its counterpart there."""
    same = {site.name: site for site in other.sites} if other else {}
    return [(site, same[site.name]) for site in sites if site.name in same]


def _format_median_ratio(pairs: Iterable[tuple[SiteDiagnosis, SiteDiagnosis]]) -> str:
    """Return the median ratio of the input gradients of matched sites, or "?" if there is none."""
    ratios = [one.gradient_in / two.gradient_in for one, two in pairs if two.gradient_in]
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return f"{statistics.median(known):.2f}" if known else "?"


def write_diagnosis(diagnoses: Mapping[str, Diagnosis], folder: Path, title: str) -> list[Path]:
    """Write `diagnosis.csv` and `diagnosis.png`, both or none, and return their paths.

    Args:
        diagnoses: Diagnoses by the name of the variant.
        folder: Folder to write to, created if missing.
        title: Title of the figure.

    Raises:
        InputError: The folder cannot be written; its files are then unchanged.
    """
    rows = [
        (variant, site.name, site.layer, site.section, key, float(getattr(site, key)))
        for variant, diagnosis in diagnoses.items()
        for site in diagnosis.sites
        for key in QUANTITIES
    ]
    names = ["variant", "site", "layer", "section", "quantity", "value"]
    types = dict(zip(names, (str, str, int, str, str, float), strict=True))
    contents = {
        "diagnosis.csv": polars.DataFrame(rows, schema=types, orient="row").write_csv().encode(),
        "diagnosis.png": draw_diagnosis(diagnoses, title),
    }
    with convert_write_errors(folder), create_folder(folder):
        write_files_atomically({folder / name: content for name, content in contents.items()})
    return [folder / name for name in contents]


@figure_style()
def draw_diagnosis(diagnoses: Mapping[str, Diagnosis], title: str) -> bytes:
    """Plot the quantities of all sites, a panel each with sites from left to right, and return the PNG file.

    Args:
        diagnoses: Diagnoses by the name of the variant.
        title: Title of the figure.
    """
    sites = _group_by_site(diagnoses)
    first = [next(iter(rows.values())) for rows in sites.values()]
    size = min(max(7.0, 2.5 + 0.11 * len(sites)), 16), 1.2 + 1.35 * len(_PANELS)
    figure = Figure(figsize=size)
    grid = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (key, label) in zip(grid, _PANELS.items(), strict=True):
        mark_layers(axes, first)
        for index, variant in enumerate(diagnoses):
            there = [(place, rows[variant]) for place, rows in enumerate(sites.values()) if variant in rows]
            points = [(place, getattr(site, key)) for place, site in there]
            # A gradient of zero, as before a box head initialised to zero, cannot be drawn on a logarithmic scale.
            points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or key not in _LOGARITHMIC)]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, marker="osD^vP*"[index % 7], markersize=2.6, linewidth=0.9, label=variant)
        _set_scale(axes, key)
        axes.set_ylabel(label)
    label_sites(grid[0], grid[-1], first)
    figure.suptitle(title, parse_math=False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return render_figure(figure)


def _set_scale(axes: Any, key: str) -> None:
    """Set scale, limits and tick labels of the panel of a quantity."""
    low, high = axes.dataLim.intervaly
    if key in _LOGARITHMIC and low > 0:
        axes.set_yscale("log")
        # Over a decade or two, powers of ten alone would give one tick label or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if key.startswith("gain"):
        axes.axhline(1, color="black", linewidth=0.8, zorder=1.5)
    if key in _SHARES:
        top = max(0.1, 1.1 * high) if key == "dead" else 1.0  # mostly small, and invisible on a full scale
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(-0.04 * top, 1.04 * min(top, 1))
