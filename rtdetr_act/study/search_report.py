"""Report of a search: the chosen plan as a model YAML, with the evidence in Markdown and CSV."""

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
from rtdetr_act.evaluation.statistics import HALF_POINT, NO_DIFFERENCE, NOTHING_LEARNED, Comparison
from rtdetr_act.files import write_files_atomically
from rtdetr_act.formatting import format_count, format_p, format_score, join_words
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.study.leaderboard import LeaderboardRow
from rtdetr_act.study.search import (
    FINAL,
    SEARCH_REPORT_FILES,
    Effect,
    Search,
    Trial,
    fit_effects,
    format_plan,
    is_uniform,
)
from rtdetr_act.tables import format_markdown_table

# Keys of a loaded model that depend on the process or the file, and are not part of its architecture.
_DROPPED_KEYS = ("backbone", "head", "scale", "yaml_file", "ch", "channels")


@dataclass(frozen=True)
class Answer:
    """Result of a search.

    Attributes:
        plan: The chosen plan.
        mixed: Whether it has different activations in different stages.
        explanation: Sentences on the evidence for it.
    """

    plan: str
    mixed: bool
    explanation: str


def choose_answer(search: Search, trials: Sequence[Trial], rows: Sequence[LeaderboardRow]) -> Answer:
    """Return the better plan of the final, the uniform one unless the mixed one is significantly better.

    Args:
        search: The search.
        trials: All its runs.
        rows: Leaderboard of the final.

    Raises:
        TrainingError: No run of the final has a score.
    """
    assignments = {trial.candidate.assignment for trial in trials if trial.rung == FINAL}
    plans = {is_uniform(assignment): format_plan(search.stages, assignment) for assignment in assignments}
    by_plan = {row.activation: row for row in rows}
    uniform, mixed = by_plan[plans[True]], by_plan[plans[False]]
    if not uniform.summary.runs and not mixed.summary.runs:
        raise TrainingError("no run of the final has a score: its report.html says why")
    if not mixed.comparison:
        only = uniform if uniform.summary.runs else mixed
        words = "Nothing could be compared, since the two plans of the final have no finished seed in common."
        return Answer(only.activation, only is mixed, words)
    comparison = mixed.comparison
    low, high = format_score(comparison.low, "+"), format_score(comparison.high, "+")
    interval = "" if math.isnan(comparison.low) else f" (95 % {low} to {high})"
    p = "" if math.isnan(comparison.p) else f", p = {format_p(comparison.p)}"
    facts = (
        f"{format_score(comparison.difference, '+')} {trials[0].metric}{interval}{p}, paired over "
        f"{format_count(comparison.pairs, 'fresh seed')}"
    )
    both = f"'{mixed.activation}', the best mixed plan, and '{uniform.activation}' everywhere, the best uniform one"
    if comparison.verdict == NOTHING_LEARNED:
        words = f"Nothing was learned by {both}. So the answer is the simpler one, by no evidence: train for longer."
        return Answer(uniform.activation, False, words)
    if comparison.verdict != NO_DIFFERENCE:
        is_better = comparison.verdict == "better"
        winner = "mixed" if is_better else "uniform"
        words = f"Of {both}, the {winner} one is better: {facts}, the mixed minus the uniform one."
        return Answer((mixed if is_better else uniform).activation, is_better, words)
    words = (
        f"No difference is shown between {both}: {facts}. So the answer is the simpler one, which does not mean that "
        "the two are equal."
    )
    if comparison.seeds_needed:
        words += f" About {format_count(comparison.seeds_needed, 'seed')} would show half a point ({HALF_POINT})."
    return Answer(uniform.activation, False, words)


def write_search_report(
    search: Search, trials: Sequence[Trial], rows: Sequence[LeaderboardRow], answer: Answer, folder: Path
) -> list[Path]:
    """Write best.yaml, search.md and search.csv, all of them or none, and return their paths.

    Args:
        search: The search.
        trials: All its runs.
        rows: Leaderboard of the final.
        answer: Result of the search.
        folder: Folder of the search.

    Raises:
        InputError: The folder is not writable.
    """
    texts = (
        format_model_yaml(search, answer),
        format_search_report(search, trials, rows, answer),
        make_trial_frame(search, trials).write_csv(),
    )
    contents = {folder / name: text.encode() for name, text in zip(SEARCH_REPORT_FILES, texts, strict=True)}
    try:
        write_files_atomically(contents)
    except OSError as error:
        raise InputError(
            f"cannot write to '{folder}': {error.strerror or error}; the same command writes the files once that is "
            "resolved"
        ) from None
    return list(contents)


def format_model_yaml(search: Search, answer: Answer) -> str:
    """Return a model YAML with the plan of an answer under `activation:`, and the evidence in a comment."""
    _, model = load_variant(search.model, answer.plan, scope=search.scope, act_lr=search.act_lr)
    data: dict[str, Any] = dict(model.model.yaml)
    if data.get("scale") and data.get("scales"):
        data["scales"] = {data["scale"]: data["scales"][data["scale"]]}  # since the name of the new file has no scale
    head = {key: value for key, value in data.items() if key not in (*_DROPPED_KEYS, "activation")}
    spent = sum(rung.cost for rung in search.rungs)
    origin = (
        f"{Path(search.model).name} with {answer.plan}, found by rtdetr-act search among "
        f"{', '.join(search.activations)} on {Path(search.data).name}, {spent} epochs in all. "
        f"{answer.explanation} The evidence is in search.md and search.csv beside this file."
    )
    lines = [
        *textwrap.wrap(origin, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False),
        "",
        *(_dump_yaml({key: value}) for key, value in head.items()),
        *([_dump_activation(data["activation"])] if data.get("activation") else []),
    ]
    index = 0
    for part in ("backbone", "head"):
        lines += ["", f"{part}:"]
        for row in data[part]:
            lines.append(f"  - {_dump_yaml(row)} # {index}")
            index += 1
    return "\n".join(lines) + "\n"


def _dump_activation(text: str) -> str:
    """Return the line `activation: …` of a model YAML, without doubling the single quotes of a plan."""
    line = _dump_yaml({"activation": text})
    if line.startswith("activation: '"):
        quoted = yaml.safe_dump(text, default_style='"', width=10_000, allow_unicode=True).strip()
        line = f"activation: {quoted}"
    return line


def _dump_yaml(value: Any) -> str:
    """Return YAML of a list in one line, or of a mapping in several."""
    flow = isinstance(value, list)
    return yaml.safe_dump(value, default_flow_style=flow, sort_keys=False, width=10_000, allow_unicode=True).strip()


def make_trial_frame(search: Search, trials: Sequence[Trial]) -> pl.DataFrame:
    """Return a data frame with a row per trial: rung, plan, origin, a column per stage, epochs, seed, state, score."""
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
    """Return a row of cells per rung: name, plans, epochs, seeds, best uniform and best mixed plan with scores."""
    rows = []
    for rung in search.rungs:
        own = [trial for trial in trials if trial.rung == rung.name]
        plans = {trial.candidate.assignment for trial in own}
        best = (
            _format_best_plan(search, [t for t in own if is_uniform(t.candidate.assignment) == kind])
            for kind in (True, False)
        )
        seeds = "+".join(map(str, rung.seeds))
        rows.append((rung.name, str(len(plans)), str(rung.epochs), seeds, *best))
    return rows


def _format_best_plan(search: Search, trials: Sequence[Trial]) -> str:
    """Return the plan with the best mean score of some trials, with that score; "" if none has a score."""
    scores: dict[str, list[float]] = {}
    for trial in trials:
        if trial.state == "done":
            scores.setdefault(format_plan(search.stages, trial.candidate.assignment), []).append(trial.score)
    means = {plan: sum(values) / len(values) for plan, values in scores.items()}
    plan = max(means, key=means.__getitem__, default="")
    return f"{plan}: {format_score(means[plan])}" if plan else ""


def make_rung_table(search: Search, trials: Sequence[Trial]) -> Table:
    """Return a table of the rungs for the terminal."""
    table = Table(title="Search", caption=f"{trials[0].metric}: of one run in a rung, mean over the seeds in the final")
    for title in ("rung", "plans", "epochs", "best uniform", "best mixed"):
        table.add_column(title, overflow="fold", justify="right" if title in ("plans", "epochs") else "left")
    for name, plans, epochs, _, uniform, mixed in summarise_rungs(search, trials):
        table.add_row(name, plans, epochs, escape(uniform), escape(mixed))
    return table


def format_search_report(
    search: Search, trials: Sequence[Trial], rows: Sequence[LeaderboardRow], answer: Answer
) -> str:
    """Return the report of a search in Markdown.

    Args:
        search: The search.
        trials: All its runs.
        rows: Leaderboard of the final.
        answer: Its result.
    """
    spent = sum(rung.cost for rung in search.rungs)
    first = search.rungs[0]
    failed = sum(trial.state != "done" for trial in trials)
    tried = len({trial.candidate.assignment for trial in trials})
    parts = [
        "# Search",
        f"**Answer: `{answer.plan}`.** {answer.explanation}",
        f"`{search.model}` on `{search.data}`, {', '.join(search.activations)} in {len(search.stages)} stages, scope "
        f"{search.scope}: {math.prod(len(stage.choices) for stage in search.stages):,} assignments, of which "
        f"{tried} were tried. {spent} epochs of training of a budget of "
        f"{search.budget}." + (f" {format_count(failed, 'run')} gave no score." if failed else ""),
        "## Final",
        "Fresh seeds, whole trainings. Other runs chose the two plans, so that their luck has no part in this.",
        _format_final_table(rows, trials[0].metric),
        "## Rungs",
        "Each run is a whole training of so many epochs, and starts anew; each rung has a seed of its own.",
        format_markdown_table(
            ("rung", "plans", "epochs", "seeds", "best uniform", "best mixed"), summarise_rungs(search, trials)
        ),
        "The best score of many runs flatters: it was picked for being high. Only the final compares.",
        *_describe_ties(search, trials),
        "## What each stage says",
        _format_effects(search, [trial for trial in trials if trial.rung == first.name]),
        "## Every run",
        format_markdown_table(
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
    """Return a sentence on rungs whose scores are all equal, as after very short trainings; [] if there are none."""
    equal = []
    for rung in search.rungs[:-1]:
        scores = {trial.score for trial in trials if trial.rung == rung.name and trial.state == "done"}
        equal += [rung.name] if len(scores) == 1 else []
    return [f"All scores of {join_words(equal)} are equal: order chose there, not merit."] if equal else []


def _sort_key(trial: Trial) -> float:
    """Return a key that sorts trials by descending score, those without a score last."""
    return math.inf if math.isnan(trial.score) else -trial.score


def _format_final_table(rows: Sequence[LeaderboardRow], metric: str) -> str:
    """Return the leaderboard of the final in Markdown."""
    cells = []
    for row in rows:
        comparison, summary = row.comparison, row.summary
        cells.append(
            (
                row.activation,
                str(summary.runs),
                f"{format_score(summary.mean)} ± {format_score(summary.deviation)}",
                _format_difference(comparison) if comparison else "",
                format_p(comparison.p) if comparison and not math.isnan(comparison.p) else "",
                comparison.verdict if comparison else "baseline" if row.is_baseline else "not compared",
                "" if row.latency_ms is None else f"{row.latency_ms:.2f}",
            )
        )
    return format_markdown_table(("plan", "runs", metric, "difference (95 %)", "p", "verdict", "ms/image"), cells)


def _format_difference(comparison: Comparison) -> str:
    """Return a difference of scores with its 95 % interval."""
    difference, low, high = (format_score(v, "+") for v in (comparison.difference, comparison.low, comparison.high))
    return f"{difference} ({low} to {high})"


def _format_effects(search: Search, trials: Sequence[Trial]) -> str:
    """Return the effects of the activations in each stage in Markdown, or why they are not determined."""
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
        + format_markdown_table(("stage", *choices), rows)
    )


def _format_effect(effect: Mapping[str, Effect], name: str) -> str:
    """Return an effect with its standard error, or "" if there is none or nothing to compare it with."""
    if name not in effect or len(effect) == 1:  # the stage does not support it, or supports nothing else
        return ""
    return f"{format_score(effect[name].mean, '+')} ± {format_score(effect[name].error)}"
