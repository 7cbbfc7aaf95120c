"""Functional calls: every form that becomes a module, on classes as people write them, and what is left and named."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import linecache
import pathlib
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as f_alias
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import gelu
from torch.nn.functional import relu as r

from rtdetr_act import find_sites, patch_model, unpatch_model
from rtdetr_act.surgery.functional_calls import find_unreachable_calls, read_block
from rtdetr_act.surgery.rewiring import is_rewired, rebuild

torchvision = pytest.importorskip("torchvision")
resnet = torchvision.models.resnet


class Block(nn.Module):
    """A convolution, and whatever a subclass does with its result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)


class Functional(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Aliased(Block):
    def forward(self, x: Tensor) -> Tensor:
        return r(self.bn(self.conv(x)), inplace=True)


class Renamed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return f_alias.leaky_relu(self.conv(x), 0.2)


class Imported(Block):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.conv(x), approximate="tanh")


class TorchFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(input=self.conv(x))


class WholePath(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.conv(x))


class TensorMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu_()


class Inherited(Functional):
    pass


class OtherMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.conv(x))


class Partial(Block):
    def __init__(self) -> None:
        super().__init__()
        self.activation = functools.partial(F.leaky_relu, negative_slope=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


class Keywords(Block):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        y = F.elu(self.conv(x), alpha=0.5)
        return y * scale


class Nested(Block):
    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return F.relu(self.conv(y))

        return inner(x)


class Super(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.mish((super().extra_repr() and x) or self.conv(x))


class Mangled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.__scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) * self.__scale


class Shared(Block):
    """Calls one module three times, as residual blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.relu = nn.Conv2d(3, 6, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        return self.relu(self.other(self.relu(y + x)))


class SharedFunction(Block):
    def __init__(self) -> None:
        super().__init__()
        self.activation = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(self.activation(self.bn(x))))


ONE = [
    (Functional, "ReLU"), (Aliased, "ReLU"), (Renamed, "LeakyReLU"), (Imported, "GELU"), (TorchFunction, "ReLU"),
    (WholePath, "SiLU"), (TensorMethod, "ReLU"), (Inherited, "ReLU"), (OtherMethod, "Hardswish"),
    (Keywords, "ELU"), (Nested, "ReLU"), (Super, "Mish"), (Mangled, "ReLU"),
]  # fmt: skip
SEVERAL = [(Shared, 3), (SharedFunction, 2)]
ALL = [*(cls for cls, _ in ONE), Partial, *(cls for cls, _ in SEVERAL)]


def make(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(cls()).eval()


@pytest.mark.parametrize(("cls", "current"), ONE)
def test_a_functional_call_is_a_site(cls: type[nn.Module], current: str) -> None:
    (site,) = find_sites(make(cls))
    assert (site.name, site.current, site.hidden, site.channels, site.layout) == ("0.act", current, True, 3, "map")


def test_a_partial_is_a_site_with_its_arguments() -> None:
    model = make(Partial)
    before = model[0].activation
    (site,) = find_sites(model)
    assert (site.name, site.current, site.activation) == (
        "0.activation",
        "F.leaky_relu(negative_slope=0.3)",
        "leaky_relu",
    )
    patch_model(model, "arelu")
    unpatch_model(model)
    assert model[0].activation is before


@pytest.mark.parametrize(("cls", "count"), SEVERAL)
def test_every_call_of_one_module_gets_an_instance(cls: type[nn.Module], count: int) -> None:
    model = make(cls)
    assert [site.name for site in find_sites(model)] == [f"0.act{i}" for i in range(1, count + 1)]
    patch_model(model, "arelu", scope="all")
    placed = [module for module in model.modules() if type(module).__name__ == "AReLU"]
    assert len(placed) == count and len({id(each.alpha) for each in placed}) == count


def test_each_call_of_one_module_has_channels_of_its_own() -> None:
    assert [site.channels for site in find_sites(make(Shared))] == [3, 3, 6]


@pytest.mark.parametrize("cls", ALL)
def test_a_rewired_block_computes_what_the_original_did_and_is_undone_exactly(cls: type[nn.Module]) -> None:
    model, x = make(cls), torch.randn(2, 3, 5, 5)
    expected, block = model(x.clone()), model[0]
    attributes, children = dict(vars(block)), dict(block._modules)
    sites = find_sites(model)
    assert type(block) is cls and not is_rewired(block), "looking for sites leaves the block as it is"
    for site in sites:  # one at a time, with what it computed already: the others stay as they were
        patch_model(model, "tanhshrink", include=site.name)
        assert not torch.allclose(model(x.clone()), expected)
        unpatch_model(model)
        assert type(block) is cls and dict(block._modules) == children
        assert vars(block).keys() == attributes.keys()
        assert torch.equal(model(x.clone()), expected)


@pytest.mark.parametrize("cls", ALL)
def test_copies_pickles_and_restricted_loads_of_a_rewired_block(cls: type[nn.Module]) -> None:
    model, x = make(cls), torch.randn(2, 3, 5, 5)
    stock = model(x.clone())
    patch_model(model, "relu6", scope="all")
    expected = model(x.clone())
    file = io.BytesIO()
    torch.save(model[0], file)
    file.seek(0)
    loaded = nn.Sequential(torch.load(file, weights_only=False))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    # A restricted load allows no partial and no function. In torch 2.4 what it allows cannot be taken back.
    if cls not in (Partial, SharedFunction) and hasattr(torch.serialization, "safe_globals"):
        file.seek(0)
        held = {type(module) for module in model.modules() if not is_rewired(module)}
        originals = [
            type(site) for each in model.modules() if (site := getattr(each, "_rtdetr_act", {}).get("original"))
        ]
        with torch.serialization.safe_globals([cls, rebuild, *held, *originals]):
            copies.append(nn.Sequential(torch.load(file, weights_only=True)))
    for other in copies:
        assert torch.equal(other(x.clone()), expected)
        unpatch_model(other)
        assert type(other[0]) is cls and torch.equal(other(x.clone()), stock)


@pytest.mark.integration
@pytest.mark.parametrize("cls", ALL)
def test_compile_and_export(cls: type[nn.Module]) -> None:
    model, x = make(cls), torch.randn(2, 3, 5, 5)
    patch_model(model, "arelu", scope="all")
    expected = model(x.clone())
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.clone()), expected)
    torch.testing.assert_close(torch.export.export(model, (x.clone(),)).module()(x.clone()), expected)


@pytest.mark.parametrize("cls", [Functional, Aliased, TorchFunction, TensorMethod, Inherited, Shared, Renamed])
def test_torchscript_compiles_what_the_block_calls_now(cls: type[nn.Module]) -> None:
    model, x = make(cls), torch.randn(2, 3, 5, 5)
    patch_model(model, "hardswish", scope="all")
    torch.testing.assert_close(torch.jit.script(model)(x.clone()), model(x.clone()))


def test_a_subclass_of_a_torchvision_block() -> None:
    class Own(resnet.Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            return resnet.Bottleneck.forward(self, x)

    class Plain(resnet.Bottleneck):
        pass

    model = nn.Sequential(Plain(64, 16))
    assert [(site.name, site.channels) for site in find_sites(model)] == [
        ("0.act1", 16),
        ("0.act2", 16),
        ("0.act3", 64),
    ]
    assert len(patch_model(model, "prelu(per_channel=True)")) == 3
    # What calls the forward of its parent is left: its own source code has no activation.
    left = nn.Sequential(Own(64, 16))
    assert [site.name for site in find_sites(left)] == ["0.relu"]


class Branches(Block):
    """Calls a function in branches of which one runs, and again behind them."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = F.relu(self.conv(x))
        elif x.shape[0] > 1:
            y = F.relu(self.bn(x))
        else:
            return F.relu(x)
        return F.relu(y if self.training else y + 1)


def test_branches_share_the_module_of_the_call_that_they_stand_for() -> None:
    model, x = make(Branches), torch.randn(2, 3, 4, 4)
    assert len(read_block(Branches).calls) == 2
    patch_model(model, "arelu", example_input=x)
    assert sum(p.numel() for m in model.modules() if type(m).__name__ == "AReLU" for p in m.parameters()) == 4


class Fused(Block):
    """Has a second forward for the time after fusing, as Ultralytics' and YOLOv5's blocks do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x))


def test_the_forward_after_fusing_calls_the_same_module() -> None:
    model = make(Fused)
    assert len(patch_model(model, "arelu")) == 1
    model[0].act.alpha.data.fill_(0.5)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(model[0].forward_fuse(x), model[0].act(model[0].conv(x)))


class SharedLearnable(Block):
    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.conv(self.prelu(x)))


def test_a_shared_module_with_parameters_stays_shared() -> None:
    (site,) = find_sites(make(SharedLearnable))
    assert (site.name, len(site.widths)) == ("0.prelu", 2)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class WithVariable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), self.conv.kernel_size[0] * 0.1)


class InPlaceOnly(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        F.relu_(y)
        return y


class Calls(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("cls", [Decorated, WithVariable, InPlaceOnly, Calls])
def test_what_cannot_be_rewritten_is_named_with_its_line(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls(), nn.ReLU())
    (named,) = find_unreachable_calls(model)
    assert cls.__name__ in named and "test_functional_calls.py:" in named
    report = patch_model(model, "arelu")
    assert len(report) == 1 and f"not reached: {named}" in str(report)
    (counted,) = report.coverage.unreached
    line = int(named.partition(".py:")[2].partition(",")[0])
    assert (counted.line, counted.count) == (line, 1), "the count and the source code agree on the line"


def test_gates_in_source_code_are_no_sites() -> None:
    class SwiGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 16), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(a) * b)

    assert find_sites(nn.Sequential(SwiGLU())) == [] and find_unreachable_calls(nn.Sequential(SwiGLU())) == []


def test_names_that_the_block_uses_are_avoided() -> None:
    class Taken(Block):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.act(self.conv(x)))

    model = make(Taken)
    assert [site.name for site in find_sites(model)] == ["0.act", "0.act_"]
    patch_model(model, "mish")
    assert {type(model[0].act).__name__, type(model[0].act_).__name__} == {"Mish"}


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.densenet121])
def test_state_dicts_of_the_stock_model_are_kept(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = list(model.state_dict())
    find_sites(model)
    assert list(model.state_dict()) == before
    patch_model(model, "mish")
    assert list(model.state_dict()) == before


class StarArguments(Block):
    def forward(*args: Any) -> Tensor:
        self, x = args
        return F.relu(self.conv(x))


class OtherSelf(Block):
    def forward(self, x: Tensor) -> Tensor:
        class Head:
            def run(self, y: Tensor) -> Tensor:
                return F.relu(y)

        return Head().run(self.conv(x))


class ReassignedSelf(Block):
    def forward(self, x: Tensor) -> Tensor:
        self = copy.copy(self)
        return F.relu(self.conv(x))


@pytest.mark.parametrize("cls", [StarArguments, OtherSelf, ReassignedSelf])
def test_a_method_in_which_self_is_not_the_block_is_left_and_named(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls())
    assert find_sites(model) == [] and len(find_unreachable_calls(model)) == 1


factory = types.SimpleNamespace(relu=lambda: torch.abs)


class Numbers(Block):
    def relu(self) -> float:
        return 1.0


class NotActivations(Numbers):
    """Calls what only has the name of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList([Numbers()])

    def forward(self, x: Tensor) -> Tensor:
        def apply(r: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
            return r(y)

        y = apply(torch.neg, self.conv(x)) + factory.relu()(x) + super().relu() + self.scales[0].relu()
        return y + sum((lambda r: r(x))(function) for function in (torch.abs, torch.neg))


def test_what_only_has_the_name_of_an_activation_is_left() -> None:
    model = nn.Sequential(NotActivations())
    assert find_sites(model) == [] and find_unreachable_calls(model) == []


def scale_by_private(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.conv(x)) * self.__scale


def make_forward(bias: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) + bias

    return forward


class LessIndented(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.text = """of several
    lines,
one of which is less indented"""
        return F.relu(self.conv(x))


class MoreIndented(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.text = """
            of several lines"""
        return F.relu(self.conv(x))


@pytest.mark.parametrize("function", [scale_by_private, make_forward(0.5), LessIndented.forward, MoreIndented.forward])
def test_functions_from_elsewhere_and_long_strings_are_compiled_as_they_were(function: Any) -> None:
    cls = type("Assembled", (Block,), {"forward": function, "__module__": __name__})
    model, x = make(cls), torch.randn(2, 3, 5, 5)
    setattr(model[0], "__scale", 2.0)
    expected, text = model(x), getattr(model[0], "text", "")
    patch_model(model, "relu6")
    assert is_rewired(model[0])
    model[0].act = nn.ReLU()
    assert torch.equal(model(x), expected) and getattr(model[0], "text", "") == text


def import_file(path: pathlib.Path, text: str) -> Any:
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_edited_since_its_import_is_not_compiled(tmp_path: pathlib.Path) -> None:
    head = "from torch import nn\nimport torch.nn.functional as F\n\n\nclass Edited(nn.Module):\n"
    text = f"{head}    def forward(self, x):\n        return F.relu(self.conv(x)) + 1\n"
    path = tmp_path / "edited_block.py"
    module = import_file(path, text)
    path.write_text(text.replace("+ 1", "- 1"), encoding="utf-8")
    linecache.checkcache(str(path))
    model = nn.Sequential(module.Edited())
    model[0].conv = nn.Conv2d(3, 3, 1)
    assert find_sites(model) == []
    assert find_unreachable_calls(model) == ["relu in Edited (edited_block.py:7, 1 module)"]


def test_classes_of_one_name_keep_their_source_code_apart() -> None:
    def build(slope: float) -> nn.Module:
        if slope:

            class Twin(Block):
                def forward(self, x: Tensor) -> Tensor:
                    return F.relu(self.conv(x)) + 2

        else:

            class Twin(Block):  # type: ignore[no-redef]
                def forward(self, x: Tensor) -> Tensor:
                    return F.relu(self.conv(x)) * 3

        return Twin()

    model, x = nn.Sequential(build(0), build(1)).eval(), torch.randn(1, 3, 4, 4)
    patch_model(model, "hardswish")
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


class NamedByText(Block):
    """Has children of which the code does not show the names."""

    def __init__(self) -> None:
        super().__init__()
        setattr(self, "act", nn.Conv2d(3, 3, 1))  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(getattr(self, "act")(x)))  # noqa: B009


class InDecorated(Block):
    @torch.no_grad()
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(dict(self.named_modules())["act"](x)))


@pytest.mark.parametrize("cls", [NamedByText, InDecorated])
def test_a_child_that_has_the_name_already_is_kept(cls: type[nn.Module]) -> None:
    model, x = make(cls), torch.randn(1, 3, 4, 4)
    expected, child = model(x), model[0].act
    patch_model(model, "relu6")
    assert model[0].act is child
    unpatch_model(model)
    assert model[0].act is child and torch.equal(model(x), expected)


class AlsoCalledElsewhere(Block):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.conv(self.relu(x))))

    def last(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


def test_a_child_that_another_method_calls_too_stays_one_module() -> None:
    (site,) = find_sites(make(AlsoCalledElsewhere))
    assert (site.name, len(site.widths)) == ("0.relu", 3)


class InSequence(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class GoesThrough(Block):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return F.relu(x)


class Registering(Block):
    def __init_subclass__(cls) -> None:
        assert cls.__name__ == "Registered"


class Registered(Registering):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Wrapping(Functional):
    """Has a `forward` of its own object, as accelerate gives it."""

    def __init__(self) -> None:
        super().__init__()
        stock = self.forward
        self.forward = functools.wraps(stock)(lambda x: stock(x) + 1)  # type: ignore[method-assign]


class Renaming(Functional):
    """Has a child that only its objects have."""


@pytest.mark.parametrize("build", [lambda: InSequence(nn.Conv2d(3, 3, 1)), GoesThrough, Registered, Wrapping, Renaming])
def test_blocks_that_a_further_child_or_subclass_would_change_are_left_and_named(build: Any) -> None:
    model = nn.Sequential(build(), nn.ReLU())
    if build is Renaming:
        model[0].add_module("a" + "ct", nn.Conv2d(3, 3, 1))
    (named,) = find_unreachable_calls(model)
    assert "test_functional_calls.py:" in named and [site.name for site in find_sites(model)] == ["1"]
    assert len(patch_model(model, "arelu")) == 1


class Choosing(Block):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.forward_fuse  # type: ignore[method-assign]

    def forward_fuse(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x))


def test_a_method_that_the_object_holds_is_rewired_too() -> None:
    model, x = make(Choosing), torch.randn(1, 3, 4, 4)
    expected = model(x)
    assert patch_model(model, "arelu").coverage.swapped == 1
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not torch.equal(other(x), expected)
        unpatch_model(other)
        assert torch.equal(other(x), expected)


def test_two_names_of_one_method_share_the_module() -> None:
    class Alias(Functional):
        run = Functional.forward

    assert [site.name for site in find_sites(make(Alias))] == ["0.act"]


def test_a_new_object_of_the_class_of_a_rewired_block_is_an_original() -> None:
    model = make(Functional)
    patch_model(model, "arelu")
    twin = type(model[0])()
    assert type(twin) is Functional and twin(torch.zeros(1, 3, 2, 2)).shape == (1, 3, 2, 2)


class Hidden(Block):
    """Has an attribute of the class in the place of a child, which is therefore not what it calls."""

    relu = staticmethod(torch.abs)

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.relu(self.bn(x))))


def test_a_child_behind_an_attribute_of_the_class_is_left() -> None:
    model, x = make(Hidden), torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert not [site for site in find_sites(model) if site.hidden]
    assert torch.equal(model(x), expected)
