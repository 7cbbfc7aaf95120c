"""What the swap of each activation site alone costs a trained network, and which few sites to keep."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from glob import escape
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtdetr_act.analysis.diagnosis import (
    Loss,
    check_scalar,
    compute_training_loss,
    copy_network,
    preserve_random_state,
    seed_all,
)
from rtdetr_act.errors import InputError, SelectionError, SpecError, TrainingError, quote
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result, Table, TableResult
from rtdetr_act.surgery.calibrate import move_to_model
from rtdetr_act.surgery.modules import evaluation_mode, unwrap
from rtdetr_act.surgery.patcher import PatchReport, apply_plan, resolve_plan
from rtdetr_act.surgery.plan import Plan, Scope
from rtdetr_act.surgery.refit import refit
from rtdetr_act.surgery.site_samples import SiteSample, sample_sites
from rtdetr_act.surgery.sites import Site, find_sites

BOUND = 0.01  # relative increase of the loss
MOST = 0.25  # share of the sites

Kind = Literal["section", "layer", "site"]
Score = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, repr=False)
class SwapCost(Result):
    """What it costs to swap one site, or all sites of a stage, and nothing else.

    Attributes:
        kind: "site", "layer" or "section".
        name: Qualified name of the site; for a stage "layer 3" or "backbone".
        layer: Index of the Ultralytics layer; None in other models and for a section.
        section: "backbone", "neck", "head" or "".
        sites: Number of sites swapped.
        cost: Relative increase of the loss by the swap, after the refit: 0.01 is one per cent.
        error: Its standard error over the batches; NaN for a single batch.
        change: Root mean square of the change of the loss over the batches, relative to the mean loss; sites are ranked
            by it.
        kept: Whether the proposed plan keeps the site; False for stages.
    """

    kind: Kind
    name: str
    layer: int | None
    section: str
    sites: int
    cost: float
    error: float
    change: float
    kept: bool = False

    def _summarise(self) -> str:
        """Return the name and the cost."""
        return f"{self.name}, {self.cost:+.2%}"


@dataclass(frozen=True, repr=False)
class PlanCost(Result):
    """What a plan costs that swaps all sites but some, after a refit of the whole network.

    Attributes:
        name: What the plan is.
        kept: Names of the sites that keep their activation.
        choice: Relative increase of the loss on the images that the plan was chosen on.
        cost: That on the other images.
        error: Standard error of `cost` over the batches; NaN for a single batch.
        scores: Scores on the other images, such as {"mAP50": …, "mAP50-95": …}; None if they were not measured.
    """

    name: str
    kept: tuple[str, ...]
    choice: float
    cost: float
    error: float
    scores: Mapping[str, float] | None = None

    def _summarise(self) -> str:
        """Return the name, the number of sites kept and the cost."""
        return f"{self.name}, {len(self.kept)} kept, {self.cost:+.2%}"


@dataclass(frozen=True, repr=False)
class Sensitivity(TableResult):
    """What swaps cost a network, and the plan that keeps the fewest sites.

    Attributes:
        activation: The activation swapped in, as it was given.
        sites: The cost of each site, in the order in which they run.
        stages: The cost of each section and of each layer, all of its sites swapped.
        plans: Nothing swapped, everything swapped, the proposed plan and, if that keeps any site, as many kept at the
            end of the network.
        trials: The plans measured in the choice of the proposed one, by the number of sites that they keep.
        bound: The largest increase of the loss allowed on the images of the choice.
        plan: The proposed plan, for `patch_model`.
    """

    activation: str
    sites: tuple[SwapCost, ...]
    stages: tuple[SwapCost, ...]
    plans: tuple[PlanCost, ...]
    trials: tuple[PlanCost, ...]
    bound: float
    plan: Plan

    @cached_property
    def proposal(self) -> PlanCost:
        """What the proposed plan costs."""
        return next(each for each in self.plans if each.name == PROPOSAL)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the sites that the proposed plan keeps, the one that changes the loss most first."""
        return self.proposal.kept

    @property
    def is_within_bound(self) -> bool:
        """Whether the proposed plan is within the bound on the images that it was chosen on."""
        return self.proposal.choice <= self.bound

    def _summarise(self) -> str:
        """Return the activation, and how many sites are kept."""
        return f"{self.activation}, {len(self.kept)} of {format_count(len(self.sites), 'site')} kept"

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as plain data, with the plan as `Plan.to_yaml` returns it."""
        return {**super().to_dict(), "plan": self.plan.to_yaml()}

    def _make_table(self) -> Table:
        """Return a row per section, layer and site."""
        return [field.name for field in fields(SwapCost)], map(astuple, (*self.stages, *self.sites))


NOTHING, EVERYTHING, PROPOSAL, AT_THE_END = "nothing swapped", "everything swapped", "proposed", "last ones kept"


def measure_sensitivity(
    model: Any,
    activation: str,
    images: Tensor | Sequence[Tensor],
    choosing: Sequence[Any],
    scoring: Sequence[Any],
    loss: Loss | None = None,
    *,
    scope: Scope = "conv",
    bound: float = BOUND,
    most: float = MOST,
    score: Score | None = None,
    show_progress: Callable[[str], object] | None = None,
) -> Sensitivity:
    """Measure what the swap of each site alone costs, and propose a plan that keeps the fewest sites.

    For each site, and for all sites of each layer and section, a copy of the network gets the new activation there and
    nowhere else, and is fitted by `refit`. Its cost is the relative increase of the loss on labelled images, in
    evaluation mode. Sites at which the swap would change nothing, such as a ReLU where `relu` is swapped in, do not
    count.

    Then the sites that change the loss most are kept, as few of them as are needed for the loss of the whole swap to be
    within a bound; their number is found by bisection, with a refit and a measurement of each plan. Sites are ranked by
    the root mean square of the change over the batches, since their cost is often less than its error: a swap that
    lowers the loss of some images and raises that of others is no gain. With 19 of 77 SiLUs of yolo11n kept and ReLU
    elsewhere, the loss on other images rises by 0.04 ± 0.07 % if ranked so, by 0.27 ± 0.10 % if ranked by cost, and by
    0.54 ± 0.21 % with the last 19; with none kept, by 1.60 ± 0.14 % (BCCD, 160 pixels).

    The model itself is not changed. There are as many refits as there are sites, layers and sections, and about ten.

    Args:
        model: RTDETR, YOLO, a task model or any torch.nn.Module that takes the images; trained.
        activation: An activation, or a plan such as "relu@backbone from=silu". Activations with parameters are fitted
            to those that they replace, as by `init="match"`.
        images: Images for `refit`, in its form: of the training split, without labels.
        choosing: Labelled batches that costs are measured on, and plans chosen, in the form that `loss` takes.
        scoring: Other labelled batches, on which the plans are scored.
        loss: Function of (model, batch) that returns a scalar tensor. Default: the training loss of an Ultralytics
            model.
        scope: "conv" (default) for convolutional sites, "all" for transformer sites too.
        bound: Largest relative increase of the loss. Default: 0.01.
        most: Largest share of the sites to keep, in 0..1; if that is too few for the bound, the proposed plan keeps
            as many. Default: 0.25.
        score: Function of a network that returns scores on the images of `scoring`; it must not change the network.
            Default: None, no scores.
        show_progress: Called with a text before each refit. Default: None.

    Raises:
        SpecError: The activation is unknown, or the plan, `bound` or `most` is invalid.
        SelectionError: The swap would change no site.
        ModelError: The model is exported, wrapped or compiled, or cannot be copied.
        InputError: There is no image or no labelled batch, or the loss is not a scalar.
        TrainingError: The loss of the network before the swap is not finite, or 0.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3))
    >>> batches = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    >>> def loss(network, batch):
    ...     return (network(batch) - net(batch)).square().mean() + 1
    >>> found = measure_sensitivity(net, "relu", torch.randn(8, 3, 16, 16), batches[:2], batches[2:], loss)
    >>> [site.name for site in found.sites]
    ['1', '3']
    """
    _check_share("bound", bound, BOUND)
    _check_share("most", most, MOST)
    if not len(images) or not len(images[0]):
        raise InputError("there is no image to refit the network on: give images of the training split")
    if not len(choosing) or not len(scoring):
        raise InputError("there are no labelled images: give batches to choose the plan on, and others to score it on")
    plan = resolve_plan(Plan.parse(activation, scope=scope, init="match"))
    with preserve_random_state():
        network = _TrainedNetwork(model, plan, images, loss or compute_training_loss, choosing, scoring)
        show = show_progress or (lambda text: None)
        sites = [network.measure_alone("site", site.name, [site], show) for site in network.sites]
        stages = [network.measure_alone(*stage, show) for stage in _list_stages(network.sites)]
        ranked = [site.name for site in sorted(sites, key=lambda site: -site.change)]
        trials = _choose(lambda count: network.measure_plan(ranked[:count], show), bound, int(most * len(ranked)))
        chosen = next((each for each in trials if each.choice <= bound), trials[-1])
        candidates: dict[str, Sequence[str]] = {NOTHING: ranked, EVERYTHING: (), PROPOSAL: chosen.kept}
        if chosen.kept:
            candidates[AT_THE_END] = [site.name for site in sites[-len(chosen.kept) :]]
        plans = [replace(network.measure_plan(kept, show, score), name=name) for name, kept in candidates.items()]
    return Sensitivity(
        activation,
        tuple(replace(site, kept=site.name in chosen.kept) for site in sites),
        tuple(stages),
        tuple(plans),
        tuple(trials),
        bound,
        network.plan_keeping(chosen.kept),
    )


def _check_share(name: str, value: object, example: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise SpecError(f"{name} is a share from 0 to 1 such as {example}, not {quote(value)}")


def _choose(measure: Callable[[int], PlanCost], bound: float, most: int) -> list[PlanCost]:
    """Measure plans in a search for the fewest sites to keep, and return them by that number.

    Args:
        measure: Returns what it costs to keep so many sites.
        bound: The largest cost.
        most: The largest number of sites.
    """
    trials = {0: measure(0)}
    low, high = 0, most
    if trials[0].choice > bound and most:
        trials[most] = measure(most)
    while high - low > 1 and trials[0].choice > bound >= trials[most].choice:
        middle = (low + high) // 2
        trials[middle] = measure(middle)
        low, high = (low, middle) if trials[middle].choice <= bound else (middle, high)
    return [trials[count] for count in sorted(trials)]


def _list_stages(sites: Sequence[Site]) -> list[tuple[Kind, str, list[Site]]]:
    """Return the sections and the layers: kind, name and sites of each; none for networks without them."""
    sections = dict.fromkeys(site.section for site in sites if site.section)
    layers = sorted({site.layer for site in sites if site.layer is not None})
    return [
        *(("section", section, [site for site in sites if site.section == section]) for section in sections),
        *(("layer", f"layer {layer}", [site for site in sites if site.layer == layer]) for layer in layers),
    ]


class _TrainedNetwork:
    """A network, and what it costs to swap some of its sites.

    Attributes:
        sites: The sites that the plan changes, in the order of their first call.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        images: Tensor | Sequence[Tensor],
        loss: Loss,
        choosing: Sequence[Any],
        scoring: Sequence[Any],
    ) -> None:
        self._original = copy_network(unwrap(model), "sensitivity is measured in copies")
        self._plan = plan
        self._images = [images] if isinstance(images, Tensor) else images
        self._example = move_to_model(self._original, self._images[0][:1])
        self._all = find_sites(self._original, self._example)
        self.sites = self._find_changed_sites()
        self._choosing = _Comparison(self._original, choosing, loss)
        self._scoring = _Comparison(self._original, scoring, loss)

    def _find_changed_sites(self) -> list[Site]:
        """Return the sites at which the plan changes what is computed."""
        selected = {site.name: site for site in self._all if self._plan.find_rule(site)}
        if not selected:
            raise SelectionError(f"there is nothing to swap: no activation of the model is selected by {self._plan}")
        samples = sample_sites(self._original, selected, self._example)
        _, report = self._patch(self._plan)
        swapped = {swap.site.name: swap.site.module for swap in report.swaps}
        found = [selected[name] for name, sample in samples.items() if _differs(swapped[name], sample)]
        if not found:
            raise SelectionError(f"there is nothing to swap: the model computes {self._plan} already")
        return found

    def plan_keeping(self, kept: Iterable[str]) -> Plan:
        """Return the plan without some sites, by name."""
        exclude = tuple(map(escape, kept))
        rules = (replace(rule, exclude=(*rule.exclude, *exclude)) for rule in self._plan.rules)
        # A rule that selects no site is an error where the plan is applied.
        return replace(self._plan, rules=tuple(r for r in rules if any(map(r.selects, self._all))))

    def measure_alone(self, kind: Kind, name: str, sites: Sequence[Site], show: Callable[[str], object]) -> SwapCost:
        """Return what it costs to swap a site, or those of a stage, and nothing else."""
        show(name)
        swapped = {site.name for site in sites}
        network = self._swap([site.name for site in self.sites if site.name not in swapped])
        layer = None if kind == "section" else sites[0].layer
        return SwapCost(kind, name, layer, sites[0].section, len(sites), *self._choosing.compare(network))

    def measure_plan(self, kept: Sequence[str], show: Callable[[str], object], score: Score | None = None) -> PlanCost:
        """Return what it costs to swap all sites but some."""
        show(f"{len(kept)} of {len(self.sites)} sites kept")
        network = self._swap(kept) if len(kept) < len(self.sites) else self._original
        choice, *_ = self._choosing.compare(network)
        cost, error, _ = self._scoring.compare(network)
        return PlanCost(f"{len(kept)} kept", tuple(kept), choice, cost, error, score(network) if score else None)

    def _swap(self, kept: Collection[str]) -> nn.Module:
        """Return a copy of the network that is swapped but for some sites, and fitted."""
        network, _ = self._patch(self.plan_keeping(kept))
        refit(network, self._images, self._original)
        return network

    def _patch(self, plan: Plan) -> tuple[nn.Module, PatchReport]:
        network = copy.deepcopy(self._original)
        return network, apply_plan(network, plan, example_input=self._example)


@torch.no_grad()
def _differs(activation: nn.Module, sample: SiteSample) -> bool:
    """Return whether an activation returns something else than the one sampled for the same input."""
    output = activation.eval()(sample.inputs.clone())
    return output.shape != sample.outputs.shape or not torch.allclose(output, sample.outputs)


class _Comparison:
    """The loss of networks on some batches, relative to that of the network before the swap."""

    def __init__(self, original: nn.Module, batches: Sequence[Any], loss: Loss) -> None:
        self._batches, self._loss = batches, loss
        self._before = self._measure(original)
        total = float(self._before.sum())
        if not 0 < total < math.inf:
            raise TrainingError(
                f"the loss of the model is {total:g}, and a cost is relative to it: it must be positive"
            )

    def compare(self, network: nn.Module) -> tuple[float, float, float]:
        """Return `cost`, `error` and `change` of a network, as in `SwapCost`."""
        after, before, count = self._measure(network), self._before, len(self._before)
        ratio = float(after.sum() / before.sum())
        if not math.isfinite(ratio):
            return math.inf, math.nan, math.inf
        change = float((after - before).square().mean().sqrt() / before.mean())
        # The standard error of a ratio of sums over the same batches.
        spread = float((after - ratio * before).std()) if count > 1 else math.nan
        return ratio - 1, spread * math.sqrt(count) / float(before.sum()), change

    @torch.no_grad()
    def _measure(self, network: nn.Module) -> Tensor:
        """Return the loss of each batch."""
        losses = []
        with evaluation_mode(network):
            for seed, batch in enumerate(self._batches):
                seed_all(seed)  # for a loss that draws random numbers
                losses.append(float(check_scalar(self._loss(network, batch))))
        return torch.tensor(losses, dtype=torch.float64)
