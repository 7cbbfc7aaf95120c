"""Recognition by behaviour: what somebody's module computes decides, and what a user says of it comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act import SelectionError, SpecError, find_sites, patch_model, unpatch_model
from rtdetr_act.surgery.plan import Plan
from rtdetr_act.surgery.recognition import computes_activation


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Gamma(nn.Module):
    """A scaled activation of normalizer-free networks."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.function = 1.7, F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.gamma


class HardSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardtanh(x + 3, 0.0, 6.0) / 6.0


class Leaky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, 0.1 * x)


class Wrapped(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x + 1


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(len(x), 1, 1, 1).round() if self.training else x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.randn_like(x)).abs()


class OwnSigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1).abs()


class Concatenate(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).abs()


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).square()


class Parametric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


@pytest.mark.parametrize("cls", [Swish, Gamma, HardSwish, Leaky, Square])
def test_an_activation_is_known_by_what_it_computes(cls: type[nn.Module]) -> None:
    assert computes_activation(cls())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), cls())
    (site,) = find_sites(model)
    assert (site.name, site.current, site.channels) == ("1", cls.__name__, 4)
    before = model[1]
    assert len(patch_model(model, "arelu")) == 1
    unpatch_model(model)
    assert model[1] is before


def test_a_subclass_of_an_activation_of_torch_is_one() -> None:
    assert len(find_sites(nn.Sequential(nn.Conv2d(3, 4, 1), Wrapped()))) == 1


@pytest.mark.parametrize(
    "cls", [Scale, DropPath, Noise, OwnSigmoid, Normalise, Flip, Concatenate, Add, nn.Identity, nn.Dropout, Parametric]
)
def test_others_are_not(cls: type[nn.Module]) -> None:
    module = cls()
    state = torch.random.get_rng_state()
    assert not computes_activation(module) and module.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert find_sites(nn.Sequential(nn.Conv2d(3, 4, 1), cls())) == []


def test_hooks_do_not_see_the_evaluation() -> None:
    module = Swish()
    seen: list[object] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    assert computes_activation(module) and not seen


class GatedBlock(nn.Module):
    """SwiGLU with modules, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act_fn = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 3, 1),
            nn.SiLU(),
        )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.down(self.act_fn(self.gate(x)) * self.up(x)))


class LinearAttention(nn.Module):
    """Attention with a kernel function in place of the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.kernel, self.out = nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        q, k = self.kernel(q), self.kernel(k)
        y = q @ (k.transpose(-1, -2) @ v)
        return self.out(y.transpose(1, 2).reshape(len(x), 8, *x.shape[2:]))


class SqueezeExcitation(nn.Module):
    """An activation whose result is multiplied with a gate computed from it is not a gate itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.SiLU()
        self.squeeze, self.inner, self.excite = nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        gate = self.excite(self.inner(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return y * gate


class WeightedSum(nn.Module):
    """The ReLU of weights in a BiFPN: it maps a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.relu, self.act, self.conv = (
            nn.Parameter(torch.ones(2)),
            nn.ReLU(),
            nn.SiLU(),
            nn.Conv2d(3, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        w = self.relu(self.weights)
        y = self.act(self.conv(x))
        return w[0] * y + w[1] * x


@pytest.mark.parametrize(
    ("cls", "names"),
    [(GatedBlock, ["act"]), (LinearAttention, []), (SqueezeExcitation, ["act", "inner"]), (WeightedSum, ["act"])],
)
def test_gates_are_known_by_what_is_done_with_their_results(cls: type[nn.Module], names: list[str]) -> None:
    assert [site.name for site in find_sites(cls())] == names


def test_activations_on_pooled_maps_are_a_layout_of_their_own() -> None:
    model = SqueezeExcitation()
    assert {site.name: site.layout for site in find_sites(model)} == {"act": "map", "inner": "pooled"}
    report = patch_model(model, "dyrelu_b")
    assert (report.sites, report.pooled) == (["act"], ("inner",)) and "1 site on maps pooled" in str(report)
    for activation in ("dyrelu_a", "dyrelu_b", "dyrelu_c", "frelu", "meta_aconc"):
        with pytest.raises(SelectionError, match=r"makes no sense on maps pooled .* inner"):
            patch_model(model, activation, scope="all")
    assert patch_model(model, "arelu", scope="all").sites == ["act", "inner"]


def test_a_small_image_is_not_taken_for_a_pooled_map() -> None:
    convs = [nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU()) for _ in range(4)]
    sites = find_sites(nn.Sequential(*convs), example_input=torch.zeros(1, 3, 16, 16))
    assert [site.layout for site in sites] == ["map"] * 4


def test_squeeze_and_excitation_in_an_ultralytics_model_is_known_without_a_forward_pass() -> None:
    from torchvision.ops import SqueezeExcitation as Block
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    model = DetectionModel(yaml_model_load("yolo11n.yaml"), verbose=False)
    model.model[4].add_module("se", Block(model.model[4].cv2.conv.out_channels, 8))
    layouts = {site.name: site.layout for site in find_sites(model)}
    assert layouts["model.4.se.activation"] == "pooled"
    assert sum(layout == "pooled" for layout in layouts.values()) == 1


def test_users_can_say_otherwise() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sigmoid = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.sigmoid(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert [site.name for site in find_sites(model)] == ["3"]
    assert [site.name for site in find_sites(model, treat_as={Own: "activation"})] == ["1", "3"]
    assert [site.name for site in find_sites(model, treat_as={"Own": "activation", nn.ReLU: "other"})] == ["1"]
    report = patch_model(model, "mish", treat_as={"Own": "activation", "ReLU": "other"})
    assert report.sites == ["1"] and dict(report.plan.treat_as) == {"Own": "activation", "ReLU": "other"}
    assert Plan.from_yaml(report.plan.to_yaml()) == Plan.from_yaml(report.plan.to_model_yaml()) == report.plan
    gated = GatedBlock()
    assert patch_model(gated, "mish", treat_as={"SiLU": "activation"}).sites == ["act_fn", "act"]


@pytest.mark.parametrize("wrong", [{"Own": "gate"}, {3: "activation"}, "Own", {"Own": ["activation"]}])
def test_a_wrong_treat_as_is_refused(wrong: object) -> None:
    with pytest.raises(SpecError, match="treat_as="):
        find_sites(nn.Sequential(nn.ReLU()), treat_as=wrong)  # type: ignore[arg-type]


def test_an_ultralytics_model_keeps_what_the_user_said_when_it_is_rebuilt() -> None:
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", verbose=False)
    report = patch_model(model, "mish", include="model.0.*", treat_as={"Upsample": "other"})
    assert report.sites == ["model.0.act"]
    rebuilt = DetectionModel(model.yaml, verbose=False)
    assert rebuilt.yaml == model.yaml and type(rebuilt.model[0].act) is nn.Mish


def test_a_model_without_sites_says_what_it_has() -> None:
    with pytest.raises(SelectionError, match=r"no activation site; its modules without parameters are Scale \(2\)"):
        patch_model(nn.Sequential(nn.Conv2d(3, 4, 1), Scale(), Scale()), "arelu")


class Keeping(nn.Module):
    """Keeps its input, as modules for visualisation do."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return F.relu(x)


def test_a_module_is_left_as_it_is_by_the_evaluation() -> None:
    module = Keeping()
    assert computes_activation(module) and not hasattr(module, "last") and module.training


@pytest.mark.integration
def test_a_package_says_what_its_classes_are(tmp_path: Path) -> None:
    (tmp_path / "layers_of_mine.py").write_text(
        "from torch import nn\n"
        "class Clip(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.clamp(-1, 1)\n"
        'TREAT_AS = {"layers_of_mine.Clip": "other"}\n'
        'WRONG = {"layers_of_mine.Clip": "perhaps"}\n'
    )
    info = tmp_path / "layers_of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: layers-of-mine\nVersion: 1.0\n")
    code = (
        "import warnings; warnings.simplefilter('always')\n"
        "from layers_of_mine import Clip\n"
        "from torch import nn\n"
        "from rtdetr_act import find_sites\n"
        "print(len(find_sites(nn.Sequential(nn.Conv2d(3, 4, 1), Clip()))))\n"
    )
    for name, count, warned in (("TREAT_AS", "0", False), ("WRONG", "1", True)):
        (info / "entry_points.txt").write_text(f"[rtdetr_act.treat_as]\nmine = layers_of_mine:{name}\n")
        folders = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": folders}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == count
        assert ("of rtdetr_act.treat_as was left out: treat_as= says" in done.stderr) is warned
