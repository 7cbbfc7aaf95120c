"""What Python offers: a function for each command, which takes names and paths as users write them."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Data, Run
from typer.main import get_command

import rtdetr_act
from rtdetr_act import errors
from rtdetr_act.cli.main import app
from rtdetr_act.surgery.sites import find_sites

FUNCTIONS = {
    "train": ["train_variants"], "resume": ["resume_training"], "val": ["validate_checkpoints", "validate_variants"],
    "compare": ["compare_detectors"],
    "convert": ["convert_checkpoint"], "predict": ["predict_source"], "export": ["export_checkpoint"],
    "fold": ["fold_checkpoint"],
    "diagnose": ["diagnose", "diagnose_variants"], "acts": ["list_activations"],
    "plot": ["plot_activations", "plot_checkpoint"],
    "sites": ["list_sites"], "learned": ["report_learned", "read_learned"], "maps": ["compare_feature_maps"],
    "bench": ["bench_training", "bench_exports"], "study": ["run_study"], "report": ["report_study"],
    "plan": ["plan_seeds"],
    "search": ["run_search"], "doctor": ["examine"], "exec": ["run_script"],
    "checks": ["collect_checks"], "sensitivity": ["measure_sensitivity", "measure_checkpoint_sensitivity"],
}  # fmt: skip


def test_every_command_has_a_function() -> None:
    assert set(get_command(app).commands) == set(FUNCTIONS)  # type: ignore[attr-defined]
    for name in (name for names in FUNCTIONS.values() for name in names):
        assert callable(getattr(rtdetr_act, name)) and getattr(rtdetr_act, name).__name__ == name


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing a module sets its name in the package, in place of the public name."""
    modules = {module.name for module in pkgutil.iter_modules(rtdetr_act.__path__)}
    assert modules & set(rtdetr_act.__all__) == set()


def test_every_error_is_offered() -> None:
    raised = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert {name for name in raised if not name.startswith("_")} <= set(rtdetr_act.__all__)
    assert rtdetr_act.SpecError is errors.SpecError
    with pytest.raises(rtdetr_act.RtdetrActError):
        rtdetr_act.load_model("rtdetr-n.yaml", "arleu")


@pytest.mark.parametrize("activation", ["arelu@backbone", {"rules": [{"activation": "arelu", "sections": "backbone"}]}])
def test_a_model_is_loaded_with_its_swap(activation: Any, stock_yaml: Path) -> None:
    model = rtdetr_act.load_model(stock_yaml, activation, conv="dynamic_conv@neck")
    swapped = {site.section for site in find_sites(model) if site.current == "arelu"}
    assert swapped == {"backbone"} and any("DynamicConv2d" in repr(module) for module in model.model.modules())
    assert len(rtdetr_act.fold_activations(model)) == sum(site.section == "backbone" for site in find_sites(model))
    rtdetr_act.unpatch_model(stock := rtdetr_act.load_model(str(stock_yaml), "stock"))
    assert not any(site.current == "arelu" for site in find_sites(stock))


@pytest.mark.integration
def test_one_word_is_one_activation(tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / "tiny.yaml", tiny.RTDETR)
    costs, files = rtdetr_act.bench_training(path, "arelu", str(tmp_path / "bench"), imgsz=64, batch=2, rounds=2)
    assert [cost.activation for cost in costs] == ["stock", "arelu"]
    assert [file.name for file in files] == ["tiny.json", "tiny.png"]
    assert rtdetr_act.plot_activations("arelu", str(tmp_path / "curves.png")).is_file()
    latencies, _ = rtdetr_act.bench_exports(path, "arelu", "torch", str(tmp_path / "bench"), imgsz=64, rounds=2)
    assert [(each.activation, each.format) for each in latencies] == [("arelu", "torch")]


def test_variants_of_one_model_are_diagnosed(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    found, files = rtdetr_act.diagnose_variants(
        stock_yaml, "arelu", Path(data.detect), str(tmp_path), images=2, imgsz=64, batch=2
    )
    assert list(found) == ["arelu"] and all(file.is_file() for file in files)


def test_paths_of_checkpoints_are_taken(patched_run: Run, data: Data, tmp_path: Path) -> None:
    settings = {"imgsz": 64, "batch": 4, "workers": 0, "plots": False, "project": str(tmp_path), "device": "cpu"}
    (found,) = rtdetr_act.validate_checkpoints(patched_run.pt, Path(data.detect), settings)
    assert set(found.scores or ()) == {"mAP50", "mAP50-95"} and found.folder is None, "no empty folder is left"
    report, path = rtdetr_act.fold_checkpoint(patched_run.pt, tmp_path / "folded.pt")
    assert len(report) == tiny.CONV_SITES and path.is_file()
    learned, figure = rtdetr_act.report_learned(patched_run.pt, str(tmp_path / "learned.png"))
    assert figure.is_file() and learned.to_dict() == rtdetr_act.read_learned(patched_run.pt).to_dict()
    assert len(rtdetr_act.list_sites(patched_run.pt).sites) == tiny.CONV_SITES + tiny.TOKEN_SITES


@pytest.mark.integration
def test_one_variant_is_trained(stock_yaml: Path, data: Data, tmp_path: Path) -> None:
    arguments = {**tiny.train_args(data.detect, tmp_path)}
    (outcome,) = rtdetr_act.train_variants(stock_yaml, "arelu", Path(arguments.pop("data")), arguments)
    assert (outcome.activation, outcome.sites, outcome.failure) == ("arelu", tiny.CONV_SITES, "")
    assert outcome.gflops_640 > 0 and outcome.to_dict()["folder"] == str(outcome.folder)


def test_activations_are_listed_with_what_a_target_runs() -> None:
    listing = rtdetr_act.list_activations("rknn")
    assert [each.name for each in listing.activations] == rtdetr_act.names()
    by_name = {each.name: each for each in listing.activations}
    assert by_name["relu"].native and not by_name["dyrelu_b"].native and by_name["dyrelu_b"].native_source == ""
    assert (by_name["prelu"].parameters_64, by_name["aconc"].parameters_256) == (1, 768)
    assert by_name["threshold"].parameters_64 is None
    assert len(listing.to_csv().splitlines()) == 1 + len(rtdetr_act.names())
    assert all(each.native is None for each in rtdetr_act.list_activations().activations)
    with pytest.raises(rtdetr_act.InputError, match="no target 'rkn'; did you mean 'rknn'"):
        rtdetr_act.list_activations("rkn")
