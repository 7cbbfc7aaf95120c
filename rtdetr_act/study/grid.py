"""What a study runs: a study file or command-line words become rows, each a run, checked before the first starts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rtdetr_act.data import SHAPES_SETTINGS
from rtdetr_act.errors import InputError, RtdetrActError, suggest
from rtdetr_act.plan import Plan
from rtdetr_act.runs import STOCK, check_arguments, check_data, load_variant, resolve_data, slug

# What a study sets for each run itself; `save=False` would leave no checkpoint to score.
TAKEN = ("model", "data", "seed", "name", "project", "exist_ok", "task", "mode", "resume", "save", "time")
_KEYS = ("model", "data", "activations", "where", "baseline", "seeds", "scope", "act_lr")


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
class Row:
    """One run of a study; equal rows give equal runs.

    Attributes:
        name: Of its folder.
        variant: All that tells it from other rows but the seed.
        setting: What it shares with the row it is compared with; "" where only the activation varies.
        activation: The plan, as text or plain data, or "stock".
        model, data, scope, act_lr, seed: As in `Study`.
        arguments: Further Ultralytics arguments.
    """

    name: str
    variant: str
    setting: str
    activation: Any
    model: str
    data: str
    scope: str
    act_lr: float
    seed: int
    arguments: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data, equal to what is read back from a file."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Read back what `to_json` gave; raises TypeError where keys are missing or unknown."""
        return cls(**data)


def read_study(path: Path) -> dict[str, Any]:
    """Return the keys of a study file, checked for their names only.

    Raises:
        InputError: There is no such file, it is no YAML mapping, or it has neither a key of ours nor of Ultralytics.
    """
    import yaml
    from ultralytics.cfg import DEFAULT_CFG_DICT

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the study file '{path}': {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"'{path}' is no study: write keys such as 'activations: [stock, arelu]', 'seeds: 3'")
    for key in data:
        if key not in _KEYS and key not in DEFAULT_CFG_DICT:
            raise InputError(f"'{path}' has an unknown key '{key}'{suggest(key, [*_KEYS, *DEFAULT_CFG_DICT])}")
    return data


def make_study(given: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> Study:
    """Make a study of the keys of a study file or the options of the command line.

    Args:
        given: `activations`, `model`, `data`, `where`, `seeds`, `baseline`, `scope`, `act_lr`, and arguments of
            Ultralytics.
        defaults: Values of `model` and `data` where they are not given.

    Raises:
        RtdetrActError: A value has a wrong form.
    """
    activations = _cross(_as_list(given.get("activations")), _places(given.get("where")))
    if not activations:
        raise InputError("a study needs activations: name them with --act, or under 'activations:' in the study file")
    baseline = given.get("baseline", "")
    if not isinstance(baseline, str) or (baseline and baseline not in map(label, activations)):
        raise InputError(f"the baseline '{baseline}' is none of the activations: {', '.join(map(label, activations))}")
    if not baseline:
        baseline = STOCK if STOCK in activations else label(activations[0])
    return Study(
        activations=tuple(activations),
        models=tuple(map(str, _as_list(given.get("model") or defaults["model"]))),
        data=tuple(map(str, _as_list(given.get("data") or defaults["data"]))),
        seeds=_seeds(given.get("seeds", 3)),
        baseline=baseline,
        scope=given.get("scope", "conv"),
        act_lr=given.get("act_lr", 1.0),
        arguments={key: value for key, value in given.items() if key not in _KEYS},
    )


def label(activation: Any) -> str:
    """Return the text of an activation given as text or plain data; raises SpecError for no plan."""
    return activation if isinstance(activation, str) else str(Plan.from_yaml(activation))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds are a number such as 3, or a list of different seeds such as [0, 1, 7], not {value!r}")
    return tuple(seeds)


def _places(where: Any) -> list[str]:
    if isinstance(where, str):
        where = where.split(",")
    return [str(place).strip() for place in _as_list(where)]


def _cross(activations: Sequence[Any], places: Sequence[str]) -> list[Any]:
    """Put each activation at each place; the stock model has no place, and "all" is everywhere."""
    found: list[Any] = []
    for activation in activations:
        if places and activation != STOCK and not (isinstance(activation, str) and "@" not in activation):
            raise InputError(f"'{label(activation)}' names its places itself: leave --where out, or the places")
        alone = activation == STOCK or not places
        found += [activation] if alone else [f"{activation}@{p}" if p != "all" else activation for p in places]
    repeated = [name for name, count in Counter(map(label, found)).items() if count > 1]
    if repeated:
        raise InputError(f"'{repeated[0]}' is given twice: an activation is one variant of a study")
    return found


def make_rows(study: Study) -> list[Row]:
    """Return the runs of a study, seeds in the outermost loop, so that every variant has its first soon.

    Raises:
        InputError: A list is empty.
    """
    lists = {key: value for key, value in study.arguments.items() if isinstance(value, list) and key != "device"}
    if empty := [key for key, value in lists.items() if not value]:
        raise InputError(f"'{empty[0]}=[]' has no value to run with: give at least one")
    fixed = {key: value for key, value in study.arguments.items() if key not in lists}
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    variants = []
    for model, data, more in itertools.product(study.models, study.data, combinations):
        varied = [f"{key}={value}" for key, value in more.items() if len(lists[key]) > 1]
        models = [Path(model).stem] if len(study.models) > 1 else []
        sets = [Path(data).stem] if len(study.data) > 1 else []
        setting = " ".join([*models, *sets, *varied])
        for activation in study.activations:
            name = f"{label(activation)} {setting}" if setting else label(activation)
            variants.append((name, setting, activation, model, data, more))
    names = _folder_names([variant[0] for variant in variants])
    return [
        Row(
            name=f"{names[variant]}-s{seed}",
            variant=variant,
            setting=setting,
            activation=activation,
            model=model,
            data=data,
            scope=study.scope,
            act_lr=study.act_lr,
            seed=seed,
            arguments={**_settings(data), **fixed, **more},
        )
        for seed in study.seeds
        for variant, setting, activation, model, data, more in variants
    ]


def _settings(data: str) -> dict[str, Any]:
    """Return what the embedded data set is trained with, as by `rtdetr-act train`, but validated for the curves."""
    return {**SHAPES_SETTINGS, "val": True} if data == "shapes" else {}


def _folder_names(variants: Sequence[str]) -> dict[str, str]:
    """Return a folder name per variant, with a hash where two would be the same, in upper or lower case."""
    plain = {variant: slug(variant)[:60] for variant in variants}
    counts = Counter(name.casefold() for name in plain.values())
    return {
        variant: name if counts[name.casefold()] == 1 else f"{name}-{hashlib.sha256(variant.encode()).hexdigest()[:6]}"
        for variant, name in plain.items()
    }


def check_rows(rows: Sequence[Row], known: Container[str] = ()) -> None:
    """Try everything that can be wrong before the first run: arguments, data sets, and each activation in its model.

    Args:
        rows: All rows of the study.
        known: Names of those that were checked before.

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
            check_arguments(row.arguments, TAKEN)
            if row.arguments.get("batch", 1) < 1:
                raise InputError(
                    f"batch={row.arguments['batch']} would choose one per variant: give a number of images"
                )
            _, model = load_variant(row.model, row.activation, scope=row.scope, act_lr=row.act_lr)
            check_data(resolve_data(row.data), str(model.task))
        except RtdetrActError as error:
            raise type(error)(f"row {number} of {len(rows)} ({row.name}): {error}") from error


def command_of(row: Row) -> str:
    """Return the command line that makes the run of a row again, without a study."""
    import shlex

    options = ["--model", row.model, "--data", row.data]
    if row.activation != STOCK:
        if row.scope != "conv":
            options += ["--scope", row.scope]
        if row.act_lr != 1.0:
            options += ["--act-lr", str(row.act_lr)]
    pairs = [f"{key}={value}" for key, value in {**row.arguments, "seed": row.seed}.items()]
    return shlex.join(["rtdetr-act", "train", "--act", label(row.activation), *options, *pairs])


def differing(rows: Iterable[Row], recorded: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in words how recorded runs differ from the rows of a study, or "" where the study may go on with them.

    More activations, seeds or values than recorded are no difference: a study may grow.
    """
    wanted = {row.name: row.to_json() for row in rows}
    for name, old in recorded.items():
        if name not in wanted:
            return f"its run '{name}' is no row of this study"
        for key, value in wanted[name].items():
            if old.get(key) != value:
                return f"its run '{name}' has {key} {old.get(key)!r}, this study {value!r}"
    return ""
