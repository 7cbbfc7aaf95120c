"""Fail where a built site needs the network: a script, style sheet, font or picture from another address.

    python scripts/check_site.py docs/_build/html

Plain links to other sites are fine. Prints each resource with the page that loads it, and exits with 1 if there is one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

OUTSIDE = re.compile(r"(https?:)?//", re.IGNORECASE)
# The attributes by which a tag loads something, and the relations by which a <link> does.
LOADS = {"src", "srcset", "data", "poster"}
LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "manifest"}


def find_outside_resources(folder: Path) -> list[tuple[Path, str]]:
    """Return the addresses outside a site that its pages and style sheets load, each with its file."""
    found = []
    for page in sorted(folder.rglob("*.html")):
        found += [(page, address) for address in _read_page(page) if OUTSIDE.match(address.strip())]
    for sheet in sorted(folder.rglob("*.css")):
        found += [(sheet, address) for address in _read_styles(sheet.read_text("utf-8")) if OUTSIDE.match(address)]
    return found


def _read_page(path: Path) -> list[str]:
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.addresses


def _read_styles(text: str) -> Iterator[str]:
    for quoted, bare in re.findall(r"""(?:url\(|@import(?!\s*url))\s*(?:["']([^"']*)["']|([^)"';\s]+))""", text):
        yield quoted or bare


class _Reader(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        self.addresses += [given[name] for name in LOADS & given.keys()]
        self.addresses += _read_styles(given.get("style", ""))
        if tag == "link" and LINKS & set(given.get("rel", "").split()):
            self.addresses.append(given.get("href", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.addresses += _read_styles(data)


if __name__ == "__main__":
    outside = find_outside_resources(Path(sys.argv[1]))
    for page, address in outside:
        print(f"{page} loads {address}")
    sys.exit(bool(outside))
