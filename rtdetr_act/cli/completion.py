"""Completion of words in the shell: activations, models, data sets and deployment targets by name.

A completion must be quick, so neither torch nor Ultralytics is imported: files are listed where they are installed, and
the names of activations are kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import typer

from rtdetr_act.version import __version__

WORDS = "rtdetr_act.words"  # where a command leaves the words before the one to complete


def complete_act(incomplete: str) -> list[str]:
    """Complete the last name in a plan, such as `dyrelu_b@backbone, si`."""
    before, last = _split_last(incomplete)
    return [before + name for name in [*_list_activations(), "stock"] if name.startswith(last)]


def complete_model(incomplete: str) -> list[str]:
    """Complete the name of a shipped model; files are left to the shell."""
    from rtdetr_act.integrations.ultralytics.configs import config_names

    return _select([*config_names(), *_list_ultralytics_files("models")], incomplete)


def complete_data(incomplete: str) -> list[str]:
    """Complete the name of a data set of Ultralytics, or `shapes`."""
    return _select(["shapes", *_list_ultralytics_files("datasets")], incomplete)


def complete_target(incomplete: str) -> list[str]:
    """Complete the name of a deployment target."""
    targets = ["axelera", "edgetpu", "hailo", "openvino", "qualcomm-htp", "rknn", "ti-tidl", "vitis-dpu"]
    return _select(targets, incomplete)


_BY_KEY: dict[str, Callable[[str], list[str]]] = {
    "act": complete_act,
    "from": complete_act,
    "model": complete_model,
    "pretrained": complete_model,
    "data": complete_data,
    "for": complete_target,
}


def complete_word(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a word of the command line: the value of `key=value`, else a model."""
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={each}" for each in _BY_KEY.get(key, _none)(value)]
    # Bash splits words at "=", so that the key is the word before.
    before = ctx.meta.get(WORDS, [])
    if before[-1:] == ["="] and len(before) > 1:
        return _BY_KEY.get(before[-2], _none)(incomplete)
    words = os.environ.get("COMP_WORDS", "").split()
    if before and words[-1:] == ["="]:
        return _BY_KEY.get(before[-1], _none)("")
    return complete_model(incomplete) if incomplete else []


def _none(_: str) -> list[str]:
    return []


def _split_last(text: str) -> tuple[str, str]:
    """Split a plan in front of its last name, as far as that is written."""
    start = max(text.rfind(","), text.rfind(" ")) + 1
    return text[:start], text[start:]


def _select(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})


def _list_ultralytics_files(kind: str) -> list[str]:
    """Return the names of the YAMLs of models or data sets that Ultralytics ships."""
    spec = find_spec("ultralytics")
    folders = spec.submodule_search_locations if spec else None
    return [file.name for folder in folders or () for file in Path(folder, "cfg", kind).rglob("*.yaml")]


def _list_activations() -> list[str]:
    """Return the names of all activations, from the cache if they were listed before."""
    import platformdirs

    folder = Path(__file__).parents[1] / "activations"
    files = [f"{file.name} {file.stat().st_mtime_ns}" for file in sorted(folder.glob("*.py"))]
    plugins = sorted(f"{each.name} {each.value}" for each in entry_points(group="rtdetr_act.activations"))
    state = zlib.crc32("\n".join([__version__, *files, *plugins]).encode())
    cache = platformdirs.user_cache_path("rtdetr-act") / f"names-{state:08x}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return cache.read_text(encoding="utf-8").split()

    from rtdetr_act.activations.registry import names  # brings torch: seconds, once
    from rtdetr_act.files import write_atomically

    found = names()
    with contextlib.suppress(OSError):  # the cache may be read-only
        cache.parent.mkdir(parents=True, exist_ok=True)
        for old in cache.parent.glob("names-*.txt"):
            old.unlink(missing_ok=True)
        write_atomically(cache, "\n".join(found).encode())
    return found
