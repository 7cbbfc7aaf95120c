"""Pareto front of score against cost, in which a variant that is not shown to be worse counts as tied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rtdetr_act.evaluation.statistics import Comparison, compare
from rtdetr_act.formatting import UNKNOWN, finite_or_none, format_p, format_score, join_words
from rtdetr_act.study.leaderboard import LeaderboardRow, index_by_seed, pair_by_seed
from rtdetr_act.study.run_record import RunRecord

Status = Literal["front", "tied", "dominated", "unknown"]


@dataclass(frozen=True)
class Cost:
    """A cost of variants.

    Attributes:
        name: Its name, such as "latency".
        unit: Its unit on an axis, such as "ms per image".
        form: Format of its values, such as "{:.2f} ms".
        tolerance: Relative difference up to which two costs count as equal, such as 0.02; 0 for exact costs.
        read: Function that returns the cost of a variant; None, 0 and NaN are unknown.
    """

    name: str
    unit: str
    form: str
    tolerance: float
    read: Callable[[LeaderboardRow], float | None]


# 2 % is for an idle machine: on two loaded cores, medians of four identical networks differ by 11 to 51 %.
LATENCY = Cost("latency", "ms per image", "{:.2f} ms", 0.02, lambda row: row.latency_ms)
GFLOPS = Cost("operations", "GFLOPs at 640 pixels", "{:.2f} GFLOPs", 0.0, lambda row: row.gflops_640)
PARAMETERS = Cost("parameters", "parameters", "{:,.0f}", 0.0, lambda row: row.parameters)


@dataclass(frozen=True)
class FrontPoint:
    """One variant in a chart of score against cost.

    Attributes:
        variant: Its name.
        runs: Number of its finished runs.
        score: Mean score over them; NaN without any.
        cost: Its cost; None if that or its score is unknown.
        status: "front" if no variant scores more at no more cost, or as much at less cost, by the means; "tied" if one
            does, but none is shown to score more; "dominated" if one is; "unknown" without a score or a cost.
        rival: Of the variants that dominate it by the means, the one from which it is told apart most clearly; None on
            the front.
        comparison: Its comparison with the rival, paired by seed; None without a rival or a seed in common.
    """

    variant: str
    runs: int
    score: float
    cost: float | None
    status: Status
    rival: str | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Front:
    """Pareto front of some variants.

    Attributes:
        points: All variants, in the order given.
        cost: The cost.
        tests: Number of paired tests that p-values are corrected for.
    """

    points: tuple[FrontPoint, ...]
    cost: Cost
    tests: int

    def select(self, status: Status) -> list[FrontPoint]:
        """Return the variants of a status, those on the front by rising cost and score."""
        found = [point for point in self.points if point.status == status]
        return sorted(found, key=lambda point: (point.cost, point.score)) if status == "front" else found


def find_front(
    rows: Sequence[LeaderboardRow], runs: Mapping[str, Sequence[RunRecord]], metric: str, cost: Cost
) -> Front:
    """Return the Pareto front of some variants, with those that are tied with it and those that are dominated.

    A variant is compared with each one that dominates it by the means, over the seeds that both finished, by a paired
    t-test corrected by Holm for all of these comparisons. In simulations of 3, 6 or 12 equal variants with 3, 5 or 10
    seeds, 3.5 to 5.2 % of 3,000 fronts then have a dominated one. Compared with the best alone of those that cost no
    more, it is 4.0 to 15.5 %: which one that is depends on the scores.

    Args:
        rows: The variants, of one setting or several.
        runs: Runs of each variant.
        metric: Name of the score.
        cost: The cost.
    """
    costs = {
        row.variant: value
        for row in rows
        if math.isfinite(row.summary.mean) and (value := finite_or_none(cost.read(row)))
    }
    means = {row.variant: row.summary.mean for row in rows}
    rivals = {
        name: [
            other for other in costs if _dominates(means[other], costs[other], means[name], costs[name], cost.tolerance)
        ]
        for name in costs
    }
    compared = _compare_all(rivals, runs, metric, {row.variant: row.validation_share for row in rows})
    points = tuple(_place(row, costs.get(row.variant), rivals.get(row.variant), compared) for row in rows)
    return Front(points, cost, sum(math.isfinite(each.p_holm) for each in compared.values()))


def _dominates(score: float, cost: float, other_score: float, other_cost: float, tolerance: float) -> bool:
    """Return whether a variant scores more than another at no more cost, or as much at less cost."""
    if score == other_score:
        return cost * (1 + tolerance) < other_cost
    return score > other_score and cost <= other_cost * (1 + tolerance)


def _compare_all(
    rivals: Mapping[str, Sequence[str]],
    runs: Mapping[str, Sequence[RunRecord]],
    metric: str,
    shares: Mapping[str, float],
) -> dict[tuple[str, str], Comparison]:
    """Return the comparison of each variant with each of its rivals with which it has a seed in common.

    Args:
        rivals: The variants that dominate each variant by the means.
        runs: Runs of each variant.
        metric: Name of the score.
        shares: Validation images per training image of each variant whose seeds divide the images; 0 of the others.
    """
    scores = {
        name: {seed: run.scores[metric] for seed, run in index_by_seed(runs[name], metric).items()} for name in rivals
    }
    pairs = pair_by_seed(scores, {(name, other): (name, other) for name, others in rivals.items() for other in others})
    return compare(pairs, {pair: max(shares[each] for each in pair) for pair in pairs})


def _place(
    row: LeaderboardRow,
    cost: float | None,
    rivals: Sequence[str] | None,
    compared: Mapping[tuple[str, str], Comparison],
) -> FrontPoint:
    """Return where a variant stands.

    Args:
        row: The variant.
        cost: Its cost.
        rivals: The variants that dominate it by the means; None if its cost or its score is unknown.
        compared: The comparisons of variants with their rivals.
    """
    status: Status = "unknown" if rivals is None else "front"
    rival = comparison = None
    if rivals:
        rival = min(rivals, key=lambda other: _rank_evidence(compared.get((row.variant, other))))
        comparison = compared.get((row.variant, rival))
        status = "dominated" if comparison and comparison.verdict == "worse" else "tied"
    return FrontPoint(row.variant, row.summary.runs, row.summary.mean, cost, status, rival, comparison)


def _rank_evidence(comparison: Comparison | None) -> tuple[float, float, float]:
    """Return a key that sorts comparisons by how clearly they show a variant to be worse, the clearest first.

    Means over all seeds and over those in common may disagree, so that a comparison may even show it to be better.
    """
    if comparison is None:
        return (2, 0, 0)
    p = finite_or_none(comparison.p_holm)
    return (comparison.difference >= 0, 1.0 if p is None else p, comparison.difference)


def describe_front(front: Front) -> list[str]:
    """Return sentences on which variants are on the front, tied with it and dominated; [] if none is known."""
    members, tied, dominated = (front.select(status) for status in ("front", "tied", "dominated"))
    if not members:
        return []
    sentences = [f"On the front: {join_words([point.variant for point in members])}."]
    if tied:
        sentences.append(f"Tied with it: {join_words([_describe_point(point) for point in tied])}.")
    if dominated:
        sentences.append(f"Dominated: {join_words([_describe_point(point) for point in dominated])}.")
    if front.tests:
        sentences.append(f"p-values are those of paired t-tests over seeds, corrected by Holm for {front.tests}.")
    elif tied and all(point.runs < 2 for point in front.points):
        sentences.append("One run each cannot tell scores apart: the front is that of these very runs.")
    elif tied:
        sentences.append("No paired test is possible, so that none is shown to be worse.")
    return sentences


def _describe_point(point: FrontPoint) -> str:
    """Return a variant with its difference to its rival and its p-value: "arelu (−0.004 to stock, p = 0.410)"."""
    if point.comparison is None:
        return f"{point.variant} (no seed in common with {point.rival})"
    p = format_p(point.comparison.p_holm)
    equation = (f"p {p}" if p.startswith("<") else f"p = {p}").replace(" ", "\N{NO-BREAK SPACE}")
    tested = "" if p == UNKNOWN else f", {equation}"
    return f"{point.variant} ({format_score(point.comparison.difference, '+')} to {point.rival}{tested})"
