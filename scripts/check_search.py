"""Search placements on `shapes`, then hold the answer against every uniform plan, with seeds that nobody used.

    python scripts/check_search.py [--budget 180] [--seeds 3] [--output runs/check_search] [key=value]…

The search takes about 25 minutes on two cores, and the check behind it, an ordinary study of the uniform plans and the
best mixed one, as long again; both go on where they stopped. Exits with 1 where a uniform plan is shown to be better
than the answer, or the search spent more than its budget. That none is shown to be better is no proof that none is:
three seeds find a difference of two points in one case of ten.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import polars as pl
import yaml

from rtdetr_act.study.leaderboard import LeaderboardRow, build_leaderboard, choose_metric
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.surgery.plan import Plan

ACTIVATIONS = ("arelu", "dyrelu_b", "silu")


def main() -> None:
    """Search, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=180)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/check_search"))
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="Ultralytics arguments")
    given = parser.parse_args()
    common = ["--model", "rtdetr-n.yaml", "--data", "shapes", "--cpus", "1", *given.arguments]
    found, check = given.output / "search", given.output / "check"
    words = ["--act", ",".join(ACTIVATIONS), "--budget", str(given.budget), "--seeds", str(given.seeds)]
    call("search", *words, *common, "-o", str(found))

    trials = pl.read_csv(found / "search.csv")
    answer = str(Plan.from_yaml(yaml.safe_load((found / "best.yaml").read_text(encoding="utf-8"))["activation"]))
    [mixed] = set(trials.filter(pl.col("rung") == "final")["plan"]) - set(ACTIVATIONS)
    first = int(trials["seed"].to_numpy().max()) + 1
    plans = [word for plan in (mixed, *ACTIVATIONS) for word in ("--act", plan)]
    seeds = f"seeds={list(range(first, first + given.seeds))}"
    call("study", *plans, "--baseline", answer, seeds, *common, "-o", str(check))

    records = read_runs(check)
    lines = build_leaderboard(records, baseline=answer)
    spent = int(trials["epochs"].sum())
    print(f"\nsearch: {len(trials)} runs, {spent} epochs of a budget of {given.budget}; answer: {answer}")
    print(f"check: {choose_metric(records)} over {given.seeds} seeds that the search did not use")
    for line in lines:
        print(f"  {describe(line, mixed, answer)}")
    faults = judge(lines, answer)
    if spent > given.budget:
        faults.append(f"the search spent {spent} epochs of a budget of {given.budget}")
    print("\n".join(faults) or "no uniform plan is shown to be better than the answer")
    sys.exit(bool(faults))


def call(command: str, *words: str) -> None:
    """Run a command of rtdetr-act, and end where it fails."""
    code = "from rtdetr_act.cli.main import main; main()"
    if failure := subprocess.run([sys.executable, "-c", code, command, *words], check=False).returncode:
        sys.exit(failure)


def describe(line: LeaderboardRow, mixed: str, answer: str) -> str:
    """Return a plan with its scores and its difference to the answer, in words."""
    notes = {"answer": line.activation == answer, "mixed": line.activation == mixed}
    name = " ".join([line.activation, *(f"({note})" for note, holds in notes.items() if holds)])
    score = f"{line.summary.mean:.4f} ± {line.summary.deviation:.4f}" if line.summary.runs else "no score"
    seen = line.comparison
    if seen is None:
        return f"{name}: {score}"
    return (
        f"{name}: {score}, against the answer {seen.difference:+.4f} ({seen.low:+.4f} to {seen.high:+.4f}), "
        f"p = {seen.p_holm:.3f}, {seen.verdict}"
    )


def judge(lines: list[LeaderboardRow], answer: str) -> list[str]:
    """Say by how much the means differ, and return what is against the answer."""
    means = {line.activation: line.summary.mean for line in lines if line.summary.runs}
    uniform = {name: mean for name, mean in means.items() if name in ACTIVATIONS}
    if answer not in means or not uniform:
        return ["the answer, or every uniform plan, has no finished run"]
    best = max(uniform, key=lambda name: uniform[name])
    print(
        f"mean of the answer {means[answer]:.4f}, of the best uniform plan ('{best}', highest of {len(uniform)}, which "
        f"flatters it) {uniform[best]:.4f}: {'at least as good' if means[answer] >= uniform[best] else 'lower'}"
    )
    better = [line for line in lines if line.comparison and line.comparison.verdict == "better"]
    return [f"'{line.activation}' is better than the answer" for line in better if line.activation in ACTIVATIONS]


if __name__ == "__main__":
    main()
