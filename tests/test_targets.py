"""What edge targets run natively, as the lists have it and as commands tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from test_cli import run
from ultralytics import YOLO

from rtdetr_act import names, patch_model
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.deploy.targets import TARGETS, get_native_support, list_target_warnings
from rtdetr_act.errors import InputError


def test_every_entry_is_of_the_zoo_and_names_its_source() -> None:
    assert set(TARGETS) == {"rknn", "hailo", "edgetpu", "vitis-dpu", "openvino"}
    for name in names():
        for target, native in get_entry(name).targets.items():
            assert target in TARGETS and any(site in native.source for site in ("github.com/", ".com/", ".ai/"))
    assert all(get_native_support("relu", target) for target in TARGETS)


def test_what_folds_is_judged_by_what_it_becomes() -> None:
    for target in TARGETS:
        assert (
            get_native_support("arelu", target)
            == get_native_support("leaky_relu", target)
            == get_native_support("rrelu", target)
        )
    assert get_native_support("arelu", "edgetpu") is None


def test_a_model_is_warned_of_what_its_target_does_not_run(tmp_path: Path) -> None:
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())))
    (stock,) = list_target_warnings(model, "edgetpu")
    assert stock.startswith("silu (") and "not native on edgetpu" in stock
    sites = len(patch_model(model, "arelu"))
    (folded,) = list_target_warnings(model, "vitis-dpu")
    assert (
        folded.startswith(f"arelu ({sites} sites) on vitis-dpu: the slope becomes 26/256") and "docs.amd.com" in folded
    )
    assert list_target_warnings(model, "rknn") == []
    patch_model(model, "relu")
    assert [list_target_warnings(model, name) for name in ("edgetpu", "vitis-dpu", "openvino", "rknn")] == [
        [],
        [],
        [],
        [],
    ]


def test_commands_tell(tmp_path: Path) -> None:
    printed = run("acts", "--for", "vitis-dpu")
    assert "26/256" in printed and "not native: aconc," in printed
    with pytest.raises(InputError, match="there is no target 'rknm'; did you mean 'rknn'"):
        run("acts", "--for", "rknm")
    with pytest.raises(InputError, match="there is no target 'tpu'"):
        run("train", "--act", "arelu", "--for", "tpu")
