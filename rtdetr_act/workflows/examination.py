"""What an examination of a model found, as text and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rtdetr_act.analysis.inventory import Difference, Holding, Learnable
from rtdetr_act.tables import align_columns

_MOST_NAMES, _MOST_CHARS = 3, 100  # names of sites in a line, and characters of a plan


@dataclass(frozen=True)
class Folding:
    """What `fold_activations` would do to a model, or has done.

    Attributes:
        folds: Number of sites by fold, such as {"arelu -> leaky_relu": 77}.
        kept: Number of sites that would keep their factor.
        done: Number of sites whose factor has been folded into the weights already.
        failure: Why a fold is refused, in one sentence; "" if it is not.
    """

    folds: Mapping[str, int] = field(default_factory=dict)
    kept: int = 0
    done: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Examination:
    """The result of `examine`.

    Attributes:
        source: The file that was examined.
        network: Class of the task model.
        task: Ultralytics' task, such as "detect".
        training: What the file tells of its training, such as "3 epochs on coco8.yaml"; "" if it was not trained.
        holdings: How many sites hold which activation.
        unreachable: Functional activations in the code of blocks, which cannot be swapped.
        plan: The plan in `model.yaml`, as text; "" without one.
        default_act: The stock `activation:` of `model.yaml`, such as "nn.ReLU()"; "" without one.
        swapped: Number of sites that hold an activation of the plan.
        convolutions: Number of dynamic convolutions.
        failure: Why `model.yaml` cannot be built, in one sentence; "" if it can.
        differences: The sites at which the network does not hold what `model.yaml` builds.
        learnable: The learnable parameters of the activations, and which of them have moved.
        decayed: Number of these parameters to which a training applies weight decay.
        needs: Classes that loading the file takes beside those of torch and Ultralytics, by package.
        trains_without: Whether Ultralytics alone would train the same network: False if it would stop, or build
            another one.
        formats: For each export format of which it is known what it takes: "" if this model can be exported to it here,
            else the reason why it cannot.
        folding: What a fold would do, or has done.
        problems: What is wrong, in one sentence each.
        notes: What else is worth knowing, in one sentence each.
        verdict: The answer in one sentence.
    """

    source: str
    network: str
    task: str
    training: str
    holdings: tuple[Holding, ...]
    unreachable: tuple[str, ...]
    plan: str
    default_act: str
    swapped: int
    convolutions: int
    failure: str
    differences: tuple[Difference, ...]
    learnable: Learnable
    decayed: int
    needs: Mapping[str, tuple[str, ...]]
    trains_without: bool
    formats: Mapping[str, str]
    folding: Folding
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: str

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes and `healthy` as plain data for JSON."""
        return {**asdict(self), "healthy": self.healthy}

    def __str__(self) -> str:
        """Return a table of the activations, a line per question, and the verdict."""
        rows: list[tuple[str, ...]] = [("activation", "convolutional", "transformer", "hidden calls")]
        for each in self.holdings:
            rows.append(
                (each.activation, *(str(n or "-") for n in (each.convolutional, each.transformer, each.hidden)))
            )
        lines = [f"{self.source}: {self.network}, {self.task}, {self.training or 'not trained'}", ""]
        lines += align_columns(rows)
        lines += [f"no swap reaches: {', '.join(self.unreachable)}"] if self.unreachable else []
        pairs = [
            ("model.yaml", self._describe_plan()),
            *([("dynamic convolutions", str(self.convolutions))] if self.convolutions else []),
            ("parameters", self._describe_parameters()),
            ("without rtdetr-act", self._describe_independence()),
            ("exports here to", ", ".join(name for name, reason in self.formats.items() if not reason) or "nothing"),
            ("folds", self._describe_folding()),
        ]
        lines += ["", *align_columns([(f"{title}:", text) for title, text in pairs]), ""]
        groups = group_differences(self.differences)
        lines += [f"{held} for {built} at {name_some(sites)}" for (held, built), sites in groups.items()]
        lines += [f"note: {sentence}" for sentence in self.notes]
        lines += [f"wrong: {sentence}" for sentence in self.problems[1:]]  # the verdict is the first
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def _describe_plan(self) -> str:
        said = self.plan or (f"activation: {self.default_act}" if self.default_act else "names no activation")
        said = f"{said[:_MOST_CHARS]}…" if len(said) > _MOST_CHARS else said  # folding gives each site a rule
        if self.failure:
            return f"{said}; it cannot be built"
        if self.differences:
            return f"{said}; the network differs at {count_of(len(self.differences), 'site')}"
        return f"{said}; the network agrees at all sites"

    def _describe_parameters(self) -> str:
        found = self.learnable
        if not found.sites:
            return "no activation has any"
        parts = [f"{found.parameters:,} in the activations of {count_of(found.sites, 'site')}"]
        if self.training:
            parts.append(f"moved from their start at {len(found.moved)}")
            if found.unmoved:
                parts.append(f"not at {name_some(found.unmoved)}")
            if found.unknown:
                parts.append(f"unknown at {len(found.unknown)}, which started at random")
        parts.append("shared" if found.shared else "each site its own")
        parts.append(f"{self.decayed:,} with weight decay" if self.decayed else "without weight decay")
        return ", ".join(parts)

    def _describe_independence(self) -> str:
        if not self.source.endswith(".pt"):
            return "stock Ultralytics stops at the plan" if self.plan else "stock Ultralytics builds the same network"
        own, others = self.needs.get("rtdetr_act", ()), {k: v for k, v in self.needs.items() if k != "rtdetr_act"}
        loads = f"does not load ({', '.join(own)})" if own else "loads, validates and predicts"
        if others:
            loads += f" where {' and '.join(sorted(others))} can be imported"
        if self.plan:
            trains = "does not train: stock Ultralytics stops at the plan in model.yaml"
        else:
            trains = "trains the same network" if self.trains_without else "trains another network"
        return f"{loads}; {trains}"

    def _describe_folding(self) -> str:
        if self.folding.failure:
            return f"not: {self.folding.failure}"
        parts = [f"{count} {fold}" for fold, count in self.folding.folds.items()]
        parts += [f"{self.folding.kept} keep their factor"] if self.folding.kept else []
        parts += [f"{self.folding.done} folded already"] if self.folding.done else []
        return ", ".join(parts) or "nothing to fold"


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> count_of(1, "site"), count_of(12, "site")
    ('1 site', '12 sites')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def name_some(names: Sequence[str]) -> str:
    """Return the number of sites, and the names of the first of them.

    >>> name_some(["a"]), name_some(["a", "b", "c", "d"])
    ('1 site (a)', '4 sites (a, b, c, …)')
    """
    shown = [*names[:_MOST_NAMES], *(["…"] if len(names) > _MOST_NAMES else [])]
    return f"{count_of(len(names), 'site')} ({', '.join(shown)})"


def group_differences(differences: Sequence[Difference]) -> dict[tuple[str, str], list[str]]:
    """Return the names of the sites by what they hold and what is built there, the most frequent pair first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in differences:
        groups.setdefault((each.held, each.built), []).append(each.site)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def summarise_differences(differences: Sequence[Difference]) -> str:
    """Return which activations stand where others are built, the most frequent first.

    >>> summarise_differences([Difference("a.act", "ReLU", "SiLU"), Difference("b.act", "ReLU", "SiLU")])
    'ReLU for SiLU'
    """
    pairs = [f"{held} for {built}" for held, built in group_differences(differences)]
    return ", ".join([*pairs[:_MOST_NAMES], *(["…"] if len(pairs) > _MOST_NAMES else [])])
