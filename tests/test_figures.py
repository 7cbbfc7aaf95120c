"""Figures: one style for all of them, curves that are the functions themselves, and those of a trained model."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from conftest import Run
from test_cli import run
from torch import Tensor, nn

from rtdetr_act import create, patch_model, plot_activations, register
from rtdetr_act.activations.registry import get_entry, get_title, names
from rtdetr_act.analysis.curve_sampling import Curve, sample_curves
from rtdetr_act.analysis.curves import draw_activations, sample_activation
from rtdetr_act.analysis.figures import COLOURS, check_dpi, check_limits, figure_style, render_figure
from rtdetr_act.analysis.site_curves import draw_sites, order_by_turns
from rtdetr_act.errors import InputError, ModelError
from rtdetr_act.integrations.ultralytics.costs import bars_figure
from rtdetr_act.surgery.sites import find_sites

EIGHT = ["relu", "silu", "mish", "gelu", "elu", "tanh", "sigmoid", "softplus"]
BARS = {"model": {"arelu": {"training step": 1.2, "inference": 1.1}}}


def sample(spec: str, limits: tuple[float, float] = (-4.0, 4.0)) -> Curve:
    (curve,) = sample_activation(spec, limits)
    return curve


def find_jumps(curve: Curve) -> Tensor:
    """Return where two points of a curve are next to each other."""
    return curve.x[1:][curve.x.diff() < 1e-9]


def read_size(png: Path) -> tuple[int, int]:
    """Return width and height in pixels."""
    return struct.unpack(">II", png.read_bytes()[16:24])


# --- the style ------------------------------------------------------------------------------------------------------


def test_what_the_caller_has_set_stays_and_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [render_figure(bars_figure(BARS, "ratio")), render_figure(draw_activations("silu", (-4, 4)))]
    for key, value in {"font.size": 30.0, "axes.grid": False, "lines.linewidth": 9.0, "savefig.bbox": "tight"}.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    before = dict(matplotlib.rcParams)
    again = [render_figure(bars_figure(BARS, "ratio")), render_figure(draw_activations("silu", (-4, 4)))]
    assert dict(matplotlib.rcParams) == before and again == pictures
    with pytest.raises(ZeroDivisionError), figure_style():
        assert matplotlib.rcParams["font.size"] == 8
        raise ZeroDivisionError
    assert dict(matplotlib.rcParams) == before


def test_a_pdf_holds_its_fonts_and_is_the_same_file_each_time(tmp_path: Path) -> None:
    first, second = (plot_activations(["silu", "arelu"], tmp_path / f"{each}.pdf").read_bytes() for each in "ab")
    assert first == second
    assert b"/FontFile2" in first and b"/Type3" not in first and b"/CreationDate" not in first
    streams = b"".join(_inflate(first))
    assert b" Tf" in streams, "text is text"


def _inflate(pdf: bytes) -> list[bytes]:
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return found


def test_an_svg_needs_no_font_and_is_the_same_file_each_time(tmp_path: Path) -> None:
    first, second = (plot_activations(["silu", "arelu"], tmp_path / f"{each}.svg").read_text("utf-8") for each in "ab")
    assert first == second
    assert "<text" not in first and "<dc:date>" not in first and COLOURS[0].lower() in first


def test_dots_per_inch_are_the_size_of_the_picture(tmp_path: Path) -> None:
    width, height = read_size(plot_activations("silu", tmp_path / "screen.png"))
    run("plot", "silu", "dpi=300", "-o", str(tmp_path / "print.png"))
    assert (width, height) == (1074, 435) and read_size(tmp_path / "print.png") == (2148, 870)
    for wrong in (0, 1201, 72.5, True, "300"):
        with pytest.raises(InputError, match="from 1 to 1200"):
            check_dpi(wrong)  # type: ignore[arg-type]


# --- curves by name -------------------------------------------------------------------------------------------------


def test_names_are_those_of_papers(own_zoo: None) -> None:
    typed = ("dyrelu_b", "arelu", "silu", "aconc", "meta_aconc", "frelu", "prelu", "gelu")
    titles = [get_title(name) for name in typed]
    assert titles == ["DY-ReLU-B", "AReLU", "SiLU", "ACON-C", "Meta-ACON", "FReLU", "PReLU", "GELU"]
    assert get_title("nn.LeakyReLU(0.1)") == "Leaky ReLU (0.1)" and get_title("prelu(init=0.1)") == "PReLU (init=0.1)"
    assert len({get_entry(name).title for name in names()}) == len(names()), "two would have one name in a legend"
    register("my_act", nn.SiLU)
    register("your_act", lambda: nn.SiLU())
    register("their_act", nn.SiLU, title="Their-Act")
    assert [get_title(name) for name in ("my_act", "your_act", "their_act")] == ["SiLU", "your_act", "Their-Act"]


@pytest.mark.parametrize(("specs", "outside"), [(EIGHT[:7], False), (EIGHT, True), ([*EIGHT, *EIGHT[:4]], True)])
def test_a_legend_is_outside_from_eight_curves_on(specs: Sequence[str], outside: bool) -> None:
    figure = draw_activations(specs, (-4, 4))
    left, right = figure.axes
    assert bool(figure.legends) is outside and (left.get_legend() is None) is outside and right.get_legend() is None
    (legend,) = figure.legends or [left.get_legend()]
    drawn = [text.get_text() for text in legend.get_texts()]
    assert drawn == [get_title(name) for name in dict.fromkeys(specs)], "one that is named twice is drawn once"
    lines = [line for line in left.lines if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == len(drawn)
    if outside:
        figure.draw_without_rendering()
        assert legend.get_window_extent().x0 >= right.get_window_extent().x1


def test_limits_are_those_given(tmp_path: Path) -> None:
    left, right = draw_activations("silu", (-6, 8), (-1, 7)).axes
    assert left.get_xlim() == right.get_xlim() == (-6, 8) and left.get_ylim() == (-1, 7)
    assert right.get_ylim()[1] < 2, "of the gradients all is shown"
    files = [tmp_path / f"{index}.svg" for index in range(3)]
    run("plot", "silu", "--xlim", "-6,8", "--ylim", "-1,7", "-o", str(files[0]))
    run("plot", "silu", "xlim=[-6, 8]", "ylim=(-1,7)", "-o", str(files[1]))
    plot_activations("silu", files[2], xlim=(-6, 8), ylim=[-1, 7])
    assert len({file.read_bytes() for file in files}) == 1
    for wrong in ("", "1", "1,2,3", "a,b", "2,2", "nan,1", "0,inf", 5, (1, None)):
        with pytest.raises(InputError, match="xlim is two numbers, the lower one first"):
            check_limits("xlim", wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit is two numbers"):
        plot_activations("silu", tmp_path / "x.png", limit=0)


def test_curves_are_the_functions_themselves() -> None:
    curve = sample("mish")
    mean, slope = curve.values[1], curve.gradients[1]
    x = curve.x.clone().requires_grad_()
    nn.functional.mish(x).sum().backward()
    assert curve.x.dtype == mean.dtype == torch.float64 and not curve.varies
    torch.testing.assert_close(mean, nn.functional.mish(curve.x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, x.grad, rtol=1e-12, atol=1e-12)
    slopes = sample("arelu").gradients[1]
    assert float(slopes[-1]) == pytest.approx(1 + torch.sigmoid(torch.tensor(2.0)).item())
    assert float(slopes[0]) == pytest.approx(0.9)
    torch.testing.assert_close(sample("relu(inplace=True)").values, sample("relu").values)


@pytest.mark.parametrize(
    ("spec", "jumps", "levels"),
    [
        ("relu6", [0, 6], {0.0, 1.0}),
        ("relu", [0], {0.0, 1.0}),
        ("leaky_relu(0.1)", [0], {0.1, 1.0}),
        ("hardtanh", [-1, 1], {0.0, 1.0}),
        ("hardsigmoid", [-3, 3], {0.0, 1 / 6}),
        ("hardshrink", [-0.5, 0.5], {0.0, 1.0}),
        ("threshold(0.1, 0.0)", [0.1], {0.0, 1.0}),
    ],
)
def test_a_gradient_jumps_where_it_does(spec: str, jumps: list[float], levels: set[float]) -> None:
    curve = sample(spec, (-5.3, 8.1))
    found = sorted({round(float(x), 9) for x in find_jumps(curve)})
    assert found == pytest.approx(jumps, abs=1e-9)
    slopes = curve.gradients[1]
    assert {round(float(each), 7) for each in slopes} == {round(each, 7) for each in levels}
    changes = curve.x.diff()[slopes.diff() != 0]
    assert len(changes) == len(jumps) and float(changes.max()) < 1e-9, "no line from one level to the other is slanted"


def test_a_smooth_gradient_has_neither_jumps_nor_stairs() -> None:
    for spec in ("silu", "gelu", "softplus", "meta_aconc"):
        for curve in sample_activation(spec, (-6, 6)):
            bends = curve.gradients[1].diff().diff().abs().max() / curve.gradients[1].diff().abs().max()
            assert len(find_jumps(curve)) == 0 and float(bends) < 0.1, spec
    slopes = sample("dyrelu_b").gradients[1]  # the mean of functions that jump each elsewhere
    assert float(slopes.diff().abs().max()) < 0.25 * float(slopes.max() - slopes.min())


def test_channels_that_start_apart_are_lines_and_dynamic_ones_have_a_band() -> None:
    curves = sample_activation("aconc", (-4, 4))
    assert len(curves) == 3 and not any(curve.varies for curve in curves)
    assert float((curves[0].values[1] - curves[1].values[1]).abs().max()) > 0.1
    left, _ = draw_activations(["aconc", "silu"], (-4, 4)).axes
    assert not left.collections and [text.get_text() for text in left.get_legend().get_texts()] == [
        "ACON-C (3 channels)", "SiLU",
    ]  # fmt: skip
    for spec in ("dyrelu_b", "frelu", "softmax"):
        assert sample(spec).varies, spec
    assert all(curve.varies for curve in sample_activation("meta_aconc", (-4, 4)))
    assert not sample("prelu(per_channel=True)").varies and not sample("rrelu(0.2, 0.2)").varies
    low, mean, high = sample("rrelu").gradients[:, 0].tolist()
    assert (low, mean, high) == pytest.approx((0.135, 11 / 48, 0.323), abs=0.01), "U(1/8, 1/3), as in training"


def test_a_dynamic_activation_is_that_of_its_held_coefficients() -> None:
    """The mean over contexts, computed by another way: from the coefficients themselves."""
    torch.manual_seed(1)
    module = create("dyrelu_b", 8).eval()
    module.expand.reset_parameters()
    (curve,) = sample_curves(module, 8, (-3, 3), functions=64)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, 8, 1, generator=generator, dtype=torch.float64)
    contexts = (means + torch.randn(8, 8, 9, generator=generator, dtype=torch.float64)).view(8, 8, 3, 3)
    slopes, intercepts = module.double().coefficients(contexts)
    lines = [a * curve.x + b for a, b in zip(slopes, intercepts, strict=True)]
    lines = [line.flatten(0, -2) for line in lines]
    torch.testing.assert_close(curve.values[1], torch.maximum(*lines).mean(0).detach())
    assert all(parameter.grad is None for parameter in module.parameters())


# --- curves of a trained model --------------------------------------------------------------------------------------


def coloured(figure: Any) -> tuple[list[Any], list[Any]]:
    """Return the lines of the sites in the panels of f and f'."""
    return tuple([line for line in axis.lines if len(line.get_xdata()) > 100] for axis in figure.axes[:2])  # type: ignore[return-value]


def test_every_site_of_a_checkpoint_is_a_line_coloured_by_its_depth(rows_run: Run, tmp_path: Path) -> None:
    model = rows_run.model
    layers = [site.layer for site in find_sites(model)]
    sites = [find_sites(model)[index] for index in order_by_turns(layers)]
    figure = draw_sites(model, (-4, 4))
    left, right = coloured(figure)
    assert len(left) == len(right) == len(sites) > 20
    by_layer: dict[int, set[Any]] = {}
    for site, line in zip(sites, left, strict=True):
        by_layer.setdefault(site.layer, set()).add(tuple(line.get_color()))
    colours = [each for layer in sorted(by_layer) for each in by_layer[layer]]
    assert len(colours) == len(by_layer), "a colour for each layer"
    assert len(set(colours)) == len(by_layer) > 5
    greens = [green for _, green, _, _ in colours]
    assert greens == sorted(greens), "viridis becomes greener"
    assert figure.axes[2].get_ylabel() == "depth (layer of the model)"
    for site, line in zip(sites, left, strict=True):
        if site.activation == "arelu":
            alpha = float(site.module.alpha.clamp(0.01, 0.99))
            assert float(line.get_ydata()[0]) == pytest.approx(-4 * alpha, rel=1e-3)
    assert "AReLU at " in figure.get_suptitle() and "PReLU at " in figure.get_suptitle()
    run("plot", str(rows_run.pt), "xlim=-2,2", "dpi=100", "-o", str(tmp_path / "curves.png"))
    assert read_size(tmp_path / "curves.png") == (716, 300)


def test_sites_with_many_functions_are_a_mean_with_a_band() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    patch_model(model, "prelu(per_channel=True)")
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0, 0.5, 6))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    figure = draw_sites(model, (-4, 4))
    left, right = coloured(figure)
    assert float(right[0].get_ydata()[0]) == pytest.approx(0.25) and float(left[0].get_ydata()[0]) == pytest.approx(-1)
    assert len(figure.axes[0].collections) == 1, "the channels of the second are still equal"
    assert figure.axes[2].get_ylabel() == "depth (site of the model)"
    assert model.training and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ModelError, match="no activation"):
        draw_sites(nn.Sequential(nn.Conv2d(3, 6, 3)), (-4, 4))


def test_sites_are_drawn_as_they_are_deployed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    patch_model(model.train(), "rrelu")
    figure = draw_sites(model, (-4, 4))
    assert not figure.axes[0].collections and model[1].training
    assert float(coloured(figure)[1][0].get_ydata()[0]) == pytest.approx(11 / 48)
