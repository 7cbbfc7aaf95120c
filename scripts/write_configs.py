"""Write configs/: every shipped model in every variant, its activations named row by row.

Run it after a change to configs/rtdetr-n.yaml or to the list below; a test holds the files against it. The
architectures other than rtdetr-n are those of the installed Ultralytics, read as data.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ultralytics.nn import tasks

from rtdetr_act.integrations.ultralytics.configs import configs_folder
from rtdetr_act.surgery.sites import find_sites

# name here -> (name to load, what to call it, how to train it)
MODELS = {
    "rtdetr-n": ("rtdetr-n.yaml", "the nano RT-DETR of rtdetr-n.yaml", "rtdetr-n-{variant}.yaml"),
    "rtdetr-l": ("rtdetr-l.yaml", "Ultralytics' RT-DETR-L", "rtdetr-l-{variant}.yaml"),
    "rtdetr-x": ("rtdetr-x.yaml", "Ultralytics' RT-DETR-X", "rtdetr-x-{variant}.yaml"),
    "rtdetr-resnet50": ("rtdetr-resnet50.yaml", "Ultralytics' RT-DETR-ResNet50", "rtdetr-resnet50-{variant}.yaml"),
    "yolo11": ("yolo11n.yaml", "Ultralytics' YOLO11", "yolo11n-{variant}.yaml"),
}
# variant -> section -> activation; what it means for the reader
UNIFORM = "{act} at every convolutional site; transformer layers (AIFI, decoder) keep their own."
VARIANTS: dict[str, dict[str, str]] = {
    act: dict.fromkeys(("backbone", "neck", "head"), act) for act in ("arelu", "dyrelu_b", "mish", "hardswish")
}
VARIANTS["mixed"] = {"backbone": "dyrelu_b", "neck": "dyrelu_c", "head": "silu"}
MIXED = (
    "dyrelu_b in the backbone, dyrelu_c in the neck, silu elsewhere: the paper finds that B suits\n"
    "# backbones and C suits heads that look at places. Both work on maps only, so token layers get silu."
)


def write(folder: Path) -> list[Path]:
    """Write every YAML into `folder` and return the paths."""
    paths = []
    for name in MODELS:
        for variant in VARIANTS:
            path = folder / f"{name}-{variant}.yaml"
            path.write_text(compose(name, variant), encoding="utf-8")
            paths.append(path)
    return paths


def compose(name: str, variant: str) -> str:
    """Return the text of one model in one variant."""
    source, title, usage = MODELS[name]
    model_yaml = tasks.yaml_model_load(source)
    sites = find_sites(_build(model_yaml))
    maps, tokens = ({site.layer: site for site in sites if site.layout == layout} for layout in ("map", "tokens"))
    meaning = MIXED if variant == "mixed" else UNIFORM.format(act=variant)
    lines = [
        f"# {title} with {meaning}",
        f"# rtdetr-act train --model {usage.format(variant=variant)} --data coco8.yaml",
        "",
    ]
    lines.append(f"nc: {model_yaml['nc']} # number of classes; training takes the data set's")
    if scales := model_yaml.get("scales"):
        lines.append("scales: # depth, width, most channels")
        lines += [f"  {scale}: {_flow(values)}" for scale, values in scales.items()]
    index = 0
    for part in ("backbone", "head"):
        lines += ["", f"{part}:", *(["  # [from, repeats, module, args, activation]"] if part == "backbone" else [])]
        for row in model_yaml[part]:
            site = maps.get(index) or (tokens.get(index) if variant == "mixed" else None)
            act = "" if site is None else "silu" if site.layout == "tokens" else VARIANTS[variant][site.section]
            lines.append(f"  - {_flow([*row, act] if act else row)} # {index}")
            index += 1
    return "\n".join(lines) + "\n"


def _build(model_yaml: dict[str, Any]) -> Any:
    last = model_yaml["head"][-1][2]
    kind = {"RTDETRDecoder": tasks.RTDETRDetectionModel}.get(last, tasks.DetectionModel)
    return kind(dict(model_yaml), verbose=False)


def _flow(value: Any) -> str:
    """Write a value as flow YAML the way Ultralytics' files look, `None` and bare module names included."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f'"{value}"' if value == "nearest" else str(value)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else configs_folder()
    print("\n".join(map(str, write(target))))
