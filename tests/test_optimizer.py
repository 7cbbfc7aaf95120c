"""Where the parameters of activations go in the optimizer, and that warm-up, schedule and resuming go on as before."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Data, Resumed
from torch import nn
from ultralytics.engine import trainer as engine_trainer
from ultralytics.models.rtdetr.train import RTDETRTrainer

from rtdetr_act import DynamicConv2d, patch_model
from rtdetr_act.activations.acon import AconC
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.dyrelu import DyReLUB
from rtdetr_act.activations.frelu import FReLU
from rtdetr_act.activations.prelu import PReLU
from rtdetr_act.integrations.ultralytics.optimizer import separate_activation_parameters
from rtdetr_act.surgery.parameters import find_scalar_and_channel_parameters

OPTIMIZERS = [
    "AdamW",
    "SGD",
    "RMSProp",  # as 8.3 spells it; 8.4 takes any case
    pytest.param(
        "MuSGD",
        marks=pytest.mark.skipif(not hasattr(engine_trainer, "MuSGD"), reason="MuSGD came with Ultralytics 8.4"),
    ),
    "auto",
]
ROWS = {1: "prelu", 3: "aconc", 5: "dyrelu_b", 7: "frelu"}
SLOPES = (AReLU, PReLU, AconC)  # these hold nothing but scalars and values per channel
DECAY = 0.25


@pytest.fixture(scope="module")
def trainer(data: Data, stock_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> RTDETRTrainer:
    """Make a real trainer, up to its optimizer."""
    arguments = tiny.train_args(data.detect, tmp_path_factory.mktemp("optimizer"))
    return RTDETRTrainer(overrides={**arguments, "model": str(stock_yaml), "task": "detect"})


def build(trainer: RTDETRTrainer, name: str, iterations: int = 100, **plan: object) -> tuple:
    """Return a mixed model, Ultralytics' own optimizer for it, and the one that a run gets."""
    rules = [{"activation": "arelu"}] + [{"activation": a, "layers": r, "scope": "all"} for r, a in ROWS.items()]
    model = trainer.get_model(cfg={**copy.deepcopy(tiny.RTDETR), "activation": {"rules": rules, **plan}}, verbose=False)
    settings = {"name": name, "lr": 0.01, "momentum": 0.9, "decay": DECAY, "iterations": iterations}
    stock = inspect.unwrap(RTDETRTrainer.build_optimizer)(trainer, model, **settings)
    return model, stock, trainer.build_optimizer(model, **settings)


def group_of(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Map the identity of each parameter to the index of its group; every one stands once."""
    places = [(id(p), index) for index, group in enumerate(optimizer.param_groups) for p in group["params"]]
    assert len(dict(places)) == len(places)
    return dict(places)


def held(model: nn.Module, classes: tuple[type, ...]) -> dict[str, nn.Parameter]:
    """Return the parameters inside modules of these classes by name."""
    names = [f"{name}." for name, module in model.named_modules() if isinstance(module, classes)]
    return {name: p for name, p in model.named_parameters() if name.startswith(tuple(names))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slopes_are_not_decayed_nor_given_to_muon(trainer: RTDETRTrainer, name: str) -> None:
    model, stock, optimizer = build(trainer, name)
    chosen = held(model, SLOPES)
    assert len(chosen) == 2 * (tiny.CONV_SITES - 16) + 4 + 3 * 4  # AReLU, then a row of PReLU and one of ACON-C
    before, after = group_of(stock), group_of(optimizer)
    decayed = [n for n, p in chosen.items() if stock.param_groups[before[id(p)]]["weight_decay"] > 0]
    assert len(decayed) == len(chosen)  # Ultralytics alone would pull every one of them to zero
    for parameter in chosen.values():
        group = optimizer.param_groups[after[id(parameter)]]
        assert group["weight_decay"] == 0 and not group.get("use_muon")
        assert any(isinstance(m, nn.BatchNorm2d) and m.weight in set(group["params"]) for m in model.modules())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_else_stays_where_ultralytics_puts_it(trainer: RTDETRTrainer, name: str) -> None:
    model, stock, optimizer = build(trainer, name)
    before, after = group_of(stock), group_of(optimizer)
    assert set(after) == set(before) == {id(p) for p in model.parameters()}
    assert len(optimizer.param_groups) == len(stock.param_groups)
    settings = [
        [{key: value for key, value in group.items() if key != "params"} for group in o.param_groups]
        for o in (stock, optimizer)
    ]
    assert settings[0] == settings[1]
    moved = {name for name, p in model.named_parameters() if before[id(p)] != after[id(p)]}
    assert moved == set(held(model, SLOPES))
    matrices = [p for p in held(model, (DyReLUB, FReLU)).values() if p.ndim > 1]
    assert len(matrices) == 4 * 2 + 4
    assert {id(p) for p in matrices}.isdisjoint(id(p) for p in find_scalar_and_channel_parameters(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_act_lr_gives_one_more_group(trainer: RTDETRTrainer, name: str) -> None:
    model, stock, optimizer = build(trainer, name, act_lr=0.1)
    assert set(group_of(optimizer)) == {id(p) for p in model.parameters()}
    assert len(optimizer.param_groups) == len(stock.param_groups) + 1
    *_, group = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in held(model, SLOPES).values()}
    # The rate that Ultralytics chose, "auto" included, for the undecayed weights.
    norms = [g for g in optimizer.param_groups[:-1] if g["weight_decay"] == 0]
    assert group["lr"] == pytest.approx(0.1 * min(g["lr"] for g in norms))
    assert group["weight_decay"] == 0 and not group.get("use_muon")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_moves_slopes_by_their_gradient_alone(trainer: RTDETRTrainer, name: str) -> None:
    model, stock, optimizer = build(trainer, name)
    chosen = held(model, SLOPES)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    start = {name: p.detach().clone() for name, p in chosen.items()}
    optimizer.step()
    assert [n for n, p in chosen.items() if not torch.equal(p, start[n])] == []
    stock.step()  # what a run without the package does
    assert [n for n, p in chosen.items() if p.abs().sum() > 0 and torch.equal(p, start[n])] == []


def test_auto_takes_another_optimizer_for_long_runs(trainer: RTDETRTrainer) -> None:
    model, stock, optimizer = build(trainer, "auto", iterations=20_000)
    assert type(optimizer) is type(stock) and type(optimizer).__name__ in ("SGD", "MuSGD")
    after = group_of(optimizer)
    groups = [optimizer.param_groups[after[id(p)]] for p in held(model, SLOPES).values()]
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert not any(group.get("use_muon") for group in groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("act_lr", [1.0, 0.1])
def test_neither_labels_nor_places_of_groups_matter(trainer: RTDETRTrainer, name: str, act_lr: float) -> None:
    # 8.4.0 has no labels, and its last group is Muon's: slopes went there, and the first step failed.
    model, stock, optimizer = build(trainer, name, act_lr=act_lr)
    wanted = {frozenset(map(id, group["params"])) for group in optimizer.param_groups}
    for turn in range(1, len(stock.param_groups)):
        other = copy.copy(stock)
        groups = [{key: v for key, v in group.items() if key != "param_group"} for group in stock.param_groups]
        other.param_groups = [{**group, "params": [*group["params"]]} for group in groups[turn:] + groups[:turn]]
        separate_activation_parameters(other, model, act_lr)
        assert {frozenset(map(id, group["params"])) for group in other.param_groups} == wanted


def test_slopes_have_a_group_of_their_own_where_none_is_right() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    patch_model(net, "arelu")
    convs = [p for m in net.modules() if isinstance(m, nn.Conv2d) for p in m.parameters()]
    slope = [p for m in net.modules() if isinstance(m, AReLU) for p in m.parameters()]
    optimizer = torch.optim.SGD([{"params": [*convs, *slope], "weight_decay": DECAY}], lr=0.1)
    assert separate_activation_parameters(optimizer, net) == len(slope) == 4
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]
    assert optimizer.param_groups[1]["weight_decay"] == 0 and optimizer.param_groups[1]["lr"] == 0.1


@pytest.mark.skipif(not hasattr(engine_trainer, "MuSGD"), reason="MuSGD came with Ultralytics 8.4")
def test_dynamic_convolutions_take_a_step_with_musgd(trainer: RTDETRTrainer) -> None:
    plan = {"rules": [{"activation": "arelu"}, {"activation": "dynamic_conv(kernels=2)"}]}
    model = trainer.get_model(cfg={**copy.deepcopy(tiny.RTDETR), "activation": plan}, verbose=False)
    optimizer = trainer.build_optimizer(model, name="MuSGD", lr=0.01, momentum=0.9, decay=DECAY, iterations=100)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == {id(p) for p in model.parameters()}
    stacks = [module for module in model.modules() if isinstance(module, DynamicConv2d)]
    assert stacks and not any(groups[id(m.weight)].get("use_muon") for m in stacks)
    assert {groups[id(m.weight)]["weight_decay"] for m in stacks} == {DECAY}
    assert {groups[id(m.bias)]["weight_decay"] for m in stacks if m.bias is not None} <= {0.0}
    before = [m.weight.detach().clone() for m in stacks]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert not any(torch.equal(m.weight, old) for m, old in zip(stacks, before, strict=True))


def test_a_stock_model_keeps_its_optimizer(trainer: RTDETRTrainer) -> None:
    model = trainer.get_model(cfg=copy.deepcopy(tiny.RTDETR), verbose=False)
    optimizer = trainer.build_optimizer(model, name="AdamW", decay=DECAY)
    before = group_of(optimizer)
    assert separate_activation_parameters(optimizer, model, act_lr=0.1) == 0
    assert group_of(optimizer) == before


@pytest.mark.integration
def test_memory_low_is_said_to_be_void_in_a_compiled_model(trainer: RTDETRTrainer) -> None:
    model = trainer.get_model(cfg={**copy.deepcopy(tiny.RTDETR), "activation": "arelu memory=low"}, verbose=False)
    said = []
    for trained in (model, torch.compile(model), torch.nn.DataParallel(torch.compile(model))):
        with tiny.logged() as lines:
            trainer.build_optimizer(trained, name="AdamW", decay=DECAY)
        said.append(any("memory=low has no effect on a compiled model" in line for line in lines))
    assert said == [False, True, True]


def test_warmup_and_schedule_scale_the_group_of_the_activations(resumed: Resumed) -> None:
    groups, rates = resumed.killed["groups"], resumed.killed["lr"]
    assert len(groups) == 4 and groups[-1][0] == 2 * tiny.CONV_SITES
    # The group of the normalisation weights: undecayed, and not the one of the biases with its own warm-up.
    names = [group.get("param_group") for group in resumed.groups]
    home = names.index("bn") if "bn" in names else 2
    assert groups[-1][1:] == [0.0, pytest.approx(10 * groups[home][2])]
    assert [rate[-1] for rate in rates] == pytest.approx([10 * rate[home] for rate in rates])
    assert rates[0][-1] == 0 < rates[1][-1]  # the warm-up starts from nothing
    assert resumed.groups[-1]["lr"] == pytest.approx(10 * resumed.groups[home]["lr"])


def test_resume_loads_the_state_of_the_activations(resumed: Resumed) -> None:
    saved = resumed.checkpoint["optimizer"]
    assert len(saved["param_groups"]) == len(resumed.groups)
    indices = saved["param_groups"][-1]["params"]
    assert len(indices) == 2 * tiny.CONV_SITES
    for index in indices:
        then, now = saved["state"][index], resumed.state[index]
        assert float(now["step"]) == float(then["step"]) > 0
        assert torch.allclose(now["exp_avg"].float(), then["exp_avg"].float())
    assert any(resumed.state[index]["exp_avg"].abs().max() > 0 for index in indices)
