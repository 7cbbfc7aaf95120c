"""Simulate comparisons of two detectors, or of two methods with several seeds, and count what is said of them.

    python scripts/calibrate_bootstrap.py [--comparisons 10000] [--powered 1000]

A hundred images with two and a half objects each, some images harder than others. Each method finds some of them
easier than others, which all its seeds share; each seed is a little better or worse than the others; and what a run
finds in an image, how well, and how sure it is of it, differs each time. First, nothing differs between the methods:
the share of comparisons that report a difference at the 5 % level must be 5 %. Then one is better: the share that find
it.

"images" is the bootstrap over images, "percentile" the same with a p-value from the share of resamples on the other
side of zero, "seeds and images" the test that `rtdetr-act compare` prints for several seeds, and "t-test" that over
seeds, paired. With a seed's influence, two checkpoints do differ, so that the bootstrap over images alone may say so.
An hour on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import special, stats

from rtdetr_act.evaluation.average_precision import compute_average_precision
from rtdetr_act.evaluation.bootstrap import (
    Scores,
    compare_over_images,
    compare_over_seeds_and_images,
    compute_influences,
    draw_resamples,
)
from rtdetr_act.evaluation.detections import Floats
from rtdetr_act.evaluation.matching import Matches
from rtdetr_act.evaluation.statistics import LEVEL

IMAGES = 100
RESAMPLES = 500
THRESHOLDS = np.array([0.5, 0.75])
QUALITY = 1.2  # of the boxes, as the logit of their IoU
HARDNESS = 0.7  # standard deviation of the images


@dataclass(frozen=True)
class Case:
    """What the simulated methods are like.

    Attributes:
        seeds: Runs of each method.
        of_seeds: Standard deviation of the quality between seeds.
        of_images: Standard deviation between images of what a method finds easier than another does.
        gain: True difference in quality.
    """

    seeds: int
    of_seeds: float
    of_images: float
    gain: float = 0.0


CASES = (
    Case(1, 0.0, 0.3),
    Case(3, 0.0, 0.3), Case(3, 0.1, 0.3), Case(3, 0.3, 0.3), Case(3, 0.1, 1.0),
    Case(5, 0.1, 0.3), Case(8, 0.1, 0.3),
)  # fmt: skip
BETTER = tuple(Case(seeds, of_seeds, 0.3, 0.2) for of_seeds in (0.0, 0.1) for seeds in (3, 5, 8))


def main(
    comparisons: Annotated[int, typer.Option(min=1, help="Per row in which nothing differs.")] = 10_000,
    powered: Annotated[int, typer.Option(min=1, help="Per row in which one method is better.")] = 1000,
) -> None:
    """Simulate, count, print."""
    table = Table(title="Share of comparisons that report a difference, in % ± its standard error")
    names = ("seeds", "sd of seeds", "sd of images", "gain", "comparisons")
    for column in (*names, "images", "percentile", "seeds and images", "t-test"):
        table.add_column(column, justify="right")
    for case in (*CASES, *BETTER):
        count = powered if case.gain else comparisons
        shares = [_percent(each, count) for each in calibrate(case, count)]
        row = (case.seeds, f"{case.of_seeds:g}", f"{case.of_images:g}", f"{case.gain:g}", f"{count:,}")
        table.add_row(*map(str, row), *shares)
        print(*map(str, row), *shares, sep="  ", flush=True)  # each row as it is known: all of them take long
    Console(width=140).print(table)


def _percent(share: float, count: int) -> str:
    return f"{100 * share:.2f} ± {100 * (share * (1 - share) / count) ** 0.5:.2f}"


def calibrate(case: Case, count: int) -> list[float]:
    """Return the shares of simulated comparisons that report a difference, one per test; the same each time."""
    rng = np.random.default_rng(0)
    p = np.array([_test(case, rng) for _ in range(count)])
    return (p < LEVEL).mean(0).tolist()


def _test(case: Case, rng: np.random.Generator) -> list[float]:
    """Return the p-values of one comparison."""
    methods = _simulate(case, rng)
    resampled = [np.mean([each.resampled[0] for each in group], axis=0) for group in methods]
    side = float((resampled[1] <= resampled[0]).mean())
    found = [compare_over_images(*methods, 0).p, 2 * min(side, 1 - side)]
    if case.seeds > 1:
        scores = [[float(each.observed[0]) for each in group] for group in methods]
        found += [compare_over_seeds_and_images(*methods, 0).p, float(stats.ttest_rel(*scores).pvalue)]
    return found


def _simulate(case: Case, rng: np.random.Generator) -> tuple[list[Scores], list[Scores]]:
    """Return the scores of the runs of two methods on the same images and resamples."""
    resamples = draw_resamples(IMAGES, RESAMPLES, seed=int(rng.integers(2**31)))
    weights = np.concatenate([np.ones((IMAGES, 1)), resamples], axis=1)
    objects = rng.binomial(5, 0.5, IMAGES)
    hardness = HARDNESS * rng.standard_normal(IMAGES)
    methods: tuple[list[Scores], list[Scores]] = ([], [])
    for method, runs in enumerate(methods):
        own = QUALITY + case.gain * method - hardness + case.of_images * rng.standard_normal(IMAGES)
        for _ in range(case.seeds):
            matches = _detect(own + case.of_seeds * rng.standard_normal(), objects, rng)
            precision = compute_average_precision([matches], weights)[0, 0].mean(0, keepdims=True)
            resampled = precision[:, 1:]
            runs.append(Scores(precision[:, 0], resampled, compute_influences(resampled, resamples)))
    return methods


def _detect(quality: Floats, objects: np.ndarray, rng: np.random.Generator) -> Matches:
    """Return what a run finds.

    Args:
        quality: Of its boxes in each image.
        objects: Number of objects in each image.
        rng: Source of the noise.
    """
    owners = np.repeat(np.arange(IMAGES), objects)
    logits = quality[owners] + 0.8 * rng.standard_normal(len(owners))
    seen = rng.random(len(owners)) < special.expit(2 * logits)
    sure = special.expit(logits + rng.standard_normal(len(owners)))
    wrong = np.repeat(np.arange(IMAGES), rng.poisson(2 * np.exp(-0.5 * (quality - QUALITY))))
    images = np.concatenate([owners[seen], wrong])
    scores = np.concatenate([sure[seen], rng.beta(1.5, 4, len(wrong))])
    right = np.zeros((len(THRESHOLDS), len(images)), bool)
    right[:, : seen.sum()] = special.expit(logits[seen]) >= THRESHOLDS[:, None]
    order = np.argsort(-scores, kind="stable")
    right = right[None, :, order]
    return Matches(images[order], right, np.ones_like(right), objects[None])


if __name__ == "__main__":
    typer.run(main)
