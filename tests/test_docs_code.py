"""Every code block of README.md and of the pages says what there is: quick checks of what `make docs-code` runs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))
import activation_pages  # noqa: E402
import docs_blocks  # noqa: E402
from docs_blocks import Block, Command, Session  # noqa: E402

PAGES = docs_blocks.list_pages()
BLOCKS = [block for page in PAGES for block in docs_blocks.read_blocks(page)]
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in docs_blocks.read_commands(block)]
# Pages whose Python trains, exports or compiles, and those that another test runs.
HEAVY = (".train(", ".val(", ".export(", "train_variants(", "run_study(", "check_activation(")
ELSEWHERE = {"CONTRIBUTING.md": "tests/test_contributing.py writes and runs its files"}


def python_pages() -> list[Path]:
    """Return the pages that have Python blocks, without one that is heavy."""
    found = []
    for page in PAGES:
        blocks = docs_blocks.read_blocks(page, "python")
        if blocks and page.name not in ELSEWHERE and not any(word in block.text for block in blocks for word in HEAVY):
            found.append(page)
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_fence_names_a_language_that_is_run_or_only_shown(block: Block) -> None:
    assert (
        block.language in (*docs_blocks.CODE, *docs_blocks.SHOWN)
        or block.language.startswith("{")
        or (block.page.name == "CONTRIBUTING.md" and not block.language)
    )
    if block.language == "python":
        ast.parse(block.text)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.block.place} {command.text[:60]}")
def test_a_command_has_only_options_that_exist(command: Command) -> None:
    docs_blocks.check_command(command)


def test_pages_of_activations_have_commands_and_code_that_exist(tmp_path: Path) -> None:
    pages = activation_pages.write_pages(tmp_path, curves=False)
    assert len(pages) == 49
    for page in pages:
        shell, code = docs_blocks.read_blocks(page, "sh", "python")
        for command in docs_blocks.read_commands(shell):
            docs_blocks.check_command(command)
        ast.parse(code.text)


@pytest.mark.parametrize("page", python_pages(), ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics import RTDETR

    monkeypatch.chdir(tmp_path)
    model = RTDETR(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.RTDETR)))
    torch.save({"model": model.model}, "best.pt")  # 8.3.0 cannot save a model that was built from a YAML
    session = Session()
    for block in docs_blocks.read_blocks(page, "python"):
        session.run(block)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.place
)
def test_a_yaml_is_a_study_or_rows_of_a_model(block: Block) -> None:
    content = yaml.safe_load(block.text)
    if "activations" in content:
        from rtdetr_act.study.grid import make_study

        assert make_study(content, defaults={}).activations
    else:
        build(content)


def build(rows: dict[str, Any]) -> None:
    """Build RT-DETR-L with the rows and keys of a YAML in place of its own; each row must be one of it."""
    from ultralytics.nn.tasks import RTDETRDetectionModel, yaml_model_load

    from rtdetr_act.surgery.model_plan import read_plan

    model_yaml = yaml_model_load("rtdetr-l.yaml")
    model_yaml.update({key: value for key, value in rows.items() if key not in ("backbone", "head")})
    for section in ("backbone", "head"):
        for row in rows.get(section, ()):
            model_yaml[section][model_yaml[section].index(row[:4])] = row
    assert read_plan(RTDETRDetectionModel(model_yaml, verbose=False)).rules


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    import api_page

    import rtdetr_act

    text = api_page.compose_api()
    assert not [name for name in rtdetr_act.__all__ if not name.startswith("__") and f":: {name}\n" not in text]


def test_every_activation_says_when_to_choose_it_or_why_not() -> None:
    from rtdetr_act.activations.registry import get_entry, names

    assert not [name for name in names() if not (get_entry(name).use_when or get_entry(name).note)]


def test_a_resource_from_elsewhere_is_found_and_a_link_is_not(tmp_path: Path) -> None:
    import check_site

    (tmp_path / "page.html").write_text(
        '<a href="https://a.org">a</a><img src="own.png"><script src="//cdn.org/x.js"></script>'
        '<link rel="stylesheet" href="https://fonts.org/f.css"><style>@import url("http://b.org/c.css");</style>',
        encoding="utf-8",
    )
    (tmp_path / "own.css").write_text("a{background:url(https://d.org/e.png)} b{background:url(own.png)}", "utf-8")
    found = [address for _, address in check_site.find_outside_resources(tmp_path)]
    assert found == ["//cdn.org/x.js", "https://fonts.org/f.css", "http://b.org/c.css", "https://d.org/e.png"]
