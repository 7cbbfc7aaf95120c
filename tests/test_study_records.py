"""Damaged files in the folder of a study: a sentence each that names the file, or a report that counts the run."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import DEFAULTS, TABLE, make_folder
from typer.testing import CliRunner

from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.integrations.ultralytics.results import read_results
from rtdetr_act.study.grid import expand_study, make_study, read_study_file
from rtdetr_act.study.preparation import read_run_configs
from rtdetr_act.study.process import read_progress
from rtdetr_act.study.report import report_study
from rtdetr_act.study.run_folders import read_run, read_runs
from rtdetr_act.study.search import Candidate, Rung, Search, check_search_folder, read_candidates, read_trials
from rtdetr_act.study.stages import Stage
from rtdetr_act.study.storage import Latencies, StudySettings, read_json, write_json

WRONG: list[Any] = [
    None, True, 1, -1, 1.5, 1e300, 10**30, float("nan"), "", "text", "a\nb\x1b[31m", "\ud800", [], [1], ["a"], {},
    {"a": 1}, {"": None}, [[64, 64]], "2024-02-30",
]  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("records") / "study")


def mutations(data: Any) -> Iterator[Any]:
    """Yield a document with one of its values, at any depth, replaced, removed or joined by another."""
    yield from WRONG
    if isinstance(data, dict):
        yield {**data, "unheard of": 1}
        for key, value in data.items():
            yield {other: kept for other, kept in data.items() if other != key}
            yield from ({**data, key: wrong} for wrong in mutations(value))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from ([*data[:index], wrong, *data[index + 1 :]] for wrong in mutations(value))


BROKEN = [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"\x00" * 10, b'{"state": "done"', b"1" * 5000, b"nul"]


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    run = folder / "runs" / "arelu-s0"
    return {
        "runs/arelu-s0/run.json": lambda: read_run(run),
        "runs/arelu-s0/result.json": lambda: read_run(run),
        "runs/arelu-s0/attempts.json": lambda: read_run(run),
        "study.json": lambda: read_json(folder / "study.json", StudySettings),
        "latency.json": lambda: read_json(folder / "latency.json", Latencies),
    }


@pytest.mark.parametrize("name", ["run.json", "result.json", "attempts.json", "study.json", "latency.json"])
def test_damaged_record_is_a_sentence_that_names_it(name: str, study: Path) -> None:
    path, read = next((study / key, read) for key, read in readers(study).items() if key.split("/")[-1] == name)
    good = path.read_bytes()
    expected, refused = read(), 0
    try:
        documents = [json.dumps(each, ensure_ascii=True).encode() for each in mutations(json.loads(good))]
        for content in [*documents, *BROKEN]:
            path.write_bytes(content)
            try:
                read()
            except InputError as error:
                refused += 1
                assert re.search(re.escape(str(path)) + r"' is damaged.*: .*; (delete|restore)", str(error)), error
                assert "\x1b" not in str(error) and "\n" not in str(error)
        assert refused > len(documents) // 4
        path.write_bytes(b"\xef\xbb\xbf" + good)  # as an editor on Windows saves it
        assert read() == expected
    finally:
        path.write_bytes(good)


@pytest.mark.integration
@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_report_of_what_may_stand_in_a_record_is_made_or_refused(study: Path, data: st.DataObject) -> None:
    """Values of the right type may be odd ones still; nothing later trips over them."""
    names = ["run.json", "result.json", "attempts.json", "activations.json"]
    path = data.draw(st.sampled_from([study / "runs" / "arelu-s1" / name for name in names] + [
        study / "study.json", study / "latency.json"
    ]))  # fmt: skip
    good = path.read_bytes()
    wrong = data.draw(st.sampled_from(list(mutations(json.loads(good)))))
    path.write_text(json.dumps(wrong))
    try:
        report_study(study)
        (study / "report.html").read_text(encoding="utf-8")
    except RtdetrActError as error:
        assert str(path) in str(error)
    finally:
        path.write_bytes(good)


def test_damaged_record_stops_a_study_before_it_runs(study: Path) -> None:
    result = study / "runs" / "stock-s1" / "result.json"
    good = result.read_bytes()
    for content in (b"", b"[]", b'{"state": "done", "scores": {}}', b'{"state": "done", "scores": {"mAP50-95": NaN}}'):
        result.write_bytes(content)
        with pytest.raises(InputError, match=r"stock-s1.result.json' is damaged"):
            read_run_configs(study)
        with pytest.raises(InputError, match=r"stock-s1.result.json' is damaged"):
            read_runs(study)
    result.write_bytes(good)
    renamed = study / "runs" / "copy"
    (study / "runs" / "stock-s1").rename(renamed)
    with pytest.raises(InputError, match=r"belongs to the run 'stock-s1'"):
        read_run_configs(study)
    renamed.rename(study / "runs" / "stock-s1")


def test_damaged_search_is_a_sentence(tmp_path: Path) -> None:
    stages = tuple(Stage(f"neck {k}", (k,), 1, ("arelu", "silu")) for k in range(2))
    rungs = (Rung("rung0", 3, 3, (0,)), Rung("final", 2, 9, (1,)))
    search = Search(("arelu", "silu"), "m.yaml", "shapes", "conv", 1.0, {}, 99, 9, 1, stages, rungs)
    picks = [Candidate(("arelu", "arelu"), "uniform"), Candidate(("arelu", "silu"), "drawn")]
    place = tmp_path / "rung0"
    place.mkdir()
    write_json(tmp_path / "search.json", asdict(search))
    write_json(place / "picks.json", [asdict(each) for each in picks])
    assert check_search_folder(search, tmp_path)
    assert read_candidates(search, place) == picks
    for path, read in (
        (tmp_path / "search.json", lambda: check_search_folder(search, tmp_path)),
        (place / "picks.json", lambda: read_candidates(search, place)),
    ):
        good = path.read_bytes()
        for content in [*(json.dumps(each).encode() for each in mutations(json.loads(good))), *BROKEN]:
            path.write_bytes(content)
            try:
                read()
            except InputError as error:
                assert str(path) in str(error) or "holds another search" in str(error)
        path.write_bytes(good)
    make_folder(place)
    with pytest.raises(InputError, match=r"no longer has a run of 'arelu@0, silu@1' with seed 0: restore"):
        read_trials(search, rungs[0], place, picks)


@pytest.mark.parametrize(
    ("content", "epochs", "damaged"),
    [
        (b"", 0, 0),
        (b"epoch,time\n", 0, 0),
        (b"epoch,time", 0, 1),
        (TABLE.encode(), 2, 0),
        (TABLE.encode() + b"3,7.5,1,0.7", 2, 1),
        (TABLE.encode() + b"3,7.5,1,0.7,0.4", 2, 1),  # no line break: the last number may be cut
        (TABLE.encode() + b"3,7.5,1,0.7,0.4\n", 3, 0),
        (TABLE.encode() + b"3,,nan,,inf\n", 3, 0),
        (TABLE.encode() + b"x,7.5,1,0.7,0.4\n\n,,,,\n", 2, 2),
        (TABLE.encode().replace(b"\n", b"\r\n"), 2, 0),
        (b"\x00\xff" * 99 + b"\n\x80\n", 0, 2),
        (b"a,b\n1,2\n", 0, 2),
    ],
)
def test_results_are_read_however_they_end(content: bytes, epochs: int, damaged: int, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_bytes(content)
    found = read_results(tmp_path)
    assert (len(found.epochs), found.damaged) == (epochs, damaged)
    assert all(0 <= score <= 1 for epoch in found.epochs for score in epoch.scores.values())
    read_progress(tmp_path)


@pytest.fixture
def foreign(stock_run: Run, tmp_path: Path) -> Path:
    """Copy a run of Ultralytics', twice."""
    import shutil

    for name in ("good", "bad"):
        shutil.copytree(stock_run.pt.parents[1], tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_damaged_foreign_runs_are_counted_and_say_why(foreign: Path) -> None:
    bad = foreign / "bad"
    files = {path: path.read_bytes() for path in (bad / "args.yaml", bad / "results.csv", bad / "weights" / "best.pt")}
    arguments, results, weights = files
    text = yaml.safe_load(files[arguments])
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    cases: list[tuple[Path, bytes | None, str]] = [
        (arguments, b"", "good"),  # no arguments: nothing is wrong with it, but nothing known
        (arguments, b"- 1", "is not a mapping"),
        (arguments, b"1: 2", "is not a mapping"),
        (arguments, b"\xff", "not UTF-8"),
        (arguments, bomb.encode(), "expand to too many nodes"),
        (arguments, b"a: &a [*a]", "refers to a node that contains it"),
        (arguments, b"epochs: " + b"[" * 700, "not valid YAML"),
        (arguments, b"a: 2024-13-45", "not valid YAML"),
        (arguments, b"a: !!timestamp x", "not valid YAML"),
        (arguments, b"a: 2024-12-24", "which is not an argument"),
        (arguments, yaml.safe_dump({**text, "seed": "abc"}).encode(), "has the seed 'abc'"),
        (arguments, yaml.safe_dump({**text, "imgsz": "big"}).encode(), "has imgsz 'big'"),
        (arguments, yaml.safe_dump({**text, "imgsz": [64, 64]}).encode(), "done"),
        (results, b"", "has no line of numbers"),
        (results, files[results].splitlines(keepends=True)[0], "has no line of numbers"),
        (results, files[results] + b"2,0.1", "1 line of"),
        (results, b"\x00\xff\n" * 3, "has no line of numbers"),
        (results, None, "has no line of numbers"),
        (weights, b"", "checkpoint"),
        (weights, files[weights][:1000], "checkpoint"),
        (weights, b"\x80\x04.", "checkpoint"),
    ]
    for path, content, expected in cases:
        path.unlink() if content is None else path.write_bytes(content)
        [record] = read_runs(bad)
        path.write_bytes(files[path])
        if expected in ("good", "done"):
            assert record.state == "done"
        else:
            assert expected in record.reason, record
    arguments.write_bytes(b"- 1")
    board = pl.read_csv(report_study(foreign).files[0])
    assert sorted(zip(board["variant"], board["runs"], board["failed"], strict=True))[0][1:] == (1, 0)
    assert board["failed"].sum() == 1
    assert "is not a mapping" in (foreign / "report.html").read_text(encoding="utf-8")


def test_values_that_print_alike_are_two_settings(foreign: Path) -> None:
    for name, value in (("good", "1"), ("bad", 1)):
        arguments = yaml.safe_load((foreign / name / "args.yaml").read_text())
        (foreign / name / "args.yaml").write_text(yaml.safe_dump({**arguments, "degrees": value}))
    assert {record.variant for record in read_runs(foreign)} == {"stock degrees=1", "stock degrees='1'"}


KEYS = ["model", "data", "activations", "where", "baseline", "seeds", "scope", "act_lr", "epochs", "lr0", "device"]


@given(st.dictionaries(st.sampled_from(KEYS), st.sampled_from([*WRONG, "arelu", ["stock", "arelu"], [1, [2]]])))
@settings(max_examples=300)
def test_study_of_any_values_is_made_or_refused_in_a_sentence(given: dict[str, Any]) -> None:
    try:
        expand_study(make_study({"activations": ["stock"], **given}, defaults=DEFAULTS))
    except RtdetrActError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "- a", "a", "1", "activations", "1: 2", "[]: 1", "{a: 1}: 2", "epochs: {[]: 1}", "? [a]\n: 1",
        "activations: &a [*a]", "activations: &a {rules: *a}", "<<: &a {<<: *a}", "activations: !!set {a, b}",
        "activations: !!python/name:os.system", "epochs: !!int x", "epochs: !!bool x", "epochs: !!timestamp x",
        "epochs: !!binary x", "epochs: !!float x", "epochs: 2024-13-01", "activations: [2024-01-01]",
        "epochs: " + "9" * 5000, "epochs: 0x" + "f" * 5000, "epochs: .nan\nactivations: [stock]",
        "activations: [stock]\nepochs: .inf", "activations: [stock]\nseeds: .nan", "activations: [stock]\nseeds: 1e9",
        "activations: [stock]\nlr0: [[[1]]]", "activations: [stock]\nlr0: {a: 1}", "activations: {rules: 1}",
        "activations: [{rules: [{activation: 1}]}]", "activations: [stock]\nact_lr: .nan", "\x00", "a: 'b", "\t- a",
        "[" * 700, "a: " + "{" * 700,
        "a0: &a0 {x: 1}\n" + "".join(
            f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
        ),
        "activations:\n- &a [x]\n" + "".join(
            f"- &a{n} [{', '.join([f'*a{n - 1}' if n else '*a'] * 10)}]\n" for n in range(12)
        ),
    ],
)  # fmt: skip
def test_study_files_with_anything_in_them_are_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["study", str(file), "-o", str(tmp_path / "found"), "--dry-run"])
    assert isinstance(result.exception, RtdetrActError), result.exception
    assert "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == [file]


def test_study_file_of_any_kind_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(b"\xef\xbb\xbfactivations: [stock]\n")
    assert read_study_file(file) == {"activations": ["stock"]}
    file.write_bytes(b"activations: [stock]\n# caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_study_file(file)
    for name in (tmp_path, tmp_path / "nowhere.yaml", file / "below.yaml", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"cannot read|not a file"):
            read_study_file(name)


def test_damaged_learned_curves_are_named(study: Path) -> None:
    path = study / "runs" / "arelu-s0" / "activations.json"
    good = path.read_bytes()
    rng = random.Random(0)
    documents = list(mutations(json.loads(good)))
    try:
        for wrong in rng.sample(documents, 15):
            path.write_text(json.dumps(wrong))
            try:
                report_study(study)
            except RtdetrActError as error:
                assert f"'{path}' is damaged" in str(error)
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(InputError, match=r"arelu-s0.activations.json' is damaged.*delete it"):
            report_study(study)
    finally:
        path.write_bytes(good)


def test_operations_of_an_earlier_version_are_read_and_not_shown(study: Path) -> None:
    path = study / "runs" / "arelu-s0" / "result.json"
    whole = path.read_text(encoding="utf-8")
    earlier = json.loads(whole)
    earlier["gflops"] = earlier.pop("gflops_640") / 8  # counted at the size of the training
    try:
        write_json(path, earlier)
        record = read_run(path.parent)
        assert (record.state, record.gflops_640) == ("done", 0.0)
    finally:
        path.write_text(whole, encoding="utf-8")
