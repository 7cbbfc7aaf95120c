"""Plans: what can be written, what is refused, and that every form comes back as it went."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import tiny
import yaml
from fuzzing.inputs import plans, rules, specs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from rtdetr_act import create, patch_model, register
from rtdetr_act.errors import SelectionError, SpecError
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.model_plan import normalise_model_yaml, set_yaml_plan, split_model_yaml
from rtdetr_act.surgery.patcher import resolve_plan
from rtdetr_act.surgery.plan import SECTIONS, Plan, Rule, format_layers, parse_layers

MODEL = {
    "nc": 3,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2], "mish"]],
    "head": [[[0, 1], 1, "Detect", ["nc"], "leaky_relu(0.1)"]],
}


class Place(NamedTuple):
    """What a rule can select."""

    name: str
    layer: int
    section: str
    layout: str = "map"
    replaces: str = "activation"
    activation: str | None = "relu"


def test_words_behind_a_rule_say_how_it_starts() -> None:
    plan = Plan.parse("prelu(init=0.1)@backbone init=match, mish, dynamic_conv(kernels=2)@neck")
    first, second, third = plan.rules
    assert (first.init, second.init) == ("match", "paper")
    assert first.activation == ActSpec("prelu", (), (("init", 0.1),)) and first.sections == ("backbone",)
    assert third == Rule(ActSpec("dynamic_conv", (), (("kernels", 2),)), sections=("neck",))
    assert [rule.replaces for rule in plan.rules] == ["activation", "activation", "convolution"]
    assert Plan.parse(str(plan)) == plan
    assert [rule.init for rule in Plan.parse("prelu, mish", init="match").rules] == ["match", "match"]
    with pytest.raises(SpecError, match="did you mean 'match'"):
        Plan.parse("arelu init=mach")


def test_from_names_what_stands_there_now() -> None:
    plan = Plan.parse("hardswish@backbone init=match from=nn.SiLU()+ReLU, mish from=DyReLU-B, prelu, dynamic_conv@neck")
    assert [rule.holding for rule in plan.rules] == [("nn.SiLU", "ReLU"), ("DyReLU-B",), (), ()]
    assert plan.rules[0].init == "match" and plan.rules[0].where == "@backbone from=nn.SiLU+ReLU"
    assert str(plan.rules[0]) == "hardswish@backbone from=nn.SiLU+ReLU init=match"
    assert Plan.parse(str(plan)) == plan == Plan.from_yaml(yaml.safe_load(yaml.safe_dump(plan.to_yaml())))
    given = Plan.parse("mish from=relu, prelu, dynamic_conv", replaces=["silu", "swish"])
    assert [rule.holding for rule in given.rules] == [("relu",), ("silu", "swish"), ()]
    assert [str(rule) for rule in resolve_plan(given).rules] == ["mish from=relu", "prelu from=silu", "dynamic_conv"]
    rule = plan.rules[0]
    assert rule.selects(Place("a", 0, "backbone", activation="silu"))
    assert not rule.selects(Place("a", 0, "backbone", activation="mish"))
    assert not rule.selects(Place("a", 0, "backbone", activation=None))
    assert not rule.selects(Place("a", 9, "neck", activation="silu"))


@pytest.mark.parametrize("names", ["silu+relu", ["silu", "relu"], ("nn.SiLU()", "nn.ReLU()")])
@pytest.mark.parametrize("form", ["key", "text", "row"])
def test_from_in_a_model_yaml(names: str | list[str], form: str) -> None:
    text = "arelu from=" + (names if isinstance(names, str) else "+".join(names))
    model_yaml = copy.deepcopy(MODEL)
    if form == "row":
        model_yaml["backbone"][1][4] = text
    else:
        value = {"rules": [{"activation": "arelu", "from": list(names) if isinstance(names, tuple) else names}]}
        model_yaml["activation"] = value if form == "key" else text
    plan = resolve_plan(split_model_yaml(model_yaml)[1])
    expected = Rule(ActSpec("arelu"), holding=("silu", "relu"))
    if form == "row":
        expected = replace(expected, layers=(1,), scope="all")
    assert expected in plan.rules
    assert Plan.from_yaml(plan.to_yaml()) == plan


def test_a_row_takes_the_words_of_a_rule_but_no_place() -> None:
    def read(text: str) -> Rule:
        return split_model_yaml({**MODEL, "backbone": [[-1, 1, "Conv", [8, 3, 2], text]]})[1].rules[0]

    assert read("prelu init=match") == Rule(ActSpec("prelu"), (0,), scope="all", init="match")
    assert read("dynamic_conv init=match").init == "paper"
    with pytest.raises(SpecError, match="row 0 of 'backbone' in the model YAML: 'arelu@3' names layers"):
        read("arelu@3")


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("arelu from=silo", {}, "from= is wrong: .*did you mean 'silu'"),
        ("arelu from=dynamic_conv", {}, "'dynamic_conv' replaces a convolution"),
        ("dynamic_conv from=silu", {}, "'dynamic_conv from=silu' replaces convolutions"),
        ("dynamic_conv", {"replaces": "silu"}, "'dynamic_conv' replaces convolutions"),
        ("arelu from=", {}, "from= takes names of activations"),
        ("arelu from=silu+", {}, "from= takes names of activations"),
        ("arelu from=leaky_relu(0.1)", {}, "is not an activation"),
        ("arelu from=silu from=relu", {}, "from= twice"),
        ("arelu init=match init=match", {}, "init= twice"),
        ("arelu form=silu", {}, "'form=silu' is not a word of a rule.*did you mean 'from'"),
        ("arelu scope=all", {}, "'scope=all' is not a word of a rule"),
        ("arelu", {"replaces": []}, "replaces= is empty"),
        ("arelu", {"replaces": ""}, "replaces= takes names"),
        ("arelu", {"replaces": [1]}, "replaces= takes names"),
        ("arelu", {"replaces": 3}, "replaces= takes names"),
        ("arelu", {"replaces": {"silu": 1}}, "replaces= takes names"),
        ("arelu memory=lo", {}, "memory is 'normal' or 'low', not 'lo'; did you mean 'low'"),
        ("arelu memory=low memory=low", {}, "memory= twice"),
        ("memory=", {}, "memory is 'normal' or 'low'"),
        ("arelu", {"memory": 1}, "memory is 'normal' or 'low', not 1"),
        ("arelu mish", {}, "no activation 'arelu mish' in the zoo"),
        ("Dynamic ReLU", {}, "'dyrelu_a', 'dyrelu_b' or 'dyrelu_c'"),
        ("dyrelu@backbone", {}, "'dyrelu_a', 'dyrelu_b' or 'dyrelu_c'"),
    ],
)
def test_a_wrong_word_is_one_sentence(text: str, more: dict, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        resolve_plan(Plan.parse(text, **more))
    assert "\n" not in str(caught.value)


def test_sections_can_be_given_as_layers() -> None:
    for text in ("backbone", "backbone+12", "neck+backbone+0-3"):
        assert Plan.parse("arelu", layers=text) == Plan.parse(f"arelu@{text}")
        assert Plan.from_yaml({"rules": [{"activation": "arelu", "layers": text}]}) == Plan.parse(f"arelu@{text}")
    mixed = Rule.from_yaml({"activation": "arelu", "layers": "backbone, 12", "sections": ["backbone", "head"]})
    assert (mixed.layers, mixed.sections) == ((12,), ("backbone", "head"))
    with pytest.raises(SpecError, match="names its layers already"):
        Plan.parse("arelu@3", layers="backbone")
    with pytest.raises(SpecError, match="did you mean 'backbone'"):
        Plan.parse("arelu", layers="bakbone+12")


@pytest.mark.parametrize(
    ("text", "name"),
    [("nn.Mish", "mish"), ("nn.Mish()", "mish"), ("torch.nn.Mish()", "mish"), ("F.silu", "silu"), ("AReLU", "arelu"),
     ("leakyrelu", "leaky_relu"), ("Leaky ReLU(0.1)", "leaky_relu(0.1)"), ("hard swish@neck", "hardswish@neck"),
     ("Dynamic ReLU-B@backbone from=silu", "dyrelu_b@backbone from=silu"), ("lrelu", "leaky_relu")],
)  # fmt: skip
def test_other_spellings_mean_the_same(text: str, name: str) -> None:
    plan = Plan.parse(text)
    assert str(resolve_plan(plan)) == name
    assert Plan.parse(str(plan)) == plan


@given(specs)
def test_a_spec_reads_back_from_its_text(spec: ActSpec) -> None:
    again = ActSpec.parse(str(spec))
    assert again == spec


@given(plans)
def test_a_plan_reads_back_from_yaml_text(plan: Plan) -> None:
    text = yaml.safe_dump(plan.to_yaml())
    assert Plan.from_yaml(yaml.safe_load(text)) == plan


@given(plans)
def test_what_a_model_yaml_stores_reads_back_and_fails_in_stock_code(plan: Plan) -> None:
    text = plan.to_model_yaml()
    assert Plan.from_yaml(text) == plan
    assert yaml.safe_load(yaml.safe_dump({"activation": text})) == {"activation": text}
    if plan:
        with pytest.raises(NameError, match="name 'rtdetr_act' is not defined"):
            eval(text, {})  # as Ultralytics does


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan.parse("arelu"), "rtdetr_act.arelu"),
        (Plan.parse("elu(1e999)"), "rtdetr_act.elu(1e999)"),
        (Plan.parse("elu([0.1, (1e999,), -1e999])"), "rtdetr_act.elu([0.1, (1e999,), -1e999])"),
        (Plan.parse("gelu(approximate='tanh')"), "rtdetr_act.gelu(approximate='tanh')"),
        (Plan.parse("DyReLU-B"), "rtdetr_act.Plan('DyReLU-B')"),
        (Plan.parse("gelu('tanh')@0-9, mish"), """rtdetr_act.Plan("gelu('tanh')@0-9, mish")"""),
        (Plan.parse("arelu@neck init=match"), "rtdetr_act.Plan('arelu@neck init=match')"),
        (Plan.parse("Plan(1)"), "rtdetr_act.Plan('Plan(1)')"),
        (Plan.parse("nn.LeakyReLU(0.1)"), "rtdetr_act.Plan({'rules': [{'activation': 'nn.LeakyReLU(0.1)'}]})"),
        (
            Plan.parse("elu(1e999)", exclude=("a'b", 'c"d')),
            """rtdetr_act.Plan({'rules': [{'activation': 'elu(1e999)', 'exclude': ["a'b", 'c"d']}]})""",
        ),
        (
            Plan.parse("mish", scope="all", act_lr=1e-300),
            "rtdetr_act.Plan({'rules': [{'activation': 'mish', 'scope': 'all'}], 'act_lr': 1e-300})",
        ),
        (
            replace(Plan.parse("mish").followed_by(Plan.parse("relu", init="match")), fitted=True),
            "rtdetr_act.Plan({'rules': [{'activation': 'relu', 'init': 'match'}], "
            "'base': {'rules': [{'activation': 'mish'}]}, 'fitted': True})",
        ),
        (
            replace(Plan.parse("mish@neck"), default_act="nn.ReLU()"),
            "rtdetr_act.Plan({'rules': [{'activation': 'mish', 'sections': ['neck']}], 'default_act': 'nn.ReLU()'})",
        ),
        (Plan.parse("arelu", memory="low"), "rtdetr_act.Plan('arelu memory=low')"),
        (
            Plan.parse("arelu memory=low from=relu, mish@neck"),
            "rtdetr_act.Plan('arelu from=relu, mish@neck memory=low')",
        ),
        (Plan(memory="low"), "rtdetr_act.Plan('memory=low')"),
        (
            replace(Plan(memory="low"), default_act="nn.ReLU()"),
            "rtdetr_act.Plan({'rules': [], 'default_act': 'nn.ReLU()', 'memory': 'low'})",
        ),
        (Plan(default_act="nn.ReLU()"), "nn.ReLU()"),
        (Plan(), None),
    ],
)
def test_the_shortest_form_that_says_all_is_stored(plan: Plan, text: str | None) -> None:
    assert plan.to_model_yaml() == text
    assert Plan.from_yaml(text) == plan


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (" rtdetr_act.arelu ", "arelu"),
        ("rtdetr_act.dyrelu_b@backbone, dyrelu_c@neck", "dyrelu_b@backbone, dyrelu_c@neck"),
        ("rtdetr_act.dyrelu_b@backbone, rtdetr_act.dyrelu_c@neck", "dyrelu_b@backbone, dyrelu_c@neck"),
        ("rtdetr_act.leaky_relu(0.1)@0-9 init=match", "leaky_relu(0.1)@0-9 init=match"),
        ("rtdetr_act.nn.LeakyReLU(0.1)", "nn.LeakyReLU(0.1)"),
        ('rtdetr_act.Plan("arelu")', "arelu"),
        ('rtdetr_act.Plan(\n  {"rules": [{"activation": "arelu"}]}\n)', "arelu"),
        ("rtdetr_act.Plan('rtdetr_act.arelu')", "arelu"),
    ],
)
def test_what_a_hand_may_write(text: str, plan: str) -> None:
    assert Plan.from_yaml(text) == Plan.parse(plan)


@pytest.mark.parametrize(
    "text",
    [
        "rtdetr_act.",
        "rtdetr_act.Plan",
        "rtdetr_act.Plan(",
        "rtdetr_act.Plan()",
        "rtdetr_act.Plan(arelu)",
        "rtdetr_act.Plan('arelu', 'mish')",
        "rtdetr_act.Plan('arelu')('mish')",
        "rtdetr_act.Plan('arelu').rules",
        "rtdetr_act.Plan('arelu') + 1",
        "rtdetr_act.Plan(['arelu'])",
        "rtdetr_act.Plan({'rules': []}, act_lr=3)",
        "rtdetr_act.Plan({[]: 1})",
        "rtdetr_act.Plan({'rule': []})",
        "rtdetr_act.Plan(open('ran', 'w'))",
        "rtdetr_act.Plan('arelu,,mish')",
        "rtdetr_act.Plan(" + "(" * 900_000,
        "rtdetr_act.Plan(" + "-" * 900_000 + "1)",
        "rtdetr_act.Plan('" + "x" * 2_000_000 + "')",
        "rtdetr_act.plan('arelu')",
        "rtdetr_act.open('ran', 'w')",
    ],
)
def test_what_is_no_stored_form_is_a_sentence(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve_plan(Plan.from_yaml(text))
    assert len(str(caught.value)) < 400


def test_a_plan_too_long_to_be_read_back_is_not_stored() -> None:
    plan = Plan((Rule(ActSpec("arelu"), include=("x" * 2_000_000,)),))
    with pytest.raises(SpecError, match="1,000,000 characters at most"):
        plan.to_model_yaml()


@pytest.mark.parametrize("value", ["arelu", "rtdetr_act.arelu", {"rules": [{"activation": "arelu"}]}])
def test_a_model_built_from_a_mapping_stores_the_form_of_today(value: object) -> None:
    model = DetectionModel(tiny.with_rows(tiny.yolo(), {}, activation=value), verbose=False)
    assert model.yaml["activation"] == "rtdetr_act.arelu"
    model = DetectionModel(tiny.with_rows(tiny.yolo(), {1: "mish"}, activation=value), verbose=False)
    rules = "[{'activation': 'arelu'}, {'activation': 'mish', 'layers': '1', 'scope': 'all'}]"
    assert model.yaml["activation"] == f"rtdetr_act.Plan({{'rules': {rules}}})"
    assert {len(row) for row in model.yaml["backbone"] + model.yaml["head"]} == {4}
    given = {**tiny.yolo(), "activation": "nn.ReLU()"}
    assert DetectionModel(given, verbose=False).yaml is given, "what names no activation of ours is left alone"


@given(plans)
def test_a_plan_survives_in_a_model_yaml(plan: Plan) -> None:
    stock, found = split_model_yaml(set_yaml_plan(MODEL, plan))
    assert found == plan
    assert all(len(row) == 4 for part in ("backbone", "head") for row in stock[part])


@given(st.sets(st.integers(0, 200), min_size=1))
def test_layers_read_back_from_ranges(layers: set[int]) -> None:
    assert parse_layers(format_layers(layers)) == tuple(sorted(layers))


@given(rules, st.integers(0, 60), st.sampled_from(SECTIONS), st.sampled_from(["map", "tokens"]))
def test_a_rule_selects_what_it_says(rule: Rule, layer: int, section: str, layout: str) -> None:
    selected = rule.selects(Place("model.1.cv2.act", layer, section, layout))
    hidden = layout == "tokens" and rule.scope == "conv"
    if hidden or (rule.holding and "nn.ReLU" not in rule.holding):
        assert not selected
    elif not (rule.layers or rule.sections or rule.include or rule.exclude):
        assert selected
    if selected and rule.layers and not rule.sections:
        assert layer in rule.layers
    if selected and "*.cv2.*" in rule.exclude:
        pytest.fail("an excluded name was selected")


def test_the_plan_string_of_the_readme() -> None:
    plan = Plan.parse("dyrelu_b@backbone, dyrelu_c@neck, silu@22-27")
    assert [str(rule) for rule in plan.rules] == ["dyrelu_b@backbone", "dyrelu_c@neck", "silu@22-27"]
    assert str(plan.find_rule(Place("model.3.act", 3, "backbone"))) == "dyrelu_b@backbone"
    assert str(plan.find_rule(Place("model.22.act", 22, "neck"))) == "silu@22-27", "the later rule wins"
    assert plan.find_rule(Place("model.28.act", 28, "head")) is None


def test_commas_inside_arguments_split_nothing() -> None:
    assert len(Plan.parse("softplus(beta=2, threshold=3)@0-9, mish").rules) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "arelu,,mish",
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "leaky_relu(negative_slope=x)",
        "leaky_relu(*[1])",
        "leaky_relu(**{'a': 1})",
        "leaky_relu(0.1",
        "arelu@",
        "arelu@tail",
        "arelu@9-0",
        "arelu@0-9@neck",
        "1 + 1",
        "a b",
        "x" * 10 + "(" * 3000,
    ],
)
def test_what_is_no_plan_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        Plan.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["a.b", -1, [True], [-1], [1.5], "3-1", "1,,2", True, ""])
def test_wrong_layers_are_refused(value: object) -> None:
    with pytest.raises(SpecError):
        parse_layers(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "0.1", True])
def test_a_wrong_act_lr_is_refused(value: object) -> None:
    with pytest.raises(SpecError, match="act_lr"):
        Plan.parse("arelu", act_lr=value)  # type: ignore[arg-type]


def test_rows_and_top_level_become_one_plan() -> None:
    stock, plan = split_model_yaml({**MODEL, "activation": "arelu"})
    assert "activation" not in stock
    assert plan.to_yaml() == {
        "rules": [
            {"activation": "arelu"},
            {"activation": "mish", "layers": "1", "scope": "all"},
            {"activation": "leaky_relu(0.1)", "layers": "2", "scope": "all"},
        ]
    }


def test_normalising_twice_changes_nothing_and_the_input_is_left_alone() -> None:
    before = yaml.safe_dump(MODEL)
    once = normalise_model_yaml(MODEL)
    assert normalise_model_yaml(once) == once
    assert yaml.safe_dump(MODEL) == before


def test_stock_forms_keep_their_stock_meaning() -> None:
    for text in ("nn.SiLU()", "torch.nn.LeakyReLU(0.1)"):
        plan = Plan.from_yaml(text)
        assert not plan and plan.default_act == text and plan.to_yaml() == text


@pytest.mark.parametrize(
    "row", [[-1, 1, "Conv", [8], "arelu", 6], [-1, 1, "Conv"], "Conv", [-1, 1, "Conv", [8], 3], [-1, 1, "C", [8], None]]
)
def test_a_wrong_row_is_named(row: object) -> None:
    with pytest.raises(SpecError, match="row 1 of 'backbone'"):
        split_model_yaml({**MODEL, "backbone": [MODEL["backbone"][0], row]})


@pytest.mark.parametrize(
    "value",
    [
        ["arelu"],
        3,
        {"rule": []},
        {"rules": "arelu"},
        {"rules": [{"act": "arelu"}]},
        {"rules": [{"activation": "arelu", "section": "neck"}]},
        {"rules": [], "default_act": "open('x')"},
        "open('x', 'w').close()",
    ],
)
def test_a_wrong_activation_value_is_refused(value: object) -> None:
    with pytest.raises(SpecError):
        split_model_yaml({**MODEL, "activation": value})


def test_patching_again_replaces_a_rule_with_the_same_selection() -> None:
    first, second = Plan.parse("arelu, mish@neck"), Plan.parse("dyrelu_b")
    assert str(first.followed_by(second)) == "mish@neck, dyrelu_b"


def test_memory_is_of_the_whole_plan_and_stays_until_it_is_said_again() -> None:
    plan = Plan.parse("arelu memory=low").followed_by(Plan.parse("mish@neck"))
    assert plan == Plan.parse("arelu, mish@neck", memory="low")
    assert plan.followed_by(Plan.parse("relu init=match")).memory == "low"
    assert plan.followed_by(Plan.parse("memory=normal")).memory == "normal"
    with pytest.raises(SpecError, match="memory= is of the whole model"):
        split_model_yaml({"backbone": [[-1, 1, "Conv", [8], "arelu memory=low"]], "head": []})


def test_from_looks_at_what_stood_there_before_its_plan() -> None:
    first, second = Plan.parse("mish from=silu, dynamic_conv"), Plan.parse("arelu from=mish", act_lr=0.5)
    plan = first.followed_by(second)
    assert str(plan) == "mish from=silu; then dynamic_conv, arelu from=mish"
    assert plan.base == Plan.parse("mish from=silu") and plan.act_lr == 0.5
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert (
        str(plan.followed_by(Plan.parse("relu@neck")))
        == "mish from=silu; then dynamic_conv, arelu from=mish, relu@neck"
    )
    assert [str(stage) for stage in plan.stages] == ["mish from=silu", "dynamic_conv, arelu from=mish"]
    assert Plan.parse("dynamic_conv").followed_by(second).base is None, "there is nothing that it could look at"


def test_a_fit_that_is_due_stays_due_under_another_stage() -> None:
    due = Plan.parse("mish").followed_by(Plan.parse("prelu init=match"))
    above = due.followed_by(Plan.parse("arelu@neck from=prelu"))
    assert above.needs_fit and above.reference == Plan.parse("mish")
    assert not replace(above, fitted=True).needs_fit
    assert not replace(due, fitted=True).followed_by(Plan.parse("arelu@neck from=prelu")).needs_fit
    both = due.followed_by(Plan.parse("arelu@neck from=prelu init=match"))
    assert both.needs_fit and both.reference == due
    assert Plan.parse("mish").followed_by(Plan.parse("arelu from=mish")).reference == Plan()


def test_schedules_below_another_stage_go_on_and_end() -> None:
    plan = Plan.parse("dyrelu_c(tau_start=30.0, tau_epochs=5)").followed_by(Plan.parse("arelu@neck from=dyrelu_c"))
    assert plan.schedule_ends() == (5.0,)
    assert plan.without_finished_schedules(4) == plan
    assert str(plan.without_finished_schedules(5)) == "dyrelu_c; then arelu@neck from=dyrelu_c"


# --- what a user gets wrong -----------------------------------------------------------------------------------------

CYCLE: dict = {"rules": [{"activation": "arelu"}]}
CYCLE["base"] = CYCLE
LAUGHS: list = ["ha"]
for _ in range(30):
    LAUGHS = [LAUGHS] * 9
WRONG = [
    None, True, 0, -1, 1.5, 1j, 10**400, float("nan"), float("inf"), "", " ", "x", "a\nb", "\x1b[2J", "9" * 5000,
    b"x", [], [[]], {}, {"a": 1}, (1,), {1, 2}, LAUGHS, CYCLE, [None], ["a", 1], "@", "0-", "5-2", "arelu@", "arelu(",
    "1" * 400 + "-2",
]  # fmt: skip
PLACES = [
    lambda wrong: {"rules": [{"activation": wrong}]},
    *(
        lambda wrong, key=key: {"rules": [{"activation": "arelu", key: wrong}]}
        for key in ("layers", "sections", "include", "exclude", "from", "scope", "init", "unknown")
    ),
    *(
        lambda wrong, key=key: {"rules": [{"activation": "arelu"}], key: wrong}
        for key in ("default_act", "act_lr", "base", "fitted", "unknown")
    ),
    lambda wrong: {"rules": wrong},
    lambda wrong: {"rules": [wrong]},
    lambda wrong: {"rules": [{"activation": "arelu", **({wrong: 1} if isinstance(wrong, (str, int, tuple)) else {})}]},
    lambda wrong: wrong,
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(type(wrong).__name__))
def test_a_wrong_value_is_a_sentence_or_a_plan_that_survives(place, wrong) -> None:
    try:
        plan = Plan.from_yaml(place(wrong))
        assert Plan.from_yaml(plan.to_yaml()) == plan
        list(plan.schedule_ends())
    except SpecError as error:
        assert str(error).isprintable() and len(str(error)) < 500


@given(st.text(alphabet="arelu_b@()[]{},=+-0129.'\" \n\\:*#fom", max_size=40))
def test_any_text_is_a_sentence_or_a_plan_that_survives(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except SpecError as error:
        assert str(error).isprintable() and len(str(error)) < 500
    else:
        assert Plan.from_yaml(plan.to_yaml()) == plan


@pytest.mark.parametrize(
    "text",
    [
        " " * 100_000,
        "a " * 50_000,
        "(" * 50_000,
        "arelu," * 50_000,
        "a@" * 5_000,
        "x" * 100_000,
        "'" * 9_999,
        "a" + " " * 1_990,
        "\U00044495" * 3_000,  # a character that does not print is quoted as ten
    ],
)
def test_a_long_text_is_read_at_once(text: str) -> None:
    try:  # pytest-timeout ends what is not
        Plan.parse(text)
    except SpecError as error:
        assert len(str(error)) < 500


@pytest.mark.usefixtures("own_zoo")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hardtanh(2)", "max_val"),
        ("prelu(init=1j)", "1j"),
        ("leaky_relu({1})", "{1}"),
        ("relu(b'x')", "b'x'"),
        ("elu(" + "9" * 5000 + ")", "not an activation"),
        ("elu(0x" + "f" * 1000 + ")", "integer of"),
        ("dyrelu_c(tau_start=30, tau_epochs='x')", "tau_epochs"),
        ("dyrelu_c(tau_start=30, tau_epochs=-1)", "tau_epochs"),
        ("threshold('a', 'b')", "Number"),
        ("x" * 5000, "no activation"),
        (f"elu({'x' * 1900}=1)", "is wrong"),
        ("dyrelu_b(k=100000000)", "out of range"),
        ("prelu(num_parameters=100000000)", "out of range"),
        ("quits_for_a_test", "SystemExit"),
        ("raises_for_a_test", "KeyError"),
        ("gives_nothing_for_a_test", "not a torch.nn.Module"),
    ],
)
def test_a_wrong_argument_or_factory_is_a_sentence(spec: str, words: str) -> None:
    def quit_now() -> None:
        raise SystemExit(3)

    for name, factory in (
        ("quits_for_a_test", quit_now),
        ("raises_for_a_test", lambda: {}["x"]),
        ("gives_nothing_for_a_test", lambda: None),
    ):
        if spec == name:
            register(name, factory)
    with pytest.raises(SpecError, match=re.escape(words)) as caught:
        create(spec, channels=8)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_base_that_changes_nothing_is_none() -> None:
    plan = Plan.from_yaml({"rules": [{"activation": "arelu"}], "base": {"rules": [], "default_act": "nn.ReLU()"}})
    assert Plan.from_yaml(plan.to_yaml()) == plan == Plan.parse("arelu")


def test_a_rule_that_no_site_follows_is_refused_where_it_was_typed() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())

    for text in ("arelu, silu", "arelu, arelu", "prelu, arelu, mish"):
        with pytest.raises(SelectionError, match=r"would apply nowhere.*repeat act="):
            patch_model(net(), text)
    with pytest.raises(SelectionError, match=r"'elu\(inplace=\[1, 2\]\)' after it"):
        patch_model(net(), "elu(inplace=[1, 2]), elu(inplace=[1, 2])")
    with pytest.raises(SelectionError, match="'dynamic_conv"):
        patch_model(net(), "dynamic_conv(kernels=2), dynamic_conv")
    before = net()
    with pytest.raises(SelectionError):
        patch_model(before, "arelu, silu")
    assert type(before[1]) is nn.ReLU
    # What was read back from a model may have rules that its sites have outgrown.
    plan = Plan.parse("arelu, silu")
    assert len(patch_model(net(), plan)) == 2
    yaml = tiny.with_rows(tiny.yolo(), dict.fromkeys(range(6), "mish"), activation="arelu")
    assert DetectionModel(yaml, verbose=False)
