"""The record of a conversion: what was asked for, its steps, and the files, kept so that it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rtdetr_act.analysis.quantisation_error import QuantisationErrors, read_errors
from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import convert_write_errors, write_atomically
from rtdetr_act.integrations.ultralytics.results import format_scores
from rtdetr_act.results import Table, TableResult, to_plain

RECORD_FILE = "conversion.json"


@dataclass(frozen=True)
class Request:
    """What a conversion was asked for.

    Attributes:
        source: The checkpoint.
        digest: SHA-256 of the checkpoint.
        activations: The activations to convert to.
        data: The data set.
        imgsz: Side of the images, in pixels.
        keep: Patterns of the sites that stay as they are.
        scope: "conv" or "all".
        target: Deployment target, None without one.
        bound: Largest loss of the score that needs no training, relative to the score of the checkpoint.
        epochs: Epochs of the training, where one is needed.
        formats: Formats to export to.
        int8: Whether to quantise to 8 bits, too.
        images: Number of training images for the fit.
        arguments: Ultralytics' training arguments.
    """

    source: str
    digest: str
    activations: tuple[str, ...]
    data: str
    imgsz: int
    keep: tuple[str, ...]
    scope: str
    target: str | None
    bound: float
    epochs: int
    formats: tuple[str, ...]
    int8: bool
    images: int
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of a conversion.

    Attributes:
        activation: The activation; "stock" for the checkpoint as it is.
        name: "as trained", "swapped", "refitted", "calibrated" or "trained".
        scores: The two headline scores of the task on the validation split, as fractions of 1.
        minutes: Wall time of the step, without its validation.
        epochs: Epochs that were trained.
        path: Checkpoint, relative to the folder; "" if none was kept.
    """

    activation: str
    name: str
    scores: dict[str, float]
    minutes: float = 0.0
    epochs: int = 0
    path: str = ""

    @property
    def score(self) -> float:
        """The score that is compared: the last one, such as mAP50-95."""
        return list(self.scores.values())[-1]


@dataclass(frozen=True)
class DeployedFile:
    """A checkpoint or an exported file, of the network before or after the conversion.

    Attributes:
        activation: The activation; "stock" for the checkpoint as it was.
        format: "torch", "onnx" and so on, followed by " int8" where it is quantised.
        scores: Scores on the validation split, in square images one by one.
        milliseconds: Median time of one image on this CPU.
        ratio: That time relative to the one of the stock network in the same format, median of paired rounds.
        megabytes: Size, in 1e6 bytes.
        path: The file or folder, relative to the folder of the conversion; "" if it was not kept.
    """

    activation: str
    format: str
    scores: dict[str, float]
    milliseconds: float
    ratio: float
    megabytes: float
    path: str = ""


@dataclass(frozen=True, repr=False)
class Conversion(TableResult):
    """Outcome of a conversion.

    Attributes:
        request: What was asked for.
        folder: Folder of the files.
        steps: The steps done, in order; the first one is the checkpoint as it was trained.
        winner: The activation whose network loses least; None as long as not all were tried.
        kept: The step whose network was taken, None as long as there is no winner.
        files: The deployed files.
        operators: What the target runs, in one sentence; "" without a target or an ONNX file.
        operator_rows: Operator, count, status, note, source and date of each operator of the exported graph.
        failures: Why an activation or a format could not be converted to, by its name.
        quantisation: Error of each tensor that the ONNX files in 8 bits hold, by activation, "stock" first.
    """

    request: Request
    folder: Path
    steps: tuple[Step, ...] = ()
    winner: str | None = None
    kept: Step | None = None
    files: tuple[DeployedFile, ...] = ()
    operators: str = ""
    operator_rows: tuple[dict[str, Any], ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
    quantisation: dict[str, QuantisationErrors] = field(default_factory=dict)

    @property
    def stock(self) -> Step | None:
        """The checkpoint as it was trained, None before it was validated."""
        return self.steps[0] if self.steps else None

    def loss(self, step: Step) -> float:
        """Return the loss of a step's score, relative to that of the checkpoint."""
        assert self.stock is not None
        return 1 - step.score / self.stock.score if self.stock.score else 0.0

    def find_step(self, activation: str, name: str) -> Step | None:
        """Return a step that is done, or None."""
        return next((each for each in self.steps if (each.activation, each.name) == (activation, name)), None)

    @property
    def within_bound(self) -> bool:
        """Whether the converted network loses no more than the bound."""
        return self.kept is not None and self.loss(self.kept) <= self.request.bound

    def _summarise(self) -> str:
        """Return the winner and its scores."""
        if self.kept is None:
            return f"{len(self.steps)} steps done"
        return ", ".join([str(self.winner), *format_scores(self.kept.scores), f"loss {self.loss(self.kept):.1%}"])

    def _make_table(self) -> Table:
        """Return a row per step."""
        scores = list(self.stock.scores) if self.stock else []
        rows = (
            (s.activation, s.name, *(s.scores.get(name) for name in scores), self.loss(s), s.epochs, s.minutes, s.path)
            for s in self.steps
        )
        return ("activation", "step", *scores, "loss", "epochs", "minutes", "path"), rows

    def to_dict(self) -> dict[str, Any]:
        """Return the conversion as plain data."""
        return {each.name: to_plain(getattr(self, each.name)) for each in fields(self)}

    def with_step(self, step: Step) -> Conversion:
        """Return the conversion with one more step, and write its record."""
        return self.written(steps=(*self.steps, step))

    def written(self, **changes: Any) -> Conversion:
        """Return the conversion with changes, and write its record.

        Raises:
            InputError: The file cannot be written; the old one is then as it was.
        """
        changed = replace(self, **changes)
        path = self.folder / RECORD_FILE
        with convert_write_errors(path):
            write_atomically(path, json.dumps(changed.to_dict(), indent=1).encode())
        return changed


def read_conversion(folder: Path) -> Conversion | None:
    """Return the conversion that a folder holds the record of, or None without one.

    Raises:
        InputError: The record is damaged.
    """
    path = folder / RECORD_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        request = Request(**_as_tuples(stored["request"], "activations", "keep", "formats"))
        return Conversion(
            request=request,
            folder=folder,
            steps=tuple(Step(**each) for each in stored["steps"]),
            winner=stored["winner"],
            kept=None if stored["kept"] is None else Step(**stored["kept"]),
            files=tuple(DeployedFile(**each) for each in stored["files"]),
            operators=stored["operators"],
            operator_rows=tuple(stored["operator_rows"]),
            failures=stored["failures"],
            quantisation={name: read_errors(each) for name, each in stored["quantisation"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{quote(str(path))} is not the record of a conversion ({type(error).__name__}): remove it, or name "
            "another folder with -o"
        ) from error


def _as_tuples(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: tuple(value) if name in names else value for name, value in values.items()}
