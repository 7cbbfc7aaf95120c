"""Compose the API reference: every public name of the package, by the room that it lives in.

`make docs` includes it in docs/api.md, so that no name is missing there.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import rtdetr_act

# Rooms in the order in which a reader meets them; a room without a title here comes last, under its own name.
TITLES = {
    "surgery": "Swap",
    "activations": "Activations",
    "kernels": "Ops",
    "deploy": "Deployment",
    "analysis": "Analysis",
    "workflows": "What the commands do",
    "study": "Studies",
    "integrations": "Ultralytics",
    "errors": "Errors",
}


def write_api(path: Path) -> None:
    """Write the reference in Markdown, where it changes."""
    text = compose_api()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def compose_api() -> str:
    """Return a section for each room, with its functions and then its classes in alphabetical order."""
    rooms: dict[str, list[str]] = {}
    for name in rtdetr_act.__all__:
        if not name.startswith("__"):
            rooms.setdefault(getattr(rtdetr_act, name).__module__.split(".")[1], []).append(name)
    order = sorted(rooms, key=lambda room: (list(TITLES).index(room) if room in TITLES else len(TITLES), room))
    return "\n".join(_compose_section(room, rooms[room]) for room in order)


def _compose_section(room: str, names: list[str]) -> str:
    found = sorted((_get_directive(getattr(rtdetr_act, name)), name) for name in names)
    found.sort(key=lambda each: each[0] != "autofunction")
    entries = [f".. {directive}:: {name}{_OPTIONS[directive]}" for directive, name in found]
    body = "\n\n".join([".. currentmodule:: rtdetr_act", *entries])
    return f"## {TITLES.get(room, room.capitalize())}\n\n```{{eval-rst}}\n{body}\n```\n"


_OPTIONS = {
    "autofunction": "",
    "autoclass": "\n   :members:",
    "autoexception": "\n   :show-inheritance:",
}


def _get_directive(value: Any) -> str:
    if not inspect.isclass(value):
        return "autofunction"
    return "autoexception" if issubclass(value, Exception) else "autoclass"
