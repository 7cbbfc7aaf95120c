"""Count the operators of exported models, and write what each target runs of them: docs/targets.json and targets.md.

    python scripts/operator_tables.py [--counted]

`make targets` calls this. It exports yolo11n and rtdetr-l with random weights, as they are and with relu at all
convolutional sites: a minute. `--counted` leaves that out and takes the counts in docs/targets.json, after a change of
what is known of a target; a test fails where docs/targets.md is behind.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from ultralytics import RTDETR, YOLO

from rtdetr_act import patch_model
from rtdetr_act.deploy.operators import (
    STATUSES,
    OperatorSupport,
    Support,
    count_operators,
    get_operator_support,
    judge_operators,
    summarise_operators,
)
from rtdetr_act.deploy.targets import TARGETS
from rtdetr_act.tables import format_markdown_table

DOCS = Path(__file__).parents[1] / "docs"
COUNTS, PAGE = DOCS / "targets.json", DOCS / "targets.md"
MODELS = {"yolo11n": YOLO, "rtdetr-l": RTDETR}
CONVERTED = "relu"
SIZE = 640
# How often each operator occurs, by model, by activation ("stock" for those of the model), and by operator.
Counts: TypeAlias = dict[str, dict[str, dict[str, int]]]
_PREFACE = f"""# What a target runs of a network

```sh
rtdetr-act export best.pt format=onnx for=rknn
```

`for=` lists the operators of the exported graph: `native` on the accelerator, `fallback` if they run elsewhere (on
the CPU, or cut from the graph where the compiler refuses them), and `unknown` where no source that could be read
tells. Here that is done for yolo11n and rtdetr-l at {SIZE} pixels, as they are and with ReLU at all convolutional
sites. An activation counts once, however many operators it consists of. AReLU, PReLU with one slope and RReLU are
exported as LeakyRelu.

This is what vendors write, not what was run: nothing here was compiled or measured on a device. Whether an operator
is native often depends on its shape, which the [notes](#notes) say and the counts do not. `rknn` stands for RK3588;
on RK3566 and RK3568, Softmax and most permutations run on the CPU.

In YOLO11, the activation decides on `vitis-dpu`: SiLU falls back at each of its 77 sites, ReLU at none. In RT-DETR,
it is not the activation that keeps the network from a target, but its decoder: GridSample and TopK fall back on
`rknn`, `hailo`, `edgetpu` and `axelera`, and are unknown on `vitis-dpu`. `openvino`, `qualcomm-htp` and `ti-tidl`
name both as native."""


def count_models() -> Counts:
    """Export each model, as it is and converted, and count its operators."""
    counts: Counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, build in MODELS.items():
            for activation in ("stock", CONVERTED):
                model = build(f"{name}.yaml")
                if activation != "stock":
                    patch_model(model, activation)
                path = Path(model.export(format="onnx", imgsz=SIZE)).replace(Path(folder, f"{name}.onnx"))
                counts.setdefault(name, {})[activation] = dict(count_operators(path))
    return counts


def compose_markdown(counts: Counts) -> str:
    """Return the page in Markdown."""
    sections = [_PREFACE, _compose_summary(counts)]
    sections += [_compose_table(name, models) for name, models in counts.items()]
    operators = list(
        dict.fromkeys(operator for models in counts.values() for each in models.values() for operator in each)
    )
    sections += ["## Notes", *_compose_notes(operators)]
    return "\n\n".join(sections) + "\n"


def _compose_summary(counts: Counts) -> str:
    """Return a table of how many operators are native, a row per target."""
    models = [(name, activation) for name, each in counts.items() for activation in each]
    rows = [
        [
            f"`{target}`",
            *(_compose_share(judge_operators(counts[name][activation], target)) for name, activation in models),
        ]
        for target in TARGETS
    ]
    header = ["native operators", *(f"{name}, {activation}" for name, activation in models)]
    return format_markdown_table(header, rows, ["---", *["---:"] * len(models)])


def _compose_share(rows: tuple[OperatorSupport, ...]) -> str:
    """Return how many operators are native, and how many are unknown."""
    total = {status: sum(row.count for row in rows if row.status == status) for status in STATUSES}
    unknown = f" ({total['unknown']} unknown)" if total["unknown"] else ""
    return f"{total['native']} of {sum(total.values())}{unknown}"


def _compose_table(name: str, models: Mapping[str, Mapping[str, int]]) -> str:
    """Return the section of a model: its operators and how often each occurs, and the status on each target."""
    operators = dict.fromkeys(operator for each in models.values() for operator in each)
    rows = [
        [
            operator,
            *(str(each.get(operator, 0)) for each in models.values()),
            *(_compose_status(operator, target) for target in TARGETS),
        ]
        for operator in operators
    ]
    header = ["operator", *models, *(f"`{target}`" for target in TARGETS)]
    table = format_markdown_table(header, rows, ["---", *["---:"] * len(models), *["---"] * len(TARGETS)])
    sentences = [
        f"- {summarise_operators(judge_operators(each, target), target)}"
        for activation, each in models.items()
        if activation == CONVERTED
        for target in TARGETS
    ]
    return "\n\n".join([f"## {name}", table, f"With {CONVERTED}:", "\n".join(sentences)])


def _compose_status(operator: str, target: str) -> str:
    """Return the status of an operator on a target, with a mark where there is a note."""
    support = get_operator_support(operator, target)
    return f"{support.status}{' ¹' if support.status == 'native' and support.note else ''}"


def _compose_notes(operators: list[str]) -> Iterator[str]:
    """Yield for each target the notes with their operators, and the sources with their dates."""
    yield "¹ A native operator with a note. The number behind operators is that of their source."
    for target, described in TARGETS.items():
        groups: dict[Support, list[str]] = {}
        for operator in operators:
            groups.setdefault(get_operator_support(operator, target), []).append(operator)
        ordered = sorted(groups, key=lambda each: STATUSES.index(each.status))
        sources = list(dict.fromkeys((each.source, each.date) for each in ordered))
        lines = [
            f"- {each.status}{f', {each.note}' if each.note else ''}: {', '.join(groups[each])} "
            f"({sources.index((each.source, each.date)) + 1})"
            for each in ordered
        ]
        caveat = f" {described.caveat[0].upper()}{described.caveat[1:]}." if described.caveat else ""
        named = [f"{number}. {source}; {date}" for number, (source, date) in enumerate(sources, start=1)]
        yield "\n\n".join([f"### {target}", f"{described.title}.{caveat}", "\n".join(lines), "\n".join(named)])


def main() -> None:
    """Count the operators unless they were, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counted", action="store_true", help="take the counts in docs/targets.json")
    if not parser.parse_args().counted:
        COUNTS.write_text(json.dumps(count_models(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(compose_markdown(read_counts()), encoding="utf-8")


def read_counts() -> Counts:
    """Return the counts in docs/targets.json."""
    counts: Counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    return counts


if __name__ == "__main__":
    main()
