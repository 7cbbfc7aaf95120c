"""Write a page for each activation of the zoo, and the tables of all: what is registered and measured, and the curves.

    python scripts/activation_pages.py [--folder docs/activations]

`make docs` calls this before it builds the site. A file is written only where it changes, so that a second build reads
few pages again, and a curve is drawn again only if a file of the package is newer. Half a minute the first time.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

import rtdetr_act
from rtdetr_act.activations.checks import MAP_SHAPES
from rtdetr_act.activations.protocol import SITE_PARAMETERS, Entry
from rtdetr_act.activations.registry import count_parameters, get_entry, names
from rtdetr_act.analysis.curves import plot_activations
from rtdetr_act.analysis.measured import FORMATS, Measured, read_measured
from rtdetr_act.deploy.targets import TARGETS, get_native_support
from rtdetr_act.errors import SpecError
from rtdetr_act.tables import format_markdown_table
from rtdetr_act.workflows.activations import ListedActivation, list_activations

ROOT = Path(__file__).parents[1]
PACKAGE = Path(rtdetr_act.__file__).parent
# What must be given where an activation has arguments without defaults.
SPECS = {"threshold": "threshold(0.1, 0.0)"}


def write_pages(folder: Path, *, curves: bool = True) -> list[Path]:
    """Write `<name>.md` for each activation, the tables, and the curves; remove pages of activations that are gone.

    Args:
        folder: Folder of the pages, which is made where it does not exist.
        curves: Whether to draw the curves too; True by default.

    Returns:
        The pages in alphabetical order, without the tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = {each.name: each for each in list_activations().activations}
    pages = [folder / f"{name}.md" for name in names()]
    for path in pages:
        _write_if_changed(path, compose_page(get_entry(path.stem), listed[path.stem]))
    tables = {folder / "table.md": compose_table(listed), folder / "measured.md": compose_measured()}
    for path, text in tables.items():
        _write_if_changed(path, text)
    for left in set(folder.glob("*.md")) - {*pages, *tables}:
        left.unlink()
    if curves:
        _draw_curves(folder / "curves")
    return pages


def compose_page(entry: Entry, listed: ListedActivation) -> str:
    """Return the page of an activation in Markdown."""
    spec = SPECS.get(entry.name, entry.name)
    when = f"It {entry.note}." if entry.note else _link_names(entry)
    title = "Not meant for training a detector" if entry.note else "When to use it"
    rows = "\n".join(f"| {key} | {value} |" for key, value in _describe(entry, listed))
    return f"""# {entry.name}

```text
f(x) = {entry.formula}
```

{{.curve}}
![{entry.name} and its gradient beside silu](curves/{entry.name}.svg)

## {title}

{when or "Nothing is known of it here."}

## What it is

| | |
|---|---|
{rows}

## How to use it

```sh
rtdetr-act train best.pt act={_quote(spec)} init=match data=my.yaml epochs=50
```

```python
from rtdetr_act import patch_model
from ultralytics import RTDETR

model = RTDETR("rtdetr-l.yaml")
patch_model(model, "{spec}")
```

[All activations](../choose.md) · [Swap a trained model](../trained.md)
"""


def _describe(entry: Entry, listed: ListedActivation) -> list[tuple[str, str]]:
    """Return the rows of the table on a page."""
    homogeneous = (
        "yes, so that [cross-layer equalisation](../deploy.md#int8-and-equalisation) can be used"
        if entry.homogeneous
        else "no: [cross-layer equalisation](../deploy.md#int8-and-equalisation) cannot be used"
    )
    total = listed.parameters_rtdetr_l
    rows = [
        ("At the start", {"fixed": "the same: it has no parameters", "": "not known"}.get(listed.start, listed.start)),
        ("Parameters of a site", _describe_size(entry)),
        ("Parameters in rtdetr-l", "none" if not total else f"{total:,} at all convolutional sites"),
        ("Arguments", _describe_arguments(entry)),
        ("Other names", ", ".join(f"`{alias}`" for alias in entry.aliases) or "none"),
        ("Where it can stand", _describe_places(entry)),
        *_describe_measured(listed.measured),
        ("`init=match`", _describe_match(entry)),
        ("[Folds](../deploy.md) to", _describe_fold(listed)),
        ("f(c·x) = c·f(x) for c > 0", homogeneous),
    ]
    for target in TARGETS:
        native = get_native_support(entry.name, target)
        said = f"native{'; ' + native.note if native.note else ''} ({native.source})" if native else "not native"
        rows.append((f"On {target}", said))
    return [*rows, ("Source", _link_paper(entry.paper))]


def _describe_measured(measured: Measured | None) -> list[tuple[str, str]]:
    """Return the rows of a table about cost and export."""
    if measured is None:
        return [("Cost", "not measured")]
    kept = f"{measured.kept:g} bytes per element of a float32 input"
    return [
        ("Forward and backward", f"{measured.train:.2f} of SiLU, [measured](../cost.md)"),
        ("Inference", f"{measured.inference:.2f} of SiLU"),
        ("Kept for the backward", f"{kept}, {measured.kept_output:g} of them the output's"),
        ("[Exported](../parity.md)", "; ".join(f"{form}: {found}" for form, found in measured.exports.items())),
    ]


def _describe_fold(listed: ListedActivation) -> str:
    """Return what an activation folds to, in words."""
    if listed.folds == "sometimes":
        return "torch's own under certain parameters"
    return f"[{listed.folds_to}]({listed.folds_to}.md)" if listed.folds_to else "nothing; it is deployed as it is"


def _describe_size(entry: Entry) -> str:
    try:
        few, many = (count_parameters(entry.name, channels) for channels in (64, 256))
    except SpecError:  # it has arguments without defaults
        return "none"
    if few == many:
        return f"{few}, learned" if few else "none"
    return f"{few:,} at 64 channels, {many:,} at 256, learned"


def _describe_arguments(entry: Entry) -> str:
    own = [each for name, each in entry.parameters.items() if name not in SITE_PARAMETERS]
    text = ", ".join(str(each.replace(annotation=inspect.Parameter.empty)) for each in own)
    return f"`{entry.name}({text})`" if text else "none"


def _describe_places(entry: Entry) -> str:
    maps = f"feature maps {', '.join(MAP_SHAPES.values())}"
    return f"{maps} and tokens (B, N, C)" if entry.tokens else f"{maps} only: {entry.maps_only_because}"


def _describe_match(entry: Entry) -> str:
    if entry.fit:
        return "fits its parameters to the activation that it replaces, then the convolutions"
    if _describe_size(entry) == "none":
        return "scales the weights around it where that helps, then fits the convolutions"
    return "leaves its parameters as they are, and fits the convolutions"


def _link_names(entry: Entry) -> str:
    """Return when to use an activation, the names of others as links and what one types as code."""
    text = re.sub(r"\w+=\w+", r"`\g<0>`", entry.use_when)
    others = "|".join(name for name in names() if name != entry.name)
    return re.sub(rf"\b({others})\b", r"[\1](\1.md)", text)


def _link_paper(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def compose_table(listed: dict[str, ListedActivation]) -> str:
    """Return the table of all activations in Markdown, those that are meant for training first."""
    rows = []
    for each in sorted(listed.values(), key=lambda each: (bool(each.note), each.name)):
        native = [target for target in TARGETS if get_native_support(each.name, target)]
        rows.append(
            (
                f"[{each.name}](activations/{each.name}.md){' ¹' if each.note else ''}",
                each.formula,
                f"{each.parameters_rtdetr_l or 0:,}",
                "maps, tokens" if each.tokens else "maps",
                f"{each.measured.train:.2f}" if each.measured else "",
                f"{each.measured.inference:.2f}" if each.measured else "",
                "all" if len(native) == len(TARGETS) else ", ".join(native),
            )
        )
    header = ("activation", "f(x)", "parameters in rtdetr-l", "on", "training", "inference", "native on")
    return format_markdown_table(header, rows) + "\n"


def compose_measured() -> str:
    """Return what was measured of all activations as a table in Markdown, and where, below it."""
    measured = read_measured()
    header = ("activation", "training", "inference", "kept", "off by", "in float32", "gradcheck", *FORMATS)
    rows = [_format_measured(measured[name]) for name in sorted(measured)]
    machines = dict.fromkeys(each.machine for each in measured.values())
    return f"{format_markdown_table(header, rows)}\n\n*Measured on {'; '.join(machines)}.*\n"


def _format_measured(each: Measured) -> tuple[str, ...]:
    kept = f"{each.kept:g}" if not each.kept_output else f"{each.kept:g} (output: {each.kept_output:g})"
    return (
        f"[{each.activation}](activations/{each.activation}.md)",
        f"{each.train:.2f} ({each.train_low:.2f}-{each.train_high:.2f})",
        f"{each.inference:.2f} ({each.inference_low:.2f}-{each.inference_high:.2f})",
        kept,
        _format_error(each.error),
        _format_error(each.error_float32),
        "passed" if each.gradcheck else "failed",
        *(getattr(each, form) for form in FORMATS),
    )


def _format_error(error: float | None) -> str:
    return "no formula" if error is None else f"{error:.0e}" if error else "0"


def _quote(spec: str) -> str:
    return f'"{spec}"' if "(" in spec else spec


def _draw_curves(folder: Path) -> None:
    """Draw each activation beside SiLU, where its picture is missing or older than the package."""
    folder.mkdir(exist_ok=True)
    files = [path for room in ("activations", "analysis") for path in (PACKAGE / room).glob("*.*")]
    changed = max(path.stat().st_mtime for path in files)
    for name in names():
        path = folder / f"{name}.svg"
        if not path.exists() or path.stat().st_mtime < changed:
            plot_activations(list(dict.fromkeys((SPECS.get(name, name), "silu"))), path)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "activations", help="where the pages go")
    print(f"{len(write_pages(parser.parse_args().folder))} pages")
