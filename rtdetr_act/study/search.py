"""Search for the activation of each stage: successive halving over studies of increasing length, and a final.

Each rung is an ordinary study in a folder of its own, and each of its runs a complete training with a complete
learning-rate schedule. Plans that survive are trained from the beginning: a longer training has another schedule from
its first step, and the score in the middle of a training is less informative than that of a short complete one.
Continuing would save a third of each run.

Each rung has a seed of its own, and so has each run of the final, so that plans selected by luck have no advantage in
the final comparison.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ultralytics.cfg import DEFAULT_CFG_DICT

from rtdetr_act.activations.registry import resolve
from rtdetr_act.errors import InputError, TrainingError, quote
from rtdetr_act.integrations.ultralytics.arguments import check_arguments, check_positive_integers
from rtdetr_act.integrations.ultralytics.models import STOCK, load_model
from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS
from rtdetr_act.study.grid import (
    DEFAULTS,
    MAX_RUNS,
    RESERVED_ARGUMENTS,
    Study,
    check_act_lr,
    check_sizes,
    normalize_arguments,
)
from rtdetr_act.study.leaderboard import choose_metric
from rtdetr_act.study.preparation import prepare_runs
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.study.run_record import State
from rtdetr_act.study.stages import Stage, find_stages
from rtdetr_act.study.storage import (
    CANDIDATES_FILE,
    SEARCH_FILE,
    folder_exists,
    lock_folder,
    make_damaged_error,
    read_json,
)
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.plan import Plan, Scope, check_scope, format_layers

FINAL = "final"
SEARCH_REPORT_FILES = ("best.yaml", "search.md", "search.csv")  # written at the end of a search
REDUCTION_FACTOR = 3  # factor between the lengths of rungs, and between their numbers of plans
_MIN_EPOCHS = 3  # of the shortest rung, where warm-up takes one (shapes) to three epochs (Ultralytics' default)
_DEFAULT_TRAININGS = 14  # default budget in complete trainings, without the final
_SAMPLING_SEED = 0  # of the sampled plans
_SEARCH_KEYS = ("model", "data", "budget", "seeds", "scope", "act_lr")

Assignment = tuple[str, ...]  # activation of each stage, in the order of the stages


@dataclass(frozen=True)
class Rung:
    """One study of a search.

    Attributes:
        name: Name of its folder.
        plans: Number of plans, each of which runs with all seeds.
        epochs: Epochs per run.
        seeds: The seeds.
    """

    name: str
    plans: int
    epochs: int
    seeds: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Total epochs of all runs."""
        return self.plans * self.epochs * len(self.seeds)


@dataclass(frozen=True)
class Search:
    """Definition of a search.

    Attributes:
        activations: Names with arguments, and "stock".
        model, data, scope, act_lr: As in `Study`, one value each.
        arguments: Ultralytics arguments without `epochs`.
        budget: Maximum total epochs of all trainings, without repeated attempts.
        epochs: Epochs of a complete training, as in the final.
        seeds: Number of runs of each plan in the final.
        stages: Stages of the model, with the activations that each supports.
        rungs: The studies, the final last.
    """

    activations: tuple[str, ...]
    model: str
    data: str
    scope: Scope
    act_lr: float
    arguments: Mapping[str, Any]
    budget: int
    epochs: int
    seeds: int
    stages: tuple[Stage, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Candidate:
    """An assignment in a rung, and how it was selected."""

    assignment: Assignment
    origin: Literal["uniform", "drawn", "kept", "proposed"]


@dataclass(frozen=True)
class Trial:
    """Outcome of one run of a search; without a score, `score` is NaN and `state` is not "done"."""

    rung: str
    candidate: Candidate
    epochs: int
    seed: int
    state: State
    score: float
    metric: str
    reason: str = ""


@dataclass(frozen=True)
class Effect:
    """Effect of an activation in a stage relative to the mean of all activations there, in units of the score.

    Attributes:
        mean: Estimate of the effect.
        error: Its standard error.
    """

    mean: float
    error: float


def define_search(given: Mapping[str, Any]) -> Search:
    """Return the search that a mapping defines: the arguments of `make_search`, and Ultralytics arguments.

    Raises:
        RtdetrActError: A value is malformed, or there are no activations.
    """
    if not given.get("activations"):
        raise InputError("a search needs 'activations' to place, such as ['arelu', 'silu']")
    own = {**DEFAULTS, **{key: given[key] for key in _SEARCH_KEYS if given.get(key) is not None}}
    for key in ("model", "data"):
        if not isinstance(own[key], str):
            raise InputError(f"'{key}' of a search must be one name of a file, not {quote(own[key])}")
    named = given["activations"]
    rest = {key: value for key, value in given.items() if key not in ("activations", *_SEARCH_KEYS)}
    return make_search([named] if isinstance(named, str) else named, arguments=rest, **own)


def make_search(
    activations: Sequence[str],
    *,
    model: str,
    data: str,
    arguments: Mapping[str, Any],
    budget: int | None = None,
    seeds: int = 3,
    scope: str = "conv",
    act_lr: float = 1.0,
) -> Search:
    """Return the search defined by some settings, after checking them.

    Args:
        activations: Activations, each string with one or several separated by commas.
        model, data, scope, act_lr: As in `Study`.
        arguments: Ultralytics arguments; `epochs` is the length of a complete training.
        budget: Total epochs of all trainings; None for fourteen complete trainings and the final.
        seeds: Number of runs of each of the two plans in the final.

    Raises:
        RtdetrActError: An activation, an argument or the model is invalid, or the budget is too small.
    """
    names = parse_activations(activations)
    checked_scope = check_scope(scope)
    check_act_lr(act_lr)
    check_positive_integers(seeds=seeds, **({} if budget is None else {"budget": budget}))
    if seeds > MAX_RUNS:
        raise InputError(f"seeds={quote(seeds)} are too many: a study has {MAX_RUNS:,} runs at most")
    arguments = normalize_arguments(arguments)
    if lists := [key for key, value in arguments.items() if isinstance(value, list) and key != "device"]:
        raise InputError(f"'{lists[0]}' is a list: a search takes a single value of each argument")
    check_arguments(arguments, RESERVED_ARGUMENTS)
    check_sizes(arguments)
    epochs = arguments.get("epochs", _default_epochs(data))
    loaded = load_model(model)
    _check_stock(loaded, model, names)
    stages = find_stages(loaded, names, scope=checked_scope)
    space = math.prod(len(stage.choices) for stage in stages)
    uniform = len(list_uniform_assignments(stages))
    if not uniform:
        raise InputError("no activation is supported in every stage: a search needs one that is, such as silu")
    if space == uniform:
        raise InputError(
            f"there is nothing to mix: the model has {len(stages)} stages, which support at most "
            f"{max(len(s.choices) for s in stages)} activations"
        )
    budget = (_DEFAULT_TRAININGS + 2 * seeds) * epochs if budget is None else budget
    rungs = allocate_rungs(budget, epochs=epochs, seeds=seeds, uniform=uniform, space=space)
    rest = {key: value for key, value in arguments.items() if key != "epochs"}
    return Search(tuple(names), model, data, checked_scope, act_lr, rest, budget, epochs, seeds, stages, rungs)


def parse_activations(texts: Sequence[str]) -> list[str]:
    """Return the names of activations, with their arguments, resolved in the registry.

    Args:
        texts: Strings with one activation or several separated by commas.

    Raises:
        InputError: An activation has a location or is given twice, or there are fewer than two.
        SpecError: An activation is unknown.

    >>> parse_activations(["arelu,swish", "leaky_relu(negative_slope=0.1)"])
    ['arelu', 'silu', 'leaky_relu(negative_slope=0.1)']
    """
    names = []
    for rule in (rule for text in texts for rule in Plan.parse(text).rules):
        if rule.where:
            raise InputError(f"'{rule}' has a location: the search chooses the locations, so give the activation only")
        names.append(STOCK if str(rule.activation) == STOCK else str(resolve(rule.activation)))
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"'{repeated[0]}' is given twice")
    if len(names) < 2:
        raise InputError("a search needs two activations or more: act=arelu,silu")
    return names


def _default_epochs(data: str) -> int:
    """Return the epochs of a complete training on a data set if they are not given."""
    return int(SHAPES_SETTINGS["epochs"] if data == "shapes" else DEFAULT_CFG_DICT["epochs"])


def _check_stock(loaded: Any, model: str, activations: Sequence[str]) -> None:
    """Raise InputError if "stock" is ambiguous: no plan if everywhere, but the model's own plan if in one stage."""
    if STOCK in activations and read_plan(loaded.model):
        raise InputError(f"'{model}' names activations itself, so that 'stock' in one stage is ambiguous: leave it out")


def allocate_rungs(budget: int, *, epochs: int, seeds: int, uniform: int, space: int) -> tuple[Rung, ...]:
    """Return as many rungs as a budget allows, and the final.

    The runs of the rungs take a ninth, a third and the whole of a complete training, and at least three epochs. The
    rungs have equal shares of the budget without the final; the first one also has the remainder.

    Args:
        budget: Maximum total epochs of all trainings.
        epochs: Epochs of a complete training.
        seeds: Number of runs of each of the two plans in the final.
        uniform: Number of uniform assignments, all of which are in the first rung.
        space: Number of all assignments.

    Raises:
        InputError: The budget is too small for one rung and the final, or gives a rung more than 10,000 runs.

    >>> rungs = allocate_rungs(2000, epochs=100, seeds=3, uniform=3, space=729)
    >>> [(rung.name, rung.plans, rung.epochs) for rung in rungs]
    [('rung0', 48, 11), ('rung1', 14, 33), ('rung2', 4, 100), ('final', 2, 100)]
    """
    lengths = [
        length for length in (epochs // REDUCTION_FACTOR**2, epochs // REDUCTION_FACTOR) if length >= _MIN_EPOCHS
    ] + [epochs]
    final = 2 * seeds * epochs
    for count in range(len(lengths), 0, -1):
        if sizes := _allocate_plans(budget - final, lengths[:count], uniform, space):
            if max(*sizes, 2 * seeds) > MAX_RUNS:
                raise InputError(
                    f"this search would have {max(*sizes, 2 * seeds):,} runs in one rung, and {MAX_RUNS:,} are the "
                    "most: give a smaller budget="
                )
            rungs = [Rung(f"rung{k}", sizes[k], lengths[k], (k,)) for k in range(count)]
            return (*rungs, Rung(FINAL, 2, epochs, tuple(range(count, count + seeds))))
    rung = (uniform + 1) * lengths[0]
    raise InputError(
        f"budget={budget} is too small: the final takes {final} epochs (2 plans, seeds={seeds}, epochs={epochs}) "
        f"and the smallest rung before it {rung}, so give {final + rung} or more, or fewer epochs= or seeds="
    )


def _allocate_plans(left: int, lengths: Sequence[int], uniform: int, space: int) -> list[int]:
    """Return the number of plans of each rung, or [] if the epochs are too few for all rungs.

    Args:
        left: Epochs for all rungs.
        lengths: Epochs per run of each rung.
        uniform: Number of uniform assignments.
        space: Number of all assignments.
    """
    sizes = [left // len(lengths) // length for length in lengths]
    sizes[0] = (left - sum(size * length for size, length in zip(sizes[1:], lengths[1:], strict=True))) // lengths[0]
    if sizes[0] < uniform + 1 or min(sizes) < 2:
        return []
    sizes[0] = min(sizes[0], space)
    for k in range(1, len(sizes)):
        sizes[k] = min(sizes[k], max(2, math.ceil(sizes[k - 1] / REDUCTION_FACTOR)))
    return sizes


def list_uniform_assignments(stages: Sequence[Stage]) -> list[Assignment]:
    """Return the assignments with the same activation in all stages, for each that all stages support."""
    first = stages[0].choices if stages else ()
    everywhere = [name for name in first if all(name in stage.choices for stage in stages)]
    return [(activation,) * len(stages) for activation in everywhere]


def is_uniform(assignment: Assignment) -> bool:
    """Return whether an assignment has the same activation in all stages."""
    return len(set(assignment)) == 1


def format_plan(stages: Sequence[Stage], assignment: Assignment) -> str:
    """Return the plan of an assignment; stages that remain stock are not in it.

    >>> stages = [Stage("backbone 0-3", (0, 1, 2, 3), 9), Stage("neck 4-5", (4, 5), 2), Stage("head 6", (6,), 1)]
    >>> format_plan(stages, ("arelu", "silu", "arelu")), format_plan(stages, ("mish", "mish", "mish"))
    ('arelu@0-3+6, silu@4-5', 'mish')
    """
    if is_uniform(assignment):
        return assignment[0]
    layers: dict[str, list[int]] = {}
    for stage, activation in zip(stages, assignment, strict=True):
        layers.setdefault(activation, []).extend(stage.layers)
    return ", ".join(f"{name}@{format_layers(where)}" for name, where in layers.items() if name != STOCK)


def sample_candidates(stages: Sequence[Stage], count: int) -> list[Candidate]:
    """Return a reproducible sample of assignments that includes all uniform ones.

    The random ones are a Latin hypercube sample: each activation is equally frequent in each stage, so that a few runs
    are informative about all of them.

    Args:
        stages: Stages of the model.
        count: Number of candidates, at most that of all assignments.
    """
    rng = np.random.default_rng(_SAMPLING_SEED)
    candidates = {assignment: Candidate(assignment, "uniform") for assignment in list_uniform_assignments(stages)}
    while len(candidates) < count:
        missing = count - len(candidates)
        columns = [rng.permutation(np.resize(rng.permutation(stage.choices), missing)) for stage in stages]
        for drawn in zip(*(column.tolist() for column in columns), strict=True):
            candidates.setdefault(drawn, Candidate(drawn, "drawn"))
    return list(candidates.values())


def fit_effects(stages: Sequence[Stage], trials: Sequence[Trial]) -> list[dict[str, Effect]]:
    """Return the effects of activations in stages, fitted to scores by least squares as an additive model.

    Args:
        stages: Stages of the model.
        trials: Runs of equal length and seed; those without a score are ignored.

    Returns:
        For each stage, the effect of each of its activations, which sum to zero; [] if the runs are too few to
        determine the effects and their errors.
    """
    scored = [trial for trial in trials if trial.state == "done"]
    # Per stage, the parameters are the effects of all but the last activation, whose effect is minus their sum.
    bases = [np.vstack([np.eye(n), -np.ones(n)]) for n in (len(stage.choices) - 1 for stage in stages)]
    runs, terms = len(scored), 1 + sum(basis.shape[1] for basis in bases)
    if runs <= terms:
        return []
    columns = [
        basis[[stage.choices.index(trial.candidate.assignment[k]) for trial in scored]]
        for k, (stage, basis) in enumerate(zip(stages, bases, strict=True))
    ]
    design = np.hstack([np.ones((runs, 1)), *columns])
    if np.linalg.matrix_rank(design) < terms:
        return []
    scores = np.array([trial.score for trial in scored])
    fitted, *_ = np.linalg.lstsq(design, scores, rcond=None)
    variance = float(((scores - design @ fitted) ** 2).sum()) / (runs - terms)
    covariance = variance * np.linalg.inv(design.T @ design)
    effects, at = [], 1
    for stage, basis in zip(stages, bases, strict=True):
        part = slice(at, at + basis.shape[1])
        means = basis @ fitted[part]
        errors = np.sqrt(np.einsum("ij,jk,ik->i", basis, covariance[part, part], basis))
        pairs = map(Effect, means.tolist(), errors.tolist())
        effects.append(dict(zip(stage.choices, pairs, strict=True)))
        at = part.stop
    return effects


def rank_assignments(effects: Sequence[Mapping[str, Effect]]) -> Iterator[Assignment]:
    """Yield all assignments in descending order of the sum of their effects, lazily.

    Args:
        effects: As `fit_effects` returns them.
    """
    ranked = [[name for name, _ in sorted(stage.items(), key=lambda item: -item[1].mean)] for stage in effects]

    def entry(ranks: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        total = sum(stage[names[rank]].mean for stage, names, rank in zip(effects, ranked, ranks, strict=True))
        return -total, ranks

    best = (0,) * len(ranked)
    heap, seen = [entry(best)], {best}
    while heap:
        _, ranks = heapq.heappop(heap)
        yield tuple(names[rank] for names, rank in zip(ranked, ranks, strict=True))
        for k, rank in enumerate(ranks):
            worse = (*ranks[:k], rank + 1, *ranks[k + 1 :])
            if rank + 1 < len(ranked[k]) and worse not in seen:
                seen.add(worse)
                heapq.heappush(heap, entry(worse))


def select_survivors(trials: Sequence[Trial], count: int) -> list[Candidate]:
    """Return the plans of a rung that survive: the best uniform one, the best mixed one, and the best of the others.

    Args:
        trials: Runs of the rung.
        count: Number of survivors, 2 or more.

    Raises:
        TrainingError: No uniform plan has a score, or no mixed one.
    """
    ranked = sorted((trial for trial in trials if trial.state == "done"), key=lambda trial: -trial.score)
    kept = []
    for uniform in (True, False):
        best = next((trial for trial in ranked if is_uniform(trial.candidate.assignment) == uniform), None)
        if best is None:
            kind = "uniform" if uniform else "mixed"
            reason = next((f": {trial.reason}" for trial in trials if trial.reason), "")
            raise TrainingError(
                f"no {kind} plan of {trials[0].rung} has a score, so the search cannot continue{reason}"
            )
        kept.append(best)
    kept += [trial for trial in ranked if trial not in kept][: count - len(kept)]
    return [Candidate(trial.candidate.assignment, "kept") for trial in kept]


def select_candidates(search: Search, number: int, trials: Sequence[Trial]) -> list[Candidate]:
    """Return the candidates of a rung, given the outcomes of the earlier rungs.

    A third of the second rung are untried plans, the best by the effects fitted to the first rung.

    Args:
        search: The search.
        number: Index of the rung.
        trials: Runs of all earlier rungs.

    Raises:
        TrainingError: The previous rung has no score of a uniform or of a mixed plan.
    """
    rung = search.rungs[number]
    if number == 0:
        return sample_candidates(search.stages, rung.plans)
    before = [trial for trial in trials if trial.rung == search.rungs[number - 1].name]
    new: list[Assignment] = []
    if number == 1 and rung.name != FINAL and (effects := fit_effects(search.stages, before)):
        tried = {trial.candidate.assignment for trial in trials}
        new = list(
            itertools.islice(
                (best for best in rank_assignments(effects) if best not in tried), rung.plans // REDUCTION_FACTOR
            )
        )
    return [
        *select_survivors(before, rung.plans - len(new)),
        *(Candidate(assignment, "proposed") for assignment in new),
    ]


def make_rung_study(search: Search, rung: Rung, candidates: Sequence[Candidate]) -> Study:
    """Return the study of a rung; its baseline is the first plan, which in the final is the uniform one.

    Args:
        search: The search.
        rung: The rung.
        candidates: Its plans.
    """
    plans = tuple(format_plan(search.stages, candidate.assignment) for candidate in candidates)
    return Study(
        activations=plans,
        models=(search.model,),
        data=(search.data,),
        seeds=rung.seeds,
        baseline=plans[0],
        scope=search.scope,
        act_lr=search.act_lr,
        arguments={**search.arguments, "epochs": rung.epochs},
    )


def check_search_folder(search: Search, folder: Path) -> bool:
    """Return whether a folder already holds this search; raises InputError if it holds another one.

    Raises:
        InputError: The folder holds another search, or its record is damaged.
    """
    recorded = read_json(folder / SEARCH_FILE, Search) if folder_exists(folder) else None
    if recorded is None:
        return False
    old = _to_plain(recorded)
    for key, value in _to_plain(search).items():
        if old[key] != value:
            listed = key in ("stages", "rungs")
            difference = f"its {key} differ" if listed else f"it has {key} {quote(old[key])}, this one {quote(value)}"
            raise InputError(f"'{folder}' holds another search: {difference}; give another folder with output=")
    return True


def run_rungs(search: Search, folder: Path, run: Callable[[Study, Sequence[Path]], None]) -> list[Trial]:
    """Run the unfinished rungs of a search, and return all trials.

    The candidates of a rung are written to its folder before it runs, so that a resumed search has the same ones.

    Args:
        search: The search.
        folder: Its folder, locked by the caller.
        run: Function of a study and its run folders that runs what is not finished of it.

    Raises:
        RtdetrActError: The folder holds another search, a plan is not possible, or a rung has too few scores.
    """
    started = check_search_folder(search, folder)
    trials: list[Trial] = []
    for number, rung in enumerate(search.rungs):
        rung_folder = folder / rung.name
        candidates = (read_candidates(search, rung_folder) if started else []) or select_candidates(
            search, number, trials
        )
        after = folder / search.rungs[number + 1].name if rung.name != FINAL else None
        if not (started and after and read_candidates(search, after)):
            study = make_rung_study(search, rung, candidates)
            records: dict[Path, Any] = {rung_folder / CANDIDATES_FILE: [asdict(each) for each in candidates]}
            if not started:  # written with the first runs, so that a command that fails a check can be corrected
                records[folder / SEARCH_FILE] = _to_plain(search)
            with lock_folder(rung_folder):
                folders = prepare_runs(study, rung_folder, extra_files=records)
                started = True
                run(study, folders)
        trials += read_trials(search, rung, rung_folder, candidates)
    return trials


def read_candidates(search: Search, folder: Path) -> list[Candidate]:
    """Return the recorded candidates of a rung, or [] if there are none.

    Args:
        search: The search.
        folder: Folder of the rung.

    Raises:
        InputError: The record is damaged, or does not fit the search.
    """
    candidates = read_json(folder / CANDIDATES_FILE, list[Candidate]) or []
    for each in candidates:
        fits = len(each.assignment) == len(search.stages) and all(
            name in stage.choices for name, stage in zip(each.assignment, search.stages, strict=True)
        )
        if not fits:
            reason = f"{quote(list(each.assignment))} is not an activation of the search for each stage"
            raise make_damaged_error(folder / CANDIDATES_FILE, reason)
    return candidates


def read_trials(search: Search, rung: Rung, folder: Path, candidates: Sequence[Candidate]) -> list[Trial]:
    """Return the outcomes of the runs of a rung, in the order of its plans.

    Args:
        search: The search.
        rung: The rung.
        folder: Folder of the rung.
        candidates: Its plans.

    Raises:
        InputError: The folder of a run is missing.
    """
    records = read_runs(folder)
    metric = choose_metric(records)
    by_run = {(record.activation, record.seed): record for record in records}
    trials = []
    for each in candidates:
        for seed in rung.seeds:
            plan = format_plan(search.stages, each.assignment)
            record = by_run.get((plan, seed))
            if record is None:
                raise InputError(
                    f"'{folder}' no longer has a run of {quote(plan)} with seed {seed}: restore a copy, or delete the "
                    "folders of this rung and of all later rungs"
                )
            score = record.scores.get(metric, math.nan)
            state: State = "failed" if record.state == "done" and math.isnan(score) else record.state
            trials.append(Trial(rung.name, each, rung.epochs, seed, state, score, metric, record.reason))
    return trials


def _to_plain(search: Search) -> dict[str, Any]:
    """Return a search as plain data, equal to what is read back from a JSON file."""
    return json.loads(json.dumps(asdict(search)))
