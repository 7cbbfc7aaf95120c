"""CONTRIBUTING.md is followed literally: its files are written, its commands are run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.integration
def test_an_activation_is_added_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TEXT.partition("## Add an activation in ten minutes")[2].partition("\n## ")[0]
    shutil.copytree(ROOT / "rtdetr_act", tmp_path / "rtdetr_act", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    written = re.findall(r"Write `([\w/.]+)`.*?```python\n(.*?)```", recipe, re.DOTALL)
    assert [name for name, _ in written] == ["rtdetr_act/activations/serf.py", "tests/test_serf.py"]
    for name, content in written:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", recipe, re.DOTALL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    printed = ""
    for command in commands.splitlines():
        words = command.split()
        assert words[0] == "python"
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    assert "1 passed" in printed and (tmp_path / "curves.png").is_file() and "serf" in printed.split("passed")[1]


def test_the_rooms_in_the_picture_are_those_that_there_are() -> None:
    picture = TEXT.partition("## The house")[2].partition("```\n")[2].partition("```")[0]
    drawn = set(re.findall(r"(\w+)/", picture)) | set(picture.strip().splitlines()[-1].replace("·", " ").split())
    there = {path.name for path in (ROOT / "rtdetr_act").iterdir() if (path / "__init__.py").is_file()}
    there |= {path.stem for path in (ROOT / "rtdetr_act").glob("*.py")} - {"__init__", "__main__", "testing", "version"}
    assert drawn == there


def test_targets_of_make_that_it_names_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", TEXT)) <= targets
