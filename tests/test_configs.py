"""The shipped model YAMLs: what they hold, that they are what the script writes, that they are found by bare name."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics import RTDETR, YOLO
from ultralytics.nn import tasks
from ultralytics.utils.checks import check_yaml

from rtdetr_act import find_sites, patch_model, unpatch_model
from rtdetr_act.integrations.ultralytics.configs import config_names, configs_folder, find_config
from rtdetr_act.surgery.model_plan import read_plan

UNIFORM = ("arelu", "prelu", "leaky_relu", "relu6", "mish", "hardswish", "dyrelu_a", "dyrelu_b", "dyrelu_c")
VARIANTS = (*UNIFORM, "mixed")
FAMILIES = {"rtdetr-n": 51, "rtdetr-l": 77, "rtdetr-x": 109, "rtdetr-resnet50": 73, "yolo11": 77, "yolo26": 105}
BUILDABLE = [family for family in FAMILIES if find_config(f"{family}.yaml") or check_yaml(f"{family}.yaml", hard=False)]
needs_yolo26 = pytest.mark.skipif("yolo26" not in BUILDABLE, reason="this Ultralytics has no YOLO26")


def load(name: str) -> RTDETR | YOLO:
    return RTDETR(name) if name.startswith("rtdetr") else YOLO(name.replace("yolo11", "yolo11n").replace("26", "26n"))


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Return what a shipped YAML holds."""
    return yaml.safe_load((configs_folder() / name).read_text(encoding="utf-8"))


@functools.cache
def read_stock(family: str) -> dict[str, Any]:
    """Return the stock model YAML of a family, of ours or of Ultralytics."""
    found = find_config(f"{family}.yaml") or check_yaml(f"{family}.yaml")
    return yaml.safe_load(Path(found).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stock(request: pytest.FixtureRequest) -> RTDETR | YOLO:
    """Build the stock model of a family."""
    return load(f"{request.param}.yaml")


def test_every_family_ships_in_every_variant() -> None:
    expected = {f"{family}-{variant}.yaml" for family in FAMILIES for variant in VARIANTS} | {"rtdetr-n.yaml"}
    assert set(config_names()) == expected


@pytest.mark.parametrize("family", BUILDABLE)
def test_a_uniform_file_is_the_stock_one_and_a_line(family: str) -> None:
    for act in UNIFORM:
        assert read(f"{family}-{act}.yaml") == {"activation": f"rtdetr_act.{act}", **read_stock(family)}


@pytest.mark.parametrize("family", BUILDABLE)
def test_a_mixed_file_is_the_stock_one_and_fifth_items(family: str) -> None:
    mixed, expected = read(f"{family}-mixed.yaml"), read_stock(family)
    for part in ("backbone", "head"):
        assert [row[:4] for row in mixed[part]] == expected[part]
    named = {part: {row[4] for row in mixed[part] if len(row) == 5} for part in ("backbone", "head")}
    assert named == {"backbone": {"dyrelu_b"}, "head": {"dyrelu_c", "silu"}}
    rest = {key: value for key, value in mixed.items() if key not in ("backbone", "head")}
    assert rest == {"activation": "rtdetr_act.silu", **{k: v for k, v in expected.items() if k in rest}}
    assert rest.keys() - {"activation"} == expected.keys() - {"backbone", "head"}


@pytest.mark.parametrize("family", FAMILIES)
def test_ultralytics_alone_names_what_is_missing(family: str) -> None:
    for variant in VARIANTS:
        with pytest.raises(NameError, match="name 'rtdetr_act' is not defined"):
            tasks.parse_model.__wrapped__(read(f"{family}-{variant}.yaml"), 3)  # Ultralytics' own


def test_each_file_has_the_command_that_trains_it() -> None:
    for name in config_names():
        text = (configs_folder() / name).read_text(encoding="utf-8")
        [line] = [line for line in text.splitlines() if "rtdetr-act train " in line]
        mark, program, command, model, *rest = line.split()
        assert text.startswith("# ") and [mark, program, command] == ["#", "rtdetr-act", "train"]
        assert find_config(model) == configs_folder() / name
        assert rest == (["act=arelu"] if name == "rtdetr-n.yaml" else []) + ["data=coco8.yaml"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("family", "stock", "variant"),
    [  # the smallest in each variant, each other one in a plan of several rules; all are written by one script
        *(("rtdetr-n", "rtdetr-n", variant) for variant in VARIANTS),
        *((family, family, "mixed") for family in BUILDABLE if family != "rtdetr-n"),
        *(("yolo26", "yolo26", "prelu") for _ in range("yolo26" in BUILDABLE)),
    ],
    indirect=["stock"],
)
def test_a_config_is_the_patched_stock_model(family: str, stock: RTDETR | YOLO, variant: str) -> None:
    model = load(f"{family}-{variant}.yaml")
    unpatch_model(stock)
    mixed = "dyrelu_b@backbone, dyrelu_c@neck" + (", silu@head" if family.startswith("yolo") else "")
    assert len(patch_model(stock, mixed if variant == "mixed" else variant)) == FAMILIES[family]
    sites = [
        {site.name: site.current for site in find_sites(each) if variant != "mixed" or site.layout == "map"}
        for each in (model, stock)
    ]
    assert sites[0] == sites[1]
    if variant != "mixed":
        assert str(read_plan(model.model)) == variant
        assert model.model.yaml["activation"] == f"rtdetr_act.{variant}"
    elif family.startswith("rtdetr"):
        assert {site.current for site in find_sites(model) if site.layout == "tokens"} == {"silu"}
    assert model.task == "detect"
    assert model.model.state_dict().keys() == stock.model.state_dict().keys() or family in ("rtdetr-l", "rtdetr-x")


@pytest.mark.integration
def test_the_files_are_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    script = importlib.import_module("write_configs")
    assert [*script.MODELS] == [*FAMILIES]
    for family in BUILDABLE:
        for variant, text in script.compose(family).items():
            assert (configs_folder() / f"{family}-{variant}.yaml").read_text(encoding="utf-8") == text


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
    assert find_config("yolo26x-mixed.yaml") == configs_folder() / "yolo26-mixed.yaml"
    (tmp_path / "rtdetr-n.yaml").write_text("nc: 1\n")
    assert find_config("rtdetr-n.yaml") is None, "a file in the working folder goes first"


@needs_yolo26
def test_yolo26_has_its_scales_and_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = YOLO("yolo26n-mish.yaml")
    assert model.model.model[-1].reg_max == 1
    given, own = (each.model.state_dict() for each in (YOLO("yolo26n.yaml"), model))
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in given.items()}
    assert any("one2one" in key for key in own)
    assert tasks.yaml_model_load("yolo26s-mish.yaml")["scale"] == "s"
