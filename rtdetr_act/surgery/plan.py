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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from rtdetr_act.errors import InputError, SelectionError, SpecError, quote, suggest
from rtdetr_act.files import convert_write_errors, write_atomically
from rtdetr_act.spec import LONGEST_PLAN, LONGEST_RULE, PREFIX, ActSpec, split_at_commas

if TYPE_CHECKING:
    from typing import TypeGuard

    from rtdetr_act.activations.protocol import Replaces, SiteLayout


Scope = Literal["conv", "all"]
Init = Literal["paper", "match"]
Memory = Literal["normal", "low"]
TreatAs = Literal["activation", "other"]
SECTIONS = ("backbone", "neck", "head")
SCOPES: tuple[Scope, ...] = ("conv", "all")
INITS: tuple[Init, ...] = ("paper", "match")
MEMORIES: tuple[Memory, ...] = ("normal", "low")
TREAT_AS: tuple[TreatAs, ...] = ("activation", "other")
_RULE_KEYS = ("activation", "layers", "sections", "include", "exclude", "from", "scope", "init")
_PLAN_KEYS = ("rules", "default_act", "act_lr", "base", "fitted", "treat_as", "memory")
_MAX_LAYERS = 10_000
_MAX_NUMBER = 1e9  # largest absolute value of a number in a plan
_CALL = f"{PREFIX}Plan("  # of a plan as model YAMLs store it
_LONGEST_FORM = 1_000_000  # characters; a rule for each of the 165 sites of yolo26x takes 20,000
MAX_STAGES = 51  # a plan and its nested bases
_WORDS = ("from", "init")  # what may follow an activation and its sites in the text of a rule
_MEMORY = "memory"  # which may follow too, and is of the whole plan
# Of each schedule, the argument that is None without it and the one that says in which epoch it finishes.
_SCHEDULES = (("tau_start", "tau_epochs"), ("realign_epoch", "realign_epoch"))


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
        holding: Names of activations, `from` in text and YAML. If there are any, only sites match that hold one of them
            before the plan is applied.
    """

    activation: ActSpec
    layers: tuple[int, ...] = ()
    sections: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scope: Scope = "conv"
    init: Init = "paper"
    holding: tuple[str, ...] = ()

    @property
    def replaces(self) -> Replaces:
        """What its activation replaces, an "activation" or a "convolution"."""
        from rtdetr_act.activations.registry import (
            get_replaced_kind,  # brings torch, which the command line starts without
        )

        return get_replaced_kind(self.activation.name)

    def selects(self, site: Selectable) -> bool:
        """Return whether the rule matches a site, by its kind, name, layer, section, layout and present activation."""
        if site.replaces != self.replaces or (self.scope == "conv" and site.layout != "map"):
            return False
        if (self.layers or self.sections) and site.layer not in self.layers and site.section not in self.sections:
            return False
        if self.include and not any(fnmatchcase(site.name, pattern) for pattern in self.include):
            return False
        if any(fnmatchcase(site.name, pattern) for pattern in self.exclude):
            return False
        return not self.holding or site.activation in [_get_registered_name(name) for name in self.holding]

    @property
    def where(self) -> str:
        """The selection as text, such as "@backbone from=silu"; empty if the rule matches all sites in scope."""
        parts = [*self.sections, *([format_layers(self.layers)] if self.layers else [])]
        words = ["@" + "+".join(parts)] if parts else []
        words += [f"from={'+'.join(self.holding)}"] if self.holding else []
        words += [f"include={pattern}" for pattern in self.include]
        words += [f"exclude={pattern}" for pattern in self.exclude]
        words += ["scope=all"] if self.scope == "all" else []
        return " ".join(words)

    def without_finished_schedules(self, epoch: float) -> Rule:
        """Return the rule without the arguments of its schedule, if that has finished after so many epochs."""
        end = _schedule_end(self.activation)
        if end is None or end > epoch:
            return self
        kept = [(key, value) for key, value in self.activation.kwargs if all(key not in keys for keys in _SCHEDULES)]
        defaults = _get_default_arguments(self.activation.name)
        kept += [(switch, None) for switch, _ in _SCHEDULES if defaults.get(switch) is not None]
        return replace(self, activation=replace(self.activation, kwargs=tuple(kept)))

    def to_yaml(self) -> dict[str, Any]:
        """Return the rule as plain data, without defaults."""
        data: dict[str, Any] = {"activation": str(self.activation)}
        if self.layers:
            data["layers"] = format_layers(self.layers)
        for key in ("sections", "include", "exclude"):
            if values := getattr(self, key):
                data[key] = list(values)
        if self.holding:
            data["from"] = list(self.holding)
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
        layers, sections = _parse_places(data.get("layers"))
        return cls(
            ActSpec.parse(data["activation"]),
            layers,
            tuple(dict.fromkeys((*_check_sections(_to_strings(data.get("sections"))), *sections))),
            _to_strings(data.get("include")),
            _to_strings(data.get("exclude")),
            check_scope(data.get("scope", "conv")),
            check_init(data.get("init", "paper")),
            _parse_names("from", data.get("from")),
        )

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse one rule: `activation[@section or layers] [from=names] [init=match]`, the words in any order.

        Raises:
            SpecError: The text is not a rule.

        >>> Rule.parse("hardswish@backbone init=match from=silu+relu").where
        '@backbone from=silu+relu'
        """
        if not isinstance(text, str) or not text.strip():
            raise SpecError(f"a rule is an activation such as 'arelu' or 'leaky_relu(0.1)@backbone', not {quote(text)}")
        if len(text) > LONGEST_RULE:  # the pattern below takes seconds for longer ones
            raise SpecError(f"a rule has {LONGEST_RULE:,} characters at most, not {len(text):,}: {quote(text)}")
        head, words = _split_words(text)
        match = re.fullmatch(r"(?P<act>[^@]+?|.*\))\s*(?:@\s*(?P<where>[^@()]*))?", head, re.DOTALL)
        if match is None:
            raise SpecError(f"{quote(text)} is not a rule: write activation, activation@section or activation@layers")
        layers, sections = _parse_places(match["where"])
        if _MEMORY in words:
            raise SpecError(f"{quote(text)} is one rule, but {_MEMORY}= is of the whole model: see 'activation:'")
        names, init = _parse_names("from", words.get("from")), check_init(words.get("init", "paper"))
        return cls(_parse_activation(match["act"]), layers, sections, init=init, holding=names)

    def __str__(self) -> str:
        """Return e.g. `dyrelu_b@backbone`, `arelu from=silu exclude=model.28.*` or `mish init=match`."""
        where = self.where
        words = [f"{self.activation}{'' if where.startswith('@') or not where else ' '}{where}"]
        words += [f"init={self.init}"] if self.init != "paper" else []
        return " ".join(words)


class SwapOptions(TypedDict, total=False):
    """Options of a swap beside the activation and its sites, with the meaning of the arguments of `patch_model`."""

    scope: Scope
    act_lr: float
    init: Init
    replaces: str | Iterable[str] | None
    memory: Memory | None


@dataclass(frozen=True)
class Plan:
    """An ordered list of rules, of which the last that matches a site applies, and the options of the whole plan.

    Attributes:
        rules: The rules.
        default_act: A stock `activation:` such as "nn.ReLU()", which applies where no rule does. Default: None.
        act_lr: Factor on the learning rate of scalar and per-channel activation parameters. Default: 1.0.
        base: The plan of the network before the swap: rules with `init="match"` are fitted to what stood at their sites
            then, and those with `from` select sites by it. Default: None, the stock network.
        fitted: Whether the network has been fitted already; training does it once. Default: False.
        treat_as: What the user says about classes of modules, by name: that they are an "activation", or "other".
        memory: "low" to keep less for the backward pass and compute it again, "normal" to end that. Default: None, as
            the network has it.

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
    treat_as: tuple[tuple[str, TreatAs], ...] = ()
    memory: Memory | None = None

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
        replaces: str | Iterable[str] | None = None,
        treat_as: Mapping[Any, str] | None = None,
        memory: Memory | None = None,
    ) -> Plan:
        """Parse a plan from text: `activation[@section or layers] [from=names] [init=match][, …] [memory=low]`.

        `memory=low` alone is a plan that changes no activation.

        Args:
            text: The rules. Sections and layer ranges are joined by `+`, as in `arelu@backbone+12+22-27`, and so are
                the names of the activations to replace, as in `arelu from=silu+relu`.
            layers: Layers of all rules, which must then have none of their own: indices, or text such as "0-9" and
                "backbone+12". Default: None.
            include: Glob pattern(s) on site names, of all rules. Default: None.
            exclude: Glob pattern(s) on site names, of all rules. Default: None.
            scope: "conv" (default) or "all", for rules of activations.
            act_lr: See `Plan`. Default: 1.0.
            init: "paper" (default) or "match", for rules of activations without `init=` in the text.
            replaces: Name(s) of activations: only sites match that hold one of them before the plan is applied; for
                rules of activations without `from=` in the text. Default: None.
            treat_as: "activation" or "other" by class, or by its qualified or bare name. Default: None.
            memory: "low" or "normal", if the text does not say. Default: None.

        Raises:
            SpecError: The text, a section, a layer range or a keyword argument is invalid.
        """
        if not isinstance(text, str):
            raise SpecError(f"a plan is a string such as 'dyrelu_b@backbone, dyrelu_c@neck', not {quote(text)}")
        _check_length(text, LONGEST_PLAN)
        indices, sections = _parse_places(layers)
        if layers is not None and not indices and not sections:
            raise SpecError("layers= is empty: give indices such as '0-9', or leave it out")
        names = _parse_names("replaces", replaces)
        if replaces is not None and not names:
            raise SpecError("replaces= is empty: give names of activations such as 'silu', or leave it out")
        check_scope(scope)
        check_init(init)
        rules, memory = [], check_memory(memory)
        for part in _split_rules(text):
            part, own_memory = _take_memory(part)
            memory = own_memory or memory
            if not part:
                continue
            rule = Rule.parse(part)
            if layers is not None:
                if rule.layers or rule.sections:
                    raise SpecError(f"{quote(part)} names its layers already: drop either '@…' or layers=")
                rule = replace(rule, layers=indices, sections=sections)
            rule = replace(rule, include=_to_strings(include), exclude=_to_strings(exclude))
            if rule.replaces == "activation":
                init_of_rule = rule.init if rule.init != "paper" else init
                rule = replace(rule, scope=scope, init=init_of_rule, holding=rule.holding or names)
            else:  # it is initialised as the convolution that it replaces
                rule = replace(rule, init="paper")
            rules.append(rule)
        if names and rules and all(rule.replaces == "convolution" for rule in rules):
            raise SpecError(f"replaces= selects by activation, but {quote(text)} replaces convolutions: leave it out")
        classes = tuple(parse_treat_as(treat_as).items())
        return cls(tuple(rules), act_lr=check_act_lr(act_lr), treat_as=classes, memory=memory)

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
        if depth >= MAX_STAGES:
            raise SpecError(f"'base' under 'activation' is nested {MAX_STAGES} deep or more, or contains itself")
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
            check_act_lr(data.get("act_lr", 1.0)),
            (cls._from_yaml(data["base"], depth + 1) or None) if data.get("base") else None,  # as `to_yaml` writes it
            _check_fitted(data.get("fitted", False)),
            tuple(parse_treat_as(data.get("treat_as")).items()),
            check_memory(data.get("memory")),
        )

    def to_yaml(self) -> dict[str, Any] | str | None:
        """Return the plan as plain data; the stock form or None if it changes nothing."""
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
        if self.treat_as:
            data["treat_as"] = dict(self.treat_as)
        if self.memory:
            data["memory"] = self.memory
        return data

    def save(self, path: str | Path) -> None:
        """Write the plan to a YAML file, whole or not at all; `load` reads it.

        Args:
            path: The file, which is replaced if it exists.

        Raises:
            InputError: The file cannot be written.

        >>> folder = getfixture("tmp_path")
        >>> Plan.parse("arelu@backbone").save(folder / "plan.yaml")
        >>> str(Plan.load(folder / "plan.yaml"))
        'arelu@backbone'
        """
        with convert_write_errors(Path(path)):
            write_atomically(Path(path), self.dump().encode())

    def dump(self) -> str:
        """Return the plan as the YAML that `save` writes."""
        import yaml  # the command line starts without it

        plain = self.to_yaml()
        data = plain if isinstance(plain, dict) else {"rules": [], **({"default_act": plain} if plain else {})}
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file that `save` wrote, or from one in JSON with the plain data of `to_yaml`.

        Nothing in the file is executed.

        Raises:
            InputError: The file cannot be read, is not YAML, or is not a plan.
            SpecError: A rule or an option in it is invalid.
        """
        from rtdetr_act.yaml_files import read_yaml_mapping  # brings yaml, which the command line starts without

        data = read_yaml_mapping(Path(path))
        if "rules" not in data:
            raise InputError(f"{quote(str(path))} is not a plan, which has 'rules': give a file that Plan.save wrote")
        try:
            return cls.from_yaml(data)
        except SpecError as error:
            raise SpecError(f"{quote(str(path))} is not a plan: {error}") from None

    def to_model_yaml(self) -> str | None:
        """Return the value for `activation:` in a model YAML, on which stock Ultralytics fails.

        It is the first of `rtdetr_act.arelu`, `rtdetr_act.Plan('dyrelu_b@backbone, …')` and `rtdetr_act.Plan({…})`,
        with the plain data of `to_yaml`, that says the whole plan; the stock form or None if it changes nothing.

        Raises:
            SpecError: The plan has more than 1,000,000 characters.
        """
        if not self:
            return self.default_act
        text = str(self)
        first = self.rules[0].activation if self.rules else None
        if first and text == str(first) and first.name.isidentifier() and self._equals(f"{PREFIX}{text}"):
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
    def stages(self) -> list[Plan]:
        """The plan and its nested bases, in the order in which they are applied, each without its base."""
        bases = [] if self.base is None else self.base.stages
        return [*bases, replace(self, base=None)]

    @property
    def needs_fit(self) -> bool:
        """Whether the next training must fit the network to the one before the swap."""
        if self.fitted:
            return False
        return self._matches or (self.base is not None and self.base.needs_fit)

    @property
    def reference(self) -> Plan:
        """The plan of the network before the last swap with `init="match"`; one without rules is the stock network."""
        if self._matches or self.base is None:
            return self.base or Plan()
        return self.base.reference

    @property
    def _matches(self) -> bool:
        return any(rule.init == "match" for rule in self.rules)

    def find_rule(self, site: Selectable) -> Rule | None:
        """Return the last rule that matches a site, or None."""
        return next((rule for rule in reversed(self.rules) if rule.selects(site)), None)

    def followed_by(self, other: Plan) -> Plan:
        """Return this plan with the rules of `other` appended; they replace rules with the same selection.

        If `other` has rules with `init="match"` or `from`, the rules of activations in this plan become the base of the
        result. The base of `other` is left out: apply its `stages` one after the other.
        """
        treat_as = tuple({**dict(self.treat_as), **dict(other.treat_as)}.items())
        memory = other.memory or self.memory
        if not any(rule.init == "match" or rule.holding for rule in other.rules):
            act_lr = other.act_lr if any(rule.replaces == "activation" for rule in other.rules) else self.act_lr
            rules = merge_rules(self.rules, other.rules)
            return replace(self, rules=rules, act_lr=act_lr, treat_as=treat_as, memory=memory)
        base = self.without_finished_schedules() if other._matches else self
        base = replace(base, rules=tuple(rule for rule in base.rules if rule.replaces == "activation"))
        kept = tuple(rule for rule in self.rules if rule.replaces == "convolution")
        rules = merge_rules(kept, other.rules)
        base = replace(base, memory=None)
        options: dict[str, Any] = {"default_act": self.default_act, "treat_as": treat_as, "memory": memory}
        return replace(other, rules=rules, base=base if base else base.base, **options)

    def without_finished_schedules(self, epoch: float = math.inf) -> Plan:
        """Return the plan without the schedules that have finished after a number of epochs; by default, without any.

        >>> plan = Plan.parse("dyrelu_c(tau_start=30.0, tau_epochs=5)")
        >>> str(plan.without_finished_schedules(4)), str(plan.without_finished_schedules(5))
        ('dyrelu_c(tau_start=30.0, tau_epochs=5)', 'dyrelu_c')
        """
        rules = tuple(rule.without_finished_schedules(epoch) for rule in self.rules)
        return replace(self, rules=rules, base=self.base and self.base.without_finished_schedules(epoch))

    def schedule_ends(self) -> tuple[float, ...]:
        """Return the epochs at which schedules of the plan and its bases finish, in ascending order."""
        ends = {_schedule_end(rule.activation) for stage in self.stages for rule in stage.rules}
        return tuple(sorted(end for end in ends if end is not None))

    def __bool__(self) -> bool:
        """Return whether the plan changes anything: activations, convolutions, or what is kept for the backward."""
        return bool(self.rules) or self.memory is not None

    def __str__(self) -> str:
        """Return the rules as text, such as `dyrelu_b@backbone, silu@22-27`; with a base, `mish; then arelu from=mish`.

        `parse` accepts it if there are no base, `include`, `exclude` and `scope`.
        """
        rules = "; then ".join(", ".join(map(str, stage.rules)) for stage in self.stages)
        return " ".join(filter(None, (rules, f"{_MEMORY}={self.memory}" if self.memory else "")))


class Selectable(Protocol):
    """Protocol of sites, which rules can match: those of activations and of convolutions."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def layer(self) -> int | None: ...  # noqa: D102
    @property
    def section(self) -> str: ...  # noqa: D102
    @property
    def layout(self) -> SiteLayout: ...  # noqa: D102
    @property
    def replaces(self) -> Replaces: ...  # noqa: D102
    @property
    def activation(self) -> str | None: ...  # noqa: D102


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


def merge_rules(rules: tuple[Rule, ...], later: tuple[Rule, ...]) -> tuple[Rule, ...]:
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
    wrong = SpecError(
        "layers are indices and ranges such as '0-9' or '3+22-27', and sections such as 'backbone+12', not "
        f"{quote(value)}"
    )
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


def _parse_places(value: str | int | Iterable[int] | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Parse what `parse_layers` takes, and text that names sections too; return the layer indices and the sections.

    >>> _parse_places("backbone+12+22-27")
    ((12, 22, 23, 24, 25, 26, 27), ('backbone',))
    """
    if not isinstance(value, str):
        return parse_layers(value), ()
    parts = [part.strip() for part in re.split(r"[+,]", value[:LONGEST_PLAN])]
    named = [part for part in parts if part[:1].isalpha()]
    numbered = [part for part in parts if not part[:1].isalpha()]
    return parse_layers("+".join(numbered) if numbered else None), _check_sections(tuple(dict.fromkeys(named)))


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


def _split_words(text: str) -> tuple[str, dict[str, str]]:
    """Split the words `from=…` and `init=…` off the end of a rule; return the rest, and the values by key.

    >>> _split_words("prelu(init=0.1)@backbone from=silu init=match")
    ('prelu(init=0.1)@backbone', {'init': 'match', 'from': 'silu'})
    """
    head, words = text.strip(), dict[str, str]()
    while len(parts := head.rsplit(None, 1)) == 2:
        match = re.fullmatch(r"(\w+)=((?:[^()]|\(\))*)", parts[1])  # within arguments, a closing bracket follows
        if match is None:
            break
        head, key = parts[0], match[1]
        if key not in (*_WORDS, _MEMORY):
            known = " and ".join(f"{word}=" for word in _WORDS)
            raise SpecError(f"{quote(parts[1])} is not a word of a rule, which takes {known}{suggest(key, _WORDS)}")
        if key in words:
            raise SpecError(f"{quote(text)} has {key}= twice")
        words[key] = match[2]
    return head, words


def _take_memory(text: str) -> tuple[str, Memory | None]:
    """Take the word `memory=…`, which is of a whole plan, out of the text of a rule.

    >>> _take_memory("arelu memory=low from=silu"), _take_memory("memory=low")
    (('arelu from=silu', 'low'), ('', 'low'))
    """
    head, words = _split_words(text) if f"{_MEMORY}=" in text else (text, {})
    if alone := re.fullmatch(rf"{_MEMORY}=(.*)", head):
        head, words = "", {**words, _MEMORY: alone[1]}
    if _MEMORY not in words:
        return text, None
    memory = check_memory(words.pop(_MEMORY))
    return " ".join(filter(None, (head, *(f"{key}={value}" for key, value in words.items())))), memory


def _parse_activation(text: str) -> ActSpec:
    """Parse an activation, whose name may have spaces if the registry knows it, as in `Leaky ReLU(0.1)`."""
    name, bracket, arguments = text.partition("(")
    parts = name.split()
    if len(parts) < 2 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        return ActSpec.parse(text)
    from rtdetr_act.activations.registry import get_entry  # brings torch, which the command line starts without

    get_entry(" ".join(parts))
    return ActSpec.parse("_".join(parts) + bracket + arguments)


def _parse_names(key: str, value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Parse 'silu', 'silu+relu', 'nn.SiLU()' or a list of them into names; None becomes ().

    Args:
        key: What the value was given as, for the error message.
        value: The value.
    """
    parts = value.split("+") if isinstance(value, str) else value
    if parts is None:
        return ()
    if isinstance(parts, Iterable) and not isinstance(parts, (bytes, Mapping)):
        parts = list(parts)
        names = [part.strip().removesuffix("()") for part in parts if isinstance(part, str)]
        if len(names) == len(parts) and all(re.fullmatch(r"[A-Za-z_][\w.-]*", name) for name in names):
            return tuple(dict.fromkeys(names))
    raise SpecError(f"{key}= takes names of activations such as 'silu' or 'silu+relu', not {quote(value)}")


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
                f"{quote(section)} is not a section: use backbone, neck, head or layer indices such as 0-9"
                f"{suggest(section, SECTIONS)}"
            )
    return sections


def check_scope(scope: object) -> Scope:
    """Return `scope` if it is "conv" or "all", else raise SpecError."""
    for known in SCOPES:
        if scope == known:
            return known
    raise SpecError(f"scope is 'conv' or 'all', not {quote(scope)}")


def check_act_lr(value: object) -> float:
    """Return `value` as a float if it is a positive number, else raise SpecError."""
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


def check_memory(value: object) -> Memory | None:
    """Return `value` if it is "normal", "low" or None, else raise SpecError."""
    if value is None:
        return None
    for known in MEMORIES:
        if value == known:
            return known
    raise SpecError(f"memory is 'normal' or 'low', not {quote(value)}{suggest(value, MEMORIES)}")


def parse_treat_as(given: Mapping[Any, str] | None) -> dict[str, TreatAs]:
    """Return what a user says about classes, by name.

    Args:
        given: "activation" or "other" by class, qualified class name or bare class name.

    Raises:
        SpecError: A key is not a class or name, or a value is neither.

    >>> parse_treat_as({"Swish": "activation"})
    {'Swish': 'activation'}
    """
    if given is not None and not isinstance(given, Mapping):
        raise SpecError(f"treat_as= is a mapping such as {{'Swish': 'activation'}}, not {quote(given)}")
    found: dict[str, TreatAs] = {}
    for key, value in (given or {}).items():
        if not isinstance(key, (str, type)):
            raise SpecError(f"treat_as= takes classes or their names, not {quote(key)}")
        if value not in TREAT_AS:
            raise SpecError(f"treat_as= says 'activation' or 'other' of a class, not {quote(value)}")
        name = key if isinstance(key, str) else f"{key.__module__}.{key.__qualname__}"
        found[name] = value
    return found


def _check_fitted(value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"fitted is true or false, not {quote(value)}")
    return value


def _schedule_end(activation: ActSpec) -> float | None:
    """Return the epoch at which the schedule of an activation finishes, or None without a schedule."""
    given = {**_get_default_arguments(activation.name), **dict(activation.kwargs)}
    for switch, end in _SCHEDULES:
        epochs = given.get(end)
        if epochs is not None and not _is_number(epochs):
            raise SpecError(f"{end} is a number of epochs such as 10, not {quote(epochs)}")
        if epochs is not None and given.get(switch) is not None:
            return float(epochs)
    return None


def _get_default_arguments(name: str) -> dict[str, Any]:
    from rtdetr_act.activations.registry import (
        get_default_arguments,  # brings torch, which the command line starts without
    )

    return get_default_arguments(name)


def _get_registered_name(name: str) -> str:
    from rtdetr_act.activations.registry import (
        get_registered_name,  # brings torch, which the command line starts without
    )

    return get_registered_name(name)


def _check_keys(what: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise SpecError(f"{quote(key)} is not a key of '{what}': use {', '.join(known)}{suggest(key, known)}")
