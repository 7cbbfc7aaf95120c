"""What the doctor says of real checkpoints, healthy and spoilt, and whether it is so."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data, Run
from torch import nn
from typer.testing import CliRunner
from ultralytics import RTDETR, YOLO
from ultralytics.nn.modules.conv import Conv

from rtdetr_act import create, find_sites, patch_convs, patch_model, register
from rtdetr_act.analysis.inventory import label_activations, read_learnable
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, ModelError
from rtdetr_act.integrations.ultralytics.checkpoints import describe_foreign_file
from rtdetr_act.integrations.ultralytics.optimizer import find_decayed_parameters
from rtdetr_act.integrations.ultralytics.run_folders import name_checkpoints
from rtdetr_act.workflows.doctor import examine
from rtdetr_act.workflows.fold import fold_checkpoint

ALL_SITES = tiny.CONV_SITES + tiny.TOKEN_SITES
DEFAULT_SITES = ["model.10.act", "model.13.cv1.act", "model.13.cv2.act"]  # the fourth SiLU is RepConv's own
TRAINED: dict[str, Any] = {"train_args": {"task": "detect", "imgsz": 64, "data": "gone.yaml"}}


def save(model: Any, path: Path, **more: Any) -> Path:
    """Write the checkpoint of a finished training of this network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.model, "ema": None, "epoch": -1, **TRAINED, **more}, path)
    return path


def swap_by_hand(model: Any) -> int:
    """Put a PReLU wherever a convolution has an activation, as scripts without this package do."""
    owners = [m for m in model.model.modules() if isinstance(getattr(m, "act", None), (nn.ReLU, nn.SiLU))]
    for owner in owners:
        owner.act = nn.PReLU()
    return len(owners)


@pytest.fixture(scope="module")
def default_run(shared_data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a network that was built with one PReLU as the default of Conv, as editing conv.py does."""
    before, Conv.default_act = Conv.default_act, nn.PReLU()
    try:
        return tiny.train(RTDETR(str(stock_yaml)), shared_data.detect, tmp_path_factory.mktemp("default"))
    finally:
        Conv.default_act = before


def test_a_stock_checkpoint_is_healthy(stock_run: Run) -> None:
    found = examine(stock_run.pt)
    assert found.healthy and found.swapped == 0 and not found.plan and not found.differences
    assert {each.activation: (each.convolutional, each.transformer) for each in found.holdings} == {
        "ReLU": (tiny.CONV_SITES - tiny.SILU_SITES, tiny.TOKEN_SITES - 1),
        "SiLU": (tiny.SILU_SITES, 0),
        "GELU": (0, 1),
    }
    assert found.trains_without and found.needs == {} and found.learnable.parameters == 0
    assert found.verdict == f"stock: {ALL_SITES} sites as Ultralytics builds them, and no swap in model.yaml"
    assert found.training == "1 epoch on detect.yaml"


def test_a_patched_training_is_learned_and_survives(patched_run: Run) -> None:
    found = examine(patched_run.pt)
    slopes = tiny.activations(tiny.load(patched_run.pt))
    moved = [
        name
        for name, module in slopes.items()
        if type(module).__name__ == "AReLU"
        and (abs(module.alpha.item() - 0.9) > 1e-3 or abs(module.beta.item() - 2.0) > 3e-3)
    ]
    assert sorted(found.learnable.moved) == sorted(moved) and len(moved) == tiny.CONV_SITES
    assert found.healthy and found.swapped == tiny.CONV_SITES and found.plan == "arelu"
    assert found.learnable.parameters == 2 * tiny.CONV_SITES and found.decayed == 0 and not found.learnable.shared
    assert found.needs == {"rtdetr_act": ("AReLU",)} and not found.trains_without
    assert found.folding.folds == {"arelu -> leaky_relu": tiny.CONV_SITES} and not found.folding.failure
    n = tiny.CONV_SITES
    assert found.verdict == f"arelu stands at {n} of {n} convolutional sites, learned, and survives training"
    assert json.loads(json.dumps(found.to_dict()))["healthy"] is True
    assert str(found).splitlines()[-1] == f"verdict: {found.verdict}"


@pytest.mark.integration
def test_rows_of_a_model_yaml_and_the_checkpoint_trained_from_them_agree(rows_run: Run, rows_yaml: Path) -> None:
    trained, untrained = examine(rows_run.pt), examine(rows_yaml)
    assert trained.healthy and untrained.healthy and trained.holdings == untrained.holdings
    assert trained.swapped == ALL_SITES - 1 and untrained.training == "" and untrained.needs == {}
    assert untrained.verdict.endswith("not trained yet, and is what a training builds")


@pytest.mark.integration
def test_an_edited_default_is_lost_and_shared(
    default_run: Path, shared_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examine(default_run)
    assert [each.site for each in found.differences] == DEFAULT_SITES and not found.trains_without
    assert {(each.held, each.built) for each in found.differences} == {("PReLU", "SiLU")}
    first, second = found.problems
    assert first == found.verdict and first.startswith(f"default_act reached 3 of {ALL_SITES} sites (PReLU for SiLU)")
    assert second.startswith("one PReLU is shared by 3 sites")
    assert found.learnable.parameters == found.decayed == 1 and found.learnable.shared == (tuple(DEFAULT_SITES),)
    result = CliRunner().invoke(app, ["doctor", str(default_run)])
    assert result.exit_code == 1 and found.verdict in result.output
    # What it says of the next training, and of weight decay, is what happens.
    seen: dict[str, Any] = {}

    def note(trainer: Any) -> None:
        decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        seen["shared"] = decayed == find_decayed_parameters(trainer.model)

    model = RTDETR(str(default_run))
    model.add_callback("on_train_start", note)
    after = tiny.load(tiny.train(model, shared_data.detect, tmp_path))
    assert seen == {"shared": True}
    assert {type(after.get_submodule(name)) for name in DEFAULT_SITES} == {nn.SiLU}
    # Where conv.py itself is edited, a training here would keep it, and one elsewhere would not.
    monkeypatch.setattr(Conv, "default_act", nn.PReLU())
    edited = examine(default_run)
    assert edited.differences == found.differences and "another installation than this one" in edited.verdict
    assert any("Conv.default_act is PReLU" in note for note in edited.notes)


@pytest.mark.integration
@pytest.mark.parametrize("plan", ["arelu", "dyrelu_b, prelu(per_channel=True)@neck"])
def test_decayed_parameters_are_those_that_the_optimizer_decays(
    plan: str, data: Data, stock_yaml: Path, tmp_path: Path
) -> None:
    seen: list[tuple[set[int], set[int]]] = []

    def note(trainer: Any) -> None:
        groups = trainer.optimizer.param_groups
        seen.append(
            (find_decayed_parameters(trainer.model), {id(p) for g in groups if g["weight_decay"] for p in g["params"]})
        )

    model = RTDETR(str(stock_yaml))
    patch_model(model, plan)
    model.add_callback("on_train_start", note)
    tiny.train(model, data.detect, tmp_path)
    [(found, expected)] = seen
    assert found == expected and found


@pytest.mark.integration
def test_a_swap_made_by_hand_is_lost_by_training(data: Data, stock_yaml: Path, tmp_path: Path) -> None:
    source = RTDETR(str(stock_yaml))
    count = swap_by_hand(source)
    save(source, tmp_path / "swapped.pt", train_args={})  # as Model.save does, which 8.3.0 does not from a YAML
    before = examine(tmp_path / "swapped.pt")
    assert len(before.differences) == count and "is not in model.yaml" in before.verdict and before.training == ""
    last = tiny.train(RTDETR(str(tmp_path / "swapped.pt")), data.detect, tmp_path)
    assert tiny.count(tiny.load(last), nn.PReLU) == 0
    found = examine(tmp_path / "run")
    assert not found.differences and not found.healthy
    assert found.verdict.startswith("the swap was lost: the network is stock although it was trained from")
    assert "PReLU for ReLU" in found.verdict
    (tmp_path / "swapped.pt").unlink()  # now only the reader knows
    assert examine(tmp_path / "run").healthy


def test_the_name_of_a_run_and_the_record_beside_it_tell_of_a_lost_swap(stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    for name, activation in (("tiny-prelu", "prelu"), ("tiny_swish", ""), ("tiny-relu", ""), ("identity", "")):
        found = examine(save(model, tmp_path / name / "weights" / "best.pt"))
        assert found.healthy == (not activation)
        if activation:
            assert "the network is stock although its run is called 'tiny-prelu'" in found.verdict
    record = tmp_path / "identity" / "activations.csv"
    record.write_text("epoch,site,layer,activation,quantity,value\n0,model.10.act,10,arelu,alpha,0.9\n")
    assert "activations.csv beside it records arelu at 1 site" in examine(tmp_path / "identity").verdict
    record.write_text("damaged")
    assert examine(tmp_path / "identity").healthy


def test_a_folded_checkpoint_says_so(patched_run: Run, tmp_path: Path) -> None:
    _, path = fold_checkpoint(str(patched_run.pt), tmp_path / "folded.pt")
    found = examine(path)
    assert found.healthy and found.folding.done == tiny.CONV_SITES and not found.folding.folds
    assert found.needs == {} and not found.trains_without and not found.differences
    assert "leaky_relu(…) stands at" in found.verdict and "folded into the weights" in found.verdict


def test_activations_changed_after_the_swap_are_named(stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "leaky_relu(0.1)@backbone, arelu@neck")
    patch_convs(model, layers="13")
    assert examine(save(model, tmp_path / "whole.pt")).healthy
    model.model.model[10].act = nn.SiLU()
    model.model.model[0].stem1.act.negative_slope = 0.2
    model.model.model[13].cv1.conv = nn.Conv2d(32, 16, 1, bias=False)
    found = examine(save(model, tmp_path / "changed.pt"))
    pairs = {each.site: (each.held, each.built) for each in found.differences}
    assert pairs["model.10.act"] == ("SiLU", "arelu")
    assert pairs["model.13.cv1.conv"] == ("Conv2d", "dynamic_conv")
    assert "model.yaml and the network disagree" in found.verdict and "SiLU for arelu at 1 site" in str(found)


def test_what_cannot_be_built_again_is_a_problem(stock_yaml: Path, tmp_path: Path, own_zoo: None) -> None:
    from rtdetr_act.activations import registry

    register("only_here", nn.Softplus)
    model = RTDETR(str(stock_yaml))
    patch_model(model, "only_here")
    path = save(model, tmp_path / "own.pt")
    assert examine(path).healthy
    for table in (registry._entries, registry._names_by_key):
        for key in [key for key in table if "only" in key]:
            del table[key]
    found = examine(path)
    assert not found.healthy and "'only_here'" in found.failure and "no training can go on" in found.verdict
    assert "it cannot be built" in str(found)


def test_hidden_calls_are_counted() -> None:
    found = examine("rtdetr-resnet50.yaml")
    counts = {each.activation: (each.convolutional, each.transformer, each.hidden) for each in found.holdings}
    assert counts["ReLU"] == (16, 14, 16) and found.healthy


def test_a_stock_activation_of_a_model_yaml_is_stock(tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / "relu.yaml", {**tiny.yolo(), "activation": "nn.ReLU()"})
    found = examine(path)
    assert found.healthy and found.default_act == "nn.ReLU()" and "'activation: nn.ReLU()'" in found.verdict
    path = tiny.write_yaml(tmp_path / "prelu.yaml", {**tiny.yolo(), "activation": "nn.PReLU()"})
    assert "one PReLU is shared by" in examine(path).verdict


def test_layers_that_fusing_removes_are_no_difference(tmp_path: Path) -> None:
    if not (Path(sys.modules["ultralytics"].__file__).parent / "cfg" / "models" / "26").is_dir():  # type: ignore[arg-type]
        pytest.skip("no yolo26 in this release")
    model = YOLO("yolo26n.yaml")
    patch_model(model, "mish")
    model.model.fuse()
    found = examine(save(model, tmp_path / "fused.pt"))
    assert found.healthy and not found.differences


def test_start_values_that_were_random_are_unknown_unless_the_record_shows_them() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    patch_model(net, "prelu", include="1")
    patch_model(net, "frelu", include="3")
    patch_model(net, "prelu(init=0.1)", include="5")
    sites = find_sites(net)
    found = read_learnable(sites)
    assert (found.moved, found.unmoved, found.unknown) == ((), ("1", "5"), ("3",)) and found.sites == 3
    assert read_learnable(sites, recorded={"3"}).moved == ("3",)
    with torch.no_grad():
        net[1].weight += 1e-6  # less than half precision holds
        net[5].weight += 1e-3
    assert read_learnable(sites).moved == ("5",)
    # Fitted values are those of the network that is built in the same way.
    starts = {"5": create("prelu", init=math.nextafter(net[5].weight.item(), 1))}
    assert read_learnable(sites, starts).unmoved == ("1", "5")


def test_a_training_that_moved_nothing_is_a_problem(patched_run: Run, stock_yaml: Path, tmp_path: Path) -> None:
    model = RTDETR(str(stock_yaml))
    patch_model(model, "arelu")
    path = save(model, tmp_path / "run" / "weights" / "best.pt")
    assert "still at its initial values" in examine(path).verdict
    shutil.copy(patched_run.pt.parent.parent / "activations.csv", tmp_path / "run")
    # The record of another training: only its number of epochs counts, since these values are known.
    assert "none of the 50 activation parameters has moved" in examine(path).verdict


def test_labels_join_specs_that_differ_in_many_arguments() -> None:
    net = nn.Sequential(*[module for _ in range(5) for module in (nn.Conv2d(3, 3, 1), nn.ReLU())])
    patch_model(net, "prelu", include="1")
    for index, slope in ((3, 0.1), (5, 0.2), (7, 0.3), (9, 0.4)):
        patch_model(net, f"leaky_relu({slope})", include=str(index))
    assert label_activations(find_sites(net)) == ["prelu", *["leaky_relu(…)"] * 4]


@pytest.mark.integration
def test_what_it_says_of_ultralytics_alone_is_so(mish_run: Run, shared_data: Data, tmp_path: Path) -> None:
    found = examine(mish_run.pt)
    assert found.needs == {} and not found.trains_without
    assert "loads, validates and predicts; does not train" in str(found)
    arguments = tiny.train_args(shared_data.detect, tmp_path)
    code = (
        "import json, sys\nfrom ultralytics import YOLO\n"
        f"arguments = json.loads({json.dumps(arguments)!r})\n"
        f"data, image = {str(shared_data.detect)!r}, {str(shared_data.image)!r}\n"
        f"model = YOLO({str(mish_run.pt)!r})\n"
        "model.val(data=data, imgsz=64, plots=False, workers=0)\n"
        "model.predict(image, imgsz=64)\n"
        f"try: YOLO({str(mish_run.pt)!r}).train(**arguments)\n"
        "except Exception as error: print('stopped', type(error).__name__, error)\n"
        "print('plugin', any(name.startswith('rtdetr_act') for name in sys.modules))\n"
    )
    result = tiny.run_python(code, tmp_path)
    assert "stopped NameError name 'rtdetr_act' is not defined" in result.stdout and "plugin False" in result.stdout, (
        result.stderr
    )


class OfAnother(nn.Module):
    """A network that another library has."""


def write_foreign(path: Path, kind: str) -> None:
    """Write a .pt that is not of Ultralytics."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    if kind == "text":
        path.write_text("hello", encoding="utf-8")
    elif kind == "torchscript":
        torch.jit.trace(plain, torch.zeros(1, 3, 8, 8)).save(str(path))
    elif kind == "yolov5":
        module = types.ModuleType("models.yolo")
        module.Model = type("Model", (nn.Module,), {"__module__": "models.yolo"})  # type: ignore[attr-defined]
        sys.modules.update({"models": types.ModuleType("models"), "models.yolo": module})
        try:
            torch.save({"model": module.Model(), "epoch": -1}, path)
        finally:
            del sys.modules["models"], sys.modules["models.yolo"]
    else:
        objects = {
            "state dict": plain.state_dict(),
            "state dict inside": {"model": plain.state_dict(), "epoch": 3},
            "torch": plain,
            "inside": {"model": plain, "epoch": 3, **TRAINED},
            "another": OfAnother(),
        }
        torch.save(objects[kind], path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "is not an Ultralytics checkpoint: it holds no network, or is damaged"),
        ("torchscript", "is a TorchScript file: give the .pt that it was exported from"),
        ("yolov5", "it holds 'models.yolo.Model' of YOLOv5 or YOLOv7"),
        ("state dict", "it holds tensors only, such as a state dict"),
        ("state dict inside", "it holds tensors only, such as a state dict"),
        ("torch", "it holds 'torch.nn.modules.container.Sequential', which is not a network of Ultralytics"),
        ("inside", "it holds 'torch.nn.modules.container.Sequential', which is not a network of Ultralytics"),
        ("another", "it holds 'test_doctor.OfAnother', which is not a network of Ultralytics"),
    ],
)
def test_a_foreign_file_is_one_sentence(kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_foreign(Path("foreign.pt"), kind)
    with pytest.raises(ModelError) as caught:
        CliRunner().invoke(app, ["doctor", "foreign.pt"], catch_exceptions=False, standalone_mode=False)
    assert words in str(caught.value) and caught.value.exit_code == 2 and str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.pt"]


def test_torchvisions_networks_are_named(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.save({"model": models.squeezenet1_1(), "epoch": 1}, tmp_path / "net.pt")
    assert describe_foreign_file(tmp_path / "net.pt") == (
        "it holds 'torchvision.models.squeezenet.SqueezeNet', which is not a network of Ultralytics"
    )


def test_a_folder_is_that_of_one_run(patched_run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "weights").mkdir(parents=True)
        shutil.copy(patched_run.pt, tmp_path / name / "weights" / "best.pt")
    assert examine(tmp_path / "a").source == str(tmp_path / "a" / "weights" / "best.pt")
    with pytest.raises(InputError, match=r"there are 2 runs in .*best\.pt"):
        examine(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no run with a weights/best\.pt"):
        examine(tmp_path / "empty")
    with pytest.raises(InputError, match="no file"):
        examine("nothing.pt")


def test_nothing_is_downloaded_or_written(stock_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examine(stock_yaml)
    with pytest.raises(InputError, match="downloads nothing"):
        examine("rtdetr-l.pt")
    assert not list(tmp_path.iterdir())


def test_names_tell_checkpoints_apart() -> None:
    paths = ["runs/a/weights/best.pt", "runs/a/weights/last.pt", "runs/b/weights/best.pt", "b.pt"]
    assert name_checkpoints(list(map(Path, paths))) == ["a/best", "a/last", "b/best", "b"]
    paths = ["x/a/weights/best.pt", "y/a/weights/best.pt", "y/b/weights/best.pt"]
    assert name_checkpoints(list(map(Path, paths))) == ["x/a", "y/a", "b"]


def test_weights_of_another_training_loop_name_their_network(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18()
    stock = model.state_dict()
    patch_model(model, "mish")
    for name in ("checkpoint.pth", "checkpoint.pt"):
        torch.save({"model": model.state_dict(), "ema": stock, "epoch": 3}, tmp_path / name)
        with pytest.raises(
            ModelError, match=r"without their network, 'model' of one with 'mish' and 'ema' of a stock one"
        ):
            examine(tmp_path / name)
    torch.save({"weights": [1, 2]}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="cannot be trained or swapped"):
        examine(tmp_path / "other.pth")
