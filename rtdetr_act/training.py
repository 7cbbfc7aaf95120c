"""What training a patched model needs beyond Ultralytics' own: where activation parameters go in the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from rtdetr_act.sites import placed_activations

# These hold weights, not slopes: what Ultralytics does with them elsewhere is right for them here.
_WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


def separate_activation_parameters(optimizer: Optimizer, model: nn.Module, act_lr: float = 1.0) -> int:
    """Take scalar and per-channel activation parameters out of weight decay (and out of Muon), in place.

    PReLU's documentation warns against decaying its slope: decay pulls it to zero whatever the loss says. With
    `act_lr=1` they join the group without decay that is there, so no group appears behind the back of a learning-rate
    scheduler; else they get one group with the learning rate of that group times `act_lr`, which is safe while no
    scheduler exists yet (Ultralytics builds it after the optimizer).

    Args:
        optimizer: As Ultralytics' `build_optimizer` returns it, before its first step.
        model: The patched model it was built for.
        act_lr: Factor on their learning rate.

    Returns:
        How many parameter tensors were moved.
    """
    chosen = {id(parameter): parameter for parameter in slopes(model)}
    groups = optimizer.param_groups
    moved = [p for group in groups for p in group["params"] if id(p) in chosen]
    if not moved:
        return 0
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    home = _undecayed_group(groups)
    if act_lr == 1.0:
        home["params"].extend(moved)
    else:
        settings = {key: value for key, value in home.items() if key != "params"}
        optimizer.add_param_group({**settings, "params": moved, "lr": home["lr"] * act_lr})
    return len(moved)


def slopes(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the scalar and per-channel parameters of the activations that a swap placed in a model."""
    for _, activation in placed_activations(model):
        for module in activation.modules():
            if isinstance(module, _WEIGHT_LAYERS):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.numel() == max(parameter.shape, default=1):  # one axis at most: (), (C,), (1, C, 1, 1)
                    yield parameter


def _undecayed_group(groups: list[dict]) -> dict:
    """Return the group of the normalisation weights: no decay, no Muon, and not warmed up like a bias.

    Ultralytics labels its groups since 8.4 (MuSGD has two of each, the first with the head's threefold rate); before,
    the biases come first and the normalisation weights last.
    """
    labelled = [group for group in groups if group.get("param_group") == "bn"]
    return labelled[-1] if labelled else groups[-1]
