"""Write configs/: every shipped model in every variant.

A uniform variant is the stock model YAML and one line, `activation:`. The variant "mixed" names an activation per row.
Run this after a change to configs/rtdetr-n.yaml or to the tables below; a test holds the files against it. The
architectures other than rtdetr-n are those of the installed Ultralytics, read as data.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.nn import tasks

from rtdetr_act.integrations.ultralytics.configs import configs_folder
from rtdetr_act.surgery.sites import find_sites


@dataclass(frozen=True)
class Model:
    """A shipped model.

    Attributes:
        title: What it is called.
        source: The stock model YAML.
        scale: A letter that its file name takes in a command; "" if it has one scale only.
        tokens: Whether it has transformer layers whose inputs are tokens.
        since: The first release of Ultralytics that can build it; "" if all can.
    """

    title: str
    source: str
    scale: str = ""
    tokens: bool = True
    since: str = ""


MODELS = {
    "rtdetr-n": Model("The nano RT-DETR", "rtdetr-n.yaml"),
    "rtdetr-l": Model("Ultralytics' RT-DETR-L", "rtdetr-l.yaml"),
    "rtdetr-x": Model("Ultralytics' RT-DETR-X", "rtdetr-x.yaml"),
    "rtdetr-resnet50": Model("Ultralytics' RT-DETR-ResNet50", "rtdetr-resnet50.yaml"),
    "yolo11": Model("Ultralytics' YOLO11", "yolo11.yaml", scale="n", tokens=False),
    "yolo26": Model("Ultralytics' YOLO26", "yolo26.yaml", scale="n", tokens=False, since="8.4.0"),
}
UNIFORM = ("arelu", "prelu", "leaky_relu", "relu6", "mish", "hardswish", "dyrelu_a", "dyrelu_b", "dyrelu_c")
MIXED = {"backbone": "dyrelu_b", "neck": "dyrelu_c", "head": "silu"}  # and silu for tokens
VARIANTS = (*UNIFORM, "mixed")

_STOPS = "Ultralytics without rtdetr-act stops at that line, since it does not know the name rtdetr_act."
_NOTES = {"nc": "number of classes; training takes the data set's", "scales": "depth, width, most channels"}
_NOT_WRITTEN = ("scale", "yaml_file")  # which come from the name of the file


def write(folder: Path) -> list[Path]:
    """Write every YAML into `folder` and return the paths."""
    paths = []
    for name in MODELS:
        for variant, text in compose(name).items():
            path = folder / f"{name}-{variant}.yaml"
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    return paths


def compose(name: str) -> dict[str, str]:
    """Return the text of every variant of a model."""
    model = MODELS[name]
    model_yaml = tasks.yaml_model_load(model.source)
    texts = {}
    for variant in VARIANTS:
        comment = _describe_mixed(model) if variant == "mixed" else _describe_uniform(model, variant)
        usage = f"rtdetr-act train {name}{model.scale}-{variant}.yaml data=coco8.yaml"
        acts = _place_mixed(model_yaml) if variant == "mixed" else {}
        default = "silu # of rows that name none" if variant == "mixed" else variant
        lines = [*comment, "#", f"#     {usage}", "", f"activation: rtdetr_act.{default}", ""]
        texts[variant] = "\n".join([*lines, *_format_architecture(model_yaml, acts)]) + "\n"
    return texts


def _describe_uniform(model: Model, act: str) -> list[str]:
    """Return the comment of a uniform variant."""
    kept = " Transformer layers (AIFI, decoder) keep their own." if model.tokens else ""
    return _wrap(
        f"{model.title} with {act} at every convolutional site.{kept} Only the line `activation:` differs from "
        f"{model.source}. {_STOPS}{_describe_needs(model)}"
    )


def _describe_mixed(model: Model) -> list[str]:
    """Return the comment of the variant "mixed", which says why each activation stands where it does."""
    if model.tokens:
        rest = (
            "silu in AIFI and the decoder, whose inputs are tokens: Dynamic ReLU would pool over them, and so mix the "
            "decoder's queries for denoising, which hold ground truth, with the others"
        )
    else:
        rest = "silu in the head, as in Ultralytics: the paper says nothing of a detector's"
    return [
        *_wrap(f"{model.title} with an activation named by each row, its fifth item.{_describe_needs(model)}"),
        "#",
        *_wrap(
            "Dynamic ReLU computes its slopes from the image. Its paper (Chen et al., ECCV 2020, arXiv:2003.10027) "
            "finds, for keypoints, that slopes for each channel (B and C) suit the backbone, and slopes for each "
            "position as well (C) the head. Hence"
        ),
        *_wrap("dyrelu_b in the backbone, where it costs less than dyrelu_c;", "# - ", "#   "),
        *_wrap("dyrelu_c in the neck, whose maps say where objects are;", "# - ", "#   "),
        *_wrap(f"{rest}.", "# - ", "#   "),
        "#",
        *_wrap(_STOPS.replace("that line", "the line `activation:`")),
    ]


def _describe_needs(model: Model) -> str:
    """Return a sentence on the release of Ultralytics that a model needs; "" if any will do."""
    return f" Needs Ultralytics {model.since} or newer." if model.since else ""


def _place_mixed(model_yaml: Mapping[str, Any]) -> dict[int, str]:
    """Return the activation of each row in the variant "mixed"."""
    kind = {"RTDETRDecoder": tasks.RTDETRDetectionModel}.get(model_yaml["head"][-1][2], tasks.DetectionModel)
    sites = find_sites(kind(dict(model_yaml), verbose=False))
    acts: dict[int, str] = {}
    for site in sorted(sites, key=lambda site: site.layout == "map"):  # where a row has both, its maps decide
        if site.layer is not None:
            acts[site.layer] = MIXED[site.section] if site.layout == "map" else "silu"
    return acts


def _format_architecture(model_yaml: Mapping[str, Any], acts: Mapping[int, str]) -> list[str]:
    """Return the lines of a model YAML, with the activations of rows by their index."""
    lines = []
    for key, value in model_yaml.items():
        note = f" # {_NOTES[key]}" if key in _NOTES else ""
        if isinstance(value, dict):
            lines += [f"{key}:{note}", *(f"  {name}: {_flow(each)}" for name, each in value.items())]
        elif key not in (*_NOT_WRITTEN, "backbone", "head"):
            lines.append(f"{key}: {_flow(value)}{note}")
    index = 0
    for part in ("backbone", "head"):
        columns = (
            ["  # [from, repeats, module, args" + (", activation]" if acts else "]")] if part == "backbone" else []
        )
        lines += ["", f"{part}:", *columns]
        for row in model_yaml[part]:
            lines.append(f"  - {_flow([*row, acts[index]] if index in acts else row)} # {index}")
            index += 1
    return lines


def _flow(value: Any) -> str:
    """Write a value as flow YAML the way Ultralytics' files look, `None` and bare module names included."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f'"{value}"' if value == "nearest" else str(value)


def _wrap(text: str, first: str = "# ", following: str = "# ") -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=first, subsequent_indent=following, break_on_hyphens=False)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else configs_folder()
    print("\n".join(map(str, write(target))))
