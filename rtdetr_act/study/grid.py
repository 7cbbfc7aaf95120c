"""The runs of a study: a study file or options are expanded into run configurations, and checked before any starts."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from ultralytics.cfg import DEFAULT_CFG_DICT

from rtdetr_act.errors import InputError, RtdetrActError, SpecError, quote, suggest
from rtdetr_act.integrations.ultralytics.arguments import check_arguments
from rtdetr_act.integrations.ultralytics.configs import DEFAULT_MODEL
from rtdetr_act.integrations.ultralytics.datasets import check_data, resolve_data
from rtdetr_act.integrations.ultralytics.models import STOCK, load_variant
from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS
from rtdetr_act.study.decode import MAX_INT, NonNegativeInt, is_json_value, is_utf8
from rtdetr_act.study.naming import (
    make_path_key,
    make_value_key,
    name_folders,
    name_paths,
    name_values,
    shorten,
    to_single_line,
)
from rtdetr_act.study.storage import RUN_FILE, make_damaged_error, read_json
from rtdetr_act.surgery.model_plan import is_model_yaml
from rtdetr_act.surgery.plan import Plan, Scope, check_scope
from rtdetr_act.yaml_files import read_yaml_mapping

# Ultralytics arguments that a study sets itself; `save=False` would leave no checkpoint to score.
RESERVED_ARGUMENTS = ("model", "data", "seed", "name", "project", "exist_ok", "task", "mode", "resume", "save", "time")
_STUDY_KEYS = (
    "model", "data", "activations", "where", "baseline", "seeds", "scope", "act_lr", "split_seeds", "average_last",
)  # fmt: skip
SPLIT_FILE = Path("split", "data.yaml")  # in the folder of a run whose seed divides the images
EMBEDDED_DATA = "shapes"  # the embedded data set, generated at first use
DEFAULTS = MappingProxyType({"model": DEFAULT_MODEL, "data": EMBEDDED_DATA})
MAX_RUNS = 10_000  # each has a folder and a process
_MAX_SEED = 2**31 - 1  # Ultralytics adds the rank of the process, and NumPy takes 32 bits
_SIZE_ARGUMENTS = ("epochs", "batch", "imgsz")


@dataclass(frozen=True)
class Study:
    """Definition of a study, whose runs are all combinations of activations, models, data sets, arguments and seeds.

    Attributes:
        activations: Plans as strings or as plain data (`Plan.to_yaml`), and "stock" for the model as it is.
        models: Model YAMLs or checkpoints.
        data: Data sets.
        seeds: Seeds of each variant. Default: 0, 1 and 2.
        baseline: Activation that others are compared with; one of `activations` as `format_activation` writes it.
        scope: "conv" for convolutional sites, "all" for transformer sites too.
        act_lr: Factor on the learning rate of activation parameters.
        split_seeds: Whether each seed also divides the images into training and validation anew.
        average_last: Number of last epochs whose mean weights are scored beside the best checkpoint; 0 for none.
        arguments: Ultralytics arguments; a list contains values that are combined with all others.
    """

    activations: tuple[Any, ...]
    models: tuple[str, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = ""
    scope: Scope = "conv"
    act_lr: float = 1.0
    split_seeds: bool = False
    average_last: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """Configuration of one run of a study, the contents of its `run.json`.

    Attributes:
        name: Name of its folder.
        variant: Name shared by runs that differ in the seed only.
        setting: Name shared with the baseline it is compared with; "" if only the activation varies.
        activation: Plan as a string or plain data, or "stock".
        model, data, scope, act_lr, seed, split_seeds, average_last: As in `Study`.
        arguments: Further Ultralytics arguments.

    Raises:
        ValueError: A name has unprintable characters or surplus spaces.
        SpecError: The activation is not a plan.
    """

    name: str
    variant: str
    setting: str
    activation: Any
    model: str
    data: str
    scope: Scope
    act_lr: float
    seed: Annotated[int, (0, _MAX_SEED)]
    arguments: dict[str, Any]
    split_seeds: bool = False
    average_last: NonNegativeInt = 0

    def __post_init__(self) -> None:
        """Check the names and the activation, also of a run read from a file."""
        for key in ("name", "variant", "setting"):
            if getattr(self, key) != to_single_line(getattr(self, key)):
                raise ValueError(f"{key} is {quote(getattr(self, key))}, which is not a line of printable text")
        format_activation(self.activation)

    def to_plain(self) -> dict[str, Any]:
        """Return the configuration as plain data, equal to what is read back from a JSON file."""
        return json.loads(json.dumps(asdict(self)))


def read_run_config(folder: Path) -> RunConfig | None:
    """Return the configuration in a run folder, or None if the folder has no `run.json`.

    Raises:
        InputError: The file is damaged.
    """
    config = read_json(folder / RUN_FILE, RunConfig)
    if config is not None:
        try:
            check_sizes(config.arguments)
        except InputError as error:
            raise make_damaged_error(folder / RUN_FILE, str(error)) from None
    return config


def is_study_file(word: str) -> bool:
    """Return whether a word is the path of a study file: a YAML file that is not a model.

    Raises:
        InputError: The file is not a YAML mapping.
    """
    path = Path(word)
    return path.suffix in (".yaml", ".yml") and path.is_file() and not is_model_yaml(read_yaml_mapping(path))


def define_study(study: Mapping[str, Any] | str | Path) -> Study:
    """Return the study that a study file defines, or a mapping with what one contains.

    Args:
        study: Path of the file, or the mapping.

    Raises:
        RtdetrActError: The file does not exist, or a key or a value is malformed.
    """
    if not isinstance(study, Mapping):
        return make_study(read_study_file(Path(study)))
    _check_keys("the study", study)
    return make_study(study)


def read_study_file(path: Path) -> dict[str, Any]:
    """Return the keys and values of a study file; only the names of the keys are checked.

    Raises:
        InputError: The file does not exist, is not a YAML mapping, or has a key that is neither one of a study nor an
            Ultralytics argument.
    """
    data = read_yaml_mapping(path)
    _check_keys(f"'{path}'", data)
    return data


def _check_keys(owner: str, data: Iterable[Any]) -> None:
    """Check that every key is one of a study or an Ultralytics argument; raises InputError that names the owner."""
    for key in data:
        if key not in _STUDY_KEYS and key not in DEFAULT_CFG_DICT:
            raise InputError(
                f"{owner} has an unknown key {quote(key)}{suggest(key, [*_STUDY_KEYS, *DEFAULT_CFG_DICT])}"
            )


def make_study(given: Mapping[str, Any], *, defaults: Mapping[str, Any] = DEFAULTS) -> Study:
    """Return the study defined by the keys of a study file or by command-line options.

    Args:
        given: Values of `activations`, `model`, `data`, `where`, `seeds`, `baseline`, `scope` and `act_lr`, and
            Ultralytics arguments.
        defaults: Default values of `model` and `data`; the embedded ones if not given.

    Raises:
        RtdetrActError: A value is malformed or given twice.
    """
    activations = _place_activations(_parse_activations(given.get("activations")), _parse_locations(given.get("where")))
    if not activations:
        raise InputError("a study needs activations: name them with act=, or under 'activations:' in the study file")
    labels = list(map(format_activation, activations))
    baseline = given.get("baseline") or (STOCK if STOCK in labels else labels[0])
    if baseline not in labels:
        raise InputError(
            f"the baseline {quote(baseline)} is not one of the activations: {', '.join(map(shorten, labels[:10]))}"
        )
    scope, act_lr = check_scope(given.get("scope", "conv")), given.get("act_lr", 1.0)
    check_act_lr(act_lr)
    split_seeds, average_last = given.get("split_seeds", False), given.get("average_last", 0)
    if not isinstance(split_seeds, bool):
        raise InputError(f"split_seeds must be true or false, not {quote(split_seeds)}")
    if type(average_last) is not int or not 0 <= average_last <= MAX_INT:
        raise InputError(f"average_last must be a number of epochs such as 5, or 0, not {quote(average_last)}")
    return Study(
        activations=tuple(activations),
        models=_parse_paths("model", given.get("model") or defaults["model"]),
        data=_parse_paths("data", given.get("data") or defaults["data"]),
        seeds=_parse_seeds(given.get("seeds", 3)),
        baseline=baseline,
        scope=scope,
        act_lr=act_lr,
        split_seeds=split_seeds,
        average_last=average_last,
        arguments=normalize_arguments({key: value for key, value in given.items() if key not in _STUDY_KEYS}),
    )


def check_act_lr(act_lr: Any) -> None:
    """Check the factor on the learning rate of activation parameters; raises InputError unless it is positive."""
    if isinstance(act_lr, bool) or not isinstance(act_lr, (int, float)) or not 0 < act_lr < MAX_INT:
        raise InputError(f"act_lr must be a factor above 0, such as 10, not {quote(act_lr)}")


def normalize_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return Ultralytics arguments whose values are checked to be plain data; names and types are not checked.

    Raises:
        InputError: A value is neither a string, a number, a boolean, None, nor a list of those, or a list has a value
            twice.
    """
    checked = {}
    for key, value in arguments.items():
        if not is_json_value(value, 2) or isinstance(value, dict):
            raise InputError(f"'{key}' must be text, a number, true, false or a list of these, not {quote(value)}")
        checked[key] = value
        if isinstance(value, list) and key != "device":
            _check_distinct(f"'{key}'", value, make_value_key)
    return checked


def format_activation(activation: Any) -> str:
    """Return an activation of a study as a plan in one line of text.

    Args:
        activation: Plan as a string or plain data, or "stock".

    Raises:
        SpecError: Plain data is not a plan.
    """
    return to_single_line(activation if isinstance(activation, str) else str(Plan.from_yaml(activation)))


def _as_list(value: Any) -> list[Any]:
    """Return a list or tuple as a list, None as [], and any other value as a list of one item."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_distinct(what: str, values: Sequence[Any], identify: Callable[[Any], Hashable]) -> None:
    """Raise InputError if two of some values have equal identities."""
    known: dict[Hashable, Any] = {}
    for value in values:
        identity = identify(value)
        if identity in known:
            first = known[identity]
            twice = "" if first == value and type(first) is type(value) else f", as {quote(first)} too"
            raise InputError(f"{what} has {quote(value)} twice{twice}: the runs would be the same, so leave one out")
        known[identity] = value


def _parse_paths(what: str, value: Any) -> tuple[str, ...]:
    """Return distinct file names from one name or a list; raises InputError."""
    paths = _as_list(value)
    for path in paths:
        if not isinstance(path, str) or not path.strip() or not is_utf8(path) or "\0" in path:
            raise InputError(f"'{what}' must be the name of a file, or a list of names, not {quote(path)}")
    _check_distinct(f"'{what}'", paths, make_path_key)
    return tuple(paths)


def _parse_seeds(value: Any) -> tuple[int, ...]:
    """Return seeds from their number or a list of them; raises InputError."""
    if type(value) is int and value > MAX_RUNS:
        raise InputError(f"{quote(value)} seeds are too many: a study has {MAX_RUNS:,} runs at most")
    seeds = list(range(value)) if type(value) is int else list(value) if isinstance(value, tuple) else value
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed <= _MAX_SEED for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"seeds must be a number such as 3, or a list of different seeds such as [0, 1, 7], not {quote(value)}"
        )
    return tuple(seeds)


def _parse_activations(value: Any) -> list[Any]:
    """Return valid plans, as strings or plain data, from one plan or a list; raises SpecError or InputError."""
    plans = []
    for activation in _as_list(value):
        if not isinstance(activation, (str, Mapping)) or (isinstance(activation, str) and not is_utf8(activation)):
            raise InputError(
                f"an activation of a study must be a name such as 'arelu' or a plan, not {quote(activation)}"
            )
        if isinstance(activation, Mapping) and not is_json_value(activation):
            raise SpecError(f"{quote(activation)} is not a plan: it has other values than text, numbers and lists")
        plain = activation.strip() if isinstance(activation, str) else activation
        Plan.parse(plain) if isinstance(plain, str) else Plan.from_yaml(plain)
        plans.append(plain)
    return plans


def _parse_locations(where: Any) -> list[str]:
    """Return locations, such as "backbone" or "0-9", from a comma-separated string or a list; raises InputError."""
    locations = where.split(",") if isinstance(where, str) else _as_list(where)
    for location in locations:
        if not isinstance(location, (str, int)) or isinstance(location, bool):
            raise InputError(f"'where' must be locations such as 'backbone,neck,0-9', not {quote(location)}")
    return [str(location).strip() for location in locations]


def _place_activations(activations: Sequence[Any], locations: Sequence[str]) -> list[Any]:
    """Return a plan for each combination of activation and location; "stock" has none, and "all" is everywhere."""
    plans: list[Any] = []
    for activation in activations:
        if locations and activation != STOCK and not (isinstance(activation, str) and "@" not in activation):
            raise InputError(
                f"{quote(format_activation(activation))} has a location: leave out where=, or the location"
            )
        everywhere = activation == STOCK or not locations
        plans += [activation] if everywhere else [_place_activation(activation, p) for p in locations]
    # Plans with equal strings are one variant; plans of plain data may differ in parts that the string omits.
    repeated = [name for name, count in Counter(map(format_activation, plans)).items() if count > 1]
    if repeated:
        raise InputError(f"{quote(repeated[0])} is given twice: an activation is one variant of a study")
    return plans


def _place_activation(activation: str, location: str) -> str:
    """Return a plan with a location; `from=` and `init=` stay behind it."""
    return activation if location == "all" else str(Plan.parse(activation, layers=location))


def expand_study(study: Study) -> list[RunConfig]:
    """Return the run configurations of a study, ordered by seed, so that all variants get a first result early.

    Names of runs are distinct, and so are pairs of variant and seed.

    Raises:
        InputError: A list is empty, or there are more than 10,000 runs.
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
    for quoted in (False, True):  # quoted if spaces within names make two variants equal
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
            split_seeds=study.split_seeds,
            average_last=study.average_last,
        )
        for seed in study.seeds
        for variant, setting, activation, model, data, more in variants
    ]


def _name_settings(
    models: Sequence[str], data: Sequence[str], axes: Mapping[str, Sequence[Any]], quoted: bool
) -> list[str]:
    """Return a name for each combination of models, data sets and values, made of those parts that vary."""
    parts = [name_paths(each) for each in (models, data) if len(each) > 1]
    more = {key: values for key, values in axes.items() if len(values) > 1}
    parts += [[f"{key}={name}" for name in name_values(values)] for key, values in more.items()]
    if quoted:
        parts = [[ascii(name) if {" ", "'", '"'} & set(name) else name for name in part] for part in parts]
    return [" ".join(each) for each in itertools.product(*parts)]


def _tuples_to_lists(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with tuples, which are single values, converted to lists, as a JSON file would."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}


def _default_arguments(data: str) -> dict[str, Any]:
    """Return default arguments for a data set: those of `rtdetr-act train` for the embedded one, with validation."""
    return {**SHAPES_SETTINGS, "val": True} if data == EMBEDDED_DATA else {}


def check_runs(runs: Sequence[RunConfig], known: Container[str] = (), *, read_only: bool = False) -> None:
    """Check arguments, data set and model of each run before the first one starts.

    Args:
        runs: All runs of a study.
        known: Names of runs that need no check.
        read_only: Do not generate the embedded data set.

    Raises:
        RtdetrActError: A run is not possible; the message names it.
    """
    checked: set[str] = set()  # runs that differ in the seed only are checked once
    for number, run in enumerate(runs, 1):
        key = repr((run.activation, run.model, run.data, run.scope, run.act_lr, run.arguments))
        if key in checked or run.name in known:
            continue
        checked.add(key)
        try:
            check_arguments(run.arguments, RESERVED_ARGUMENTS)
            check_sizes(run.arguments)
            _, model = load_variant(run.model, run.activation, scope=run.scope, act_lr=run.act_lr)
            find_splits(run.data, str(model.task), read_only=read_only)
            _check_evaluation(run, str(model.task))
        except RtdetrActError as error:
            raise type(error)(f"run {number} of {len(runs)} ({run.name}): {error}") from error


def _check_evaluation(run: RunConfig, task: str) -> None:
    """Check that the images of a run can be divided anew, and its last epochs averaged; raises InputError."""
    if run.split_seeds and task == "classify":
        raise InputError("split_seeds divides lists of images, and the classes of a data set to classify are folders")
    if run.average_last > count_epochs(run):
        raise InputError(f"average_last={run.average_last} is more than the {count_epochs(run)} epochs of a run")
    device = run.arguments.get("device")
    if run.average_last and len(device if isinstance(device, list) else str(device).split(",")) > 1:
        raise InputError("average_last needs runs on one device each: name one, or leave device= out")


def find_splits(data: str, task: str, *, read_only: bool = False) -> dict[str, Any]:
    """Return the image sources of a data set, by "train" and "val".

    Args:
        data: Data set YAML, or "shapes" for the embedded one.
        task: Task of the model.
        read_only: Do not generate the embedded data set, whose splits are then missing in the result.

    Returns:
        For each split, the path of a folder or of a text file with a path per line, or a list of such paths.

    Raises:
        InputError: The data set or one of its splits does not exist.
    """
    if read_only and data == EMBEDDED_DATA and task == "detect" and not Path(data).exists():
        return {}
    checked = check_data(resolve_data(data), task)
    splits = {"train": checked.get("train"), "val": checked.get("val") or checked.get("test")}
    for split, paths in splits.items():
        for path in paths if isinstance(paths, (list, tuple)) else [paths]:
            if not isinstance(path, (str, Path)) or not Path(path).exists():
                raise InputError(f"data set {quote(data)}: its '{split}' is {quote(path)}, which does not exist")
    return splits


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Check that `epochs`, `batch` and `imgsz` are positive integers where they are given.

    Raises:
        InputError: One of them is not.
    """
    for key in _SIZE_ARGUMENTS:
        value = arguments.get(key, 1)
        if key == "batch" and type(value) in (int, float) and value < 1:
            raise InputError(f"batch={quote(value)} would choose a size per variant: give a number of images")
        if type(value) is not int or value < 1:
            raise InputError(f"{key}={quote(value)} is not a whole number of at least 1")


def count_epochs(run: RunConfig) -> int:
    """Return the number of epochs of a run, Ultralytics' default if it is not set."""
    return int(run.arguments.get("epochs", DEFAULT_CFG_DICT["epochs"]))


def format_command(run: RunConfig, folder: Path) -> str:
    """Return a command line that repeats a run outside of the study, whose folder has the split of its images."""
    data = str(folder / SPLIT_FILE) if run.split_seeds else run.data
    options: dict[str, Any] = {"model": run.model, "data": data, "act": format_activation(run.activation)}
    if run.activation != STOCK:
        options |= {"scope": run.scope} if run.scope != "conv" else {}
        options |= {"act_lr": run.act_lr} if run.act_lr != 1.0 else {}
    words = [f"{key}={value}" for key, value in {**options, **run.arguments, "seed": run.seed}.items()]
    return shlex.join(["rtdetr-act", "train", *words])


def describe_difference(runs: Iterable[RunConfig], recorded: Mapping[str, RunConfig]) -> str:
    """Return a description of the first difference between recorded runs and a study, or "" if it may continue them.

    A study may have further activations, seeds or values.

    Args:
        runs: Runs of the study.
        recorded: Runs in its folder, by name.
    """
    planned = {run.name: run.to_plain() for run in runs}
    for name, run in recorded.items():
        if name not in planned:
            return f"its run {quote(name)} is not in this study"
        old, new = run.to_plain(), planned[name]
        if key := next((key for key in new if key != "arguments" and old[key] != new[key]), ""):
            return f"its run {quote(name)} has {key} {quote(old[key])}, this study {quote(new[key])}"
        was, now = old["arguments"], new["arguments"]
        for key in {**was, **now}:
            if key not in was or key not in now or was[key] != now[key]:
                words = [f"{key}={quote(each[key])}" if key in each else f"no {key}" for each in (was, now)]
                return f"its run {quote(name)} has arguments with {words[0]}, this study with {words[1]}"
    return ""
