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
from rtdetr_act.files import write_together
from rtdetr_act.integrations.ultralytics.models import load_variant
from rtdetr_act.study.leaderboard import Line
from rtdetr_act.study.search import EVIDENCE, FINAL, Effect, Search, Trial, fit_effects, is_uniform, write_plan
from rtdetr_act.study.statistics import HALF_POINT
from rtdetr_act.study.wording import join_words, write_count, write_p, write_score

# Known to the process that built the model, or of the folder it came from, and no part of what to build.
_NOT_KEPT = ("backbone", "head", "scale", "yaml_file", "ch", "channels")


@dataclass(frozen=True)
class Answer:
    """What to build: the plan, whether it mixes activations, and in words what speaks for it."""

    plan: str
    mixed: bool
    words: str


def answer(search: Search, trials: Sequence[Trial], lines: Sequence[Line]) -> Answer:
    """Choose between the two plans of the final: the mixed one only where it is shown to be better.

    Args:
        search: The search.
        trials: All of them.
        lines: The leaderboard of the final.

    Raises:
        TrainingError: No run of the final gave a score.
    """
    picks = {is_uniform(trial.pick.assignment): trial.pick for trial in trials if trial.rung == FINAL}
    plans = {kind: write_plan(search.stages, pick.assignment) for kind, pick in picks.items()}
    by_plan = {line.activation: line for line in lines}
    uniform, mixed = by_plan[plans[True]], by_plan[plans[False]]
    if not uniform.summary.runs and not mixed.summary.runs:
        raise TrainingError("no run of the final gave a score: its report.html says why")
    if not mixed.comparison:
        only = uniform if uniform.summary.runs else mixed
        words = "Nothing could be compared, since the two plans of the final have no finished seed in common."
        return Answer(only.activation, only is mixed, words)
    seen = mixed.comparison
    interval = "" if math.isnan(seen.low) else f" (95 % {write_score(seen.low, '+')} to {write_score(seen.high, '+')})"
    p = "" if math.isnan(seen.p) else f", p = {write_p(seen.p)}"
    facts = (
        f"{write_score(seen.difference, '+')} {trials[0].metric}{interval}{p}, paired over "
        f"{write_count(seen.pairs, 'fresh seed')}"
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
        words += f" About {write_count(seen.seeds_needed, 'seed')} would show half a point ({HALF_POINT})."
    return Answer(uniform.activation, False, words)


def write_evidence(
    search: Search, trials: Sequence[Trial], lines: Sequence[Line], found: Answer, folder: Path
) -> list[Path]:
    """Write best.yaml, search.md and search.csv, all of them or none, and return their paths; raises InputError."""
    texts = (
        compose_model(search, found),
        describe(search, trials, lines, found),
        tabulate(search, trials).write_csv(),
    )
    contents = {folder / name: text.encode() for name, text in zip(EVIDENCE, texts, strict=True)}
    try:
        write_together(contents)
    except OSError as error:
        raise InputError(
            f"cannot write to '{folder}': {error.strerror or error}; the same command makes the files once that is put "
            "right"
        ) from None
    return list(contents)


def compose_model(search: Search, found: Answer) -> str:
    """Return the base model as a YAML with the plan under `activation:`, its evidence in the comment before it."""
    _, model = load_variant(search.model, found.plan, scope=search.scope, act_lr=search.act_lr)
    data: dict[str, Any] = dict(model.model.yaml)
    if data.get("scale") and data.get("scales"):
        data["scales"] = {data["scale"]: data["scales"][data["scale"]]}  # the file's name no longer tells which
    head = {key: value for key, value in data.items() if key not in (*_NOT_KEPT, "activation")}
    spent = sum(rung.cost for rung in search.rungs)
    origin = (
        f"{Path(search.model).name} with {found.plan}, found by rtdetr-act search among "
        f"{', '.join(search.activations)} on {Path(search.data).name}, {spent} epochs in all. "
        f"{found.words} The evidence is in search.md and search.csv beside this file."
    )
    lines = [
        *textwrap.wrap(origin, 118, initial_indent="# ", subsequent_indent="# ", break_long_words=False),
        "",
        *(_dump({key: value}) for key, value in head.items()),
        *([_dump({"activation": data["activation"]})] if data.get("activation") else []),
    ]
    index = 0
    for part in ("backbone", "head"):
        lines += ["", f"{part}:"]
        for row in data[part]:
            lines.append(f"  - {_dump(row)} # {index}")
            index += 1
    return "\n".join(lines) + "\n"


def _dump(value: Any) -> str:
    """Write a row as one line, a mapping as several."""
    flow = isinstance(value, list)
    return yaml.safe_dump(value, default_flow_style=flow, sort_keys=False, width=10_000, allow_unicode=True).strip()


def tabulate(search: Search, trials: Sequence[Trial]) -> pl.DataFrame:
    """Return every trial as a row: rung, plan, origin, the activation of each stage, epochs, seed, state, score."""
    rows = [
        {
            "rung": trial.rung,
            "plan": write_plan(search.stages, trial.pick.assignment),
            "origin": trial.pick.origin,
            **{stage.name: act for stage, act in zip(search.stages, trial.pick.assignment, strict=True)},
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
        plans = {trial.pick.assignment for trial in mine}
        best = (_best(search, [t for t in mine if is_uniform(t.pick.assignment) == kind]) for kind in (True, False))
        seeds = "+".join(map(str, rung.seeds))
        found.append((rung.name, str(len(plans)), str(rung.epochs), seeds, *best))
    return found


def _best(search: Search, trials: Sequence[Trial]) -> str:
    """Name the best of some trials by its mean score; in the final, where each kind has one plan, that is its mean."""
    scores: dict[str, list[float]] = {}
    for trial in trials:
        if trial.state == "done":
            scores.setdefault(write_plan(search.stages, trial.pick.assignment), []).append(trial.score)
    means = {plan: sum(values) / len(values) for plan, values in scores.items()}
    plan = max(means, key=means.__getitem__, default="")
    return f"{plan}: {write_score(means[plan])}" if plan else ""


def draw_table(search: Search, trials: Sequence[Trial]) -> Table:
    """Return the rungs as a table for the terminal."""
    table = Table(title="Search", caption=f"{trials[0].metric}: of one run in a rung, mean over the seeds in the final")
    for title in ("rung", "plans", "epochs", "best uniform", "best mixed"):
        table.add_column(title, overflow="fold", justify="right" if title in ("plans", "epochs") else "left")
    for name, plans, epochs, _, uniform, mixed in summarise_rungs(search, trials):
        table.add_row(name, plans, epochs, escape(uniform), escape(mixed))
    return table


def describe(search: Search, trials: Sequence[Trial], lines: Sequence[Line], found: Answer) -> str:
    """Return the evidence as Markdown."""
    spent = sum(rung.cost for rung in search.rungs)
    first = search.rungs[0]
    failed = sum(trial.state != "done" for trial in trials)
    parts = [
        "# Search",
        f"**Answer: `{found.plan}`.** {found.words}",
        f"`{search.model}` on `{search.data}`, {', '.join(search.activations)} in {len(search.stages)} stages, scope "
        f"{search.scope}: {math.prod(len(stage.choices) for stage in search.stages):,} assignments, of which "
        f"{len({trial.pick.assignment for trial in trials})} were tried. {spent} epochs of training of a budget of "
        f"{search.budget}." + (f" {write_count(failed, 'run')} gave no score." if failed else ""),
        "## Final",
        "Fresh seeds, whole trainings. Other runs chose the two plans, so that their luck has no part in this.",
        _final_table(lines, trials[0].metric),
        "## Rungs",
        "Each run is a whole training of so many epochs, and starts anew; each rung has a seed of its own.",
        _table(("rung", "plans", "epochs", "seeds", "best uniform", "best mixed"), summarise_rungs(search, trials)),
        "The best score of many runs flatters: it was picked for being high. Only the final compares.",
        *_warn_of_equals(search, trials),
        "## What each stage says",
        _describe_effects(search, [trial for trial in trials if trial.rung == first.name]),
        "## Every run",
        _table(
            ("rung", "origin", "plan", "epochs", "seed", trials[0].metric),
            [
                (t.rung, t.pick.origin, write_plan(search.stages, t.pick.assignment), str(t.epochs), str(t.seed),
                 write_score(t.score) if t.state == "done" else t.state)
                for rung in search.rungs
                for t in sorted((t for t in trials if t.rung == rung.name), key=_order)
            ],
        ),
        "Arguments that are counted in epochs (warmup_epochs, close_mosaic, patience) are the same at every length.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _warn_of_equals(search: Search, trials: Sequence[Trial]) -> list[str]:
    """Say which rungs could not choose, as where trainings are so short that all score nothing."""
    equal = []
    for rung in search.rungs[:-1]:
        scores = {trial.score for trial in trials if trial.rung == rung.name and trial.state == "done"}
        equal += [rung.name] if len(scores) == 1 else []
    return [f"All scores of {join_words(equal)} are equal: order chose there, not merit."] if equal else []


def _order(trial: Trial) -> float:
    return math.inf if math.isnan(trial.score) else -trial.score


def _final_table(lines: Sequence[Line], metric: str) -> str:
    rows = []
    for line in lines:
        seen, spread = line.comparison, line.summary
        rows.append(
            (
                line.activation,
                str(spread.runs),
                f"{write_score(spread.mean)} ± {write_score(spread.deviation)}",
                f"{write_score(seen.difference, '+')} ({write_score(seen.low, '+')} to {write_score(seen.high, '+')})"
                if seen
                else "",
                write_p(seen.p) if seen and not math.isnan(seen.p) else "",
                seen.verdict if seen else "baseline" if line.is_baseline else "not compared",
                "" if line.latency is None else f"{line.latency:.2f}",
            )
        )
    return _table(("plan", "runs", metric, "difference (95 %)", "p", "verdict", "ms/image"), rows)


def _describe_effects(search: Search, trials: Sequence[Trial]) -> str:
    effects = fit_effects(search.stages, trials)
    if not effects:
        return "The first rung has too few runs to tell what each stage adds."
    choices = [name for name in search.activations if any(name in stage.choices for stage in search.stages)]
    rows = [
        (stage.name, *(_write_effect(effect, name) for name in choices))
        for stage, effect in zip(search.stages, effects, strict=True)
    ]
    return (
        f"What an activation in a stage adds to {trials[0].metric} after {trials[0].epochs} epochs, against the mean "
        f"of those of that stage, ± its standard error: least squares over the {len(trials)} runs of the first "
        "rung, as if stages did not depend on one another. An effect smaller than two errors is none that these "
        "runs can tell, and of twenty that are none, one exceeds them by chance.\n\n"
        + _table(("stage", *choices), rows)
    )


def _write_effect(effect: Mapping[str, Effect], name: str) -> str:
    if name not in effect or len(effect) == 1:  # it cannot stand there, or nothing else can
        return ""
    return f"{write_score(effect[name].mean, '+')} ± {write_score(effect[name].error)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
