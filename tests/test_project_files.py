"""The files that other tools read: the citation, and the templates of issues."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import typer
import yaml

from rtdetr_act import __version__
from rtdetr_act.cli.main import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["license"] == "AGPL-3.0-only"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_pictures_and_links_of_the_readme_have_whole_addresses_on_a_package_index() -> None:
    """The substitutions that a build makes, since an index shows README.md without the files beside it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for each in settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    home = settings["project"]["urls"]["Homepage"]
    raw = home.replace("github.com", "raw.githubusercontent.com")
    assert re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text) == [f"{raw}/main/docs/curves.png"]
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    for link in links:
        if link.startswith(f"{home}/blob/main/"):
            assert (ROOT / link.removeprefix(f"{home}/blob/main/")).is_file()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_a_form_and_names_commands_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    form = yaml.safe_load(text)
    if path.stem != "config":
        ids = [item["id"] for item in form["body"]]
        assert form["name"] and form["description"] and len(set(ids)) == len(ids)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"rtdetr-act (\w+)", text)) <= commands.keys()
