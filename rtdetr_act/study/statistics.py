"""Spread, paired differences, and what may be concluded from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats

HALF_POINT = 0.005  # the size of difference that articles about activations report; scores are fractions
LEVEL = 0.05
POWER = 0.8
_ROUNDING = 1e-12  # scores are fractions, so that differences closer than this are equal but for rounding
_NAN = float("nan")


@dataclass(frozen=True)
class Summary:
    """A sample: how many values, their mean, standard deviation (n - 1) and the 95 % confidence interval of the mean.

    With one value, deviation, low and high are NaN; with none, the mean is too.
    """

    runs: int
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, paired by seed.

    There is nothing to judge by with one pair, and where all differences are equal: several seeds that differ by the
    very same amount are no independent evidence (a seed without effect, copied scores, scores rounded to few digits).
    Such comparisons have no p-value, unless all differences are zero, where it is 1.

    Attributes:
        pairs: Seeds that both finished.
        difference: Mean of variant minus baseline.
        low, high: Its 95 % confidence interval, by Student's t; not corrected for several comparisons; NaN without a
            spread to judge by.
        p: p-value of the paired t-test; NaN without a spread to judge by, 1 where all differences are zero.
        adjusted: The same, corrected by Holm for all comparisons of the study that have one.
        effect: Cohen's d of the differences (mean over standard deviation); NaN without a spread to judge by.
        seeds_needed: Seeds that would show a difference of half a point (0.005) with a power of 80 % at 5 %, at the
            spread seen; None without a spread to judge by.
        verdict: "better", "worse" or "no difference shown".
    """

    pairs: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    effect: float
    seeds_needed: int | None
    verdict: str


def summarise(values: Sequence[float]) -> Summary:
    """Return mean, spread and 95 % interval (Student's t) of a sample, which may be empty.

    >>> summary = summarise([0.50, 0.52, 0.54])
    >>> f"{summary.mean:.2f} ± {summary.deviation:.2f}, {summary.low:.3f} to {summary.high:.3f}"
    '0.52 ± 0.02, 0.470 to 0.570'
    """
    runs = len(values)
    mean = float(np.mean(values)) if runs else _NAN
    if runs < 2:
        return Summary(runs, mean, _NAN, _NAN, _NAN)
    deviation = float(np.std(values, ddof=1))
    half = float(special.stdtrit(runs - 1, 1 - LEVEL / 2)) * deviation / math.sqrt(runs)
    return Summary(runs, mean, deviation, mean - half, mean + half)


def compare(pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, Comparison]:
    """Compare each variant with its baseline, and correct for the number of comparisons.

    Args:
        pairs: By variant, its scores and those of its baseline: the same length, one or more, paired by position,
            finite. All comparisons of a study belong into one call, since the correction is over them.

    Returns:
        One comparison per variant, in the same order.

    >>> stock = [0.50, 0.52, 0.53]
    >>> seen = compare({"arelu": ([0.52, 0.53, 0.55], stock), "mish": ([0.50, 0.53, 0.53], stock)})
    >>> {name: (round(each.p, 3), round(each.p_holm, 3), each.verdict) for name, each in seen.items()}
    {'arelu': (0.038, 0.075, 'no difference shown'), 'mish': (0.423, 0.423, 'no difference shown')}
    """
    tested = {name: _test_pairs(variant, baseline) for name, (variant, baseline) in pairs.items()}
    judged = {name: each.p for name, each in tested.items() if not math.isnan(each.p)}
    adjusted = dict(zip(judged, correct_p_values(list(judged.values())), strict=True))
    return {name: _set_verdict(each, adjusted.get(name, _NAN)) for name, each in tested.items()}


def correct_p_values(p: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm (1979) for there being so many: sound however they depend on each other.

    >>> correct_p_values([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def count_seeds_needed(deviation: float, difference: float = HALF_POINT) -> int:
    """Return the fewest pairs, 2 or more, with which a two-sided paired t-test at 5 % has a power of 80 %.

    Args:
        deviation: Standard deviation of the differences, above 0.
        difference: True difference to be seen, in the same unit.

    >>> count_seeds_needed(deviation=0.01)
    34
    """
    effect = difference / deviation
    # A test that knew the deviation would need this many; one that has to estimate it needs a few more.
    known = (special.ndtri(1 - LEVEL / 2) + special.ndtri(POWER)) / effect
    seeds = max(2, math.floor(known**2))
    while _compute_power(seeds, effect) < POWER:
        seeds += 1
    return seeds


def _compute_power(seeds: int, effect: float) -> float:
    # The other tail, significant with the wrong sign, adds less than 1e-5 where the power is near 80 %.
    limit = special.stdtrit(seeds - 1, 1 - LEVEL / 2)
    return float(stats.nct.sf(limit, seeds - 1, effect * math.sqrt(seeds)))


def _test_pairs(variant: Sequence[float], baseline: Sequence[float]) -> Comparison:
    differences = np.subtract(variant, baseline)
    pairs, difference = len(differences), float(differences.mean())
    if np.ptp(differences) < _ROUNDING:
        p = 1.0 if pairs > 1 and abs(difference) < _ROUNDING else _NAN
        return Comparison(pairs, difference, _NAN, _NAN, p, _NAN, _NAN, None, "")
    deviation = float(differences.std(ddof=1))
    result = stats.ttest_rel(variant, baseline)
    interval = result.confidence_interval(1 - LEVEL)
    return Comparison(
        pairs=pairs,
        difference=difference,
        low=float(interval.low),
        high=float(interval.high),
        p=float(result.pvalue),
        p_holm=_NAN,
        effect=difference / deviation,
        seeds_needed=count_seeds_needed(deviation),
        verdict="",
    )


def _set_verdict(comparison: Comparison, adjusted: float) -> Comparison:
    verdict = "no difference shown"
    if adjusted < LEVEL:
        verdict = "better" if comparison.difference > 0 else "worse"
    return replace(comparison, p_holm=adjusted, verdict=verdict)
