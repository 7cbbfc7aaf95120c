"""Which activation in which stage: successive halving over studies of growing length, and a final with fresh seeds.

Each rung is an ordinary study in a folder of its own, and each of its runs a whole training of that many epochs with
its whole learning-rate schedule. Who gets further is trained anew: a longer training has another schedule from its
first step on, and a score from the middle of one says less than that of a short training that has ended. Going on would
spare the third of a run that the rung before has done already.

Each rung has a seed of its own, and so has each run of the final: what won by luck has no part in its last comparison.
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
from rtdetr_act.integrations.ultralytics.arguments import check_arguments
from rtdetr_act.integrations.ultralytics.models import STOCK, load_model
from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS
from rtdetr_act.study.grid import (
    MAX_RUNS,
    RESERVED_ARGUMENTS,
    Study,
    check_sizes,
    check_swap_options,
    normalize_arguments,
)
from rtdetr_act.study.leaderboard import choose_metric
from rtdetr_act.study.preparation import prepare_runs
from rtdetr_act.study.run_folders import read_runs
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
from rtdetr_act.surgery.plan import Plan, format_layers

FINAL = "final"
SEARCH_FILES = ("best.yaml", "search.md", "search.csv")  # what a search ends with
REDUCTION_FACTOR = 3  # so many times longer is each rung, and one in so many goes on
# Two epochs are warm-up: of shapes, one of fourteen is, and Ultralytics' own setting is three.
_MIN_EPOCHS = 3
_DEFAULT_TRAININGS = 14  # whole trainings that a search takes, its final left out, where no budget is given
_SAMPLING_SEED = 0  # seed of the plans drawn

Assignment = tuple[str, ...]  # an activation for each stage, in their order


@dataclass(frozen=True)
class Rung:
    """A study of the search: `plans` plans, each with every seed, `epochs` epochs a run."""

    name: str
    plans: int
    epochs: int
    seeds: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Epochs of all runs."""
        return self.plans * self.epochs * len(self.seeds)


@dataclass(frozen=True)
class Search:
    """What is searched, with what.

    Attributes:
        activations: Names with arguments, and "stock".
        model, data, scope, act_lr: As in `Study`, one each.
        stages: Of the model, with the activations that can stand in each.
        budget: Epochs of all trainings together, at most; what is tried again because it broke comes on top.
        epochs: Of a whole training, as in the final.
        seeds: Runs of each plan in the final.
        rungs: The studies, the final last.
        arguments: Ultralytics arguments, `epochs` left out.
    """

    activations: tuple[str, ...]
    model: str
    data: str
    scope: str
    act_lr: float
    arguments: Mapping[str, Any]
    budget: int
    epochs: int
    seeds: int
    stages: tuple[Stage, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Candidate:
    """An assignment in a rung, and where it came from."""

    assignment: Assignment
    origin: Literal["uniform", "drawn", "kept", "proposed"]


@dataclass(frozen=True)
class Trial:
    """What one run of a search gave; `score` is NaN, and `state` not "done", where it gave none."""

    rung: str
    candidate: Candidate
    epochs: int
    seed: int
    state: str
    score: float
    metric: str
    reason: str = ""


@dataclass(frozen=True)
class Effect:
    """How much better or worse than the stage's average an activation is there, in units of the score."""

    mean: float
    error: float


def make_search(
    activations: Sequence[str],
    *,
    model: str,
    data: str,
    budget: int | None,
    seeds: int,
    scope: str,
    act_lr: float,
    arguments: Mapping[str, Any],
) -> Search:
    """Check what the user gave, and lay out the rungs.

    Args:
        activations: Activations, also several in one text, separated by commas.
        model, data, scope, act_lr: As in `Study`.
        budget: Epochs of all trainings together; None for fourteen whole trainings and the final.
        seeds: Runs of each of the two plans in the final.
        arguments: Ultralytics arguments; `epochs` is the length of a whole training.

    Raises:
        RtdetrActError: An activation, an argument or the model is wrong, or the budget is too small.
    """
    wanted = parse_activations(activations)
    check_swap_options(scope, act_lr)
    if seeds > MAX_RUNS:
        raise InputError(f"--seeds {quote(seeds)} are too many: a study has {MAX_RUNS:,} runs at most")
    arguments = normalize_arguments(arguments)
    if lists := [key for key, value in arguments.items() if isinstance(value, list) and key != "device"]:
        raise InputError(f"'{lists[0]}' is a list: a search has one value of each argument")
    check_arguments(arguments, RESERVED_ARGUMENTS)
    check_sizes(arguments)
    epochs = arguments.get("epochs", _default_epochs(data))
    loaded = load_model(model)
    _check_stock_is_clear(loaded, model, wanted)
    stages = find_stages(loaded, wanted, scope=scope)
    space = math.prod(len(stage.choices) for stage in stages)
    uniform = len(list_uniform_assignments(stages))
    if not uniform:
        raise InputError("none of the activations can stand in every stage: a search needs one that can, such as silu")
    if space == uniform:
        raise InputError(
            f"there is nothing to mix: the model has {len(stages)} stages with {max(len(s.choices) for s in stages)} "
            "activations that can stand there at most"
        )
    budget = (_DEFAULT_TRAININGS + 2 * seeds) * epochs if budget is None else budget
    rungs = allocate_rungs(budget, epochs=epochs, seeds=seeds, uniform=uniform, space=space)
    rest = {key: value for key, value in arguments.items() if key != "epochs"}
    return Search(tuple(wanted), model, data, scope, act_lr, rest, budget, epochs, seeds, stages, rungs)


def parse_activations(texts: Sequence[str]) -> list[str]:
    """Return the activations under their zoo names; raises InputError and SpecError.

    >>> parse_activations(["arelu,swish", "leaky_relu(negative_slope=0.1)"])
    ['arelu', 'silu', 'leaky_relu(negative_slope=0.1)']
    """
    found = []
    for rule in (rule for text in texts for rule in Plan.parse(text).rules):
        if rule.where:
            raise InputError(f"'{rule}' names a place: the search finds the places, so give the activation only")
        found.append(STOCK if str(rule.activation) == STOCK else str(resolve(rule.activation)))
    if repeated := [name for name in found if found.count(name) > 1]:
        raise InputError(f"'{repeated[0]}' is given twice")
    if len(found) < 2:
        raise InputError("a search needs two activations or more to place: --act arelu,silu")
    return found


def _default_epochs(data: str) -> int:
    return int(SHAPES_SETTINGS["epochs"] if data == "shapes" else DEFAULT_CFG_DICT["epochs"])


def _check_stock_is_clear(loaded: Any, model: str, activations: Sequence[str]) -> None:
    """Refuse "stock" where it would mean two things: the stock model everywhere, the model's own plan in one stage."""
    if STOCK in activations and read_plan(loaded.model):
        raise InputError(f"'{model}' names activations itself, so that 'stock' in one stage is unclear: leave it out")


def allocate_rungs(budget: int, *, epochs: int, seeds: int, uniform: int, space: int) -> tuple[Rung, ...]:
    """Lay out as many rungs as the budget allows; together with the final they cost the budget at most.

    Rungs are a ninth, a third and the whole of a training long, but three epochs at least, and share what the final
    leaves equally. The first takes what does not divide.

    Args:
        budget: Epochs of all trainings together.
        epochs: Of a whole training.
        seeds: Runs of each of the two plans in the final.
        uniform: Uniform plans, which are all in the first rung.
        space: All assignments.

    Raises:
        InputError: The budget is too small for one rung and the final, or larger than anyone has.

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
                    "most: give a smaller --budget"
                )
            rungs = [Rung(f"rung{k}", sizes[k], lengths[k], (k,)) for k in range(count)]
            return (*rungs, Rung(FINAL, 2, epochs, tuple(range(count, count + seeds))))
    rung = (uniform + 1) * lengths[0]
    raise InputError(
        f"--budget {budget} is too small: the final takes {final} epochs (2 plans, --seeds {seeds}, epochs={epochs}) "
        f"and the smallest rung before it {rung}, so give {final + rung} or more, or fewer epochs= or --seeds"
    )


def _allocate_plans(left: int, lengths: Sequence[int], uniform: int, space: int) -> list[int]:
    """Return how many plans each rung has, or [] where there is too little for all of them."""
    sizes = [left // len(lengths) // length for length in lengths]
    sizes[0] = (left - sum(size * length for size, length in zip(sizes[1:], lengths[1:], strict=True))) // lengths[0]
    if sizes[0] < uniform + 1 or min(sizes) < 2:
        return []
    sizes[0] = min(sizes[0], space)
    for k in range(1, len(sizes)):
        sizes[k] = min(sizes[k], max(2, math.ceil(sizes[k - 1] / REDUCTION_FACTOR)))
    return sizes


def list_uniform_assignments(stages: Sequence[Stage]) -> list[Assignment]:
    """Return the assignments of one activation everywhere, of those that can stand everywhere."""
    first = stages[0].choices if stages else ()
    everywhere = [name for name in first if all(name in stage.choices for stage in stages)]
    return [(activation,) * len(stages) for activation in everywhere]


def is_uniform(assignment: Assignment) -> bool:
    """Say whether an assignment has one activation everywhere."""
    return len(set(assignment)) == 1


def format_plan(stages: Sequence[Stage], assignment: Assignment) -> str:
    """Return an assignment as a plan; stages that stay stock are not named.

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
    """Return the uniform assignments and so many others that there are `count`, the same ones every time.

    Those are drawn as a Latin hypercube: each activation stands equally often in each stage, so that a few runs tell
    something of every one. `count` is at most the number of all assignments.
    """
    rng = np.random.default_rng(_SAMPLING_SEED)
    found = {assignment: Candidate(assignment, "uniform") for assignment in list_uniform_assignments(stages)}
    while len(found) < count:
        missing = count - len(found)
        columns = [rng.permutation(np.resize(rng.permutation(stage.choices), missing)) for stage in stages]
        for drawn in zip(*(column.tolist() for column in columns), strict=True):
            found.setdefault(drawn, Candidate(drawn, "drawn"))
    return list(found.values())


def fit_effects(stages: Sequence[Stage], trials: Sequence[Trial]) -> list[dict[str, Effect]]:
    """Explain scores as a sum of what each stage's activation adds, by least squares.

    Args:
        stages: The stages.
        trials: Runs of equal length and seed, those without a score left out here.

    Returns:
        For each stage the effect of each of its activations, which add up to zero; [] where the runs are too few to
        tell the effects apart and their errors.
    """
    scored = [trial for trial in trials if trial.state == "done"]
    # Per stage, the effects of all but the last activation, whose effect is minus their sum.
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
    """Yield all assignments, the best by the sum of their effects first, without making them all before."""
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


def select_survivors(trials: Sequence[Trial], places: int) -> list[Candidate]:
    """Return those of a rung that go on: the best uniform one, the best mixed one, and the best of the others.

    Raises:
        TrainingError: There is no score of a uniform plan, or none of a mixed one.
    """
    ranked = sorted((trial for trial in trials if trial.state == "done"), key=lambda trial: -trial.score)
    kept = []
    for uniform in (True, False):
        best = next((trial for trial in ranked if is_uniform(trial.candidate.assignment) == uniform), None)
        if best is None:
            kind = "uniform" if uniform else "mixed"
            reason = next((f": {trial.reason}" for trial in trials if trial.reason), "")
            raise TrainingError(f"no {kind} plan of {trials[0].rung} gave a score, so the search cannot go on{reason}")
        kept.append(best)
    kept += [trial for trial in ranked if trial not in kept][: places - len(kept)]
    return [Candidate(trial.candidate.assignment, "kept") for trial in kept]


def select_candidates(search: Search, number: int, trials: Sequence[Trial]) -> list[Candidate]:
    """Return the plans of a rung, from what the rungs before it gave.

    A third of the second rung are plans that nobody has tried: those that the effects of the first call best.
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


def make_rung_study(search: Search, rung: Rung, picks: Sequence[Candidate]) -> Study:
    """Return a rung as a study; its baseline is the first plan, in the final the uniform one."""
    plans = tuple(format_plan(search.stages, pick.assignment) for pick in picks)
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
    """Say whether a folder holds this search already; raises InputError where it holds another."""
    recorded = read_json(folder / SEARCH_FILE, Search) if folder_exists(folder) else None
    if recorded is None:
        return False
    old = _to_json(recorded)
    for key, value in _to_json(search).items():
        if old[key] != value:
            listed = key in ("stages", "rungs")
            difference = f"its {key} differ" if listed else f"it has {key} {quote(old[key])}, this one {quote(value)}"
            raise InputError(f"'{folder}' holds another search: {difference}; give another folder with --output")
    return True


def run_search(search: Search, folder: Path, run: Callable[[Study, Sequence[Path]], None]) -> list[Trial]:
    """Run the rungs that are not over, and return all trials.

    What was picked is written down before it runs, so that a search that is gone on with picks nothing anew.

    Args:
        search: The search.
        folder: Its folder, locked by the caller.
        run: Runs what is not finished of a study, whose run folders it gets.

    Raises:
        RtdetrActError: The folder holds another search, a plan cannot run, or a rung gave no score to go on with.
    """
    begun = check_search_folder(search, folder)
    trials: list[Trial] = []
    for number, rung in enumerate(search.rungs):
        place = folder / rung.name
        picks = (read_candidates(search, place) if begun else []) or select_candidates(search, number, trials)
        after = folder / search.rungs[number + 1].name if rung.name != FINAL else None
        if not (begun and after and read_candidates(search, after)):
            study = make_rung_study(search, rung, picks)
            records: dict[Path, Any] = {place / CANDIDATES_FILE: [asdict(each) for each in picks]}
            if not begun:  # behind the checks: a command with a mistake in it may be put right
                records[folder / SEARCH_FILE] = _to_json(search)
            with lock_folder(place):
                folders = prepare_runs(study, place, beside=records)
                begun = True
                run(study, folders)
        trials += read_trials(search, rung, place, picks)
    return trials


def read_candidates(search: Search, place: Path) -> list[Candidate]:
    """Return what was picked for a rung, or [] where nothing was yet.

    Raises:
        InputError: The record is damaged, or names what this search does not place.
    """
    picks = read_json(place / CANDIDATES_FILE, list[Candidate]) or []
    for each in picks:
        fits = len(each.assignment) == len(search.stages) and all(
            name in stage.choices for name, stage in zip(each.assignment, search.stages, strict=True)
        )
        if not fits:
            reason = f"{quote(list(each.assignment))} is not an activation of the search for each stage"
            raise make_damaged_error(place / CANDIDATES_FILE, reason)
    return picks


def read_trials(search: Search, rung: Rung, place: Path, picks: Sequence[Candidate]) -> list[Trial]:
    """Return what the runs of a rung gave, in the order of its plans.

    Raises:
        InputError: The folder of a run is gone.
    """
    records = read_runs(place)
    metric = choose_metric(records)
    known = {(record.activation, record.seed): record for record in records}
    found = []
    for each in picks:
        for seed in rung.seeds:
            plan = format_plan(search.stages, each.assignment)
            record = known.get((plan, seed))
            if record is None:
                raise InputError(
                    f"'{place}' has no run of {quote(plan)} with seed {seed} any more: put back a copy, or delete the "
                    "folder of this rung and those of the rungs after it"
                )
            score = record.scores.get(metric, math.nan)
            state = "failed" if record.state == "done" and math.isnan(score) else record.state
            found.append(Trial(rung.name, each, rung.epochs, seed, state, score, metric, record.reason))
    return found


def _to_json(search: Search) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(search)))
