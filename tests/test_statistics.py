from __future__ import annotations

import importlib.util
import math
import random
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from rtdetr_act.evaluation.statistics import compare, correct_p_values, count_seeds_needed, summarise

# Extra hours of sleep with two drugs, ten patients: Student, The Probable Error of a Mean, Biometrika 6 (1908).
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

# Scores as Ultralytics prints them, so that differences are either equal or clearly not.
scores = st.integers(100, 100_000).map(lambda value: value / 100_000)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def pairs_of(size: int) -> st.SearchStrategy[tuple[list[float], list[float]]]:
    return st.tuples(*[st.lists(scores, min_size=size, max_size=size)] * 2)


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    source = Path(__file__).parents[1] / "scripts" / "calibrate_statistics.py"
    spec = importlib.util.spec_from_file_location("calibrate_statistics", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def t_tail(t: float, freedom: int) -> float:
    """Return P(T > |t|), the density integrated in the angle whose tangent is T / sqrt(freedom)."""
    density = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
    area, _ = integrate.quad(
        lambda a: math.cos(a) ** (freedom - 1), math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2
    )
    return density * area


def test_published_paired_test():
    seen = compare({"drug 1": (DRUG_1, DRUG_2)})["drug 1"]
    # As R's manual prints them for `t.test(extra ~ group, data = sleep, paired = TRUE)`.
    assert (seen.pairs, seen.verdict) == (10, "worse")
    assert seen.difference == pytest.approx(-1.58)
    assert seen.p == seen.p_holm == pytest.approx(0.002833, abs=5e-7)
    assert (seen.low, seen.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert seen.effect == pytest.approx(-4.0621 / math.sqrt(10), abs=5e-5)


def test_summary_of_a_known_sample():
    summary = summarise(DRUG_1)
    # 2.262157 is t(0.975, 9) of printed tables; the sum of DRUG_1 is 7.5, that of its squares 34.43.
    deviation = math.sqrt((34.43 - 7.5**2 / 10) / 9)
    assert (summary.runs, summary.mean, summary.deviation) == pytest.approx((10, 0.75, deviation))
    half = 2.262157 * deviation / math.sqrt(10)
    assert (summary.low, summary.high) == pytest.approx((0.75 - half, 0.75 + half), abs=1e-6)


def test_summary_of_few_values():
    one, none = summarise([0.5]), summarise([])
    assert (one.runs, one.mean, none.runs) == (1, 0.5, 0)
    assert all(map(math.isnan, (one.deviation, one.low, one.high)))
    assert all(map(math.isnan, (none.mean, none.deviation, none.low, none.high)))


@given(st.integers(3, 8).flatmap(pairs_of))
def test_p_and_interval_by_hand(pair):
    variant, baseline = pair
    differences = [a - b for a, b in zip(variant, baseline, strict=True)]
    seen = compare({"it": pair})["it"]
    size, mean = len(differences), math.fsum(differences) / len(differences)
    assert seen.difference == pytest.approx(mean, abs=1e-12)
    if max(differences) - min(differences) < 1e-9:
        return
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (size - 1))
    t = mean / deviation * math.sqrt(size)
    assert seen.effect == pytest.approx(mean / deviation, abs=1e-6)
    assert seen.p == pytest.approx(2 * t_tail(t, size - 1), abs=1e-7)
    # The interval holds just the true differences that the test would not reject.
    limit = (seen.high - mean) / deviation * math.sqrt(size)
    assert 2 * t_tail(limit, size - 1) == pytest.approx(0.05, abs=1e-6)
    assert seen.high - mean == pytest.approx(mean - seen.low, abs=1e-9)
    assert (seen.low < 0 < seen.high) == (seen.p > 0.05)


@given(st.lists(st.integers(2, 6).flatmap(pairs_of), min_size=1, max_size=6))
def test_intervals_and_verdicts_never_contradict_each_other(pairs):
    seen = compare({str(index): pair for index, pair in enumerate(pairs)})
    for each in seen.values():
        if not math.isnan(each.low):
            near = abs(each.p_holm - 0.05) < 1e-9
            assert near or (
                (each.low > 0) == (each.verdict == "better") and (each.high < 0) == (each.verdict == "worse")
            )


def test_an_interval_is_as_wide_as_holm_asks():
    stock, rng = [0.50, 0.51, 0.52, 0.53], random.Random(0)
    pairs = {gain: ([each + gain + rng.gauss(0, 0.002) for each in stock], stock) for gain in (0.02, 0.015, 0.001)}
    seen = compare(pairs)
    by_p = sorted(pairs, key=lambda gain: seen[gain].p)
    for gain, level in zip(by_p, (0.05 / 3, 0.05 / 2, 0.05), strict=True):
        low, high = stats.ttest_rel(*pairs[gain]).confidence_interval(1 - level)
        assert (seen[gain].low, seen[gain].high) == pytest.approx((low, high), abs=1e-12)


def test_runs_that_have_learned_nothing_are_not_compared():
    seen = compare({"mish": ([0.0009, 0.0, 0.0005], [0.0, 0.0, 0.0]), "arelu": ([0.3, 0.31, 0.29], [0.0, 0.0, 0.0])})
    assert seen["mish"].verdict == "nothing was learned" and math.isnan(seen["mish"].p)
    assert seen["arelu"].verdict == "better" and seen["arelu"].p == seen["arelu"].p_holm


def test_holm_by_hand():
    assert correct_p_values([0.04, 0.01, 0.05, 0.02, 0.03]) == pytest.approx([0.09, 0.05, 0.09, 0.08, 0.09])
    # As statsmodels 0.15 has it: multipletests([...], method="holm").
    p = [0.0213, 0.0004, 0.3, 0.0049, 0.0213, 0.77]
    assert correct_p_values(p) == pytest.approx([0.0852, 0.0024, 0.6, 0.0245, 0.0852, 0.77])
    assert correct_p_values([]) == []


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(0, 999))
def test_holm_rejects_what_its_procedure_rejects(p, half_step):
    level = Fraction(2 * half_step + 1, 2000)  # no multiple of such a p is equal to it
    left = sorted(Fraction(each, 1000) for each in p)
    rejected = 0
    while left and left[0] <= level / len(left):
        left.pop(0)
        rejected += 1
    assert sum(each < level for each in correct_p_values([each / 1000 for each in p])) == rejected


@given(p_values, st.randoms())
def test_holm_keeps_the_order(p, random):
    adjusted = correct_p_values(p)
    assert all(before <= after <= 1 for before, after in zip(p, adjusted, strict=True))
    assert min(adjusted) == pytest.approx(min(1, len(p) * min(p)))
    by_p = [each for _, each in sorted(zip(p, adjusted, strict=True))]
    assert by_p == sorted(by_p)
    places = random.sample(range(len(p)), len(p))
    assert correct_p_values([p[place] for place in places]) == [adjusted[place] for place in places]


@given(st.integers(2, 6).flatmap(pairs_of), scores, st.randoms())
def test_what_must_not_matter(pair, shift, random):
    variant, baseline = pair
    order = random.sample(range(len(variant)), len(variant))
    seen = compare({"it": pair})["it"]
    shuffled = compare({"it": ([variant[i] for i in order], [baseline[i] for i in order])})["it"]
    shifted = compare({"it": ([each + shift for each in variant], [each + shift for each in baseline])})["it"]
    swapped = compare({"it": (baseline, variant)})["it"]
    for other in (shuffled, shifted):
        assert (other.verdict, other.seeds_needed) == (seen.verdict, seen.seeds_needed)
        assert (other.difference, other.low, other.high, other.p) == pytest.approx(
            (seen.difference, seen.low, seen.high, seen.p), abs=1e-8, nan_ok=True
        )
    assert (swapped.difference, swapped.low, swapped.high, swapped.p) == pytest.approx(
        (-seen.difference, -seen.high, -seen.low, seen.p), abs=1e-8, nan_ok=True
    )
    opposite = {"better": "worse", "worse": "better"}
    assert swapped.verdict == opposite.get(seen.verdict, seen.verdict)


def test_correction_is_over_the_comparisons_that_have_a_p_value():
    clear = ([0.520, 0.531, 0.542], [0.500, 0.510, 0.520])
    alone = compare({"clear": clear})["clear"]
    several = compare({"clear": clear, "one": ([0.5], [0.4]), "equal": ([0.5, 0.6], [0.5, 0.6])})
    assert list(several) == ["clear", "one", "equal"]
    assert several["clear"].p_holm == pytest.approx(2 * alone.p)
    assert (alone.verdict, several["one"].verdict) == ("better", "no difference shown")


@pytest.mark.parametrize("gap", [0.0, 0.1, -0.02])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_without_spread_nothing_is_shown(gap, seeds):
    baseline = [0.5, 0.61, 0.47, 0.3, 0.7][:seeds]
    seen = compare({"it": ([each + gap for each in baseline], baseline)})["it"]
    assert (seen.pairs, seen.verdict, seen.seeds_needed) == (seeds, "no difference shown", None)
    assert seen.difference == pytest.approx(gap)
    assert all(map(math.isnan, (seen.low, seen.high, seen.effect)))
    expected = 1.0 if seeds > 1 and gap == 0 else math.nan
    assert (seen.p, seen.p_holm) == pytest.approx((expected, expected), nan_ok=True)


def test_study_without_comparisons():
    assert compare({}) == {}


def power_of(seeds: int, effect: float) -> float:
    """Return the power of the two-sided test at 5 %, integrated over the deviation that the sample happens to have."""
    freedom, limit = seeds - 1, stats.t.isf(0.025, seeds - 1)
    shift = effect * math.sqrt(seeds)
    power, _ = integrate.quad(
        lambda ratio: (
            stats.chi.pdf(ratio * math.sqrt(freedom), freedom)
            * math.sqrt(freedom)
            * (stats.norm.sf(limit * ratio - shift) + stats.norm.cdf(-limit * ratio - shift))
        ),
        *(stats.chi.ppf(tail, freedom) / math.sqrt(freedom) for tail in (1e-12, 1 - 1e-12)),
        limit=200,
    )
    return power


@pytest.mark.parametrize("deviation", [1e-9, 1e-4, 0.0005, 0.00053, 0.00056, 0.001, 0.003, 0.006, 0.01, 0.03, 0.2, 1.4])
def test_seeds_needed_are_the_fewest(deviation):
    seeds, effect = count_seeds_needed(deviation), 0.005 / deviation
    assert power_of(seeds, effect) >= 0.8
    assert seeds == 2 or power_of(seeds - 1, effect) < 0.8 + 1e-5


def test_seeds_needed_as_statsmodels_has_them():
    # statsmodels 0.15: ceil(TTestPower().solve_power(effect_size=0.005 / deviation, alpha=0.05, power=0.8)).
    deviations = (0.002, 0.005, 0.01, 0.02, 0.05)
    assert [count_seeds_needed(each) for each in deviations] == [4, 10, 34, 128, 787]


def test_seeds_needed_by_simulation():
    seeds = count_seeds_needed(0.006)
    found = []
    for size in (seeds - 2, seeds, seeds + 2):
        differences = np.random.default_rng(1).normal(0.005, 0.006, (200_000, size))
        t = differences.mean(1) / differences.std(1, ddof=1) * math.sqrt(size)
        # |T| above the point where the two tails hold 5 %, found by halving rather than by a quantile function.
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if 2 * t_tail(middle, size - 1) > 0.05 else (low, middle)
        found.append((np.abs(t) > low).mean())
    assert found[0] < 0.8 <= found[1] + 0.003
    assert found[1] < found[2]


@pytest.mark.integration
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_null_studies_rarely_show_a_difference(calibration, tail):
    shares = calibration.calibrate(studies=300, seeds=5, tail=tail)
    assert shares.wrong <= 0.05 < 0.09 < shares.uncorrected
