"""Fold activations away: the same network in evaluation, with torch's own activations and scaled weights."""

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
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery import scales
from rtdetr_act.surgery.model_plan import read_plan
from rtdetr_act.surgery.modules import evaluation_mode, get_example_inputs, get_named_tensors, unwrap
from rtdetr_act.surgery.patcher import patch_model
from rtdetr_act.surgery.plan import Plan, Rule
from rtdetr_act.surgery.sites import find_sites

# Of the outputs' difference, in float64: a right fold of rtdetr-x leaves 1e-13. A model that casts to a narrower type
# inside is granted as many of that type's roundings.
_TOLERANCE, _ROUNDINGS = 1e-8, 100


@dataclass(frozen=True)
class Fold:
    """One activation that was folded.

    Attributes:
        site: Qualified name of the site.
        before: What stood there, such as "arelu".
        after: The activation of torch that stands there now.
        into: The weights its factor went into: those "before" it, "behind" it, "on both sides", "" where it had none.
    """

    site: str
    before: str
    after: str
    into: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold_activations` did.

    Attributes:
        folds: One entry per folded activation, in module order.
        kept: Activations that kept their factor, by site, with the reason.
        changed: Names of the parameters and buffers that were multiplied.
        needs: Classes of rtdetr_act that are left in the model: loading its checkpoint takes rtdetr_act. Empty where
            Ultralytics or torch alone will do.
        error: Largest difference between the outputs before and after, in units of the largest output; in float64.
    """

    folds: tuple[Fold, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    error: float = 0.0

    def __len__(self) -> int:
        """Return the number of folded activations."""
        return len(self.folds)

    def __str__(self) -> str:
        """Return a table of what became what, and what is left."""
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
    """Replace activations by those of torch that compute the same in evaluation, in place.

    AReLU becomes LeakyReLU, its positive slope a factor of the weights before it; where these cannot take it (no layer
    stands there, or others read it), of the weights behind it; through skip connections, concatenations, pooling and
    functional calls alike. PReLU with one slope and RReLU become LeakyReLU, ACON-C and AGLU that are SiLU become
    SiLU. What no weight can take up stays, and the report says why.

    The fold is found and checked on a copy in float64, on random input; the model is touched only if its outputs stay
    the same. An Ultralytics model carries the new activations in `model.yaml`. It cannot be undone.

    Args:
        model: RTDETR, YOLO, an Ultralytics task model, or any torch.nn.Module.
        example_input: A tensor, or a tuple of positional arguments, to call the model with; (2, C, 224, 224) if None.

    Returns:
        The report; `len(report)` is the number of folded activations, 0 where there was nothing to fold.

    Raises:
        FoldError: The model cannot be run on the input, or the folded copy gave other outputs; nothing was changed.
        ModelError: The model is exported, wrapped or compiled.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> len(patch_model(net, "arelu")), len(fold_activations(net)), type(net[1]).__name__
    (1, 1, 'LeakyReLU')
    """
    root = unwrap(model)
    if any(parameter.is_meta for parameter in root.parameters()):
        raise FoldError("the model is on the device 'meta' and has no weights to scale: load it first")
    with _running("the model"):
        sites = find_sites(root, example_input)
    forms = {site.name: form for site in sites if (form := _folded(site.module))}
    if not forms:
        return FoldReport(needs=own_classes_in(root))
    factors = {name: form.scale for name, form in forms.items() if form.scale != 1}
    trial = deepcopy(root).cpu().double()
    inputs = _draw_inputs(trial, example_input)
    before = _run(trial, inputs)
    if not before:
        raise FoldError(f"{type(root).__name__} returns no tensors, so a fold cannot be checked: nothing was changed")
    flow = scales.record(trial, factors, inputs)
    solution = scales.solve(flow, factors)
    taken = {name: form for name, form in forms.items() if name not in solution.kept}
    if not taken:
        return FoldReport(kept=solution.kept, needs=own_classes_in(root))
    _apply(trial, taken, solution.factors, inputs)
    error = _difference(before, _run(trial, inputs))
    if not error < max(_TOLERANCE, _ROUNDINGS * flow.rounding):
        raise FoldError(
            f"the folded model gave other outputs (by {error:.1e} of the largest), so nothing was changed: one of its "
            "blocks is random in evaluation, not finite, or computes where torch.overrides does not see it"
        )
    _apply(root, taken, solution.factors, example_input)
    folds = [
        Fold(site.name, site.current, str(taken[site.name].activation), _into(*solution.sides.get(site.name, (1, 1))))
        for site in sites
        if site.name in taken
    ]
    return FoldReport(tuple(folds), solution.kept, tuple(sorted(solution.factors)), own_classes_in(root), error)


def _folded(activation: Any) -> Folded | None:
    """Return what an activation equals in evaluation, None where there is nothing but itself."""
    entry = find_entry(activation)
    return entry.fold(activation) if entry and entry.fold else None


def own_classes_in(model: nn.Module) -> tuple[str, ...]:
    """Return the classes of this package that a model's modules have, without which its checkpoint does not load."""
    return tuple(sorted({type(m).__name__ for m in model.modules() if type(m).__module__.startswith("rtdetr_act.")}))


def _draw_inputs(trial: nn.Module, example_input: Any) -> tuple[Any, ...]:
    inputs = get_example_inputs(trial, example_input)
    if inputs is None:
        raise FoldError("folding runs the model once, and this one does not take an image: give example_input=")
    random = torch.Generator().manual_seed(0)
    drawn = [x.cpu().double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    if example_input is None:
        drawn = [torch.randn((2, *x.shape[1:]), generator=random, dtype=torch.float64) for x in drawn]
    return tuple(drawn)


def _run(trial: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with _running("it in float64"), evaluation_mode(trial), torch.no_grad():
        return scales.flatten_tensors(trial(*inputs))


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Turn whatever a model's forward pass raises into a sentence."""
    try:
        yield
    except RtdetrActError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise FoldError(
            f"folding runs {what}, which failed ({type(error).__name__}: {reason}): give an example_input that it takes"
        ) from error


def _apply(root: nn.Module, forms: Mapping[str, Folded], factors: Mapping[str, float], example_input: Any) -> None:
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


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference, in units of the largest value of its tensor; infinite where infinities differ."""
    found = [0.0]
    for one, other in zip(before, after, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        off = torch.where(same, 0, (one - other).abs().double())
        size = one[one.isfinite()].abs().max().item() if one.isfinite().any() else 1.0
        found.append((off.max() if off.numel() else off.sum()).nan_to_num(float("inf")).item() / (size or 1.0))
    return max(found)


def _into(before: float, behind: float) -> str:
    if before != 1 and behind != 1:
        return "on both sides"
    return "before" if before != 1 else "behind" if behind != 1 else ""
