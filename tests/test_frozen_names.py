"""What users' code and users' checkpoints hold on to: public names with their parameters, and the paths of classes.

Whoever changes one of them sees it here; CONTRIBUTING.md says how that may be done.
"""

from __future__ import annotations

import inspect
import io
import pickletools
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import rtdetr_act
from rtdetr_act import create, names, patch_convs, patch_model
from rtdetr_act.activations.registry import get_entry

GOLDEN = Path(__file__).with_name("frozen_names.txt")
SPECS = {"threshold": "threshold(0.1, 0.0)"}


def describe_public_names() -> list[str]:
    """Return each public name with the names and defaults of its parameters."""
    found = []
    for name in rtdetr_act.__all__:
        value = getattr(rtdetr_act, name)
        if callable(value):
            found.append(
                f"rtdetr_act.{name}({', '.join(map(_describe, inspect.signature(value).parameters.values()))})"
            )
        else:
            found.append(f"rtdetr_act.{name}")
    return found


def _describe(parameter: inspect.Parameter) -> str:
    stars = "**" if parameter.kind is inspect.Parameter.VAR_KEYWORD else ""
    if parameter.default is inspect.Parameter.empty:
        return stars + parameter.name
    if inspect.isroutine(parameter.default):
        return f"{parameter.name}={parameter.default.__name__}"
    return f"{parameter.name}={'…' if 'factory' in repr(parameter.default) else repr(parameter.default)}"


def _is_built_in(name: str) -> bool:  # other tests register their own, doctests from within the package
    factory = get_entry(name).factory
    built_in = factory.__module__.startswith(("torch.", "rtdetr_act."))
    return built_in and hasattr(sys.modules[factory.__module__], factory.__name__)


def find_pickled_paths() -> list[str]:
    """Return the paths in this package that the checkpoint of a model with everything in it names."""
    from ultralytics.nn.modules import block

    torchvision = pytest.importorskip("torchvision.models")
    net = nn.ModuleList(create(SPECS.get(name, name), 8) for name in names() if _is_built_in(name))
    net.append(create("dyrelu_c(tau_start=30.0)", 8))
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    patch_convs(convolutions)
    net.append(convolutions)
    blocks = [block.ResNetBlock(8, 4), torchvision.resnet18(), torchvision.resnet50(), torchvision.densenet121()]
    blocks += [torchvision.googlenet(init_weights=False), torchvision.inception_v3(init_weights=False)]
    blocks += [block.SwiGLUFFN(8, 8)] if hasattr(block, "SwiGLUFFN") else []
    for each in blocks:
        tokens = type(each).__name__ == "SwiGLUFFN"
        patch_model(each, "arelu", scope="all" if tokens else "conv")
        net.append(each)
    content = io.BytesIO()
    torch.save(net, content)
    with zipfile.ZipFile(content) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    globals_ = (str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL")
    return sorted({name.replace(" ", ".") for name in globals_ if name.startswith("rtdetr_act")})


def test_frozen_names_are_as_they_were() -> None:
    from ultralytics.nn.modules import block

    known = GOLDEN.read_text(encoding="utf-8").splitlines()
    if not hasattr(block, "SwiGLUFFN"):  # before Ultralytics 8.3.160
        known = [line for line in known if "SwiGLUFFN" not in line]
    found = [*describe_public_names(), *(f"pickled {path}" for path in find_pickled_paths())]
    new, gone = sorted(set(found) - set(known)), sorted(set(known) - set(found))
    assert not new and not gone, f"see 'Names that others hold on to' in CONTRIBUTING.md: new {new}, gone {gone}"
