"""Examine a model: which activations are really in it, and whether they survive the next training."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtdetr_act.activations import registry
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.analysis.history import HISTORY_FILE, get_initial_values, read_history
from rtdetr_act.analysis.inventory import (
    Difference,
    Learnable,
    compare_sites,
    count_activations,
    has_parameters,
    label_activations,
    read_learnable,
)
from rtdetr_act.analysis.learned import read_quantities
from rtdetr_act.deploy.fold import fold_activations
from rtdetr_act.errors import InputError, ModelError, RtdetrActError, quote
from rtdetr_act.formatting import join_words
from rtdetr_act.integrations.ultralytics.checkpoints import find_needed_packages
from rtdetr_act.integrations.ultralytics.downloads import no_downloads
from rtdetr_act.integrations.ultralytics.export import list_exports
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.integrations.ultralytics.optimizer import find_decayed_parameters
from rtdetr_act.integrations.ultralytics.rebuilding import Rebuilt, find_edited_defaults, rebuild
from rtdetr_act.integrations.ultralytics.run_folders import find_checkpoints, name_checkpoints
from rtdetr_act.surgery.carried_plan import plan_of
from rtdetr_act.surgery.functional_calls import find_unreachable_calls
from rtdetr_act.surgery.model_plan import is_task_model, read_plan
from rtdetr_act.surgery.patcher import KINDS
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.sites import Site, collect_sites, iterate_placed_convolutions
from rtdetr_act.workflows.examination import Examination, Folding, count_of, name_some, summarise_differences

if TYPE_CHECKING:
    import polars


@dataclass(frozen=True)
class _Network:
    """The network of a file beside what its `model.yaml` builds.

    Attributes:
        path: The file.
        model: RTDETR or YOLO object.
        sites: Sites of activations.
        plan: The plan of `model.yaml`.
        rebuilt: What `model.yaml` builds; None if it cannot be built.
        failure: Why it cannot be built; "" if it can.
        differences: The sites at which both differ.
        history: The record of the activations in the run folder of a checkpoint; None if there is none.
    """

    path: str
    model: Any
    sites: tuple[Site, ...]
    plan: Plan
    rebuilt: Rebuilt | None
    failure: str
    differences: tuple[Difference, ...]
    history: polars.DataFrame | None

    @property
    def is_checkpoint(self) -> bool:
        """Whether the file is a checkpoint, not a model YAML."""
        return self.path.endswith(".pt")

    @property
    def root(self) -> nn.Module:
        """The task model."""
        root: nn.Module = self.model.model
        return root

    @property
    def saved(self) -> Mapping[str, Any]:
        """What else the checkpoint holds: arguments and results of the training."""
        return getattr(self.model, "ckpt", None) or {}

    @property
    def is_stock(self) -> bool:
        """Whether `model.yaml` has no plan and builds this very network."""
        return not self.plan and not self.differences and not self.failure


def examine(source: str | Path) -> Examination:
    """Examine a model: which activations it holds, whether training keeps them, what they learned, what it exports to.

    The network is compared with what its `model.yaml` builds, since that is what the next training starts from. Nothing
    is downloaded, trained or written.

    Args:
        source: A checkpoint, a model YAML, or a run folder, whose best.pt is examined.

    Returns:
        The examination: `print` shows it, `healthy` says whether nothing is wrong, `to_dict()` returns plain data.

    Raises:
        InputError: The file does not exist, or the folder does not hold exactly one run.
        ModelError: The file is not a checkpoint of Ultralytics, or holds a class that is not installed.
        SpecError: The model YAML is wrong.

    >>> found = examine("rtdetr-n.yaml")
    >>> found.healthy, found.swapped
    (True, 0)
    """
    with no_downloads():
        network = _open(_find_file(str(source)))
        formats = list_exports(network.model)
        lost = _describe_loss(network) if network.is_stock and network.is_checkpoint else ""
    learnable = _read_learnable(network)
    decayed = find_decayed_parameters(network.root)
    parameters = {id(p): p for site in network.sites if has_parameters(site) for p in site.module.parameters()}
    trained = _describe_training(network.saved)
    problems = [
        *_find_problems(network, learnable),
        *filter(None, [lost]),
        *_find_problems_of_learning(network, learnable),
    ]
    return Examination(
        source=network.path,
        network=type(network.root).__name__,
        task=str(network.model.task),
        training=trained,
        holdings=count_activations(network.sites),
        unreachable=tuple(find_unreachable_calls(network.root)),
        plan=str(network.plan),
        default_act=network.plan.default_act or "",
        swapped=len(_find_swapped(network)),
        convolutions=sum(1 for _ in iterate_placed_convolutions(network.root)),
        failure=network.failure,
        differences=network.differences,
        learnable=learnable,
        decayed=sum(parameter.numel() for key, parameter in parameters.items() if key in decayed),
        needs=find_needed_packages(network.path) if network.is_checkpoint else {},
        trains_without=network.is_stock,
        formats=formats,
        folding=_fold(network),
        problems=tuple(problems),
        notes=tuple(_find_notes(network)),
        verdict=problems[0] if problems else _describe_health(network, learnable, bool(trained)),
    )


def _find_file(source: str) -> str:
    """Return the file to examine: the source itself, or the checkpoint of the only run in a folder."""
    if not Path(source).is_dir():
        return source
    found = find_checkpoints(Path(source))
    if len(found) > 1:
        raise InputError(f"there are {len(found)} runs in {quote(source)}: name one of them, such as '{found[0]}'")
    return str(found[0])


def _open(path: str) -> _Network:
    """Load a model, and compare it with what its `model.yaml` builds."""
    try:
        model = load_model(path)
    except RtdetrActError as error:
        if weights := _describe_weights(path):
            raise ModelError(weights) from error
        raise
    root = model.model
    if not is_task_model(root):
        raise ModelError(
            f"{quote(path)} holds a {type(root).__name__} without a model.yaml, which no training can rebuild"
        )
    rebuilt, failure = None, ""
    try:
        rebuilt = rebuild(root)
    except RtdetrActError as error:  # such as an activation that was registered in a script
        failure = str(error)
    sites = collect_sites(root, "", root.yaml, KINDS)
    differences = compare_sites(root, sites, rebuilt.network, rebuilt.sites) if rebuilt else ()
    activations = tuple(site for site in sites if site.replaces == "activation")
    return _Network(path, model, activations, read_plan(root), rebuilt, failure, differences, _read_history(path))


def _describe_weights(path: str) -> str:
    """Return which networks the state dicts in a checkpoint of another training loop are of; "" if of stock ones."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # it is no file of torch, or holds more than weights
        return ""
    found, patched = [], False
    for name, value in {"": held, **(held if isinstance(held, Mapping) else {})}.items():
        if getattr(value, "_metadata", None):
            plan = plan_of(value)
            patched = patched or bool(plan)
            network = f"one with {quote(str(plan))}" if plan else "a stock one"
            found.append(f"{quote(name) if name else 'they'} of {network}")
    if not patched:
        return ""
    return (
        f"{quote(path)} holds weights without their network, {join_words(found)}: "
        "rtdetr_act.patch_model(model, rtdetr_act.plan_of(state_dict)) builds it"
    )


def _read_history(path: str) -> polars.DataFrame | None:
    """Return the record of the activations in the run folder of a checkpoint, None if there is none to be read."""
    folder = Path(path).absolute().parent
    file = folder.parent / HISTORY_FILE
    try:
        return read_history(file) if folder.name == "weights" and file.is_file() else None
    except InputError:  # a damaged one tells nothing; `learned` says what is wrong with it
        return None


def _find_swapped(network: _Network) -> list[Site]:
    """Return the sites that hold an activation of a plan."""
    return [site for site in network.sites if get_placement(site.module)]


def _describe_training(saved: Mapping[str, Any]) -> str:
    """Return what a checkpoint tells of its training, such as "3 epochs on coco8.yaml"; "" if it was not trained."""
    arguments = saved.get("train_args")
    if not isinstance(arguments, Mapping) or not arguments:  # as `model.save` writes an untrained model
        return ""
    results = saved.get("train_results")
    columns = {str(name).strip(): values for name, values in results.items()} if isinstance(results, Mapping) else {}
    epochs = columns.get("epoch")
    length = f"{count_of(len(epochs), 'epoch')}" if isinstance(epochs, (list, tuple)) else "trained"
    data = arguments.get("data")
    return f"{length} on {Path(data).name}" if isinstance(data, str) and data else length


def _read_learnable(network: _Network) -> Learnable:
    """Read the learnable parameters, with their start as `model.yaml` or the record of the run gives it."""
    starts = {site.name: site.module for site in network.rebuilt.sites} if network.rebuilt else {}
    moved: set[str] = set()
    if network.history is not None:
        start = get_initial_values(network.history)
        for each in read_quantities(network.root):
            if not math.isclose(each.value, start.get((each.site, each.name), each.value), rel_tol=2e-3, abs_tol=1e-6):
                moved.add(each.site)
    return read_learnable(network.sites, starts, moved)


def _find_problems(network: _Network, learnable: Learnable) -> list[str]:
    """Return what is wrong with the network and its `model.yaml`."""
    found = []
    if network.failure:
        found.append(f"no training can go on from this file: {network.failure}")
    if network.differences and network.plan:
        found.append(
            f"model.yaml and the network disagree: {summarise_differences(network.differences)}; the next training "
            "builds what model.yaml says"
        )
    elif network.differences:
        found.append(_describe_uncarried(network))
    for names in learnable.shared:
        held = next(type(site.module).__name__ for site in network.sites if site.name == names[0])
        found.append(f"one {held} is shared by {name_some(names)}, which cannot learn apart")
    return found


def _describe_uncarried(network: _Network) -> str:
    """Describe a swap that the network holds and `model.yaml` does not."""
    assert network.rebuilt is not None
    changed = summarise_differences(network.differences)
    total = len(network.sites)
    default = {each.site for each in network.differences} <= network.rebuilt.default_sites
    if default and len({each.held for each in network.differences}) == 1:
        here = "; ".join(find_edited_defaults())
        where = f"another installation than this one ({here})" if here else "the next training"
        built = network.differences[0].built
        return (
            f"default_act reached {len(network.differences)} of {total} sites ({changed}) and is not in model.yaml: "
            f"{where} builds {built} there"
        )
    return (
        f"the swap at {len(network.differences)} of {total} sites ({changed}) is not in model.yaml: the next training "
        "builds the network without it"
    )


def _describe_loss(network: _Network) -> str:
    """Return why a stock network should hold a swap, "" if nothing says so.

    A training builds its network from `model.yaml`, so that a swap made in Python without this package is lost, and
    nothing in the checkpoint tells. What it started from, the record beside it and the name of its run may.
    """
    arguments = network.saved.get("train_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    start = "the swap was lost: the network is stock although"
    if found := _find_swap_at_start(network, str(arguments.get("model"))):
        return f"{start} {found}"
    if network.history is not None:
        names, sites = network.history["activation"].unique().to_list(), network.history["site"].n_unique()
        return f"{start} {HISTORY_FILE} beside it records {', '.join(sorted(names))} at {count_of(sites, 'site')}"
    for name in (*name_checkpoints([Path(network.path)]), str(arguments.get("name") or "")):
        if activation := _find_activation_in_name(network, name):
            return f"{start} its run is called {quote(name)}, and no site holds {activation}"
    return ""


def _find_swap_at_start(network: _Network, source: str) -> str:
    """Return what the checkpoint that a training started from held and `model.yaml` did not carry; "" if nothing."""
    try:
        path = Path(source)
        if path.suffix != ".pt" or not path.is_file() or path.samefile(network.path):
            return ""
        before = _open(source)
    except (OSError, ValueError, RtdetrActError):  # the name in the checkpoint may be none that a file can have
        return ""
    if before.plan or not before.differences:
        return ""
    return f"it was trained from {quote(source)}, which holds {summarise_differences(before.differences)}"


def _find_activation_in_name(network: _Network, name: str) -> str:
    """Return the first activation that the name of a run names, "" if there is none or the network holds one of them.

    Activations that are not meant for training are left out, since their names are common words: identity, threshold.
    """
    held = {entry.name for site in network.sites if (entry := registry.find_entry(site.module))}
    known = {}
    for activation in registry.names():
        entry = registry.get_entry(activation)
        known.update({} if entry.note else {word.lower(): activation for word in (activation, *entry.aliases)})
    words = re.findall(r"[a-z0-9_]+", name.lower())
    words = [part for word in words for part in ([word] if word in known else word.split("_"))]
    named = [known[word] for word in words if word in known]
    return "" if not named or held.intersection(named) else named[0]


def _find_problems_of_learning(network: _Network, learnable: Learnable) -> list[str]:
    """Return a problem if the record of the run shows a training in which no parameter moved."""
    epochs = 0 if network.history is None else max(network.history["epoch"].to_list(), default=0)
    if not epochs or not learnable.sites or learnable.moved or learnable.unknown:
        return []
    return [
        f"none of the {learnable.parameters:,} activation parameters has moved from its start in the {epochs} epochs "
        f"that {HISTORY_FILE} records: they were frozen, or their learning rate was too small"
    ]


def _find_notes(network: _Network) -> list[str]:
    """Return what is worth knowing and not wrong."""
    found = []
    if edited := find_edited_defaults():
        found.append(f"this Ultralytics is edited ({'; '.join(edited)}): others build SiLU there")
    learning = [site for site in network.sites if has_parameters(site)]
    if learning and not network.plan:
        found.append(
            f"the activations of {count_of(len(learning), 'site')} learn, and no plan exempts them from weight decay: "
            "patch_model does"
        )
    if network.plan.act_lr != 1.0:
        found.append(f"a training multiplies their learning rate by {network.plan.act_lr:g}")
    if network.plan.memory == "low":
        found.append("a training keeps less for the backward pass, and computes it again there (memory=low)")
    if network.plan.needs_fit:
        found.append("the next training begins by fitting the network to the one before the swap (init=match)")
    if network.is_stock and network.is_checkpoint:
        found.append(
            "a training builds its network from model.yaml, so that a swap made in Python without patch_model is lost"
        )
    return found


def _fold(network: _Network) -> Folding:
    """Fold a copy of the network, and describe the result."""
    done = sum(placed.folded for site in network.sites if (placed := get_placement(site.module)))
    try:
        report = fold_activations(copy.deepcopy(network.root))
    except RtdetrActError as error:
        return Folding(done=done, failure=str(error))
    folds = Counter(f"{fold.before} -> {fold.after.partition('(')[0]}" for fold in report.folds)
    return Folding(dict(folds), len(report.kept), done)


def _describe_health(network: _Network, learnable: Learnable, trained: bool) -> str:
    """Return the verdict on a network with which nothing is wrong."""
    swapped = _find_swapped(network)
    if not swapped:
        return _describe_stock(network)
    maps = [site for site in network.sites if site.layout == "map"]
    wide = any(site.layout != "map" for site in swapped)
    total = f"{len(network.sites)} sites" if wide else f"{count_of(len(maps), 'convolutional site')}"
    counts = Counter(label_activations(swapped)).most_common()
    stands = ", ".join(f"{name} {'stands ' * (not i)}at {count}" for i, (name, count) in enumerate(counts))
    names = {site.name for site in swapped}
    moved, learning = len(names.intersection(learnable.moved)), sum(map(has_parameters, swapped))
    if any(placed.folded for site in swapped if (placed := get_placement(site.module))):
        state = "folded into the weights"
    elif not learning:
        state = ""
    elif not trained:
        state = "not trained yet"
    elif moved:
        state = "learned" if moved == learning else f"learned at {moved} of {learning}"
    else:
        state = "learned or not is not recorded" if learnable.unknown else "still at its initial values"
    ending = "survives training" if network.is_checkpoint else "is what a training builds"
    return f"{stands} of {total}{f', {state},' if state else ''} and {ending}"


def _describe_stock(network: _Network) -> str:
    """Return the verdict on a network without a swap."""
    convolutions = sum(1 for _ in iterate_placed_convolutions(network.root))
    if convolutions:
        return f"stock activations, {count_of(convolutions, 'dynamic convolution')}, and a training keeps them"
    if network.plan.default_act:
        return (
            f"stock: 'activation: {network.plan.default_act}', Ultralytics' own form, is in model.yaml and the network"
        )
    return f"stock: {count_of(len(network.sites), 'site')} as Ultralytics builds them, and no swap in model.yaml"
