"""What a search ends with: the answer as a model YAML, and the evidence beside it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from rich.markup import escape
from rich.table import Table

from rtdetr_act.errors import InputError, TrainingError
from rtdetr_act.files import write_files_atomically
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.study.formatting import format_count, format_p, format_score, join_words
from rtdetr_act.study.leaderboard import LeaderboardRow
from rtdetr_act.study.search import FINAL, SEARCH_FILES, Effect, Search, Trial, fit_effects, format_plan, is_uniform
from rtdetr_act.study.statistics import HALF_POINT, Comparison

# Known to the process that built the model, or of the folder it came from, and no part of what to build.
_DROPPED_KEYS = ("backbone", "head", "scale", "yaml_file", "ch", "channels")


@dataclass(frozen=True)
class Answer:
    """What to build: the plan, whether it mixes activations, and in words what speaks for it."""

    plan: str
    mixed: bool
    explanation: str


def choose_answer(search: Search, trials: Sequence[Trial], lines: Sequence[LeaderboardRow]) -> Answer:
    """Choose between the two plans of the final: the mixed one only where it is shown to be better.

    Args:
        search: The search.
        trials: All of them.
        lines: The leaderboard of the final.

    Raises:
        TrainingError: No run of the final gave a score.
    """
    picks = {is_uniform(trial.candidate.assignment): trial.candidate for trial in trials if trial.rung == FINAL}
    plans = {kind: format_plan(search.stages, pick.assignment) for kind, pick in picks.items()}
    by_plan = {line.activation: line for line in lines}
    uniform, mixed = by_plan[plans[True]], by_plan[plans[False]]
    if not uniform.summary.runs and not mixed.summary.runs:
        raise TrainingError("no run of the final gave a score: its report.html says why")
    if not mixed.comparison:
        only = uniform if uniform.summary.runs else mixed
        words = "Nothing could be compared, since the two plans of the final have no finished seed in common."
        return Answer(only.activation, only is mixed, words)
    seen = mixed.comparison
    interval = (
        "" if math.isnan(seen.low) else f" (95 % {format_score(seen.low, '+')} to {format_score(seen.high, '+')})"
    )
    p = "" if math.isnan(seen.p) else f", p = {format_p(seen.p)}"
    facts = (
        f"{format_score(seen.difference, '+')} {trials[0].metric}{interval}{p}, paired over "
        f"{format_count(seen.pairs, 'fresh seed')}"
    )
    both = f"'{mixed.activation}', the best mixed plan, and '{uniform.activation}' everywhere, the best uniform one"
    if seen.verdict != "no difference shown":
        is_better = seen.verdict == "better"
        winner = "mixed" if is_better else "uniform"
        words = f"Of {both}, the {winner} one is better: {facts}, the mixed minus the uniform one."
        return Answer((mixed if is_better else uniform).activation, is_better, words)
    words = (
        f"No difference is shown between {both}: {facts}. So the answer is the simpler one, which does not mean that "
        "the two are equal."
    )
    if seen.seeds_needed:
        words += f" About {format_count(seen.seeds_needed, 'seed')} would show half a point ({HALF_POINT})."
    return Answer(uniform.activation, False, words)


def write_search_report(
    search: Search, trials: Sequence[Trial], lines: Sequence[LeaderboardRow], found: Answer, folder: Path
) -> list[Path]:
    """Write best.yaml, search.md and search.csv, all of them or none, and return their paths; raises InputError."""
    texts = (
        format_model_yaml(search, found),
        format_search_report(search, trials, lines, found),
        make_trial_frame(search, trials).write_csv(),
    )
    contents = {folder / name: text.encode() for name, text in zip(SEARCH_FILES, texts, strict=True)}
    try:
        write_files_atomically(contents)
    except OSError as error:
        raise InputError(
            f"cannot write to '{folder}': {error.strerror or error}; the same command makes the files once that is put "
            "right"
        ) from None
    return list(contents)


def format_model_yaml(search: Search, found: Answer) -> str:
    """Return the base model as a YAML with the plan under `activation:`, its evidence in the comment before it."""
    _, model = load_variant(search.model, found.plan, scope=search.scope, act_lr=search.act_lr)
    data: dict[str, Any] = dict(model.model.yaml)
    if data.get("scale") and data.get("scales"):
        data["scales"] = {data["scale"]: data["scales"][data["scale"]]}  # the file's name no longer tells which
    head = {key: value for key, value in data.items() if key not in (*_DROPPED_KEYS, "activation")}
    spent = sum(rung.cost for rung in search.rungs)
    origin = (
        f"{Path(search.model).name} with {found.plan}, found by rtdetr-act search among "
        f"{', '.join(search.activations)} on {Path(search.data).name}, {spent} epochs in all. "
        f"{found.explanation} The evidence is in search.md and search.csv beside this file."
    )
    lines = [
        *textwrap.wrap(origin, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False),
        "",
        *(_dump_yaml({key: value}) for key, value in head.items()),
        *([_dump_yaml({"activation": data["activation"]})] if data.get("activation") else []),
    ]
    index = 0
    for part in ("backbone", "head"):
        lines += ["", f"{part}:"]
        for row in data[part]:
            lines.append(f"  - {_dump_yaml(row)} # {index}")
            index += 1
    return "\n".join(lines) + "\n"


def _dump_yaml(value: Any) -> str:
    """Write a row as one line, a mapping as several."""
    flow = isinstance(value, list)
    return yaml.safe_dump(value, default_flow_style=flow, sort_keys=False, width=10_000, allow_unicode=True).strip()


def make_trial_frame(search: Search, trials: Sequence[Trial]) -> pl.DataFrame:
    """Return every trial as a row: rung, plan, origin, the activation of each stage, epochs, seed, state, score."""
    rows = [
        {
            "rung": trial.rung,
            "plan": format_plan(search.stages, trial.candidate.assignment),
            "origin": trial.candidate.origin,
            **{stage.name: act for stage, act in zip(search.stages, trial.candidate.assignment, strict=True)},
            "epochs": trial.epochs,
            "seed": trial.seed,
            "state": trial.state,
            trial.metric: None if math.isnan(trial.score) else trial.score,
        }
        for trial in trials
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def summarise_rungs(search: Search, trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Return a line per rung: name, plans, epochs, seeds, and its best uniform and mixed plan with scores."""
    found = []
    for rung in search.rungs:
        mine = [trial for trial in trials if trial.rung == rung.name]
        plans = {trial.candidate.assignment for trial in mine}
        best = (
            _format_best_plan(search, [t for t in mine if is_uniform(t.candidate.assignment) == kind])
            for kind in (True, False)
        )
        seeds = "+".join(map(str, rung.seeds))
        found.append((rung.name, str(len(plans)), str(rung.epochs), seeds, *best))
    return found


def _format_best_plan(search: Search, trials: Sequence[Trial]) -> str:
    """Name the best of some trials by its mean score; in the final, where each kind has one plan, that is its mean."""
    scores: dict[str, list[float]] = {}
    for trial in trials:
        if trial.state == "done":
            scores.setdefault(format_plan(search.stages, trial.candidate.assignment), []).append(trial.score)
    means = {plan: sum(values) / len(values) for plan, values in scores.items()}
    plan = max(means, key=means.__getitem__, default="")
    return f"{plan}: {format_score(means[plan])}" if plan else ""


def make_rung_table(search: Search, trials: Sequence[Trial]) -> Table:
    """Return the rungs as a table for the terminal."""
    table = Table(title="Search", caption=f"{trials[0].metric}: of one run in a rung, mean over the seeds in the final")
    for title in ("rung", "plans", "epochs", "best uniform", "best mixed"):
        table.add_column(title, overflow="fold", justify="right" if title in ("plans", "epochs") else "left")
    for name, plans, epochs, _, uniform, mixed in summarise_rungs(search, trials):
        table.add_row(name, plans, epochs, escape(uniform), escape(mixed))
    return table


def format_search_report(
    search: Search, trials: Sequence[Trial], lines: Sequence[LeaderboardRow], found: Answer
) -> str:
    """Return the evidence as Markdown."""
    spent = sum(rung.cost for rung in search.rungs)
    first = search.rungs[0]
    failed = sum(trial.state != "done" for trial in trials)
    tried = len({trial.candidate.assignment for trial in trials})
    parts = [
        "# Search",
        f"**Answer: `{found.plan}`.** {found.explanation}",
        f"`{search.model}` on `{search.data}`, {', '.join(search.activations)} in {len(search.stages)} stages, scope "
        f"{search.scope}: {math.prod(len(stage.choices) for stage in search.stages):,} assignments, of which "
        f"{tried} were tried. {spent} epochs of training of a budget of "
        f"{search.budget}." + (f" {format_count(failed, 'run')} gave no score." if failed else ""),
        "## Final",
        "Fresh seeds, whole trainings. Other runs chose the two plans, so that their luck has no part in this.",
        _format_final_table(lines, trials[0].metric),
        "## Rungs",
        "Each run is a whole training of so many epochs, and starts anew; each rung has a seed of its own.",
        _table(("rung", "plans", "epochs", "seeds", "best uniform", "best mixed"), summarise_rungs(search, trials)),
        "The best score of many runs flatters: it was picked for being high. Only the final compares.",
        *_describe_ties(search, trials),
        "## What each stage says",
        _format_effects(search, [trial for trial in trials if trial.rung == first.name]),
        "## Every run",
        _table(
            ("rung", "origin", "plan", "epochs", "seed", trials[0].metric),
            [
                (t.rung, t.candidate.origin, format_plan(search.stages, t.candidate.assignment), str(t.epochs),
                 str(t.seed), format_score(t.score) if t.state == "done" else t.state)
                for rung in search.rungs
                for t in sorted((t for t in trials if t.rung == rung.name), key=_sort_key)
            ],
        ),
        "Arguments that are counted in epochs (warmup_epochs, close_mosaic, patience) are the same at every length.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _describe_ties(search: Search, trials: Sequence[Trial]) -> list[str]:
    """Say which rungs could not choose, as where trainings are so short that all score nothing."""
    equal = []
    for rung in search.rungs[:-1]:
        scores = {trial.score for trial in trials if trial.rung == rung.name and trial.state == "done"}
        equal += [rung.name] if len(scores) == 1 else []
    return [f"All scores of {join_words(equal)} are equal: order chose there, not merit."] if equal else []


def _sort_key(trial: Trial) -> float:
    return math.inf if math.isnan(trial.score) else -trial.score


def _format_final_table(lines: Sequence[LeaderboardRow], metric: str) -> str:
    rows = []
    for line in lines:
        seen, spread = line.comparison, line.summary
        rows.append(
            (
                line.activation,
                str(spread.runs),
                f"{format_score(spread.mean)} ± {format_score(spread.deviation)}",
                _format_difference(seen) if seen else "",
                format_p(seen.p) if seen and not math.isnan(seen.p) else "",
                seen.verdict if seen else "baseline" if line.is_baseline else "not compared",
                "" if line.latency_ms is None else f"{line.latency_ms:.2f}",
            )
        )
    return _table(("plan", "runs", metric, "difference (95 %)", "p", "verdict", "ms/image"), rows)


def _format_difference(comparison: Comparison) -> str:
    """Return a difference of scores with its 95 % interval."""
    difference, low, high = (format_score(v, "+") for v in (comparison.difference, comparison.low, comparison.high))
    return f"{difference} ({low} to {high})"


def _format_effects(search: Search, trials: Sequence[Trial]) -> str:
    effects = fit_effects(search.stages, trials)
    if not effects:
        return "The first rung has too few runs to tell what each stage adds."
    choices = [name for name in search.activations if any(name in stage.choices for stage in search.stages)]
    rows = [
        (stage.name, *(_format_effect(effect, name) for name in choices))
        for stage, effect in zip(search.stages, effects, strict=True)
    ]
    return (
        f"What an activation in a stage adds to {trials[0].metric} after {trials[0].epochs} epochs, against the mean "
        f"of those of that stage, ± its standard error: least squares over the {len(trials)} runs of the first "
        "rung, as if stages did not depend on one another. An effect smaller than two errors is none that these "
        "runs can tell, and of twenty that are none, one exceeds them by chance.\n\n"
        + _table(("stage", *choices), rows)
    )


def _format_effect(effect: Mapping[str, Effect], name: str) -> str:
    if name not in effect or len(effect) == 1:  # it cannot stand there, or nothing else can
        return ""
    return f"{format_score(effect[name].mean, '+')} ± {format_score(effect[name].error)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
