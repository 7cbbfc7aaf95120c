"""Read a YAML file that a user or another program wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rtdetr_act.errors import InputError, reason

_MAX_BYTES = 1_000_000
_MAX_NODES = 100_000  # with aliases written out


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return what a YAML file holds: a mapping with text for keys, of any plain values.

    Raises:
        InputError: There is no such file, it is no YAML, its aliases are cyclic or stand for more than a file could
            hold, or it is no such mapping.
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
        raise InputError(f"'{path}' is no valid YAML: it is not UTF-8 text") from None
    try:
        data = _load_yaml(text)
    # What PyYAML lets through: int("x"), dates of no month, scalars that their tag does not fit, a thousand brackets.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as e:
        why = f": {reason(e)}" if isinstance(e, (yaml.YAMLError, ValueError)) else ""
        raise InputError(f"'{path}' is no valid YAML{why}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(f"'{path}' is not a mapping of names to values, such as 'epochs: 100'")
    return data


def _load_yaml(text: str) -> Any:
    """Read as `yaml.safe_load` does, but count what aliases stand for before it is put together."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if _count_nodes(node, {}) > _MAX_NODES:
            raise ValueError("its aliases stand for too much")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Count the nodes of a document with its aliases written out; raises ValueError where one holds itself."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError("an alias stands inside of what it stands for")
        return count
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    found = 1 + sum(_count_nodes(part, known) for part in parts)
    known[id(node)] = found
    return found
