"""Safe reading of YAML files from users and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rtdetr_act.errors import InputError, reason

_MAX_BYTES = 1_000_000
_MAX_NODES = 100_000  # with aliases expanded


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return the contents of a YAML file that holds a mapping with strings as keys.

    Raises:
        InputError: There is no such file, it is not valid YAML, its aliases are cyclic or expand to more than 100,000
            nodes, or it is not such a mapping.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"'{path}' is not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"'{path}' is larger than {_MAX_BYTES:,} bytes: it is not a file of settings")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"'{path}' is not valid YAML: it is not UTF-8 text") from None
    try:
        data = _load_yaml(text)
    # Errors that PyYAML does not wrap: int("x"), invalid dates, scalars that do not fit their tag, deep nesting.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as e:
        why = f": {reason(e)}" if isinstance(e, (yaml.YAMLError, ValueError)) else ""
        raise InputError(f"'{path}' is not valid YAML{why}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"'{path}' is not a mapping of names to values, such as 'epochs: 100'")
    return data


def _load_yaml(text: str) -> Any:
    """Load as `yaml.safe_load` does, but check the size with expanded aliases before constructing objects."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if _count_nodes(node, {}) > _MAX_NODES:
            raise ValueError("its aliases expand to too many nodes")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Return the number of nodes with aliases expanded; raises ValueError for a cyclic alias.

    Args:
        node: Root of the tree.
        known: Counts by the ID of the node, None while a node is being counted; updated in place.
    """
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError("an alias refers to a node that contains it")
        return count
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    count = 1 + sum(_count_nodes(part, known) for part in parts)
    known[id(node)] = count
    return count
