"""The Pareto front of a study: which variants are on it, tied with it, and dominated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rtdetr_act.evaluation.statistics import correct_p_values
from rtdetr_act.study.leaderboard import build_leaderboard
from rtdetr_act.study.pareto import LATENCY, PARAMETERS, Cost, Front, describe_front, find_front
from rtdetr_act.study.run_record import RunRecord

Scores = Sequence[float] | dict[int, float]


def find(scores: dict[str, Scores], costs: dict[str, float | None], cost: Cost = LATENCY, **more: float) -> Front:
    """Return the front of variants, given by the scores of their runs, by seed, and their latency or parameters."""
    runs = {}
    for name, values in scores.items():
        by_seed = values if isinstance(values, dict) else dict(enumerate(values))
        runs[name] = [
            RunRecord(
                f"{name}-s{seed}",
                name,
                name,
                "",
                seed,
                "done",
                scores={"mAP50-95": score},
                parameters=int(costs[name] or 0),
                **more,
            )
            for seed, score in by_seed.items()
        ]
        runs[name] += [] if by_seed else [RunRecord(f"{name}-s0", name, name, "", 0, "failed")]
    latencies = {name: value for name, value in costs.items() if value is not None}
    rows = build_leaderboard([run for each in runs.values() for run in each], baseline="stock", latencies=latencies)
    return find_front(rows, runs, "mAP50-95", cost)


def split(front: Front) -> dict[str, list[str]]:
    """Return the names of the variants of each status that there is."""
    found = {
        status: [point.variant for point in front.select(status)]
        for status in ("front", "tied", "dominated", "unknown")
    }
    return {status: names for status, names in found.items() if names}


RELU, SILU = [0.500, 0.510, 0.520], [0.540, 0.551, 0.559]
NEAR = [0.505, 0.490, 0.519]  # below relu by the mean, above it with one seed
FAR = [0.400, 0.411, 0.419]  # below relu by ten points with every seed


def test_dominated_tied_and_on_the_front() -> None:
    front = find(
        {"silu": SILU, "relu": RELU, "near": NEAR, "far": FAR}, {"relu": 2.0, "silu": 3.0, "near": 2.5, "far": 2.2}
    )
    assert split(front) == {"front": ["relu", "silu"], "tied": ["near"], "dominated": ["far"]}
    points = {point.variant: point for point in front.points}
    assert [point.variant for point in front.points] == ["silu", "relu", "near", "far"]  # as in the leaderboard
    assert (points["near"].rival, points["far"].rival, points["relu"].rival) == ("relu", "relu", None)
    assert (points["far"].score, points["far"].cost, points["far"].runs) == (pytest.approx(0.41), 2.2, 3)
    p = correct_p_values([stats.ttest_rel(each, RELU).pvalue for each in (NEAR, FAR)])
    assert front.tests == 2
    assert [points[name].comparison.p_holm for name in ("near", "far")] == pytest.approx(p)
    assert p[0] > 0.05 > p[1]
    assert describe_front(front) == [
        "On the front: relu and silu.",
        f"Tied with it: near (−0.005 to relu, p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{p[0]:.3f}).",
        "Dominated: far (−0.100 to relu, p\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}0.001).",
        "p-values are those of paired t-tests over seeds, corrected by Holm for 2.",
    ]


def test_the_correction_counts_every_variant_that_dominates() -> None:
    near = {f"near{index}": [NEAR[0] - 0.001 * index, NEAR[1] - 0.003 * index, NEAR[2]] for index in range(6)}
    slow = [0.49, 0.503, 0.5085]
    few = find({"relu": RELU, "slow": slow}, {"relu": 2.0, "slow": 4.0})
    many = find({"relu": RELU, "slow": slow, **near}, {"relu": 2.0, "slow": 4.0} | dict.fromkeys(near, 3.0))
    assert split(few)["dominated"] == ["slow"]
    assert "slow" in split(many)["tied"]
    # Each of the six by relu and by those before it, and slow by relu and those that score more.
    assert many.tests == 6 + 15 + 1 + sum(sum(each) > sum(slow) for each in near.values())


@pytest.mark.parametrize(("latency", "status"), [(2.0, "dominated"), (1.962, "dominated"), (1.96, "front")])
def test_latencies_within_two_percent_are_equal(latency: float, status: str) -> None:
    found = find({"relu": RELU, "far": FAR}, {"relu": 2.0, "far": latency})
    assert {point.variant: point.status for point in found.points} == {"relu": "front", "far": status}


def test_parameters_are_exact() -> None:
    scores = {"relu": RELU, "far": FAR}
    assert split(find(scores, {"relu": 1000, "far": 1000}, PARAMETERS)) == {"front": ["relu"], "dominated": ["far"]}
    assert split(find(scores, {"relu": 1000, "far": 999}, PARAMETERS)) == {"front": ["far", "relu"]}


def test_equal_scores_are_told_apart_by_cost() -> None:
    scores = {"relu": RELU, "same": RELU}
    assert split(find(scores, {"relu": 2.0, "same": 2.01})) == {"front": ["relu", "same"]}
    front = find(scores, {"relu": 2.0, "same": 2.5})
    assert split(front) == {"front": ["relu"], "tied": ["same"]}
    assert front.points[1].comparison.p_holm == 1


def test_one_run_each_cannot_tell() -> None:
    front = find({"relu": [0.5], "silu": [0.6], "far": [0.1]}, {"relu": 2.0, "silu": 3.0, "far": 2.5})
    assert split(front) == {"front": ["relu", "silu"], "tied": ["far"]}
    assert describe_front(front) == [
        "On the front: relu and silu.",
        "Tied with it: far (−0.400 to relu).",
        "One run each cannot tell scores apart: the front is that of these very runs.",
    ]


def test_only_seeds_that_both_finished_are_paired() -> None:
    front = find(
        {"relu": RELU, "far": {1: 0.411, 2: 0.419, 7: 0.3}, "other": {8: 0.1, 9: 0.2}},
        {"relu": 2.0, "far": 3.0, "other": 2.0},
    )
    points = {point.variant: point for point in front.points}
    assert (points["far"].comparison.pairs, points["far"].comparison.difference) == (2, pytest.approx(-0.1))
    assert split(front) == {"front": ["relu"], "tied": ["other"], "dominated": ["far"]}
    assert points["other"].comparison is None
    assert "other (no seed in common with relu)" in describe_front(front)[1]


def test_pairs_that_contradict_the_means_show_nothing() -> None:
    # With the seeds in common, slow is better by far; a seed of its own drags its mean below.
    slow = {0: 0.600, 1: 0.611, 2: 0.619, 3: 0.0}
    front = find({"relu": RELU, "slow": slow}, {"relu": 2.0, "slow": 3.0})
    assert split(front) == {"front": ["relu"], "tied": ["slow"]}
    assert front.points[1].comparison.verdict == "better"


def test_without_a_test_none_is_shown_to_be_worse() -> None:
    front = find({"relu": [0.5, 0.6], "far": [0.4, 0.5]}, {"relu": 2.0, "far": 3.0})  # by the very same amount
    assert split(front) == {"front": ["relu"], "tied": ["far"]}
    assert describe_front(front)[-1] == "No paired test is possible, so that none is shown to be worse."


def test_unknown_costs_and_scores() -> None:
    front = find({"relu": RELU, "silu": SILU, "lost": []}, {"relu": 2.0, "silu": None, "lost": 1.0})
    assert split(front) == {"front": ["relu"], "unknown": ["silu", "lost"]}
    assert describe_front(front) == ["On the front: relu."]
    assert describe_front(find({"relu": RELU}, {"relu": 0}, PARAMETERS)) == []
    assert describe_front(find({}, {})) == []


def test_runs_that_divide_the_images_show_less() -> None:
    scores = {"relu": RELU, "slow": [0.490, 0.503, 0.5085]}
    costs: dict[str, float | None] = {"relu": 2.0, "slow": 3.0}
    assert split(find(scores, costs)) == {"front": ["relu"], "dominated": ["slow"]}
    front = find(scores, costs, validation_share=1.0)  # a variance of 1/3 + 1 for 1/3
    assert split(front) == {"front": ["relu"], "tied": ["slow"]}
    t = stats.ttest_rel(scores["slow"], RELU).statistic / math.sqrt(1 + 3)
    assert front.points[1].comparison.p == pytest.approx(2 * stats.t.sf(abs(t), 2))


def test_one_variant_is_the_front() -> None:
    assert split(find({"relu": RELU}, {"relu": 2.0})) == {"front": ["relu"]}


VARIANTS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(100, 110).map(float)),
        st.dictionaries(st.integers(0, 5), st.integers(0, 20).map(lambda value: value / 20), max_size=4),
    ),
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(VARIANTS)
def test_no_variant_on_the_front_is_dominated(variants: list[tuple[float | None, dict[int, float]]]) -> None:
    scores: dict[str, Scores] = {f"v{index}": each for index, (_, each) in enumerate(variants)}
    front = find(scores, {f"v{index}": cost for index, (cost, _) in enumerate(variants)})
    assert sorted(name for names in split(front).values() for name in names) == sorted(scores)
    known = [point for point in front.points if point.cost is not None and not math.isnan(point.score)]
    assert {point.status for point in known} <= {"front", "tied", "dominated"}
    assert {point.status for point in front.points if point not in known} <= {"unknown"}
    assert not known or front.select("front")
    by_name = {point.variant: point for point in known}
    for point in known:
        better = [
            other
            for other in known
            if (other.score > point.score and other.cost <= 1.02 * point.cost)
            or (other.score == point.score and 1.02 * other.cost < point.cost)
        ]
        assert (point.status == "front") == (not better)
        if better:
            assert by_name[point.rival] in better
            shown = point.comparison is not None and point.comparison.verdict == "worse"
            assert (point.status == "dominated") == shown
    heights = [point.score for point in front.select("front")]
    assert heights == sorted(heights)  # the line that joins them never falls
