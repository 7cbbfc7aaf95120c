"""Options that several commands share, and the words that name several variants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from rtdetr_act.cli.completion import complete_act, complete_data, complete_model, complete_target, complete_word
from rtdetr_act.cli.printing import print_warning
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import check_writable, output_folder
from rtdetr_act.integrations.ultralytics.configs import DEFAULT_MODEL
from rtdetr_act.spec import split_at_commas

DEFAULT_DATA = "shapes"

Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[MODEL] [key=value]…", autocompletion=complete_word, show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Checkpoint or model YAML; or the first word.", autocompletion=complete_model),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Checkpoints or model YAMLs; or the first words.", autocompletion=complete_model),
]
Act = Annotated[
    str | None,
    typer.Option("--act", help="Activation, or plan: 'dyrelu_b@backbone, silu@neck'.", autocompletion=complete_act),
]
Acts = Annotated[
    list[str] | None,
    typer.Option("--act", help="Activation or plan; several: stock,arelu,mish.", autocompletion=complete_act),
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Data set, such as coco8.yaml or shapes.", autocompletion=complete_data),
]
From = Annotated[
    str | None,
    typer.Option("--from", help="Replace only these, such as silu.", autocompletion=complete_act),
]
ScopeOption = Annotated[str, typer.Option("--scope", help="conv, or all for transformer sites too.")]
Verify = Annotated[bool, typer.Option("--verify", help="Count the activations that really run.")]
ActLr = Annotated[float, typer.Option("--act-lr", help="Factor on the learning rate of slopes.")]
Memory = Annotated[str | None, typer.Option("--memory", help="low keeps less for the backward pass.")]
Init = Annotated[str, typer.Option("--init", help="paper, or match to start as the trained network.")]
TargetOption = Annotated[
    str | None,
    typer.Option("--for", help="Warn of what rknn, hailo, … does not run.", autocompletion=complete_target),
]
Fold = Annotated[bool, typer.Option("--fold", help="Fold the activations into the weights first.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the results.")]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")]
Dpi = Annotated[int, typer.Option("--dpi", help="Dots per inch of a PNG; journals ask for 300.")]
Project = Annotated[str | None, typer.Option("--project", help="Folder of result folders; runs if not given.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the result folder.")]


def split_variants(values: Sequence[str] | None, replaces: str | None = None) -> list[str]:
    """Return the variants that some words name: `stock,arelu,mish` are three, and a plan that names places is one.

    A plan of several rules for the whole network would apply only the last, so that commas between such rules
    separate variants.

    Args:
        values: The values of act=.
        replaces: That of from=, which becomes part of each plan.

    Raises:
        InputError: There is a from=, but nothing to put in.
        SpecError: A plan cannot be understood.
    """
    variants = []
    for value in values or []:
        parts = split_at_commas(value)
        variants += parts if _are_variants(parts) else [value]
    if replaces is None:
        return variants
    from rtdetr_act.surgery.plan import Plan

    if set(variants) <= {"stock"}:
        raise InputError("from= says what an activation replaces: name one with act=")
    names = [name.strip() for name in split_at_commas(replaces)]
    return [each if each == "stock" else str(Plan.parse(each, replaces=names)) for each in variants]


def _are_variants(parts: Sequence[str]) -> bool:
    """Return whether texts between commas are plans of their own: one of them is `stock`, or all are for all sites."""
    from rtdetr_act.surgery.plan import Plan

    if len(parts) < 2 or not all(parts):
        return False
    rules = [rule for part in parts if part != "stock" for rule in Plan.parse(part).rules]
    return "stock" in parts or all(not rule.where and rule.replaces == "activation" for rule in rules)


def require(value: str | None, what: str, example: str) -> str:
    """Return a value that a command cannot do without.

    Args:
        value: The value.
        what: What is missing, such as "val needs a checkpoint".
        example: A command line that has it.

    Raises:
        InputError: There is none.
    """
    if not value:
        raise InputError(f"{what}: {example}")
    return value


def check_csv(output: Path | None) -> None:
    """Check that a table can be written to a file, if one is named.

    Raises:
        InputError: Its name does not end in .csv, or it cannot be written.
    """
    if output is not None:
        if output.suffix != ".csv":
            raise InputError(f"{quote(str(output))} is not the name of a CSV file: let it end in .csv")
        check_writable(output)


def add_output(arguments: dict[str, Any], output: Path | None) -> None:
    """Let Ultralytics put its results into a folder; a number is appended to the name if the folder exists.

    Args:
        arguments: Ultralytics' arguments, which get `project` and `name`.
        output: The folder; None to change nothing.

    Raises:
        InputError: The arguments name a place as well.
    """
    if output is None:
        return
    if "project" in arguments or "name" in arguments:
        raise InputError("output= is project= and name= in one: give either")
    arguments.update(project=str(output.absolute().parent), name=output.name)


def choose_folder(kind: str, output: Path | None, project: str | None, name: str | None) -> Path:
    """Return the folder for the results of a command: `output`, else one that does not exist yet.

    Args:
        kind: Name of the folder if `name` is None, such as "bench".
        output: The folder, which may exist.
        project: Folder that it is in; None for `runs` in the working folder.
        name: Its name, with a number appended if it exists.

    Raises:
        InputError: The folder is named twice.
    """
    if output is not None:
        if project or name:
            raise InputError("output= is project= and name= in one: give either")
        return output
    from ultralytics.utils.files import increment_path

    return Path(increment_path(Path(project or "runs", name or kind)))


@contextmanager
def open_file(kind: str, file: str, output: Path | None, project: str | None, name: str | None) -> Iterator[Path]:
    """Yield the path of the file that a command writes, and remove its folder again if that is new and nothing is.

    Args:
        kind: As in `choose_folder`.
        file: Name of the file if `output` is None.
        output: The file, which may exist.
        project: As in `choose_folder`.
        name: As in `choose_folder`.

    Raises:
        InputError: The file is named twice, or its folder cannot be written to.
    """
    folder = choose_folder(kind, output, project, name)
    with nullcontext() if output else output_folder(folder):
        yield output or folder / file


def choose_model(model: str | None) -> str:
    """Return the model given, else the embedded one, with a warning."""
    if not model:
        print_warning(f"without model= this takes {DEFAULT_MODEL}, a nano RT-DETR")
    return model or DEFAULT_MODEL


def choose_model_and_data(model: str | None, data: str | None) -> tuple[str, str]:
    """Return the model and the data set given, else the embedded ones, with a warning."""
    missing = {"model=": f"{DEFAULT_MODEL}, a nano RT-DETR,"} if not model else {}
    missing |= {"data=": f"{DEFAULT_DATA}, drawings that rtdetr-act makes"} if not data else {}
    if missing:
        print_warning(f"without {' and '.join(missing)} this takes {' and '.join(missing.values())}".rstrip(","))
    return model or DEFAULT_MODEL, data or DEFAULT_DATA
