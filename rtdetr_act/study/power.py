"""How many seeds and images a study needs to show a difference, from the spread in a pilot study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from rtdetr_act.errors import InputError, quote
from rtdetr_act.evaluation.bootstrap import Components, combine_components, measure_components
from rtdetr_act.evaluation.detection_files import RunScores, read_scores, select_scores
from rtdetr_act.evaluation.differences import PRIMARY, has_learned_nothing
from rtdetr_act.evaluation.statistics import HALF_POINT, LEVEL, POWER
from rtdetr_act.results import Table, TableResult
from rtdetr_act.study.leaderboard import index_by_seed
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.study.run_record import RunRecord
from rtdetr_act.study.storage import SCORES_FILE

_SEEDS = (3, 5, 8, 12, 20, 50)
_FACTORS = (1, 2, 4, 10)  # of the number of images
_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Noise:
    """Where the noise of a pilot study comes from, as standard deviations of mAP50-95, a fraction of 1.

    Attributes:
        runs: Number of runs that it was measured on.
        images: Number of validation images.
        of_seeds: Between the runs of a variant, without what the finite set of images makes of it.
        of_images: Between runs because of the images, in each run in its own way.
        of_differences: Between sets of images in the difference of two variants, shared by all their runs.
        correlation: Of runs with equal seeds, between a variant and its baseline, mean over pairs of variants; NaN with
            fewer than two seeds in common.
        correlation_low, correlation_high: Its 95 % confidence interval by Fisher's transformation; NaN with fewer than
            four pairs of runs.
    """

    runs: int
    images: int
    of_seeds: float
    of_images: float
    of_differences: float
    correlation: float
    correlation_low: float
    correlation_high: float


@dataclass(frozen=True, repr=False)
class PowerPlan(TableResult):
    """How large a study must be to show a difference over seeds and images in four cases of five.

    Attributes:
        difference: The true difference, as a fraction of 1.
        comparisons: Number of comparisons that its p-value is corrected for.
        noise: The noise of the pilot study.
        seeds_needed: Smallest number of seeds by number of validation images; None where no number of seeds will do,
            since the images alone make too much noise.
        detectable: Smallest true difference that is shown, by numbers of seeds and images.
    """

    difference: float
    comparisons: int
    noise: Noise
    seeds_needed: dict[int, int | None]
    detectable: dict[tuple[int, int], float]

    def _summarise(self) -> str:
        """Return the difference and the seeds that it takes on as many images as the pilot has."""
        seeds = self.seeds_needed[self.noise.images]
        return f"{self.difference:g}: {'no number of' if seeds is None else seeds} seeds on {self.noise.images} images"

    def _make_table(self) -> Table:
        """Return the smallest difference that is shown by each number of seeds and images."""
        return ("seeds", "images", "detectable"), ((*place, value) for place, value in self.detectable.items())


def plan_seeds(
    folder: Path | str, difference: float = HALF_POINT, *, comparisons: int = 1, baseline: str = "stock"
) -> PowerPlan:
    """Return how many seeds and images would show a difference, from the runs of a pilot study.

    Noise between seeds is divided by their number, the noise of images by theirs; the noise in the difference that all
    seeds share is not divided by the number of seeds. The test is the one over seeds and images that the report of a
    study has, at the 5 % level, with a power of 80 %.

    Args:
        folder: Folder of a study of detectors, two variants and two seeds or more.
        difference: True difference in mAP50-95, as a fraction of 1. Default: 0.005, half a point.
        comparisons: Number of comparisons of the planned study, for which its p-values are corrected. Default: 1.
        baseline: Activation that the others are compared with. Default: "stock".

    Raises:
        InputError: The folder has no such runs, or an argument is out of range.
    """
    if not (math.isfinite(difference) and 0 < difference < 1):
        raise InputError(f"difference must be a fraction of 1 such as 0.005, not {quote(difference)}")
    if comparisons < 1:
        raise InputError(f"comparisons must be 1 or more, not {comparisons}")
    noise = _measure(Path(folder), baseline)
    level = LEVEL / comparisons
    numbers = [noise.images * factor for factor in _FACTORS]
    return PowerPlan(
        difference=difference,
        comparisons=comparisons,
        noise=noise,
        seeds_needed={images: _count_seeds(noise, images, difference, level) for images in numbers},
        detectable={
            (seeds, images): _find_detectable(noise, seeds, images, level) for seeds in _SEEDS for images in numbers
        },
    )


def _measure(folder: Path, baseline: str) -> Noise:
    """Return the noise of the runs of a study, mean over the variants that are compared with a baseline."""
    variants: dict[str, list[RunRecord]] = {}
    for record in read_runs(folder):
        variants.setdefault(record.variant, []).append(record)
    runs = {variant: index_by_seed(records, PRIMARY) for variant, records in variants.items()}
    scores = {variant: _read(found.values()) for variant, found in runs.items()}
    truths = {variant: found[0].truth for variant, found in scores.items() if found}
    pairs = {
        (name, variant): [select_scores(scores[each], truths.get(name, "")) for each in (name, variant)]
        for name, (first, *_) in variants.items()
        for variant, (other, *_) in variants.items()
        if first.activation == baseline and name != variant and first.setting == other.setting
    }
    pairs = {names: groups for names, groups in pairs.items() if min(map(len, groups)) > 1}
    if not pairs:
        raise InputError(
            f"'{folder}' is not a pilot study: that takes two seeds or more of {quote(baseline)} and of another "
            f"variant, of a detector, with {SCORES_FILE} in their folders"
        )
    if all(has_learned_nothing(one, other, row=0) for one, other in pairs.values()):
        raise InputError(f"nothing was learned in '{folder}', so that it says nothing of noise: train for longer")
    components = [measure_components(one, other, row=0) for one, other in pairs.values()]
    used = {name: group for names, groups in pairs.items() for name, group in zip(names, groups, strict=True)}
    between, own = _average(components, "between"), _average(components, "own")
    return Noise(
        runs=sum(map(len, used.values())),
        images=next(iter(used.values()))[0].influences.shape[1],
        of_seeds=math.sqrt(max(between - own, 0.0)),
        of_images=math.sqrt(own),
        of_differences=math.sqrt(_average(components, "shared")),
        **_correlate([(runs[one], runs[other]) for one, other in pairs]),
    )


def _read(records: Iterable[RunRecord]) -> list[RunScores]:
    """Return the scores of runs on resamples, of those that kept them."""
    return [each for record in records if (each := read_scores(record.folder / SCORES_FILE))]


def _average(components: Sequence[Components], name: str) -> float:
    return math.fsum(getattr(each, name) for each in components) / len(components)


def _correlate(pairs: Sequence[tuple[Mapping[int, RunRecord], Mapping[int, RunRecord]]]) -> dict[str, float]:
    """Return the correlation between runs with equal seeds of variants and their baselines, with its interval.

    The correlation is that of the deviations from the mean of each variant, pooled over the pairs of variants.
    """
    products, squares, count = 0.0, [0.0, 0.0], 0
    for one, other in pairs:
        seeds = sorted(one.keys() & other.keys())
        if len(seeds) < 2:
            continue
        scores = np.array([[group[seed].scores[PRIMARY] for seed in seeds] for group in (one, other)])
        centred = scores - scores.mean(1, keepdims=True)
        products += float((centred[0] * centred[1]).sum())
        squares = [before + float((row**2).sum()) for before, row in zip(squares, centred, strict=True)]
        count += len(seeds) - 1
    if not all(squares):
        return dict.fromkeys(("correlation", "correlation_low", "correlation_high"), math.nan)
    correlation = products / math.sqrt(squares[0] * squares[1])
    # `count` degrees of freedom are those of count + 1 pairs with one mean.
    half = stats.norm.isf(LEVEL / 2) / math.sqrt(count - 2) if count > 2 and abs(correlation) < 1 else math.nan
    low, high = (math.tanh(math.atanh(correlation) + sign * half) if half == half else math.nan for sign in (-1, 1))
    return {"correlation": correlation, "correlation_low": low, "correlation_high": high}


def _compute_power(noise: Noise, seeds: int, images: int, difference: float, level: float) -> float:
    """Return the probability that a difference is shown over seeds and images."""
    scale = noise.images / images
    own = scale * noise.of_images**2
    components = Components(noise.of_seeds**2 + own, own, scale * noise.of_differences**2, images - 1)
    error, freedom = combine_components(components, seeds, seeds)
    if not error:
        return 1.0
    return float(stats.nct.sf(stats.t.isf(level / 2, freedom), freedom, difference / error))


def _count_seeds(noise: Noise, images: int, difference: float, level: float) -> int | None:
    """Return the smallest number of seeds that shows a difference in four cases of five; None if none does."""
    high = 2
    while _compute_power(noise, high, images, difference, level) < POWER:
        high *= 2
        if high > _MOST_SEEDS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if _compute_power(noise, middle, images, difference, level) < POWER:
            low = middle
        else:
            high = middle
    return high


def _find_detectable(noise: Noise, seeds: int, images: int, level: float) -> float:
    """Return the smallest difference that is shown in four cases of five; NaN if it is above 1."""

    def miss(difference: float) -> float:
        return _compute_power(noise, seeds, images, difference, level) - POWER

    return float(optimize.brentq(miss, 0.0, 1.0)) if miss(1.0) > 0 > miss(0.0) else math.nan
