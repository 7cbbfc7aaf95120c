"""Gradient flow and feature statistics of the activations in a network, measured on real batches.

A probe at each site calls the activation on a clone of its input. In-place activations are then harmless, and the
gradient of the clone is that of the activation alone, without the one of a skip connection that reads the same tensor.
The measurement runs in a copy of the model, so that nothing has to be restored.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg

from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.registry import find_entry
from rtdetr_act.errors import InputError, ModelError, TrainingError
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result, Table, TableResult
from rtdetr_act.surgery.functional_calls import find_unreachable_calls
from rtdetr_act.surgery.modules import set_child, unwrap
from rtdetr_act.surgery.rewiring import is_rewired, rewire
from rtdetr_act.surgery.sites import Observer, Site, find_sites

Loss = Callable[[Any, Any], Tensor]


SATURATION_THRESHOLD = 0.01  # an element with a smaller derivative passes less than a hundredth of its gradient


DEAD_THRESHOLD = 1e-6  # a derivative that is practically zero: GELU's at -5.7, SiLU's at -17


MAX_POSITIONS = 4096  # sampled per call for the effective rank


@dataclass(frozen=True, repr=False)
class SiteDiagnosis(Result):
    """Measurements of one activation, with x its input, y its output and L the loss of a batch.

    All but `dead` and the rank are computed per batch, over all calls of the site, and averaged over the batches in
    which they are defined; NaN if there is no such batch.

    Attributes:
        name: Qualified name of the site.
        layer: Index of the Ultralytics layer; None in other models.
        section: "backbone", "neck", "head" or "".
        activation: Description of the activation at the site.
        swapped: Whether a swap placed the activation.
        gradient_in: The norm `||dL/dx||_2` of the gradient that passes the activation.
        gradient_out: The norm `||dL/dy||_2`.
        gain: `gradient_in / gradient_out`; above 1, the activation amplifies the gradient.
        gain_active: The same over active inputs (x > 0) only. For AReLU it is 1 + sigmoid(beta) by its paper.
        dead: Fraction of channels whose derivative is below 1e-6 in magnitude at every position of every image of all
            batches. This is the derivative of an element of y by its own element of x, with all that the activation
            computes from the whole map (coefficients, neighbours) held constant. For another activation that mixes
            elements, such as GLU, it is an unbiased estimate from one random vector.
        scale: Root mean square of y.
        mean: Mean of y.
        saturation: Fraction of elements whose derivative is below 0.01 in magnitude.
        effective_rank: Exponential of the entropy of the normalised singular values of y as a matrix of channels by
            positions, from up to 4096 random positions of each call of all batches (Roy and Vetterli, "The effective
            rank", EUSIPCO 2007). Between 1 and the number of channels.
        rank_share: `effective_rank` divided by the number of channels.
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

    def _summarise(self) -> str:
        """Return name, activation and gain."""
        return f"{self.name}, {self.activation}, gain {self.gain:.2f}"


@dataclass(frozen=True, repr=False)
class Diagnosis(TableResult):
    """Measurements of all activations of a model.

    Attributes:
        sites: Sites that were called, in the order of their first call.
        batches: Number of batches.
        left_out: Names of sites that were not called, and functional activations that cannot be intercepted.
    """

    sites: tuple[SiteDiagnosis, ...]
    batches: int
    left_out: tuple[str, ...] = ()

    def _summarise(self) -> str:
        """Return the numbers of sites and batches."""
        return f"{format_count(len(self.sites), 'site')} on {self.batches} batch{'' if self.batches == 1 else 'es'}"

    def _make_table(self) -> Table:
        """Return a row per site."""
        return [field.name for field in fields(SiteDiagnosis)], map(astuple, self.sites)


def diagnose_batches(
    model: Any, batches: Iterable[Any], loss: Loss | None = None, *, example_input: Any = None, seed: int = 0
) -> Diagnosis:
    """Measure gradients and features at every activation of a model, on real batches in training mode.

    The measurement runs in a copy of the model: weights, gradients, modes, BatchNorm statistics, in-place flags and
    the random state are left unchanged. It takes the memory of forward and backward pass of one batch, and of a copy
    of the weights.

    Args:
        model: RTDETR, YOLO, a task model or any module.
        batches: Batches in the form that `loss` takes; for an Ultralytics model, those of its data loaders with images
            scaled to [0, 1].
        loss: Function of (model, batch) that returns a scalar tensor; it must call the model it is given. Default: the
            training loss of an Ultralytics model.
        example_input: Input with which to call a model other than Ultralytics', to find channels and layouts.
        seed: Seed of the first batch; each following batch has the next integer.

    Returns:
        The measurements of each site, averaged over the batches.

    Raises:
        ModelError: The model is exported, wrapped or compiled, has no activation site, or cannot be copied.
        InputError: There is no batch, or the loss is not a scalar or does not depend on the model given.
        TrainingError: The loss is not finite.

    >>> from rtdetr_act import patch_model
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> diagnoses = [diagnose_batches(net, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())]
    >>> report = patch_model(net, "arelu", scope="all")
    >>> diagnoses += [diagnose_batches(net, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())]
    >>> [round(each.sites[0].gain_active, 4) for each in diagnoses]
    [1.0, 1.8808]
    """
    copied = copy_network(unwrap(model), "a diagnosis works on a copy").train()
    copied.requires_grad_(False)  # without the gradients of the weights, the backward pass is a third cheaper
    unreachable = find_unreachable_calls(copied)
    probes = _insert_probes(copied, example_input)
    calls: list[_Probe] = []  # one entry per call of a probe
    count = 0
    with preserve_random_state(), torch.enable_grad():
        for count, batch in enumerate(batches, 1):
            seed_all(seed + count - 1)
            for probe in probes:
                probe.start_batch(calls)
            _run_batch(copied, batch, loss or compute_training_loss, calls, count)
            for probe in probes:
                probe.finish_batch()
    if not count:
        raise InputError("there is no batch to diagnose the model on")
    called = list(dict.fromkeys(calls))
    idle = [probe.site.name for probe in probes if probe not in set(called)]
    return Diagnosis(tuple(probe.summarise() for probe in called), count, (*idle, *unreachable))


def copy_network(root: nn.Module, reason: str) -> nn.Module:
    """Return a copy of a network.

    Args:
        root: The network.
        reason: What it is copied for, which the message of the error begins with.

    Raises:
        ModelError: It cannot be copied.
    """
    try:
        return copy.deepcopy(root)
    except Exception as error:
        problem = str(error).partition("\n")[0]
        raise ModelError(f"{reason} of the model, which cannot be copied: {problem}") from error


def _insert_probes(model: nn.Module, example_input: Any) -> list[_Probe]:
    """Replace the activation at each site of a model by a probe that calls it, and return the probes."""
    sites = find_sites(model, example_input)
    if not sites:
        raise ModelError("this model has no activation site to diagnose")
    for site in sites:
        if site.hidden and not is_rewired(site.owner):
            rewire(site.owner, site.hidden_calls)
    probes = [_Probe(site, getattr(site.owner, site.attribute)) for site in sites]
    for probe in probes:
        set_child(probe.site.owner, probe.site.attribute, Observer(probe.activation, probe.call))
    return probes


def _run_batch(model: nn.Module, batch: Any, loss: Loss, calls: list[_Probe], number: int) -> None:
    """Run forward and backward pass of a batch; raises InputError or TrainingError for an unusable loss."""
    calls_before = len(calls)
    value = check_scalar(loss(model, batch))
    if not bool(torch.isfinite(value.detach()).all()):
        raise TrainingError(f"the loss of batch {number} is {float(value.detach()):g}: there is no gradient to measure")
    if len(calls) == calls_before or not value.requires_grad:
        raise InputError("the loss depends on no activation of the model: it must call the model that it is given")
    value.sum().backward()


def check_scalar(value: Any) -> Tensor:
    """Return the result of a loss, or raise InputError if it is not a tensor with one element."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the loss must be a tensor with one element, not {shape}")
    return value


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the body of a `with` statement; a context manager."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class _Probe:
    """Calls an activation in the place of its owner, and accumulates its measurements."""

    def __init__(self, site: Site, activation: Any) -> None:
        self.site, self.activation = site, activation
        self._generator = torch.Generator().manual_seed(
            0
        )  # separate, so that the model draws the same numbers as without
        self._calls: list[_Probe] = []
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._batches: defaultdict[str, list[float]] = defaultdict(list)
        # By number of channels, since one module may be called with several.
        self._max_derivatives: dict[int, Tensor] = {}
        self._grams: dict[int, Tensor] = {}

    def call(self, _: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the activation, and record input, output and gradients if autograd is enabled."""
        if not torch.is_grad_enabled():  # such as the first pass of gradient checkpointing: there is no backward pass
            return self.activation(x, *args, **kwargs)
        self._calls.append(self)
        self._record_derivatives(x.detach())
        active = x.detach() > 0
        cloned = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        cloned.register_hook(lambda grad: self._record_gradient("in", grad, active))
        y: Tensor = self.activation(cloned, *args, **kwargs)
        self._record_output(y.detach())
        if y.requires_grad:
            y.register_hook(lambda grad: self._record_gradient("out", grad, active))
        return y

    def start_batch(self, calls: list[_Probe]) -> None:
        """Reset the sums, and from now on append to a list, shared by all probes, at each call."""
        self._calls, self._sums = calls, defaultdict(float)

    def finish_batch(self) -> None:
        """Compute the measurements of a batch from its sums, those that are defined."""
        sums = self._sums
        if "out" in sums:
            self._batches["gradient_in"].append(math.sqrt(sums["in"]))
            self._batches["gradient_out"].append(math.sqrt(sums["out"]))
        for name, over, under in (("gain", "in", "out"), ("gain_active", "in active", "out active")):
            if sums[under]:
                self._batches[name].append(math.sqrt(sums[over] / sums[under]))
        if sums["elements"]:
            self._batches["scale"].append(math.sqrt(sums["squares"] / sums["elements"]))
            self._batches["mean"].append(sums["sum"] / sums["elements"])
            self._batches["saturation"].append(sums["flat"] / sums["elements"])

    def summarise(self) -> SiteDiagnosis:
        """Return the measurements over all batches."""
        channels = sum(self._grams)
        dead = sum(int((largest <= DEAD_THRESHOLD).sum()) for largest in self._max_derivatives.values())
        ranks = [_compute_effective_rank(gram) for gram in self._grams.values()]
        averaged = ("gradient_in", "gradient_out", "gain", "gain_active", "scale", "mean", "saturation")
        site = self.site
        return SiteDiagnosis(
            site.name,
            site.layer,
            site.section,
            site.current,
            get_placement(self.activation) is not None,
            dead=dead / channels,
            effective_rank=statistics.fmean(ranks),
            rank_share=sum(ranks) / channels,
            **{name: statistics.fmean(self._batches.get(name) or [math.nan]) for name in averaged},
        )

    def _record_derivatives(self, x: Tensor) -> None:
        """Add the derivatives at an input to the counts of saturated elements and dead channels."""
        # Forked, so that a random activation (RReLU) draws the same slopes in the call itself.
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            derivatives = self._compute_derivatives(x).abs()
        self._sums["flat"] += int((derivatives < SATURATION_THRESHOLD).sum())
        largest = self._to_columns(derivatives).amax(1)
        channels = len(largest)
        self._max_derivatives[channels] = torch.maximum(largest, self._max_derivatives.get(channels, largest))

    def _compute_derivatives(self, x: Tensor) -> Tensor:
        """Return the derivative of each output element by its own input element, of the shape of x.

        With random signs v, the diagonal of the Jacobian J is the expectation of v * (J' v). For a diagonal J, a
        single draw is exact.
        """
        with torch.no_grad():
            entry = find_entry(self.activation)
            held = entry.held_at(self.activation, x) if entry and entry.held_at else self.activation
        leaf = x.clone().requires_grad_()
        signs = torch.randint(0, 2, x.shape, generator=self._generator).to(x) * 2 - 1
        y = held(leaf.clone())  # cloned, since a leaf cannot be modified in place
        (product,) = torch.autograd.grad(y, leaf, signs) if y.requires_grad else (torch.zeros_like(x),)
        return product * signs

    def _record_output(self, y: Tensor) -> None:
        """Add an output to the sums and to the Gram matrix of the channels."""
        self._sums["elements"] += y.numel()
        self._sums["squares"] += _sum_of_squares(y)
        self._sums["sum"] += float(y.mean(dtype=_accumulation_dtype(y))) * y.numel()
        columns = self._to_columns(y)
        channels, count = columns.shape
        if count > MAX_POSITIONS:
            columns = columns[:, torch.randperm(count, generator=self._generator)[:MAX_POSITIONS].to(y.device)]
        columns = columns.cpu().double()  # the square root of an eigenvalue has half its digits
        self._grams[channels] = self._grams.get(channels, 0) + columns @ columns.T

    def _record_gradient(self, where: str, grad: Tensor, active: Tensor) -> None:
        """Add the squared norm of a gradient to the sums, over all elements and over active ones."""
        self._sums[where] += _sum_of_squares(grad)
        self._sums[f"{where} active"] += _sum_of_squares(grad[active])

    def _to_columns(self, t: Tensor) -> Tensor:
        """Return a tensor reshaped to (channels, positions of all images)."""
        return t.movedim(1 if self.site.input_layout == "map" and t.ndim > 1 else -1, 0).flatten(1)


def _accumulation_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype in which to sum the elements of a tensor, float32 or wider."""
    return torch.promote_types(t.dtype, torch.float32)


def _sum_of_squares(t: Tensor) -> float:
    """Return the sum of the squared elements of a tensor."""
    return float(torch.linalg.vector_norm(t, dtype=_accumulation_dtype(t))) ** 2


def _compute_effective_rank(gram: Tensor) -> float:
    """Return the effective rank of a matrix A, given A A'; 0 for a zero matrix."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))


def compute_training_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the training loss of an Ultralytics task model, a scalar tensor.

    Args:
        model: Task model.
        batch: Batch of its data loaders.

    Raises:
        InputError: The model has no loss of its own.
    """
    if not hasattr(model, "loss") or not hasattr(model, "yaml"):
        raise InputError(f"a {type(model).__name__} has no training loss of its own: give loss=, a function of both")

    given = getattr(model, "args", None) or {}
    if isinstance(given, dict):  # set as a trainer does: loss gains and number of classes
        model.args = get_cfg(overrides={key: value for key, value in given.items() if key in DEFAULT_CFG_DICT})
        model.nc = model.yaml["nc"]
    if getattr(model, "criterion", None) is None:  # None in a checkpoint, which 8.3.0 does not replace
        model.criterion = model.init_criterion()
    return model.loss(batch)[0].sum()
