"""Fold activations: replace them by equivalent activations of torch, with their factors folded into weights."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_act.activations.placed import get_placement, set_placement
from rtdetr_act.activations.protocol import Folded
from rtdetr_act.activations.registry import find_entry
from rtdetr_act.errors import FoldError, RtdetrActError
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Table, TableResult
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery import scales
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.modules import evaluation_mode, get_example_inputs, get_named_tensors, unwrap
from rtdetr_act.surgery.patcher import patch_model
from rtdetr_act.surgery.plan import Plan, Rule
from rtdetr_act.surgery.rewiring import is_rewired
from rtdetr_act.surgery.sites import find_sites

# Tolerance of the outputs' relative difference in float64: a correct fold of rtdetr-x leaves 1e-13. For a model that
# casts to a narrower dtype, it is that many times the dtype's rounding error instead.
_TOLERANCE, _ROUNDINGS = 1e-8, 100


@dataclass(frozen=True)
class Fold:
    """One activation that was folded.

    Attributes:
        site: Qualified name of the site.
        before: The original activation, such as "arelu".
        after: The spec of the activation of torch that replaces it.
        into: The weights that its factor was folded into: "before", "behind" or "on both sides"; "" without a factor.
    """

    site: str
    before: str
    after: str
    into: str


@dataclass(frozen=True, repr=False)
class FoldReport(TableResult):
    """The result of `fold_activations`.

    Attributes:
        folds: One entry per folded activation, in module order.
        kept: Activations that could not be folded, by site, with the reason.
        changed: Names of the parameters and buffers that were multiplied.
        needs: Classes of rtdetr_act that remain in the model, so that loading its checkpoint requires rtdetr_act. Empty
            if Ultralytics or torch alone is sufficient.
        error: Largest difference between the outputs before and after, relative to the largest output, in float64.
    """

    folds: tuple[Fold, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    error: float = 0.0

    def __len__(self) -> int:
        """Return the number of folded activations."""
        return len(self.folds)

    def _summarise(self) -> str:
        """Return the numbers of folded and of kept activations."""
        return f"{format_count(len(self), 'activation')} folded, {len(self.kept)} kept"

    def _make_table(self) -> Table:
        """Return a row per folded activation, and per kept one a row with the reason only."""
        folded = [(fold.site, fold.before, fold.after, fold.into, None) for fold in self.folds]
        kept = [(site, None, None, None, reason) for site, reason in self.kept.items()]
        return ("site", "before", "after", "into", "kept_because"), [*folded, *kept]

    def __str__(self) -> str:
        """Return a table of the folded and the kept activations."""
        groups = Counter((fold.before, fold.after.partition("(")[0], fold.into) for fold in self.folds)
        lines = [
            f"{count:4} {before} -> {after}{f', its factor into the weights {into}' if into else ''}"
            for (before, after, into), count in groups.items()
        ]
        lines += [f"     {site} keeps its factor: {reason}" for site, reason in self.kept.items()]
        total = f"{len(self)} activations folded, {len(self.kept)} kept, {len(self.changed)} tensors scaled"
        checked = f"; outputs differ by {self.error:.0e} (float64, random input)" if self.folds else ""
        needs = f"rtdetr_act ({', '.join(self.needs)})" if self.needs else "torch's own activations only"
        return "\n".join([*lines, total + checked, f"loading it takes {needs}" if self.needs else f"it holds {needs}"])


def fold_activations(model: Any, example_input: Any = None) -> FoldReport:
    """Replace activations by activations of torch that are equivalent in evaluation mode, in place.

    AReLU becomes LeakyReLU, and its positive slope is folded into the weights before it, or into those after it if the
    former is impossible because there is no layer or its output has other consumers. This works through skip
    connections, concatenations, pooling and functional calls. PReLU with one slope and RReLU become LeakyReLU; ACON-C,
    AGLU and Swish become SiLU if their parameters make them SiLU. An activation whose factor cannot be folded is kept,
    and the report gives the reason.

    The fold is computed and verified on a copy in float64 with random inputs. The model is changed only if the outputs
    agree. For an Ultralytics model the new activations are stored in `model.yaml`. A fold cannot be undone.

    Args:
        model: RTDETR, YOLO, an Ultralytics task model, or any torch.nn.Module.
        example_input: A tensor or a tuple of positional arguments to call the model with. Default: None, random inputs
            (2, C, 224, 224), or (2, C, 4096) or (2, C, 16, 64, 64) if the first convolution is a `Conv1d` or a
            `Conv3d`.

    Returns:
        The report; `len(report)` is the number of folded activations.

    Raises:
        FoldError: The model cannot be run on the input, or the outputs of the folded copy differ. Nothing is changed.
        ModelError: The model is exported, wrapped or compiled.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> len(patch_model(net, "arelu")), len(fold_activations(net)), type(net[1]).__name__
    (1, 1, 'LeakyReLU')
    """
    root = unwrap(model)
    if any(parameter.is_meta for parameter in root.parameters()):
        raise FoldError("the model is on the device 'meta' and has no weights to scale: load it first")
    with _convert_errors("the model"):
        sites = find_sites(root, example_input)
    forms = {site.name: form for site in sites if (form := _get_folded_form(site.module))}
    if not forms:
        return FoldReport(needs=find_package_classes(root))
    factors = {name: form.scale for name, form in forms.items() if form.scale != 1}
    trial = deepcopy(root).cpu().double()
    inputs = _draw_inputs(trial, example_input)
    before = _run_model(trial, inputs)
    if not before:
        raise FoldError(f"{type(root).__name__} returns no tensors, so a fold cannot be checked: nothing was changed")
    flow = scales.record(trial, factors, inputs)
    solution = scales.solve(flow, factors)
    taken = {name: form for name, form in forms.items() if name not in solution.kept}
    if not taken:
        return FoldReport(kept=solution.kept, needs=find_package_classes(root))
    _apply_fold(trial, taken, solution.factors, inputs)
    error = _compare_outputs(before, _run_model(trial, inputs))
    if not error < max(_TOLERANCE, _ROUNDINGS * flow.rounding):
        raise FoldError(
            f"the folded model gave other outputs (by {error:.1e} of the largest), so nothing was changed: one of its "
            "blocks is random in evaluation, not finite, or computes where torch.overrides does not see it"
        )
    _apply_fold(root, taken, solution.factors, example_input)
    folds = [
        Fold(
            site.name,
            site.current,
            str(taken[site.name].activation),
            _describe_sides(*solution.sides.get(site.name, (1, 1))),
        )
        for site in sites
        if site.name in taken
    ]
    return FoldReport(tuple(folds), solution.kept, tuple(sorted(solution.factors)), find_package_classes(root), error)


def _get_folded_form(activation: Any) -> Folded | None:
    """Return the equivalent of an activation in evaluation mode, None if torch has none."""
    entry = find_entry(activation)
    return entry.fold(activation) if entry and entry.fold else None


def find_package_classes(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes among a model's modules for which its checkpoint requires this package."""
    needed = (m for m in model.modules() if type(m).__module__.startswith("rtdetr_act.") or is_rewired(m))
    return tuple(sorted({type(m).__name__ for m in needed}))


def _draw_inputs(trial: nn.Module, example_input: Any) -> tuple[Any, ...]:
    """Return random float64 inputs for a model."""
    inputs = get_example_inputs(trial, example_input)
    if inputs is None:
        raise FoldError("folding runs the model once, and this one does not take an image: give example_input=")
    random = torch.Generator().manual_seed(0)
    drawn = [x.cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    if example_input is None:
        drawn = [torch.randn((2, *x.shape[1:]), generator=random, dtype=torch.float64) for x in drawn]
    return tuple(drawn)


def _run_model(trial: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Run a model in evaluation mode, and return its output tensors."""
    with _convert_errors("it in float64"), evaluation_mode(trial), torch.no_grad():
        return scales.flatten_tensors(trial(*inputs))


@contextmanager
def _convert_errors(what: str) -> Iterator[None]:
    """Convert exceptions of a forward pass inside the block to FoldError."""
    try:
        yield
    except RtdetrActError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise FoldError(
            f"folding runs {what}, which failed ({type(error).__name__}: {reason}): give an example_input that it takes"
        ) from error


def _apply_fold(root: nn.Module, forms: Mapping[str, Folded], factors: Mapping[str, float], example_input: Any) -> None:
    """Replace activations and multiply weights, in place."""
    names: dict[ActSpec, list[str]] = {}
    for name, form in forms.items():
        names.setdefault(form.activation, []).append(glob.escape(name))
    rules = [Rule(spec, include=tuple(found), scope="all") for spec, found in names.items()]
    patch_model(root, Plan(tuple(rules), act_lr=read_plan(root).act_lr), example_input=example_input)
    for name, form in forms.items():
        module = root.get_submodule(name)
        if form.scale != 1 and (placed := get_placement(module)):
            set_placement(module, replace(placed, folded=True))
    tensors = get_named_tensors(root)
    for name, factor in factors.items():
        t = tensors[name]
        t.data = (t.detach().to("cpu", torch.float64) * factor).to(t.device, t.dtype)


def _compare_outputs(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference relative to the largest value of its tensor; inf if only one of both is finite."""
    found = [0.0]
    for one, other in zip(before, after, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        off = torch.where(same, 0, (one - other).abs().double())
        size = one[one.isfinite()].abs().max().item() if one.isfinite().any() else 1.0
        found.append((off.max() if off.numel() else off.sum()).nan_to_num(float("inf")).item() / (size or 1.0))
    return max(found)


def _describe_sides(before: float, behind: float) -> str:
    """Return which weights absorbed a factor, given the scales before and after an activation."""
    if before != 1 and behind != 1:
        return "on both sides"
    return "before" if before != 1 else "behind" if behind != 1 else ""
