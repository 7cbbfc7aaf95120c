"""A model YAML names layers and runs no code; whatever else is wrong in it is one sentence that names the row."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from fuzzing.inputs import MODEL_YAMLS, mutate
from torch import nn
from typer.testing import CliRunner
from ultralytics.nn import tasks
from ultralytics.utils import ROOT

from rtdetr_act import patch_convs, patch_model, unpatch_model
from rtdetr_act.cli.main import app
from rtdetr_act.errors import RtdetrActError, SpecError
from rtdetr_act.integrations.ultralytics.model_yaml import check_form, check_modules
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.surgery.model_plan import split_model_yaml


def row(module: str, *args: Any) -> dict[str, Any]:
    """Return the tiny YOLO with a row in the middle of its backbone."""
    model_yaml = tiny.yolo()
    model_yaml["backbone"] = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, module, [*args]], *tiny.YOLO_BACKBONE[1:]]
    model_yaml["head"][0][0] = [4, 5]
    return model_yaml


# Not every release has the function; the sentence says which it is.
EITHER = "not a (layer|module)"


@pytest.mark.parametrize(
    ("module", "args", "words"),
    [
        ("torch_load", ["'x.pt'"], EITHER),
        ("torch_load", ["x.pt"], EITHER),
        ("check_file", ["'https://example.invalid/x.pt'"], EITHER),
        ("check_requirements", ["'no_such_package'"], "not a layer"),
        ("load_checkpoint", ["'x.pt'"], EITHER),
        ("yaml_model_load", ["'x.yaml'"], "not a layer"),
        ("Path", ["'x'"], "not a layer"),
        ("torch", [], "not a layer"),
        ("nn.functional", [], "not a layer"),
        ("nn.init.constant_", [], "not a module"),
        ("nn.modules.conv.Conv2d", [], "not a module"),
        ("torchvision.ops.nms", [], "not a layer"),
        ("__builtins__", [], "not a layer"),
        ("__import__('os').system", ["'true'"], "not a module"),
        ("DetectionModel", ["'x.yaml'"], "whole model"),
        ("Convv", [8, 3, 2], "not a module; did you mean 'Conv'?"),
    ],
)
def test_a_row_names_a_layer_and_nothing_else(
    module: str, args: list[Any], words: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Ran:
        def __reduce__(self) -> tuple:
            return open, ("ran", "w")

    torch.save(Ran(), tmp_path / "x.pt")
    before = sorted(tmp_path.iterdir())
    for build in (tasks.parse_model, lambda d, ch: tasks.DetectionModel(d, ch, verbose=False)):
        with pytest.raises(SpecError, match=rf"row 1 of 'backbone'.*{words}"):
            build({**row(module, *args), "nc": 2}, 3)
    assert sorted(tmp_path.iterdir()) == before


def test_a_layer_of_a_users_own_stays_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halve(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x / 2

    monkeypatch.setattr(tasks, "Halve", Halve, raising=False)
    model = tasks.DetectionModel(row("Halve"), verbose=False)
    assert isinstance(model.model[1], Halve)


def test_a_bug_in_a_layer_of_a_users_own_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            raise KeyError("bug")

    monkeypatch.setattr(tasks, "Broken", Broken, raising=False)
    with pytest.raises(KeyError, match="bug"):
        tasks.DetectionModel(row("Broken"), verbose=False)


@pytest.mark.parametrize("path", sorted((ROOT / "cfg" / "models").rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_yaml_of_ultralytics_is_refused(path: Path) -> None:
    stock, _ = split_model_yaml(yaml.safe_load(path.read_text(encoding="utf-8")))
    check_form(stock)
    check_modules(stock, vars(tasks))


def test_a_mutated_yaml_is_a_sentence_or_a_model(tmp_path: Path) -> None:
    draw = random.Random(0)
    refused = 0
    for number in range(80):
        model_yaml = mutate(draw.choice(MODEL_YAMLS), draw)
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(model_yaml), encoding="utf-8")
        try:
            load_model(str(path))
        except RtdetrActError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 700, number
    assert refused > 40


@pytest.mark.parametrize("text", ["", "a", "[]", "nc: 1", "&a [*a]", "a: &a {b: *a}", "\t", "\ufeffnc: 2", "- " * 3000])
def test_a_file_that_is_no_model_is_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RtdetrActError):
        load_model(str(tmp_path / "x.yaml"))


def test_aliases_that_explode_are_refused_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    base = yaml.safe_dump(tiny.yolo())
    for key, value in (("nc", "*a29"), ("activation", "*a29"), ("scales", "*a29"), ("kpt_shape", "*a29")):
        text = "\n".join([*levels, *(line for line in base.splitlines() if not line.startswith("nc:"))])
        text += f"\n{key}: {value}\n" + ("nc: 2\n" if key != "nc" else "")
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(RtdetrActError):
            load_model(str(tmp_path / "x.yaml"))
    text = "\n".join([*levels, ""]) + base.replace("- 8\n", "- *a29\n", 1)
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RtdetrActError, match="nested or repeated"):
        load_model(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    "top", [{"depth_multiple": 1e6}, {"depth_multiple": float("inf")}, {"scales": {"n": [1e6, 1, 8]}}]
)
def test_repeats_times_a_depth_without_end_are_refused(top: dict[str, Any]) -> None:
    model_yaml = row("Conv", 8, 3, 1)
    model_yaml["backbone"][1][1] = 2  # pytest-timeout ends what builds two million layers
    with pytest.raises(SpecError, match="repeat their modules"):
        tasks.DetectionModel({**model_yaml, **top}, verbose=False)


@pytest.mark.parametrize(
    ("stride", "words"),
    [(b"bytes", "neither text"), ([1, 2, 3], r"layer 1, Conv.*RuntimeError"), ({1, 2}, "neither text")],
)
def test_a_wrong_stride_of_a_dynamic_convolution_is_named(stride: Any, words: str) -> None:
    with pytest.raises(SpecError, match=rf"row 1 of 'backbone'.*{words}"):
        tasks.DetectionModel({**row("Conv", 8, 3, stride), "activation": "dynamic_conv"}, verbose=False)


@pytest.mark.parametrize(("module", "args"), [("nn.ReLU", []), ("nn.Conv2d", [8, 8, 3, 1, 1])])
def test_a_row_that_is_what_a_plan_replaces_stays_a_layer(module: str, args: list[Any]) -> None:
    plan = "arelu, dynamic_conv"
    model = tasks.DetectionModel({**row(module, *args), "activation": plan}, verbose=False)
    stock = tasks.DetectionModel(row(module, *args), verbose=False)
    assert type(model.model[1]).__module__.startswith("rtdetr_act.")
    patched = copy.deepcopy(stock)
    patch_model(patched, "arelu")
    patch_convs(patched)
    for network in (model, patched):
        assert [(layer.i, layer.f) for layer in network.model] == [(layer.i, layer.f) for layer in stock.model]
        assert len(network.eval()(torch.zeros(1, 3, 64, 64))) == 2
    unpatch_model(patched)
    assert [vars(layer).get("type") for layer in patched.model] == [layer.type for layer in stock.model]


def test_an_rtdetr_whose_layers_do_not_fit_is_found_before_it_trains(tmp_path: Path) -> None:
    model_yaml = copy.deepcopy(tiny.RTDETR)
    model_yaml["head"][4][0] = [-1, 1]  # maps of two sizes, put together
    path = tiny.write_yaml(tmp_path / "x.yaml", model_yaml)
    with pytest.raises(SpecError, match=r"layer 12, Concat.*RuntimeError"):
        load_model(str(path))


@pytest.mark.skipif(not hasattr(tasks, "TorchVision"), reason="this Ultralytics has no layer that fetches weights")
def test_looking_at_a_model_fetches_no_weights(tmp_path: Path) -> None:
    model_yaml = row("TorchVision", 24, "mobilenet_v3_small", "DEFAULT", True, 11, False)
    model_yaml["backbone"][0] = [-1, 1, "nn.Identity", []]
    path = tiny.write_yaml(tmp_path / "x.yaml", model_yaml)
    result = CliRunner().invoke(app, ["sites", str(path)], catch_exceptions=False)
    assert result.exit_code == 0 and "activation sites" in result.output
