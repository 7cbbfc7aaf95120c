"""Training loops outside Ultralytics: which parameters an optimizer holds, and the warning where it lacks some."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rtdetr_act import (
    InputError,
    ModelError,
    RtdetrActWarning,
    SpecError,
    add_to_optimizer,
    patch_convs,
    patch_model,
    unpatch_model,
)
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.surgery import untrained
from rtdetr_act.surgery.parameters import find_scalar_and_channel_parameters

DECAY = 5e-4
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Sequential):
    """A convolution, its normalization and its activation, as detectors have them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU()


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(3, 8), Block(8, 8), nn.Conv2d(8, 2, 1))


def like_yolox(model: nn.Module) -> Optimizer:
    """Biases, normalization weights and other weights of all modules; what has another name is in no group."""
    norms, weights, biases = _collect(model, lambda name, module: isinstance(module, nn.BatchNorm2d) or "bn" in name)
    optimizer = SGD(norms, lr=0.1, momentum=0.9, nesterov=True)
    optimizer.add_param_group({"params": weights, "weight_decay": DECAY})
    optimizer.add_param_group({"params": biases})
    return optimizer


def like_yolov6(model: nn.Module) -> Optimizer:
    """The same, by class only, in Adam."""
    norms, weights, biases = _collect(model, lambda name, module: isinstance(module, nn.BatchNorm2d))
    optimizer = Adam(norms, lr=0.01, betas=(0.937, 0.999))
    optimizer.add_param_group({"params": weights, "weight_decay": DECAY})
    optimizer.add_param_group({"params": biases})
    return optimizer


def like_yolov7(model: nn.Module) -> Optimizer:
    """The same with a scheduler that exists already."""
    optimizer = like_yolox(model)
    model.scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)  # type: ignore[assignment]
    return optimizer


def _collect(
    model: nn.Module, is_norm: Callable[[str, nn.Module], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    norms, weights, biases = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            biases.append(module.bias)  # type: ignore[arg-type]
        if is_norm(name, module):
            norms.append(module.weight)  # type: ignore[arg-type]
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            weights.append(module.weight)  # type: ignore[arg-type]
    return norms, weights, biases


LOOPS = [like_yolox, like_yolov6, like_yolov7]


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(IMAGES).square().mean().backward()
    optimizer.step()


def find_group(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    found = [group for group in optimizer.param_groups if any(each is parameter for each in group["params"])]
    assert len(found) < 2
    return found[0] if found else None


def slopes_of(model: nn.Module) -> list[nn.Parameter]:
    return list(find_scalar_and_channel_parameters(model))


@pytest.fixture(autouse=True)
def _forget_others() -> Iterator[None]:
    """Leave no model of another test for the hook to find, and no hook behind."""
    gc.collect()
    yield
    untrained.stop_watching()


@pytest.mark.parametrize("make_optimizer", LOOPS)
@pytest.mark.parametrize(
    ("activation", "problem"),
    [
        ("arelu", "4 parameters of activations (arelu at 0.act first) are in no optimizer and stay as they are"),
        ("aconc", "6 parameters of activations (aconc at 0.act first) are in no optimizer and stay as they are"),
        (
            "meta_aconc",
            "4 parameters of activations (meta_aconc at 0.act first) are in no optimizer and stay as they are",
        ),
        ("prelu", "2 parameters of activations (prelu at 0.act first) are under weight decay, which pulls them to 0"),
        ("dyrelu_b", ""),
    ],
)
def test_a_loop_that_collects_weights_is_told_and_mended(
    make_optimizer: Callable[[nn.Module], Optimizer], activation: str, problem: str
) -> None:
    model = make_net()
    patch_model(model, activation)
    optimizer = make_optimizer(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(model, optimizer)
        step(model, optimizer)
    messages = [str(each.message) for each in caught if each.category is RtdetrActWarning]
    line = "call rtdetr_act.add_to_optimizer(model, optimizer) before training"
    assert messages == ([f"{problem}: {line}"] if problem else [])
    assert all(each.filename == __file__ for each in caught if each.category is RtdetrActWarning)
    assert untrained._watch.handle is None, "no later step pays for the hook"

    added = add_to_optimizer(model, optimizer)
    assert (added > 0) == bool(problem) and add_to_optimizer(model, optimizer) == 0
    slopes = slopes_of(model)
    before = [slope.detach().clone() for slope in slopes]
    step(model, optimizer)
    for slope, old in zip(slopes, before, strict=True):
        group = find_group(optimizer, slope)
        assert group is not None and group["weight_decay"] == 0 and not torch.equal(slope, old)
    if isinstance(optimizer, SGD) and problem:
        frozen = [slope.detach().clone() for slope in slopes]
        model(IMAGES).sum().backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.state.clear()
        optimizer.step()
        assert all(torch.equal(*pair) for pair in zip(slopes, frozen, strict=True)), "nothing pulls them to 0"


def test_a_warning_comes_again_for_another_model_only() -> None:
    model = make_net()
    patch_model(model, "arelu", include="0.*")
    optimizer = like_yolox(model)
    with pytest.warns(RtdetrActWarning, match=r"2 parameters .*arelu at 0\.act"):
        step(model, optimizer)
    patch_model(model, "aconc", include="1.*")
    with pytest.warns(RtdetrActWarning, match=r"^3 parameters of activations \(aconc at 1\.act first\)"):
        step(model, optimizer)


def test_both_problems_are_one_sentence() -> None:
    model = make_net()
    patch_model(model, "prelu", include="0.*")
    patch_model(model, "arelu", include="1.*")
    optimizer = like_yolox(model)
    with pytest.warns(RtdetrActWarning) as caught:
        step(model, optimizer)
    (message,) = (str(each.message) for each in caught)
    assert message.startswith("2 parameters of activations (arelu at 1.act first) are in no optimizer")
    assert (
        ", and 1 parameter of activations (prelu at 0.act first) is under weight decay, which pulls it to 0" in message
    )


def healthy_loops() -> dict[str, Callable[[], None]]:
    def all_parameters_without_decay() -> None:
        model = make_net()
        patch_model(model, "arelu")
        step(model, SGD(model.parameters(), lr=0.1))

    def averaged_copy() -> None:
        model = make_net()
        patch_model(model, "arelu")
        average = copy.deepcopy(model).eval()
        step(model, SGD(model.parameters(), lr=0.1))
        assert untrained._watch.handle is None and average[0].act is not model[0].act

    def teacher() -> None:
        model, teacher = make_net(), make_net().requires_grad_(False)
        patch_model(teacher, "arelu")
        optimizer = SGD(model.parameters(), lr=0.1)
        (model(IMAGES) - teacher(IMAGES)).square().mean().backward()
        optimizer.step()

    def frozen() -> None:
        model = make_net()
        patch_model(model, "arelu")
        model[0].requires_grad_(False)
        optimizer = like_yolox(model)
        optimizer.add_param_group({"params": list(model[1].act.parameters())})
        step(model, optimizer)

    def left_out_with_its_weights() -> None:
        model = make_net()
        patch_model(model, "arelu", include="0.*")
        step(model, SGD(model[1:].parameters(), lr=0.1))

    def two_optimizers() -> None:
        model = make_net()
        patch_model(model, "arelu")
        optimizers = [SGD(part.parameters(), lr=0.1) for part in (model[0], model[1:])]
        model(IMAGES).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    def no_parameters() -> None:
        model = make_net()
        patch_model(model, "mish")
        assert untrained._watch.handle is None
        step(model, like_yolox(model))

    def replaced_again() -> None:
        model = make_net()
        patch_model(model, "arelu")
        patch_model(model, "mish")
        step(model, like_yolox(model))

    return {name: value for name, value in locals().items() if callable(value)}


@pytest.mark.parametrize("name", healthy_loops())
def test_a_healthy_loop_is_not_warned_of(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RtdetrActWarning)
        healthy_loops()[name]()


def test_a_model_that_is_trained_later_is_not_missed() -> None:
    first, later = make_net(), make_net()
    patch_model(later, "arelu")
    optimizer = SGD(first.parameters(), lr=0.1)
    for _ in range(3):
        step(first, optimizer)
    assert untrained._watch.handle is not None
    with pytest.warns(RtdetrActWarning, match="4 parameters"):
        step(later, like_yolox(later))
    assert untrained._watch.handle is None


def test_a_copy_is_watched_too() -> None:
    model = make_net()
    patch_model(model, "arelu")
    trained = pickle.loads(pickle.dumps(model))
    with pytest.warns(RtdetrActWarning, match="4 parameters"):
        step(trained, like_yolox(trained))


def test_a_gradient_that_comes_later_is_not_missed() -> None:
    model = make_net()
    patch_model(model, "arelu")
    optimizer = like_yolox(model)
    optimizer.step()  # without gradients
    with pytest.warns(RtdetrActWarning, match="4 parameters"):
        step(model, optimizer)


def test_other_hooks_of_optimizers_still_run() -> None:
    """A hook that is registered after ours keeps it in torch's dictionary, where it does nothing."""
    calls: list[Optimizer] = []
    model = make_net()
    patch_model(model, "arelu")
    other = register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(optimizer))
    try:
        optimizer = like_yolox(model)
        with pytest.warns(RtdetrActWarning):
            step(model, optimizer)
        step(model, optimizer)
        assert len(calls) == 2 and not untrained._watch.active
    finally:
        other.remove()


@pytest.mark.integration
@pytest.mark.parametrize("activation", ["arelu", "prelu", "meta_aconc"])
def test_a_training_by_ultralytics_is_looked_at_and_not_warned_of(
    activation: str, stock_yaml: Path, data: Data, tmp_path: Path
) -> None:
    from ultralytics import RTDETR

    model = RTDETR(str(stock_yaml))
    patch_model(model, activation)
    assert untrained._watch.active
    seen: list[bool] = []
    model.add_callback("on_train_batch_end", lambda trainer: seen.append(untrained._watch.active))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RtdetrActWarning)
        tiny.train(model, data.detect, tmp_path)
    assert seen and not any(seen), "the hook looked, and was removed at the first step"


@pytest.mark.integration
def test_a_compiled_step_works() -> None:
    model = make_net()
    patch_model(model, "arelu")
    optimizer = SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(optimizer.step, backend="eager")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(IMAGES).square().mean().backward()
    compiled()
    assert any(not torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def make_plateau(optimizer: Optimizer) -> lr_scheduler.ReduceLROnPlateau:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, min_lr=1e-3)


def make_sequence(optimizer: Optimizer) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.StepLR(optimizer, 2)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.8**e, lambda e: 0.7**e]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 7]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=14),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "ReduceLROnPlateau": make_plateau,
    "SequentialLR": make_sequence,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_change_the_new_group_with_its_reference(name: str, late: int) -> None:
    model = make_net()
    optimizer = like_yolox(model)
    scheduler = SCHEDULERS[name](optimizer)

    def advance() -> None:
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    for _ in range(late):
        advance()
    patch_model(model, "arelu", act_lr=0.25, optimizer=optimizer)
    reference, group = optimizer.param_groups[0], optimizer.param_groups[3]
    assert find_group(optimizer, slopes_of(model)[0]) is group and len(group["params"]) == 4
    seen = set()
    for _ in range(10):
        assert group["lr"] == pytest.approx(0.25 * reference["lr"], rel=1e-6)
        if "initial_lr" in reference:
            assert group["initial_lr"] == pytest.approx(0.25 * reference["initial_lr"])
        assert len(scheduler.get_last_lr()) == 4
        seen.add(reference["lr"])
        advance()
    assert len(seen) > 1
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    advance()
    assert group["lr"] == pytest.approx(0.25 * reference["lr"], rel=1e-6)


class OwnScheduler:
    """A scheduler of another library, with a value for each group."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.base_values = [float(group["lr"]) for group in optimizer.param_groups]


class Warmup:
    """A warm-up around a scheduler of torch, with a value for each group."""

    def __init__(self, scheduler: lr_scheduler.LRScheduler) -> None:
        self.scheduler = scheduler
        self.end_values = [float(group["lr"]) for group in scheduler.optimizer.param_groups]


@pytest.mark.parametrize("make", [OwnScheduler, lambda o: Warmup(lr_scheduler.StepLR(o, 3))])
def test_a_scheduler_that_cannot_learn_of_a_group_is_refused_and_nothing_changes(
    make: Callable[[Optimizer], Any],
) -> None:
    model = make_net()
    optimizer = like_yolox(model)
    scheduler = make(optimizer)
    with pytest.raises(ModelError, match=rf"{type(scheduler).__name__} holds one value for each parameter group"):
        patch_model(model, "arelu", optimizer=optimizer)
    assert len(optimizer.param_groups) == 3 and isinstance(model[0].act, nn.SiLU)
    patch_model(model, "arelu")
    with pytest.raises(ModelError, match="before the scheduler is built"):
        add_to_optimizer(model, optimizer)
    assert len(optimizer.param_groups) == 3


def test_a_scheduler_that_was_frozen_is_asked_for() -> None:
    model = make_net()
    optimizer = like_yolox(model)
    scheduler = lr_scheduler.StepLR(optimizer, 3)
    gc.freeze()
    try:
        with pytest.raises(ModelError, match=r"call gc\.unfreeze\(\) before"):
            patch_model(model, "arelu", optimizer=optimizer)
    finally:
        gc.unfreeze()
    patch_model(model, "arelu", optimizer=optimizer)
    assert len(scheduler.base_lrs) == 4


def test_schedulers_of_other_optimizers_stay_as_they_are() -> None:
    model, other = make_net(), make_net()
    optimizer, others = like_yolox(model), like_yolox(other)
    scheduler = lr_scheduler.StepLR(others, 3)
    patch_model(model, "arelu", optimizer=optimizer)
    assert len(scheduler.base_lrs) == 3 and len(optimizer.param_groups) == 4


def test_state_is_kept_and_restored() -> None:
    model = make_net()
    patch_model(model, "prelu")
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with pytest.warns(RtdetrActWarning, match="2 parameters .* under weight decay"):
        step(model, optimizer)
    slope = slopes_of(model)[0]
    average = optimizer.state[slope]["exp_avg"].clone()
    assert add_to_optimizer(model, optimizer) == 2
    assert torch.equal(optimizer.state[slope]["exp_avg"], average)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer)
    again = make_net()
    patch_model(again, "prelu")
    restored = AdamW(again.parameters(), lr=0.5, weight_decay=0.2)
    add_to_optimizer(again, restored)
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    step(again, restored)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))


def test_replaced_activations_leave_the_optimizer() -> None:
    model = make_net()
    optimizer = like_yolox(model)
    patch_model(model, "prelu", optimizer=optimizer)
    old = slopes_of(model)
    step(model, optimizer)
    patch_model(model, "aconc", optimizer=optimizer)
    assert all(find_group(optimizer, slope) is None and slope not in optimizer.state for slope in old)
    assert all((find_group(optimizer, slope) or {})["weight_decay"] == 0 for slope in slopes_of(model))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_convolutions_are_exchanged_in_the_optimizer() -> None:
    model = make_net()
    optimizer = like_yolox(model)
    old = model[1].conv.weight
    report = patch_convs(model, kernels=2, optimizer=optimizer)
    assert report.sites == ["1.conv", "2"] and find_group(optimizer, old) is None
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert (find_group(optimizer, model[1].conv.weight) or {})["weight_decay"] == DECAY
    step(model, optimizer)


def test_weights_inside_activations_join_those_around_them() -> None:
    model = make_net()
    optimizer = like_yolox(model)
    patch_model(model, "dyrelu_b", optimizer=optimizer)
    for name, parameter in model.named_parameters():
        group = find_group(optimizer, parameter)
        assert group is not None, name
        if ".act." in name:
            assert group["weight_decay"] == (0 if "bias" in name else DECAY), name
    assert len(optimizer.param_groups) == 3


def test_each_part_follows_the_rate_of_its_own_weights() -> None:
    """As in D-FINE, whose backbone has a smaller learning rate."""
    model = make_net()
    patch_model(model, "arelu")
    rest = [parameter for part in model[1:] for parameter in part.parameters()]
    optimizer = AdamW(
        [{"params": list(model[0].parameters()), "lr": 1e-5}, {"params": rest}], lr=1e-4, weight_decay=0.1
    )
    assert add_to_optimizer(model, optimizer, act_lr=0.1) == 4
    groups = [find_group(optimizer, slope) or {} for slope in slopes_of(model)]
    assert [group["lr"] for group in groups] == pytest.approx([1e-6, 1e-6, 1e-5, 1e-5])
    assert add_to_optimizer(model, optimizer, act_lr=0.1) == 0 and len(optimizer.param_groups) == 4
    assert add_to_optimizer(model, optimizer, act_lr=1.0) == 0
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 1e-5, 1e-4, 1e-4])


def test_an_optimizer_gets_the_activations_of_its_own_weights_only() -> None:
    model = make_net()
    patch_model(model, "arelu")
    first, second = like_yolox(model[0]), like_yolox(model[1:])
    assert [add_to_optimizer(model, each) for each in (first, second)] == [2, 2]
    assert find_group(first, model[0].act.alpha) and find_group(second, model[1].act.alpha)


def test_frozen_activations_are_left_out() -> None:
    model = make_net()
    patch_model(model, "arelu")
    model[0].requires_grad_(False)
    assert add_to_optimizer(model, like_yolox(model)) == 2


def test_names_of_parameters_stay_beside_them() -> None:
    model = make_net()
    patch_model(model, "prelu")
    try:
        optimizer = SGD(model.named_parameters(), lr=0.1, weight_decay=0.1)
    except TypeError:
        pytest.skip("optimizers take names since torch 2.6")
    add_to_optimizer(model, optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]
    assert optimizer.param_groups[1]["param_names"] == ["0.act.weight", "1.act.weight"]


def test_rates_that_are_tensors_are_not_shared() -> None:
    model = make_net()
    patch_model(model, "arelu")
    optimizer = Adam(model.parameters(), lr=torch.tensor(0.1), weight_decay=0.1, capturable=False, foreach=False)
    add_to_optimizer(model, optimizer)
    first, second = optimizer.param_groups
    assert torch.equal(first["lr"], second["lr"]) and first["lr"] is not second["lr"]


def test_what_is_no_optimizer_of_the_model_is_refused() -> None:
    model = make_net()
    patch_model(model, "arelu")
    with pytest.raises(InputError, match=r"optimizer is a torch\.optim\.Optimizer, not"):
        add_to_optimizer(model, [like_yolox(model)])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="the optimizer holds no parameter of the model"):
        add_to_optimizer(model, like_yolox(make_net()))
    with pytest.raises(SpecError, match="act_lr is a positive factor"):
        add_to_optimizer(model, like_yolox(model), act_lr=0)


def test_a_stock_or_unpatched_model_changes_nothing() -> None:
    model = make_net()
    optimizer = like_yolox(model)
    assert add_to_optimizer(model, optimizer) == 0
    patch_model(model, "mish", optimizer=optimizer)
    unpatch_model(model)
    assert not get_placement(model[0].act) and len(optimizer.param_groups) == 3
