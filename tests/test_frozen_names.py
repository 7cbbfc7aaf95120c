"""What users' code and users' checkpoints hold on to: public names with their parameters, and the paths of classes.

Whoever changes one of them sees it here; CONTRIBUTING.md says how that may be done.
"""

from __future__ import annotations

import copyreg
import inspect
import io
import pickle
import pickletools
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rtdetr_act
from rtdetr_act import create, names, patch_convs, patch_model, unpatch_model
from rtdetr_act.activations.placed import Placement, set_placement
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
    for each in blocks:
        patch_model(each, "arelu")
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
    known = [line for line in known if not line.startswith("loaded ")]  # by test_earlier_checkpoints_load
    found = [*describe_public_names(), *(f"pickled {path}" for path in find_pickled_paths())]
    new, gone = sorted(set(found) - set(known)), sorted(set(known) - set(found))
    assert not new and not gone, f"see 'Names that others hold on to' in CONTRIBUTING.md: new {new}, gone {gone}"


class OldPickler(pickle.Pickler):
    """Pickles rewired blocks as they were before their pickles named the original class."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module) and "rewired_from" in vars(type(value)):
            return copyreg.__newobj__, (type(value),), vars(value)  # type: ignore[attr-defined]
        return NotImplemented


@pytest.mark.parametrize("path", [line[7:] for line in GOLDEN.read_text("utf-8").splitlines() if line[:7] == "loaded "])
def test_earlier_checkpoints_load(path: str) -> None:
    module, _, name = path.rpartition(".")
    cls = getattr(import_module(module), name, None)
    if cls is None:
        pytest.skip("this Ultralytics lacks it")
    arguments = {"ResNetBlock": (8, 4), "SwiGLUFFN": (8, 8), "BasicBlock": (8, 8), "Bottleneck": (8, 2), "DenseNet": ()}
    original = cls.rewired_from
    made = original(*arguments[name]) if name in arguments else original(8, 8, kernel_size=1)
    x = torch.randn(1, 3, 64, 64) if name == "DenseNet" else torch.randn(1, 8, 8, 8)
    expected = made.eval()(x)
    for call in cls.hidden_calls:
        act = create("mish")
        set_placement(act, Placement("mish", call.build_original(made)))
        made.add_module(call.attribute, act)
    made.__class__ = cls
    file = io.BytesIO()
    OldPickler(file, protocol=2).dump(made)
    assert f"{module}\n{name}".encode() in file.getvalue()
    loaded = pickle.loads(file.getvalue())
    assert not torch.allclose(loaded(x), expected)
    if name != "SwiGLUFFN":  # saved again, the path is gone
        assert b"surgery.rewired." not in pickle.dumps(loaded)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))
    unpatch_model(loaded)
    assert type(loaded) is original and torch.equal(loaded(x), expected)
