"""What a study runs: a study file or command-line words become rows, each a run, checked before the first starts."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ultralytics.cfg import DEFAULT_CFG_DICT

from rtdetr_act.errors import InputError, RtdetrActError, SpecError, quote, suggest
from rtdetr_act.integrations.ultralytics.arguments import check_arguments
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.models import STOCK, load_variant
from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS
from rtdetr_act.study.decode import MAX_INT, is_json_value, is_utf8
from rtdetr_act.study.naming import (
    name_folders,
    name_paths,
    name_values,
    path_identity,
    shorten,
    to_single_line,
    value_identity,
)
from rtdetr_act.study.storage import RUN_FILE, make_damaged_error, read_json
from rtdetr_act.study.yaml_files import read_yaml_mapping
from rtdetr_act.surgery.plan import Plan

# What a study sets for each run itself; `save=False` would leave no checkpoint to score.
RESERVED_ARGUMENTS = ("model", "data", "seed", "name", "project", "exist_ok", "task", "mode", "resume", "save", "time")
_STUDY_KEYS = ("model", "data", "activations", "where", "baseline", "seeds", "scope", "act_lr")
EMBEDDED_DATA = "shapes"  # the data set that is drawn at first use
MAX_RUNS = 10_000  # a folder and a process each; far more than anyone has the time for
_MAX_SEED = 2**31 - 1  # Ultralytics adds the process's number to it, and NumPy takes 32 bits
_SIZE_ARGUMENTS = ("epochs", "batch", "imgsz")


@dataclass(frozen=True)
class Study:
    """What to compare. Every list but those of `activations` and `seeds` multiplies the runs.

    Attributes:
        activations: Plans as text or as plain data (`Plan.to_yaml`), and "stock".
        models: Model YAMLs or checkpoints.
        data: Data sets.
        seeds: Seeds that every variant runs with.
        baseline: The activation that others are compared with; "" for "stock" where it runs, else for the first.
        scope: "conv" or "all".
        act_lr: Factor on the learning rate of activation parameters.
        arguments: Ultralytics arguments; a list holds values to run one by one.
    """

    activations: tuple[Any, ...]
    models: tuple[str, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = ""
    scope: str = "conv"
    act_lr: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """One run of a study; equal rows give equal runs.

    Attributes:
        name: Of its folder.
        variant: All that tells it from other rows but the seed.
        setting: What it shares with the row it is compared with; "" where only the activation varies.
        activation: The plan, as text or plain data, or "stock".
        model, data, scope, act_lr, seed: As in `Study`.
        arguments: Further Ultralytics arguments.

    Raises:
        ValueError: A name cannot be shown, or a size is no whole number.
        SpecError: The activation is no plan.
    """

    name: str
    variant: str
    setting: str
    activation: Any
    model: str
    data: str
    scope: str
    act_lr: float
    seed: Annotated[int, (0, _MAX_SEED)]
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        """Check what other parts of a study rely on, of a row read from a file too."""
        for key in ("name", "variant", "setting"):
            if getattr(self, key) != to_single_line(getattr(self, key)):
                raise ValueError(f"{key} is {quote(getattr(self, key))}, which cannot be shown")
        format_activation(self.activation)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data, equal to what is read back from a file."""
        return json.loads(json.dumps(asdict(self)))


def read_run_config(folder: Path) -> RunConfig | None:
    """Return which row a run folder is for, or None where it says nothing; raises InputError where that is damaged."""
    row = read_json(folder / RUN_FILE, RunConfig)
    if row is not None:
        try:
            check_sizes(row.arguments)
        except InputError as error:
            raise make_damaged_error(folder / RUN_FILE, str(error)) from None
    return row


def read_study_file(path: Path) -> dict[str, Any]:
    """Return the keys of a study file, checked for their names only.

    Raises:
        InputError: There is no such file, it is no YAML mapping, or it has neither a key of ours nor of Ultralytics.
    """
    data = read_yaml_mapping(path)
    for key in data:
        if key not in _STUDY_KEYS and key not in DEFAULT_CFG_DICT:
            raise InputError(
                f"'{path}' has an unknown key {quote(key)}{suggest(key, [*_STUDY_KEYS, *DEFAULT_CFG_DICT])}"
            )
    return data


def make_study(given: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> Study:
    """Make a study of the keys of a study file or the options of the command line.

    Args:
        given: `activations`, `model`, `data`, `where`, `seeds`, `baseline`, `scope`, `act_lr`, and arguments of
            Ultralytics.
        defaults: Values of `model` and `data` where they are not given.

    Raises:
        RtdetrActError: A value has a wrong form, or is given twice.
    """
    activations = _place_activations(_parse_activations(given.get("activations")), _parse_locations(given.get("where")))
    if not activations:
        raise InputError("a study needs activations: name them with --act, or under 'activations:' in the study file")
    labels = list(map(format_activation, activations))
    baseline = given.get("baseline") or (STOCK if STOCK in labels else labels[0])
    if baseline not in labels:
        raise InputError(
            f"the baseline {quote(baseline)} is none of the activations: {', '.join(map(shorten, labels[:10]))}"
        )
    scope, act_lr = given.get("scope", "conv"), given.get("act_lr", 1.0)
    check_swap_options(scope, act_lr)
    return Study(
        activations=tuple(activations),
        models=_parse_paths("model", given.get("model") or defaults["model"]),
        data=_parse_paths("data", given.get("data") or defaults["data"]),
        seeds=_parse_seeds(given.get("seeds", 3)),
        baseline=baseline,
        scope=scope,
        act_lr=act_lr,
        arguments=normalize_arguments({key: value for key, value in given.items() if key not in _STUDY_KEYS}),
    )


def check_swap_options(scope: Any, act_lr: Any) -> None:
    """Check how activations are swapped in; raises InputError."""
    if scope not in ("conv", "all"):
        raise InputError(f"scope is conv or all, not {quote(scope)}")
    if isinstance(act_lr, bool) or not isinstance(act_lr, (int, float)) or not 0 < act_lr < MAX_INT:
        raise InputError(f"act_lr is a factor above 0, such as 10, not {quote(act_lr)}")


def normalize_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as plain data, tuples as lists within a list; their names and types are checked later.

    Raises:
        InputError: A value is neither text, a number, a word such as true, nor a list of those, or is given twice.
    """
    found = {}
    for key, value in arguments.items():
        if not is_json_value(value, 2) or isinstance(value, dict):
            raise InputError(f"'{key}' is text, a number, true, false or a list of these, not {quote(value)}")
        found[key] = value
        if isinstance(value, list) and key != "device":
            _check_distinct(f"'{key}'", value, value_identity)
    return found


def format_activation(activation: Any) -> str:
    """Return the text of an activation given as text or plain data, in one line; raises SpecError for no plan."""
    return to_single_line(activation if isinstance(activation, str) else str(Plan.from_yaml(activation)))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_distinct(what: str, values: Sequence[Any], identify: Callable[[Any], Hashable]) -> None:
    known: dict[Hashable, Any] = {}
    for value in values:
        identity = identify(value)
        if identity in known:
            first = known[identity]
            twice = "" if first == value and type(first) is type(value) else f", as {quote(first)} too"
            raise InputError(f"{what} has {quote(value)} twice{twice}: the runs would be the same, so leave one out")
        known[identity] = value


def _parse_paths(what: str, value: Any) -> tuple[str, ...]:
    paths = _as_list(value)
    for path in paths:
        if not isinstance(path, str) or not path.strip() or not is_utf8(path) or "\0" in path:
            raise InputError(f"'{what}' is the name of a file, or a list of those, not {quote(path)}")
    _check_distinct(f"'{what}'", paths, path_identity)
    return tuple(paths)


def _parse_seeds(value: Any) -> tuple[int, ...]:
    if type(value) is int and value > MAX_RUNS:
        raise InputError(f"{quote(value)} seeds are too many: a study has {MAX_RUNS:,} runs at most")
    seeds = list(range(value)) if type(value) is int else list(value) if isinstance(value, tuple) else value
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed <= _MAX_SEED for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"seeds are a number such as 3, or a list of different seeds such as [0, 1, 7], not {quote(value)}"
        )
    return tuple(seeds)


def _parse_activations(value: Any) -> list[Any]:
    """Return plans as text or plain data, each of which can be read; raises SpecError and InputError."""
    found = []
    for activation in _as_list(value):
        if not isinstance(activation, (str, Mapping)) or (isinstance(activation, str) and not is_utf8(activation)):
            raise InputError(f"an activation of a study is a name such as 'arelu' or a plan, not {quote(activation)}")
        if isinstance(activation, Mapping) and not is_json_value(activation):
            raise SpecError(f"{quote(activation)} is not a plan: it has other values than text, numbers and lists")
        plain = activation.strip() if isinstance(activation, str) else activation
        Plan.parse(plain) if isinstance(plain, str) else Plan.from_yaml(plain)
        found.append(plain)
    return found


def _parse_locations(where: Any) -> list[str]:
    places = where.split(",") if isinstance(where, str) else _as_list(where)
    for place in places:
        if not isinstance(place, (str, int)) or isinstance(place, bool):
            raise InputError(f"'where' is places such as 'backbone,neck,0-9', not {quote(place)}")
    return [str(place).strip() for place in places]


def _place_activations(activations: Sequence[Any], places: Sequence[str]) -> list[Any]:
    """Put each activation at each place; the stock model has no place, and "all" is everywhere."""
    found: list[Any] = []
    for activation in activations:
        if places and activation != STOCK and not (isinstance(activation, str) and "@" not in activation):
            raise InputError(
                f"{quote(format_activation(activation))} names its places itself: leave --where out, or the places"
            )
        alone = activation == STOCK or not places
        found += [activation] if alone else [f"{activation}@{p}" if p != "all" else activation for p in places]
    # Plans of one text are one variant; those of plain data may differ in what the text leaves out.
    repeated = [name for name, count in Counter(map(format_activation, found)).items() if count > 1]
    if repeated:
        raise InputError(f"{quote(repeated[0])} is given twice: an activation is one variant of a study")
    return found


def expand_study(study: Study) -> list[RunConfig]:
    """Return the runs of a study, seeds in the outermost loop, so that every variant has its first soon.

    No two have one name, nor one variant and seed, and none that look alike.

    Raises:
        InputError: A list is empty, or the runs are too many.
    """
    axes = {key: value for key, value in study.arguments.items() if isinstance(value, list) and key != "device"}
    if empty := [key for key, value in axes.items() if not value]:
        raise InputError(f"'{empty[0]}=[]' has no value to run with: give at least one")
    count = math.prod(map(len, (study.activations, study.models, study.data, study.seeds, *axes.values())))
    if count > MAX_RUNS:
        raise InputError(f"this study would have {count:,} runs, and {MAX_RUNS:,} are the most: give fewer values")
    fixed = {key: value for key, value in study.arguments.items() if key not in axes}
    labels = list(map(format_activation, study.activations))
    variants: list[tuple[str, str, Any, str, str, dict[str, Any]]] = []
    for quoted in (False, True):  # where blanks within names made two variants the same
        settings = _name_settings(study.models, study.data, axes, quoted)
        combinations = itertools.product(study.models, study.data, *axes.values())
        variants = [
            (f"{name} {setting}".strip(), setting, activation, model, data, dict(zip(axes, values, strict=True)))
            for setting, (model, data, *values) in zip(settings, combinations, strict=True)
            for name, activation in zip(labels, study.activations, strict=True)
        ]
        if len({variant[0] for variant in variants}) == len(variants):
            break
    names = name_folders([variant[0] for variant in variants])
    return [
        RunConfig(
            name=f"{names[variant]}-s{seed}",
            variant=variant,
            setting=setting,
            activation=activation,
            model=model,
            data=data,
            scope=study.scope,
            act_lr=study.act_lr,
            seed=seed,
            arguments=_tuples_to_lists({**_default_arguments(data), **fixed, **more}),
        )
        for seed in study.seeds
        for variant, setting, activation, model, data, more in variants
    ]


def _name_settings(
    models: Sequence[str], data: Sequence[str], axes: Mapping[str, Sequence[Any]], quoted: bool
) -> list[str]:
    """Return a name for each combination of models, data sets and values, in their order, without what is the same."""
    parts = [name_paths(each) for each in (models, data) if len(each) > 1]
    more = {key: values for key, values in axes.items() if len(values) > 1}
    parts += [[f"{key}={name}" for name in name_values(values)] for key, values in more.items()]
    if quoted:
        parts = [[ascii(name) if {" ", "'", '"'} & set(name) else name for name in part] for part in parts]
    return [" ".join(each) for each in itertools.product(*parts)]


def _tuples_to_lists(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with tuples, which are one value and no axis, as the lists that a file makes of them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}


def _default_arguments(data: str) -> dict[str, Any]:
    """Return what the embedded data set is trained with, as by `rtdetr-act train`, but validated for the curves."""
    return {**SHAPES_SETTINGS, "val": True} if data == EMBEDDED_DATA else {}


def check_runs(rows: Sequence[RunConfig], known: Container[str] = (), *, looking: bool = False) -> None:
    """Try everything that can be wrong before the first run: arguments, data sets, and each activation in its model.

    Args:
        rows: All rows of the study.
        known: Names of those that were checked before.
        looking: Do not draw the embedded data set.

    Raises:
        RtdetrActError: Naming the row at fault.
    """
    checked: set[str] = set()
    for number, row in enumerate(rows, 1):
        key = repr((row.activation, row.model, row.data, row.scope, row.act_lr, row.arguments))
        if key in checked or row.name in known:
            continue
        checked.add(key)
        try:
            check_arguments(row.arguments, RESERVED_ARGUMENTS)
            check_sizes(row.arguments)
            _, model = load_variant(row.model, row.activation, scope=row.scope, act_lr=row.act_lr)
            find_splits(row.data, str(model.task), looking=looking)
        except RtdetrActError as error:
            raise type(error)(f"row {number} of {len(rows)} ({row.name}): {error}") from error


def find_splits(data: str, task: str, *, looking: bool = False) -> dict[str, Any]:
    """Return the parts of a data set, "train" and "val", as paths of folders or lists; raises InputError.

    Args:
        data: The data set.
        task: The task of the model.
        looking: Do not draw the embedded data set, whose parts are then left out.
    """
    if looking and data == EMBEDDED_DATA and task == "detect" and not Path(data).exists():
        return {}
    found = check_data(resolve_data(data), task)
    parts = {"train": found.get("train"), "val": found.get("val") or found.get("test")}
    for part, paths in parts.items():
        for path in paths if isinstance(paths, (list, tuple)) else [paths]:
            if not isinstance(path, (str, Path)) or not Path(path).exists():
                raise InputError(f"data set {quote(data)}: its '{part}' is {quote(path)}, which does not exist")
    return parts


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Check what a study counts with: whole numbers of epochs, images and pixels; raises InputError."""
    for key in _SIZE_ARGUMENTS:
        value = arguments.get(key, 1)
        if key == "batch" and type(value) in (int, float) and value < 1:
            raise InputError(f"batch={quote(value)} would choose one per variant: give a number of images")
        if type(value) is not int or value < 1:
            raise InputError(f"{key}={quote(value)} is not a whole number of at least 1")


def format_command(row: RunConfig) -> str:
    """Return the command line that makes the run of a row again, without a study."""
    options = ["--model", row.model, "--data", row.data]
    if row.activation != STOCK:
        if row.scope != "conv":
            options += ["--scope", row.scope]
        if row.act_lr != 1.0:
            options += ["--act-lr", str(row.act_lr)]
    pairs = [f"{key}={value}" for key, value in {**row.arguments, "seed": row.seed}.items()]
    return shlex.join(["rtdetr-act", "train", "--act", format_activation(row.activation), *options, *pairs])


def describe_difference(rows: Iterable[RunConfig], recorded: Mapping[str, RunConfig]) -> str:
    """Say in words how recorded runs differ from the rows of a study, or "" where the study may go on with them.

    More activations, seeds or values than recorded are no difference: a study may grow.
    """
    wanted = {row.name: row.to_json() for row in rows}
    for name, row in recorded.items():
        if name not in wanted:
            return f"its run {quote(name)} is no row of this study"
        old, new = row.to_json(), wanted[name]
        if key := next((key for key in new if key != "arguments" and old[key] != new[key]), ""):
            return f"its run {quote(name)} has {key} {quote(old[key])}, this study {quote(new[key])}"
        was, now = old["arguments"], new["arguments"]
        for key in {**was, **now}:
            if key not in was or key not in now or was[key] != now[key]:
                words = [f"{key}={quote(each[key])}" if key in each else f"no {key}" for each in (was, now)]
                return f"its run {quote(name)} has arguments with {words[0]}, this study with {words[1]}"
    return ""
