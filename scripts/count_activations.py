"""Count the activations that run in models of many libraries, and how many of them a swap reaches.

For each model: what runs in a forward pass, what `patch_model` swaps with the default scope and with scope="all", what
is left there, and what is reported as not reached. A sum that is wrong, or a difference to a count of operators that
shares no code with the package, is a failure.

    python scripts/count_activations.py --yolov5 ../yolov5 --yolov7 ../yolov7 --rtdetr ../RT-DETR --dfine ../D-FINE

Models of packages that are not installed, and of checkouts that are not given, are left out and named.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtdetr_act import SelectionError, patch_model, unpatch_model
from rtdetr_act.surgery.coverage import Coverage
from rtdetr_act.tables import align_columns

ULTRALYTICS = (
    "rtdetr-l.yaml", "rtdetr-resnet50.yaml", "yolov8n.yaml", "yolov9t.yaml", "yolov10n.yaml", "yolo11n.yaml",
    "yolo12n.yaml", "yolo26n.yaml", "yolo11n-seg.yaml", "yolov8s-worldv2.yaml",
)  # fmt: skip
TORCHVISION = (
    "resnet50", "densenet121", "googlenet", "inception_v3", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf",
    "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vit_b_16", "maxvit_t", "convnext_tiny", "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large", "r3d_18",
)  # fmt: skip
TIMM = (
    "nfnet_l0", "convnextv2_atto", "tf_efficientnet_b0", "mobilenetv4_conv_small", "hrnet_w18_small", "repvgg_a0",
    "ghostnet_100", "mobilevit_xxs", "coatnet_pico_rw_224", "res2net50_26w_4s", "dla34", "levit_128s", "fastvit_t8",
    "efficientvit_b0", "botnet26t_256", "skresnet18",
)  # fmt: skip
TRANSFORMERS = (
    "RTDetrForObjectDetection", "RTDetrV2ForObjectDetection", "DFineForObjectDetection", "DetrForObjectDetection",
    "DeformableDetrForObjectDetection", "ConditionalDetrForObjectDetection", "YolosForObjectDetection",
    "SegformerForImageClassification", "MobileNetV2ForImageClassification",
)  # fmt: skip
CHECKOUTS = {
    "yolov5": ("models/yolov5n.yaml", "models/hub/yolov5-bifpn.yaml"),
    "yolov7": ("cfg/training/yolov7-tiny.yaml", "cfg/training/yolov7.yaml"),
    "rtdetr": ("configs/rtdetrv2/rtdetrv2_r18vd_120e_coco.yml", "configs/rtdetrv2/rtdetrv2_r50vd_6x_coco.yml"),
    "dfine": ("configs/dfine/dfine_hgnetv2_n_coco.yml", "configs/dfine/dfine_hgnetv2_l_coco.yml"),
}
_OPERATORS = (
    "relu", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "mish", "elu", "tanh", "softplus", "prelu",
)  # fmt: skip


def build_ultralytics(name: str) -> nn.Module:
    """Build a model of Ultralytics."""
    from ultralytics import RTDETR, YOLO

    return (RTDETR if name.startswith("rtdetr") else YOLO)(name).model


def build_torchvision(name: str) -> nn.Module:
    """Build a model of torchvision without pretrained weights."""
    from torchvision.models import get_model

    more: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        more = {"init_weights": False}
    if "fpn" in name or "ssd" in name:
        more = {"weights_backbone": None}
    model: nn.Module = get_model(name, weights=None, **more)
    return model


def build_timm(name: str) -> nn.Module:
    """Build a model of timm."""
    model: nn.Module = import_module("timm").create_model(name)
    return model


def build_transformers(name: str) -> nn.Module:
    """Build a model of transformers with the default configuration."""
    cls = getattr(import_module("transformers"), name)
    model: nn.Module = cls(cls.config_class())
    return model


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Import and read files as a script in a folder does, and forget its modules afterwards."""
    before, where = set(sys.modules), Path.cwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(where)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")) or name.startswith(
                ("src", "models", "utils")
            ):
                del sys.modules[name]


def build_from_checkout(kind: str, folder: Path) -> Callable[[str], nn.Module]:
    """Return a function that builds a model of a repository from its configuration."""

    def build(config: str) -> nn.Module:
        with inside(folder):
            if kind.startswith("yolo"):
                return import_module("models.yolo").Model(config)
            no_weights = {"pretrained": False}
            built = import_module("src.core").YAMLConfig(config, PResNet=no_weights, HGNetv2=no_weights)
            return built.model

    return build


class Tally(TorchDispatchMode):
    """Count operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator."""
        self.counts[func._schema.name.removeprefix("aten::").strip("_").removesuffix("_kernel")] += 1
        return func(*args, **(kwargs or {}))


def tally(model: nn.Module, x: torch.Tensor) -> int | None:
    """Return how often activation operators run, gates included, or None if the model does not take such an image."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), Tally() as found:
            model.eval()(x)
    except Exception:  # it is counted by the package alone, on an image of another size
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        model.train()
    return sum(found.counts[name] for name in _OPERATORS)


def list_models(arguments: argparse.Namespace) -> tuple[list[tuple[str, str, Callable[[str], nn.Module]]], list[str]]:
    """Return (library, name, builder) of the models, and what is left out."""
    models: list[tuple[str, str, Callable[[str], nn.Module]]] = []
    left = []
    packages: tuple[tuple[str, tuple[str, ...], Callable[[str], nn.Module]], ...] = (
        ("ultralytics", ULTRALYTICS, build_ultralytics),
        ("torchvision", TORCHVISION, build_torchvision),
        ("timm", TIMM, build_timm),
        ("transformers", TRANSFORMERS, build_transformers),
    )
    for package, names, build in packages:
        if importlib.util.find_spec(package):
            models += [(package, name, build) for name in names]
        else:
            left.append(f"{package} is not installed")
    for kind, configs in CHECKOUTS.items():
        folder = getattr(arguments, kind)
        if folder is None:
            left.append(f"--{kind} is not given")
            continue
        root = folder / "rtdetrv2_pytorch" if kind == "rtdetr" else folder
        models += [(kind, config, build_from_checkout(kind, root.resolve())) for config in configs]
    return models, left


def count(library: str, name: str, build: Callable[[str], nn.Module]) -> tuple[list[str], list[str]]:
    """Return the row of a model, and its failures."""
    model = build(name)
    x = torch.zeros(1, 3, 640, 640) if library in ("rtdetr", "dfine") else None
    image = torch.zeros(1, 3, 16, 64, 64) if name == "r3d_18" else torch.zeros(1, 3, 224, 224) if x is None else x
    expected = tally(model, image)
    try:
        default = patch_model(model, "mish", example_input=x).coverage.swapped
    except SelectionError:  # it has transformer sites only
        default = 0
    unpatch_model(model)
    found: Coverage = patch_model(model, "mish", scope="all", example_input=x).coverage
    missed = sum(each.count for each in found.unreached)
    failures = []
    if found.running != found.swapped + sum(found.left.values()) + missed or found.differences:
        failures.append(f"{name}: the sum is wrong: {found}")
    # The independent count has gates too, and knows no activation of several operators.
    gates = "" if expected is None else str(expected - found.running)
    row = [library, Path(name).stem, str(found.running), str(default), str(found.swapped), str(missed), gates]
    print("\t".join(row), *(f"\n    {each!r}" for each in found.unreached), flush=True)
    return row, failures


def main() -> int:
    """Print the table, write it as CSV if asked to, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in CHECKOUTS:
        parser.add_argument(f"--{kind}", type=Path, help="folder of a checkout")
    parser.add_argument("--csv", type=Path, help="file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [["library", "model", "running", "swapped", "scope=all", "not reached", "gates"]]
    failures = []
    models, left = list_models(arguments)
    for library, name, build in models:
        try:
            row, wrong = count(library, name, build)
        except Exception as error:
            wrong = [f"{library} {name}: {type(error).__name__}: {error}"]
        else:
            rows.append(row)
        failures += wrong
    print("\n".join(align_columns(rows)))
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    for each in left:
        print(f"left out: {each}")
    for each in failures:
        print(f"FAILED {each}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
