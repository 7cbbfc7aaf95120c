"""Find the checkpoints in run folders, and name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtdetr_act.errors import InputError, quote


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the best.pt of every run in a folder, sorted by path; the folder may be a run itself.

    Raises:
        InputError: There is none.
    """
    found = sorted(path for path in folder.rglob("best.pt") if path.parent.name == "weights" or path.parent == folder)
    if not found:
        raise InputError(f"there is no run with a weights/best.pt in {quote(str(folder))}: give a .pt file")
    return found


def name_checkpoints(paths: Sequence[Path]) -> list[str]:
    """Return names that tell checkpoints apart: the run folder, with folders above it and the file where need be.

    >>> name_checkpoints([Path("runs/detect/arelu/weights/best.pt"), Path("rtdetr-l.pt")])
    ['arelu', 'rtdetr-l']
    >>> name_checkpoints([Path("a/arelu/weights/best.pt"), Path("b/arelu/weights/best.pt")])
    ['a/arelu', 'b/arelu']
    >>> name_checkpoints([Path("arelu/weights/best.pt"), Path("arelu/weights/last.pt")])
    ['arelu/best', 'arelu/last']
    """
    whole = [path.absolute().with_suffix("").parts for path in paths]
    in_run = [len(parts) > 2 and parts[-2] == "weights" for parts in whole]
    keeps_stem = len({parts[-1] for parts, inside in zip(whole, in_run, strict=True) if inside}) > 1
    named, least = [], []  # the parts of each name, and how many of them it has at least
    for parts, inside in zip(whole, in_run, strict=True):
        named.append((*parts[:-2], *([parts[-1]] * keeps_stem)) if inside else parts)
        least.append(2 if inside and keeps_stem else 1)
    found = []
    for index, own in enumerate(named):
        others = named[:index] + named[index + 1 :]
        lengths = range(least[index], len(own))
        length = next((n for n in lengths if all(each[-n:] != own[-n:] for each in others)), len(own))
        found.append("/".join(own[-length:]))
    return found
