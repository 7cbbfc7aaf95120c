"""Compare runs of one activation with one another: real networks between which nothing differs but the seed.

    for seed in 0 1 2 3 4 5 6 7 8 9; do
      rtdetr-act train act=stock model=rtdetr-n.yaml data=my.yaml seed=$seed save_period=1 project=equal name=s$seed
    done
    python scripts/calibrate_on_runs.py equal my.yaml

Every pair of disjoint groups of runs is compared, by the bootstrap over images, by that over seeds and images, and by a
t-test over seeds: the shares that report a difference. Pairs share runs, so that these shares are rougher than their
number suggests. Of each run the best checkpoint is taken, the last one, and the average of the last ones (of the
averaged weights that Ultralytics saves with save_period=1). The spread between seeds of each says what averaging
brings; "sd by images" is how much of it a finite set of images makes.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from rtdetr_act.evaluation.bootstrap import (
    Scores,
    compare_over_images,
    compare_over_seeds_and_images,
    draw_resamples,
    score_resamples,
)
from rtdetr_act.evaluation.matching import match_detections
from rtdetr_act.evaluation.statistics import LEVEL
from rtdetr_act.integrations.ultralytics.datasets import resolve_data
from rtdetr_act.integrations.ultralytics.detections import collect_detections
from rtdetr_act.integrations.ultralytics.models import load_model

MOST = 2000  # pairs of groups; of more, as many are drawn


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with a run folder per seed.")],
    data: Annotated[str, typer.Argument(help="Data set.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    averaged: Annotated[list[int], typer.Option(help="Numbers of last checkpoints to average.")] = [5, 10],  # noqa: B006
    resamples: Annotated[int, typer.Option(help="Of the images.")] = 1000,
) -> None:
    """Validate, compare, print."""
    runs = sorted(path.parent for path in folder.glob("*/weights"))
    settings = {"data": resolve_data(data), "split": split, "workers": 0}
    table = Table(title=f"{len(runs)} runs in {folder}, {split}: mAP50-95 in points")
    columns = ("checkpoint", "mean", "sd", "sd by images", "group", "pairs", "images", "seeds and images", "t-test")
    for column in columns:
        table.add_column(column, justify="right")
    for name in ("best", "last", *(f"last {count} averaged" for count in averaged)):
        scores = [score_run(run, name, settings, resamples) for run in runs]
        observed = 100 * np.array([each.observed[0] for each in scores])
        own = np.stack([each.resampled[0] for each in scores])
        by_images = 100 * float((own - own.mean(0)).var(axis=1, ddof=1).sum() / (len(own) - 1)) ** 0.5
        figures = [f"{value:.2f}" for value in (observed.mean(), observed.std(ddof=1), by_images)]
        for size in range(2, len(runs) // 2 + 1):
            pairs = list_pairs(len(runs), size)
            shares = np.mean([test(scores, *pair) for pair in pairs], axis=0)
            row = [name, *figures, str(size), str(len(pairs)), *(f"{100 * share:.1f} %" for share in shares)]
            table.add_row(*row)
            print(*row, sep="  ", flush=True)
    Console(width=140).print(table)


def list_pairs(runs: int, size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the pairs of disjoint groups of runs."""
    groups = list(itertools.combinations(range(runs), size))
    pairs = [(a, b) for a, b in itertools.combinations(groups, 2) if not set(a) & set(b)]
    return random.Random(0).sample(pairs, MOST) if len(pairs) > MOST else pairs


def test(scores: Sequence[Scores], first: Sequence[int], second: Sequence[int]) -> tuple[bool, bool, bool]:
    """Return whether each of the three tests reports a difference between two groups of runs."""
    one, other = ([scores[index] for index in group] for group in (first, second))
    p = (
        compare_over_images(one, other, row=0).p,
        compare_over_seeds_and_images(one, other, row=0).p,
        float(stats.ttest_rel(*([float(each.observed[0]) for each in group] for group in (one, other))).pvalue),
    )
    return p[0] < LEVEL, p[1] < LEVEL, p[2] < LEVEL


def score_run(run: Path, name: str, settings: dict, resamples: int) -> Scores:
    """Return the scores of a checkpoint of a run, or of the average of its last ones."""
    weights = run / "weights"
    if not name.startswith("last "):
        return score(weights / f"{name}.pt", settings, resamples)
    saved = sorted(weights.glob("epoch*.pt"), key=lambda path: int(path.stem[5:]))[-int(name.split()[1]) :]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "averaged.pt"
        torch.save(average(saved), path)
        return score(path, settings, resamples)


def average(paths: Sequence[Path]) -> dict:
    """Return a checkpoint with the mean of the averaged weights of several."""
    checkpoints = [torch.load(path, map_location="cpu", weights_only=False) for path in paths]
    states = [each["ema"].float().state_dict() for each in checkpoints]
    mean = {
        key: torch.stack([state[key] for state in states]).mean(0) if value.is_floating_point() else value
        for key, value in states[-1].items()
    }
    checkpoints[-1]["ema"].load_state_dict(mean)
    return checkpoints[-1]


def score(path: Path, settings: dict, resamples: int) -> Scores:
    """Return the scores of a checkpoint."""
    truth, found = collect_detections(load_model(str(path)), **settings)
    return score_resamples(match_detections(truth, found), draw_resamples(len(truth.image_ids), resamples))


if __name__ == "__main__":
    typer.run(main)
