"""What functions return: one line in a console, plain data for JSON, and a CSV file that is whole or not there."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from records import make_folder
from torch import nn

from rtdetr_act import Plan, diagnose, find_sites, fold_activations, patch_convs, patch_model
from rtdetr_act.analysis.feature_maps import ValueSummary
from rtdetr_act.analysis.history import make_history
from rtdetr_act.analysis.learned import read_quantities
from rtdetr_act.errors import InputError
from rtdetr_act.integrations.ultralytics.costs import Cost
from rtdetr_act.integrations.ultralytics.latency import Latency
from rtdetr_act.integrations.ultralytics.runs import Outcome
from rtdetr_act.results import Result, TableResult, to_plain
from rtdetr_act.study.report import report_study
from rtdetr_act.timing import Ratio
from rtdetr_act.workflows.learned import Learned
from rtdetr_act.workflows.maps import FeatureMaps, SiteMaps
from rtdetr_act.workflows.sites import list_sites

ONE, MORE = Ratio(1.0, 1.0, 1.0, 0.5), Ratio(1.25, 1.2, 1.3, 0.625)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )


def make_patch(_: Path) -> Result:
    return patch_model(make_net(), "arelu")


def make_mixed_patch(_: Path) -> Result:
    rules = [{"activation": name, "include": site} for name, site in (("arelu", "1"), ("mish", "3"), ("prelu", "5"))]
    return patch_model(make_net(), Plan.from_yaml({"rules": rules}))


def make_convolutions(_: Path) -> Result:
    return patch_convs(make_net(), kernels=2)


def make_match(_: Path) -> Result:
    return patch_model(make_net(), "arelu", init="match")


def make_fold(_: Path) -> Result:
    net = make_net()
    patch_model(net, "arelu")
    return fold_activations(net)


def make_kept_fold(_: Path) -> Result:
    net = nn.Sequential(nn.ReLU(), nn.Hardtanh(), nn.Conv2d(3, 3, 1))
    patch_model(net, "arelu", include="0", example_input=torch.zeros(1, 3, 8, 8))
    return fold_activations(net, torch.rand(1, 3, 8, 8))


def make_diagnosis(_: Path) -> Result:
    return diagnose(make_net(), [torch.randn(2, 3, 12, 12)], lambda model, x: model(x).square().mean())


def make_sites(folder: Path) -> Result:
    return list_sites(str(tiny.write_yaml(folder / "tiny.yaml", tiny.RTDETR)), "arelu@backbone")


def make_learned(_: Path) -> Result:
    net = make_net()
    patch_model(net, "arelu")
    quantities = read_quantities(net)
    return Learned(quantities, {(quantities[0].site, quantities[0].name): 0.9}, make_history(quantities), "a note")


def make_maps(_: Path) -> Result:
    values = ValueSummary(0.5, 1.0, 0.0, math.inf, 0.25, 0.0)
    rows = [SiteMaps(model, "model.2.act", 2, "ReLU", 8, 4, 4, 1, 0.0, (3, 1), values, values) for model in "ab"]
    return FeatureMaps("photo.jpg", 64, 64, tuple(rows), ("b: model.3.act",))


def make_study(folder: Path) -> Result:
    return report_study(make_folder(folder / "study"))


TABLES: dict[Callable[[Path], Any], tuple[str, int]] = {
    make_patch: ("<PatchReport: 3 sites swapped, arelu, 6 parameters>", 3),
    make_mixed_patch: ("<PatchReport: 3 sites swapped, arelu, mish and prelu, 3 parameters>", 3),
    make_convolutions: ("<PatchReport: 3 sites swapped, dynamic_conv(kernels=2), 2,444 parameters>", 3),
    make_match: ("<PatchReport: 3 sites swapped, arelu, 6 parameters>", 3),
    make_fold: ("<FoldReport: 3 activations folded, 0 kept>", 3),
    make_kept_fold: ("<FoldReport: 0 activations folded, 1 kept>", 1),
    make_diagnosis: ("<Diagnosis: 3 sites on 1 batch>", 3),
    make_sites: (f"<SiteListing: {tiny.CONV_SITES + tiny.TOKEN_SITES} sites, 21 swapped>", 30),
    make_learned: ("<Learned: 6 quantities of 3 sites>", 6),
    make_maps: ("<FeatureMaps: 1 site of 2 models>", 2),
    make_study: ("<StudyReport: 2 variants, 4 finished runs>", 2),
}
OTHERS = {
    "<Outcome: arelu, mAP50 0.5000, mAP50-95 0.2500>": Outcome(
        "arelu", 3, 1000, 1.5, {"mAP50": 0.5, "mAP50-95": 0.25}, math.nan, Path("runs")
    ),
    "<Outcome: arelu, failed: memory ran out>": Outcome("arelu", failure="memory ran out"),
    "<Cost: arelu, training step 1.25, inference 1.00, peak memory 1.10, saved for backward 0.75>": Cost(
        "arelu", MORE, ONE, 1.1, 0.75, 1000, 500
    ),
    "<Latency: arelu, onnx int8, 3.25 ms, top1 0.5000>": Latency(
        "arelu", "onnx int8", 3.25, 4.5, MORE, 1000, 1.5, 0.1, "a.onnx", {"top1": 0.5}, 224, 0.2
    ),
}


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_tables_have_a_line_plain_data_and_rows(make: Callable[[Path], Any], tmp_path: Path) -> None:
    shown, count = TABLES[make]
    result = make(tmp_path)
    assert repr(result) == shown
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    path = tmp_path / "table.csv"
    text = result.to_csv(path)
    assert path.read_bytes().decode() == text == result.to_csv(str(path)) == result.to_csv()
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 1 + count and {len(row) for row in rows} == {len(set(rows[0]))}


@pytest.mark.parametrize("shown", OTHERS)
def test_single_results_have_a_line_and_plain_data(shown: str) -> None:
    result = OTHERS[shown]
    assert repr(result) == shown
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert list(plain) == [field.name for field in dataclasses.fields(result)]


def test_parts_have_a_line_each() -> None:
    net = make_net()
    assert repr(find_sites(net)[0]) == "<Site: 1, ReLU, 8 channels>"
    assert repr(patch_model(net, "arelu").swaps) == (
        "(<Swap: 1, ReLU -> arelu>, <Swap: 3, SiLU -> arelu>, <Swap: 5, ReLU -> arelu>)"
    )
    (first, *_) = diagnose(net, [torch.ones(1, 3, 12, 12)], lambda model, x: model(x).square().mean()).sites
    assert repr(first).startswith("<SiteDiagnosis: 1, arelu, gain ")


def test_leaderboard_rows_have_a_line_each_and_the_table_is_the_file(tmp_path: Path) -> None:
    report = report_study(make_folder(tmp_path / "study"))
    assert list(map(repr, report.rows)) == [
        "<LeaderboardRow: arelu, 2 runs, 0.302, no difference shown>",
        "<LeaderboardRow: stock, 2 runs, 0.253, baseline>",
    ]
    assert report.rows[0].to_dict()["comparison"]["pairs"] == 2
    written = csv.DictReader(io.StringIO((tmp_path / "study" / "leaderboard.csv").read_text(encoding="utf-8")))
    for own, other in zip(csv.DictReader(io.StringIO(report.to_csv())), written, strict=True):
        assert list(own) == list(other)
        assert [own[key] for key in ("variant", "baseline", "verdict")] == [
            other[key] for key in ("variant", "baseline", "verdict")
        ]


def test_values_of_rows_are_those_of_the_report() -> None:
    net = make_net()
    report = patch_model(net, "arelu", init="match")
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["site"] for row in rows] == report.sites
    assert [float(row["misfit"]) for row in rows] == [swap.misfit for swap in report.swaps]
    assert {row["layer"] for row in rows} == {""}  # unknown in a model that is not from Ultralytics
    assert report.to_dict()["parameters"] == report.parameters


@pytest.mark.parametrize("name", ["", "missing/table.csv"])
def test_what_cannot_be_written_is_one_sentence(name: str, tmp_path: Path) -> None:
    report = patch_model(make_net(), "arelu")
    with pytest.raises(InputError, match=r"^cannot write '"):
        report.to_csv(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_plain_data_is_refused() -> None:
    assert to_plain({1: {2}, "b": (True, None, math.inf)}) == {"1": [2], "b": [True, None, None]}
    with pytest.raises(TypeError, match="a Conv2d is not plain data"):
        to_plain([nn.Conv2d(1, 1, 1)])


def test_every_result_says_what_it_is() -> None:
    def list_classes(base: type) -> list[type]:
        return [each for direct in base.__subclasses__() for each in (direct, *list_classes(direct))]

    for each in set(list_classes(Result)) - {TableResult}:
        assert each.__repr__ is Result.__repr__ and each._summarise is not Result._summarise, each
        assert not issubclass(each, TableResult) or each._make_table is not TableResult._make_table, each
