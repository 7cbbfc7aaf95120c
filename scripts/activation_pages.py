"""Write a page for each activation of the zoo, and the table of all of them: what the registry says, and its curve.

    python scripts/activation_pages.py [--folder docs/activations]

`make docs` calls this before it builds the site. A file is written only where it changes, so that a second build reads
few pages again, and a curve is drawn again only if a module of the package is newer. Fifteen seconds the first time.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import re
from pathlib import Path

import rtdetr_act
from rtdetr_act.activations.checks import MAP_SHAPES
from rtdetr_act.activations.protocol import SITE_PARAMETERS, Entry
from rtdetr_act.activations.registry import count_parameters, get_entry, names
from rtdetr_act.analysis.curves import plot_activations
from rtdetr_act.deploy.targets import TARGETS, get_native_support
from rtdetr_act.errors import SpecError

ROOT = Path(__file__).parents[1]
PACKAGE = Path(rtdetr_act.__file__).parent
COSTS = ROOT / "docs" / "cost.csv"
# What must be given where an activation has arguments without defaults.
SPECS = {"threshold": "threshold(0.1, 0.0)"}


def write_pages(folder: Path, *, curves: bool = True) -> list[Path]:
    """Write `<name>.md` for each activation, `table.md`, and the curves; remove pages of activations that are gone.

    Args:
        folder: Folder of the pages, which is made where it does not exist.
        curves: Whether to draw the curves too; True by default.

    Returns:
        The pages in alphabetical order, without `table.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    costs = read_costs()
    pages = [folder / f"{name}.md" for name in names()]
    for path in pages:
        _write_if_changed(path, compose_page(get_entry(path.stem), costs))
    _write_if_changed(folder / "table.md", compose_table(costs))
    for left in set(folder.glob("*.md")) - {*pages, folder / "table.md"}:
        left.unlink()
    if curves:
        _draw_curves(folder / "curves")
    return pages


def read_costs() -> dict[str, str]:
    """Return the cost of each measured activation in units of SiLU, as `docs/cost.csv` has it."""
    with COSTS.open(encoding="utf-8", newline="") as file:
        return {row["activation"].split(" ")[0]: row["in units of SiLU"] for row in csv.DictReader(file)}


def compose_page(entry: Entry, costs: dict[str, str]) -> str:
    """Return the page of an activation in Markdown."""
    spec = SPECS.get(entry.name, entry.name)
    when = f"It {entry.note}." if entry.note else _link_names(entry)
    title = "Not meant for training a detector" if entry.note else "When to use it"
    rows = "\n".join(f"| {key} | {value} |" for key, value in _describe(entry, costs))
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


def _describe(entry: Entry, costs: dict[str, str]) -> list[tuple[str, str]]:
    """Return the rows of the table on a page."""
    cost = f"{costs[entry.name]} of SiLU, [measured](../cost.md)" if entry.name in costs else "not measured"
    homogeneous = (
        "yes, so that [cross-layer equalisation](../deploy.md#int8-and-equalisation) can be used"
        if entry.homogeneous
        else "no: [cross-layer equalisation](../deploy.md#int8-and-equalisation) cannot be used"
    )
    if entry.name == entry.folds_to or not entry.folds_to:
        folds = "torch's own under certain parameters" if entry.fold else "nothing; it is deployed as it is"
    else:
        folds = f"[{entry.folds_to}]({entry.folds_to}.md)"
    rows = [
        ("Parameters of a site", _describe_size(entry)),
        ("Arguments", _describe_arguments(entry)),
        ("Other names", ", ".join(f"`{alias}`" for alias in entry.aliases) or "none"),
        ("Where it can stand", _describe_places(entry)),
        ("Forward and backward", cost),
        ("`init=match`", _describe_match(entry)),
        ("[Folds](../deploy.md) to", folds),
        ("f(c·x) = c·f(x) for c > 0", homogeneous),
    ]
    for target in TARGETS:
        native = get_native_support(entry.name, target)
        said = f"native{'; ' + native.note if native.note else ''} ({native.source})" if native else "not native"
        rows.append((f"On {target}", said))
    return [*rows, ("Source", _link_paper(entry.paper))]


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


def compose_table(costs: dict[str, str]) -> str:
    """Return the table of all activations in Markdown, those that are meant for training first."""
    lines = ["| activation | f(x) | parameters at 64 channels | on | cost | native on |", "|---|---|---|---|---|---|"]
    for entry in sorted(map(get_entry, names()), key=lambda entry: (bool(entry.note), entry.name)):
        native = [target for target in TARGETS if get_native_support(entry.name, target)]
        size = "0" if entry.name in SPECS else f"{count_parameters(entry.name, 64):,}"
        cells = (
            f"[{entry.name}](activations/{entry.name}.md){' ¹' if entry.note else ''}",
            entry.formula.replace("|", "\\|"),
            size,
            "maps, tokens" if entry.tokens else "maps",
            costs.get(entry.name, ""),
            "all" if len(native) == len(TARGETS) else ", ".join(native),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _quote(spec: str) -> str:
    return f'"{spec}"' if "(" in spec else spec


def _draw_curves(folder: Path) -> None:
    """Draw each activation beside SiLU, where its picture is missing or older than the package."""
    folder.mkdir(exist_ok=True)
    modules = [path for room in ("activations", "analysis") for path in (PACKAGE / room).glob("*.py")]
    changed = max(path.stat().st_mtime for path in modules)
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
