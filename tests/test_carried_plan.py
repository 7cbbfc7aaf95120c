"""The plan of a patched model: carried by any model and its state dicts, saved, loaded, applied again, compared."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from rtdetr_act import (
    InputError,
    ModelError,
    Plan,
    RtdetrActWarning,
    SpecError,
    find_sites,
    patch_convs,
    patch_model,
    plan_of,
    set_epoch,
    unpatch_model,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers)


def make_resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net: nn.Module = torchvision.resnet18(num_classes=4)
    return net


def make_task_model() -> nn.Module:
    from ultralytics.nn.tasks import RTDETRDetectionModel

    torch.manual_seed(0)
    return RTDETRDetectionModel(copy.deepcopy(tiny.RTDETR), verbose=False)


def save_and_load(data: Any) -> Any:
    """Write and read with torch, as checkpoints of strangers should be read."""
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_of(model: nn.Module) -> Any:
    return save_and_load(model.state_dict())


def describe(model: nn.Module) -> list[tuple[str, str]]:
    return [(site.name, site.current) for site in find_sites(model, IMAGES)]


def patch_once(model: nn.Module) -> None:
    patch_model(model, "arelu", example_input=IMAGES)


def patch_matching(model: nn.Module) -> None:
    patch_model(model, "leaky_relu", init="match", example_input=IMAGES)


def patch_by_what_is_there(model: nn.Module) -> None:
    patch_model(model, "mish", replaces="relu", example_input=IMAGES)


def patch_by_name(model: nn.Module) -> None:
    names = [site.name for site in find_sites(model, IMAGES)]
    patch_model(model, "prelu(init=0.1)", include=names[:3], exclude=names[1], act_lr=0.1, example_input=IMAGES)


def patch_in_turns(model: nn.Module) -> None:
    name = find_sites(model, IMAGES)[0].name
    patch_model(model, "mish", example_input=IMAGES)
    patch_model(model, "arelu", include=name, init="match", example_input=IMAGES)
    patch_model(model, "hardswish", replaces="mish", example_input=IMAGES)
    patch_model(model, "aconc", include=name, example_input=IMAGES)


def patch_everything(model: nn.Module) -> None:
    patch_model(model, "dyrelu_c(tau_start=30.0, tau_epochs=2)", example_input=IMAGES)
    patch_convs(model, kernels=2)


WAYS = [patch_once, patch_matching, patch_by_what_is_there, patch_by_name, patch_in_turns, patch_everything]


@pytest.mark.parametrize("make", [make_net, make_resnet, make_task_model])
@pytest.mark.parametrize("patch", WAYS)
def test_a_network_is_rebuilt_from_its_plan_and_its_weights(
    patch: Callable[[nn.Module], None], make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make().eval()
    patch(model)
    model.eval()
    plan = plan_of(model)
    plan.save(tmp_path / "plan.yaml")
    checkpoint = save_and_load({"model": model.state_dict(), "plan": plan.to_yaml()})
    again = make().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RtdetrActWarning)
        patch_model(again, Plan.from_yaml(checkpoint["plan"]), example_input=IMAGES)
        again.load_state_dict(checkpoint["model"])
    assert describe(again) == describe(model) and plan_of(again) == plan == Plan.load(tmp_path / "plan.yaml")
    if make is not make_task_model:
        assert plan_of(checkpoint["model"]) == plan
        assert torch.equal(again(IMAGES), model(IMAGES))


@pytest.mark.parametrize("make", [make_net, make_resnet])
def test_plan_is_invisible_and_goes_with_the_swap(make: Callable[[], nn.Module]) -> None:
    stock = make()
    before = (list(stock.state_dict()), set(vars(stock)))
    assert plan_of(stock) == Plan() == plan_of(stock.state_dict())
    patch_model(stock, "mish", example_input=IMAGES)
    assert list(stock.state_dict()) == before[0], "keys of a state dict are those of the modules"
    assert str(plan_of(stock)) == "mish" == str(plan_of(stock.state_dict()))
    unpatch_model(stock)
    assert (list(stock.state_dict()), set(vars(stock))) == before and plan_of(stock.state_dict()) == Plan()
    assert not stock._state_dict_hooks and not stock._load_state_dict_pre_hooks


def test_a_failed_swap_leaves_nothing() -> None:
    model = make_net()
    with pytest.raises(SpecError):
        patch_model(model, "no_activation")
    assert plan_of(model) == Plan() and not model._state_dict_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_carry_the_plan_and_compare_by_themselves(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = make_net()
    patch_model(model, "arelu")
    twin = duplicate(model)
    unpatch_model(model)
    assert plan_of(twin) == plan_of(twin.state_dict()) == Plan.parse("arelu")
    with pytest.warns(RtdetrActWarning, match="a network without a swap, and are loaded into one with 'arelu'"):
        twin.load_state_dict(state_of(model), strict=False)
    unpatch_model(twin)
    assert plan_of(twin) == Plan() and not twin._state_dict_hooks and not twin._load_state_dict_pre_hooks


def test_weights_of_another_plan_are_told() -> None:
    model, other = make_net(), make_net()
    patch_model(model, "mish")
    patch_model(other, "hardswish")
    with pytest.warns(RtdetrActWarning) as caught:
        model.load_state_dict(state_of(other))
    (warning,) = caught
    assert str(warning.message).startswith(
        "these weights are of a network with 'hardswish', and are loaded into one with 'mish': "
    )
    assert warning.filename == __file__
    patch_model(model, plan_of(state_of(other)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state_of(other))


def test_same_networks_are_not_told() -> None:
    model, other = make_net(), make_net()
    patch_model(model, "arelu", include=["1", "3", "5"])
    patch_model(other, "arelu", init="match")
    unnamed = OrderedDict((key, value) for key, value in make_net().state_dict().items())
    wrapped = nn.ModuleDict({"module": other})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state_of(other))
        model.load_state_dict(unnamed, strict=False)  # says nothing of its network
        wrapped.load_state_dict(state_of(wrapped))
        model.load_state_dict(model.state_dict(), assign=True)


def test_a_network_inside_another_says_so_too() -> None:
    inner = make_net()
    patch_model(inner, "mish")
    outer, stock = nn.ModuleDict({"backbone": inner}), nn.ModuleDict({"backbone": make_net()})
    assert plan_of(state_of(outer)) == Plan.parse("mish")
    with pytest.raises(ModelError, match="only parts of the model were patched: ask for the plan of each, 'backbone'"):
        plan_of(outer)
    with pytest.warns(RtdetrActWarning, match="without a swap"):
        outer.load_state_dict(state_of(stock))
    assert unpatch_model(outer) == 3 and plan_of(outer) == Plan() == plan_of(outer.state_dict())


def test_a_finished_schedule_makes_no_other_network() -> None:
    model = make_net()
    patch_model(model, "dyrelu_c(tau_start=30.0, tau_epochs=2)")
    set_epoch(model, 5)
    assert str(plan_of(model)) == "dyrelu_c"
    again = make_net()
    patch_model(again, plan_of(state_of(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(state_of(model))


def test_wrapped_models_have_the_plan_of_what_they_wrap() -> None:
    model = make_net()
    patch_model(model, "mish")
    assert plan_of(nn.DataParallel(model)) == plan_of(model)
    assert plan_of(nn.DataParallel(model).state_dict()) == plan_of(model)


def test_task_models_have_no_hooks() -> None:
    model = make_task_model()
    patch_model(model, "mish@backbone")
    assert plan_of(model) == Plan.parse("mish@backbone")
    assert not model._state_dict_hooks and not model._load_state_dict_pre_hooks
    assert not [name for name in vars(model) if name.startswith("_rtdetr_act")]
    assert b"rtdetr_act.surgery" not in pickle.dumps(model)


def test_a_mapping_that_is_no_state_dict_is_refused() -> None:
    for mapping in ({"model": make_net().state_dict()}, dict(make_net().state_dict())):
        with pytest.raises(InputError, match="not a state dict with metadata"):
            plan_of(mapping)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(default_act="nn.ReLU()"),
        Plan.parse("arelu@backbone+12, silu@22-27", act_lr=0.1),
        Plan.parse("mish from=silu+relu init=match").followed_by(Plan.parse("arelu from=mish init=match")),
        Plan.parse("leaky_relu(negative_slope=0.1)", include="*.cv2.*", exclude=["model.28.*"], scope="all"),
    ],
    ids=str,
)
def test_a_file_holds_the_whole_plan(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(str(tmp_path / "plan.yaml")) == plan
    if plan:
        (tmp_path / "plan.json").write_text(json.dumps(plan.to_yaml()), encoding="utf-8")
        assert Plan.load(tmp_path / "plan.json") == plan
        assert save_and_load(plan.to_yaml()) == plan.to_yaml()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a plan, which has 'rules'"),
        ("epochs: 3", "is not a plan, which has 'rules'"),
        ("- arelu", "is not a mapping"),
        ("rules: [", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("rules: arelu", "is not a plan: 'rules' under 'activation' must be a list"),
        ("rules: [{activation: 'arelu', layer: 3}]", "is not a plan: 'layer' is not a key of 'rule'"),
        ("rules: [{activation: '__import__(\"os\").getcwd()'}]", "is not a plan"),
    ],
)
def test_a_wrong_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises((InputError, SpecError), match=message) as raised:
        Plan.load(path)
    assert "plan.y" in str(raised.value)  # the end of a long path is left out


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read '.*missing\.yaml'"):
        Plan.load(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot write"):
        Plan.parse("arelu").save(tmp_path / "nowhere" / "plan.yaml")
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        Plan.load(tmp_path / "weights.pt")
