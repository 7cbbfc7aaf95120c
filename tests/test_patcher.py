"""The patcher: one instance per site, nothing else changed, undone exactly, refused before anything is half-done."""

from __future__ import annotations

import copy
import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known import HELD, SITES, Twice
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from rtdetr_act import default_act, find_sites, patch_model, unpatch_model
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.placed import get_placement
from rtdetr_act.activations.registry import names, register
from rtdetr_act.errors import ModelError, RtdetrActError, SelectionError, SpecError
from rtdetr_act.integrations.ultralytics.costs import draw_batch
from rtdetr_act.surgery.functional_calls import FUNCTIONS
from rtdetr_act.surgery.model_plan import mark_fitted, read_plan, set_plan, set_yaml_plan
from rtdetr_act.surgery.plan import MAX_STAGES, Plan
from rtdetr_act.surgery.rewiring import is_rewired
from rtdetr_act.surgery.sites import iterate_placed_activations, iterate_placed_convolutions

torchvision = pytest.importorskip("torchvision")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.integration
@pytest.mark.parametrize("scope", ["conv", "all"])
@pytest.mark.parametrize("name", SITES)
def test_every_site_gets_an_instance_and_two_parameters(name: str, scope: str) -> None:
    try:
        model = (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml")
    except FileNotFoundError:
        pytest.skip(f"this Ultralytics has no {name}")
    before = count(model.model)
    report = patch_model(model, "arelu", scope=scope)
    expected = SITES[name][scope == "all"]
    assert len(report) == expected == len(set(report.sites))
    instances = [module for module in model.model.modules() if type(module).__name__ == "AReLU"]
    assert len(instances) == len({id(module) for module in instances}) == expected
    assert count(model.model) - before == 2 * expected == report.parameters


def test_unpatching_gives_back_the_very_objects() -> None:
    model = RTDETR("rtdetr-resnet50.yaml")
    before = {name: id(module) for name, module in model.model.named_modules()}
    types = {name: type(module) for name, module in model.model.named_modules()}
    yaml = copy.deepcopy(model.model.yaml)
    patch_model(model, "arelu", scope="all")
    patch_model(model, "dyrelu_b", layers="0-3")
    assert model.model.yaml != yaml
    assert unpatch_model(model) == 88
    assert {name: id(module) for name, module in model.model.named_modules()} == before
    assert {name: type(module) for name, module in model.model.named_modules()} == types
    assert model.model.yaml == yaml
    assert unpatch_model(model) == 0


def test_copies_and_pickles_can_be_unpatched_too() -> None:
    model = torchvision.models.resnet18()
    x = torch.randn(1, 3, 64, 64)
    expected = model.eval()(x)
    patch_model(model, "prelu(per_channel=True)")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(other.layer1[0], torchvision.models.resnet.BasicBlock) and is_rewired(other.layer1[0])
        assert torch.equal(other(x), model(x))
        assert unpatch_model(other) == 17
        assert torch.equal(other(x), expected)
        assert other.state_dict().keys() == torchvision.models.resnet18().state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121", "googlenet", "inception_v3"])
def test_a_rewired_block_computes_what_the_original_did(name: str) -> None:
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(**more).eval()
    x = torch.randn(1, 3, 96, 96)
    expected = model(x)
    patch_model(model, "relu", scope="all")
    torch.testing.assert_close(model(x), expected)


def test_a_rewired_resnet_block_of_ultralytics_computes_what_the_original_did() -> None:
    from ultralytics.nn.modules.block import ResNetBlock

    block = nn.Sequential(ResNetBlock(8, 4)).eval()
    x = torch.randn(1, 8, 6, 6)
    expected = block(x)
    patch_model(block, "relu", include="*.act", exclude="*cv*")
    assert len(list(iterate_placed_activations(block))) == 1
    torch.testing.assert_close(block(x), expected)
    patch_model(block, "tanh", include="*.act", exclude="*cv*")
    assert not torch.allclose(block(x), expected)


def test_the_old_activation_makes_room_with_device_dtype_mode_and_memory_format() -> None:
    model = small().to(memory_format=torch.channels_last).double().eval()
    patch_model(model, "frelu")
    assert model[2].training is False
    assert {p.dtype for p in model[2].parameters()} == {torch.float64}
    weights = [p for p in model[2].parameters() if p.ndim == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    meta = small().to("meta")
    patch_model(meta, "arelu", example_input=torch.zeros(1, 3, 8, 8, device="meta"))
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_inplace_is_taken_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU())
    patch_model(model, "hardswish")
    assert (model[1].inplace, model[3].inplace) == (True, False)


class NeverInPlace(nn.Module):
    """As those of torch-activation: it has the attribute, and may refuse it."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.inplace
        return x.sin()


@pytest.mark.usefixtures("own_zoo")
def test_an_activation_of_others_works_in_place_only_if_its_spec_says_so(tmp_path: Path) -> None:
    register("never_in_place", NeverInPlace)
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())))
    for site in find_sites(model.model):
        site.module.inplace = True
    patch_model(model, "never_in_place")
    torch.save({"model": model.model}, tmp_path / "best.pt")
    loaded = YOLO(tmp_path / "best.pt").model  # Ultralytics sets `inplace` of all modules
    for each in (model.model, loaded):
        assert {site.module.inplace for site in find_sites(each)} == {False}
    patch_model(model, "never_in_place(inplace=True)")
    torch.save({"model": model.model}, tmp_path / "best.pt")
    assert {site.module.inplace for site in find_sites(YOLO(tmp_path / "best.pt").model)} == {True}


def test_other_weights_and_the_random_state_are_untouched() -> None:
    model = small()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    patch_model(model, "dyrelu_b")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_patching_again_replaces_and_the_plan_stays_short() -> None:
    model = YOLO("yolov8n.yaml")
    for act in ("arelu", "mish", "dyrelu_b@neck", "mish", "silu@head"):
        patch_model(model, act)
    assert model.model.yaml["activation"] == "rtdetr_act.Plan('mish, silu@head')"
    assert {site.current for site in find_sites(model)} == {"mish", "silu"}


def test_selections() -> None:
    model = YOLO("yolov8n.yaml")
    assert all(name.startswith(("model.0.", "model.3.")) for name in patch_model(model, "mish", layers="0+3").sites)
    assert all(".cv2." in name for name in patch_model(model, "mish", include="*.cv2.*").sites)
    assert not any(name.startswith("model.22.") for name in patch_model(model, "mish", exclude="model.22.*").sites)
    report = patch_model(model, "dyrelu_b@backbone, dyrelu_c@neck, silu@15-22")
    assert {swap.after for swap in report.swaps if swap.site.section == "backbone"} == {"dyrelu_b"}
    assert {swap.after for swap in report.swaps if swap.site.layer is not None and swap.site.layer > 14} == {"silu"}
    assert "dyrelu_c" in str(report) and f"{len(report)} sites swapped" in str(report)


def test_the_shared_default_of_ultralytics_is_not_touched() -> None:
    from ultralytics.nn.modules.conv import Conv

    default = Conv.default_act
    patch_model(YOLO("yolov8n.yaml"), "arelu")
    assert Conv.default_act is default
    assert {site.current for site in find_sites(YOLO("yolov8n.yaml"))} == {"SiLU"}


def test_a_transformer_layer_computes_the_new_activation_in_the_fused_path_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    stock = layer(x)
    patch_model(layer, "tanh", scope="all", example_input=x)
    with torch.no_grad():
        fused = layer(x)
    torch.testing.assert_close(fused, layer(x))
    assert not torch.allclose(fused, stock)
    unpatch_model(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), stock)


@pytest.mark.integration
@pytest.mark.parametrize("name", names())
def test_every_entry_stands_in_a_yolo_or_says_why_not(name: str) -> None:
    model = YOLO("yolov8n.yaml").model
    spec = "threshold(0.1, 0.0)" if name == "threshold" else name
    try:
        report = patch_model(model, spec)
    except SpecError as error:
        assert "lacks" in str(error)  # apa, with an Ultralytics that has none
        return
    assert len(report) == SITES["yolov8n"][0]
    assert all(torch.isfinite(y).all() for y in model.eval()(torch.rand(1, 3, 64, 64))[:1])


def test_default_act_gives_each_site_its_own() -> None:
    with default_act("arelu"):
        model = RTDETR("rtdetr-l.yaml")
    sites = [name for name, module in iterate_placed_activations(model.model)]
    assert len(sites) == 24  # 12 Conv and 12 RepConv; the others never look at default_act
    assert count(model.model) - count(RTDETR("rtdetr-l.yaml").model) == 48
    rebuilt = type(model.model)(model.model.yaml, verbose=False)
    assert [name for name, module in iterate_placed_activations(rebuilt)] == sites


def test_default_act_that_reaches_nothing_is_an_error() -> None:
    with default_act("arelu"), pytest.raises(ModelError, match="reached no activation"):
        YOLO("yolov6n.yaml")
    from ultralytics.nn.modules.conv import Conv

    assert type(Conv.default_act) is nn.SiLU


@pytest.mark.parametrize(
    ("activation", "more", "error", "words"),
    [
        ("arelo", {}, SpecError, "did you mean 'arelu'"),
        ("leaky_relu(slope=1)", {}, SpecError, "negative_slope"),
        ("dyrelu_b(reduction=0)", {}, SpecError, "reduction"),
        ("threshold", {}, SpecError, "threshold"),
        ("open('patched.txt', 'w')", {}, SpecError, "no activation 'open'"),
        ("arelu", {"layers": "99"}, SelectionError, "end at 28"),
        ("arelu", {"layers": "13"}, SelectionError, "matches no activation site"),
        ("arelu", {"layers": []}, SpecError, "empty"),
        ("arelu", {"include": "*.nothing"}, SelectionError, "matches no"),
        ("arelu@11", {}, SelectionError, "scope='all'"),
        ("frelu", {"scope": "all"}, SelectionError, "tokens"),
        ("dyrelu_c@11", {"scope": "all"}, SelectionError, "model.11.act"),
        ("arelu, mish@99", {}, SelectionError, "99"),
        ("arelu from=mish", {}, SelectionError, "77 convolutional sites hold relu (53) and silu (24)"),
        ("arelu@backbone from=silu", {}, SelectionError, "53 convolutional sites of '@backbone' hold relu (53)"),
        ("arelu from=gelu", {}, SelectionError, "1 transformer site matches with scope='all'"),
        ("arelu", {"replaces": ["mish"], "scope": "all"}, SelectionError, "92 sites of 'scope=all' hold relu"),
        ("arelu from=relu, mish from=relu", {}, SelectionError, "would apply nowhere"),
        ("arelu from=silo", {}, SpecError, "did you mean 'silu'"),
        ("arelu", {"scope": "everything"}, SpecError, "scope"),
        (3, {}, SpecError, "plan"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(
    activation: str,
    more: dict,
    error: type[RtdetrActError],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = _rtdetr()
    yaml = copy.deepcopy(model.yaml)
    with pytest.raises(error, match=re.escape(words)) as caught:
        patch_model(model, activation, **more)
    assert "\n" not in str(caught.value)
    assert not list(iterate_placed_activations(model)) and model.yaml == yaml
    assert not list(tmp_path.iterdir())


_built: list[nn.Module] = []


def _rtdetr() -> nn.Module:
    if not _built:
        _built.append(RTDETR("rtdetr-l.yaml").model)
    return _built[0]


@pytest.mark.integration
def test_models_that_cannot_be_patched_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.module"):
        patch_model(nn.DataParallel(small()), "arelu")
    with pytest.raises(ModelError, match="compile"):
        patch_model(torch.compile(small()), "arelu")
    with pytest.raises(ModelError, match="TorchScript"):
        patch_model(torch.jit.trace(small().eval(), torch.zeros(1, 3, 8, 8)), "arelu")
    (tmp_path / "best.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="exported"):
        patch_model(YOLO(str(tmp_path / "best.onnx"), task="detect"), "arelu")
    with pytest.raises(ModelError, match="a str is no"):
        patch_model("yolov8n.yaml", "arelu")


def test_a_foreign_model_without_layers_or_known_channels_says_so() -> None:
    assert len(patch_model(Twice(), "arelu")) == 1
    with pytest.raises(SelectionError, match="4 and 6 channels"):
        patch_model(Twice(), "dyrelu_b")
    with pytest.raises(SelectionError, match="include="):
        patch_model(small(), "arelu@0-3")
    with pytest.raises(SelectionError, match="scope='all'"):
        patch_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), "arelu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "__import__('pathlib').Path('ran').touch()"}, "is not an activation"),
        ({"activation": "open('ran', 'w')"}, "no activation 'open'"),
        ({"activation": "nn.Conv3(open('ran', 'w'))"}, "literal"),
        ({"activation": "nn.Nothing()"}, "Nothing"),
        ({"activation": "nn.LeakyReLU(nope=1)"}, "cannot be built"),
    ],
)
def test_a_model_yaml_never_runs_code(
    change: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_yaml = {**YOLO("yolov8n.yaml").model.yaml, **change}
    with pytest.raises(SpecError, match=words):
        DetectionModel(model_yaml, verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_stock_activation_keeps_its_stock_meaning() -> None:
    from ultralytics.nn.modules.conv import Conv

    model = YOLO("yolov8n.yaml").model
    model_yaml = {**model.yaml, "activation": "torch.nn.LeakyReLU(0.2)"}
    rebuilt = DetectionModel(model_yaml, verbose=False)
    shared = {id(site.module): site.module for site in find_sites(rebuilt)}
    assert len(shared) == 1
    assert next(iter(shared.values())).negative_slope == 0.2
    assert rebuilt.yaml["activation"] == "torch.nn.LeakyReLU(0.2)"
    assert type(Conv.default_act) is nn.SiLU


@pytest.mark.integration
def test_patching_rtdetr_x_is_quick() -> None:
    model = RTDETR("rtdetr-x.yaml")
    start = time.perf_counter()
    assert len(patch_model(model, "arelu", scope="all")) == 124
    assert time.perf_counter() - start < 10  # 0.04 s here; the bound only catches a probing pass or a quadratic walk


# ---------------------------------------------------------------- what stands there now


@pytest.mark.integration
@pytest.mark.parametrize("name", HELD)
def test_from_swaps_what_it_names_and_nothing_else(name: str) -> None:
    model = (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml")
    before = {site.name: site.module for site in find_sites(model)}
    held = {site.name: site.activation for site in find_sites(model) if site.layout == "map"}
    for activation, count in HELD[name].items():
        report = patch_model(model, f"arelu from={activation}")
        assert set(report.sites) == {site for site, found in held.items() if found == activation}
        assert len(report) == count == tiny.count(model.model, AReLU)
        assert f"plan: arelu from={activation}" in str(report)
        rest = {site.name: site.module for site in find_sites(model) if site.name not in report.sites}
        assert all(module is before[site] for site, module in rest.items())
        rebuilt = type(model.model)(copy.deepcopy(model.model.yaml), verbose=False)
        assert {site for site, _ in iterate_placed_activations(rebuilt)} == set(report.sites)
        assert unpatch_model(model) == count and read_plan(model.model) == Plan()


def test_from_reaches_transformer_sites_with_scope_all() -> None:
    model = tiny_rtdetr()
    assert patch_model(model, "arelu", replaces="gelu", scope="all").sites == ["model.9.act"]
    report = patch_model(model, "mish from=relu", scope="all")
    assert len(report) == tiny.CONV_SITES - tiny.SILU_SITES + tiny.TOKEN_SITES - 1
    assert str(report.plan) == "arelu from=gelu scope=all, mish from=relu scope=all"


def test_every_name_of_a_function_is_that_of_an_activation() -> None:
    assert set(FUNCTIONS.values()) <= set(names())


def test_from_in_a_model_that_is_not_from_ultralytics() -> None:
    class Own(nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 1), nn.functional.relu

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.conv(x))

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), Block(), nn.Conv2d(8, 8, 1), nn.ReLU(), Own())

    assert [site.activation for site in find_sites(net())] == ["silu", "relu", "relu"], "Own is not of a known module"
    model = net()
    assert patch_model(model, "mish from=F.relu").sites == ["2.act", "4"]
    assert patch_model(model, "arelu", replaces=["mish", "silu"]).sites == ["1", "2.act", "4"]
    resnet = torchvision.models.resnet18()
    assert len(patch_model(resnet, "silu from=relu")) == 17
    with pytest.raises(SelectionError, match=r"the model's 17 convolutional sites hold silu \(17\)"):
        patch_model(resnet, "arelu from=relu")


def test_one_plan_exchanges_two_activations() -> None:
    model = tiny_rtdetr()
    before = {site.name: site.activation for site in find_sites(model)}
    report = patch_model(model, "relu from=silu, silu from=relu")
    other = {"silu": "relu", "relu": "silu"}
    now = {site.name: site.activation for site in find_sites(model)}
    assert len(report) == tiny.CONV_SITES and {now[name] for name in report.sites} == {"silu", "relu"}
    assert all(now[name] == other[before[name]] for name in report.sites)
    rebuilt = RTDETRDetectionModel(copy.deepcopy(model.yaml), verbose=False)
    assert describe(rebuilt) == describe(model)


def test_default_act_is_what_from_looks_at() -> None:
    with default_act("mish"):
        model = RTDETRDetectionModel(copy.deepcopy(tiny.RTDETR), verbose=False)
    assert len(patch_model(model, "arelu from=mish")) == tiny.SILU_SITES
    rebuilt = RTDETRDetectionModel(copy.deepcopy(model.yaml), verbose=False)
    assert describe(rebuilt) == describe(model)
    stock = RTDETRDetectionModel({**copy.deepcopy(tiny.RTDETR), "activation": "nn.Hardswish()"}, verbose=False)
    swapped = len(patch_model(stock, "arelu from=hardswish"))
    assert swapped == tiny.SILU_SITES - 1  # a RepConv keeps a default of its own
    assert describe(RTDETRDetectionModel(copy.deepcopy(stock.yaml), verbose=False)) == describe(stock)
    assert unpatch_model(stock) == swapped and stock.yaml["activation"] == "nn.Hardswish()"


def test_a_plan_with_a_base_reports_all_that_it_swaps() -> None:
    model = tiny_rtdetr()
    plan = replace(Plan.parse("arelu@backbone from=mish"), base=Plan.parse("mish"))
    report = patch_model(model, plan)
    assert len(report) == tiny.CONV_SITES == len(list(iterate_placed_activations(model)))
    assert {(swap.before, swap.after) for swap in report.swaps} == {("ReLU", "arelu"), ("SiLU", "mish")}
    assert report.plan == read_plan(model) and "plan: mish; then arelu@backbone from=mish" in str(report)
    with tiny.logged() as lines:
        RTDETRDetectionModel(copy.deepcopy(model.yaml))
    assert [line for line in lines if f"{tiny.CONV_SITES} activations swapped: mish; then arelu@backbone" in line]


def test_the_plan_of_a_model_patched_site_by_site_has_one_stage() -> None:
    model = tiny_rtdetr()
    sites = [site.name for site in find_sites(model) if site.layout == "map"]
    for name in sites:
        patch_model(model, "arelu", include=name, replaces=["relu", "silu"])
    assert len(read_plan(model).stages) == 1
    for _ in range(3):
        patch_model(model, "mish from=arelu")
        patch_model(model, "arelu from=mish")
    assert len(read_plan(model).stages) == 1, "back where it was"
    patch_model(model, "prelu from=arelu")
    patch_model(model, "silu")
    assert read_plan(model) == Plan.parse("silu"), "nothing of the others is left"
    assert describe(RTDETRDetectionModel(copy.deepcopy(model.yaml), verbose=False)) == describe(model)


def test_what_a_slope_was_fitted_to_stays_in_the_plan() -> None:
    model = tiny_rtdetr()
    patch_model(model, "mish@backbone")
    patch_model(model, "leaky_relu@backbone init=match")  # a slope for Mish, which is no parameter that a file keeps
    mark_fitted(model)
    patch_model(model, "arelu@neck")
    assert len(read_plan(model).stages) == 2
    assert describe(RTDETRDetectionModel(copy.deepcopy(model.yaml), verbose=False)) == describe(model)


def test_more_stages_than_a_model_yaml_may_have_are_refused() -> None:
    model = RTDETRDetectionModel(copy.deepcopy(tiny.RTDETR), verbose=False)
    plan = Plan.parse("leaky_relu(0.5)")
    for _ in range(MAX_STAGES - 1):
        plan = replace(Plan.parse("leaky_relu(0.5) init=match"), base=plan)
    set_plan(model, plan)
    assert read_plan(model) == plan
    before = copy.deepcopy(model.yaml)
    with pytest.raises(ModelError, match="unpatch the model"):
        patch_model(model, "leaky_relu init=match")
    assert model.yaml == before and not list(iterate_placed_activations(model))


def describe(model: nn.Module) -> dict[str, object]:
    """Return what each site holds: the class, its arguments and parameters, and what the swap says of it."""
    found: dict[str, object] = {}
    for site in find_sites(model):
        values = {}
        if isinstance(site.module, nn.Module):
            values = {name: value.tolist() for name, value in site.module.state_dict().items()}
        # Ultralytics lets stock activations work in place once a network is built; 8.3.0 shares that of the decoder.
        text = re.sub(r"(, )?inplace=True", "", repr(site.module))
        found[site.name] = (text, values, site.activation, get_placement(site.module) is None)
    return found


@st.composite
def steps(draw: st.DrawFn, model: nn.Module) -> tuple[str, dict]:
    """Give a plan, mostly with rules for what the model holds now, and options of `patch_model`."""
    held = sorted({site.activation for site in find_sites(model) if site.activation})
    rules = []
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        activation = draw(st.sampled_from(["arelu", "silu", "relu", "mish", "leaky_relu", "leaky_relu(0.2)", "prelu"]))
        where = draw(st.sampled_from(["", "", "", "@backbone", "@neck", "@2-3", "@neck+0"]))
        names = draw(st.sets(st.sampled_from(held), max_size=2))
        words = [f" from={'+'.join(sorted(names))}"] if names else []
        words += draw(st.sampled_from([[], [], [], [" init=match"]]))
        rules.append(f"{activation}{where}{''.join(words)}")
    return ", ".join(rules), {"scope": draw(st.sampled_from(["conv", "all"]))}


@settings(max_examples=40)
@given(st.data())
def test_a_model_patched_step_by_step_is_rebuilt_from_its_yaml(data: st.DataObject) -> None:
    model = tiny_rtdetr()
    before_fits = [describe(model)]
    for _ in range(data.draw(st.integers(2, 6))):
        start, carried = describe(model), copy.deepcopy(model.yaml)
        other = data.draw(st.sampled_from([None] * 8 + ["unpatch", "fitted", "dynamic_conv(kernels=2)@2-3"]))
        text, options = (other, {}) if other else data.draw(steps(model))
        if text == "unpatch":
            unpatch_model(model)
        elif text == "fitted":
            mark_fitted(model)
        else:
            try:
                patch_model(model, text, **options)
            except SelectionError:
                assert describe(model) == start and model.yaml == carried
            else:
                before_fits += [start] if "init=match" in text else []
    plan = read_plan(model)
    rebuilt = RTDETRDetectionModel(copy.deepcopy(model.yaml), verbose=False)
    assert describe(rebuilt) == describe(model), plan
    convolutions = [[name for name, _ in iterate_placed_convolutions(each)] for each in (model, rebuilt)]
    assert convolutions[0] == convolutions[1]
    if plan.needs_fit:
        reference = RTDETRDetectionModel(set_yaml_plan(tiny.RTDETR, plan.reference), verbose=False)
        assert describe(reference) in before_fits, plan


# ---------------------------------------------------------------- in place


def tiny_rtdetr() -> nn.Module:
    return RTDETRDetectionModel(copy.deepcopy(tiny.RTDETR), verbose=False)


def test_arelu_works_in_place_behind_the_batch_norm_of_a_convolution() -> None:
    model = tiny_rtdetr()
    # Ultralytics sets it on all its activations, or on none (8.4).
    stock = {site.name for site in find_sites(model) if getattr(site.module, "inplace", False)}
    patch_model(model, "arelu", scope="all")
    placed = {site.name: site for site in find_sites(model)}
    convolutions = {name for name, site in placed.items() if hasattr(type(site.owner), "default_act")}
    assert {name for name, site in placed.items() if site.module.inplace} == convolutions | stock
    assert len(convolutions) == tiny.CONV_SITES


def test_in_place_changes_no_loss_and_no_gradient() -> None:
    def gradients(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)
        loss = model.loss(drawn)[0].sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    torch.manual_seed(1)
    model = tiny_rtdetr().train()
    model.args, model.nc = get_cfg(), model.yaml["nc"]
    drawn = draw_batch(model, "detect", 64, 2, "cpu")
    patch_model(model, "arelu")
    in_place = gradients(model)
    for module in model.modules():
        if isinstance(module, AReLU):
            module.inplace = False
    for got, want in zip(in_place, gradients(model), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_leaky_relu_too_but_not_what_reads_its_input() -> None:
    model = tiny_rtdetr()
    patch_model(model, "leaky_relu(0.1)")
    assert {m.inplace for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {True}
    patch_model(model, "leaky_relu(-0.1)")
    assert {m.inplace for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {False}
    patch_model(model, "mish")
    # As the stock ones: 8.3 sets it on all its activations.
    stock = {m.inplace for m in tiny_rtdetr().modules() if isinstance(m, nn.SiLU)}
    assert {m.inplace for m in model.modules() if isinstance(m, nn.Mish)} == stock
    patch_model(model, "arelu(inplace=False)")
    assert {m.inplace for m in model.modules() if isinstance(m, AReLU)} == {False}


def test_in_place_is_refused_where_others_may_read_the_input() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    with pytest.raises(SelectionError, match=r"'arelu\(inplace=True\)' would write over its input, but at 1 "):
        patch_model(net, "arelu(inplace=True)")
    assert isinstance(net[1], nn.ReLU)
    patch_model(net, "arelu")
    assert [net[1].inplace, net[3].inplace] == [False, True]
    patch_model(net, "silu")
    assert [net[1].inplace, net[3].inplace] == [False, True]


@pytest.mark.parametrize("wrong", ["dyrelu_b(k=0)", "arelu@77", "no_such"])
def test_nothing_is_changed_where_the_plan_above_a_base_is_wrong(wrong: str) -> None:
    model = RTDETRDetectionModel(tiny.RTDETR, verbose=False)
    before, carried = dict(model.named_modules()), copy.deepcopy(model.yaml)
    with pytest.raises((SpecError, SelectionError)):
        patch_model(model, replace(Plan.parse(wrong), base=Plan.parse("mish")))
    assert dict(model.named_modules()) == before and model.yaml == carried
    assert len(patch_model(model, replace(Plan.parse("arelu@backbone"), base=Plan.parse("mish")))) > 0
    kinds = {site.section: type(site.module).__name__ for site in find_sites(model) if site.layout == "map"}
    assert kinds["backbone"] == "AReLU" and kinds["neck"] == "Mish"
