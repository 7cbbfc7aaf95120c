"""What activations do in a network on real batches: to the gradient that passes them, and to the maps they give.

Each site gets a stand-in that calls the activation on a copy of its input. So an activation that writes over its input
spoils nothing, and the gradient at that copy is what came back through the activation alone, without that of a skip
connection that reads the same map. Everything happens in a copy of the model, so that nothing has to be put back into
the one given.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg

from rtdetr_act.errors import InputError, ModelError, TrainingError
from rtdetr_act.surgery.functional_calls import unseen_calls
from rtdetr_act.surgery.modules import put, unwrap
from rtdetr_act.surgery.rewired import rewire
from rtdetr_act.surgery.sites import MARK, Site, find_sites

Loss = Callable[[Any, Any], Tensor]


SATURATION_THRESHOLD = 0.01  # an element whose slope is smaller passes on less than a hundredth of its gradient


DEAD_THRESHOLD = 1e-6  # a slope that is zero but for the tail of a smooth function: GELU's at -5.7, SiLU's at -17


MAX_POSITIONS = 4096  # positions drawn per call for the effective rank


@dataclass(frozen=True)
class SiteDiagnosis:
    """What one activation does. x is its input, y its output, L the loss of a batch.

    All but `dead` and the rank are computed for each batch, over all calls of the site together, and averaged over the
    batches in which they are defined; NaN where they never are.

    Attributes:
        name: Qualified name of the site.
        layer: Index of the Ultralytics layer, None for other models.
        section: "backbone", "neck", "head" or "".
        activation: What stands there, in words.
        swapped: Whether a swap placed it.
        gradient_in: The norm `||dL/dx||_2`, of what came back through the activation only.
        gradient_out: The norm `||dL/dy||_2`.
        gain: `gradient_in / gradient_out`: above 1, the activation amplifies the gradient.
        gain_active: The same over the active inputs (x > 0) only. AReLU's paper says 1 + sigmoid(beta).
        dead: Share of channels whose slope is zero (below 1e-6) at every position of every image of all batches. The
            slope is the derivative of an element of y by its own element of x, with what the activation computes from
            the whole map (coefficients, neighbours) held constant. (For an activation of another kind that mixes
            elements, such as GLU, an unbiased estimate from one random vector.)
        scale: Root mean square of y.
        mean: Mean of y.
        saturation: Share of elements whose slope is below 0.01 in size.
        effective_rank: Exponential of the entropy of the normalised singular values of y as a matrix of channels by
            positions, up to 4096 positions of each call drawn at random, all batches together (Roy and Vetterli,
            EUSIPCO 2007). Between 1 and the number of channels.
        rank_share: `effective_rank` over the number of channels.
    """

    name: str
    layer: int | None
    section: str
    activation: str
    swapped: bool
    gradient_in: float
    gradient_out: float
    gain: float
    gain_active: float
    dead: float
    scale: float
    mean: float
    saturation: float
    effective_rank: float
    rank_share: float


@dataclass(frozen=True)
class Diagnosis:
    """What the activations of a model do on some batches.

    Attributes:
        sites: Those that ran, in the order in which the model first calls them.
        batches: Number of batches.
        left_out: Names of sites that did not run, and functional activations in foreign blocks, which nothing reaches.
    """

    sites: tuple[SiteDiagnosis, ...]
    batches: int
    left_out: tuple[str, ...] = ()


def diagnose(
    model: Any, batches: Iterable[Any], loss: Loss | None = None, *, example_input: Any = None, seed: int = 0
) -> Diagnosis:
    """Measure what every activation of a model does to gradients and features, on real batches in training mode.

    Works on a copy of the model: weights, gradients, modes, BatchNorm statistics and in-place flags stay as they are,
    and so does the random state. Memory is that of one batch's forward and backward, and a copy of the weights.

    Args:
        model: RTDETR, YOLO, a task model or any module.
        batches: What `loss` takes, one by one; for an Ultralytics model those of its data loaders, images in 0..1.
        loss: Maps (model, batch) to a scalar; it must run the model that it is given, not another. By default the
            training loss of an Ultralytics model.
        example_input: For foreign models, what to call the model with to learn channels and layouts.
        seed: Random state for the first batch, counted on for each other: the same draws for each model compared.

    Returns:
        The quantities of each site, averaged over the batches.

    Raises:
        ModelError: The model is exported, wrapped or compiled, has no activation site, or cannot be copied.
        InputError: There is no batch, or the loss is no scalar or does not depend on the model given.
        TrainingError: The loss is not finite.

    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> found = [diagnose(net, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())]
    >>> report = patch_model(net, "arelu", scope="all")
    >>> found += [diagnose(net, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())]
    >>> [round(each.sites[0].gain_active, 4) for each in found]
    [1.0, 1.8808]
    """
    work = _copy_model(unwrap(model))
    missed = unseen_calls(work)
    taps = _insert_probes(work, example_input)
    calls: list[_Probe] = []
    count = 0
    with preserve_random_state(), torch.enable_grad():
        for count, batch in enumerate(batches, 1):
            seed_all(seed + count - 1)
            for tap in taps:
                tap.start_batch(calls)
            _run_batch(work, batch, loss or compute_training_loss, calls, count)
            for tap in taps:
                tap.finish_batch()
    if not count:
        raise InputError("there is no batch to diagnose the model on")
    ran = list(dict.fromkeys(calls))
    idle = [tap.site.name for tap in taps if tap not in set(ran)]
    return Diagnosis(tuple(tap.summarise() for tap in ran), count, (*idle, *missed))


def _copy_model(root: nn.Module) -> nn.Module:
    try:
        work = copy.deepcopy(root)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"a diagnosis works on a copy of the model, which cannot be copied: {reason}") from error
    # Without gradients of weights nothing gathers in .grad, and a third of the work is saved.
    return work.train().requires_grad_(False)


def _insert_probes(work: nn.Module, example_input: Any) -> list[_Probe]:
    sites = find_sites(work, example_input)
    if not sites:
        raise ModelError("this model has no activation site to diagnose")
    for owner in {id(site.owner): site.owner for site in sites if site.hidden}.values():
        if not hasattr(owner, "hidden_calls"):
            rewire(owner)
    taps = [_Probe(site, getattr(site.owner, site.attribute)) for site in sites]
    for tap in taps:
        put(tap.site.owner, tap.site.attribute, tap)
    return taps


def _run_batch(work: nn.Module, batch: Any, loss: Loss, calls: list[_Probe], number: int) -> None:
    before = len(calls)
    value = loss(work, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the loss must be a tensor of one number, not {shape}")
    if not bool(torch.isfinite(value.detach()).all()):
        raise TrainingError(f"the loss of batch {number} is {float(value.detach()):g}: there is no gradient to look at")
    if len(calls) == before or not value.requires_grad:
        raise InputError("the loss depends on no activation of the model: it must run the model that it is given")
    value.sum().backward()


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    """Seed the random states of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _Probe(nn.Module):
    """Stands where an activation stood, calls it, and adds up what its quantities need."""

    def __init__(self, site: Site, activation: Any) -> None:
        super().__init__()
        self.site, self.activation = site, activation
        self._draw = torch.Generator().manual_seed(0)  # its own: the model's draws stay those of an untapped one
        self._calls: list[_Probe] = []
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._batches: defaultdict[str, list[float]] = defaultdict(list)
        # By width, since one module may be called at several.
        self._max_derivatives: dict[int, Tensor] = {}
        self._grams: dict[int, Tensor] = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():  # such as a first pass of gradient checkpointing: nothing comes back
            return self.activation(x, *args, **kwargs)
        self._calls.append(self)
        self._record_derivatives(x.detach())
        active = x.detach() > 0
        own = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        own.register_hook(lambda grad: self._record_gradient("in", grad, active))
        y: Tensor = self.activation(own, *args, **kwargs)
        self._record_output(y.detach())
        if y.requires_grad:
            y.register_hook(lambda grad: self._record_gradient("out", grad, active))
        return y

    def start_batch(self, calls: list[_Probe]) -> None:
        """Start anew, and note each call in a list that all sites share."""
        self._calls, self._sums = calls, defaultdict(float)

    def finish_batch(self) -> None:
        """Turn the sums of a batch into its quantities, those that are defined."""
        s = self._sums
        if "out" in s:
            self._batches["gradient_in"].append(math.sqrt(s["in"]))
            self._batches["gradient_out"].append(math.sqrt(s["out"]))
        for name, over, under in (("gain", "in", "out"), ("gain_active", "in active", "out active")):
            if s[under]:
                self._batches[name].append(math.sqrt(s[over] / s[under]))
        if s["elements"]:
            self._batches["scale"].append(math.sqrt(s["squares"] / s["elements"]))
            self._batches["mean"].append(s["sum"] / s["elements"])
            self._batches["saturation"].append(s["flat"] / s["elements"])

    def summarise(self) -> SiteDiagnosis:
        """Return the quantities of all batches together."""
        widths = sum(self._grams)
        dead = sum(int((steepest <= DEAD_THRESHOLD).sum()) for steepest in self._max_derivatives.values())
        ranks = [_compute_effective_rank(gram) for gram in self._grams.values()]
        averaged = ("gradient_in", "gradient_out", "gain", "gain_active", "scale", "mean", "saturation")
        site = self.site
        return SiteDiagnosis(
            site.name,
            site.layer,
            site.section,
            site.current,
            hasattr(self.activation, MARK),
            dead=dead / widths,
            effective_rank=statistics.fmean(ranks),
            rank_share=sum(ranks) / widths,
            **{name: statistics.fmean(self._batches.get(name) or [math.nan]) for name in averaged},
        )

    def _record_derivatives(self, x: Tensor) -> None:
        # Forked, so that an activation that draws its slopes (RReLU) draws the same ones in the call itself.
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            slopes = self._compute_derivatives(x).abs()
        self._sums["flat"] += int((slopes < SATURATION_THRESHOLD).sum())
        steepest = self._to_columns(slopes).amax(1)
        width = len(steepest)
        self._max_derivatives[width] = torch.maximum(steepest, self._max_derivatives.get(width, steepest))

    def _compute_derivatives(self, x: Tensor) -> Tensor:
        """Return the derivative of each element by itself.

        With random signs v, the diagonal of the Jacobian J is the mean of v * (J' v); where J is nothing but its
        diagonal, each draw gives it exactly.
        """
        with torch.no_grad():
            held = self.activation.held_at(x) if hasattr(self.activation, "held_at") else self.activation
        leaf = x.clone().requires_grad_()
        signs = torch.randint(0, 2, x.shape, generator=self._draw).to(x) * 2 - 1
        y = held(leaf.clone())  # a copy once more: a leaf cannot be written over
        (found,) = torch.autograd.grad(y, leaf, signs) if y.requires_grad else (torch.zeros_like(x),)
        return found * signs

    def _record_output(self, y: Tensor) -> None:
        self._sums["elements"] += y.numel()
        self._sums["squares"] += _sum_of_squares(y)
        self._sums["sum"] += float(y.mean(dtype=_accumulation_dtype(y))) * y.numel()
        columns = self._to_columns(y)
        width, count = columns.shape
        if count > MAX_POSITIONS:
            columns = columns[:, torch.randperm(count, generator=self._draw)[:MAX_POSITIONS].to(y.device)]
        columns = columns.cpu().double()  # a singular value is the root of an eigenvalue, and loses half the digits
        self._grams[width] = self._grams.get(width, 0) + columns @ columns.T

    def _record_gradient(self, where: str, grad: Tensor, active: Tensor) -> None:
        self._sums[where] += _sum_of_squares(grad)
        self._sums[f"{where} active"] += _sum_of_squares(grad[active])

    def _to_columns(self, t: Tensor) -> Tensor:
        """Return a tensor as channels by positions of all images."""
        return t.movedim(1 if self.site.layout == "map" and t.ndim > 1 else -1, 0).flatten(1)


def _accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _sum_of_squares(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=_accumulation_dtype(t))) ** 2


def _compute_effective_rank(gram: Tensor) -> float:
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))


def compute_training_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the training loss of an Ultralytics task model on a batch of its data loaders.

    Raises:
        InputError: The model is of another kind.
    """
    if not hasattr(model, "loss") or not hasattr(model, "yaml"):
        raise InputError(f"a {type(model).__name__} has no training loss of its own: give loss=, a function of both")

    given = getattr(model, "args", None) or {}
    if isinstance(given, dict):  # what a trainer sets: the gains of the losses, and the number of classes
        model.args = get_cfg(overrides={key: value for key, value in given.items() if key in DEFAULT_CFG_DICT})
        model.nc = model.yaml["nc"]
    if getattr(model, "criterion", None) is None:  # a checkpoint holds None, which 8.3.0 takes for a criterion
        model.criterion = model.init_criterion()
    return model.loss(batch)[0].sum()
