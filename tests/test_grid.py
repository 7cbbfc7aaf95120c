"""What a study file or command line makes of rows, and what is refused before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import Data
from hypothesis import example, given
from hypothesis import strategies as st

from rtdetr_act.errors import RtdetrActError
from rtdetr_act.integrations.ultralytics.models import STOCK
from rtdetr_act.study.decode import decode
from rtdetr_act.study.grid import (
    RunConfig,
    check_runs,
    describe_difference,
    expand_study,
    format_command,
    make_study,
    read_run_config,
    read_study_file,
)
from rtdetr_act.study.preparation import prepare_runs
from rtdetr_act.study.storage import RUNS_FOLDER

DEFAULTS = {"model": "rtdetr-n.yaml", "data": "coco8.yaml"}


def rows_of(**given: Any) -> list[RunConfig]:
    return expand_study(make_study(given, defaults=DEFAULTS))


def test_rows_are_every_combination_once() -> None:
    rows = rows_of(activations=["stock", "arelu"], seeds=[3, 5], lr0=[0.1, 0.2], epochs=4)
    assert [(row.variant, row.seed) for row in rows[:4]] == [
        ("stock lr0=0.1", 3),
        ("arelu lr0=0.1", 3),
        ("stock lr0=0.2", 3),
        ("arelu lr0=0.2", 3),
    ]
    assert [row.seed for row in rows] == [3] * 4 + [5] * 4
    assert rows[3].arguments == {"epochs": 4, "lr0": 0.2}
    assert rows[3].setting == "lr0=0.2"
    assert rows[3].name == "arelu-lr0-0.2-s3"


def test_places_cross_activations_but_not_stock() -> None:
    rows = rows_of(activations=["stock", "arelu", "mish"], where="backbone, head,all", seeds=1)
    assert [row.activation for row in rows] == [
        "stock", "arelu@backbone", "arelu@head", "arelu", "mish@backbone", "mish@head", "mish",
    ]  # fmt: skip


def test_a_location_stands_before_what_follows_an_activation() -> None:
    rows = rows_of(activations=["arelu from=relu init=match", "mish"], where=["backbone", "0+9", "all"], seeds=1)
    assert [row.activation for row in rows] == [
        "arelu@backbone from=relu init=match",
        "arelu@0+9 from=relu init=match",
        "arelu from=relu init=match",
        "mish@backbone",
        "mish@0+9",
        "mish",
    ]


def test_whole_plans_models_and_data_sets_are_variants() -> None:
    plan = {"rules": [{"activation": "dyrelu_b", "sections": ["backbone"]}]}
    rows = rows_of(activations=[STOCK, plan], model=["a.yaml", "b.yaml"], data=["x.yaml", "y.yaml"], seeds=1)
    assert len(rows) == 8
    assert rows[1].variant == "dyrelu_b@backbone a x"
    assert rows[1].activation == plan
    assert {row.setting for row in rows} == {"a x", "a y", "b x", "b y"}


def test_one_gpu_list_is_no_axis() -> None:
    assert len(rows_of(activations=["stock"], device=[0, 1], seeds=1)) == 1


def test_embedded_data_brings_its_settings() -> None:
    (row,) = rows_of(activations=["stock"], data="shapes", seeds=1, epochs=2)
    assert row.arguments["epochs"] == 2
    assert row.arguments["nbs"] == 4
    assert row.arguments["val"] is True


@given(st.lists(st.text(min_size=1, max_size=70), min_size=1, max_size=8, unique=True), st.integers(1, 3))
@example(["\r", "\x0c"], 1)  # no more than white space
@example(["0", "\u1fe2"], 1)  # a letter whose case-folded form has combining marks
def test_every_row_has_a_folder_of_its_own(values: list[str], seeds: int) -> None:
    """On file systems that do not tell upper from lower case, too."""
    rows = rows_of(activations=["stock", "arelu"], seeds=seeds, copy_paste_mode=values)
    names = [row.name for row in rows]
    assert len({name.casefold() for name in names}) == len(names) == 2 * len(values) * seeds
    assert all(re.fullmatch(r"[\w.\-]{1,90}", name) for name in names)
    assert all(decode(RunConfig, json.loads(json.dumps(row.to_plain()))) == row for row in rows)


def test_command_makes_the_run_again() -> None:
    row = rows_of(activations=["leaky_relu(0.1)@0-9"], scope="all", act_lr=0.5, epochs=3, seeds=[4])[0]
    assert format_command(row, Path("runs", row.name)) == (
        "rtdetr-act train model=rtdetr-n.yaml data=coco8.yaml 'act=leaky_relu(0.1)@0-9' scope=all act_lr=0.5 epochs=3 "
        "seed=4"
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"activations": []}, "a study needs activations"),
        ({"activations": ["arelu", "arelu"]}, "'arelu' is given twice"),
        ({"activations": ["arelu@neck"], "where": "head"}, "'arelu@neck' has a location"),
        ({"activations": ["arelu"], "seeds": 0}, "seeds must be a number such as 3"),
        ({"activations": ["arelu"], "seeds": [1, 1]}, "a list of different seeds"),
        ({"activations": ["arelu"], "baseline": "stok"}, "the baseline 'stok' is not one of the activations: arelu"),
        ({"activations": ["arelu"], "lr0": []}, "'lr0=\\[\\]' has no value"),
    ],
)
def test_wrong_studies_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RtdetrActError, match=sentence):
        rows_of(**given)


def test_baseline_is_stock_where_it_runs() -> None:
    assert make_study({"activations": ["arelu", "stock"]}, defaults=DEFAULTS).baseline == "stock"
    assert make_study({"activations": ["relu", "arelu"]}, defaults=DEFAULTS).baseline == "relu"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("activations: [stock", "is not valid YAML"),
        ("- stock", "is not a mapping of names to values"),
        ("activations: [stock]\nepoch: 3", "unknown key 'epoch'; did you mean 'epochs'"),
        ("!!python/object/apply:os.system ['touch hacked']", "is not valid YAML"),
    ],
)
def test_wrong_study_files_are_refused(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(RtdetrActError, match=sentence):
        read_study_file(file)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arguments": {"lr0": [0.1, "fast"]}}, r"run 3 of 4 \(stock-lr0-fast-s0\): .*lr0"),
        ({"arguments": {"momentums": [0.9]}}, r"run 1 of 2 .*no argument 'momentums'; did you mean 'momentum'"),
        ({"arguments": {"batch": -1}}, r"run 1 of 2 .*batch=-1 would choose a size per variant"),
        ({"arguments": {"project": "x"}}, r"run 1 of 2 .*'project' is set by this command itself"),
        ({"activations": ["stock", "dyrelu_c"], "scope": "all"}, r"run 2 of 2 \(dyrelu_c-s0\): .*"),
        ({"activations": ["stock", "arleu"]}, r"run 2 of 2 \(arleu-s0\): .*did you mean 'arelu'"),
        ({"activations": ["stock", "arelu@99"]}, r"run 2 of 2 \(arelu-99-s0\)"),
        ({"data": "nowhere.yaml"}, r"run 1 of 2 \(stock-s0\): there is no data set 'nowhere.yaml'"),
        ({"data": "EMPTY"}, r"run 1 of 2 \(stock-s0\): data set .*empty.yaml"),
        ({"model": "yolo99.yaml"}, r"run 1 of 2 \(stock-s0\): there is no model 'yolo99.yaml'"),
    ],
)
def test_rows_at_fault_are_named_before_the_first_run(
    change: dict[str, Any], sentence: str, stock_yaml: Path, data: Data, tmp_path: Path
) -> None:
    empty = tiny.write_yaml(tmp_path / "empty.yaml", {"path": str(tmp_path), "train": "a", "val": "a", "names": ["a"]})
    study = {"activations": ["stock", "arelu"], "seeds": 1, "model": str(stock_yaml), "data": str(data.detect)}
    study |= {key: value for key, value in change.items() if key != "arguments"}
    study |= change.get("arguments", {})
    study["data"] = study["data"].replace("EMPTY", str(empty))
    with pytest.raises(RtdetrActError, match=sentence):
        prepare_runs(make_study(study, defaults=DEFAULTS), tmp_path / "study")
    assert not (tmp_path / "study" / RUNS_FOLDER).exists()


def test_folder_of_another_study_is_refused_and_a_larger_one_goes_on(
    stock_yaml: Path, data: Data, tmp_path: Path
) -> None:
    base = {"model": str(stock_yaml), "data": str(data.detect), "epochs": 2}
    folder = tmp_path / "study"

    def prepare(**more: Any) -> list[Path]:
        return prepare_runs(make_study({**base, **more}, defaults=DEFAULTS), folder)

    first = prepare(activations=["stock", "arelu"], seeds=2)
    grown = prepare(activations=["stock", "mish", "arelu"], seeds=3)
    assert set(first) < set(grown)
    assert len(grown) == 9
    assert all(read_run_config(path).name == path.name for path in grown)
    with pytest.raises(RtdetrActError, match=r"holds another study: its run '[a-z]+-s0' has arguments with epochs"):
        prepare(activations=["stock", "mish", "arelu"], seeds=3, epochs=5)
    with pytest.raises(RtdetrActError, match=r"its run 'mish-s0' is not in this study; give another folder"):
        prepare(activations=["stock", "arelu"], seeds=3)


def test_study_file_and_rows_agree(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    wanted = {"activations": ["stock", "arelu"], "where": ["backbone", "all"], "seeds": 2, "epochs": 5, "lr0": [0.1]}
    file.write_text(yaml.safe_dump(wanted))
    rows = expand_study(make_study(read_study_file(file), defaults=DEFAULTS))
    assert len(rows) == 6
    assert rows[0].arguments == {"epochs": 5, "lr0": 0.1}
    assert rows[0].setting == ""  # one value is no axis
    check = [row for row in rows if row.activation == "arelu@backbone"]
    assert describe_difference(rows, {row.name: row for row in check}) == ""


def test_check_skips_what_was_checked_before(stock_yaml: Path) -> None:
    rows = rows_of(activations=["stock"], model=str(stock_yaml), data="nowhere.yaml", seeds=1)
    check_runs(rows, known={rows[0].name})
    with pytest.raises(RtdetrActError):
        check_runs(rows)
