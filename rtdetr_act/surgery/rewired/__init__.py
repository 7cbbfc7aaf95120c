"""Classes of rewired blocks that earlier checkpoints name, before `rewiring` made them from the source code."""

from __future__ import annotations

from typing import Any

from rtdetr_act.surgery.rewiring import make_class


def make_alias(module: str, name: str, cls: type, children: tuple[str, ...] = ()) -> Any:
    """Return a class of a rewired block that can be found at a path; saved again, it takes the form of today.

    Args:
        module: Module of the path.
        name: Name of the class there.
        cls: Class of the block.
        children: As in `make_class`.
    """
    return type(name, (make_class(cls, children),), {"__module__": module, "__qualname__": name, "rewired_from": cls})
