"""Strategies of what others may write: texts, YAML, checkpoints and command lines, right, nearly right and absurd."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import tiny
import yaml
from hypothesis import strategies as st

from fuzzing.watch import PLANTED
from rtdetr_act import create, names
from rtdetr_act.errors import RtdetrActError
from rtdetr_act.spec import ActSpec
from rtdetr_act.surgery.plan import SECTIONS, Plan, Rule

# --- plans ----------------------------------------------------------------------------------------------------------

literals = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(max_size=5), st.none())
spellings = st.sampled_from(["arelu", "leaky_relu", "nn.SiLU", "dyrelu_b"])
specs = st.builds(
    ActSpec,
    spellings,
    st.lists(literals, max_size=2).map(tuple),
    st.dictionaries(st.sampled_from(["a", "slope"]), literals, max_size=2).map(lambda d: tuple(d.items())),
)
patterns = st.lists(st.sampled_from(["*.cv2.*", "model.28.*", "*act"]), max_size=2, unique=True).map(tuple)
rules = st.builds(
    Rule,
    specs,
    st.sets(st.integers(0, 60), max_size=8).map(lambda layers: tuple(sorted(layers))),
    st.lists(st.sampled_from(SECTIONS), max_size=2, unique=True).map(tuple),
    patterns,
    patterns,
    st.sampled_from(["conv", "all"]),
    st.sampled_from(["paper", "match"]),
    st.lists(st.sampled_from(["silu", "nn.ReLU", "DyReLU-B"]), max_size=2, unique=True).map(tuple),
)
_plan_arguments = (
    st.lists(rules, min_size=1, max_size=4).map(tuple),
    st.sampled_from([None, "nn.ReLU()", "torch.nn.LeakyReLU(0.1)"]),
    st.floats(0.001, 100),
)
_bases = st.one_of(st.none(), st.none(), st.builds(Plan, *_plan_arguments))
_memories = st.sampled_from([None, None, "low", "normal"])
plans = st.builds(Plan, *_plan_arguments, base=_bases, fitted=st.booleans(), memory=_memories)

# --- texts ----------------------------------------------------------------------------------------------------------

ODD_TEXTS = [
    "", " ", "\n", "\r", "\t", "\0", "\x1b[2J", "\u202e", "\ud800", "é", "e\u0301", "ａ", "𝔞", "١", "²", "'", '"', "\\",
    "`", "(", ")", "[", "]", "{", "}", ",", ",,", "@", "@@", "+", "-", "=", "*", "**", "#", ":", ".", "_", "1e999",
    "nan", "inf", "-1", "0x", "9" * 50, "9" * 5000, "1" * 400, "x" * 300, "x" * 3000, "True", "None", "lambda: 1", "1j",
    "b'x'", " for x in y", "init=", "init=match", "from=", " from=silu+relu", " from=nn.SiLU()", "form=", "stock",
    f"__import__('os').system('touch {PLANTED}')", f"open('{PLANTED}', 'w')",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, texts: st.SearchStrategy[str], odd: Sequence[str] = ODD_TEXTS) -> str:
    """Give texts with up to three places left out, doubled, repeated without end, or replaced by something odd."""
    text = draw(texts)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 6)))
        part = draw(
            st.one_of(
                st.sampled_from(odd),
                st.text(max_size=3),
                st.sampled_from([2, 2, 2, 50, 2000]).map(lambda times, old=text[start:end]: old * times),
            )
        )
        text = text[:start] + part + text[end:]
    return text


@functools.cache
def parameters_of(name: str) -> tuple[str, ...]:
    """Return what an activation of the zoo can be given, so that new ones are tried by themselves."""
    try:
        return tuple(inspect.signature(type(create(name, channels=8))).parameters)
    except RtdetrActError:  # one that takes arguments only
        return ("value",)


usual = st.sampled_from(["0.1", "0.5", "1", "2", "0.25", "4"])
numbers = st.one_of(
    usual,
    usual,
    st.sampled_from(["0", "-1", "1e-3", "True", "False", "None", "-0.0", "1e999", "100000000", "2147483648", "1e308"]),
    st.sampled_from(["10**9", "[1, 2]", "(1,)", "'x'", "{}"]),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
)


@st.composite
def spec_texts(draw: st.DrawFn) -> str:
    """Give activations of the zoo with arguments of their own."""
    name = draw(st.sampled_from([*names(), "nn.SiLU", "torch.nn.GELU", "DyReLU-B"]))
    if draw(st.booleans()):
        return name
    known = st.sampled_from(parameters_of(name) or ("inplace",))
    given = draw(st.lists(st.tuples(known, numbers), max_size=2, unique_by=lambda pair: pair[0]))
    words = [value if draw(st.integers(0, 5)) == 0 else f"{key}={value}" for key, value in given]
    return f"{name}({', '.join(words)})"


simple_specs = st.sampled_from(["arelu", "silu", "mish", "dyrelu_b", "prelu(init=0.1)", "leaky_relu(0.1)", "frelu"])
usual_wheres = st.sampled_from(["@backbone", "@head", "@0", "@2-3", "@0+4", "@backbone+head", " @ 1"])
wheres = st.one_of(
    usual_wheres,
    st.sampled_from(["", "@neck", "@0-3+neck", "@2-1", "@tail"]),
    st.builds("@{}-{}".format, st.integers(0, 99), st.integers(0, 99999)),
)
endings = st.sampled_from([
    " init=match", " init=paper", " init=match init=match", " init=x", " from=silu", " from=relu+nn.SiLU init=match",
    " init=match from=mish", " from=silu from=silu", " from=silo", " from=+", " from=dynamic_conv", " scope=all",
])  # fmt: skip


@st.composite
def plan_texts(draw: st.DrawFn) -> str:
    """Give plans of one to three rules, half of them right; a rule without a place stands first."""
    if draw(st.booleans()):
        first = draw(st.builds("{}{}".format, simple_specs, st.one_of(st.just(""), usual_wheres)))
        more = draw(st.lists(st.builds("{}{}".format, simple_specs, usual_wheres), max_size=2))
        return ", ".join([first, *more]) + draw(
            st.sampled_from(["", "", " init=match", " from=silu", ", dynamic_conv@0-2"])
        )
    specs, ending = st.one_of(simple_specs, spec_texts()), st.one_of(st.just(""), endings)
    parts = draw(st.lists(st.builds("{}{}{}".format, specs, wheres, ending), min_size=1, max_size=3))
    parts += draw(st.sampled_from([[], [], ["dynamic_conv"], ["dynamic_conv(kernels=2)@backbone"]]))
    return ", ".join(parts)


spec_inputs = st.one_of(spec_texts(), spec_texts(), damaged(spec_texts()), st.text(max_size=30))
plan_inputs = st.one_of(
    plan_texts(), plan_texts(), damaged(plan_texts()), st.text(alphabet="arelu_b@()[]{},=+-0129.'\" \n\\:*#fom")
)

# --- plain data and YAML --------------------------------------------------------------------------------------------

# What stands somewhere it should not. A kernel of 99 pixels, say, would take 22 s to measure the strides with.
WRONG = [
    None, True, -1, 0, 1.5, 10**400, 2**40, "x", "", "nn.ReLU", [], [[]], {}, {"a": 1}, "Convv", 17, -17, float("nan"),
    float("inf"), "a\nb", "\x1b[31m", [1, 2, 3], "two words", "(" * 300, "torch_load", "nn.functional", b"bytes",
    "DetectionModel", "nn.LeakyReLU(0.1)", "open('x')",
]  # fmt: skip
MODEL_YAMLS = [
    tiny.RTDETR,
    *(tiny.yolo(task) for task in tiny.YOLO_HEADS),
    {**tiny.yolo(), "activation": "arelu"},
    {**tiny.RTDETR, "activation": {"rules": [{"activation": "arelu", "layers": "0-3"}], "act_lr": 0.5}},
    {**tiny.yolo(), "activation": "rtdetr_act.Plan({'rules': [{'activation': 'arelu', 'layers': '0-3'}]})"},
    tiny.with_rows(tiny.yolo(), {0: "mish", 2: "arelu from=silu"}, scales={"n": [0.33, 0.25, 1024]}),
]


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Yield the path of everything inside lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def mutate(data: Any, draw: random.Random, wrong: Sequence[Any] = WRONG) -> Any:
    """Return a copy with something left out, put in or replaced."""
    new = copy.deepcopy(data)
    if not (found := list(places(new))):
        return draw.choice(wrong)
    *parents, last = draw.choice(found)
    owner = new
    for key in parents:
        owner = owner[key]
    way = draw.random()
    if way < 0.2:
        del owner[last]
    elif way < 0.3 and isinstance(owner, list):
        owner.insert(last, draw.choice(wrong))
    else:
        owner[last] = draw.choice(wrong)
    return new


def laughs(depth: int) -> str:
    """Return YAML whose aliases stand for ten to the power of `depth` values, the last of them *laughs."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth))]
    return "\n".join([*lines, f"laughs: &laughs [*a{depth - 1}]", ""])


_HERE = "rtdetr_act_here"  # stands where YAML that no dumping gives is put in
ODD_YAML = [
    f"!!python/object/apply:os.system ['touch {PLANTED}']", f"!!python/object/new:os.system ['touch {PLANTED}']",
    "!!python/name:os.system", f"!!python/module:{PLANTED}", "!!python/object:collections.Counter {}",
    "!!python/tuple [1, 2]", "&a [*a]", "&a {b: *a}", "{<<: &b {<<: *b}}", "{<<: [{a: 1}, {a: 2}]}", "{<<: 1}",
    "*undefined", "*laughs", "!!binary x", "!!binary ''", "!!int x", "!!int ''", "!!float x", "!!bool x", "!!null x",
    "!!timestamp x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]", "!!str [a]", "!!seq x", "!!map x",
    "!unknown x", "2024-13-45", "2024-12-24", "9" * 5000, "0x" + "f" * 5000, "0b2", "0o9", "1_0", "1:30:00", ".nan",
    ".inf", "-.inf", "1e400", "~", "yes", "[" * 700, "{" * 700, "[" * 3000, "{a: 1, a: 2}", "{[]: 1}", "{{a: 1}: 2}",
    "? [a]", "|", "> x", "'", '"\\ud800"', '"\\x1b[2J"', '"\\0"', "%YAML 1.1", "---", "...", "\t", "- a", "a: b: c",
    "@", "`", "&", "*", "!", "!!", "# x",
]  # fmt: skip


@st.composite
def yaml_texts(draw: st.DrawFn, data: st.SearchStrategy[Any], wrong: Sequence[Any] = WRONG, most: int = 2) -> bytes:
    """Give YAML files of data as it is, or with wrong values, odd YAML, damaged text, or bytes that are no UTF-8."""
    document, draws = draw(data), st.randoms(use_true_random=False)
    for _ in range(draw(st.sampled_from([0, 0, *range(1, most + 1)]))):
        document = mutate(document, draw(draws), wrong)
    odd = draw(st.one_of(st.none(), st.none(), st.sampled_from(ODD_YAML)))
    if odd is not None:
        document = mutate(document, draw(draws), [_HERE])
    try:
        text = yaml.safe_dump(document, sort_keys=False, default_flow_style=draw(st.sampled_from([False, False, None])))
    except yaml.YAMLError:  # what only Python can hold
        text = repr(document)
    except ValueError:  # an integer of too many digits to be written
        text = "9" * 5000
    if odd is not None:
        text = text.replace(_HERE, odd, 1)
        text = laughs(draw(st.sampled_from([2, 4, 12]))) + text if "*laughs" in odd else text
    if draw(st.integers(0, 3)) == 0:
        text = draw(damaged(st.just(text), [*ODD_TEXTS, *ODD_YAML]))
    encoding = draw(st.sampled_from(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"]))
    return text.encode(encoding, errors="replace")


activation_inputs = yaml_texts(
    st.one_of(plans.map(Plan.to_yaml), plan_texts(), st.builds(lambda inner, outer: {**outer, "base": inner},
              plans.map(Plan.to_yaml), plans.map(Plan.to_yaml)),
              damaged(st.one_of(plans.map(lambda plan: plan.to_model_yaml() or ""),
                                plan_texts().map("rtdetr_act.{}".format)))),
    [*WRONG, {"rules": []}, ["arelu"], "0-99999", "5-2", "neck", "match", "silu+relu", ["silu"],
     "arelu from=silu", "rtdetr_act.Plan('arelu@0')"],
)  # fmt: skip

# Most of what a mutated row has is refused by its form alone; these are right in form.
_LAYERS = [
    "Conv", "DWConv", "C2f", "C3", "SPPF", "Bottleneck", "nn.Identity", "nn.ReLU", "nn.Upsample", "nn.Conv2d", "Concat",
    "HGBlock", "RepC3", "AIFI", "Detect", "RTDETRDecoder", "Segment", "Classify", "TorchVision", "Index", "CBFuse",
    "Add", "nn.Module", "nn.Sequential", "nn.MultiheadAttention", "torchvision.ops.DropBlock2d", "SPP", "C2PSA",
    "A2C2f", "check_file", "torch_load", "yaml_model_load", "Path", "ModuleNotHere", "nn.modules", "YOLO", "BaseModel",
]  # fmt: skip
_row_arguments = st.lists(
    st.one_of(
        st.sampled_from([1, 2, 3, 8, 16, 64, 0.5, True, None, "nearest", "nc", "x", -1, 0, 500, [1], "'x.pt'"]),
        st.sampled_from([f"__import__('os').system('touch {PLANTED}')", "nn.SiLU()", 1e9, 10**9, 1.5]),
    ),
    max_size=5,
)
_rows = st.builds(
    lambda source, repeats, module, given, activation: [source, repeats, module, given, *activation],
    st.sampled_from([-1, -1, -1, 0, -2, [-1, 0], 3, 99]),
    st.sampled_from([1, 1, 2, 3, 0, 1000]),
    st.sampled_from(_LAYERS),
    _row_arguments,
    st.one_of(st.just([]), st.just([]), plan_texts().map(lambda text: [text])),
)

_TOP_KEYS = [
    "nc", "ch", "channels", "reg_max", "depth_multiple", "width_multiple", "scale", "scales", "kpt_shape", "activation",
    "convolution", "end2end", "names", "task", "max_channels", "yaml_file", "fuse", "text_model",
]  # fmt: skip


@st.composite
def model_yamls(draw: st.DrawFn) -> dict[str, Any]:
    """Give model YAMLs, a third of them with a row and a third with a top-level key of another one's."""
    model_yaml = copy.deepcopy(draw(st.sampled_from(MODEL_YAMLS)))
    if draw(st.booleans()):
        model_yaml["backbone"][2][1] = 2  # repeats, which `depth_multiple` and `scales` multiply
    way = draw(st.integers(0, 2))
    if way == 1:
        part = model_yaml[draw(st.sampled_from(["backbone", "backbone", "head"]))]
        part[draw(st.integers(0, len(part) - 1))] = draw(_rows)
    elif way == 2:
        key = draw(st.sampled_from(_TOP_KEYS))
        values = [1, 3, 0.5, "n", 1e9, 1e-9, 10, [2, 3], {"n": [1, 1, 8]}, {"n": [1e9, 1, 1]}, True, "dynamic_conv"]
        model_yaml[key] = draw(st.one_of(st.sampled_from(values), plan_texts()))
    return model_yaml


model_inputs = yaml_texts(model_yamls(), most=1)

STUDY_VALUES: dict[str, list[Any]] = {
    "model": ["rtdetr-n.yaml", "a/m.yaml", ["m.pt", "n.pt"], ["a/best.pt", "b/best.pt"], ["m.pt", "./m.pt"], "x" * 300],
    "data": ["shapes", "coco8.yaml", ["a/data.yaml", "b/data.yaml"], ["d.yaml", "D.yaml"], "con.yaml", "\x1b.yaml"],
    "where": ["backbone,neck", "backbone,0-9", ["all", 3], "all", "tail", ","],
    "baseline": ["stock", "arelu", "none"],
    "seeds": [1, 3, [0, 7], [0, 0], 0, -1, 1000, 100_000_000, [2**31], "3", 1e9],
    "scope": ["conv", "all", "foo"],
    "act_lr": [10, 0.1, 0, -1, 1e300],
    "epochs": [1, [1, 2], 0, [], [[1]], "many"],
    "lr0": [0.01, [0.01, 0.02], [0.1, 0.1], [1, 1.0, True, "1"], 1e-300],
    "optimizer": ["SGD", ["SGD", "AdamW"], ["a b", "a  b"], "\n"],
    "device": ["cpu", [0, 1], 0],
    "imgsz": [64, [64, 64], -1],
    "epoch": [1],
    "name": ["x"],
}
_activations = st.lists(st.one_of(st.just("stock"), plan_texts(), plans.map(Plan.to_yaml)), min_size=1, max_size=3)
study_data = st.builds(
    lambda activations, settings: {"activations": activations, **settings},
    st.one_of(_activations, plan_texts()),
    st.lists(st.sampled_from(sorted(STUDY_VALUES)), max_size=4, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries({key: st.sampled_from(STUDY_VALUES[key]) for key in keys})
    ),
)
study_inputs = yaml_texts(study_data, [*WRONG, 2**53 + 1, 1e300, "\x85", ["a"], [1, [2]], ["stock", "arelu"]], most=1)

# --- checkpoints ----------------------------------------------------------------------------------------------------

FORMS = [(protocol, True) for protocol in range(6)] + [(protocol, False) for protocol in range(1, 6)]


@functools.cache
def valid_checkpoint(activation: str, protocol: int, zipped: bool) -> bytes:
    """Return a small checkpoint with an activation, in one of the forms that torch writes."""
    import torch
    from ultralytics.nn.tasks import DetectionModel

    from rtdetr_act import patch_model

    torch.manual_seed(0)
    network = DetectionModel(tiny.yolo(), verbose=False)
    if activation:
        patch_model(network, activation)
    saved = {"model": network, "ema": None, "epoch": -1, "optimizer": None, "date": "2026", "train_args": {"imgsz": 64}}
    file = io.BytesIO()
    torch.save(saved, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@st.composite
def checkpoint_inputs(draw: st.DrawFn) -> bytes:
    """Give checkpoints cut off, with bytes changed, doubled or swapped, most of them near the pickled object."""
    activation = draw(st.sampled_from(["", "arelu", "dyrelu_b"]))
    content = bytearray(valid_checkpoint(activation, *draw(st.sampled_from(FORMS))))
    near = draw(st.sampled_from([200, 20_000, len(content), len(content)]))
    at = st.one_of(st.integers(0, near - 1), st.integers(len(content) - min(near, 3000), len(content) - 1))
    for _ in range(draw(st.integers(0, 3))):
        way, start = draw(st.sampled_from(["change", "change", "cut", "insert", "zeros", "remove"])), draw(at)
        start = min(start, len(content))
        size = draw(st.sampled_from([1, 1, 4, 100]))
        if way == "change":
            content[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
        elif way == "cut":
            del content[start:]
        elif way == "insert":
            content[start:start] = draw(st.binary(min_size=1, max_size=8))
        elif way == "zeros":
            content[start : start + size] = bytes(size)
        else:
            del content[start : start + size]
    return bytes(content)


_CALLS = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "exec"),
    ("builtins", "eval"), ("builtins", "open"), ("builtins", "__import__"), ("__builtin__", "eval"), (PLANTED, "Thing"),
    ("importlib", "import_module"), ("torch", "load"), ("torch.hub", "load"), ("torch.serialization", "load"),
    ("torch.jit", "load"), ("builtins", "getattr"), ("operator", "attrgetter"), ("runpy", "run_path"), ("pty", "spawn"),
    ("webbrowser", "open"), ("shutil", "rmtree"), ("pathlib", "Path.touch"), ("ultralytics.nn.tasks", "torch_load"),
    ("ultralytics.utils.checks", "check_requirements"), ("ultralytics", "YOLO"),
    ("rtdetr_act.integrations.ultralytics.models", "load_model"),
    ("gone_package", "Thing"), ("gone_package.inner", "Thing"), ("torch.gone", "Thing"), ("", ""), ("a" * 300, "b"),
    ("os\0", "system"), ("..", "x"), ("os", "path.join.__globals__"), ("é", "é"), ("\x1b[2J", "x"), ("models", "x"),
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("numpy", "zeros"),
    ("builtins", "bytearray"),
]  # fmt: skip
_ARGUMENTS = [
    (f"touch {PLANTED}",), (["touch", PLANTED],), (f"open('{PLANTED}', 'w')",), (PLANTED, "w"), (PLANTED,),
    ("requests",), (f"import os; os.system('touch {PLANTED}')",), ((1 << 36),), (),
]  # fmt: skip


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def reference(module: str, name: str, protocol: int) -> bytes:
    """Return the opcodes that look a class up, in the words of a protocol."""
    if protocol < 4:
        return b"c" + f"{module}\n{name}\n".encode("utf-8", "surrogatepass")
    return _text(module) + _text(name) + b"\x93"


_ENDINGS = {"reduce": b"R", "build": b"Rb", "newobj": b"\x81", "newobj_ex": b"}\x92", "nothing": b"0"}
_ALONE = b"()]}N012aesutldRbQo\x81\x88\x8f\x90\x91\x92\x93\x94\x97"  # opcodes without an argument
_LINES = [
    f"I{'9' * 5000}", "I01", "L9L", "F1e999", "Fx", "S'x'", "Vx\\ud800", "Px", "i\n", "p0", "g0", f"p{1 << 26}",
    "p99999999999", "p-1", "g1",
]  # fmt: skip
_INDEXES = [0, 1, 300, 1 << 16, 1 << 24, 1 << 27, 1 << 31, (1 << 32) - 1]
_SIZES = [0, 1, 1 << 16, 1 << 31, 1 << 36, 1 << 62, (1 << 64) - 1]
_opcodes = st.one_of(
    st.sampled_from(_ALONE).map(lambda code: bytes([code])),
    st.integers(0, 255).map(lambda n: b"q" + bytes([n])),
    st.integers(0, 255).map(lambda n: b"h" + bytes([n])),
    st.sampled_from(_INDEXES).map(lambda n: b"r" + struct.pack("<I", n)),
    st.sampled_from(_SIZES).flatmap(
        lambda n: st.sampled_from([b"\x8d", b"\x8e", b"\x95", b"\x96"]).map(lambda op: op + struct.pack("<Q", n))
    ),
    st.sampled_from([0, 1, 255, 1 << 20, (1 << 31) - 1]).map(
        lambda n: b"\x8b" + struct.pack("<I", n) + b"\xff" * min(n, 300)
    ),
    st.sampled_from(_LINES).map(lambda line: f"{line}\n".encode()),
    st.sampled_from(_CALLS).map(lambda call: reference(*call, 2)),
    st.sampled_from(_CALLS).map(lambda call: reference(*call, 4)),
    st.sampled_from(["x", "c" * 1000, PLANTED]).map(_text),
)  # fmt: skip


@st.composite
def hostile_pickles(draw: st.DrawFn) -> bytes:
    """Give pickles that call what they like where they are loaded, or that are opcodes in any order."""
    protocol = draw(st.integers(0, 5))
    head = (b"\x80" + bytes([protocol])) if protocol >= 2 else b""
    if draw(st.integers(0, 2)) == 0:
        return head + b"".join(draw(st.lists(_opcodes, max_size=12))) + b"."
    body = b""
    for module, name in draw(st.lists(st.sampled_from(_CALLS), min_size=1, max_size=3)):
        given = pickle.dumps(draw(st.sampled_from(_ARGUMENTS)), min(protocol, 3))
        given = given[2 if protocol >= 2 else 0 : -1]  # without its head and its end
        body += reference(module, name, protocol) + given + draw(st.sampled_from(list(_ENDINGS.values())))
    if draw(st.booleans()):  # where a checkpoint has its model
        body = b"}" + _text("model") + body + b"s"
    return head + body + draw(st.sampled_from([b".", b".", b"", b"..", b"\x80\x09."]))


_LEGACY = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


@st.composite
def pickle_inputs(draw: st.DrawFn) -> bytes:
    """Give hostile pickles as torch's zip files, as files of before torch 1.6, and bare."""
    pickled, form = draw(hostile_pickles()), draw(st.sampled_from(["zip", "zip", "deflated", "legacy", "bare", "two"]))
    if form in ("bare", "legacy"):
        return (_LEGACY if form == "legacy" else b"") + pickled
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED
    name = draw(st.sampled_from(["x/data.pkl"] * 5 + ["data.pkl", "../data.pkl", "x/y/data.pkl", "x/data.pkl/"]))
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, pickled)
        if form == "two":
            archive.writestr("other/data.pkl", draw(hostile_pickles()))
        for part, text in (("version", "3\n"), ("byteorder", "little"), ("data/0", "x" * 8)):
            archive.writestr(f"x/{part}", text)
        if form == "deflated" and draw(st.integers(0, 5)) == 0:
            archive.writestr("x/data/1", bytes(draw(st.sampled_from([1 << 20, 120 << 20]))))
    return file.getvalue()
