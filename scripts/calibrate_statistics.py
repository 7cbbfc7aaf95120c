"""Simulate studies and count what the leaderboard says of them.

    python scripts/calibrate_statistics.py [--studies 1000]

Five variants and 3, 5 or 10 seeds. A seed shifts all variants alike (standard deviation 0.01), and each run has a noise
of its own of the same size: normal, or with heavy tails (Student's t with 3 degrees of freedom). First, nothing
differs: the share of studies that report any difference must be 5 % at most; "uncorrected" is what it would be without
Holm's correction. The test is exact, so that with 3 seeds the true share is just below (4.8 %), and a thousand studies
can show more by chance; ten thousand say it within 0.2. Then one variant is truly better, by half a point, one or two:
the share of studies that find it, and of those that call one of the three others different. Four minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from rtdetr_act.study.leaderboard import LeaderboardRow, build_leaderboard
from rtdetr_act.study.run_record import RunRecord

ACTIVATIONS = ("stock", "arelu", "dyrelu_b", "mish", "hardswish")
BETTER = "arelu"
DEVIATION = 0.01
SEEDS = (3, 5, 10)
TAILS = ("normal", "heavy")
GAINS = (0.005, 0.01, 0.02)


@dataclass(frozen=True)
class Shares:
    """Of many studies, those that find the better variant, call another different, or would without a correction."""

    found: float
    wrong: float
    uncorrected: float


def main(
    studies: Annotated[int, typer.Option(min=1, help="Studies per row in which nothing differs.")] = 10_000,
    powered: Annotated[int, typer.Option(min=1, help="Studies per row in which one variant is better.")] = 1000,
) -> None:
    """Simulate, count, print."""
    table = Table(title="Five variants: share of studies in %, ± its standard error")
    for column in ("noise", "seeds", "true gain", "studies", "found", "wrong", "wrong, uncorrected"):
        table.add_column(column, justify="right")
    for tail in TAILS:
        for seeds in SEEDS:
            for gain in (0.0, *GAINS):
                count = powered if gain else studies
                shares = calibrate(count, seeds, gain, tail)
                found = _percent(shares.found, count) if gain else ""
                wrong, uncorrected = _percent(shares.wrong, count), _percent(shares.uncorrected, count)
                table.add_row(tail, str(seeds), f"{gain:g}", f"{count:,}", found, wrong, uncorrected)
    Console(width=100).print(table)


def calibrate(studies: int, seeds: int, gain: float = 0.0, tail: str = "normal") -> Shares:
    """Return what the leaderboards of simulated studies say; the same each time."""
    found = wrong = uncorrected = 0
    for records in simulate(studies, seeds, gain, tail):
        lines = [line for line in build_leaderboard(records, baseline="stock") if not line.is_baseline]
        better = [line for line in lines if gain and line.variant == BETTER]
        equal = [line for line in lines if line not in better]
        found += any(line.comparison is not None and line.comparison.verdict == "better" for line in better)
        wrong += any(line.comparison is not None and line.comparison.verdict != "no difference shown" for line in equal)
        uncorrected += any(_p(line) < 0.05 for line in equal)
    return Shares(found / studies, wrong / studies, uncorrected / studies)


def simulate(studies: int, seeds: int, gain: float, tail: str) -> Iterator[list[RunRecord]]:
    """Yield the records of one study after another."""
    rng = np.random.default_rng(0)
    size = (studies, len(ACTIVATIONS), seeds)
    # Student's t with 3 degrees of freedom has a variance of 3.
    noise = rng.standard_normal(size) if tail == "normal" else rng.standard_t(3, size) / np.sqrt(3)
    gains = np.array([gain if name == BETTER else 0.0 for name in ACTIVATIONS])[:, None]
    scores = 0.5 + gains + DEVIATION * (noise + rng.standard_normal((studies, 1, seeds)))
    for study in scores:
        yield [
            RunRecord(f"{name}-s{seed}", name, name, "", seed, "done", scores={"mAP50-95": float(score)})
            for name, row in zip(ACTIVATIONS, study, strict=True)
            for seed, score in enumerate(row)
        ]


def _percent(share: float, count: int) -> str:
    return f"{100 * share:.1f} ± {100 * (share * (1 - share) / count) ** 0.5:.1f}"


def _p(line: LeaderboardRow) -> float:
    return line.comparison.p if line.comparison else float("nan")


if __name__ == "__main__":
    typer.run(main)
