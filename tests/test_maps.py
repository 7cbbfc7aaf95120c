"""Feature maps: what is captured against plain forward passes, what is counted, and what is drawn of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Data
from matplotlib.figure import Figure
from PIL import Image
from test_cli import run
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics import RTDETR, YOLO

from rtdetr_act import compare_feature_maps, find_sites, patch_model
from rtdetr_act.analysis.feature_map_figure import _choose_grid, draw_feature_maps
from rtdetr_act.analysis.feature_maps import Capture, capture_activations, choose_sites, summarise_values
from rtdetr_act.errors import InputError, RtdetrActError, SelectionError, SpecError
from rtdetr_act.integrations.ultralytics.images import load_image
from rtdetr_act.integrations.ultralytics.models import load_model
from rtdetr_act.surgery.modules import set_child

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(model_yaml: Mapping[str, Any], folder: Path, activation: str = "stock") -> Any:
    path = tiny.write_yaml(folder / "tiny.yaml", model_yaml)
    torch.manual_seed(0)
    model = RTDETR(str(path)) if "RTDETR" in str(model_yaml["head"][-1][2]) else YOLO(str(path))
    if activation != "stock":
        patch_model(model, activation)
    return model


def save(path: Path, model_yaml: Mapping[str, Any], activation: str = "stock") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = make(model_yaml, path.parent, activation)
    model.ckpt = model.ckpt or {}  # None in 8.3
    model.save(path)
    return path


@dataclass(frozen=True)
class Files:
    """Checkpoints of one architecture and of another, and an image of 64 x 48 pixels."""

    stock: Path
    relu: Path
    other: Path
    image: Path

    def __iter__(self) -> Any:
        return iter((str(self.stock), str(self.relu)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Files:
    folder = tmp_path_factory.mktemp("maps")
    image = folder / "photo.png"
    Image.open(data.image).crop((0, 0, 64, 48)).save(image)
    return Files(
        save(folder / "stock" / "weights" / "best.pt", tiny.yolo()),
        save(folder / "run" / "weights" / "best.pt", tiny.yolo(), "relu"),
        save(folder / "rtdetr.pt", tiny.RTDETR),
        image,
    )


# --- what is captured -----------------------------------------------------------------------------------------------


def test_a_capture_is_what_a_plain_forward_pass_has_there(tmp_path: Path) -> None:
    """At each Conv of a YOLO: the output of its BatchNorm, and SiLU of it, which works in place."""
    model = make(tiny.yolo(), tmp_path).model.train()
    expected = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "act", None), nn.SiLU):
            module.act = nn.SiLU(inplace=True)
            keep = lambda _, __, y, name=name: expected.update({f"{name}.act": y.clone()})  # noqa: E731
            module.bn.register_forward_hook(keep)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(IMAGE)
        model.train()
        plain = dict(expected)
        captures = capture_activations(model, IMAGE, find_sites(model))
    assert set(captures) == set(plain) and len(plain) > 8
    for name, capture in captures.items():
        assert torch.equal(capture.before, plain[name][0]) and torch.equal(capture.after, F.silu(plain[name][0]))
        assert capture.calls == 1
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(model.model[0].act, nn.SiLU)


class Overwrite(nn.Module):
    """An activation in place, whose result the block overwrites in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x).mul_(3.0)


class Twice(nn.Module):
    """A functional call, and one activation for two maps of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.other = nn.SiLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        small = F.max_pool2d(F.relu(x), 2)
        for each in (x, small):
            y = self.act(each)
        return y if y.shape[0] else self.other(y)


def test_neither_side_is_spoilt_by_what_happens_later() -> None:
    x = IMAGE - 0.5
    net = Overwrite()
    capture = capture_activations(net, x.clone(), find_sites(net))["act"]
    assert torch.equal(capture.before, x[0]) and torch.equal(capture.after, x[0].clamp(min=0))


def test_functional_calls_are_seen_and_of_several_calls_the_first() -> None:
    x, net = IMAGE - 0.5, Twice()
    sites = find_sites(net)
    captures = capture_activations(net, x, sites)
    (functional,) = set(captures) - {"act"}
    assert torch.equal(captures[functional].after, x[0].clamp(min=0))
    assert captures["act"].calls == 2 and torch.equal(captures["act"].before, x[0])
    assert "other" in {site.name for site in sites} and type(net) is Twice
    assert capture_activations(net, x.flatten(2), sites) == {}  # not maps


def test_what_is_counted() -> None:
    values = torch.tensor([[-2.0, 0.0, 0.0], [1.5, -0.0, 4.0]])
    found = summarise_values(F.relu(values))
    assert found.zeros == 4 / 6 and found.negative == 0 and (found.minimum, found.maximum) == (0, 4)
    assert found.mean == pytest.approx(5.5 / 6) and found.std == pytest.approx(float(np.std([0, 0, 0, 1.5, 0, 4])))
    before = summarise_values(values)
    assert before.zeros == 0.5 and before.negative == 1 / 6 and before.minimum == -2


def capture_of(after: Tensor) -> Capture:
    (site,) = find_sites(nn.Sequential(nn.ReLU()))
    return Capture(site, after - 1, after, 1)


def test_channels_are_chosen_by_how_far_their_output_differs_between_positions() -> None:
    after = torch.zeros(5, 2, 2)
    after[1] = 7.0  # large, and everywhere the same
    after[3, 0, 0], after[4, 0, 0] = 1.0, 2.0
    capture = capture_of(after)
    assert capture.choose_channels(3) == (4, 3, 0) and capture.choose_channels(8) == (4, 3, 0, 1, 2)
    assert capture.dead == 2 / 5


# --- what is chosen -------------------------------------------------------------------------------------------------


def names_of(chosen: tuple[list[Any], list[str]]) -> list[str]:
    return [site.name for site in chosen[0]]


def test_sites_are_chosen_by_layers_and_patterns(tmp_path: Path) -> None:
    model = make(tiny.yolo(), tmp_path).model.eval()
    assert names_of(choose_sites(model, IMAGE)) == ["model.1.act", "model.2.cv2.act", "model.3.act"]
    # The last that is called: cv2 comes before the bottleneck in the module, and after it in the network.
    assert names_of(choose_sites(model, IMAGE, layers="2,4")) == ["model.2.cv2.act", "model.4.act"]
    assert names_of(choose_sites(model, IMAGE, layers=3)) == ["model.3.act"]
    assert names_of(choose_sites(model, IMAGE, layers="backbone")) == [
        "model.0.act", "model.1.act", "model.2.cv2.act", "model.3.act", "model.4.act"
    ]  # fmt: skip
    bottleneck = ["model.2.m.0.cv1.act", "model.2.m.0.cv2.act"]
    assert names_of(choose_sites(model, IMAGE, include="*.m.0.*")) == bottleneck
    both = choose_sites(model, IMAGE, layers="2", include=["*.cv2.act", "model.0.*"])
    assert names_of(both) == [bottleneck[1], "model.2.cv2.act"]
    assert names_of(choose_sites(model, IMAGE, preferred={"model.0.act", "model.4.act"})) == [
        "model.0.act", "model.4.act"
    ]  # fmt: skip
    with pytest.raises(SelectionError, match="no activation at layers=77 is called with a feature map"):
        choose_sites(model, IMAGE, layers=77)
    with pytest.raises(SpecError, match="layers are indices"):
        choose_sites(model, IMAGE, layers="2..4")


class Hiding(nn.Module):
    """A functional call whose arguments no plan can write down."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.slope = conv, 0.1

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), self.slope)


def test_what_cannot_be_seen_is_named(tmp_path: Path) -> None:
    model = make(tiny.yolo(), tmp_path).model.eval()
    set_child(model.model, "1", Hiding(model.model[1]))
    chosen = choose_sites(model, IMAGE, layers="0-1")
    assert names_of(chosen) == ["model.0.act", "model.1.conv.act"]
    (left_out,) = chosen[1]
    assert left_out.startswith("leaky_relu in Hiding (test_maps.py:")
    assert choose_sites(model, IMAGE, layers="0")[1] == []
    model.model[2].idle = nn.ReLU()
    assert choose_sites(model, IMAGE, include=["model.2.idle", "model.0.act"])[1] == ["model.2.idle"]


# --- what is drawn --------------------------------------------------------------------------------------------------


def draw(tmp_path: Path, **settings: int) -> tuple[Figure, dict[str, dict[str, Capture]]]:
    captures = {}
    for activation in ("relu", "arelu"):
        model = make(tiny.yolo(), tmp_path, activation).model.eval()
        sites = [site for site in find_sites(model) if site.name in ("model.1.act", "model.3.act")]
        captures[activation] = capture_activations(model, IMAGE, sites)
    return draw_feature_maps(IMAGE[0], captures, "photo.jpg", **settings), captures


def test_the_figure_has_the_maps_the_scale_and_the_counts(tmp_path: Path) -> None:
    figure, captures = draw(tmp_path, channels=4)
    # The image; and for each of two sites two models with two columns of maps and a histogram, and a colour scale.
    assert len(figure.axes) == 1 + 2 * (2 * 3 + 1)
    assert np.array_equal(figure.axes[0].images[0].get_array(), IMAGE[0].permute(1, 2, 0).numpy())
    first = captures["relu"]["model.1.act"]
    maps = [axes for axes in figure.axes if len(axes.images) == 4]
    chosen = list(first.choose_channels(4))
    for axes, side in zip(maps[:2], (first.before, first.after), strict=True):
        for drawn, channel in zip(axes.images, chosen, strict=True):
            assert np.array_equal(drawn.get_array(), side[channel].numpy())
    for block in (maps[:4], maps[4:]):  # the same scale in a block, with 0 in its middle
        (norm,) = {drawn.norm for axes in block for drawn in axes.images}
        assert norm.vmax == -norm.vmin > 0
    share = float((first.after == 0).float().mean())
    histogram = next(axes for axes in figure.axes if axes.get_yscale() == "log")
    negative = float((first.before < 0).float().mean())
    assert [text.get_text() for text in histogram.texts] == [
        f"0.0% zero, {negative:.1%} negative", f"{share:.1%} zero, 0.0% negative"
    ]  # fmt: skip
    assert 0.2 < share < 0.8
    words = [text.get_text() for text in figure.texts]
    assert [words.count(word) for word in ("ReLU", "AReLU", "layer 1: model.1.act", "8 channels of 16 × 16")] == [
        2, 2, 1, 0
    ]  # fmt: skip
    assert words.count("16 channels of 16 × 16") == 1


def test_maps_of_one_value_of_none_and_of_few_channels_are_drawn() -> None:
    spike = torch.zeros(5, 100, 100)
    spike[0, 0, 0] = 3.0
    for after in (torch.full((5, 2, 2), torch.nan), torch.zeros(5, 2, 2), torch.full((5, 2, 2), 1e6), spike):
        figure = draw_feature_maps(IMAGE[0], {"a": {"0": capture_of(after)}}, "photo.jpg", 50)
        figure.canvas.draw()
        assert len(figure.axes) == 5 and len(figure.axes[1].images) == 5
        assert figure.axes[1].images[0].norm.vmax > 0


def test_a_figure_that_is_too_high_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 sites with 8 maps of 2 models are \d inches high, and at 30000 dpi"):
        draw(tmp_path, dpi=30000)


@pytest.mark.parametrize(
    ("count", "shape", "columns"), [(8, 0.75, 4), (8, 1.0, 4), (8, 2.0, 8), (2, 0.25, 2), (1, 0.75, 1), (16, 0.75, 4)]
)
def test_maps_fill_their_place_whatever_their_shape(count: int, shape: float, columns: int) -> None:
    assert _choose_grid(count, shape).columns == columns


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_yaml", [tiny.yolo(), tiny.RTDETR, tiny.yolo("classify")], ids=["yolo", "rtdetr", "cls"])
def test_an_image_is_what_prediction_gives_to_the_network(
    model_yaml: Mapping[str, Any], files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make(model_yaml, tmp_path)
    found = load_image(model, files.image, 90)
    seen: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model.predict(str(files.image), imgsz=96, verbose=False, save=False, device="cpu")
    assert found.shape[0] == 1 and torch.equal(found, seen[-1])


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_checkpoints_are_compared(suffix: str, start: bytes, files: Files, tmp_path: Path) -> None:
    path = tmp_path / f"maps.{suffix}"
    said = run("maps", *files, f"image={files.image}", "layers=1,2", "imgsz=64", "channels=4", "-o", str(path))
    assert path.read_bytes().startswith(start) and f"file: {path}" in said
    lines = [line for line in said.splitlines() if "model.2.cv2.act" in line]
    assert ["SiLU" in line for line in lines] == [True, False] and ["ReLU" in line for line in lines] == [False, True]
    assert said.count("before │") == 4 and "not seen" not in said
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_python_returns_what_the_command_prints(files: Files, tmp_path: Path) -> None:
    shown = []
    found, path = compare_feature_maps(
        [*files, str(files.stock)], files.image, tmp_path / "maps.svg", include="model.[01].act", imgsz=64, dpi=300,
        channels=2, show=shown.append,
    )  # fmt: skip
    assert shown == [found] and path.is_file() and repr(found) == "<FeatureMaps: 2 sites of 2 models>"
    assert (found.height, found.width) == (64, 64)  # 64 x 48, padded to the stride
    assert [(each.site, each.model, each.activation) for each in found.sites] == [
        ("model.0.act", "stock", "SiLU"), ("model.0.act", "run", "ReLU"),
        ("model.1.act", "stock", "SiLU"), ("model.1.act", "run", "ReLU"),
    ]  # fmt: skip
    model = load_model(files.relu)
    (capture,) = capture_activations(
        model.model,
        load_image(model, files.image, 64),
        [site for site in find_sites(model) if site.name == "model.1.act"],
    ).values()
    last = found.sites[-1]
    assert last.after == summarise_values(capture.after) and last.drawn == capture.choose_channels(2)
    assert last.after.zeros == float((capture.after == 0).double().mean()) > 0
    assert (last.channels, last.height, last.width, last.layer, last.dead) == (16, 16, 16, 1, capture.dead)
    assert json.loads(json.dumps(found.to_dict()))["sites"][3]["after"]["zeros"] == last.after.zeros


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("{stock} image=nowhere.jpg", "there is no image 'nowhere.jpg'"),
        ("{stock} image={text}", "is not an image that can be read"),
        ("{stock} image={empty}", "is not an image that can be read"),
        ("{stock} image={image} layers=77", "no activation at layers=77 is called"),
        ("{stock} image={image} include=model.77.*", "no activation at include="),
        ("{stock} image={image} layers=two", "'two' is not a section: use backbone"),
        ("{stock} {other} image={image}", "'rtdetr' has no activation model.1.act, model.2.cv2.act and"),
        ("{stock} {other} image={image} layers=0", "'rtdetr' has no activation model.0.act, which 'stock' has"),
        ("{stock} image={image} -o {folder}/nowhere/x.png", "there is no folder"),
        ("{stock} image={image} -o {folder}/x.jpg", "ending must be one of"),
        ("{stock} image={image} -o {image}", "the figure would overwrite the image"),
        ("{stock} image={image} dpi=0", "dpi is an integer from 1"),
        ("{stock} image={image} channels=0", "invalid value for '--channels'"),
        ("{stock} image={image} device=cuda:77", "device 'cuda:77' cannot be used"),
        ("{stock} nowhere.pt image={image}", "there is no file 'nowhere.pt'"),
        ("rtdetr-n.yaml image={image}", "'rtdetr-n.yaml' is not a checkpoint: give a .pt file"),
        ("{stock}", "maps needs an image: rtdetr-act maps"),
        ("image={image}", "maps needs a checkpoint: rtdetr-act maps"),
        ("{stock} image={image} act=relu", "maps has no option 'act'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    words: str, sentence: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    before = sorted(tmp_path.rglob("*"))
    places = {"stock": files.stock, "other": files.other, "image": files.image, "folder": tmp_path}
    places |= {"text": tmp_path / "text.jpg", "empty": tmp_path / "empty.jpg"}
    with pytest.raises(RtdetrActError) as caught:
        run("maps", *(word.format(**places) for word in words.split(" ")))
    assert sentence in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and Image.open(files.image).size == (64, 48)
