"""Command lines made from the commands, options and arguments that the program has, so that new ones are tried too."""

from __future__ import annotations

from typing import Any, get_args

import typer
from hypothesis import strategies as st

from fuzzing.inputs import ODD_TEXTS, damaged, plan_texts, spec_texts
from rtdetr_act.cli.main import app

# Behind everything else, so that what is accepted ends soon; what they are given wrong values of stands behind them.
_TRAINING = "epochs=1 imgsz=64 batch=4 nbs=4 workers=0 device=cpu amp=False plots=False deterministic=False".split()
_DATA = ["--data", "data.yaml"]
BRIEF: dict[str, list[str]] = {
    "train": ["--model", "tiny.yaml", *_DATA, *_TRAINING],
    "study": ["--model", "tiny.yaml", "--act", "stock", "--seeds", "1", *_DATA, *_TRAINING],
    "search": ["--model", "tiny.yaml", "--budget", "9", "--seeds", "1", *_DATA, *_TRAINING],
    "val": ["imgsz=64", "plots=False", "device=cpu", "workers=0", "batch=4"],
    "predict": ["imgsz=64", "device=cpu"],
    "export": ["imgsz=64", "format=torchscript", "device=cpu"],
    "bench": ["--model", "tiny.yaml", "--turns", "2", "imgsz=64"],
    "diagnose": ["--model", "tiny.yaml", "--images", "2", "imgsz=64", "device=cpu", *_DATA],
}
_MODELS = [
    "tiny.yaml", "mixed.yaml", "best.pt", "lost.pt", "text.pt", "broken.yaml", "data.yaml", "rtdetr-m.yaml", "x.onnx",
    "", "empty", "x" * 300 + ".yaml", "nowhere/x.pt", "tiny.yaml/", "\0.pt", "\x1b[2J.yaml", "-x.pt",
]  # fmt: skip
_OUTPUTS = [
    "out", "out/deeper", "out.png", "out.svg", "out.pt", "out.gif", "tiny.yaml", "tiny.yaml/x", "", "x" * 300, "empty",
    "study", "nowhere/x.png", "\0", "a b é",
]  # fmt: skip
_PAIRS = [
    "epochs=0", "epochs=-1", "epochs=many", "epochs={[]:1}", "epochs=" + "9" * 5000, "epochs=[1,1]", "epochs=None",
    "imgsz=-1", "imgsz=[]", "imgsz=[64,64]", "imgsz=32", "imgsz=nan", "batch=0", "batch=-2", "batch=0.0", "batch=2",
    "workers=-1", "lr0=nan", "lr0=-1", "lr0=[0.1,0.1]", "lr0=0.01", "seed=-1", "seed=1", "optimizer=Adum",
    "optimizer=SGD", "device=77", "device=toaster", "device=0,0", "name=" + "x" * 300, "name=run", "name=../x",
    "project=out", "exist_ok=True", "save=False", "val=False", "epoch=3", "=", "x", "=1", "a=b=c", "model=x.yaml",
    "data=data.yaml", "task=detect", "mode=train", "resume=True", "half=True", "source=99", "source=nowhere.jpg",
    "source=data.yaml", "source=empty", "opset=999", "opset=12", "format=oonx", "format=onnx", "format=torchscript",
    "freeze=[0]", "freeze=x", "classes=[9]", "conf=2", "conf=0.5", "iou=-1", "cache=maybe", "fraction=0",
    "cfg=tiny.yaml", "cfg=nowhere.yaml", "time=0", "patience=-1", "nbs=0", "mosaic=2", "\0=1", "é=1", "epochs=1\n",
    "imgsz=((((((((((", "pretrained=text.pt", "tracker=x.yaml", "max_det=0", "line_width=0", "compile=maybe",
    "dropout=2",
]  # fmt: skip
_VALUES: dict[str, list[str]] = {
    "model": _MODELS,
    "weights": _MODELS,
    "pretrained": _MODELS,
    "folder": ["study", "empty", "nowhere", "data.yaml", "", ".", "x" * 300, "\0"],
    "data": [
        "data.yaml",
        "code.yaml",
        "tiny.yaml",
        "nowhere.yaml",
        "empty",
        "",
        "broken.yaml",
        "x" * 300,
        "no-such-set",
    ],
    "output": _OUTPUTS,
    "scope": ["conv", "all", "foo", ""],
    "init": ["paper", "match", "mach", ""],
    "target": ["rknn", "hailo", "openvino", "toaster", ""],
    "where": ["backbone", "backbone,head", "all", "0-3", "tail", ",", "9-0"],
    "baseline": ["stock", "arelu", "none", ""],
    "engine": ["local", "slurm", ""],
    "address": ["10.0.0.1:1", "auto", ""],
    "formats": ["torchscript", "oonx", "", ",", "onnx,onnx"],
    "conv": ["dynamic_conv", "dynamic_conv(kernels=2)@backbone", "dynamic_con", "arelu", ""],
    "checkpoints": [*_MODELS, *_PAIRS],
    "words": ["study.yaml", "tiny.yaml", "nowhere.yaml", "a.yaml", *_PAIRS],
    "pairs": _PAIRS,
    "cpus": ["1", "999", "0", "x"],
    "images": ["1", "4", "0", "x"],
    "turns": ["2", "1", "x"],
    "seeds": ["1", "0", "100000000", "x"],
    "budget": ["9", "1", "0", "x"],
    "retries": ["0", "-1", "x"],
    "act_lr": ["0.1", "0", "-1", "nan", "1e400", "x"],
}
_numbers = st.sampled_from(["0", "1", "2", "-1", "0.5", "nan", "1e400", "9" * 400, "x", ""])
_texts = st.one_of(st.sampled_from(["", "x", "tiny.yaml", "best.pt", *ODD_TEXTS]), st.text(max_size=10))


def _values(parameter: Any) -> st.SearchStrategy[str]:
    """Give words for an option or argument: by its name, else by its type."""
    if parameter.name == "act":
        return st.one_of(plan_texts(), st.sampled_from(["arelu", "stock", "arelu,silu"]), damaged(plan_texts()))
    if parameter.name == "activations":
        return st.one_of(spec_texts(), damaged(spec_texts()))
    if known := _VALUES.get(parameter.name):
        return st.one_of(st.sampled_from(known), st.sampled_from(known[: len(known) // 2 + 1]))
    return _numbers if _is_number(parameter) else _texts


def _is_number(parameter: Any) -> bool:
    """Return whether an option or argument is a number: by the type of click, or that of Typer from 0.29 on."""
    if hasattr(parameter, "type"):
        return parameter.type.name in ("integer", "float", "integer range")
    return bool({int, float} & {parameter.type_descriptor.annotation, *get_args(parameter.type_descriptor.annotation)})


def _option(parameter: Any) -> st.SearchStrategy[list[str]]:
    """Give an option with its value, or one of its names alone where it is a flag."""
    spelled = st.sampled_from([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return st.builds(lambda option: [option], spelled)
    return st.builds(lambda option, value: [option, value], spelled, _values(parameter))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Give a command with some of its options, its arguments, and sometimes a mistake in how it is written."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = draw(st.sampled_from(sorted(commands)))
    parameters = commands[name].params
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    options = [p for p in parameters if p.param_type_name == "option"]
    words: list[str] = []
    for parameter in arguments:
        least, most = (0, 2) if parameter.nargs == -1 else (1, 1)
        words += draw(st.lists(_values(parameter), min_size=max(least, int(parameter.required)), max_size=most))
    for parameter in (
        draw(st.lists(st.sampled_from(options), max_size=2, unique_by=lambda p: p.name)) if options else []
    ):
        words = [*draw(_option(parameter)), *words]
    if name == "search" or (name == "study" and draw(st.integers(0, 3))):
        words.append("--dry-run")  # what runs for real is a process of several seconds for each row
    line = [name, *BRIEF.get(name, []), *_with_mistake(draw, words)]  # what stands behind wins
    early = draw(st.sampled_from([[]] * 12 + [["--allow-download-code"], ["trai"], [""], ["--version"]]))
    return [word.replace("\0", "\ufffd") for word in [*early, *line]]  # no word of a process has a zero byte


def _with_mistake(draw: st.DrawFn, words: list[str]) -> list[str]:
    """Return words with, sometimes, one of them left out, doubled, damaged or unknown."""
    place = draw(st.integers(0, max(0, len(words) - 1)))
    before, here, behind = words[:place], words[place : place + 1], words[place + 1 :]
    mistake = draw(st.sampled_from(["none"] * 6 + ["drop", "double", "odd", "unknown"]))
    if mistake == "drop":
        here = []
    elif mistake == "double":
        here = here * 2
    elif mistake == "odd":
        here = [draw(_texts)]
    elif mistake == "unknown":
        here = [draw(st.sampled_from(["--unknown", "--", "-x", "--help", "--version", "--act=", "--model"])), *here]
    return [*before, *here, *behind]
