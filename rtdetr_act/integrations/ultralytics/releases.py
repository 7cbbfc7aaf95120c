"""Which releases of Ultralytics were verified, as `docs/compatibility.md` records it."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

# The columns Ultralytics, torch, numpy, needs, auto, checks passed.
_ROW = re.compile(r"^\| ([\d.]+) \|[^|]*\|[^|]*\| *([^|]*?) *\|[^|]*\| (\d+) of (\d+) \|", re.MULTILINE)


def compatibility_file() -> Path:
    """Return the path of the record: inside an installed package, or in the docs of a checkout."""
    installed = Path(__file__).parent / "compatibility.md"
    return installed if installed.is_file() else Path(__file__).parents[3] / "docs" / "compatibility.md"


def read_verified_releases() -> dict[str, str]:
    """Return the releases that passed all checks, the oldest first, with what they need, such as "numpy<2.4", or ""."""
    try:
        text = compatibility_file().read_text(encoding="utf-8")
    except OSError:
        return {}
    found = {release: needs.strip("`") for release, needs, passed, total in _ROW.findall(text) if passed == total}
    return dict(sorted(found.items(), key=lambda item: parse_release(item[0])))


def describe_release(release: str) -> str:
    """Return whether a release of Ultralytics was verified, and what it needs.

    >>> describe_release("8.2.0").partition(":")[0]
    'older than the oldest that rtdetr-act supports'
    """
    verified = read_verified_releases()
    own = parse_release(release)
    required = _read_required_release()
    if required and own < parse_release(required):
        return f"older than the oldest that rtdetr-act supports: {required}"
    if release in verified:
        return f"verified{f', needs {verified[release]}' if verified[release] else ''}"
    if not verified:
        return "the record of what was verified is missing"
    before = [each for each in verified if parse_release(each) < own]
    after = [each for each in verified if parse_release(each) > own]
    if not after:
        return f"newer than the newest that was verified: {before[-1]}"
    return f"not verified, unlike {' and '.join([*before[-1:], after[0]])}"


def parse_release(release: str) -> tuple[int, ...]:
    """Return the numbers of a release, to compare it with others.

    >>> parse_release("8.4.190") > parse_release("8.4.30")
    True
    """
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])


def _read_required_release() -> str:
    """Return the oldest release of Ultralytics that this package requires, "" if it is not installed."""
    try:
        requirements = metadata.requires("rtdetr-act") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        return ""
    found = (re.match(r"ultralytics *>= *([\d.]+)", each) for each in requirements)
    return next((match[1] for match in found if match), "")
