"""The plan: which activation stands at which sites, as plain data (no torch, nothing executed).

A plan is an ordered list of rules, later rules winning. Strings, YAML rows, command-line flags and Python calls all
become one `Plan`, and `Plan.to_yaml()` is what `model.yaml["activation"]` carries through training, checkpoints and
resuming. That form is a mapping, which stock Ultralytics refuses to parse instead of training another network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from rtdetr_act.errors import SelectionError, SpecError, quote, suggest
from rtdetr_act.spec import LONGEST_PLAN, LONGEST_RULE, TAU_EPOCHS, TAU_START, ActSpec, is_stock_activation

if TYPE_CHECKING:
    from typing import TypeGuard


SECTIONS = ("backbone", "neck", "head")


SCOPES = ("conv", "all")


INITS = ("paper", "match")


_RULE_KEYS = ("activation", "layers", "sections", "include", "exclude", "scope", "init")


_PLAN_KEYS = ("rules", "default_act", "act_lr", "base", "convolutions", "fitted")


_MOST_LAYERS = 10_000


_LARGEST = 1e9  # of any number in a plan


_DEEPEST_BASE = 50  # plans that start from one another


CONVOLUTIONS = ("dynamic_conv",)  # what a rule may put in the place of a convolution, not of an activation


_TAU_STARTS = {"dynamic_conv": TAU_START}  # of those that have one where none is given


_SCHEDULE_KEYS = ("tau_start", "tau_epochs")  # arguments that matter until the last epoch of a schedule


@dataclass(frozen=True)
class Rule:
    """One activation and the sites it is meant for.

    Attributes:
        activation: What to place.
        layers: Ultralytics layer indices; with `sections` the union of both, empty means every layer.
        sections: Any of "backbone", "neck", "head".
        include: Glob patterns on qualified site names, at least one must match if any is given.
        exclude: Glob patterns on qualified site names, none may match.
        scope: "conv" for convolutional sites (feature maps), "all" for transformer sites too.
        init: "paper" for the activation's own start, "match" for the network closest to the one before the swap.
    """

    activation: ActSpec
    layers: tuple[int, ...] = ()
    sections: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scope: str = "conv"
    init: str = "paper"

    def selects(self, name: str, layer: int | None, section: str, layout: str) -> bool:
        """Say whether the rule means the site of that qualified name, layer index, section and layout."""
        if self.scope == "conv" and layout != "map":
            return False
        if (self.layers or self.sections) and layer not in self.layers and section not in self.sections:
            return False
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    @property
    def where(self) -> str:
        """The selection in words, empty when the rule means every site of its scope."""
        parts = [*self.sections, *([format_layers(self.layers)] if self.layers else [])]
        words = ["@" + "+".join(parts)] if parts else []
        words += [f"include={pattern}" for pattern in self.include]
        words += [f"exclude={pattern}" for pattern in self.exclude]
        words += ["scope=all"] if self.scope == "all" else []
        return " ".join(words)

    def settled(self, epoch: float) -> Rule:
        """Return the rule without a schedule that is over after that many epochs of training."""
        end = _tau_end(self.activation)
        if end is None or end > epoch:
            return self
        kept = [(key, value) for key, value in self.activation.kwargs if key not in _SCHEDULE_KEYS]
        kept += [("tau_start", None)] if self.activation.name in _TAU_STARTS else []
        return replace(self, activation=replace(self.activation, kwargs=tuple(kept)))

    def to_yaml(self) -> dict[str, Any]:
        """Return the rule as plain data, defaults left out."""
        data: dict[str, Any] = {"activation": str(self.activation)}
        if self.layers:
            data["layers"] = format_layers(self.layers)
        for key in ("sections", "include", "exclude"):
            if values := getattr(self, key):
                data[key] = list(values)
        if self.scope != "conv":
            data["scope"] = self.scope
        if self.init != "paper":
            data["init"] = self.init
        return data

    @classmethod
    def from_yaml(cls, data: Mapping[str, Any]) -> Rule:
        """Read back what `to_yaml` wrote; unknown keys and wrong values raise SpecError."""
        if not isinstance(data, Mapping) or "activation" not in data:
            raise SpecError(f"a rule is a mapping with the key 'activation', not {quote(data)}")
        _check_keys("rule", data, _RULE_KEYS)
        return cls(
            ActSpec.parse(data["activation"]),
            parse_layers(data.get("layers")),
            _check_sections(_strings(data.get("sections"))),
            _strings(data.get("include")),
            _strings(data.get("exclude")),
            check_scope(data.get("scope", "conv")),
            _check_init(data.get("init", "paper")),
        )

    def __str__(self) -> str:
        """Return e.g. `dyrelu_b@backbone`, `arelu exclude=model.28.*` or `mish init=match`."""
        where = self.where
        words = [f"{self.activation}{'' if where.startswith('@') or not where else ' '}{where}"]
        words += [f"init={self.init}"] if self.init != "paper" else []
        return " ".join(words)


class SwapOptions(TypedDict, total=False):
    """How activations are swapped in, beside which and where; the meanings are those of `patch_model`."""

    scope: str
    act_lr: float
    init: str


@dataclass(frozen=True)
class Plan:
    """Rules in order, later ones winning, and what travels with them.

    Attributes:
        rules: The rules.
        default_act: A stock `activation:` such as "nn.ReLU()", which keeps its stock meaning below the rules.
        act_lr: Factor on the learning rate of scalar and per-channel activation parameters, 1.0 by default.
        base: The plan of the network that rules with `init="match"` start from; None for the stock one.
        convolutions: Rules of the same form for convolutions, such as `dynamic_conv@backbone`.
        fitted: Whether the network has had the start that rules with `init="match"` ask for, which a training gives
            it once.

    >>> plan = Plan.parse("dyrelu_b@backbone, dyrelu_c@neck, silu@22-27")
    >>> Plan.from_yaml(plan.to_yaml()) == plan
    True
    """

    rules: tuple[Rule, ...] = ()
    default_act: str | None = None
    act_lr: float = 1.0
    base: Plan | None = None
    convolutions: tuple[Rule, ...] = ()
    fitted: bool = False

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        layers: str | int | Iterable[int] | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        scope: str = "conv",
        act_lr: float = 1.0,
        init: str = "paper",
    ) -> Plan:
        """Parse `activation[@section or layers] [init=match][, …]`; also `dynamic_conv[@…]`.

        Sections and layer ranges join with `+`: `arelu@backbone+12+22-27`. The keywords hold for every rule of the text
        that does not say otherwise.

        Raises:
            SpecError: The text, a section, a layer range or a keyword is wrong.
        """
        if not isinstance(text, str):
            raise SpecError(f"a plan is a string such as 'dyrelu_b@backbone, dyrelu_c@neck', not {quote(text)}")
        if len(text) > LONGEST_PLAN:
            raise SpecError(f"a plan has {LONGEST_PLAN:,} characters at most, not {len(text):,}: {quote(text)}")
        narrowed = parse_layers(layers)
        if layers is not None and not narrowed:
            raise SpecError("layers= is empty: give indices such as '0-9', or leave it out")
        rules = []
        for part in _split_rules(text):
            rule = _parse_rule(part)
            if narrowed and (rule.layers or rule.sections):
                raise SpecError(f"{quote(part)} names its layers already: drop either '@…' or layers=")
            rules.append(
                replace(
                    rule,
                    layers=rule.layers or narrowed,
                    include=_strings(include),
                    exclude=_strings(exclude),
                    scope=check_scope(scope),
                    init=rule.init if rule.init != "paper" else _check_init(init),
                )
            )
        swaps = tuple(rule for rule in rules if rule.activation.name not in CONVOLUTIONS)
        convolutions = (rule for rule in rules if rule.activation.name in CONVOLUTIONS)
        return cls(
            swaps,
            act_lr=_check_act_lr(act_lr),
            convolutions=tuple(replace(rule, scope="conv", init="paper") for rule in convolutions),
        )

    @classmethod
    def from_yaml(cls, data: object) -> Plan:
        """Read the value of a model YAML's `activation:` key: a name, a stock form, a plan string or plain data.

        Raises:
            SpecError: The value is none of these, or holds code.
        """
        return cls._from_yaml(data, 0)

    @classmethod
    def _from_yaml(cls, data: object, depth: int) -> Plan:
        if depth > _DEEPEST_BASE:
            raise SpecError(f"'base' under 'activation' holds a 'base' more than {_DEEPEST_BASE} deep, or holds itself")
        if data is None:
            return cls()
        if isinstance(data, str):
            return cls(default_act=data.strip()) if is_stock_activation(data) else cls.parse(data)
        if not isinstance(data, Mapping):
            raise SpecError(f"'activation:' is a name such as 'arelu', or a mapping with 'rules', not {quote(data)}")
        _check_keys("activation", data, _PLAN_KEYS)
        lists: dict[str, Any] = {key: data.get(key) for key in ("rules", "convolutions")}
        lists = {key: [] if value is None else value for key, value in lists.items()}
        for key, value in lists.items():
            if not isinstance(value, list):
                raise SpecError(f"'{key}' under 'activation' must be a list, not {quote(value)}")
        rules, convolutions = (tuple(Rule.from_yaml(rule) for rule in value) for value in lists.values())
        default_act = data.get("default_act")
        if default_act is not None and not is_stock_activation(default_act):
            raise SpecError(f"'default_act' is a stock form such as 'nn.SiLU()', not {quote(default_act)}")
        return cls(
            rules,
            default_act,
            _check_act_lr(data.get("act_lr", 1.0)),
            (cls._from_yaml(data["base"], depth + 1) or None) if data.get("base") else None,  # as `to_yaml` writes it
            convolutions,
            _check_fitted(data.get("fitted", False)),
        )

    def to_yaml(self) -> dict[str, Any] | str | None:
        """Return the value for `model.yaml["activation"]`: plain data with rules, the stock form (or None) without.

        Rules for convolutions stand there too, so that stock Ultralytics refuses them like those for activations.
        """
        if not self:
            return self.default_act
        data: dict[str, Any] = {"rules": [rule.to_yaml() for rule in self.rules]}
        if self.convolutions:
            data["convolutions"] = [rule.to_yaml() for rule in self.convolutions]
        if self.default_act:
            data["default_act"] = self.default_act
        if self.act_lr != 1.0:
            data["act_lr"] = self.act_lr
        if self.base:
            data["base"] = self.base.to_yaml()
        if self.fitted:
            data["fitted"] = True
        return data

    @property
    def awaits_fit(self) -> bool:
        """Whether the next training is to give the network a start close to what it was."""
        return not self.fitted and any(rule.init == "match" for rule in self.rules)

    def winner(self, name: str, layer: int | None, section: str, layout: str) -> Rule | None:
        """Return the last rule that selects the site, or None."""
        return last_match(self.rules, name, layer, section, layout)

    def followed_by(self, other: Plan) -> Plan:
        """Return this plan with the rules of `other` behind its own; a rule with the same selection is replaced."""
        convolutions = _behind(self.convolutions, other.convolutions)
        if any(rule.init == "match" for rule in other.rules):
            base = replace(self.settled(), convolutions=())
            return replace(other, default_act=self.default_act, base=base or None, convolutions=convolutions)
        rules = _behind(self.rules, other.rules)
        return replace(self, rules=rules, convolutions=convolutions, act_lr=other.act_lr)

    def settled(self, epoch: float = math.inf) -> Plan:
        """Return the plan without the schedules that are over after that many epochs of training; inf ends all.

        >>> plan = Plan.parse("dyrelu_c(tau_start=30.0, tau_epochs=5)")
        >>> str(plan.settled(4)), str(plan.settled(5))
        ('dyrelu_c(tau_start=30.0, tau_epochs=5)', 'dyrelu_c')
        """
        rules, convolutions = (tuple(r.settled(epoch) for r in part) for part in (self.rules, self.convolutions))
        return replace(self, rules=rules, convolutions=convolutions)

    def schedule_ends(self) -> tuple[float, ...]:
        """Return the epochs after which a schedule of the plan is over."""
        ends = {_tau_end(rule.activation) for rule in self.rules + self.convolutions}
        return tuple(sorted(end for end in ends if end is not None))

    def __bool__(self) -> bool:
        """A plan without rules changes nothing."""
        return bool(self.rules or self.convolutions)

    def __str__(self) -> str:
        """Return the rules in order, those for convolutions last, as in `dyrelu_b@backbone, silu@22-27`."""
        return ", ".join(map(str, self.rules + self.convolutions))


def last_match(rules: tuple[Rule, ...], name: str, layer: int | None, section: str, layout: str) -> Rule | None:
    """Return the last of some rules that selects a place, or None."""
    return next((rule for rule in reversed(rules) if rule.selects(name, layer, section, layout)), None)


class Selectable(Protocol):
    """What a rule can select: an activation site, or the place of a convolution, whose layout is "map"."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int | None: ...  # noqa: D102
    @property
    def section(self) -> str: ...  # noqa: D102


def require_followers(rules: Sequence[Rule], places: Iterable[Selectable]) -> None:
    """Refuse a rule that selects places of which later rules take every one.

    Raises:
        SelectionError: Naming the rule, and those that take its places.
    """
    followers: dict[int, list[Rule]] = {}  # of each rule that selects anything, the winner at each of its places
    for place in places:
        layout = getattr(place, "layout", "map")
        chosen = [n for n, r in enumerate(rules) if r.selects(place.name, place.layer, place.section, layout)]
        for number in chosen:
            followers.setdefault(number, []).append(rules[chosen[-1]])
    for number, winners in followers.items():
        if not any(winner is rules[number] for winner in winners):
            others = " and ".join(dict.fromkeys(f"'{winner}'" for winner in winners))  # an argument may be a list
            raise SelectionError(
                f"'{rules[number]}' would stand nowhere, since {others} behind it takes all of its {len(winners)} "
                "places: leave one of them out, or give each its own place; for two runs, repeat --act"
            )


def _behind(rules: tuple[Rule, ...], later: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return rules with later ones behind them, which replace those of the same selection."""

    def selection(rule: Rule) -> Rule:
        return replace(rule, activation=ActSpec("any"), init="paper")

    replaced = {selection(rule) for rule in later}
    return tuple(rule for rule in rules if selection(rule) not in replaced) + later


def parse_layers(value: str | int | Iterable[int] | None) -> tuple[int, ...]:
    """Turn '0-9', '0-2+7', '0-2,7', 5 or [0, 1, 7] into sorted layer indices; None gives none.

    >>> parse_layers("0-2+7")
    (0, 1, 2, 7)
    """
    if value is None:
        return ()
    wrong = SpecError(f"layers are indices and ranges such as '0-9' or '3+22-27', not {quote(value)}")
    if isinstance(value, str):
        indices: list[int] = []
        for part in re.split(r"[+,]", value[:LONGEST_PLAN]):
            match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part, re.ASCII)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last or len(indices) > _MOST_LAYERS:
                raise wrong
            indices.extend(range(first, last + 1))
    elif isinstance(value, int):
        indices = [value]
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        indices = list(value)
    else:
        raise wrong
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < _MOST_LAYERS for i in indices):
        raise wrong
    return tuple(sorted(set(indices)))


def format_layers(layers: Iterable[int]) -> str:
    """Write layer indices as ranges.

    >>> format_layers([0, 1, 2, 7])
    '0-2+7'
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _parse_rule(text: str) -> Rule:
    if len(text) > LONGEST_RULE:  # longer ones take the patterns below seconds
        raise SpecError(f"a rule has {LONGEST_RULE:,} characters at most, not {len(text):,}: {quote(text)}")
    head, init = _split_init(text)
    match = re.fullmatch(r"(?P<act>[^@]+?|.*\))\s*(?:@\s*(?P<where>[^@()]*))?", head, re.DOTALL)
    if match is None:
        raise SpecError(f"{quote(text)} is not a rule: write activation, activation@section or activation@layers")
    layers: tuple[int, ...] = ()
    sections: tuple[str, ...] = ()
    if match["where"] is not None:
        for part in (part.strip() for part in match["where"].split("+")):
            if part[:1].isdigit():
                layers += parse_layers(part)
            else:
                sections += _check_sections((part,))
    return Rule(ActSpec.parse(match["act"]), tuple(sorted(set(layers))), sections, init=_check_init(init))


def _split_init(text: str) -> tuple[str, str]:
    """Split the word `init=…` off the end of a rule; "paper" where there is none.

    >>> _split_init("prelu(init=0.1)@backbone init=match")
    ('prelu(init=0.1)@backbone', 'match')
    """
    found = re.fullmatch(r"(.*\S)\s+init=([^\s()]+)", text, re.DOTALL)
    return (found[1], found[2]) if found else (text, "paper")


def _split_rules(text: str) -> list[str]:
    """Split at the commas that stand outside brackets and quotes."""
    parts, depth, mark, start = [], 0, "", 0
    for index, char in enumerate(text):
        if mark:
            mark = "" if char == mark else mark
        elif char in "'\"":
            mark = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts = [part.strip() for part in [*parts, text[start:]]]
    if not all(parts):
        raise SpecError(f"the plan {quote(text)} has an empty rule: write activation[@section or layers], …")
    return parts


def _strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    values = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(item, str) and item for item in values):
        raise SpecError(f"names and patterns are non-empty strings, not {quote(values)}")
    return values


def _check_sections(sections: tuple[str, ...]) -> tuple[str, ...]:
    for section in sections:
        if section not in SECTIONS:
            raise SpecError(
                f"{quote(f'@{section}')} is not a section: use backbone, neck, head or layer indices such as 0-9"
                f"{suggest(section, SECTIONS)}"
            )
    return sections


def check_scope(scope: object) -> str:
    """Return a scope, "conv" or "all"; raises SpecError."""
    if scope not in SCOPES:
        raise SpecError(f"scope is 'conv' or 'all', not {quote(scope)}")
    return str(scope)


def _check_act_lr(value: object) -> float:
    if not _is_number(value) or value <= 0:
        raise SpecError(f"act_lr is a positive factor such as 0.1, not {quote(value)}")
    return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _check_init(value: object) -> str:
    if value not in INITS:
        raise SpecError(f"init is 'paper' or 'match', not {quote(value)}{suggest(value, INITS)}")
    return str(value)


def _check_fitted(value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"fitted is true or false, not {quote(value)}")
    return value


def _tau_end(activation: ActSpec) -> float | None:
    """Return the epoch after which an activation's temperature is constant, None where it always is."""
    given = dict(activation.kwargs)
    start = given.get("tau_start", _TAU_STARTS.get(activation.name))
    epochs = given.get("tau_epochs", TAU_EPOCHS)
    if not _is_number(epochs):
        raise SpecError(f"tau_epochs is a number of epochs such as {TAU_EPOCHS}, not {quote(epochs)}")
    return float(epochs) if start is not None else None


def _check_keys(what: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise SpecError(f"{quote(key)} is not a key of '{what}': use {', '.join(known)}{suggest(key, known)}")
