"""Rows of a study and their folders, one to one, whatever the models, data sets and values are called."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Data
from hypothesis import example, given
from hypothesis import strategies as st

from rtdetr_act.errors import InputError
from rtdetr_act.study.grid import MAX_RUNS, RunConfig, expand_study, make_study
from rtdetr_act.study.leaderboard import build_leaderboard
from rtdetr_act.study.naming import make_value_key, name_folders, name_paths
from rtdetr_act.study.preparation import prepare_runs
from rtdetr_act.study.run_folders import read_runs

DEFAULTS = {"model": "rtdetr-n.yaml", "data": "coco8.yaml"}


def rows_of(**given: Any) -> list[RunConfig]:
    return expand_study(make_study({"activations": ["stock", "arelu"], "seeds": 2, **given}, defaults=DEFAULTS))


def check_names(rows: list[RunConfig]) -> None:
    """Check that what a row is told by tells it from the others: to the eye, on any disk, and in the leaderboard."""
    assert len({(row.activation, row.model, row.data, row.seed, repr(row.arguments)) for row in rows}) == len(rows)
    folders = {unicodedata.normalize("NFKC", row.name).casefold() for row in rows}
    assert len(folders) == len(rows)
    looks = {(unicodedata.normalize("NFKC", " ".join(row.variant.split())), row.seed) for row in rows}
    assert len(looks) == len(rows)
    assert len({(row.activation, row.setting, row.seed) for row in rows}) == len(rows)
    for row in rows:
        assert row.variant.isprintable()
        assert re.fullmatch(r"[\w.\-]+", row.name)
        assert len(row.name.encode()) <= 220
        assert row.name.partition(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}


WORDS = st.sampled_from(
    ["a", "A", "a b", "b", "data", "best", "é", "e\u0301", "con", "x" * 70, "x" * 70 + "y", "\x1b", "'"]
)
PATHS = st.builds(
    lambda folders, stem, suffix: "/".join([*folders, stem + suffix]),
    st.lists(WORDS, max_size=3),
    WORDS,
    st.sampled_from([".yaml", ".yml", ".pt", ""]),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.floats(allow_nan=False, allow_infinity=False, width=16),
    st.sampled_from(["1", "1.0", "True", "None", " 1", "a  b", "a b", "lr0=1", "", "\r", "x" * 300, "x" * 300 + "y"]),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, min_size=1, max_size=2))


@given(
    models=st.lists(PATHS, min_size=1, max_size=4, unique_by=lambda path: str(Path(path))),
    data=st.lists(PATHS, min_size=1, max_size=4, unique_by=lambda path: str(Path(path))),
    lists=st.dictionaries(
        st.sampled_from(["lr0", "optimizer"]), st.lists(VALUES, min_size=1, max_size=4, unique_by=make_value_key),
        max_size=2,
    ),
)  # fmt: skip
@example(["m.pt"], ["a/data.yaml", "b/data.yaml"], {})
@example(["runs/x/weights/best.pt", "runs/y/weights/best.pt"], ["d.yaml"], {})
@example(["a.yaml", "a b.yaml"], ["b x.yaml", "x.yaml"], {})
@example(["con.x"], ["nul.yaml", "aux.yaml"], {"lr0": [1, "1", True, "True"]})
def test_rows_and_folders_are_one_to_one(models: list[str], data: list[str], lists: dict[str, list[Any]]) -> None:
    rows = rows_of(model=models, data=data, **lists)
    combinations = len(models) * len(data)
    for values in lists.values():
        combinations *= len(values)
    assert len(rows) == 2 * 2 * combinations
    check_names(rows)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/data.yaml", "b/data.yaml"], ["a/data", "b/data"]),
        (["a/data.yaml", "b/data.yaml", "other.yaml"], ["a/data", "b/data", "other"]),
        (["x/c/data.yaml", "y/c/data.yaml"], ["x/c/data", "y/c/data"]),
        (["r/x/weights/best.pt", "r/y/weights/best.pt"], ["x/weights/best", "y/weights/best"]),
        (["data.yaml", "data.yml"], ["data.yaml", "data.yml"]),
        (["data.yaml", "a/data.yaml"], ["data.yaml", "a/data"]),
        (["one.yaml", "two.yaml"], ["one", "two"]),
    ],
)
def test_paths_are_called_by_what_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert name_paths(paths) == names


def test_folders_are_legal_on_windows_and_short() -> None:
    names = name_folders(["con.x", "COM1", "lpt²", "\U0001d4d0" * 60, "stock"])
    assert names["con.x"] == "_con.x"
    assert names["COM1"] == "_COM1"
    assert len(names["\U0001d4d0" * 60].encode()) <= 200
    assert names["stock"] == "stock"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lr0": [0.01, 0.01]}, "'lr0' has 0.01 twice"),
        ({"lr0": [1, 1.0]}, "'lr0' has 1.0 twice, as 1 too"),
        ({"model": ["a.yaml", "a.yaml"]}, "'model' has 'a.yaml' twice"),
        ({"data": ["d.yaml", "./d.yaml"]}, "'data' has './d.yaml' twice, as 'd.yaml' too"),
        ({"activations": ["arelu", " arelu "]}, "'arelu' is given twice"),
    ],
)
def test_equal_runs_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        rows_of(**given)


@pytest.mark.skipif(os.name != "posix", reason="links to files")
def test_paths_of_one_file_are_refused(stock_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to(stock_yaml)
    with pytest.raises(InputError, match=r"twice, as .* too: the runs would be the same"):
        rows_of(model=[str(stock_yaml), str(tmp_path / "link.yaml")])


def test_studies_of_more_runs_than_anyone_has_are_refused_at_once() -> None:
    for more in (
        {"seeds": 100_000_000},
        {"seeds": 10**30},
        {"seeds": MAX_RUNS},
        {key: [n / 100 for n in range(100)] for key in ("lr0", "lrf", "momentum", "mosaic", "mixup")},
    ):
        with pytest.raises(InputError, match=r"are too many|are the most"):
            rows_of(**more)


def test_data_sets_of_one_name_both_become_runs(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    sets = [tmp_path / name / "data.yaml" for name in ("a", "b")]
    for path in sets:
        tiny.write_yaml(path, {"path": str(data.detect.parent / "detect"), "train": "images", "val": "images", "nc": 2})
    given = {"activations": ["stock"], "model": str(stock_yaml), "data": list(map(str, sets)), "seeds": 2, "epochs": 1}
    folders = prepare_runs(make_study(given, defaults=DEFAULTS), tmp_path / "study")
    assert [folder.name for folder in folders] == [
        "stock-a-data-s0", "stock-b-data-s0", "stock-a-data-s1", "stock-b-data-s1",
    ]  # fmt: skip
    records = read_runs(tmp_path / "study")
    assert {record.arguments["data"] for record in records} == set(map(str, sets))
    assert [line.variant for line in build_leaderboard(records, baseline="stock")] == ["stock a/data", "stock b/data"]
    assert prepare_runs(make_study(given, defaults=DEFAULTS), tmp_path / "study") == folders
