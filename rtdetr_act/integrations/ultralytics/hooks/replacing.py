"""Replace functions of another library, and put them back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

replaced: list[tuple[Any, str, Any]] = []  # (owner, name, what stood there), in order, for remove()


def replace(owner: Any, name: str, wrapper: Callable[..., Any], *, by_name: bool = False) -> None:
    """Replace `owner.name`, and with `by_name` its imports by name, by a function that gets the original first."""
    original = getattr(owner, name)

    @wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    # What was loaded before may have imported a function from its module by name.
    modules = [found for key, found in list(sys.modules.items()) if key.startswith("ultralytics.")] if by_name else []
    for place in (owner, *(found for found in modules if found is not owner and vars(found).get(name) is original)):
        replaced.append((place, name, original))
        setattr(place, name, replacement)
