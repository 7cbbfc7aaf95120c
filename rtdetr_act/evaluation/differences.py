"""Differences between methods of detection, tested over images, and over seeds and images, for every score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtdetr_act.evaluation.bootstrap import (
    HEADLINES,
    Scores,
    compare_over_images,
    compare_over_seeds_and_images,
)
from rtdetr_act.evaluation.statistics import LEARNED, NOTHING_LEARNED, Conclusion, conclude
from rtdetr_act.results import Result

PRIMARY = next(iter(HEADLINES))  # the score that conclusions are drawn from first


@dataclass(frozen=True, repr=False)
class ScoreDifference(Result):
    """Difference between two methods in one score.

    Attributes:
        score: Name of the score, such as "mAP50", or of the category that mAP50-95 is of.
        is_category: Whether it is that of a category.
        baseline, variant: Names of the methods.
        baseline_score, variant_score: Their scores, as fractions of 1, means over the runs; NaN where no box is to be
            found.
        over_images: Test against other images, with the same runs.
        over_seeds_and_images: Test against other seeds and other images; None unless both methods have several runs
            and one of them has learned something.
    """

    score: str
    is_category: bool
    baseline: str
    variant: str
    baseline_score: float
    variant_score: float
    over_images: Conclusion
    over_seeds_and_images: Conclusion | None

    @property
    def difference(self) -> float:
        """The score of the variant minus that of the baseline."""
        return self.variant_score - self.baseline_score

    def _summarise(self) -> str:
        """Return the methods, the difference and the verdict over images."""
        return f"{self.score} of {self.variant}: {self.difference:+.4f}, {self.over_images.verdict}"


def compare_methods(methods: Mapping[str, Sequence[Scores]], categories: Sequence[str]) -> list[ScoreDifference]:
    """Return the differences of all methods but the first to the first, in every score.

    mAP50-95 is the primary score: its p-values are corrected for the number of methods. Those of all other scores and
    categories, of all methods, are corrected together. Each of the two questions has corrections of its own.

    Args:
        methods: Scores of the runs of each method by its name, all on the same resamples; the baseline first.
        categories: Names of the categories, in the order of the scores.
    """
    baseline, *variants = methods
    scores = [*HEADLINES, *categories]
    places = [(variant, row) for variant in variants for row in range(len(scores))]
    primary = [place for place in places if place[1] == 0]
    families = [primary, [place for place in places if place not in primary]]
    images: dict[tuple[str, int], Conclusion] = {}
    seeds: dict[tuple[str, int], Conclusion] = {}
    unlearned = Conclusion(0.0, math.nan, math.nan, math.nan, math.nan, NOTHING_LEARNED)
    for family in families:
        pairs = {place: (methods[baseline], methods[place[0]], place[1]) for place in family}
        pairs = {place: pair for place, pair in pairs.items() if not has_learned_nothing(*pair)}
        images |= conclude({place: compare_over_images(*pair) for place, pair in pairs.items()})
        several = {place: pair for place, pair in pairs.items() if min(map(len, pair[:2])) > 1}
        seeds |= conclude({place: compare_over_seeds_and_images(*pair) for place, pair in several.items()})
    return [
        ScoreDifference(
            score=scores[row],
            is_category=row >= len(HEADLINES),
            baseline=baseline,
            variant=variant,
            baseline_score=_average(methods[baseline], row),
            variant_score=_average(methods[variant], row),
            over_images=images.get((variant, row), unlearned),
            over_seeds_and_images=seeds.get((variant, row)),
        )
        for variant, row in places
    ]


def has_learned_nothing(baseline: Sequence[Scores], variant: Sequence[Scores], row: int) -> bool:
    """Return whether no run of two methods has a score worth a comparison: 0.001 as a fraction of 1."""
    return all(float(each.observed[row]) < LEARNED for group in (baseline, variant) for each in group)


def _average(runs: Sequence[Scores], row: int) -> float:
    """Return the mean of a score over the runs of a method."""
    return math.fsum(float(each.observed[row]) for each in runs) / len(runs)
