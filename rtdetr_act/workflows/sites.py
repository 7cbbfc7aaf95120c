"""List the activation sites of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rtdetr_act.formatting import format_count
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.results import Table, TableResult
from rtdetr_act.surgery.coverage import Coverage, measure_coverage
from rtdetr_act.surgery.functional_calls import find_unreachable_calls
from rtdetr_act.surgery.modules import unwrap
from rtdetr_act.surgery.patcher import PatchReport, patch_model
from rtdetr_act.surgery.plan import Scope, check_scope
from rtdetr_act.surgery.sites import Site, find_sites


@dataclass(frozen=True, repr=False)
class SiteListing(TableResult):
    """The activation sites of a model.

    Attributes:
        sites: All sites as they were before the swap, in module order.
        report: Report of the swap; None without a plan.
        unreachable: Functional activations that no swap can reach; empty with a plan, whose report names them.
        coverage: How many activations run, are swapped, left and not reached; None if it was not counted.
    """

    sites: tuple[Site, ...]
    report: PatchReport | None = None
    unreachable: tuple[str, ...] = ()
    coverage: Coverage | None = None

    def _summarise(self) -> str:
        """Return the numbers of sites and of swapped ones."""
        swapped = f", {len(self.report)} swapped" if self.report else ""
        return format_count(len(self.sites), "site") + swapped

    def _make_table(self) -> Table:
        """Return a row per site: of a swapped one what stands there before and after, of others `after` is unknown."""
        after = {swap.site.name: swap.after for swap in self.report.swaps} if self.report else {}
        columns = ("site", "layer", "section", "owner", "channels", "layout", "before", "after")
        return columns, (
            (
                site.name,
                site.layer,
                site.section,
                site.owner_class,
                site.channels,
                site.layout,
                site.current,
                after.get(site.name),
            )
            for site in self.sites
        )


def list_sites(
    source: str | Path,
    activation: str | None = None,
    *,
    scope: Scope = "conv",
    replaces: str | Iterable[str] | None = None,
    verify: bool = False,
) -> SiteListing:
    """List the activation sites of a model and, with a plan, what it would change there; no file is written.

    Args:
        source: Model YAML or checkpoint.
        activation: Activation or plan, as `patch_model` takes it; None to list the sites only.
        scope: "conv" for convolutional sites, "all" to swap at transformer sites too. All sites are listed with both.
        replaces: Name(s) of activations: swap only at sites that hold one of them. Default: None.
        verify: Count the activations that run in a forward pass, too. Default: False.

    Raises:
        InputError: The model file does not exist or is not a model YAML.
        ModelError: The file is not a checkpoint, or the model cannot be patched.
        SpecError: The plan or the scope cannot be understood.
        SelectionError: The plan matches no site, or its activation cannot stand at one of its sites.
    """
    check_scope(scope)
    model = load_model(source)
    sites = tuple(find_sites(model))
    if activation is None:
        coverage = measure_coverage(model) if verify else None
        return SiteListing(sites, None, tuple(find_unreachable_calls(unwrap(model))), coverage)
    report = patch_model(model, activation, scope=scope, replaces=replaces)
    return SiteListing(sites, report, coverage=report.coverage if verify else None)
