"""What `acts` lists: filters and their combinations, starts, parameters, measurements, folds and exports."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from torch import Tensor, nn
from typer.testing import CliRunner

from rtdetr_act import create, find_sites, list_activations, names, patch_model, register
from rtdetr_act.activations.registry import get_entry, is_built_in
from rtdetr_act.analysis.measured import FILE, list_inaccurate, list_working, read_measured
from rtdetr_act.analysis.start import describe_start, find_start
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError
from rtdetr_act.workflows.activations import RTDETR_L_SITES, ListedActivation

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import bench_acts  # noqa: E402
import parity_table  # noqa: E402


@pytest.fixture(scope="module")
def zoo() -> dict[str, ListedActivation]:
    return {each.name: each for each in list_activations().activations}


def find(**filters: Any) -> list[str]:
    return [each.name for each in list_activations(**filters).activations]


# ---------------------------------------------------------------- filters


def has_parameters(name: str) -> bool:
    return name != "threshold" and any(True for _ in create(name, 8).parameters())


def test_each_filter_divides_the_zoo() -> None:
    learned = {name for name in names() if has_parameters(name)}
    maps = {name for name in names() if not get_entry(name).tokens}
    assert {"arelu", "dyrelu_b", "prelu"} <= learned and {"dyrelu_b", "frelu"} <= maps
    assert set(find(learnable=True)) == learned and set(find(learnable=False)) == set(names()) - learned
    assert set(find(maps=True)) == maps and set(find(maps=False)) == set(names()) - maps
    assert set(find(learnable=True, maps=True)) == learned & maps


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("AReLU", "arelu"),
        ("hswish", "hardswish"),
        ("DY-ReLU-B", "dyrelu_b"),
        ("x·Φ(x)", "gelu"),
        ("2006.13858", "arelu"),
        ("equalisation", "prelu"),
        ("SATURATES", "tanh"),
        ("chen eccv", "dyrelu_c"),
    ],
)
def test_a_search_looks_through_names_formula_source_and_description(text: str, found: str) -> None:
    assert found in find(search=text) != names()


def test_all_words_of_a_search_must_be_there() -> None:
    assert "arelu" in find(search="chen") and "arelu" not in find(search="chen eccv")
    assert find(search="chen", learnable=False) == [] == find(search="chen nowhere")
    with pytest.raises(InputError, match="search needs a word to look for, not ' '"):
        find(search=" ")


def test_a_target_and_filters_are_combined() -> None:
    listing = list_activations("edgetpu", learnable=True)
    assert [each.name for each in listing.activations if each.native] == ["prelu"]
    printed = run("acts", "for=edgetpu", "learnable=True")
    assert "native: one slope" in printed and "(1 + σ(β))·x" not in printed, "arelu is only named as not native"
    assert "not native: aconc, aglu," in printed and "relu6" not in printed


def test_options_and_pairs_filter_alike() -> None:
    printed = run("acts", "learnable=True", "maps=False", "search=silu")
    assert printed == run("acts", "--learnable", "--no-maps", "--search", "silu")
    assert [line.split()[0] for line in printed.splitlines()[1:] if line[:1].isalpha()][:2] == ["aconc", "aglu"]


def test_nothing_found_is_a_sentence_and_an_exit_code() -> None:
    found = CliRunner().invoke(app, ["acts", "learnable=False", "maps=False", "search=chen nowhere"])
    assert found.exit_code == 1
    asked = "has no parameters, stands on tokens too and has 'chen' and 'nowhere' in its name or description"
    assert found.output == f"no activation {asked}\n"


# ---------------------------------------------------------------- what is told of each


def test_acts_shows_every_entry_and_which_are_not_for_training() -> None:
    printed = run("acts", "search=")
    listed = {line.split()[0] for line in printed.splitlines() if line and not line.startswith(" ")}
    assert set(names()) <= listed
    assert printed.count("not meant for training") == sum(bool(get_entry(name).note) for name in names()) > 5


@pytest.mark.parametrize("width", [80, 140])
def test_no_line_of_figures_is_wrapped(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("acts", "learnable=True").splitlines()
    figures = [line for line in lines if line.split()[:1] and line.split()[0] in names()]
    assert len(figures) == sum(map(has_parameters, names())) and all(len(line.split()) >= 7 for line in figures)
    assert max(map(len, lines)) <= width


class Gated(nn.Module):
    """x·σ(gain·x) + offset, which is silu where gain is 1 and offset 0."""

    def __init__(self, gain: float | None = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1) if gain is None else torch.tensor([gain]))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gain * x) + self.offset


class Pooling(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.gain * x.mean((2, 3), keepdim=True)


class Failing(Gated):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no")


def test_the_start_is_found_from_the_curve(own_zoo: None) -> None:
    own: dict[str, tuple[Any, str]] = {
        "gated": (Gated, "silu exactly"),
        "gated_near": (lambda: Gated(offset=0.04), "silu within 0.04"),
        "gated_far": (lambda: Gated(3.0, 3.0), ""),
        "gated_random": (lambda: Gated(None), ""),
        "gated_pooling": (Pooling, ""),
        "gated_failing": (Failing, ""),
        "gated_linear": (nn.PReLU, "slopes 1.00 and 0.25"),
        "gated_identity": (lambda: nn.PReLU(init=1.0), "the identity"),
        "gated_relu": (lambda: nn.PReLU(init=0.0), "relu exactly"),
        "gated_fixed": (nn.Mish, "fixed"),
    }
    for name, (factory, _) in own.items():
        register(name, factory)
    state = torch.get_rng_state()
    assert {name: describe_start(name) for name in own} == {name: start for name, (_, start) in own.items()}
    assert torch.equal(torch.get_rng_state(), state), "the random state moved"
    register("gated_written", Gated, start="as it likes")
    assert describe_start("gated_written") == "as it likes"


def test_starts_of_the_zoo_are_known_and_true(zoo: dict[str, ListedActivation]) -> None:
    found = {each.name: each.start for each in zoo.values() if is_built_in(each.name)}
    assert [name for name, start in found.items() if not start] == ["threshold"]
    assert found["silu"] == "fixed" and found["arelu"] == "slopes 1.88 and 0.90"
    assert found["dyrelu_a"] == found["dyrelu_b"] == "relu exactly"
    for name, start in found.items():
        if start.endswith("exactly"):
            assert find_start(name) == start


def test_folds_are_told_by_what_becomes_of_any_parameters(zoo: dict[str, ListedActivation]) -> None:
    found = {each.name: (each.folds, each.folds_to) for each in zoo.values()}
    assert found["arelu"] == found["prelu"] == found["rrelu"] == ("always", "leaky_relu")
    assert found["celu"] == ("always", "elu")
    assert found["aglu"] == found["hardtanh"] == ("sometimes", "")
    assert found["silu"] == found["dyrelu_b"] == ("never", "")


@pytest.mark.integration
def test_parameters_in_rtdetr_l_are_those_that_a_swap_adds(zoo: dict[str, ListedActivation]) -> None:
    from ultralytics import RTDETR

    model = RTDETR("rtdetr-l.yaml")
    assert Counter(site.channels for site in find_sites(model) if site.layout != "tokens") == RTDETR_L_SITES
    before = sum(parameter.numel() for parameter in model.model.parameters())
    patch_model(model, "dyrelu_b")
    added = sum(parameter.numel() for parameter in model.model.parameters()) - before
    assert zoo["dyrelu_b"].parameters_rtdetr_l == added and zoo["relu"].parameters_rtdetr_l == 0


def test_no_model_is_built_for_a_listing() -> None:
    owners = set()
    hook = nn.modules.module.register_module_module_registration_hook(
        lambda owner, name, child: owners.add(type(owner).__name__)
    )
    try:
        list_activations(search="dy-relu")
    finally:
        hook.remove()
    assert "DyReLUB" in owners and not owners & {"Sequential", "RTDETRDetectionModel", "DetectionModel"}


# ---------------------------------------------------------------- measurements


def test_measurements_are_those_of_the_file_and_of_the_parity_table(zoo: dict[str, ListedActivation]) -> None:
    measured = read_measured()
    assert FILE.read_text(encoding="utf-8") == bench_acts.format_rows(measured), "the file as the script writes it"
    assert set(measured) <= {name for name in names() if is_built_in(name)} and "silu" in measured
    table = parity_table.read_table(ROOT / "docs" / "parity.json")
    for name, row in measured.items():
        assert row == bench_acts.add_exports(row, table), f"{name}: run scripts/bench_acts.py after scripts/parity.py"
        assert row.train_low <= row.train <= row.train_high and row.machine
        assert row.inference_low <= row.inference <= row.inference_high
        assert row.gradcheck and (row.error is None or row.error < 1e-9) and row.kept_output <= row.kept
    assert zoo["silu"].measured == measured["silu"]


def test_exports_are_read_from_what_was_found() -> None:
    found = {"torchscript": "2e-06", "onnx": "not finite", "openvino": "1e-02", "ncnn": "refused"}
    assert list_working(found) == ["torchscript", "openvino"] and list_inaccurate(found) == ["openvino"]
    table = {"yolo11n": {"apa": {"onnx": "1e-06, 300 of 300", "ncnn": "refused (why, and how)"}}}
    row = bench_acts.add_exports(replace(read_measured()["silu"], activation="apa"), table)
    assert row.exports == {"onnx": "1e-06", "ncnn": "refused"}


def test_what_a_user_registers_is_listed_without_measurements(own_zoo: None) -> None:
    register("gated", Gated, formula="x·σ(g·x)")
    (found,) = list_activations(search="x·σ(g·x)").activations
    assert (found.measured, found.start, found.parameters_rtdetr_l) == (None, "silu exactly", 77)
    printed = run("acts", "search=gated")
    assert "not measured" in printed and "start: silu exactly; 1 parameter a site" in printed
    row = list_activations(search="gated").to_csv().splitlines()[1]
    assert row.startswith("gated,") and row.endswith(",,,,"), "empty cells"
    assert list_activations(search="gated").to_dict()["activations"][0]["measured"] is None


def test_a_listing_is_plain_data() -> None:
    listing = list_activations(search="silu baseline")
    header, row = (line.split(",") for line in listing.to_csv().splitlines())
    assert row[0] == "silu" and row[header.index("train")] == str(read_measured()["silu"].train)
    assert header[-1] == "machine" and "measured" not in header
    (silu,) = listing.to_dict()["activations"]
    assert silu["measured"]["gradcheck"] is True and silu["parameters_rtdetr_l"] == 0


# ---------------------------------------------------------------- the scripts


class Wrong(Gated):
    """Keeps three maps, and its gradient is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.exp().log() * torch.sigmoid(self.gain.detach() * x)).abs()


def test_one_activation_is_measured_and_the_rows_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_zoo: None
) -> None:
    monkeypatch.setattr(bench_acts, "SHAPES", ((1, 4, 8, 8),))  # each round collects garbage, which takes longest
    output = tmp_path / "measured.csv"
    before = read_measured()
    output.write_text(bench_acts.format_rows(before), encoding="utf-8")
    bench_acts.main(["ReLU"], 2, output, ROOT / "docs" / "parity.json", "a test")
    after = read_measured(output)
    relu = after.pop("relu")
    assert after == {name: row for name, row in before.items() if name != "relu"}
    assert (relu.kept, relu.kept_output, relu.error, relu.gradcheck, relu.machine) == (4, 4, 0, True, "a test")
    assert relu.exports == bench_acts.add_exports(relu, parity_table.read_table(ROOT / "docs" / "parity.json")).exports
    with pytest.raises(Exception, match="there is no activation 'rellu'"):
        bench_acts.main(["rellu"], 2, output, ROOT / "docs" / "parity.json", "")
    register("wrong_one", Wrong)
    assert not bench_acts.check_gradients("wrong_one") and bench_acts.measure_errors("wrong_one") == (None, None)
    kept, of_output = bench_acts.measure_kept("wrong_one")
    assert kept > 12 and of_output == 0


def test_the_parity_table_is_written_as_read_and_keeps_other_rows() -> None:
    table = parity_table.read_table(ROOT / "docs" / "parity.json")
    assert parity_table.compose_markdown(table) == (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    new = {"onnx": "1e-07, 300 of 300"}
    merged = parity_table.merge_rows(table, "yolo11n", {"arelu": new, "aaa": new})
    assert list(merged["yolo11n"]) == sorted({*table["yolo11n"], "aaa"})
    assert merged["yolo11n"]["arelu"] == new and merged["yolo11n"]["silu"] == table["yolo11n"]["silu"]
    assert merged["rtdetr-n"] == table["rtdetr-n"] and "aaa" not in table["yolo11n"]
    assert parity_table.read_table(ROOT / "docs" / "nowhere.json") == {}
