"""The code blocks and commands of README.md and of the pages in docs/, for those that run them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
# What a fence may hold: code that is run, and text that is only shown.
CODE = ("python", "sh", "yaml")
SHOWN = ("text",)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The Markdown file.
        line: Line of its first line of code, from 1.
        language: What stands behind the fence, "" if nothing does.
        text: The code.
    """

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Page and line, such as `docs/swap.md:12`."""
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page.as_posix()}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a `sh` block.

    Attributes:
        block: The block.
        text: The command in one line, without its comment.
    """

    block: Block
    text: str

    @property
    def words(self) -> list[str]:
        """The words, as a shell splits them."""
        return shlex.split(self.text)


def list_pages() -> list[Path]:
    """Return README.md, its translations, CONTRIBUTING.md, and the pages in docs/ that somebody wrote."""
    return [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_blocks(page: Path, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page in their order, of all languages if none is given."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    fences = [token for token in tokens if token.type == "fence"]
    blocks = [Block(page, (each.map or [0])[0] + 2, each.info.strip(), each.content) for each in fences]
    return [block for block in blocks if not languages or block.language in languages]


def read_commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a `sh` block, continued lines joined and comments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield Command(block, " ".join(line.partition(" #")[0].split()))


def check_command(command: Command) -> None:
    """Parse a command as the program that it names does, and run nothing.

    Raises:
        RtdetrActError: rtdetr-act refuses a word of it.
        AssertionError: It names a target of make, a script, an extra or a program that is not there.
    """
    program, *words = command.words
    if program == "rtdetr-act":
        _check_own(words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[0] in targets, f"there is no target {words[0]}"
    elif program == "python":
        assert words[0] == "-m" or (ROOT / words[0]).is_file(), f"there is no script {words[0]}"
    elif program == "pip":
        name, _, extras = words[1].rstrip("]").partition("[")
        assert words[0] == "install" and (ROOT / name / "pyproject.toml").is_file(), f"nothing to install in {name}"
        project = (ROOT / name / "pyproject.toml").read_text(encoding="utf-8")
        assert all(f"\n{extra} = [" in project for extra in filter(None, extras.split(","))), f"no extra {extras}"
    else:
        assert program == "yolo", f"nobody knows how to check {program}"


def _check_own(words: list[str]) -> None:
    from ultralytics.cfg import DEFAULT_CFG_DICT

    from rtdetr_act.cli import main  # noqa: F401, which registers the commands
    from rtdetr_act.cli.app import app
    from rtdetr_act.errors import InputError

    group: Any = typer.main.get_command(app)
    if words[0] not in group.commands:
        raise InputError(f"there is no command '{words[0]}'")
    given = group.commands[words[0]].make_context(words[0], words[1:]).params
    for word in [*(given.get("pairs") or ()), *(given.get("words") or ())]:
        key, equals, _ = word.partition("=")
        if equals and key not in DEFAULT_CFG_DICT:
            raise InputError(f"neither {words[0]} nor Ultralytics has an argument '{key}'")


class Session:
    """The Python blocks of a page, run in their order in one namespace.

    What stands behind a `print` as a comment that begins with a digit must be printed.
    """

    def __init__(self) -> None:
        module = types.ModuleType("docs_page")
        sys.modules[module.__name__] = module  # where pickle looks for the classes that a page defines
        self.namespace = module.__dict__

    def run(self, block: Block, text: str | None = None) -> str:
        """Run a block in the current folder, and return what it printed.

        Args:
            block: The block.
            text: What to run in its place; None (default) for the block as it is.
        """
        code = compile(block.text if text is None else text, block.place, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.namespace)
        for expected in re.findall(r"print\(.*\)  # (\d.*)", block.text):
            assert expected in printed.getvalue(), f"{block.place} printed {printed.getvalue()!r}, not {expected!r}"
        return printed.getvalue()
