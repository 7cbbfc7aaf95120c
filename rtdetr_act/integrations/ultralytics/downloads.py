"""Restrict downloads: do not run code from the YAML of a data set, and download nothing in commands that only inspect.

The hooks import this module, so torch and Ultralytics are imported inside functions only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rtdetr_act.errors import InputError, quote

ALLOW_CODE = "RTDETR_ACT_ALLOW_DOWNLOAD_CODE"  # environment variable, inherited by the processes of studies and DDP
ALLOW_CODE_FLAG = "--allow-download-code"
_URL = re.compile(r"https?://\S+", re.IGNORECASE)  # one word; no Python statement begins like this
_blocked = False


@contextmanager
def no_downloads() -> Iterator[None]:
    """Make downloads of Ultralytics and `torch.hub` raise InputError inside the block.

    These are downloads of checkpoints, data sets and weights of torchvision's models. Rows of a model YAML that would
    download weights (`TorchVision`) are built without them.
    """
    global _blocked
    if _blocked:
        yield
        return
    _blocked = True
    try:
        with ExitStack() as stack:
            for module, name in _find_download_functions():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, _do_nothing if name == "check_font" else _refuse)
            yield
    finally:
        _blocked = False


def are_downloads_blocked() -> bool:
    """Return whether the caller is inside a `no_downloads` block."""
    return _blocked


def _find_download_functions() -> list[tuple[Any, str]]:
    """Return (module, name) of each function that downloads, in all modules that have imported it by name."""
    import torch
    from ultralytics.utils import downloads

    own = downloads.safe_download
    modules = [module for name, module in sys.modules.items() if name.startswith("ultralytics.")]
    found: list[tuple[Any, str]] = [(m, "safe_download") for m in modules if vars(m).get("safe_download") is own]
    # Reading a data set also downloads a font, with which Ultralytics draws class names.
    found += [(m, "check_font") for m in modules if callable(vars(m).get("check_font"))]
    return [*found, (torch.hub, "download_url_to_file")]


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


def _refuse(url: Any = "", *_: Any, **__: Any) -> Any:
    """Raise InputError instead of downloading."""
    raise InputError(
        f"{quote(str(url))} would have to be downloaded or unpacked first, and this command downloads nothing: "
        "get it, or train with it once"
    )


def check_det_dataset(
    original: Callable[..., Any], dataset: Any, autodownload: bool = True, *rest: Any, **more: Any
) -> Any:
    """Read the YAML of a data set as Ultralytics does, without running code from YAMLs that Ultralytics does not ship.

    If images are missing, Ultralytics would run the value of `download`: a shell command or Python code.

    Args:
        original: Ultralytics' function.
        dataset: Name or path of the data set.
        autodownload: Whether to download missing images. Default: True.
        *rest: Further positional arguments of the original.
        **more: Further keyword arguments of the original.

    Raises:
        InputError: The images are missing, and `download` is code, or downloads are blocked.
    """
    try:
        return original(dataset, False, *rest, **more)
    except FileNotFoundError:
        if not autodownload or (code := _download_entry(dataset)) is None:
            raise
        path, text = code
    if _blocked:
        raise InputError(
            f"the images of the data set {quote(str(dataset))} are not here, and this command downloads nothing: "
            "get them, or train with it once"
        )
    if not (_URL.fullmatch(text.strip()) or _is_shipped_dataset(path) or os.environ.get(ALLOW_CODE) == "1"):
        raise InputError(
            f"the images of the data set {quote(str(dataset))} are not here, and its 'download:' is code, which was "
            f"not run: {quote(text.strip())}; if you trust it, call rtdetr-act {ALLOW_CODE_FLAG} …, or set "
            f"{ALLOW_CODE}=1"
        )
    return original(dataset, autodownload, *rest, **more)


def _download_entry(dataset: Any) -> tuple[Path, str] | None:
    """Return the path of a data set's YAML and its `download:`, or None if it has none."""
    import ultralytics.utils
    from ultralytics.data.utils import find_dataset_yaml
    from ultralytics.utils.checks import check_file

    name = str(dataset)
    if not Path(name).suffix and not Path(name).exists():  # a bare name, such as coco8, which newer releases take
        name = f"{name}.yaml"
    path = Path(check_file(name))
    if path.is_dir():
        path = find_dataset_yaml(path)
    if path.suffix not in (".yaml", ".yml"):
        return None
    found = ultralytics.utils.YAML if hasattr(ultralytics.utils, "YAML") else None  # a class since 8.3.120
    data = found.load(path) if found else ultralytics.utils.yaml_load(path)
    entry = data.get("download")
    return (path, str(entry)) if entry else None


def _is_shipped_dataset(path: Path) -> bool:
    """Return whether a path is a data set YAML that Ultralytics ships."""
    from ultralytics.utils import ROOT

    return (Path(ROOT) / "cfg" / "datasets").resolve() in path.resolve().parents
