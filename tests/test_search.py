"""The search for placements: its arithmetic, its model of the stages, and one made for real and killed."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
import yaml
from conftest import Data
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner
from ultralytics.nn import tasks

from rtdetr_act import patch_model
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, RtdetrActError, TrainingError
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.study.grid import Study
from rtdetr_act.study.leaderboard import build_leaderboard
from rtdetr_act.study.run_folders import read_runs
from rtdetr_act.study.runner import run_search
from rtdetr_act.study.search import (
    FINAL,
    SEARCH_REPORT_FILES,
    Search,
    Trial,
    allocate_rungs,
    define_search,
    fit_effects,
    format_plan,
    is_uniform,
    make_search,
    rank_assignments,
    run_rungs,
    sample_candidates,
    select_survivors,
)
from rtdetr_act.study.search_report import Answer, choose_answer, format_model_yaml, format_search_report
from rtdetr_act.study.stages import Stage, find_stages
from rtdetr_act.study.storage import REPORT_FILES, write_json
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.sites import find_sites

ACTS = ("arelu", "dyrelu_b", "silu")
ARGUMENTS = "imgsz=64 batch=4 nbs=4 amp=False plots=False deterministic=False optimizer=AdamW lr0=0.003".split()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def names(stages: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def stages_of(choices: Sequence[Sequence[str]]) -> list[Stage]:
    return [Stage(f"neck {k}", (k,), 1, tuple(each)) for k, each in enumerate(choices)]


def test_stages_follow_resolution(stock_yaml: Path) -> None:
    stages = find_stages(load_model(str(stock_yaml)), ACTS)
    assert names(stages) == ["backbone 0-1", "backbone 2-3", "backbone 4-5", "backbone 6-7", "neck 8-13"]
    assert sum(stage.sites for stage in stages) == tiny.CONV_SITES
    assert all(stage.choices == ACTS for stage in stages)
    everywhere = find_stages(load_model(str(stock_yaml)), ("dyrelu_b", "silu", "stock"), scope="all")
    assert names(everywhere) == [*names(stages), "head 14"]
    assert sum(stage.sites for stage in everywhere) == tiny.CONV_SITES + tiny.TOKEN_SITES
    # Dynamic ReLU pools over maps: not in AIFI, nor in the decoder.
    assert [stage.choices for stage in everywhere[-2:]] == [("silu", "stock")] * 2
    assert all(len(stage.choices) == 3 for stage in everywhere[:-2])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("rtdetr-l.yaml", ["backbone 0-1", "backbone 2-3", "backbone 4-7", "backbone 8-9", "neck 10-27"]),
        # Layer 0 has a resolution and one site of its own: with six stages at most, it goes to the next.
        ("yolo11n.yaml", ["backbone 0-2", "backbone 3-4", "backbone 5-6", "backbone 7-10", "neck 11-22", "head 23"]),
    ],
)
def test_stages_of_whole_models(model: str, expected: list[str]) -> None:
    loaded = load_model(model)
    before = {site.name: site.module for site in find_sites(loaded)}
    stages = find_stages(loaded, ("arelu", "dyrelu_c"))
    assert names(stages) == expected
    assert sum(stage.sites for stage in stages) == 77
    assert {site.name: site.module for site in find_sites(loaded)} == before


@pytest.mark.parametrize("task", ["detect", "classify"])
def test_plan_puts_each_activation_in_its_stage(task: str, tmp_path: Path) -> None:
    source = str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo(task)))
    acts = ("arelu", "hardswish", "stock")
    stages = find_stages(load_model(source), acts)
    assert names(stages)[-1] == "head 5"
    for assignment in [acts[k % 3 :] + acts[: k % 3] for k in range(3)]:
        assignment = (assignment * 2)[: len(stages)]
        model = load_model(source)

        patch_model(model, format_plan(stages, assignment))
        expected = {"arelu": "AReLU", "hardswish": "Hardswish", "stock": "SiLU"}
        by_layer = {k: expected[act] for stage, act in zip(stages, assignment, strict=True) for k in stage.layers}
        sites = find_sites(model)
        assert sites
        assert all(type(site.module).__name__ == by_layer[site.layer] for site in sites)


@given(
    budget=st.integers(1, 5000),
    epochs=st.integers(1, 300),
    seeds=st.integers(1, 5),
    uniform=st.integers(1, 6),
    mixed=st.integers(1, 4000),
)
def test_budget_is_never_exceeded(budget: int, epochs: int, seeds: int, uniform: int, mixed: int) -> None:
    settings = {"epochs": epochs, "seeds": seeds, "uniform": uniform, "space": uniform + mixed}
    try:
        rungs = allocate_rungs(budget, **settings)
    except InputError as error:
        least = int(str(error).split("so give ")[1].split()[0])
        assert least > budget
        assert sum(rung.cost for rung in allocate_rungs(least, **settings)) == least
        with pytest.raises(InputError):
            allocate_rungs(least - 1, **settings)
        return
    assert sum(rung.plans * rung.epochs * len(rung.seeds) for rung in rungs) <= budget
    *search, final = rungs
    assert (final.name, final.plans, final.epochs, len(final.seeds)) == (FINAL, 2, epochs, seeds)
    assert uniform + 1 <= search[0].plans <= uniform + mixed
    assert all(2 <= later.plans <= first.plans for first, later in itertools.pairwise(search))
    assert all(later.epochs >= 3 * first.epochs for first, later in itertools.pairwise(search))
    assert all(rung.epochs >= min(3, epochs) for rung in rungs)
    used = [seed for rung in rungs for seed in rung.seeds]
    assert len(set(used)) == len(used), "the final must have seeds of its own"


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(0, 60))
def test_draw_is_unique_balanced_and_the_same_again(sizes: list[int], more: int) -> None:
    stages = stages_of([tuple("abcd"[:size]) for size in sizes])
    uniform, space = min(sizes), math.prod(sizes)
    count = min(uniform + more, space)
    drawn = sample_candidates(stages, count)
    assert drawn == sample_candidates(stages, count)
    assert len({pick.assignment for pick in drawn}) == len(drawn) == count
    assert [pick.origin for pick in drawn] == ["uniform" if is_uniform(pick.assignment) else "drawn" for pick in drawn]
    assert all(act in stage.choices for pick in drawn for act, stage in zip(pick.assignment, stages, strict=True))


def test_draw_is_balanced_where_the_space_is_large() -> None:
    stages = stages_of([ACTS] * 6)
    drawn = [pick.assignment for pick in sample_candidates(stages, 33) if pick.origin == "drawn"]
    assert len(drawn) == 30
    for stage in zip(*drawn, strict=True):
        assert all(9 <= count <= 11 for count in Counter(stage).values())


def trials_of(stages: Sequence[Stage], count: int, score: Callable[[tuple[str, ...]], float]) -> list[Trial]:
    return [
        Trial("rung0", pick, 3, 0, "done", score(pick.assignment), "mAP50-95")
        for pick in sample_candidates(stages, count)
    ]


def test_effects_recover_a_planted_optimum() -> None:
    stages = stages_of([("arelu", "silu"), *[ACTS] * 4])
    rng = random.Random(4)
    planted = [{act: rng.uniform(-0.1, 0.1) for act in stage.choices} for stage in stages]
    noise = np.random.default_rng(2)

    def score(assignment: tuple[str, ...]) -> float:
        total = sum(effect[act] for effect, act in zip(planted, assignment, strict=True))
        return 0.4 + total + noise.normal(0, 0.005)

    trials = trials_of(stages, 30, score)
    best = tuple(max(effect, key=effect.__getitem__) for effect in planted)
    assert best not in {trial.candidate.assignment for trial in trials}, "it must be found, not drawn"
    effects = fit_effects(stages, trials)
    assert next(rank_assignments(effects)) == best
    for found, true in zip(effects, planted, strict=True):
        mean = sum(true.values()) / len(true)
        for act, effect in found.items():
            assert abs(effect.mean - (true[act] - mean)) < 4 * effect.error
            assert 0 < effect.error < 0.005
    # A run that broke is left out.
    broken = Trial("rung0", trials[0].candidate, 3, 0, "failed", math.nan, "mAP50-95")
    assert fit_effects(stages, [broken, *trials]) == effects


def test_errors_of_effects_are_their_spread() -> None:
    stages = stages_of([ACTS, ("arelu", "silu")])
    rng = np.random.default_rng(0)
    found = [fit_effects(stages, trials_of(stages, 6, lambda _: rng.normal(0, 1))) for _ in range(2000)]
    for k, act in ((0, "arelu"), (0, "silu"), (1, "silu")):
        spread = np.std([effects[k][act].mean for effects in found])
        claimed = math.sqrt(np.mean([effects[k][act].error ** 2 for effects in found]))
        assert claimed == pytest.approx(spread, rel=0.08)


def test_too_few_runs_have_no_effects() -> None:
    stages = stages_of([ACTS] * 3)  # seven terms
    assert fit_effects(stages, trials_of(stages, 7, lambda _: 0.5)) == []
    assert fit_effects(stages, []) == []
    same = [trial for trial in trials_of(stages, 27, lambda _: 0.5) if trial.candidate.assignment[0] != "silu"]
    assert len(same) > 7
    assert fit_effects(stages, same) == [], "nothing is known of an activation that never stood there"


def test_proposals_come_best_first_and_once() -> None:
    stages = stages_of([ACTS, ("arelu", "silu"), ACTS])
    rng = random.Random(1)
    weights = [{act: rng.random() for act in stage.choices} for stage in stages]
    trials = trials_of(stages, 18, lambda found: sum(effect[act] for effect, act in zip(weights, found, strict=True)))
    order = list(rank_assignments(fit_effects(stages, trials)))
    expected = sorted(trials, key=lambda trial: -trial.score)
    assert order == [trial.candidate.assignment for trial in expected]


def test_the_best_of_both_kinds_go_on() -> None:
    stages = stages_of([ACTS] * 3)
    scores = {
        pick.assignment: k / 100 for k, pick in enumerate(sample_candidates(stages, 12))
    }  # uniform ones are worst
    trials = trials_of(stages, 12, scores.__getitem__)
    kept = [pick.assignment for pick in select_survivors(trials, 4)]
    best = sorted(scores, key=scores.__getitem__)[::-1]
    assert kept == [("silu",) * 3, *best[:3]]
    broken = [Trial(t.rung, t.candidate, 3, 0, "failed", math.nan, t.metric, "out of memory") for t in trials[:3]]
    with pytest.raises(TrainingError, match=r"no uniform plan of rung0 has a score.*: out of memory"):
        select_survivors([*broken, *trials[3:]], 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--act", "arelu"], "two activations or more"),
        (["--act", "arelu,arlu"], "no activation 'arlu' in the zoo; did you mean 'arelu'"),
        (["--act", "arelu,silu", "--act", "swish"], "'silu' is given twice"),
        (["--act", "arelu,silu@neck"], "'silu@neck' has a location"),
        (["--act", "arelu,silu", "--budget", "40", "epochs=9"], "is too small: .* so give 63 or more"),
        (
            ["--act", "dyrelu_b,dyrelu_c", "--scope", "all"],
            "the stage 'neck 8-13' supports none of the activations",
        ),
        (["--act", "arelu,silu", "bacth=4"], "no argument 'bacth'; did you mean 'batch'"),
        (["--act", "arelu,silu", "--data", "nowhere.yaml"], "there is no data set 'nowhere.yaml'"),
        ([], "needs activations to place"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    words: list[str], message: str, stock_yaml: Path, tmp_path: Path
) -> None:
    command = ["search", *words, "--model", str(stock_yaml), "-o", str(tmp_path / "found")]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, RtdetrActError)
    with pytest.raises(RtdetrActError, match=message):
        raise result.exception
    assert not list(tmp_path.glob("found/**/run.json")), "a run was written"


def test_stock_is_refused_where_the_model_names_activations(rows_yaml: Path) -> None:
    settings = {"data": "shapes", "budget": None, "seeds": 3, "scope": "conv", "act_lr": 1.0, "arguments": {}}
    with pytest.raises(InputError, match="'stock' in one stage is ambiguous"):
        make_search(["stock,silu"], model=str(rows_yaml), **settings)


# Effects of the activations in the five stages of the tiny RT-DETR; the best plan is a mixed one.
PLANTED = [
    {"arelu": 0.02, "silu": 0.0},
    {"arelu": 0.0, "silu": 0.03},
    {"arelu": 0.04, "silu": 0.0},
    {"arelu": 0.0, "silu": 0.02},
    {"arelu": 0.03, "silu": 0.0},
]
BEST = ("arelu", "silu", "arelu", "silu", "arelu")


def make(stock_yaml: Path, data: Data, **more: object) -> Search:
    settings = {"budget": 260, "seeds": 3, "scope": "conv", "act_lr": 1.0, "arguments": {"epochs": 9, "imgsz": 64}}
    return make_search(["arelu,silu"], model=str(stock_yaml), data=str(data.detect), **{**settings, **more})


def score_planted(
    search: Search, gain: float = 1.0, stop: int | None = None
) -> Callable[[Study, Sequence[Path]], None]:
    """Return what stands in for training: it writes the result that a run of a planted table would have."""
    plans = {
        format_plan(search.stages, each): sum(effect[act] for effect, act in zip(PLANTED, each, strict=True))
        for each in itertools.product(("arelu", "silu"), repeat=5)
    }
    ran = itertools.count()

    def run(study: Study, folders: Sequence[Path]) -> None:
        for folder in folders:
            if (folder / "result.json").exists():
                continue
            if next(ran) == stop:
                raise KeyboardInterrupt
            row = read_json(folder / "run.json")
            luck = random.Random(f"{row['seed']} {row['activation']}").gauss(0, 0.004)
            score = 0.3 + gain * plans[row["activation"]] + luck + study.arguments["epochs"] / 100
            write_json(folder / "result.json", {"state": "done", "scores": {"mAP50": score, "mAP50-95": score}})

    return run


@pytest.mark.integration
def test_search_finds_a_planted_plan_and_goes_on_where_it_stopped(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    search = make(stock_yaml, data)
    assert [(rung.name, rung.plans, rung.epochs) for rung in search.rungs] == [
        ("rung0", 32, 3), ("rung1", 11, 9), ("final", 2, 9)
    ]  # fmt: skip
    search = make(stock_yaml, data, budget=150)
    assert [(rung.name, rung.plans, rung.epochs) for rung in search.rungs] == [
        ("rung0", 17, 3), ("rung1", 5, 9), ("final", 2, 9)
    ]  # fmt: skip
    calm = run_rungs(search, tmp_path / "calm", score_planted(search))
    assert sum(trial.epochs for trial in calm) <= 150
    stopped = tmp_path / "stopped"
    for _ in range(40):
        try:
            again = run_rungs(search, stopped, score_planted(search, stop=7))
            break
        except KeyboardInterrupt:
            pass
    assert again == calm

    origins = Counter((trial.rung, trial.candidate.origin) for trial in calm)
    assert origins["rung0", "uniform"] == 2
    assert origins["rung1", "proposed"] == 1
    before = {trial.candidate.assignment for trial in calm if trial.rung == "rung0"}
    assert not before & {trial.candidate.assignment for trial in calm if trial.candidate.origin == "proposed"}
    final = [trial for trial in calm if trial.rung == FINAL]
    assert {trial.candidate.assignment for trial in final} == {BEST, ("arelu",) * 5}
    assert {trial.seed for trial in final}.isdisjoint(trial.seed for trial in calm if trial.rung != FINAL)

    lines = build_leaderboard(read_runs(tmp_path / "calm" / FINAL), baseline="arelu")
    found = choose_answer(search, calm, lines)
    assert (found.plan, found.mixed) == (format_plan(search.stages, BEST), True)
    assert "the mixed one is better: +0.0" in found.explanation
    text = format_search_report(search, calm, lines, found)
    assert "150" in text
    assert "| backbone 4-5 | +0.0" in text
    with pytest.raises(InputError, match="holds another search: it has budget 150, this one 151"):
        run_rungs(make(stock_yaml, data, budget=151), stopped, score_planted(search))
    with pytest.raises(InputError, match="holds another search: it has seeds 3, this one 2"):
        run_rungs(make(stock_yaml, data, budget=150, seeds=2), stopped, score_planted(search))


def test_what_was_picked_stays_picked(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    search = make(stock_yaml, data, budget=150)
    with pytest.raises(KeyboardInterrupt):
        run_rungs(search, tmp_path, score_planted(search, stop=search.rungs[0].plans + 2))
    picked = read_json(tmp_path / "rung1" / "picks.json")
    for path in (tmp_path / "rung0").glob("runs/arelu-s0/result.json"):
        path.unlink()  # as of a run that broke, and would be tried again
    trials = run_rungs(search, tmp_path, score_planted(search))
    assert [list(trial.candidate.assignment) for trial in trials if trial.rung == "rung1"] == [
        each["assignment"] for each in picked
    ]
    assert trials[0].state == "unfinished", "a rung that is over is not gone back to"


def test_where_nothing_differs_the_simple_plan_is_the_answer(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    search = make(stock_yaml, data, budget=150)
    trials = run_rungs(search, tmp_path, score_planted(search, gain=0.0))
    lines = build_leaderboard(
        read_runs(tmp_path / FINAL), baseline=(read_json(tmp_path / FINAL / "study.json")["baseline"])
    )
    found = choose_answer(search, trials, lines)
    assert not found.mixed
    assert found.plan in ("arelu", "silu")
    assert "No difference is shown" in found.explanation
    assert "does not mean that the two are equal" in found.explanation


def test_function_reports_a_search_whose_runs_are_done(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    settings = {"activations": ["arelu", "silu"], "model": str(stock_yaml), "data": str(data.detect), "budget": 150}
    search = define_search({**settings, "epochs": 9, "imgsz": 64})
    assert search == make(stock_yaml, data, budget=150)
    trials = run_rungs(search, tmp_path, score_planted(search))
    report = run_search({**settings, "epochs": 9, "imgsz": 64}, tmp_path)
    assert report.answer.mixed and repr(report) == f"<SearchReport: {report.answer.plan}, {len(trials)} runs>"
    assert sorted(path.name for path in report.files) == sorted([*SEARCH_REPORT_FILES, *REPORT_FILES])
    assert report.to_csv().splitlines()[0] == (tmp_path / "search.csv").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["answer"]["plan"] == report.answer.plan
    with pytest.raises(InputError, match=r"holds another search: it has seeds 3, this one 2"):
        run_search({**settings, "epochs": 9, "imgsz": 64, "seeds": 2}, tmp_path)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, r"a search needs 'activations' to place, such as \['arelu', 'silu'\]"),
        ({"activations": "arelu"}, "a search needs two activations or more"),
        ({"activations": ["arelu", "silu"], "model": ["a.yaml"]}, r"'model' of a search must be one name of a file"),
        ({"activations": ["arelu", "silu"], "seeds": "3"}, "seeds must be one positive integer here, not '3'"),
        ({"activations": ["arelu", "silu"], "budgets": 150}, "'budgets'"),
    ],
)
def test_function_says_what_is_wrong(settings: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(RtdetrActError, match=error):
        run_search(settings, tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_one_seed_shows_nothing_and_lost_runs_are_not_compared(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    search = make(stock_yaml, data, budget=80, seeds=1)
    trials = run_rungs(search, tmp_path, score_planted(search))
    lines = build_leaderboard(read_runs(tmp_path / FINAL), baseline="arelu")
    found = choose_answer(search, trials, lines)
    assert not found.mixed, "one seed is no evidence, however large the difference"
    assert "p =" not in found.explanation
    for path in (tmp_path / FINAL).glob("runs/arelu-s*/result.json"):
        write_json(path, {"state": "failed", "reason": "the loss became nan"})
    lines = build_leaderboard(read_runs(tmp_path / FINAL), baseline="arelu")
    found = choose_answer(search, trials, lines)
    assert found.mixed
    assert "Nothing could be compared" in found.explanation


@pytest.mark.integration
@pytest.mark.parametrize(("source", "plan"), [("rtdetr", "arelu@0-3, silu@4-13"), ("yolo11s.yaml", "mish")])
def test_answer_is_a_model_that_builds(source: str, plan: str, stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    source = str(stock_yaml) if source == "rtdetr" else source
    settings = {"data": str(data.detect), "budget": None, "seeds": 3, "scope": "conv", "arguments": {}}
    search = make_search(["arelu,silu,mish"], model=source, act_lr=0.5, **settings)
    path = tmp_path / "best.yaml"
    path.write_text(format_model_yaml(search, Answer(plan, "@" in plan, "Why\nnot?")), encoding="utf-8")

    text = path.read_text(encoding="utf-8")
    assert 'activation: "rtdetr_act.Plan({' in text and "''" not in text
    with pytest.raises(NameError, match="name 'rtdetr_act' is not defined"):
        tasks.parse_model.__wrapped__(yaml.safe_load(text), 3)  # Ultralytics' own
    expected, found = load_model(source), load_model(str(path))
    patch_model(expected, plan, act_lr=0.5)
    assert type(found) is type(expected)
    assert read_plan(found.model) == Plan.parse(plan, act_lr=0.5)
    shapes = [{key: value.shape for key, value in model.model.state_dict().items()} for model in (expected, found)]
    assert shapes[0] == shapes[1]
    sites = [[(site.name, site.current) for site in find_sites(model)] for model in (expected, found)]
    assert sites[0] == sites[1]


def test_dry_run_tells_the_rungs_and_starts_nothing(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    words = ["--act", "arelu,silu", "--budget", "150", "--model", str(stock_yaml), "--data", str(data.detect)]
    command = ["search", *words, *ARGUMENTS, "epochs=9", "-o", str(tmp_path / "found"), "--dry-run", "--cpus", "1"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "150 epochs of training, of a budget of 150" in result.output
    assert "backbone 4-5" in result.output
    assert "about" in result.output
    assert not (tmp_path / "found").exists()


@pytest.mark.kill
def test_killed_search_goes_on_to_its_answer(data: Data, tmp_path: Path) -> None:
    model = tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())
    folder = tmp_path / "found"
    words = ["--act", "hardswish,silu", "--budget", "5", "--seeds", "1", "--model", str(model)]
    words += ["--data", str(data.detect), "--cpus", "1", *ARGUMENTS, "epochs=1", "-o", str(folder)]
    code = "from rtdetr_act.cli.main import main; main()"
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code, "search", *words], stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while not list(folder.glob("rung0/runs/*/result.json")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        process.kill()
        process.wait()
    first = {path: path.read_bytes() for path in folder.glob("rung0/runs/*/result.json")}
    assert first

    result = CliRunner().invoke(app, ["search", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert all(path.read_bytes() == content for path, content in first.items()), "a finished run was done again"
    table = pl.read_csv(folder / "search.csv")
    assert table["rung"].to_list() == ["rung0"] * 3 + ["final"] * 2
    assert table["origin"].to_list()[:3] == ["uniform", "uniform", "drawn"]
    assert table["state"].to_list() == ["done"] * 5
    assert table["seed"].to_list() == [0, 0, 0, 1, 1]
    scores = {path.parent.name: read_json(path)["scores"] for path in folder.glob("*/runs/*/result.json")}
    assert len(scores) == 5
    assert sorted(table["mAP50-95"]) == sorted(each["mAP50-95"] for each in scores.values())
    assert (folder / "final" / "report.html").exists()
    assert "Nothing was learned" in (folder / "search.md").read_text(encoding="utf-8"), "by an epoch of a tiny network"
    best = load_model(str(folder / "best.yaml"))
    plan = str(Plan.from_yaml(best.model.yaml["activation"]))
    assert f"answer: {plan}" in result.output
    assert plan in ("hardswish", "silu")
    results = {path: path.read_bytes() for path in folder.glob("*/runs/*/result.json")}
    again = CliRunner().invoke(app, ["search", *words], catch_exceptions=False)
    assert {path: path.read_bytes() for path in results} == results
    assert f"answer: {plan}" in again.output
    with pytest.raises(InputError, match="whose rungs do not compare"):
        CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    with pytest.raises(InputError, match="holds another search"):
        CliRunner().invoke(app, ["search", *words, "lr0=0.5"], catch_exceptions=False)
