"""Write what `check_gpu.py` found as a page, a CSV and a chart; runs where the results lie, with a GPU or without."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rtdetr_act.files import write_files_atomically

COLUMNS = ("part", "item", "ok", "seconds", "error", "measure", "value", "first quartile", "third quartile", "time")
FORMS = ("ours", "ours, compiled", "published", "published, compiled")
_PREFACE = """Made by `make gpu`, or `python3 scripts/check_gpu.py --report docs` where there is no `make`: that needs
torch, NumPy and wrapt alone, Triton for the kernels and Ultralytics for whole detectors, and no network. Where a
machine stops a command early, call it again: it goes on where it was."""
_ERRORS = """An error is the largest one of a part, in units of what is allowed, which is relative and absolute alike.
A map that is rounded to its type once may be off by 2e-5 in float32, 2e-3 in float16 and 1.6e-2 in bfloat16, four
units in the last place of the half types; a sum over positions by 2e-5 of the sum of its magnitudes; a second
derivative or a compiled op by twice that, a module with a generator or a convolution inside by 4e-5, 4e-3 and 3.2e-2
of its largest value; a loss under autocast by 0.02 in float16 and 0.1 in bfloat16 after eight steps. TF32 is off,
with which a convolution in float32 is off by 1e-3."""
_TIMES = """Forward and backward, in units of `nn.SiLU` in the same type on the same map, medians of the paired
ratios of 20 rounds with quartiles: the GPU's own time, all work queued before its clock starts. "published" are the
forms that people copy, "compiled" is `torch.compile`. "of the limit" compares ours with copying the bytes that must be
moved, as measured in the same rounds; "kept" is what autograd keeps for the backward. Where maps are small, what the
host takes to launch it all counts as well: "with launches" is one call after the other, each waited for."""

_INTERPRETED = """**No GPU was there.** What follows is Triton's interpreter, which runs the same kernels on the CPU,
one program after the other in NumPy: it shows that they compute the right numbers, and nothing of how fast they are
or how a GPU's compiler and memory treat them. Nothing was timed; graphs of `torch.compile` were run without Inductor,
and a training is two steps of a tiny network."""
_DETECTORS = """A training step and the inference of one image, in units of the stock model (medians of paired
ratios), and the memory that they take: the peak of a step beyond weights, and what autograd keeps for the backward."""
_DYNAMIC = """Forward and backward of eight images in float32, in units of the form that the package takes, medians of
paired ratios."""
_REFIT = """How far results are from those before the swap, in units of their standard deviation; a detector that nobody
has trained stays further away than a trained one."""
_AMP = """Ultralytics checks AMP by a model that it downloads; without a network it says so and leaves AMP on. The
loss is the mean of the last epoch, all of its terms added up."""


def write_report(results: Path, folder: Path) -> list[str]:
    """Write gpu.md, gpu.csv and, of a GPU, gpu.png; return what to say.

    A page about a GPU is not replaced by one about the interpreter.
    """
    machine = json.loads((results / "machine.json").read_text(encoding="utf-8"))
    parts = {name: _read(results / f"{name}.json") for name in machine["parts"]}
    page, table, chart = folder / "gpu.md", folder / "gpu.csv", folder / "gpu.png"
    if not machine["gpu"] and page.is_file() and "\n| GPU | none" not in page.read_text(encoding="utf-8"):
        return [f"{page} is about a GPU and stays as it is; the results of the interpreter are in {results}"]
    contents = {table: _as_csv(parts).encode()}
    drawn = _draw(parts, machine)
    if drawn is not None:
        contents[chart] = drawn
    contents[page] = _as_markdown(parts, machine, chart.name if drawn is not None else None).encode()
    folder.mkdir(parents=True, exist_ok=True)
    write_files_atomically(contents)
    said = [f"file: {path}" for path in contents]
    return said if drawn is not None or not _benched(parts) else [*said, "no chart: matplotlib is not installed here"]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {"complete": False, "missing": [], "items": {}}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _as_csv(parts: dict[str, dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for part, found in parts.items():
        for name, item in found["items"].items():
            error = "" if item["error"] is None else f"{item['error']:.4g}"
            row = [part, name, item["ok"], item["seconds"], error]
            for measure, value in item["measures"].items() or [("", "")]:
                numbers = (
                    [value[key] for key in ("median", "low", "high", "seconds")] if isinstance(value, dict) else [value]
                )
                cells = [f"{number:.6g}" if isinstance(number, float) else number for number in numbers]
                writer.writerow([*row, measure, *cells, *[""] * (4 - len(cells))])
    return text.getvalue()


def _as_markdown(parts: dict[str, dict[str, Any]], machine: dict[str, Any], chart: str | None) -> str:
    sections = ["# On a GPU", _PREFACE, _describe(machine)]
    if not machine["gpu"]:
        sections.append(_INTERPRETED)
    sections += ["## Checks", _ERRORS, _summarise(parts, machine), *_failures(parts)]
    sections += list(_times(parts, chart))
    sections += list(_networks(parts))
    return "\n\n".join(sections) + "\n"


def _describe(machine: dict[str, Any]) -> str:
    gpu = f"{machine['gpu']}, {machine['memory']:.0f} GiB" if machine["gpu"] else "none"
    rows = [["GPU", gpu]]
    if machine["gpu"]:
        rows += [["driver, CUDA", f"{machine['driver']}, {machine['cuda']}"]]
    keys = ("torch", "triton", "ultralytics", "numpy", "python", "rtdetr_act")
    rows.append([", ".join(keys), ", ".join(str(machine[key] or "not installed") for key in keys)])
    return _table(["", ""], [*rows, ["date", machine["date"]]])


def _summarise(parts: dict[str, dict[str, Any]], machine: dict[str, Any]) -> str:
    rows = []
    for name, found in parts.items():
        items = found["items"].values()
        errors = [item["error"] for item in items if item["error"] is not None]
        too_large = sum(item["said"].startswith("not run") for item in items)
        state = "" if found["complete"] else "not complete"
        state += f"{too_large} not run" if too_large else ""
        if found["missing"]:
            state = f"not run: no {' and no '.join(found['missing'])}"
        passed, failed = sum(item["ok"] for item in items) - too_large, sum(not item["ok"] for item in items)
        counts = [f"{passed}", f"{failed}"] if items else ["-", "-"]
        worst, seconds = f"{max(errors):.2f}" if errors else "-", f"{sum(item['seconds'] for item in items):.0f} s"
        rows.append([f"`{name}`", machine["parts"][name], *counts, worst, seconds if items else "-", state])
    return _table(["part", "what it shows", "passed", "failed", "largest error", "time", ""], rows)


def _failures(parts: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"- `{part}`, {name}: {item['said']}"
        for part, found in parts.items()
        for name, item in found["items"].items()
        if not item["ok"]
    ]
    return ["Failed:\n\n" + "\n".join(lines)] if lines else []


def _benched(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the measures by type and shape, and by activation."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for part, content in parts.items():
        if part.startswith("bench-"):
            for name, item in content["items"].items():
                activation, _, shape = name.partition(", ")
                if item["ok"]:
                    found.setdefault(f"{part.removeprefix('bench-')}, {shape}", {})[activation] = item["measures"]
    return found


def _times(parts: dict[str, dict[str, Any]], chart: str | None) -> Iterator[str]:
    if not (benched := _benched(parts)):
        return
    yield "## Times of the activations"
    yield _TIMES
    if chart:
        yield f"![Times of the activations]({chart})"
    for title, rows in benched.items():
        silu = next(iter(rows.values()))["silu"]["seconds"]
        yield f"{title}; SiLU takes {silu * 1e6:.0f} µs."
        head = [
            "activation",
            *FORMS,
            "of the limit",
            "ours, with launches",
            "published, with launches",
            "kept",
            "kept, published",
        ]
        body = []
        for name, m in rows.items():
            cells = [_ratio(m.get(form)) for form in FORMS]
            launches = [_ratio(m[f"{form}, with launches"]) for form in ("ours", "published")]
            kept = [f"{m[f'{form}, MiB kept']:.0f} MiB" for form in ("ours", "published")]
            body.append([name, *cells, f"{m['ours, of the limit']:.0%}", *launches, *kept])
        yield _table(head, body)


def _networks(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    if items := _passed(parts, "detectors"):
        yield "## Detectors at 640 pixels"
        yield _DETECTORS
        body = []
        for name, item in items.items():
            measures = item["measures"]
            for variant in dict.fromkeys(key.partition(",")[0] for key in measures):
                step, inference = measures[f"{variant}, step"], measures[f"{variant}, inference"]
                memory = [f"{measures[f'{variant}, {what}']:.0f} MiB" for what in ("peak MiB", "MiB kept")]
                times = f"{step['seconds'] * 1e3:.1f} ms", f"{inference['seconds'] * 1e3:.2f} ms"
                body.append([name, variant, _ratio(step), times[0], _ratio(inference), times[1], *memory])
        yield _table(["detector", "activation", "step", "", "inference", "", "peak memory", "kept for backward"], body)
    timed = {name: item for name, item in _passed(parts, "dynamic-convolution").items() if item["measures"]}
    if timed:
        yield "## Dynamic convolution"
        yield _DYNAMIC
        forms = list(dict.fromkeys(form for item in timed.values() for form in item["measures"]))
        rows = [
            [name.removeprefix("time: "), *(_ratio(item["measures"].get(f)) for f in forms)]
            for name, item in timed.items()
        ]
        yield _table(["layer", *forms], rows)
    for part, title in (("trainings", "## Trainings"), ("refit", "## Refit")):
        if items := _passed(parts, part):
            yield title
            yield _AMP if part == "trainings" else _REFIT
            names = list(dict.fromkeys(name for item in items.values() for name in item["measures"]))
            rows = [
                [
                    name,
                    *(f"{item['measures'][key]:.4g}" if key in item["measures"] else "-" for key in names),
                    item["said"],
                ]
                for name, item in items.items()
            ]
            yield _table(["", *names, ""], rows)


def _passed(parts: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return {key: item for key, item in parts[name]["items"].items() if item["ok"]}


def _ratio(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _draw(parts: dict[str, dict[str, Any]], machine: dict[str, Any]) -> bytes | None:
    """Return the times of the larger maps as a picture; None without them, or without matplotlib."""
    benched = _benched(parts)
    if not benched:
        return None
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    from rtdetr_act.analysis.figures import render_figure
    from rtdetr_act.integrations.ultralytics.costs import bars_figure

    largest = max((title.partition(", ")[2] for title in benched), key=_elements)
    panels = {
        f"{machine['gpu']}, {title}": {
            name: {form: measures[form]["median"] for form in FORMS if form in measures}
            for name, measures in rows.items()
        }
        for title, rows in benched.items()
        if title.endswith(largest)
    }
    return render_figure(bars_figure(panels, "GPU time of forward and backward in units of SiLU"))


def _elements(shape: str) -> int:
    count = 1
    for side in shape.split("x"):
        count *= int(side)
    return count
