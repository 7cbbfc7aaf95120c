"""The shipped model YAMLs: what they hold, that they are what the script writes, that they are found by bare name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from ultralytics import RTDETR, YOLO

from rtdetr_act import find_sites, patch_model, unpatch_model
from rtdetr_act.integrations.ultralytics.configs import config_names, configs_folder, find_config

VARIANTS = ("arelu", "dyrelu_b", "mixed", "mish", "hardswish")
FAMILIES = {"rtdetr-n": 51, "rtdetr-l": 77, "rtdetr-x": 109, "rtdetr-resnet50": 73, "yolo11": 77}


def load(name: str) -> RTDETR | YOLO:
    return RTDETR(name) if name.startswith("rtdetr") else YOLO(name.replace("yolo11", "yolo11n"))


@pytest.fixture(scope="module")
def stock(request: pytest.FixtureRequest) -> RTDETR | YOLO:
    """Build the stock model of a family."""
    return load(f"{request.param}.yaml")


def test_every_family_ships_in_every_variant() -> None:
    expected = {f"{family}-{variant}.yaml" for family in FAMILIES for variant in VARIANTS} | {"rtdetr-n.yaml"}
    assert set(config_names()) == expected


@pytest.mark.integration
@pytest.mark.parametrize(
    ("family", "stock", "variant"),
    [  # each family with the plan of several rules, each variant in the smallest model; all are written by one script
        *(("rtdetr-n", "rtdetr-n", variant) for variant in VARIANTS),
        *((family, family, "mixed") for family in FAMILIES if family != "rtdetr-n"),
    ],
    indirect=["stock"],
)
def test_a_config_is_the_patched_stock_model(family: str, stock: RTDETR | YOLO, variant: str) -> None:
    model = load(f"{family}-{variant}.yaml")
    unpatch_model(stock)
    mixed = "dyrelu_b@backbone, dyrelu_c@neck" + (", silu@head" if family == "yolo11" else "")
    report = patch_model(stock, mixed if variant == "mixed" else variant)
    assert len(report) == FAMILIES[family]
    maps = {site.name: site.current for site in find_sites(model) if site.layout == "map"}
    assert maps == {site.name: site.current for site in find_sites(stock) if site.layout == "map"}
    assert model.task == "detect"
    text = (configs_folder() / f"{family}-{variant}.yaml").read_text()
    rows = yaml.safe_load(text)
    named = {index for index, row in enumerate(rows["backbone"] + rows["head"]) if len(row) == 5}
    assert named >= {site.layer for site in find_sites(model) if site.layout == "map"}, "row by row"
    assert text.startswith("# ")
    if family in ("rtdetr-n", "yolo11"):
        assert model.model.state_dict().keys() == stock.model.state_dict().keys()


@pytest.mark.integration
def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "scripts" / "write_configs.py"
    spec = importlib.util.spec_from_file_location("write_configs", source)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for path in script.write(tmp_path):
        assert path.read_text() == (configs_folder() / path.name).read_text(), path.name


def test_the_nano_model_is_small_and_a_stock_file() -> None:
    model = load("rtdetr-n.yaml")
    assert 0.8e6 < sum(p.numel() for p in model.model.parameters()) < 1.3e6
    assert "activation" not in model.model.yaml
    assert model.model.eval()(torch.zeros(1, 3, 64, 64))[0].shape[0] == 1


def test_bare_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("rtdetr-n-arelu.yaml") == configs_folder() / "rtdetr-n-arelu.yaml"
    assert find_config("yolo11s-arelu.yaml") == configs_folder() / "yolo11-arelu.yaml"
    assert find_config("rtdetr-l.yaml") is None and find_config("elsewhere/rtdetr-n.yaml") is None
    small = sum(p.numel() for p in YOLO("yolo11n-mish.yaml").model.parameters())
    large = sum(p.numel() for p in YOLO("yolo11s-mish.yaml").model.parameters())
    assert small == 2624080 and large > 3 * small  # 2,624,080 is yolo11n's own count
    (tmp_path / "rtdetr-n.yaml").write_text("nc: 1\n")
    assert find_config("rtdetr-n.yaml") is None, "a file in the working folder goes first"
