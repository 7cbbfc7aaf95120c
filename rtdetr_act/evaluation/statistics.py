"""Confidence intervals, paired t-tests with correction for multiple comparisons, and power.

Where each seed also divides the images anew, runs share images and are not independent: the variance of a mean over n
of them is not s²/n but s² (1/n + r), with r validation images per training image (Nadeau and Bengio, "Inference for the
Generalization Error", Machine Learning 52, 2003). `share` is that r, and 0 where all runs have the same split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np
from scipy import special, stats

from rtdetr_act.evaluation.detections import Floats

HALF_POINT = 0.005  # a typical difference in articles on activations, as a fraction of 1
LEVEL = 0.05
POWER = 0.8
_ROUNDING = 1e-12  # smaller differences of scores, which are fractions of 1, are rounding errors
_NAN = float("nan")

LEARNED = 0.001  # scores below it, as fractions of 1, are those of networks that have learned nothing
MANY_RUNS = 5  # from which on charts draw the interval of a mean: that of two runs spans the whole axis

K = TypeVar("K")
Verdict = Literal["better", "worse", "no difference shown", "nothing was learned"]
NO_DIFFERENCE: Verdict = "no difference shown"
NOTHING_LEARNED: Verdict = "nothing was learned"


@dataclass(frozen=True)
class Summary:
    """Statistics of a sample.

    Attributes:
        runs: Number of values.
        mean: Mean; NaN without values.
        deviation: Standard deviation (n - 1); NaN for fewer than two values.
        low, high: 95 % confidence interval of the mean by Student's t; NaN for fewer than two values.
    """

    runs: int
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of a variant with the baseline, paired by seed.

    There is no test with a single pair, nor if all differences are equal: several seeds with the very same difference
    are not independent evidence (a seed without effect, copied scores, scores rounded to few digits). Nor is there one
    if no run of either has learned anything. Values that need a test are then NaN or None, except for a p-value of 1 if
    all differences of several pairs are zero.

    Attributes:
        pairs: Number of seeds that both have finished.
        difference: Mean of variant minus baseline.
        low, high: Confidence interval of the difference by Student's t, at the level that Holm's correction leaves it:
            it leaves out zero if and only if the corrected p-value is below 0.05. A single one is a 95 % interval.
        p: p-value of the paired t-test.
        p_holm: The same, corrected by Holm for all comparisons of the study that have a p-value.
        effect: Cohen's d of the differences: mean divided by standard deviation.
        seeds_needed: Number of seeds with which a difference of half a point (0.005) is detected with a power of 80 %
            at the 5 % level, given the observed spread.
        verdict: Conclusion at the 5 % level, by the corrected p-value.
    """

    pairs: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    effect: float
    seeds_needed: int | None
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """Estimate of a difference, with its standard error.

    Attributes:
        estimate: The difference observed.
        error: Its standard error; 0 if no resample differs.
        freedom: Degrees of freedom of the error, for Student's t.
    """

    estimate: float
    error: float
    freedom: float

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference; NaN if the difference is unknown."""
        if self.error == 0:
            return 1.0 if self.estimate == 0 else math.nan
        return 2 * float(stats.t.sf(abs(self.estimate) / self.error, self.freedom))

    def compute_interval(self, level: float) -> tuple[float, float]:
        """Return the confidence interval that leaves out `level` in all, such as 0.05."""
        half = float(stats.t.isf(level / 2, self.freedom)) * self.error
        return self.estimate - half, self.estimate + half


@dataclass(frozen=True)
class Conclusion:
    """What may be concluded of one difference.

    Attributes:
        error: Standard error of the difference.
        low, high: Confidence interval of the difference, at the level that Holm's correction leaves it: it leaves out
            zero if and only if the corrected p-value is below 0.05.
        p: Two-sided p-value of no difference; NaN if the difference is unknown.
        p_holm: The same, corrected by Holm.
        verdict: Conclusion at the 5 % level, by the corrected p-value.
    """

    error: float
    low: float
    high: float
    p: float
    p_holm: float
    verdict: Verdict


def summarise(values: Sequence[float], share: float = 0.0) -> Summary:
    """Return mean, standard deviation and 95 % confidence interval of a sample, which may be empty.

    Args:
        values: The sample.
        share: Validation images per training image, where runs divide the images. Default: 0, they do not.

    >>> summary = summarise([0.50, 0.52, 0.54])
    >>> f"{summary.mean:.2f} ± {summary.deviation:.2f}, {summary.low:.3f} to {summary.high:.3f}"
    '0.52 ± 0.02, 0.470 to 0.570'
    """
    runs = len(values)
    mean = float(np.mean(values)) if runs else _NAN
    if runs < 2:
        return Summary(runs, mean, _NAN, _NAN, _NAN)
    deviation = float(np.std(values, ddof=1))
    half = float(special.stdtrit(runs - 1, 1 - LEVEL / 2)) * deviation * math.sqrt(1 / runs + share)
    return Summary(runs, mean, deviation, mean - half, mean + half)


def summarise_scores(values: Sequence[float], share: float = 0.0) -> Summary:
    """Return the same of scores, which are fractions of 1: the interval ends at 0 and at 1.

    >>> summary = summarise_scores([0.01, 0.05])
    >>> f"{summary.mean:.2f}, {summary.low:.2f} to {summary.high:.2f}"
    '0.03, 0.00 to 0.28'
    """
    summary = summarise(values, share)
    if math.isnan(summary.low):
        return summary
    return replace(summary, low=max(summary.low, 0.0), high=min(summary.high, 1.0))


def compare(
    pairs: Mapping[K, tuple[Sequence[float], Sequence[float]]], shares: Mapping[K, float] = MappingProxyType({})
) -> dict[K, Comparison]:
    """Return the comparison of each variant with its baseline, corrected for the number of comparisons.

    Args:
        pairs: For each variant, its scores and those of its baseline: finite, of equal length of 1 or more, paired by
            position. All comparisons of a study belong in one call, since the correction depends on their number.
        shares: Validation images per training image, of variants whose runs divide the images. Default: none.

    Returns:
        A comparison per variant, in the same order.

    >>> stock = [0.50, 0.52, 0.53]
    >>> compared = compare({"arelu": ([0.52, 0.53, 0.55], stock), "mish": ([0.50, 0.53, 0.53], stock)})
    >>> {name: (round(each.p, 3), round(each.p_holm, 3), each.verdict) for name, each in compared.items()}
    {'arelu': (0.038, 0.075, 'no difference shown'), 'mish': (0.423, 0.423, 'no difference shown')}
    """
    found = {
        name: _estimate_difference(variant, baseline, shares.get(name, 0.0))
        for name, (variant, baseline) in pairs.items()
    }
    tested = conclude({name: each for name, each in found.items() if each})
    return {name: _describe_pairs(*pairs[name], shares.get(name, 0.0), found[name], tested.get(name)) for name in pairs}


def conclude(found: Mapping[K, Difference]) -> dict[K, Conclusion]:
    """Return what may be concluded of some differences, corrected by Holm for their number."""
    p = {place: each.p for place, each in found.items()}
    known = [place for place, value in p.items() if not math.isnan(value)]
    values = [p[place] for place in known]
    levels = dict(zip(known, correct_levels(values), strict=True))
    corrected = dict(zip(known, correct_p_values(values), strict=True))
    tests = {}
    for place, each in found.items():
        low, high = each.compute_interval(levels.get(place, LEVEL))
        p_holm = corrected.get(place, math.nan)
        verdict: Verdict = NO_DIFFERENCE
        if p_holm < LEVEL:
            verdict = "better" if each.estimate > 0 else "worse"
        tests[place] = Conclusion(each.error, low, high, p[place], p_holm, verdict)
    return tests


def correct_p_values(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm (1979), which is valid for dependent tests too.

    Args:
        p: Finite p-values of all tests, in any order, which is also that of the result.

    >>> correct_p_values([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    stepped, _ = _step_down(np.asarray(p, dtype=float))
    return np.minimum(stepped, 1.0).tolist()


def correct_levels(p: Sequence[float]) -> list[float]:
    """Return the level of each confidence interval that agrees with p-values corrected by Holm.

    An interval at this level leaves out zero if and only if the corrected p-value is below 0.05. Like the correction,
    it depends on the other p-values.

    Args:
        p: Finite p-values of all tests, in any order, which is also that of the result.

    >>> [round(level, 4) for level in correct_levels([0.01, 0.04, 0.03])]
    [0.0167, 0.0333, 0.025]
    """
    values = np.asarray(p, dtype=float)
    stepped, counts = _step_down(values)
    return (LEVEL * np.divide(values, stepped, out=1 / counts, where=values > 0)).tolist()


def _step_down(p: Floats) -> tuple[Floats, Floats]:
    """Return p-values corrected by Holm without the bound of 1, and how many p-values are at least as large as each."""
    order = np.argsort(p, kind="stable")
    counts, stepped = np.empty_like(p), np.empty_like(p)
    counts[order] = np.arange(len(p), 0, -1)
    stepped[order] = np.maximum.accumulate(p[order] * counts[order])
    return stepped, counts


def count_seeds_needed(deviation: float, difference: float = HALF_POINT, share: float = 0.0) -> int | None:
    """Return the smallest number of pairs, 2 or more, for which a two-sided paired t-test at 5 % has a power of 80 %.

    Args:
        deviation: Standard deviation of the differences, above 0.
        difference: True difference to detect, in the same unit. Default: 0.005.
        share: Validation images per training image, where runs divide the images. Default: 0, they do not.

    Returns:
        The number; None if the images that the runs share keep any number from it.

    >>> count_seeds_needed(deviation=0.01), count_seeds_needed(deviation=0.01, share=0.25)
    (34, None)
    """
    effect = difference / deviation
    # The number for a known deviation; an estimated one needs a few more.
    most = (effect / (special.ndtri(1 - LEVEL / 2) + special.ndtri(POWER))) ** 2  # the largest variance of the mean
    if most <= share:
        return None
    seeds = max(2, math.floor(1 / (most - share)))
    while _compute_power(seeds, effect, share) < POWER:
        seeds += 1
    return seeds


def _compute_power(seeds: int, effect: float, share: float) -> float:
    """Return the power of a paired t-test at 5 % for an effect in units of the standard deviation."""
    # The other tail, significant with the wrong sign, adds less than 1e-5 near a power of 80 %.
    limit = special.stdtrit(seeds - 1, 1 - LEVEL / 2)
    return float(stats.nct.sf(limit, seeds - 1, effect / math.sqrt(1 / seeds + share)))


def _estimate_difference(variant: Sequence[float], baseline: Sequence[float], share: float) -> Difference | None:
    """Return the mean difference of pairs with its standard error; None for one pair, or if nothing was learned."""
    differences = np.subtract(variant, baseline)
    if len(differences) < 2 or max(*variant, *baseline) < LEARNED:
        return None
    mean, freedom = float(differences.mean()), len(differences) - 1
    if np.ptp(differences) < _ROUNDING:
        return Difference(0.0 if abs(mean) < _ROUNDING else mean, 0.0, freedom)
    return Difference(mean, float(differences.std(ddof=1)) * math.sqrt(1 / len(differences) + share), freedom)


def _describe_pairs(
    variant: Sequence[float],
    baseline: Sequence[float],
    share: float,
    found: Difference | None,
    tested: Conclusion | None,
) -> Comparison:
    """Return the comparison of a variant with its baseline.

    Args:
        variant: Its scores.
        baseline: Those of the baseline.
        share: Validation images per training image, where runs divide the images; 0 otherwise.
        found: As `_estimate_difference` returns it.
        tested: What may be concluded of it.
    """
    pairs, difference = len(variant), float(np.subtract(variant, baseline).mean())
    if found is None or tested is None:
        verdict = NOTHING_LEARNED if max(*variant, *baseline) < LEARNED else NO_DIFFERENCE
        return Comparison(pairs, difference, _NAN, _NAN, _NAN, _NAN, _NAN, None, verdict)
    if not found.error:
        return Comparison(pairs, difference, _NAN, _NAN, tested.p, tested.p_holm, _NAN, None, tested.verdict)
    deviation = found.error / math.sqrt(1 / pairs + share)
    return Comparison(
        pairs=pairs,
        difference=difference,
        low=tested.low,
        high=tested.high,
        p=tested.p,
        p_holm=tested.p_holm,
        effect=difference / deviation,
        seeds_needed=count_seeds_needed(deviation, share=share),
        verdict=tested.verdict,
    )
