"""The files that other tools read: the citation, and the templates of issues."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from rtdetr_act import __version__
from rtdetr_act.cli.main import app

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == "AGPL-3.0-only"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_a_form_and_names_commands_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    form = yaml.safe_load(text)
    if path.stem != "config":
        ids = [item["id"] for item in form["body"]]
        assert form["name"] and form["description"] and len(set(ids)) == len(ids)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"rtdetr-act (\w+)", text)) <= commands.keys()
