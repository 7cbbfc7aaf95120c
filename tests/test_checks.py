"""What is installed, as `rtdetr-act checks` lists it."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import ultralytics
from torch import nn
from typer.testing import CliRunner
from ultralytics.nn import tasks
from ultralytics.nn.modules.conv import Conv
from ultralytics.utils import SETTINGS

from rtdetr_act import __version__
from rtdetr_act.cli.main import app
from rtdetr_act.integrations.ultralytics.hooks import list_hooks
from rtdetr_act.integrations.ultralytics.releases import describe_release, read_verified_releases
from rtdetr_act.workflows.checks import collect_checks

ROOT = Path(__file__).parents[1]


def test_it_lists_what_is_here() -> None:
    found = collect_checks()
    assert found["rtdetr-act"] == __version__ and found["Python"] == platform.python_version()
    assert found["Ultralytics"].startswith(f"{ultralytics.__version__}, ")
    assert found["torch"].startswith(f"{torch.__version__}, built for ")
    for name in ("torchvision", "numpy", "typer"):
        assert f"{name} {metadata.version(name)}" in found["packages"]
    assert found["hooks"] == f"{len(list_hooks())} of {len(list_hooks())} in place" and len(list_hooks()) > 15
    assert "torchscript" in found["exports to"].split(", ")
    assert found["GPU"] == "none" or torch.cuda.is_available() or torch.backends.mps.is_available()


def test_it_prints_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["checks"], catch_exceptions=False)
    lines = [line.partition(":")[0] for line in result.output.splitlines()]
    assert result.exit_code == 0 and lines == list(collect_checks()) and not list(tmp_path.iterdir())


def test_a_hook_that_was_taken_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "parse_model", tasks.parse_model.__wrapped__)
    count = len(list_hooks())
    assert collect_checks()["hooks"] == f"{count - 1} of {count} in place, not ultralytics.nn.tasks.parse_model"


def test_an_edit_of_conv_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv, "default_act", nn.ReLU())
    assert "Conv.default_act is ReLU()" in collect_checks()["Ultralytics"]


def test_plugins_are_named_with_their_package_or_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "many_acts.py").write_text("from torch import nn\nclass Mine(nn.ReLU): pass\n", encoding="utf-8")
    folder = tmp_path / "many_acts-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: many-acts\nVersion: 1.2\n", encoding="utf-8")
    points = "[rtdetr_act.activations]\nmine = many_acts:Mine\ngone = many_acts:Gone\n"
    (folder / "entry_points.txt").write_text(points, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = collect_checks()["plugins"]
    assert "mine (many-acts 1.2)" in found and "gone (left out: AttributeError" in found


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = collect_checks()
    assert "openvino (openvino)" in found["does not export to"]
    assert "openvino" not in found["exports to"].split(", ")


def test_trackers_are_on_or_off_as_in_the_settings() -> None:
    pytest.importorskip("tensorboard")
    before = SETTINGS["tensorboard"]
    try:
        for value, word in ((True, "on"), (False, "off")):
            dict.__setitem__(SETTINGS, "tensorboard", value)  # not in the file
            assert f"tensorboard {word}" in collect_checks()["trackers"]
    finally:
        dict.__setitem__(SETTINGS, "tensorboard", before)


def test_verified_releases_are_those_of_the_record() -> None:
    found = read_verified_releases()
    assert {"8.3.0", "8.4.190"} <= set(found) and found["8.3.20"] == "numpy<2.4" and found["8.4.190"] == ""
    assert next(iter(found)) == "8.3.0", "the oldest first"
    assert describe_release("8.4.190") == "verified"
    assert describe_release("8.3.20") == "verified, needs numpy<2.4"
    assert describe_release("8.4.45") == "not verified, unlike 8.4.30 and 8.4.60"
    assert describe_release("9.0.0").startswith("newer than the newest that was verified: ")
    assert describe_release("8.2.103") == "older than the oldest that rtdetr-act supports: 8.3.0"


def test_the_record_is_in_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"docs/compatibility.md" = "rtdetr_act/integrations/ultralytics/compatibility.md"' in text
