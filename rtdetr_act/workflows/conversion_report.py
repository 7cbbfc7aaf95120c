"""The report of a conversion: Markdown, and one page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from rtdetr_act.analysis.figures import COLOURS, TWO_COLUMNS, figure_style, render_figure
from rtdetr_act.analysis.quantisation_figure import draw_quantisation_errors
from rtdetr_act.errors import quote
from rtdetr_act.files import convert_write_errors, write_files_atomically
from rtdetr_act.formatting import UNKNOWN, format_count, format_number, join_words
from rtdetr_act.integrations.ultralytics.runs import slug
from rtdetr_act.tables import format_markdown_table
from rtdetr_act.workflows.conversion import Conversion, Step

_TEMPLATE = "conversion.html.j2"


@dataclass(frozen=True)
class _Table:
    """A table of the report, whose columns but the first `texts` ones are numbers; the page shows its picture first."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    picture: str = ""


def write_report(conversion: Conversion) -> list[Path]:
    """Write `report.md`, `report.html` and, with INT8, `int8-errors-*.csv` into the folder of a finished conversion.

    All of them are written or none.

    Returns:
        The paths of the files.

    Raises:
        InputError: They cannot be written; older ones are then as they were.
    """
    summary, tables = summarise_conversion(conversion), _make_tables(conversion)
    contents = {
        conversion.folder / "report.md": _format_markdown(conversion, summary, tables).encode(),
        conversion.folder / "report.html": _render_page(conversion, summary, tables).encode(),
    }
    for activation, errors in conversion.quantisation.items():
        contents[conversion.folder / f"int8-errors-{slug(activation)}.csv"] = errors.to_csv().encode()
    with convert_write_errors(conversion.folder):
        write_files_atomically(contents)
    return list(contents)


def summarise_conversion(conversion: Conversion) -> list[str]:
    """Return the outcome in sentences.

    Args:
        conversion: A conversion that has a winner.
    """
    request, stock, kept = conversion.request, conversion.stock, conversion.kept
    assert stock is not None and kept is not None
    name = list(stock.scores)[-1]
    source = Path(request.source).name
    loss = conversion.loss(kept)
    change = f"{format_percent(abs(loss))} {'less' if loss >= 0 else 'more'}"
    sentences = [
        f"{source} with {kept.activation} has {name} {kept.score:.4f} on {Path(request.data).name}, {change} than as "
        f"it was trained ({stock.score:.4f})."
    ]
    how = {"trained": f"It was refitted and trained for {kept.epochs} epochs."}
    sentences.append(how.get(kept.name, f"It was {kept.name}, not trained."))
    if not conversion.within_bound:
        sentences.append(
            f"That is more than the bound of {format_percent(request.bound)}: give more epochs=, or keep=."
        )
    if conversion.operators:
        sentences.append(f"{conversion.operators}.")
    for failed, failure in conversion.failures.items():
        sentences.append(f"{failed} failed: {failure}.")
    return sentences


def format_percent(share: float) -> str:
    """Return a share as a percentage with one decimal.

    >>> format_percent(0.0123)
    '1.2 %'
    """
    return format_number(100 * share, "{:.1f} %")


def _make_tables(conversion: Conversion) -> list[_Table]:
    tables = [_make_steps(conversion)]
    if conversion.files:
        tables.append(_make_files(conversion))
    if conversion.quantisation:
        tables.append(_make_quantisation(conversion))
    if conversion.operator_rows:
        tables.append(_make_operators(conversion))
    return tables


def _make_steps(conversion: Conversion) -> _Table:
    stock = conversion.stock
    assert stock is not None
    names = list(stock.scores)

    def describe(step: Step) -> tuple[str, ...]:
        loss = UNKNOWN if step is stock else format_percent(conversion.loss(step))
        taken = step == conversion.kept
        return (
            step.activation,
            f"{step.name}, {step.epochs} epochs" if step.epochs else step.name,
            "yes" if taken else "",
            *(f"{step.scores[name]:.4f}" for name in names),
            loss,
            f"{step.minutes:.1f}" if step.minutes else UNKNOWN,
        )

    note = (
        f"Scores on the validation split of {Path(conversion.request.data).name} at {conversion.request.imgsz} pixels. "
        "Loss: of the last score, relative to the checkpoint; one run each, so that differences of a few thousandths "
        "of the score say nothing. Minutes: without the validation."
    )
    header = ("activation", "step", "taken", *names, "loss", "minutes")
    return _Table("Steps", note, header, tuple(map(describe, conversion.steps)), texts=3)


def _make_files(conversion: Conversion) -> _Table:
    names = list(conversion.files[0].scores)
    rows = tuple(
        (
            each.activation,
            each.format,
            *(format_number(each.scores.get(name), "{:.4f}") for name in names),
            f"{each.milliseconds:.2f}",
            f"{each.ratio:.2f}",
            f"{each.megabytes:.1f}",
            each.path or UNKNOWN,
        )
        for each in conversion.files
    )
    note = (
        "Scores of square images, one by one, as exported files take them. Latency: median of one image on this CPU, "
        "in interleaved rounds; ratio: to the checkpoint in the same format."
    )
    header = ("activation", "format", *names, "ms", "ratio", "MB", "file")
    return _Table("Files", note, header, rows, texts=2)


def _make_quantisation(conversion: Conversion) -> _Table:
    rows = tuple(
        (
            activation,
            each.name,
            each.operator,
            f"{format_number(each.low, '{:.3g}')} to {format_number(each.high, '{:.3g}')}",
            f"{each.own_sqnr:.1f}",
            f"{each.sqnr:.1f}",
            f"{each.drop:.1f}",
        )
        for activation, errors in conversion.quantisation.items()
        for each in errors.find_drops()
    )
    images = next(iter(conversion.quantisation.values())).images
    note = (
        f"Where each network loses most in 8 bits, on {format_count(images, 'validation image')}. SQNR: ratio of "
        "signal to quantisation noise between the float32 and the INT8 file, in dB; own: of the rounding of this "
        "tensor alone; drop: from the worst of the tensors that it is computed from. All tensors: int8-errors-*.csv."
    )
    header = ("activation", "tensor", "operator", "range", "own", "SQNR", "drop")
    picture = _encode(draw_quantisation_errors(conversion.quantisation))
    return _Table("Error of INT8 by layer", note, header, rows, texts=4, picture=picture)


def _make_operators(conversion: Conversion) -> _Table:
    rows = tuple(
        (row["operator"], row["status"], row["note"], row["source"], row["date"], str(row["count"]))
        for row in conversion.operator_rows
    )
    note = "From the documentation named; nothing was compiled or run for the target."
    header = ("operator", "status", "note", "source", "date", "count")
    return _Table(f"Operators on {conversion.request.target}", note, header, rows, texts=5)


def _make_commands(conversion: Conversion) -> list[str]:
    """Return commands that use the files."""
    checkpoint = next((each.path for each in conversion.files if each.format == "torch" and each.path), None)
    if checkpoint is None:
        return []
    path = (conversion.folder / checkpoint).as_posix()
    return [f"yolo val model={path} data={conversion.request.data}", f"rtdetr-act train {path} data=…"]


def _format_markdown(conversion: Conversion, summary: Sequence[str], tables: Sequence[_Table]) -> str:
    parts = [f"# {_title(conversion)}", " ".join(summary)]
    for table in tables:
        alignment = ["---"] * table.texts + ["---:"] * (len(table.header) - table.texts)
        parts += [f"## {table.title}", format_markdown_table(table.header, table.rows, alignment), table.note]
    parts += [f"## {title}\n\n{text}" for title, text in (("Request", _describe_request(conversion)),)]
    if commands := _make_commands(conversion):
        parts.append("```sh\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def _render_page(conversion: Conversion, summary: Sequence[str], tables: Sequence[_Table]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(_TEMPLATE).render(
        title=_title(conversion),
        summary=summary,
        tables=tables,
        image=_encode(draw_steps(conversion)),
        request=_describe_request(conversion),
        commands=_make_commands(conversion),
    )


def _encode(figure: Figure) -> str:
    """Return a figure as the address of an image that contains it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(render_figure(figure, 'svg')).decode()}"


def _title(conversion: Conversion) -> str:
    return f"{Path(conversion.request.source).name} converted to {conversion.winner}"


def _describe_request(conversion: Conversion) -> str:
    request = conversion.request
    words = [f"act={','.join(request.activations)}", f"data={request.data}", f"imgsz={request.imgsz}"]
    words += [f"keep={','.join(request.keep)}"] if request.keep else []
    words += [f"scope={request.scope}"] if request.scope != "conv" else []
    words += [f"for={request.target}"] if request.target else []
    words += [f"bound={request.bound:g}", f"epochs={request.epochs}", f"images={request.images}"]
    words += [f"format={','.join(request.formats)}"] if request.formats else []
    words += ["int8=True"] if request.int8 else []
    words += [f"{key}={value}" for key, value in request.arguments.items()]
    tried = join_words([quote(word).strip("'") for word in words], limit=len(words))
    return f"{request.source} (SHA-256 {request.digest[:12]}…): {tried}."


@figure_style()
def draw_steps(conversion: Conversion) -> Figure:
    """Draw the score after each step, a line per activation, with the checkpoint's score and the bound.

    Args:
        conversion: A conversion that has a winner.
    """
    stock = conversion.stock
    assert stock is not None
    names = list(dict.fromkeys(step.name for step in conversion.steps[1:]))
    figure = Figure(figsize=(TWO_COLUMNS, 2.8))
    axes = figure.subplots()
    axes.axhline(stock.score, color="black", linewidth=0.9, label="as trained")
    bound = stock.score * (1 - conversion.request.bound)
    axes.axhline(bound, color="0.5", linewidth=0.9, linestyle=":", label="bound")
    activations = list(dict.fromkeys(step.activation for step in conversion.steps[1:]))
    for index, activation in enumerate(activations):
        own = [step for step in conversion.steps if step.activation == activation]
        axes.plot(
            [names.index(step.name) for step in own],
            [step.score for step in own],
            marker="o",
            markersize=3.5,
            color=COLOURS[index % len(COLOURS)],
            label=activation,
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(list(stock.scores)[-1])
    axes.set_ylim(0, None)
    figure.legend(loc="outside right upper")
    return figure
