"""The example of an activation outside the package does, through its entry point, all that ours do."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny

from rtdetr_act.activations.registry import GROUP

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "example_activation"
# One process, since each takes seconds to start. Prints a line of JSON behind what the commands print.
_CODE = """
import json, sys
from pathlib import Path

import numpy as np
import torch

from rtdetr_act.activations.registry import find_entry, names
from rtdetr_act.cli.main import app
from rtdetr_act.surgery.sites import find_sites
from rtdetr_act.testing import check_activation

model_yaml, data = sys.argv[1:]

def run(*words):
    app([*words], standalone_mode=False)

check_activation("scaled_relu", lambda x, state, axis: np.exp(state["log_scale"]) * np.maximum(x, 0))
run("train", "--act", "scaled_relu", "--init", "match", "--model", model_yaml, "--data", data, "epochs=1", "imgsz=64",
    "batch=4", "workers=0", "plots=False", "name=run")
best = "runs/detect/run/weights/best.pt"
trained = torch.load(best, weights_only=False)["model"]
scales = [float(m.log_scale.exp()) for m in trained.modules() if type(m).__name__ == "ScaledReLU"]
run("learned", best, "-o", "learned.png")
run("fold", best)
folded = torch.load("runs/detect/run/weights/best-folded.pt", weights_only=False)["model"]
run("export", best, "format=onnx", "imgsz=64")
run("bench", "--act", "scaled_relu", "--model", model_yaml, "imgsz=64", "batch=2", "--turns", "2")
print(json.dumps({
    "scales": scales,
    "sites": [site.current for site in find_sites(folded)],
    "history": Path("runs/detect/run/activations.csv").read_text().splitlines()[:2],
    "files": [Path(name).is_file() for name in ("learned.png", "runs/detect/run/weights/best.onnx")],
    "bench": Path("runs/bench/stock.json").read_text(),
}))
"""


@pytest.mark.integration
def test_one_file_trains_matches_folds_exports_is_recorded_and_benchmarked(data, stock_yaml, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    _install(tmp_path)
    path = os.pathsep.join(map(str, (FOLDER, tmp_path, ROOT)))
    done = tiny.run_python(_CODE, tmp_path, stock_yaml, data.detect, PYTHONPATH=path, MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["scales"]) == tiny.CONV_SITES
    # Fitted to ReLU, and to SiLU, whose slope is 0.5 for the small inputs of an untrained network and 1 for large ones;
    # then trained.
    assert 0.49 < min(found["scales"]) < max(found["scales"]) < 1.1 and len(set(found["scales"])) > 2
    assert set(found["sites"]) & {"relu", "scaled_relu"} == {"relu"}
    assert re.search(r"^0,.*,scaled_relu,scale,", found["history"][1])
    assert found["files"] == [True, True]
    assert "scaled_relu" in found["bench"]


def _install(folder: Path) -> None:
    """Write what pip would write for the example: its entry point."""
    group, points = _read_entry_points(FOLDER)
    info = folder / "scaled_relu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scaled-relu\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + points.replace('"', ""))


def _read_entry_points(folder: Path) -> tuple[str, str]:
    """Return the group of a project's entry points and their lines."""
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    pattern = r'^\[project\.entry-points\."([\w.]+)"\]\n((?:\w+ = "[\w.:]+"\n)+)'
    group, points = re.search(pattern, text, re.MULTILINE).groups()
    return group, points


def test_classes_of_a_package_that_knows_nothing_of_us_are_named() -> None:
    group, points = _read_entry_points(FOLDER.with_name("example_third_party"))
    assert group == GROUP
    found = re.findall(r'^(\w+) = "torch_activation:(\w+)"$', points, re.MULTILINE)
    assert [name for name, _ in found] == [cls.lower() for _, cls in found] == ["shilu", "phish"]
    if find_spec("torch_activation"):
        assert all(isinstance(getattr(import_module("torch_activation"), cls), type) for _, cls in found)


@pytest.mark.integration
def test_its_kernels_run_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import torch, scaled_relu as example\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    x = torch.randn(2, 3, 40, 20).to(dtype).requires_grad_()\n"
        "    scale = torch.tensor([1.7], requires_grad=True)\n"
        "    y = example.scaled_relu(x, scale)\n"
        "    found = torch.autograd.grad(y.float().square().sum(), [x, scale])\n"
        "    plain = torch.relu(x.double()) * scale.double()\n"
        "    expected = torch.autograd.grad(plain.square().sum(), [x, scale])\n"
        "    for one, other in zip((y, *found), (plain, *expected)):\n"
        "        torch.testing.assert_close(one.double(), other.double(), rtol=2e-3, atol=2e-3)\n"
        "print('right')\n"
    )
    done = tiny.run_python(code, tmp_path, PYTHONPATH=os.pathsep.join(map(str, (FOLDER, ROOT))), TRITON_INTERPRET="1")
    assert done.stdout.strip() == "right"
