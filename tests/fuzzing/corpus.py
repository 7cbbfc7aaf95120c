"""Inputs that failed once, by kind and name: what the package read wrongly before it was mended.

Each is tried first, in every run of the fuzzer and in the tests. What fuzzing finds is added here with its mend.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import Any

import tiny
import yaml

from fuzzing.commands import BRIEF
from fuzzing.inputs import laughs, reference
from fuzzing.watch import PLANTED


def _act(**plan: Any) -> bytes:
    return yaml.safe_dump(plan).encode()


def _rule(**rule: Any) -> bytes:
    return _act(rules=[{"activation": "arelu", **rule}])


SPECS = {
    "a missing argument": "hardtanh(2)",
    "a complex number": "prelu(init=1j)",
    "a set": "leaky_relu({1})",
    "bytes": "relu(b'x')",
    "a number of 5,000 digits": f"elu({'9' * 5000})",
    "a number that no float holds": f"elu(0x{'f' * 1000})",
    "a wrong tau_epochs": "dyrelu_c(tau_start=30, tau_epochs='x')",
    "a negative tau_epochs": "dyrelu_c(tau_start=30, tau_epochs=-1)",
    "texts for numbers": "threshold('a', 'b')",
    "a name without end": "x" * 5000,
    "a call": f"__import__('os').system('touch {PLANTED}')",
    "a hundred million parameters": "prelu(num_parameters=100000000)",
    "a hundred million curves": "dyrelu_b(k=100000000)",
    "a long unknown argument": f"selu({'i' * 300}=1)",  # quoted whole, in a message of 900 characters
}

PLANS = {
    "a rule that no site follows": "arelu, silu",
    "one rule twice": "arelu, arelu",
    "one rule twice, with a list": "elu(inplace=[1, 2]), elu(inplace=[1, 2])",
    "a comma too many": "arelu,,mish",
    "a call": f"open('{PLANTED}', 'w').close()",
    "brackets without end": "x" * 10 + "(" * 3000,
    "spaces without end": "a" + " " * 1990,
    "rules without end": "arelu," * 50_000,
    "control characters": "a\x1b[31mb",
    "characters that print as ten": "\U00044495" * 80 + "@0" * 1000,
    "several lines": "arelu\nx",
    "layers the wrong way round": "arelu@9-0",
    "layers beyond the model": "arelu@77",
    "a number of 400 digits": f"arelu@{'1' * 400}-2",
}

ACTIVATIONS = {
    "layers: 1.5": _rule(layers=1.5),
    "sections: 1": _rule(sections=1),
    "a cyclic base": b"&a {rules: [{activation: arelu}], base: *a}",
    "act_lr: 10**400": _act(rules=[{"activation": "arelu"}], act_lr=10**400),
    "a number of 5,000 digits": b"rules: [{activation: arelu, layers: " + b"9" * 5000 + b"}]",
    "a wrong tau_epochs": _act(rules=[{"activation": "dyrelu_c(tau_start=30, tau_epochs='x')"}]),
    "code for a default": _act(rules=[], default_act=f"open('{PLANTED}', 'w')"),
    "aliases that explode": laughs(30).encode() + b"rules: *laughs\n",
    "a base without rules": _act(rules=[{"activation": "arelu"}], base={"default_act": "nn.ReLU()"}),  # not read back
    "code in a stored plan": f"rtdetr_act.Plan(open('{PLANTED}', 'w'))".encode(),
    "brackets without end in a stored plan": b"rtdetr_act.Plan(" + b"(" * 100_000,
    "an infinity in a list": b"rtdetr_act.elu([1e999])",  # was written as the name inf
    "a tag that runs code": f"!!python/object/apply:os.system ['touch {PLANTED}']".encode(),
}


def _row(module: str, *given: Any, **top: Any) -> bytes:
    """Return the tiny YOLO with a row in the middle of its backbone."""
    model_yaml = tiny.yolo()
    model_yaml["backbone"] = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, module, [*given]], *tiny.YOLO_BACKBONE[1:]]
    model_yaml["head"][0][0] = [4, 5]
    return yaml.safe_dump({**model_yaml, **top}).encode()


def _model(text: str = "", **top: Any) -> bytes:
    return text.encode() + yaml.safe_dump({**tiny.yolo(), **top}).encode()


def _deep(depth: float) -> bytes:
    model_yaml = tiny.yolo()
    model_yaml["backbone"][2][1] = 2
    return yaml.safe_dump({**model_yaml, "depth_multiple": depth}).encode()


MODELS = {
    "a row that loads a pickle": _row("torch_load", "'x.pt'"),
    "a row that downloads": _row("check_file", "'https://example.invalid/x.pt'"),
    "a row that installs": _row("check_requirements", "'no_such_package'"),
    "a row that loads a checkpoint": _row("load_checkpoint", "'x.pt'"),
    "a row that opens a path": _row("Path", f"'{PLANTED}'"),
    "a row that is a module": _row("nn.functional"),
    "a row that is a whole model": _row("DetectionModel", "'x.yaml'"),
    "a row that is code": _row(f"__import__('os').system('touch {PLANTED}')"),
    "an argument that is code": _row("Conv", f"__import__('os').system('touch {PLANTED}')"),
    "a typing error": _row("Convv", 8, 3, 2),
    "weights to fetch": _row("TorchVision", 24, "mobilenet_v3_small", "DEFAULT", True, 11, False),
    "an activation that is code": _model(activation=f"open('{PLANTED}', 'w')"),
    "aliases that explode as nc": laughs(29).encode() + _model().replace(b"nc: 2", b"nc: *laughs"),
    "aliases that explode as activation": _model(laughs(29)) + b"activation: *laughs\n",
    "aliases that explode as an argument": laughs(29).encode() + _model().replace(b"- 8\n", b"- *laughs\n", 1),
    "a list in itself": b"&a [*a]",
    "a mapping in itself": b"a: &a {b: *a}",
    "3,000 nested lists": b"- " * 3000,
    "700 nested lists": b"epochs: " + b"[" * 700,
    "a number of 5,000 digits": _model() + b"channels: " + b"9" * 5000,
    "a factor of 400 digits": _model(depth_multiple=10**400),
    "bytes for the stride of a dynamic convolution": _row("Conv", 8, 3, b"bytes", activation="dynamic_conv"),
    "three strides of a dynamic convolution": _row("Conv", 8, 3, [1, 2, 3], activation="dynamic_conv"),
    "an activation for a row": _row("nn.ReLU", activation="arelu"),
    "repeats times a factor": _deep(1e9),  # built a billion layers
    "a data set": b"train: images\nval: images\nnames: [a]\n",
    "six items in a row": b"nc: 1\nbackbone: [[-1, 1, Conv, [8, 3, 2], arelu, 1]]\nhead: [[[0], 1, Detect, [nc]]]\n",
    "an unfinished list": b"backbone: [",
    "no head": _model(head=[]),
    "a tag that runs code": _model() + f"names: !!python/object/apply:os.system ['touch {PLANTED}']\n".encode(),
}


def _study(text: str) -> bytes:
    return f"activations: [stock]\n{text}\n".encode()


STUDIES = {
    "two data sets of one name": _study("data: [a/data.yaml, b/data.yaml]"),
    "two checkpoints of one name": _study("model: [x/best.pt, y/best.pt]"),
    "equal values": _study("lr0: [0.1, 0.1]"),
    "a mapping for a value": _study("lr0: [0.1, {a: 1}]"),
    "values that print alike": _study("lr0: [1, '1', true, 'True']"),
    "seeds without end": _study("seeds: 100000000"),
    "a seed that is no number": _study("seeds: .nan"),
    "a mapping for a key": _study("epochs: {[]: 1}"),
    "imgsz: [64, 64]": _study("imgsz: [64, 64]"),
    "an infinite number": _study("epochs: .inf"),
    "a number of 5,000 digits": _study("epochs: " + "9" * 5000),
    "a hexadecimal of 5,000 digits": _study("epochs: 0x" + "f" * 5000),
    "a date of no month": _study("epochs: 2024-13-01"),
    "a tag that does not fit": _study("epochs: !!timestamp x"),
    "aliases that explode": laughs(12).encode() + _study("lr0: *laughs"),
    "merge keys that explode": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))
    ).encode(),
    "a list in itself": b"activations: &a [*a]",
    "700 open brackets": b"a: " + b"{" * 700,
    "no UTF-8": b"activations: [stock]\n# caf\xe9",
    "a byte-order mark": b"\xef\xbb\xbfactivations: [stock]\n",
    "a name of 300 characters": _study("model: " + "x" * 300 + ".yaml"),
    "a plan of numbers": b"activations: [{rules: [{activation: 1}]}]",
    "a tag that runs code": b"activations: !!python/name:os.system",
}


def zipped(pickled: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a pickle in a file as torch writes them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    return file.getvalue()


def _call(module: str, name: str, *given: Any) -> bytes:
    return b"\x80\x02" + reference(module, name, 2) + pickle.dumps(given, 2)[2:-1] + b"R."


PICKLES = {
    "the letter c 200,000 times": zipped(pickle.dumps({"train_args": {"name": "c" * 200_000}}, 2)),
    "a million lines of c": zipped(pickle.dumps({"lines": "cc\n" * 1_000_000}, 2)),
    "a missing package": zipped(_call("gone_package", "Thing")),
    "a missing part of a package": zipped(b"\x80\x04" + reference("torch.nn.modules.gone", "Thing", 4) + b"."),
    "a name that installs": zipped(_call("requests-no-such package", "Thing")),
    "a bare pickle": _call("gone_package", "Thing"),
    "a missing class behind damage": zipped(b"\x80\x02}]]s}cgone_package\nThing\nR]]s."),
    "a shell command": zipped(_call("os", "system", f"touch {PLANTED}")),
    "Python code": zipped(_call("builtins", "exec", f"open('{PLANTED}', 'w')")),
    "a module to import": zipped(_call(PLANTED, "Thing")),
    "a file that unpacks to many times its size": zipped(bytes(101 << 20), zipfile.ZIP_DEFLATED),
    # Room for the objects that it numbers: 2 GB, and 64 GB.
    "a number for 134 million objects": zipped(b"\x80\x02}r" + struct.pack("<I", 1 << 27) + b"."),
    "a number for 4 billion objects": b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 1) + b".",
    "no pickle": b"hello",
    "a head alone": b"\x80",
}

CHECKPOINTS = {
    "nothing": b"",
    "a zip file's head": b"PK\x03\x04",
    "text": b"hello\n",
    "a pickle of nothing": b"\x80\x04.",
}


def _train(*words: str) -> list[str]:
    return ["train", "--act", "arelu", *BRIEF["train"], *words]


COMMAND_LINES = {
    "code under download": ["train", "--data", "code.yaml"],
    "a name of 300 characters": _train("name=" + "x" * 300),
    "a model of 300 characters": _train("--model", "x" * 300 + ".yaml"),
    "epochs={[]:1}": _train("epochs={[]:1}"),
    "epochs of 5,000 digits": _train("epochs=" + "9" * 5000),
    "batch=0": _train("batch=0"),
    "batch=-2": _train("batch=-2"),
    "imgsz=-1": _train("imgsz=-1"),
    "workers=-1": _train("workers=-1"),
    "a wrong device": _train("device=77"),
    "a rule that no site follows": _train("--act", "arelu, silu"),
    "a data set that is gone": ["val", "lost.pt"],
    "predict source=99": ["predict", "best.pt", "source=99"],
    "export opset=999": ["export", "best.pt", "opset=999"],
    "sites --scope foo": ["sites", "rtdetr-n.yaml", "--scope", "foo"],
    "learned --data nope.yaml": ["learned", "best.pt", "--data", "nope.yaml"],
    "--seeds 100000000": ["study", "--act", "arelu", "--seeds", "100000000"],
    "--cpus 999": ["study", "--act", "arelu", "--cpus", "999"],
    "a missing Ray": ["study", "--act", "arelu", "--engine", "ray", "--address", "x:1"],
    "a dry run of what is not here": ["study", "--act", "arelu", "--data", "coco8.yaml", "--dry-run"],
    "looking at what is not here": ["sites", "rtdetr-l.pt"],
    "a study of equal values": ["study", "--act", "arelu", "lr0=[0.1,0.1]", "--dry-run"],
    "an output in no folder": ["plot", "arelu", "-o", "nowhere/x.png"],
    "an output over a file": ["report", "study", "--baseline", "none"],
    "two devices": ["diagnose", *BRIEF["diagnose"], "device=0,0"],
    "an activation in place": ["plot", "relu(inplace=True)"],
    "control characters": ["sites", "tiny.yaml", "--act", "a\x1b[31mb"],
}
