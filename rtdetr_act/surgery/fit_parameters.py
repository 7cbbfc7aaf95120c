"""Fit the parameters of activations to what their sites get and returned before a swap."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rtdetr_act.activations.registry import find_entry
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.site_samples import SiteSample
from rtdetr_act.surgery.sites import find_sites, iterate_placed_activations

_STEPS = 20  # of L-BFGS, from parameters that `match` has fitted to a normal distribution


def fit_activations(root: nn.Module, samples: Mapping[str, SiteSample], images: Tensor) -> int:
    """Fit the parameters of the activations that `init="match"` fits to samples, in place; return how many.

    `match` fits to a standard normal input, which is about what a BatchNorm gives. This one fits to the inputs that
    there really are, by least squares, and keeps the parameters of before where they are better.

    Args:
        root: The patched network.
        samples: What the activations that were replaced get and return, as `sample_sites` returns it.
        images: Inputs of the network, (B, C, H, W).
    """
    plan = read_plan(root).stages[-1]
    fitted = 0
    activations = dict(iterate_placed_activations(root))
    for site in find_sites(root, images):
        rule, sample = plan.find_rule(site), samples.get(site.name)
        entry = find_entry(activations.get(site.name))
        if rule is not None and rule.init == "match" and sample is not None and entry is not None and entry.fit:
            fitted += fit_activation(activations[site.name], sample)
    return fitted


def fit_activation(activation: nn.Module, sample: SiteSample) -> bool:
    """Fit the parameters of an activation to a sample by least squares, in place.

    Args:
        activation: The activation, in evaluation mode.
        sample: Inputs and target outputs.

    Returns:
        Whether the parameters were changed; otherwise they fit at least as well as any found.
    """
    parameters = [p for p in activation.parameters() if p.is_floating_point()]
    if not parameters:
        return False
    before = [p.detach().clone() for p in parameters]
    trained = [p.requires_grad for p in parameters]
    scale = sample.outputs.float().square().mean().clamp_min(1e-12)
    optimizer = torch.optim.LBFGS(parameters, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def evaluate() -> torch.Tensor:
        return (activation(sample.inputs.clone()) - sample.outputs).float().square().mean() / scale

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = evaluate()
        loss.backward()
        return loss

    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            start = float(evaluate().detach())
            optimizer.step(closure)
            end = float(evaluate().detach())
    finally:
        for parameter, trains in zip(parameters, trained, strict=True):
            parameter.grad = None
            parameter.requires_grad_(trains)
    if end < start:
        return True
    with torch.no_grad():  # also where it is not finite
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return False
