"""The plan: which activation to insert at which sites, as plain data (no torch, nothing executed).

A plan is an ordered list of rules, of which the last that matches a site applies. Strings, YAML rows, command-line
flags and Python calls all become a `Plan`, and `model.yaml["activation"]` stores `Plan.to_model_yaml()` in training,
checkpoints and resumed runs: an expression such as `rtdetr_act.arelu`. Stock Ultralytics evaluates `activation:` before
it builds a layer, so it stops with "name 'rtdetr_act' is not defined" instead of training another network.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from rtdetr_act.errors import SelectionError, SpecError, quote, suggest
from rtdetr_act.spec import LONGEST_PLAN, LONGEST_RULE, PREFIX, ActSpec, split_at_commas

if TYPE_CHECKING:
    from typing import TypeGuard

    from rtdetr_act.activations.protocol import Layout, Replaces


Scope = Literal["conv", "all"]
Init = Literal["paper", "match"]
SECTIONS = ("backbone", "neck", "head")
SCOPES: tuple[Scope, ...] = ("conv", "all")
INITS: tuple[Init, ...] = ("paper", "match")
_RULE_KEYS = ("activation", "layers", "sections", "include", "exclude", "scope", "init")
_PLAN_KEYS = ("rules", "default_act", "act_lr", "base", "fitted")
_MAX_LAYERS = 10_000
_MAX_NUMBER = 1e9  # largest absolute value of a number in a plan
_MAX_BASE_DEPTH = 50  # of nested bases
_CALL = f"{PREFIX}Plan("  # of a plan as model YAMLs store it
_LONGEST_FORM = 1_000_000  # characters; a rule for each of the 165 sites of yolo26x takes 20,000
_SCHEDULE_KEYS = ("tau_start", "tau_epochs")  # arguments without effect once a schedule has finished


@dataclass(frozen=True)
class Rule:
    """One activation, or replacement of convolutions, and the sites that it is inserted at.

    Attributes:
        activation: What to insert, such as `arelu` or `dynamic_conv`.
        layers: Indices of Ultralytics layers. Sites in `layers` or `sections` match; if both are empty, all do.
        sections: Any of "backbone", "neck", "head".
        include: Glob patterns on qualified site names; if there are any, at least one must match.
        exclude: Glob patterns on qualified site names; none may match.
        scope: "conv" (default) for convolutional sites (feature maps), "all" for transformer sites too.
        init: "paper" (default) for the activation's default initialisation, "match" to fit it, and the network, to the
            network before the swap.
    """

    activation: ActSpec
    layers: tuple[int, ...] = ()
    sections: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scope: Scope = "conv"
    init: Init = "paper"

    @property
    def replaces(self) -> Replaces:
        """What its activation replaces, an "activation" or a "convolution"."""
        from rtdetr_act.activations.registry import (
            get_replaced_kind,  # brings torch, which the command line starts without
        )

        return get_replaced_kind(self.activation.name)

    def selects(self, site: Selectable) -> bool:
        """Return whether the rule matches a site, by its kind, name, layer, section and layout."""
        if site.replaces != self.replaces or (self.scope == "conv" and site.layout != "map"):
            return False
        if (self.layers or self.sections) and site.layer not in self.layers and site.section not in self.sections:
            return False
        if self.include and not any(fnmatchcase(site.name, pattern) for pattern in self.include):
            return False
        return not any(fnmatchcase(site.name, pattern) for pattern in self.exclude)

    @property
    def where(self) -> str:
        """The selection as text, such as "@backbone exclude=*.cv2.*"; empty if the rule matches all sites in scope."""
        parts = [*self.sections, *([format_layers(self.layers)] if self.layers else [])]
        words = ["@" + "+".join(parts)] if parts else []
        words += [f"include={pattern}" for pattern in self.include]
        words += [f"exclude={pattern}" for pattern in self.exclude]
        words += ["scope=all"] if self.scope == "all" else []
        return " ".join(words)

    def without_finished_schedules(self, epoch: float) -> Rule:
        """Return the rule without the arguments of its schedule, if that has finished after so many epochs."""
        end = _schedule_end(self.activation)
        if end is None or end > epoch:
            return self
        kept = [(key, value) for key, value in self.activation.kwargs if key not in _SCHEDULE_KEYS]
        starts_by_default = _get_default_arguments(self.activation.name).get("tau_start") is not None
        kept += [("tau_start", None)] if starts_by_default else []
        return replace(self, activation=replace(self.activation, kwargs=tuple(kept)))

    def to_yaml(self) -> dict[str, Any]:
        """Return the rule as plain data, without defaults."""
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
        """Build a rule from the output of `to_yaml`; raise SpecError for unknown keys and invalid values."""
        if not isinstance(data, Mapping) or "activation" not in data:
            raise SpecError(f"a rule is a mapping with the key 'activation', not {quote(data)}")
        _check_keys("rule", data, _RULE_KEYS)
        return cls(
            ActSpec.parse(data["activation"]),
            parse_layers(data.get("layers")),
            _check_sections(_to_strings(data.get("sections"))),
            _to_strings(data.get("include")),
            _to_strings(data.get("exclude")),
            check_scope(data.get("scope", "conv")),
            check_init(data.get("init", "paper")),
        )

    def __str__(self) -> str:
        """Return e.g. `dyrelu_b@backbone`, `arelu exclude=model.28.*` or `mish init=match`."""
        where = self.where
        words = [f"{self.activation}{'' if where.startswith('@') or not where else ' '}{where}"]
        words += [f"init={self.init}"] if self.init != "paper" else []
        return " ".join(words)


class SwapOptions(TypedDict, total=False):
    """Options of a swap beside the activation and its sites, with the meaning of the arguments of `patch_model`."""

    scope: Scope
    act_lr: float
    init: Init


@dataclass(frozen=True)
class Plan:
    """An ordered list of rules, of which the last that matches a site applies, and the options of the whole plan.

    Attributes:
        rules: The rules.
        default_act: A stock `activation:` such as "nn.ReLU()", which applies where no rule does. Default: None.
        act_lr: Factor on the learning rate of scalar and per-channel activation parameters. Default: 1.0.
        base: The plan of the network before the swap, to which rules with `init="match"` are fitted. Default: None, the
            stock network.
        fitted: Whether the network has been fitted already; training does it once. Default: False.

    >>> plan = Plan.parse("dyrelu_b@backbone, dyrelu_c@neck, silu@22-27")
    >>> plan.to_model_yaml()
    "rtdetr_act.Plan('dyrelu_b@backbone, dyrelu_c@neck, silu@22-27')"
    >>> Plan.from_yaml(plan.to_model_yaml()) == Plan.from_yaml(plan.to_yaml()) == plan
    True
    """

    rules: tuple[Rule, ...] = ()
    default_act: str | None = None
    act_lr: float = 1.0
    base: Plan | None = None
    fitted: bool = False

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        layers: str | int | Iterable[int] | None = None,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        scope: Scope = "conv",
        act_lr: float = 1.0,
        init: Init = "paper",
    ) -> Plan:
        """Parse a plan from text: `activation[@section or layers] [init=match][, …]`.

        Args:
            text: The rules. Sections and layer ranges are joined by `+`, as in `arelu@backbone+12+22-27`.
            layers: Layer indices of all rules, which must then have none of their own. Default: None.
            include: Glob pattern(s) on site names, of all rules. Default: None.
            exclude: Glob pattern(s) on site names, of all rules. Default: None.
            scope: "conv" (default) or "all", for rules of activations.
            act_lr: See `Plan`. Default: 1.0.
            init: "paper" (default) or "match", for rules of activations without `init=` in the text.

        Raises:
            SpecError: The text, a section, a layer range or a keyword argument is invalid.
        """
        if not isinstance(text, str):
            raise SpecError(f"a plan is a string such as 'dyrelu_b@backbone, dyrelu_c@neck', not {quote(text)}")
        _check_length(text, LONGEST_PLAN)
        narrowed = parse_layers(layers)
        if layers is not None and not narrowed:
            raise SpecError("layers= is empty: give indices such as '0-9', or leave it out")
        rules = []
        for part in _split_rules(text):
            rule = _parse_rule(part)
            if narrowed and (rule.layers or rule.sections):
                raise SpecError(f"{quote(part)} names its layers already: drop either '@…' or layers=")
            rule = replace(
                rule, layers=rule.layers or narrowed, include=_to_strings(include), exclude=_to_strings(exclude)
            )
            check_scope(scope)
            check_init(init)
            if rule.replaces == "activation":
                rule = replace(rule, scope=scope, init=rule.init if rule.init != "paper" else init)
            else:  # it is initialised as the convolution that it replaces
                rule = replace(rule, init="paper")
            rules.append(rule)
        return cls(tuple(rules), act_lr=_check_act_lr(act_lr))

    @classmethod
    def parse_convolutions(cls, text: str) -> Plan:
        """Parse a plan that only replaces convolutions, such as `dynamic_conv(kernels=2)@backbone`.

        Raises:
            SpecError: The text is invalid, or names an activation.
        """
        plan = cls.parse(text)
        for rule in plan.rules:
            if rule.replaces != "convolution":
                from rtdetr_act.activations.registry import list_names

                known, name = list_names("convolution"), rule.activation.name
                raise SpecError(f"{quote(name)} is not a replacement of a convolution{suggest(name, known)}")
        return plan

    @classmethod
    def from_yaml(cls, data: object) -> Plan:
        """Build a plan from the value of `activation:` in a model YAML.

        Args:
            data: A plan as text, such as "arelu" or "rtdetr_act.arelu"; `rtdetr_act.Plan(…)`, as `to_model_yaml` writes
                it; a stock form, such as "nn.SiLU()"; plain data, as `to_yaml` returns it; None for an empty plan.

        Raises:
            SpecError: The value is none of these, or contains code.
        """
        return cls._from_yaml(data, 0)

    @classmethod
    def _from_yaml(cls, data: object, depth: int) -> Plan:
        if depth > _MAX_BASE_DEPTH:
            raise SpecError(f"'base' under 'activation' is nested more than {_MAX_BASE_DEPTH} deep, or contains itself")
        if data is None:
            return cls()
        if isinstance(data, str):
            text = data.strip()
            if text.startswith(_CALL):
                return cls._from_yaml(_evaluate_argument(text), depth)
            return cls(default_act=text) if _is_stock_activation(text) else cls.parse(data)
        if not isinstance(data, Mapping):
            raise SpecError(f"'activation:' is a name such as 'arelu', or a mapping with 'rules', not {quote(data)}")
        _check_keys("activation", data, _PLAN_KEYS)
        rules = data.get("rules")
        if rules is not None and not isinstance(rules, list):
            raise SpecError(f"'rules' under 'activation' must be a list, not {quote(rules)}")
        default_act = data.get("default_act")
        if default_act is not None and not _is_stock_activation(default_act):
            raise SpecError(f"'default_act' is a stock form such as 'nn.SiLU()', not {quote(default_act)}")
        return cls(
            tuple(map(Rule.from_yaml, rules or ())),
            default_act,
            _check_act_lr(data.get("act_lr", 1.0)),
            (cls._from_yaml(data["base"], depth + 1) or None) if data.get("base") else None,  # as `to_yaml` writes it
            _check_fitted(data.get("fitted", False)),
        )

    def to_yaml(self) -> dict[str, Any] | str | None:
        """Return the plan as plain data; the stock form or None if there are no rules."""
        if not self:
            return self.default_act
        data: dict[str, Any] = {"rules": [rule.to_yaml() for rule in self.rules]}
        if self.default_act:
            data["default_act"] = self.default_act
        if self.act_lr != 1.0:
            data["act_lr"] = self.act_lr
        if self.base:
            data["base"] = self.base.to_yaml()
        if self.fitted:
            data["fitted"] = True
        return data

    def to_model_yaml(self) -> str | None:
        """Return the value for `activation:` in a model YAML, on which stock Ultralytics fails.

        It is the first of `rtdetr_act.arelu`, `rtdetr_act.Plan('dyrelu_b@backbone, …')` and `rtdetr_act.Plan({…})`,
        with the plain data of `to_yaml`, that says the whole plan; the stock form or None if there are no rules.

        Raises:
            SpecError: The plan has more than 1,000,000 characters.
        """
        if not self:
            return self.default_act
        text, first = str(self), self.rules[0].activation
        if text == str(first) and first.name.isidentifier() and self._equals(f"{PREFIX}{text}"):
            return f"{PREFIX}{text}"
        if self._equals(text):
            return f"{_CALL}{text!r})"
        form = f"{_CALL}{self.to_yaml()!r})"
        _check_length(form, _LONGEST_FORM)
        return form

    def _equals(self, text: str) -> bool:
        """Return whether `from_yaml` reads this plan from a text."""
        try:
            return Plan.from_yaml(text) == self
        except SpecError:
            return False

    @property
    def needs_fit(self) -> bool:
        """Whether the next training must fit the network to the one before the swap."""
        return not self.fitted and any(rule.init == "match" for rule in self.rules)

    def find_rule(self, site: Selectable) -> Rule | None:
        """Return the last rule that matches a site, or None."""
        return next((rule for rule in reversed(self.rules) if rule.selects(site)), None)

    def followed_by(self, other: Plan) -> Plan:
        """Return this plan with the rules of `other` appended; they replace rules with the same selection.

        If `other` has rules with `init="match"`, the rules of activations in this plan become the base of the result.
        """
        act_lr = other.act_lr if any(rule.replaces == "activation" for rule in other.rules) else self.act_lr
        if any(rule.init == "match" for rule in other.rules):
            base = self.without_finished_schedules()
            base = replace(base, rules=tuple(rule for rule in base.rules if rule.replaces == "activation"))
            kept = tuple(rule for rule in self.rules if rule.replaces == "convolution")
            rules = _merge_rules(kept, other.rules)
            return replace(other, rules=rules, default_act=self.default_act, base=base or None)
        return replace(self, rules=_merge_rules(self.rules, other.rules), act_lr=act_lr)

    def without_finished_schedules(self, epoch: float = math.inf) -> Plan:
        """Return the plan without the schedules that have finished after a number of epochs; by default, without any.

        >>> plan = Plan.parse("dyrelu_c(tau_start=30.0, tau_epochs=5)")
        >>> str(plan.without_finished_schedules(4)), str(plan.without_finished_schedules(5))
        ('dyrelu_c(tau_start=30.0, tau_epochs=5)', 'dyrelu_c')
        """
        return replace(self, rules=tuple(rule.without_finished_schedules(epoch) for rule in self.rules))

    def schedule_ends(self) -> tuple[float, ...]:
        """Return the epochs at which schedules of the plan finish, in ascending order."""
        ends = {_schedule_end(rule.activation) for rule in self.rules}
        return tuple(sorted(end for end in ends if end is not None))

    def __bool__(self) -> bool:
        """Return whether the plan has rules; without any it changes nothing."""
        return bool(self.rules)

    def __str__(self) -> str:
        """Return the rules as text that `parse` accepts, such as `dyrelu_b@backbone, silu@22-27`."""
        return ", ".join(map(str, self.rules))


class Selectable(Protocol):
    """Protocol of sites, which rules can match: those of activations and of convolutions."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int | None: ...  # noqa: D102
    @property
    def section(self) -> str: ...  # noqa: D102
    @property
    def layout(self) -> Layout: ...  # noqa: D102
    @property
    def replaces(self) -> Replaces: ...  # noqa: D102


def check_overrides(rules: Sequence[Rule], sites: Iterable[Selectable]) -> None:
    """Check that every rule that matches any site applies to at least one of them.

    Raises:
        SelectionError: Later rules override a rule at all of its sites; the message names them.
    """
    winners: dict[int, list[Rule]] = {}  # for each rule that matches any site, the last rule at each of its sites
    for site in sites:
        chosen = [number for number, rule in enumerate(rules) if rule.selects(site)]
        for number in chosen:
            winners.setdefault(number, []).append(rules[chosen[-1]])
    for number, last in winners.items():
        if not any(rule is rules[number] for rule in last):
            others = " and ".join(dict.fromkeys(f"'{rule}'" for rule in last))  # an argument may be a list
            raise SelectionError(
                f"'{rules[number]}' would apply nowhere, since {others} after it overrides it at all of its "
                f"{len(last)} sites: remove one of them, or select different sites; for two runs, repeat act="
            )


def _merge_rules(rules: tuple[Rule, ...], later: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Append later rules to rules, which they replace where the selection is the same."""

    def selection(rule: Rule) -> tuple[Rule, Replaces]:
        return replace(rule, activation=ActSpec("any"), init="paper"), rule.replaces

    replaced = {selection(rule) for rule in later}
    return tuple(rule for rule in rules if selection(rule) not in replaced) + later


def parse_layers(value: str | int | Iterable[int] | None) -> tuple[int, ...]:
    """Parse '0-9', '0-2+7', '0-2,7', 5 or [0, 1, 7] into sorted layer indices; None becomes ().

    Raises:
        SpecError: The value is none of these.

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
            if first > last or len(indices) > _MAX_LAYERS:
                raise wrong
            indices.extend(range(first, last + 1))
    elif isinstance(value, int):
        indices = [value]
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        indices = list(value)
    else:
        raise wrong
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < _MAX_LAYERS for i in indices):
        raise wrong
    return tuple(sorted(set(indices)))


def format_layers(layers: Iterable[int]) -> str:
    """Format layer indices as ranges.

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


def _is_stock_activation(text: object) -> bool:
    """Return whether a value is a form that stock Ultralytics documents: `nn.Class(literals)`, `torch.nn.Class(…)`."""
    if not isinstance(text, str) or text.strip().startswith(PREFIX):
        return False
    try:
        spec = ActSpec.parse(text)
    except SpecError:
        return False
    return "(" in text and re.fullmatch(r"(torch\.)?nn\.\w+", spec.name) is not None


def _evaluate_argument(text: str) -> object:
    """Return the argument of `rtdetr_act.Plan(…)`, a literal; raise SpecError if it is not one."""
    _check_length(text, _LONGEST_FORM)
    try:
        return ast.literal_eval(text.removeprefix(_CALL.rstrip("(")))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise SpecError(
            f"{quote(text)} is not a plan: write, say, rtdetr_act.arelu or rtdetr_act.Plan('arelu@backbone, mish')"
        ) from None


def _parse_rule(text: str) -> Rule:
    if len(text) > LONGEST_RULE:  # the patterns below take seconds for longer ones
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
    return Rule(ActSpec.parse(match["act"]), tuple(sorted(set(layers))), sections, init=check_init(init))


def _split_init(text: str) -> tuple[str, str]:
    """Split a final `init=…` off a rule, and return both; the init is "paper" if there is none.

    >>> _split_init("prelu(init=0.1)@backbone init=match")
    ('prelu(init=0.1)@backbone', 'match')
    """
    found = re.fullmatch(r"(.*\S)\s+init=([^\s()]+)", text, re.DOTALL)
    return (found[1], found[2]) if found else (text, "paper")


def _split_rules(text: str) -> list[str]:
    """Split a plan into its rules."""
    parts = split_at_commas(text)
    if not all(parts):
        raise SpecError(f"the plan {quote(text)} has an empty rule: write activation[@section or layers], …")
    return parts


def _check_length(text: str, longest: int) -> None:
    if len(text) > longest:
        raise SpecError(f"a plan has {longest:,} characters at most, not {len(text):,}: {quote(text)}")


def _to_strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
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


def check_scope(scope: object) -> Scope:
    """Return `scope` if it is "conv" or "all", else raise SpecError."""
    for known in SCOPES:
        if scope == known:
            return known
    raise SpecError(f"scope is 'conv' or 'all', not {quote(scope)}")


def _check_act_lr(value: object) -> float:
    if not _is_number(value) or value <= 0:
        raise SpecError(f"act_lr is a positive factor such as 0.1, not {quote(value)}")
    return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


def check_init(value: object) -> Init:
    """Return `value` if it is "paper" or "match", else raise SpecError."""
    for known in INITS:
        if value == known:
            return known
    raise SpecError(f"init is 'paper' or 'match', not {quote(value)}{suggest(value, INITS)}")


def _check_fitted(value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"fitted is true or false, not {quote(value)}")
    return value


def _schedule_end(activation: ActSpec) -> float | None:
    """Return the epoch at which the schedule of an activation's temperature finishes, or None without a schedule."""
    given = {**_get_default_arguments(activation.name), **dict(activation.kwargs)}
    epochs = given.get("tau_epochs", 0)
    if not _is_number(epochs):
        raise SpecError(f"tau_epochs is a number of epochs such as 10, not {quote(epochs)}")
    return float(epochs) if given.get("tau_start") is not None else None


def _get_default_arguments(name: str) -> dict[str, Any]:
    from rtdetr_act.activations.registry import (
        get_default_arguments,  # brings torch, which the command line starts without
    )

    return get_default_arguments(name)


def _check_keys(what: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise SpecError(f"{quote(key)} is not a key of '{what}': use {', '.join(known)}{suggest(key, known)}")
