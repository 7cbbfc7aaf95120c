"""Messages through Ultralytics' logger."""

from __future__ import annotations


def log(text: str, *, warn: bool = False) -> None:
    """Say something through Ultralytics' logger."""
    from ultralytics.utils import LOGGER, colorstr

    (LOGGER.warning if warn else LOGGER.info)(f"{colorstr('rtdetr-act:')} {text}")
